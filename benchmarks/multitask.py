"""Which multi-task loss on Complete Journey: in the next basket, within 30 days, two or more at once?

    python benchmarks/multitask.py --out runs/multitask.jsonl [--methods single equal pcgrad …]
           [--heads bottom mmoe] [--seeds 0 1 2] [--learn 10000] [--threads 2] [--set train.epochs=1]

The same network, requests and training for all: what the user bought lately is read by attention, and over the
shared MLP (`bottom`), or four of them (`mmoe`), each task has a tower. `single` trains a network a task. Weights are
selected on the validation's mean GAUC; the test is read once a row. Test households and times are unseen in training.

A label of 30 days is known 30 days later: where that is past the end of a split's time, there is none. The validation
has eight weeks, so that half of it keeps that label.

Rows go to --out as they finish and are not run again; --only-table prints what is there. The table: mean ± standard
deviation over seeds of each task's GAUC and AUC; Δm, the mean over tasks of the relative change of GAUC against
`single` of the same heads and seed, in percent; parameters; the least ms a step of training, reading included, and its
backward passes through what is shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lifelong_quality import first, rows_of, save, spread
from machine import machine, machine_line
from rich import box
from rich.console import Console
from rich.table import Table

from tiglon.data.ranking import BASKET_TASKS, WITHIN_30_DAYS, RankingTask, complete_journey_task
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.ranking.ranker import RankerConfig
from tiglon.recipes import override
from tiglon.train.multitask import METHODS

MONTH = 30 * 86_400
SINGLE = "single"
HEADS = {"bottom": RankerConfig(tower=(32,)), "mmoe": RankerConfig(tower=(32,), experts=4)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    known = [SINGLE, *METHODS]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["bottom"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learn", type=int, metavar="N", help="requests to learn from, the same for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=170, highlight=False)
    if not given.only_table:
        changes = dict(setting.split("=", 1) for setting in given.settings)
        run(given.out, given.methods, given.heads, given.seeds, changes, given.learn, console)
    console.print(table(rows_of(given.out)))


# -- rows ------------------------------------------------------------------------------------------------


def run(
    out: Path,
    methods: Sequence[str],
    heads: Sequence[str],
    seeds: Sequence[int],
    changes: dict[str, str],
    requests: int | None,
    console: Console,
) -> None:
    """All rows that `out` lacks, seed by seed, so that a run cut short still compares all methods."""
    console.print(machine_line())
    splits = known_in_time(complete_journey_task(seed=0, tasks=BASKET_TASKS, validation_weeks=8))
    splits[0] = first(splits[0], requests)
    learn, validation, test = splits
    console.print(f"{len(learn):,} requests to learn from, {len(validation):,} to select on, "
                  f"{len(test):,} to test on")  # fmt: skip
    done = {row["key"] for row in rows_of(out)}
    for seed in seeds:
        for shape in heads:
            for method in methods:
                config = LifelongConfig(long="none", network=HEADS[shape])
                config = override(config, changes | {"train.seed": str(seed)})
                key = json.dumps([method, shape, seed, requests, asdict(config)], sort_keys=True)
                about = {"method": method, "heads": shape, "seed": seed, "machine": machine()}
                row = save(out, done, key, lambda a=about, m=method, c=config: a | trained(m, c, *splits))
                if row:
                    found = ", ".join(f"{name} {row['test'][name]['gauc']:.4f}" for name in BASKET_TASKS)
                    console.print(f"{method}, {shape}, seed {seed}: {found} in {row['seconds']:.0f} s")


def known_in_time(splits: Sequence[Any]) -> list[RankingTask]:
    """The three splits, without the labels that are not known when the next split begins."""
    learn, validation, test = splits[:3]
    return [
        known_by(learn, int(validation.time.min())),
        known_by(validation, int(test.time.min())),
        test,  # those past the end of the log are left out already
    ]


def known_by(task: RankingTask, end: int) -> RankingTask:
    label = task.label.copy()
    late = (task.time + MONTH > end)[task.owner]
    label[late, task.tasks.index(WITHIN_30_DAYS)] = np.nan
    return replace(task, label=label)


def only(task: RankingTask, name: str) -> RankingTask:
    return replace(task, label=task.label[:, [task.tasks.index(name)]], tasks=(name,))


def trained(
    method: str, config: LifelongConfig, learn: RankingTask, validation: RankingTask, test: RankingTask
) -> dict[str, Any]:
    """One network for all tasks, or one a task: selected on the validation, the test read once."""
    groups = [(name,) for name in learn.tasks] if method == SINGLE else [learn.tasks]
    found: dict[str, Any] = {"test": {}, "parameters": 0, "seconds": 0.0, "steps": 0}
    for tasks in groups:
        parts = [only(split, *tasks) if len(tasks) == 1 else split for split in (learn, validation, test)]
        balance = METHODS["equal" if method == SINGLE else method](tasks, len(learn.batches(config.requests)))
        ranker = LifelongRanker.of(parts[0], config).fit(parts[0], parts[1], method=balance)
        for measured in ranker.evaluate(parts[2]):
            found["test"][measured.task] = {
                name: measured.metrics[name] for name in ("gauc", "auc", "log_loss")
            }
            found["test"][measured.task]["interval"] = measured.interval
        found["parameters"] += sum(p.numel() for p in ranker.network.parameters())
        found["seconds"] += ranker.history["seconds"]
        found["steps"] += ranker.history["steps"]
        found["passes"] = balance.passes
        found["weight"] = balance.weight
    return found


# -- table -----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> Table:
    found = Table(title="Several tasks, Complete Journey: GAUC / AUC", box=box.SIMPLE_HEAD)
    for column in ("method", "heads"):
        found.add_column(column, no_wrap=True)
    for column in (*BASKET_TASKS, "Δm %", "parameters", "ms a step", "passes"):
        found.add_column(column, justify="right")
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["heads"]), []).append(row)
    for (method, heads), runs in cells.items():
        alone = {row["seed"]: row["test"] for row in cells.get((SINGLE, heads), [])}
        deltas = [delta(row["test"], alone[row["seed"]]) for row in runs if row["seed"] in alone]
        per_task = [
            " / ".join(spread([row["test"][name][metric] for row in runs]) for metric in ("gauc", "auc"))
            for name in BASKET_TASKS
        ]
        pace = min(1e3 * row["seconds"] / max(row["steps"], 1) for row in runs)
        found.add_row(method, heads, *per_task, spread(deltas, 2), f"{runs[0]['parameters']:,}",
                      f"{pace:.0f}", str(runs[0]["passes"]))  # fmt: skip
    return found


def delta(ours: dict[str, Any], single: dict[str, Any]) -> float:
    """Δm: the mean relative change of GAUC, in percent."""
    return statistics.fmean(100 * (ours[t]["gauc"] / single[t]["gauc"] - 1) for t in BASKET_TASKS)


if __name__ == "__main__":
    main()
