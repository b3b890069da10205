"""The rows without training that every table stands beside.

    python benchmarks/baselines.py DATA/amazon2014-beauty [FOLDER …]    last event of each user, masked and not
    python benchmarks/baselines.py --complete-journey                   the next basket, seen items not masked

A FOLDER holds interactions.parquet and items.parquet. Prints the tables; --json FILE keeps every metric.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.sources import Source, complete_journey, tables
from tiglon.data.split import Split, leave_last_out
from tiglon.evaluation.protocol import Evaluation, evaluate, table, to_json
from tiglon.retrieval.neighbours import (
    CatalogueScorer,
    CoOccurrence,
    NeighbourSum,
    Popularity,
    Repeats,
    TextNeighbours,
)
from tiglon.types import Items


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    arguments.add_argument("--complete-journey", action="store_true")
    arguments.add_argument("--split", choices=["validation", "test"], default="test")
    arguments.add_argument("--json", type=Path, metavar="FILE")
    given = arguments.parse_args()
    if not given.folders and not given.complete_journey:
        arguments.error("give a FOLDER or --complete-journey")

    four: list[CatalogueScorer] = [Popularity(), TextNeighbours(), CoOccurrence(), NeighbourSum()]
    report = {}
    for folder in given.folders:
        report[folder.name] = run(folder.name, tables(folder), four, (True, False), given.split)
    if given.complete_journey:
        retrievers = [*four, Repeats()]
        report["complete journey"] = run(
            "complete journey", complete_journey(), retrievers, (False,), given.split
        )
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


def run(
    name: str, source: Source, retrievers: list[CatalogueScorer], modes: tuple[bool, ...], part: str
) -> dict:
    split, items = prepare(source)
    targets = getattr(split, part)
    popularity = np.bincount(split.train.item, minlength=len(items))
    evaluations: list[Evaluation] = []
    console = Console(width=150)
    for retriever in retrievers:
        start = time.perf_counter()
        retriever.fit(split.train, items)
        fitted = time.perf_counter()
        for mode in modes:
            evaluations.append(evaluate(retriever, targets, exclude_seen=mode, popularity=popularity))
        seconds = (time.perf_counter() - fitted) / len(modes)
        console.print(
            f"{name}: {retriever.name} fitted in {fitted - start:.1f} s, evaluated in {seconds:.1f} s "
            f"({len(evaluations[-1].users) / seconds:,.0f} users/s)"
        )
    evaluations.sort(key=lambda e: not e.exclude_seen)
    title = f"{name}, {part}: {len(items):,} items, {len(split.train):,} training events"
    console.print(table(evaluations, title=title, intervals=True))
    return to_json(evaluations, split=part)


def prepare(source: Source) -> tuple[Split, Items]:
    """Clean, number by the catalogue, split off each user's last two moments."""
    log, items, _ = align(read_interactions(source.interactions), read_items(source.items))
    return leave_last_out(log), items


if __name__ == "__main__":
    main()
