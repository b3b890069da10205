"""Which crossing layer, and which gate, on groceries: Complete Journey's next basket.

    python benchmarks/crossing.py --out runs/crossing.jsonl [--rows none fm dcn_v2 poso …]
           [--seeds 0 1 2] [--learn 10000] [--threads 2] [--set train.epochs=1] [--only-table]

All rows have one base: attention over the 50 most recent behaviours, counts of what candidate and life share,
the same features, MLP, requests and training. The first table adds a crossing layer to it ("cross_id": two declared
crosses, brand × type of the item and hour × weekday of the request; "can": the co-action unit over 200 behaviours);
the second a gate or trunk by who asks, with new and old households apart.

Few households of the log are new in its last weeks, so a third of them, drawn by a fixed seed, join late: their lines
before a time drawn from the whole year are removed, for training and test alike. A household is new before its
tenth basket that is left. The flag, and the number of earlier baskets, are features of the request, known at its
time. Gates and trunks read both, LHUC the number alone. "moved" is by how much turning the flag over moves the last hidden
layer, on 32 requests of the validation.

Weights are selected on the validation's GAUC; the test is read once a row. The tables: mean ± standard deviation over
seeds, the difference to no layer or gate by the same seed, and of the times a step the least. Rows go to --out as they finish, and
rows that stand there are not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from lifelong_quality import Printer, first, rows_of, save, spread
from machine import machine, machine_line
from rich import box
from rich.console import Console
from rich.table import Table

from tiglon.data.features import Feature, FeatureSchema
from tiglon.data.ranking import COMPLETE_JOURNEY, RankingTask, Tasks, complete_journey_task
from tiglon.data.sources import Source, complete_journey
from tiglon.ranking.crosses import CROSSES
from tiglon.ranking.gates import GATES, TRUNKS, submergence
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.recipes import override

NONE, CROSS_ID, CAN = "none", "cross_id", "can"
CROSSING = [NONE, CROSS_ID, *CROSSES, CAN]
ROWS = [*CROSSING, *GATES, *TRUNKS]
NEW_BEFORE, FLAG, COUNT = 10, "newcomer", "baskets"

SCHEMA = FeatureSchema(
    [*COMPLETE_JOURNEY.features, Feature(COUNT, "context", "number"), Feature(FLAG, "context")]
)
CROSSED = FeatureSchema(
    [
        *SCHEMA.features,
        Feature("brand × type", "inherent", of=("brand", "product_type"), min_count=5),
        Feature("hour × weekday", "context", of=("hour", "weekday"), min_count=5),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learn", type=int, metavar="N", help="requests to learn from, the same for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=150, highlight=False)
    if not given.only_table:
        console.print(machine_line())
        changes = dict(setting.split("=", 1) for setting in given.settings)
        run(given.out, given.rows, given.seeds, changes, given.learn, console)
    for found in tables(rows_of(given.out)):
        console.print(found)


# -- rows ------------------------------------------------------------------------------------------------


def run(
    out: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    changes: dict[str, str],
    requests: int | None,
    console: Console,
) -> None:
    """All rows that `out` lacks, seed by seed, so that a run cut short still compares all of them."""
    done = {row["key"] for row in rows_of(out)}
    for seed in seeds:
        for name in names:
            config = override(config_of(name), changes | {"train.seed": str(seed)})
            key = f"{name}, {requests or 'all'} requests, {asdict(config)}"
            row = save(out, done, key, lambda n=name, c=config: trained(n, c, requests, console))
            if row:
                test = row["test"]
                console.print(f"{name}, seed {seed}: GAUC {test['all']['gauc']:.4f}, new "
                              f"{test['new']['gauc']:.4f}, old {test['old']['gauc']:.4f}, "
                              f"{row['seconds']:.0f} s")  # fmt: skip


def config_of(name: str) -> LifelongConfig:
    config = LifelongConfig(long=CAN if name == CAN else "none", longest=200)
    if name in CROSSES:
        config = replace(config, cross=name)
    if name in GATES | TRUNKS:
        config = replace(config, gate=name, gate_by=(COUNT,) if name == "lhuc" else (FLAG, COUNT))
    return config


def trained(name: str, config: LifelongConfig, requests: int | None, console: Console) -> dict[str, Any]:
    """One ranker from scratch: selected on the validation, the test read once, whole and by who asks."""
    learn, validation, test, _ = tasks(name == CROSS_ID)
    learn = first(learn, requests)
    ranker = LifelongRanker.of(learn, config).fit(learn, validation, report=Printer(console))
    new = is_new(test)
    segments = {"all": test, "new": test.select(new), "old": test.select(~new)}
    return {
        "name": name,
        "seed": config.train.seed,
        "test": {title: ranker.evaluate(part, name)[0].metrics for title, part in segments.items()},
        "requests": {title: len(part) for title, part in segments.items()},
        "learned_from": {"all": len(learn), "new": int(is_new(learn).sum())},
        "moved": moved(ranker, validation),
        "validation": ranker.history["best"],
        "steps": ranker.history["steps"],
        "seconds": ranker.history["seconds"],
        "parameters": sum(p.numel() for p in ranker.network.parameters()),
        "beyond_tables": sum(
            p.numel() for n, p in ranker.network.named_parameters() if not n.startswith("embed.")
        ),
        "settings": asdict(config),
        "machine": machine(),
    }


def moved(ranker: LifelongRanker, task: RankingTask) -> list[float]:
    """What turning the flag over does to each hidden layer."""
    batch = task.batches(32, last=ranker.config.longest)[0]
    column, codes = flag(task)
    network = ranker.network.eval()
    return submergence(lambda p: network.hidden(batch._replace(profile=p)), batch.profile, column, codes)


def flag(task: RankingTask) -> tuple[int, tuple[int, int]]:
    """Its column of the profile, and its codes for "no" and "yes"."""
    names = [feature.name for feature in task.features.schema.of("user", "context")]
    no, yes = task.features.coders[FLAG].codes(pl.Series(["no", "yes"])).tolist()  # type: ignore[arg-type]
    return names.index(FLAG), (no, yes)


def is_new(task: RankingTask) -> np.ndarray:
    """(R,) bool."""
    column, (_, yes) = flag(task)
    return task.profile[:, column] == yes


@cache
def tasks(crossed: bool) -> Tasks:
    return complete_journey_task(seed=0, source=_joined(), schema=CROSSED if crossed else SCHEMA, first=1)


@cache
def _joined() -> Source:
    return late(complete_journey())


def late(source: Source, seed: int = 0) -> Source:
    """A third of the households without their lines before a random time, and who is new at each line's time."""
    lines = source.interactions
    rng = np.random.default_rng(seed)
    households = lines["user_id"].unique().sort()
    begins, ends = lines["timestamp"].min(), lines["timestamp"].max()
    from_time = np.where(
        rng.random(len(households)) < 1 / 3, rng.uniform(begins, ends, len(households)), begins
    )
    joined = pl.DataFrame({"user_id": households, "joined": from_time.astype(np.int64)})
    lines = lines.join(joined, on="user_id").filter(pl.col("timestamp") >= pl.col("joined")).drop("joined")
    earlier = pl.col("timestamp").rank("dense").over("user_id").cast(pl.Int64) - 1
    lines = lines.with_columns(earlier.alias(COUNT))
    new = pl.when(pl.col(COUNT) < NEW_BEFORE).then(pl.lit("yes")).otherwise(pl.lit("no"))
    return replace(source, interactions=lines.with_columns(new.alias(FLAG)))


