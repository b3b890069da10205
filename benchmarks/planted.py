"""Does a unit find the few behaviours that matter? Planted lives: hit rate and AUC by their length.

    python benchmarks/planted.py [--units twin full_attention …] [--lengths 1000 10000 100000] [--seeds 0 1 2]

In `tiglon.data.lives.planted` twenty behaviours decide a candidate: of its topic and watched to the end. A hundredth
of the life are decoys of the same topic, watched badly, and the newest fifty tell nothing. Every unit learns on lives
of --learn behaviours with --decoys of each candidate's topic, more than a search keeps, and is asked at each length,
on other users; each seed is a world of its own. "found" is the share of deciding behaviours among those that a
two-stage unit attends to (for TWIN V2, inside the virtual items that it attends to).

TWIN V2 learns as TWIN does, behaviour by behaviour, which without clusters it is. Then, its item vectors fixed, it
learns from half as many requests over lives of --v2-learn behaviours with --v2-decoys, clustered as it will be asked:
in five groups of completion, uncapped, by its item vectors, as published, and in a second row by its search's keys.
It alone is asked at --v2-length too.

Rows go to --out as they finish, and those that stand there are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_line

from tiglon.data.histories import HistoryStore
from tiglon.data.lives import Planted, planted
from tiglon.data.ranking import RankingTask
from tiglon.evaluation.ranking import auc
from tiglon.ranking.cluster_store import ClusterStore
from tiglon.ranking.clusters import ClusterConfig, Groups
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.train.loop import TrainConfig

DECIDING, CLUSTERED, BY_KEYS = 20, "twin_v2", "twin_v2 by keys"
UNITS = (
    "twin",
    CLUSTERED,
    BY_KEYS,
    "full_attention",
    "sim_hard",
    "sim_soft",
    "eta",
    "sdim",
    "recent",
    "mean_pooling",
)
BEHAVIOURS, MOST_REQUESTS = 4_000_000, 400  # asked at each length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", nargs="+", default=list(UNITS))
    parser.add_argument("--learn", type=int, default=10_000, help="behaviours of a life in training")
    parser.add_argument("--decoys", type=int, default=100, help="of each candidate, in training")
    parser.add_argument("--v2-learn", type=int, default=25_000, help="of one that TWIN V2 reads as clusters")
    parser.add_argument("--v2-decoys", type=int, default=500, help="of each candidate, in these")
    parser.add_argument("--requests", type=int, default=3_200, help="to learn from")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--v2-length", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine_line())
    rows = (
        [json.loads(line) for line in given.out.read_text().splitlines()]
        if given.out and given.out.is_file()
        else []
    )
    told = {
        name: getattr(given, name)
        for name in ("learn", "decoys", "requests", "epochs", "v2_learn", "v2_decoys")
    }
    for seed in given.seeds:
        learn = None
        for unit in given.units:
            lengths = [*given.lengths, given.v2_length] if unit in (CLUSTERED, BY_KEYS) else given.lengths
            keys = [{"unit": unit, "length": length, "seed": seed} | told for length in lengths]
            keys = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
            if not keys:
                continue
            learn = learn or planted(
                given.learn, given.requests, DECIDING, seed=3 * seed + 100, decoys=given.decoys
            )
            began = time.monotonic()
            ranker = learned(unit.removesuffix(" by keys"), learn, seed, given.epochs)
            by_keys = unit == BY_KEYS
            if unit in (CLUSTERED, BY_KEYS):
                lives = planted(
                    given.v2_learn,
                    given.requests // 2,
                    DECIDING,
                    seed=3 * seed + 101,
                    decoys=given.v2_decoys,
                    features=learn.task.features,
                )
                teach(ranker, replace(lives.task, store=clustered(ranker, lives.task, by_keys)), given.epochs)
            print(f"{unit}, seed {seed}: learned in {time.monotonic() - began:.0f} s", flush=True)
            for key in keys:
                row = key | measured(ranker, asked(key["length"], learn, 3 * seed + 102), by_keys)
                rows.append(row)
                found = "" if row["found"] is None else f", found {row['found']:.3f}"
                print(f"  {key['length']:,} behaviours: AUC {row['auc']:.3f}{found}", flush=True)
                if given.out:
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    show(rows)


def asked(length: int, learn: Planted, seed: int) -> Planted:
    """Lives of other users, the fewer the longer they are."""
    requests = min(MOST_REQUESTS, max(BEHAVIOURS // length, 20))
    return planted(length, requests, DECIDING, seed=seed, features=learn.task.features)


def learned(unit: str, learn: Planted, seed: int, epochs: int) -> LifelongRanker:
    train = TrainConfig(epochs=epochs, lr=3e-3, bfloat16=False, average=0.0, weight_decay=0.0, seed=seed)
    config = LifelongConfig(long=unit, short="none", train=train, requests=16)
    return LifelongRanker.of(learn.task, config).fit(learn.task)


def teach(ranker: LifelongRanker, lives: RankingTask, epochs: int) -> None:
    """Go on on clusters, twice as long; they are of the item vectors, which therefore stay."""
    ranker.network.embed.requires_grad_(False)
    ranker.config = replace(ranker.config, train=replace(ranker.config.train, epochs=2 * epochs))
    ranker.fit(lives)


def clustered(ranker: LifelongRanker, task: RankingTask, by_keys: bool) -> ClusterStore:
    """The lives of a task, by the ranker's item vectors, or keys, and completion."""
    assert isinstance(task.store, HistoryStore)
    ranker.clusters = None  # those of another world
    ranker.histories = task.store
    groups, config = Groups.by_completion("completion"), ClusterConfig(cap=None)
    return ranker.cluster(
        int(task.time.min()), groups, by_keys=by_keys, config=config, threads=torch.get_num_threads()
    )


