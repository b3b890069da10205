"""Which unit orders a household's candidates best, and what does a longer history give: Complete Journey.

    python benchmarks/lifelong_quality.py --out runs/lifelong.jsonl [--units twin full_attention …]
           [--caps 50 200 1000 all] [--seeds 0 1 2] [--learn 10000] [--threads 2] [--set train.lr=0.002]

Every ranking recipe with histories cut to the most recent 50, 200, 1,000 behaviours and whole, some seeds
each: the same requests, features, short-term unit and training for all. Weights are selected on the
validation's GAUC, and the test is read once a row. Test households and times are unseen in training. Beside
them stand counts: how often the candidate, or its product type, occurs among the behaviours kept.

TWIN V2 learns on whole lives, behaviour by behaviour, and is tested on lives clustered up to the first test
request by its own item vectors, in five groups by price (the data has no completion ratio); "all" alone.

Rows go to --out as they finish, and rows that stand there are not run again, so that a killed run goes on
when the same command is given; --only-table prints what is there. The table: GAUC, mean ± standard deviation
over seeds, and the paired difference to full attention of the same length (per-user AUC averaged over seeds,
95% bootstrap interval over households).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, machine_line
from rich import box
from rich.console import Console
from rich.table import Table

from tiglon.data.ranking import RankingTask, complete_journey_task
from tiglon.evaluation.ranking import RankingEvaluation, bootstrap_mean, weighted_mean
from tiglon.ranking.model import LifelongConfig, LifelongRanker, measure_task
from tiglon.recipes import RANKING_RECIPES, override
from tiglon.train.loop import Progress

REFERENCE, CLUSTERED = "full_attention", "twin_v2"
COUNTS = ("count of the item", "count of its type")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--units", nargs="+", choices=list(RANKING_RECIPES), default=list(RANKING_RECIPES))
    parser.add_argument("--caps", nargs="+", type=cap, default=[50, 200, 1_000, None], metavar="N|all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, help="of training a row at most; by default the recipe's epochs"
    )
    parser.add_argument("--learn", type=int, metavar="N", help="requests to learn from, the same for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=150, highlight=False)
    if not given.only_table:
        changes = dict(setting.split("=", 1) for setting in given.settings)
        if given.minutes:
            changes["train.minutes"] = str(given.minutes)
        run(given.out, given.units, given.caps, given.seeds, changes, given.learn, console)
    for found in tables(rows_of(given.out)):
        console.print(found)


def cap(text: str) -> int | None:
    return None if text == "all" else int(text)


# -- rows ------------------------------------------------------------------------------------------------


def run(
    out: Path,
    units: Sequence[str],
    caps: Sequence[int | None],
    seeds: Sequence[int],
    changes: dict[str, str],
    requests: int | None,
    console: Console,
) -> None:
    """All rows that `out` lacks, seed by seed, so that a run cut short still compares all units."""
    console.print(machine_line())
    began = time.monotonic()
    *splits, note = complete_journey_task(seed=0)
    learn, validation, test = splits
    learn = first(learn, requests)
    console.print(f"{note}\n{len(learn):,} requests to learn from, {len(validation):,} to select on, "
                  f"{len(test):,} to test on; read in {time.monotonic() - began:.0f} s")  # fmt: skip
    done = {row["key"] for row in rows_of(out)}
    for longest in caps:
        for name in COUNTS:
            save(
                out, done, key(name, longest, 0, {}, requests), lambda n=name, c=longest: counted(n, test, c)
            )
    for seed in seeds:
        for longest in caps:
            for unit in units:
                if unit == CLUSTERED and longest is not None:
                    continue
                config = override(RANKING_RECIPES[unit], changes | {"train.seed": str(seed)})
                config = replace(config, longest=longest)
                name = f"{unit}, {longest or 'all'}, seed {seed}"
                row = save(
                    out,
                    done,
                    key(unit, longest, seed, asdict(config), requests),
                    lambda u=unit, c=config: trained(u, c, learn, validation, test, console),
                )
                if row:
                    console.print(f"{name}: GAUC {row['test']['gauc']:.4f} in {row['seconds']:.0f} s")


def save(out: Path, done: set[str], name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Append the row unless it stands there."""
    if name in done:
        return None
    row = {"key": name} | make()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    done.add(name)
    return row


def key(unit: str, longest: int | None, seed: int, settings: dict[str, Any], requests: int | None) -> str:
    """Everything that the row depends on beside the data."""
    return json.dumps([unit, longest, seed, requests, settings], sort_keys=True)


def rows_of(out: Path) -> list[dict[str, Any]]:
    if not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def first(task: RankingTask, requests: int | None) -> RankingTask:
    """A sample of a task, spread over it."""
    if requests is None or requests >= len(task):
        return task
    return task.select(np.linspace(0, len(task) - 1, requests).astype(np.int64))


def trained(
    unit: str,
    config: LifelongConfig,
    learn: RankingTask,
    validation: RankingTask,
    test: RankingTask,
    console: Console,
) -> dict[str, Any]:
    """One ranker from scratch: selected on the validation, the test read once."""
    ranker = LifelongRanker.of(learn, config).fit(learn, validation, report=Printer(console))
    if unit == CLUSTERED:
        test = clustered(ranker, test)
    found = ranker.evaluate(test, unit)[0]
    return row_of(found, unit, config.longest, config.train.seed) | {
        "validation": ranker.history["best"],
        "curve": [(point["epoch"], point["loss"], point["score"]) for point in ranker.history["history"]],
        "steps": ranker.history["steps"],
        "seconds": ranker.history["seconds"],
        "parameters": sum(p.numel() for p in ranker.network.parameters()),
        "settings": asdict(config),
    }


