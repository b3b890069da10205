"""Items that arrive after training: seen and unseen recall of every retriever that can have them.

    python benchmarks/cold_start.py DATA/amazon2014-beauty --out runs/cold [--minutes 20] [--share 0.05]
           [--also sasrec,two_tower,mind,comirec,eager] [--on validation]

After TIGER §4.3. 5% of the items are held out before everything: text encoder, tokenizer and network never meet
them, and their events are taken from training, validation and every history. Afterwards they get IDs from
the frozen tokenizer. Each test user has one list: "unseen" is the recall of those of the next items that were held
out, of the users who want one; "seen" that of the others; "had" the share of the first ten that the user had
before. "rule ε" lets new items enter after an item that shares their codes, at most ⌊ε·K⌋ of K; "updated trie"
decodes them like all others. Text neighbours know the new items' texts too; networks of --also learn beside TIGER,
share the minutes with it as in `tiglon train`, and are measured before and after the new items came. Nothing is masked.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from machine import machine, machine_line
from retrievers import Teller
from rich.console import Console
from tiger import Printer, arguments, changes_of, identify, item_vectors, prepare, recipe_of, source_of

from tiglon.evaluation.metrics import judge, recall
from tiglon.evaluation.protocol import Retriever, rank
from tiglon.recipes import in_minutes, learn, make_tokenizer
from tiglon.retrieval.dense import DenseRetriever
from tiglon.retrieval.eager import Eager
from tiglon.retrieval.neighbours import NeighbourSum, Popularity, TextNeighbours
from tiglon.retrieval.tiger import Tiger
from tiglon.serving.bundle import codes_of
from tiglon.types import MISSING, Candidates, Histories, Interactions, Items, Targets, Vocabulary

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
KS = (10, 20)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--share", type=float, default=0.05, help="of the items, held out")
    parser.add_argument(
        "--also", default="", metavar="NAMES", help="of sasrec, two_tower, mind, comirec, eager"
    )
    parser.add_argument(
        "--on", choices=("validation", "test"), default="test", help="whose next item is asked"
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=150)
    console.print(machine_line())

    split, whole = prepare(source_of(given.folder))
    held = np.random.default_rng(given.seed).random(len(whole)) < given.share
    numbers = np.argsort(held, kind="stable")  # old items first, then the new ones
    renumbered = np.empty(len(whole), np.int64)
    renumbered[numbers] = np.arange(len(whole))
    everything = Items(Vocabulary(whole.vocabulary.decode(numbers)), whole.table[numbers])
    n_old = int((~held).sum())
    old = Items(Vocabulary(everything.vocabulary.raw.slice(0, n_old)), everything.table[:n_old])
    new = Items(Vocabulary(everything.vocabulary.raw.slice(n_old)), everything.table[n_old:])
    log = split.train.take(~held[split.train.item])
    log = Interactions(
        log.user, renumbered[log.item].astype(np.int32), log.time, log.users, old.vocabulary, pl.DataFrame()
    )
    validation = without_new(split.validation, renumbered, n_old)
    asked = getattr(split, given.on)
    if given.users:
        asked = asked.take(np.sort(np.random.default_rng(0).permutation(len(asked))[: given.users]))
    histories = _keep(asked.histories, renumbered, 0, n_old)
    parts = {
        "seen": _keep(asked.truth, renumbered, 0, n_old),
        "unseen": _keep(asked.truth, renumbered, n_old, len(everything)),
        "all": _keep(asked.truth, renumbered, 0, len(everything)),
    }
    who = {part: truth.lengths > 0 for part, truth in parts.items()}
    console.print(
        f"{given.folder.name}: {len(new):,} of {len(everything):,} items held out with "
        f"{len(split.train) - len(log):,} training events; {who['unseen'].sum():,} of {len(asked):,} {given.on} users "
        "want one"
    )

    recipe = recipe_of(given.recipe, len(log), old, changes_of(given) | {"retrievers": given.also})
    if given.minutes:
        recipe = in_minutes(recipe, given.minutes)
    text, vectors = item_vectors(log, old, recipe)
    tokenizer = make_tokenizer(recipe.ids).fit(vectors)
    ids = identify(tokenizer, vectors, old)
    tiger = Tiger(ids, old.vocabulary, recipe.tiger, vectors=vectors)
    tiger.fit(log, validation, directory=given.out and given.out / "run", report=Printer(console))
    others = [
        learn(name, recipe, log, validation, vectors, given.out, Teller(console))
        for name in recipe.retrievers
    ]

    before, others_before = copy.copy(tiger), [Before(other, everything.vocabulary) for other in others]
    arrived = text.vectors(new)
    tiger.add_items(everything.vocabulary, codes_of(tokenizer, arrived, new.vocabulary), arrived)
    for other in others:
        other.add_items(everything.vocabulary, arrived)
    known = replace(log, items=everything.vocabulary)
    retrievers: list[Retriever] = [
        *(Rule(before, tiger, share) for share in SHARES),
        tiger,
        *(both for pair in zip(others_before, others, strict=True) for both in pair),
        TextNeighbours().fit(known, everything),
        NeighbourSum().fit(known, everything),
        Popularity().fit(known, everything),
    ]
    rows = []
    console.print(
        f"\n{'':<28} {'recall@10 seen':>15} {'unseen':>8} {'all':>8} {'recall@20 unseen':>18} {'had':>6}"
    )
    for retriever in retrievers:
        lists = rank(retriever, histories, max(KS), exclude_seen=False, batch=512)
        name = "TIGER, updated trie" if retriever is tiger else retriever.name
        row = {
            f"recall@{k} {part}": float(recall(*judge(lists[who[part]], truth.take(who[part])), k).mean())
            for k in KS
            for part, truth in parts.items()
        }
        n = len(everything)
        first, past = lists[:, :10], np.unique(histories.owner * n + histories.item)
        row["had@10"] = float(
            np.isin(np.arange(len(first))[:, None] * n + first, past)[first != MISSING].mean()
        )
        rows.append({"name": name} | row)
        console.print(
            f"{name:<28} {row['recall@10 seen']:>15.4f} {row['recall@10 unseen']:>8.4f} "
            f"{row['recall@10 all']:>8.4f} {row['recall@20 unseen']:>18.4f} {row['had@10']:>6.3f}"
        )
    if given.json:
        report = {
            "data": given.folder.name,
            "held_out_items": len(new),
            "users": {part: int(wanting.sum()) for part, wanting in who.items()},
            "on": given.on,
            "rows": rows,
            "machine": machine(),
        }
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


class Before:
    """A network as it is now, whatever is added later."""

    def __init__(self, network: DenseRetriever | Eager, items: Vocabulary) -> None:
        self.network, self.items = copy.deepcopy(network), items
        self.name = f"{network.name}, without them"

    def retrieve(self, histories: Histories, k: int, *, exclude_seen: bool = True) -> Candidates:
        return self.network.retrieve(histories, k, exclude_seen=exclude_seen)


class Rule:
    """The paper's rule: lists over the old items, which new ones join."""

    def __init__(self, before: Tiger, after: Tiger, share: float) -> None:
        self.before, self.after, self.share = before, after, share
        self.name, self.items = f"TIGER, rule ε = {share}", after.items

    def retrieve(self, histories: Histories, k: int, *, exclude_seen: bool = True) -> Candidates:
        return self.after.with_unseen(
            self.before.retrieve(histories, k, exclude_seen=exclude_seen), self.share
        )


def without_new(targets: Targets, renumbered: np.ndarray, n_old: int) -> Targets:
    old = (_keep(part, renumbered, 0, n_old) for part in (targets.histories, targets.truth))
    return Targets(targets.user, *old)


def _keep(histories: Histories, renumbered: np.ndarray, first: int, stop: int) -> Histories:
    """Items by their new numbers, those from `first` to `stop` alone."""
    item = renumbered[histories.item]
    kept = (first <= item) & (item < stop)
    lengths = np.bincount(histories.owner[kept], minlength=len(histories))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(offsets, item[kept], histories.time[kept], user=histories.user)


if __name__ == "__main__":
    main()
