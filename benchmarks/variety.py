"""What variety costs: ComiRec's controllable aggregation (eq. 7–8) by λ, on the validation of a bundle.

    python benchmarks/variety.py BUNDLE [--by categories] [--weights 0 0.05 0.1 0.2 0.5 1] [--users 5000] [--threads 2]

BUNDLE was trained with ComiRec among its retrievers. An item's category is its value in the column --by, of a list the
last. Prints recall and the diversity of categories (the share of a list's pairs whose categories differ) at 20 and 50.
"""

from __future__ import annotations

import argparse

import numpy as np
import polars as pl
import torch
from machine import machine_line
from rich import box
from rich.console import Console
from rich.table import Table

from tiglon.data.split import leave_last_out
from tiglon.errors import ConfigError, did_you_mean
from tiglon.evaluation.protocol import evaluate
from tiglon.retrieval.comirec import ComiRec
from tiglon.serving.bundle import Bundle
from tiglon.types import Candidates, Histories, Items

KS = (20, 50)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--by", default="categories", metavar="COLUMN")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--users", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=150, highlight=False)
    console.print(machine_line())
    bundle = Bundle.load(given.bundle)
    found = [one for one in bundle.others.values() if isinstance(one, ComiRec)]
    if not found:
        raise ConfigError(f"{given.bundle} without ComiRec", fix="Train with --set retrievers=comirec")
    labels = categories(bundle.items, given.by)
    targets = leave_last_out(bundle.log()).validation
    drawn = np.sort(np.random.default_rng(0).permutation(len(targets))[: given.users])
    metrics = [f"{metric}@{k}" for metric in ("recall", "category_diversity") for k in KS]
    table = Table(title=f"{found[0].name}, validation, {len(drawn):,} users", box=box.SIMPLE_HEAD)
    for column in ("λ", *metrics):
        table.add_column(column, justify="right")
    for weight in given.weights:
        asked = Varied(found[0], labels, weight)
        row = evaluate(
            asked, targets.take(drawn), ks=KS, exclude_seen=bundle.exclude_seen, categories=labels
        ).metrics
        table.add_row(f"{weight:g}", *(f"{row[metric]:.4f}".removeprefix("0") for metric in metrics))
    console.print(table)


def categories(items: Items, column: str) -> np.ndarray:
    """(N,) one label an item; those without a value share one."""
    if column not in items.table.columns:
        raise ConfigError(f"no column '{column}'", fix=did_you_mean(column, items.table.columns))
    values = items.table[column]
    if isinstance(values.dtype, pl.List):
        values = values.list.last()
    return values.cast(pl.String).fill_null("").rank("dense").to_numpy().astype(np.int64)


class Varied:
    """ComiRec's lists with variety of one weight."""

    def __init__(self, comirec: ComiRec, labels: np.ndarray, weight: float) -> None:
        self.comirec, self.labels, self.weight = comirec, labels, weight
        self.name, self.items = f"λ = {weight:g}", comirec.items

    def retrieve(self, histories: Histories, k: int, *, exclude_seen: bool = True) -> Candidates:
        return self.comirec.retrieve_diverse(
            histories, k, self.labels, self.weight, exclude_seen=exclude_seen
        )


if __name__ == "__main__":
    main()