def clustered(ranker: LifelongRanker, test: RankingTask) -> RankingTask:
    """The same requests, whose lives before the first of them are virtual items."""
    store = ranker.cluster(int(test.time.min()), ranker.groups("sales_value"))
    return replace(test, store=store)


def counted(name: str, test: RankingTask, longest: int | None) -> dict[str, Any]:
    """How often the candidate (or an item of its type) occurs among the most recent behaviours."""
    features = [feature.name for feature in test.features.schema.of("inherent")]
    group = np.arange(len(test.features.item_codes))
    if name == COUNTS[1]:
        group = test.features.item_codes[:, features.index("product_type")]
    found = measure_task(name, test, count_scores(test, group, longest), probability=False)
    return row_of(found[0], name, longest, 0)


def count_scores(task: RankingTask, group: np.ndarray, longest: int | None) -> np.ndarray:
    """(C, 1) events of the candidate's group among the last `longest` before its request."""
    scores = np.empty((len(task.item), 1))
    size = int(group.max()) + 1
    for start in range(0, len(task), 256):
        rows = slice(start, min(start + 256, len(task)))
        past = task.store.before(task.user[rows], task.time[rows], longest)
        held = np.bincount(past.owner * size + group[past.item], minlength=len(past) * size)
        part = slice(task.offsets[rows.start], task.offsets[rows.stop])
        owner = np.repeat(np.arange(len(past)), np.diff(task.offsets[rows.start : rows.stop + 1]))
        scores[part, 0] = held[owner * size + group[task.item[part]]]
    return scores


def row_of(found: RankingEvaluation, unit: str, longest: int | None, seed: int) -> dict[str, Any]:
    return {
        "unit": unit,
        "cap": longest,
        "seed": seed,
        "test": found.metrics,
        "interval": found.interval,
        "households": len(found.groups),
        "dropped": found.dropped,
        "impressions": found.rows,
        "user": found.groups.tolist(),
        "user_auc": found.group_auc.round(6).tolist(),
        "user_impressions": found.impressions.tolist(),
        "machine": machine(),
    }


class Printer:
    """A line whenever the validation was read."""

    def __init__(self, console: Console) -> None:
        self.console, self.score = console, None

    def __call__(self, p: Progress) -> None:
        if p.score is not None and p.score != self.score:
            self.score = p.score
            self.console.print(f"  {p.share:4.0%}  loss {p.loss:.4f}  validation GAUC {p.score:.4f}")


# -- tables ----------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """GAUC of each unit and length, then the difference to full attention, then the other metrics at length."""
    if not rows:
        return
    cells: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["unit"], row["cap"]), []).append(row)
    units = list(dict.fromkeys(row["unit"] for row in rows))
    caps = sorted({row["cap"] for row in rows}, key=lambda c: c or np.inf)
    caption = f"{rows[0]['households']:,} test households, {rows[0]['impressions']:,} impressions"
    yield _table("GAUC by most recent behaviours kept", caption, units, caps,
                 lambda unit, c: spread([row["test"]["gauc"] for row in cells.get((unit, c), [])]))  # fmt: skip
    yield _table(f"GAUC less that of {REFERENCE}, paired over households", "", units, caps,
                 lambda unit, c: beside(cells.get((unit, c), []), cells.get((REFERENCE, c), [])))  # fmt: skip
    for metric in ("gauc/request", "auc", "ndcg@10", "log_loss", "calibration_error"):
        yield _table(metric, "", units, caps, lambda unit, c, m=metric: spread(
            [row["test"][m] for row in cells.get((unit, c), []) if m in row["test"]]))  # fmt: skip


def _table(
    title: str,
    caption: str,
    units: Sequence[str],
    caps: Sequence[int | None],
    cell: Callable[[str, int | None], str],
) -> Table:
    found = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD)
    found.add_column("unit", no_wrap=True)
    for c in caps:
        found.add_column("all" if c is None else f"{c:,}", justify="right")
    for unit in units:
        found.add_row(unit, *(cell(unit, c) for c in caps))
    return found


def spread(values: Sequence[float], digits: int = 4) -> str:
    """mean ± standard deviation over seeds, where they differ."""
    if not values:
        return "–"
    varied = min(values) < max(values)
    numbers = [statistics.fmean(values), *([statistics.stdev(values)] if varied else [])]
    return " ± ".join(f"{number:.{digits}f}".removeprefix("0") for number in numbers)


def beside(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """The difference of GAUC, the per-household AUC averaged over the seeds of each, with its interval."""
    if not ours or not theirs or ours[0]["user"] != theirs[0]["user"]:
        return "–"
    delta = np.mean([row["user_auc"] for row in ours], axis=0)
    delta = delta - np.mean([row["user_auc"] for row in theirs], axis=0)
    weight = np.array(ours[0]["user_impressions"])
    low, high = bootstrap_mean(delta, weight)
    return f"{weighted_mean(delta, weight):+.4f} ({low:+.4f} … {high:+.4f})"


if __name__ == "__main__":
    main()
