"""From files to table: TIGER on a folder of tables, selected on validation, the test read once.

    python benchmarks/tiger.py DATA/amazon2014-beauty --out runs/beauty-0 [--seed 0] [--minutes 50]
                               [--recipe tiger | tiger_paper] [--tokenizer NAME] [--set train.lr=0.002]

DATA holds interactions.parquet and items.parquet, or is complete-journey. Text is the title (twice), brand and categories, never an
id. Prints the validation curve, then TIGER beside the retrievers without training, on all users, seen items
masked and not, with 95% intervals, and where the time went; --out keeps checkpoints, the model and
result.json. A killed run goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, machine_line
from rich.console import Console

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.sources import Source, tables
from tiglon.data.split import Split, leave_last_out
from tiglon.demo import groceries
from tiglon.evaluation.protocol import Evaluation, Retriever, evaluate, table, to_json
from tiglon.recipes import RECIPES, Recipe, Reporter, item_text, make_tokenizer, override
from tiglon.retrieval.behaviour import BehaviourVectors
from tiglon.retrieval.neighbours import CoOccurrence, NeighbourSum, Popularity, TextNeighbours, text_template
from tiglon.retrieval.tiger import Tiger
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.tokenizer import Tokenizer
from tiglon.serving.bundle import ItemText, codes_of
from tiglon.train.loop import Progress
from tiglon.types import Interactions, Items

TOKENIZERS = ("residual-kmeans", "rqvae", "lsh", "random")
JOURNEY = "complete-journey"
SHORT = {"kmeans": "residual-kmeans"}


@dataclass
class Stages:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {s / total:.0%}" for name, s in self.seconds.items())
        return f"{total / 60:.1f} minutes: {shares}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokenizer", choices=[*TOKENIZERS, *SHORT])
    parser.add_argument("--out", type=Path, metavar="DIR", help="checkpoints, model and result.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = changes_of(given)
    if given.tokenizer:
        changes["ids.tokenizer"] = SHORT.get(given.tokenizer, given.tokenizer)
    run(given.folder, given.recipe, changes, given.out, users=given.users, test=not given.no_test)


def arguments(description: str) -> argparse.ArgumentParser:
    """What the benchmarks of TIGER share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--recipe", choices=list(RECIPES), default="tiger")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="of training; by default the recipe's epochs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--users", type=int, help="measure a sample of so many users, for a quick look")
    parser.add_argument("--no-test", action="store_true", help="stop after the validation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    return parser


def changes_of(given: argparse.Namespace) -> dict[str, str]:
    changes = dict(setting.split("=", 1) for setting in given.settings)
    changes["train.seed"] = changes["ids.seed"] = str(given.seed)
    if given.minutes:
        changes["train.minutes"] = str(given.minutes)
    return changes


def recipe_of(name: str, events: int, items: Items, changes: Mapping[str, str]) -> Recipe:
    """The package's recipe for data of this size, reading the text that the baselines read."""
    recipe = override(RECIPES[name](events, len(items)), changes)
    template = recipe.text.template or text_template(items)
    return replace(recipe, text=replace(recipe.text, template=template))


def run(
    folder: Path,
    recipe_name: str,
    changes: Mapping[str, str],
    out: Path | None,
    *,
    users: int | None = None,
    test: bool = True,
    baselines: bool = True,
) -> dict[str, Any]:
    """One seed, from files to table; what is written to result.json."""
    console, stages, machine_before = Console(width=150), Stages(), machine()
    console.print(machine_line())
    with stages.stage("reading"):
        split, items = prepare(source_of(folder))
    recipe = recipe_of(recipe_name, len(split.train), items, changes)
    with stages.stage("vectors"):
        text, vectors = item_vectors(split.train, items, recipe)
    with stages.stage("tokenizer"):
        tokenizer = make_tokenizer(recipe.ids).fit(vectors)
        ids = identify(tokenizer, vectors, items)
    console.print(
        f"{folder.name}: {len(split.train):,} training events, {len(items):,} items; {recipe.ids.tokenizer} IDs of "
        f"{' × '.join(map(str, ids.sizes))} from {text.described()}, {colliding(ids):.1%} share their codes"
    )

    tiger = Tiger(ids, items.vocabulary, recipe.tiger, vectors=vectors)
    parameters = sum(p.numel() for p in tiger.network.parameters())
    console.print(f"recipe {recipe.name}, seed {recipe.tiger.train.seed}, {parameters:,} parameters")
    started = time.monotonic()
    tiger.fit(split.train, split.validation, directory=out and out / "run", report=Printer(console))
    learning = tiger.history["seconds"]  # of all parts of a resumed run; validations not included
    stages.seconds["training"] = learning
    stages.seconds["validations"] = max(time.monotonic() - started - learning, 0.0)
    if out:
        tiger.save(out / "tiger")
    curve = [(line["epoch"], line["loss"], line["score"]) for line in tiger.history["history"]]
    for epoch, loss, score in curve:
        console.print(f"  epoch {epoch:>3}  loss {loss:.4f}  validation ndcg@10 {score:.4f}")

    retrievers: list[Retriever] = [tiger]
    if baselines:
        with stages.stage("baselines"):
            others = (Popularity(), TextNeighbours(), CoOccurrence(), NeighbourSum())
            retrievers += [other.fit(split.train, items) for other in others]
    report: dict[str, Any] = {}
    for part in ("validation", "test") if test else ("validation",):
        with stages.stage(f"measuring on {part}"):
            report[part] = measure(retrievers, split, part, users, console, folder.name)
    console.print(str(stages))
    report |= {
        "data": folder.name,
        "recipe": asdict(recipe),
        "parameters": parameters,
        "steps": tiger.history["steps"],
        "curve": [dict(zip(("epoch", "loss", "ndcg@10"), point, strict=True)) for point in curve],
        "minutes": {name: seconds / 60 for name, seconds in stages.seconds.items()},
        "machine": machine_before,
    }
    if out:
        (out / "result.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def source_of(data: Path) -> Source:
    """Tables in a folder, or the groceries of the demo by their name."""
    return groceries(Reporter()) if str(data) == JOURNEY else tables(data)


def prepare(source: Source) -> tuple[Split, Items]:
    """Clean, number by the catalogue, split off each user's last two moments."""
    log, items, _ = align(read_interactions(source.interactions), read_items(source.items))
    return leave_last_out(log), items


def item_vectors(training: Interactions, items: Items, recipe: Recipe) -> tuple[ItemText, np.ndarray]:
    """From text, and from what is used together in training where the recipe asks for it: (N, D)."""
    text = item_text(items, recipe.text)
    words = text.words(items)
    if not recipe.ids.behaviour:
        return text, words
    behaviour = BehaviourVectors(recipe.ids.behaviour, seed=recipe.ids.seed)
    return replace(text, behaviour=behaviour), behaviour.fit_encode(training, words)


def identify(tokenizer: Tokenizer, vectors: np.ndarray, items: Items) -> SemanticIds:
    codes = codes_of(tokenizer, vectors, items.vocabulary)
    return SemanticIds.assign(codes, tokenizer.sizes, items.vocabulary)


def colliding(ids: SemanticIds) -> float:
    """Share of the items whose codes, but for the collision digit, another item has too."""
    counts = np.unique(ids.codes[:, :-1], axis=0, return_counts=True)[1]
    return counts[counts > 1].sum() / len(ids)


def measure(
    retrievers: Sequence[Retriever], split: Split, part: str, users: int | None, console: Console, name: str
) -> dict[str, Any]:
    """Masked and unmasked, every retriever on the same users; the table, and the rows with intervals."""
    targets = getattr(split, part)
    if users and users < len(targets):
        targets = targets.take(np.sort(np.random.default_rng(0).permutation(len(targets))[:users]))
    counts = np.bincount(split.train.item, minlength=len(split.train.items))
    found: list[Evaluation] = [
        evaluate(retriever, targets, exclude_seen=mask, popularity=counts, batch=512)
        for mask in (False, True)
        for retriever in retrievers
    ]
    console.print(table(found, title=f"{name}, {part}, whole catalogue, hits on items", intervals=True))
    report = to_json(found, part)
    for row, evaluation in zip(report["rows"], found, strict=True):
        row["intervals"] = evaluation.intervals
    return report


class Printer:
    """A line now and then on how the training goes."""

    def __init__(self, console: Console, seconds: float = 30.0) -> None:
        self.console, self.seconds, self.last = console, seconds, 0.0
        self.score: float | None = None

    def __call__(self, p: Progress) -> None:
        now = time.monotonic()
        if now - self.last < self.seconds and p.score == self.score:
            return
        self.last, self.score = now, p.score
        line = f"{p.share:6.1%}  epoch {p.epoch:>3}  {p.examples_per_second:>7,.0f} targets/s"
        line += f"  loss {p.loss:.4f}" if p.loss is not None else ""
        self.console.print(line + (f"  validation {p.score:.4f}" if p.score is not None else ""))


if __name__ == "__main__":
    main()