def measured(ranker: LifelongRanker, world: Planted, by_keys: bool = False) -> dict[str, Any]:
    """AUC over candidates; the share of the deciding behaviours of positive ones that were attended to."""
    task, members = world.task, list[list[np.ndarray]]()
    if ranker.config.long == CLUSTERED:
        store = clustered(ranker, task, by_keys)
        task, members = replace(task, store=store), members_of(store)
    logit, hits = [], []
    at = 0
    with torch.inference_mode():
        for batch in task.batches(4, cells=2_000_000):
            logits, found = ranker.network.eval().score(batch)
            logit.append(logits[..., 0].numpy().ravel())
            chosen = found[-1].chosen
            if chosen is not None and ranker.config.long not in ("full_attention", "mean_pooling"):
                B, K = batch.item.shape
                rows = chosen.expand(B, K, -1).numpy().reshape(B * K, -1)
                hits += [
                    share(row, world.positions[at + i], members[(at + i) // K] if members else None)
                    for i, row in enumerate(rows)
                ]
            at += batch.item.numel()
    label = task.label[:, 0] > 0.5
    known = [hit for hit in hits if hit is not None]
    return {"auc": auc(np.concatenate(logit), label), "found": float(np.mean(known)) if known else None}


def members_of(store: ClusterStore) -> list[list[np.ndarray]]:
    """For each user, the places in the life of the behaviours behind each entry of `store.before`."""
    leaves, starts = store.leaves, store.histories.offsets
    found = []
    for user in range(len(store)):
        mine = range(store.virtual.offsets[user], store.virtual.offsets[user + 1])
        inside = [
            leaves.member[leaves.offsets[leaf] : leaves.offsets[leaf + 1]] - starts[user] for leaf in mine
        ]
        length = starts[user + 1] - starts[user]
        found.append([*inside, *np.arange(store.counted[user], length)[:, None]])
    return found


def share(chosen: np.ndarray, deciding: np.ndarray, members: list[np.ndarray] | None) -> float | None:
    """Of the deciding behaviours, those that were chosen; None for a candidate without any."""
    if deciding[0] < 0:
        return None
    chosen = chosen[chosen >= 0]
    if members is not None:
        chosen = np.concatenate([members[entry] for entry in chosen]) if len(chosen) else chosen
    return float(np.isin(deciding, chosen).mean())


def show(rows: list[dict[str, Any]]) -> None:
    lengths = sorted({row["length"] for row in rows})
    print(f"\n{'AUC · found':<16}" + "".join(f"{length:>24,}" for length in lengths))
    for unit in dict.fromkeys(row["unit"] for row in rows):
        line = f"{unit:<16}"
        for length in lengths:
            cell = [row for row in rows if (row["unit"], row["length"]) == (unit, length)]
            text = ""
            if cell:
                text = spread([row["auc"] for row in cell])
                if cell[0]["found"] is not None:
                    text += f" · {statistics.fmean(row['found'] for row in cell):.3f}"
            line += f"{text or '–':>24}"
        print(line)


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