# -- tables ----------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """mean ± standard deviation over seeds; rows of other budgets stand in tables of their own."""
    for budget in dict.fromkeys(_budget(row) for row in rows):
        yield from _tables([row for row in rows if _budget(row) == budget])


def _budget(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["settings"]["train"]["epochs"], row["learned_from"]["all"]


def _tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    asked, learned = rows[0]["requests"], rows[0]["learned_from"]
    budget = f"{learned['all']:,} requests, {rows[0]['settings']['train']['epochs']} epochs"
    yield _table(f"Crossing layers; {budget}", rows, CROSSING, {
        "GAUC": lambda row: row["test"]["all"]["gauc"],
        "NDCG@10": lambda row: row["test"]["all"]["ndcg@10"],
        "log loss": lambda row: row["test"]["all"]["log_loss"],
    })  # fmt: skip
    yield _table(f"Gates: {asked['new']:,} requests of new households, {asked['old']:,} of old ones",
                 rows, [NONE, *GATES, *TRUNKS], {
        "GAUC": lambda row: row["test"]["all"]["gauc"],
        "new": lambda row: row["test"]["new"]["gauc"],
        "old": lambda row: row["test"]["old"]["gauc"],
        "moved": lambda row: row["moved"][-1],
    })  # fmt: skip


def _table(
    title: str, rows: Sequence[dict[str, Any]], names: Sequence[str], columns: dict[str, Any]
) -> Table:
    found = Table(title=title, box=box.SIMPLE_HEAD)
    found.add_column("")
    read_first = next(iter(columns.values()))  # GAUC
    base = {row["seed"]: read_first(row) for row in rows if row["name"] == NONE}
    for column in [*columns, f"GAUC − {NONE}", "parameters", "beyond tables", "ms a step"]:
        found.add_column(column, justify="right")
    for name in names:
        ours = [row for row in rows if row["name"] == name]
        if ours:
            found.add_row(
                name,
                *(spread([read(row) for row in ours]) for read in columns.values()),
                spread([read_first(row) - base[row["seed"]] for row in ours if row["seed"] in base]),
                f"{ours[0]['parameters']:,}",
                f"{ours[0]['beyond_tables']:,}",
                f"{1000 * min(row['seconds'] / max(row['steps'], 1) for row in ours):.0f}",
            )
    return found


if __name__ == "__main__":
    main()
