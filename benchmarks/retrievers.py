"""The one table: every retriever, and the funnel of all, trained and measured alike.

    python benchmarks/retrievers.py DATA/amazon2014-beauty [FOLDER …] complete-journey --out runs/retrievers
           [--minutes 40] [--seeds 0 1 2] [--threads 2] [--set retrievers=sasrec,mind] [--only-table]

FOLDER holds interactions.parquet and items.parquet. Each run is `tiglon train` with all networks: TIGER and EAGER have
14 of 40 minutes each, the others 3; weights, and the funnel's, are selected on the validation. The test is read once,
seen items masked and not. Two towers without logQ and ComiRec's other extractor are `benchmarks/dense.py`, EAGER
without either of its tasks `benchmarks/eager.py`.

Bundles and result.json go to --out, a folder a run; a run that has its result is not made again, and one that was
killed goes on. Prints, mean ± standard deviation over seeds: Recall and NDCG at 5, 10, 20, coverage, recall of popular
and of rare items, minutes of training and megabytes; and, all data beside each other, Recall@10 and NDCG@10.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lifelong_quality import spread
from machine import machine, machine_line
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tiger import JOURNEY, source_of

from tiglon.evaluation.protocol import to_json
from tiglon.recipes import DENSE, Reporter, train
from tiglon.serving.bundle import Bundle, is_bundle

ALL = ",".join((*DENSE, "eager"))
MODES = {"masked": "seen items hidden", "unmasked": "seen items shown"}
METRICS = (
    *(f"{metric}@{k}" for k in (5, 10, 20) for metric in ("recall", "ndcg")),
    "coverage@10",
    "recall@10[head]",
    "recall@10[tail]",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", metavar=f"FOLDER|{JOURNEY}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=40.0, help="of training, of all together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=190, highlight=False)
    console.print(machine_line())
    changes = {"retrievers": ALL} | dict(setting.split("=", 1) for setting in given.settings)
    for data in given.data:
        name = Path(data).name
        for seed in given.seeds:
            folder = given.out / f"{name}-{seed}"
            if not given.only_table and not (folder / "result.json").is_file():
                run(data, folder, given.minutes, changes | seeds(changes, seed), console)
        for mode in MODES:
            console.print(table(name, mode, results(given.out, name)))
    for mode in MODES:
        console.print(
            beside({Path(data).name: results(given.out, Path(data).name) for data in given.data}, mode)
        )


def seeds(changes: dict[str, str], seed: int) -> dict[str, str]:
    networks = ["ids", "train", *(f"{name}.train" for name in changes["retrievers"].split(",") if name)]
    return {f"{network}.seed": str(seed) for network in networks}


def run(data: str, folder: Path, minutes: float, changes: dict[str, str], console: Console) -> None:
    """Train a bundle unless it is there, read the test, keep the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bundle"
    if not is_bundle(path):
        source = source_of(Path(data))
        train(
            source.interactions,
            source.items,
            path,
            minutes=minutes,
            changes=changes,
            reporter=Teller(console),
        )
    bundle = Bundle.load(path)
    # training measured one mode
    other = to_json(bundle.evaluate("test", exclude_seen=not bundle.exclude_seen), "test")
    modes = ("masked", "unmasked") if bundle.exclude_seen else ("unmasked", "masked")
    rows = dict(zip(modes, (bundle.metrics, other), strict=True))
    costs = {name: cost(bundle, name) for name in ("tiger", *bundle.others)}
    result = {"machine": machine(), "minutes": minutes, "changes": changes, "costs": costs, **rows}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def cost(bundle: Bundle, name: str) -> dict[str, float]:
    """Minutes of training, selection with it, and megabytes on the disk."""
    assert bundle.path is not None
    folder = bundle.path / (name if name == "tiger" else f"retrievers/{name}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"minutes": bundle.minutes[name], "megabytes": size / 1e6}


class Teller(Reporter):
    """Facts, and of training every tenth."""

    def __init__(self, console: Console) -> None:
        self.console, self.told = console, ("", -1)

    def say(self, fact: str) -> None:
        self.console.print(fact)

    def share(self, task: str, share: float, note: str = "") -> None:
        if (task, int(10 * share)) != self.told:
            self.told = task, int(10 * share)
            self.console.print(f"  {task} {share:4.0%} {note}")


def results(out: Path, name: str) -> list[dict[str, Any]]:
    found = sorted(out.glob(f"{name}-*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def table(name: str, mode: str, runs: Sequence[dict[str, Any]]) -> Table:
    title = f"{name}, test, {MODES[mode]}, {counted(runs)}"
    found = Table(title=title, box=box.SIMPLE_HEAD)
    found.add_column("retriever", no_wrap=True)
    for column in (*(escape(metric) for metric in METRICS), "minutes", "MB"):
        found.add_column(column, justify="right")
    for retriever, some in by_retriever(runs, mode).items():
        values = [mean(some, metric) for metric in METRICS]
        costs = [one["costs"][retriever] for one in runs if retriever in one["costs"]]
        spent = [f"{costs[0]['minutes']:.1f}", f"{costs[0]['megabytes']:.0f}"] if costs else ["", ""]
        found.add_row(retriever, *values, *spent)
    return found


def beside(data: dict[str, Sequence[dict[str, Any]]], mode: str) -> Table:
    """Recall@10 / NDCG@10 of every retriever, a column a set of data."""
    found = Table(title=f"Recall@10 / NDCG@10, test, {MODES[mode]}", box=box.SIMPLE_HEAD)
    found.add_column("retriever", no_wrap=True)
    columns = {name: by_retriever(runs, mode) for name, runs in data.items()}
    for name in columns:
        found.add_column(f"{name}, {counted(data[name])}", justify="right")
    for retriever in dict.fromkeys(name for rows in columns.values() for name in rows):
        cells = [rows.get(retriever, []) for rows in columns.values()]
        found.add_row(retriever, *(f"{mean(some, 'recall@10')} / {mean(some, 'ndcg@10')}" for some in cells))
    return found


def by_retriever(runs: Sequence[dict[str, Any]], mode: str) -> dict[str, list[dict[str, Any]]]:
    """Each retriever's row of every run."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        for row in one[mode]["rows"]:
            rows.setdefault(row["name"], []).append(row)
    return rows


def counted(runs: Sequence[dict[str, Any]]) -> str:
    return f"{len(runs)} seed{'' if len(runs) == 1 else 's'}"


def mean(rows: Sequence[dict[str, Any]], metric: str) -> str:
    return spread([row[metric] for row in rows if row.get(metric) is not None])


if __name__ == "__main__":
    main()
