"""Dense and multi-interest retrieval on folders of tables, selected on validation, the test read once.

    python benchmarks/dense.py DATA/amazon2014-beauty [FOLDER …] --out runs/dense.jsonl [--only sasrec,mind]
                               [--minutes 10] [--seeds 0,1,2] [--threads 1] [--no-test] [--users 3000]

FOLDER holds interactions.parquet and items.parquet, or is complete-journey. Every retriever gets the same vectors (text, with brand and
categories, beside training co-occurrence) and the same minutes of training, its weights are those that are best on
validation; a row a retriever and seed is appended to --out, and is not run again. Prints Recall and NDCG at 5, 10 and
20, seen items masked and not, coverage, minutes of training and megabytes of what is saved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, machine_line
from rich.console import Console
from rich.table import Table
from tiger import Printer, item_vectors, prepare, recipe_of, source_of

from tiglon.data.split import Split
from tiglon.evaluation.protocol import evaluate
from tiglon.retrieval.comirec import ComiRec, ComiRecConfig
from tiglon.retrieval.dense import DenseConfig, DenseRetriever
from tiglon.retrieval.mind import Mind, MindConfig
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.retrieval.two_tower import TwoTower, TwoTowerConfig
from tiglon.types import Vocabulary

EPOCHS = 12  # at most; --minutes ends a run before

Make = Callable[[Vocabulary, DenseConfig, np.ndarray], DenseRetriever]
RETRIEVERS: dict[str, tuple[Make, DenseConfig]] = {
    "sasrec": (SasRec, SasRecConfig()),
    "two_tower": (TwoTower, TwoTowerConfig()),
    "two_tower_no_logq": (TwoTower, TwoTowerConfig(logq=False)),
    "mind": (Mind, MindConfig()),
    "comirec_dr": (ComiRec, ComiRecConfig(extractor="dr")),
    "comirec_sa": (ComiRec, ComiRecConfig(extractor="sa")),
}
KEPT = [f"{metric}@{k}" for k in (5, 10, 20) for metric in ("recall", "ndcg", "coverage")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, one a run")
    parser.add_argument("--only", default=",".join(RETRIEVERS), help="names, with commas")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--users", type=int, help="measure a sample of so many users, for a quick look")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep what is trained, in DIR/name-seed")
    parser.add_argument("--no-test", action="store_true", help="stop after the validation")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(RETRIEVERS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(RETRIEVERS)}")
    torch.set_num_threads(given.threads)
    console = Console(width=150)
    console.print(machine_line())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines]
    parts = ["validation"] if given.no_test else ["validation", "test"]
    budget = {"minutes": given.minutes, "threads": given.threads, "users": given.users, "parts": parts}
    for folder in given.folders:
        prepared: tuple[Split, Vocabulary, np.ndarray] | None = None
        for seed in map(int, given.seeds.split(",")):
            for name in names:
                run = {"data": folder.name, "name": name, "seed": seed} | budget
                if any(run.items() <= row.items() for row in rows):
                    continue
                prepared = prepared or read(folder)
                rows.append(
                    run
                    | measure(name, seed, given.minutes, prepared, parts, given.users, given.save, console)
                )
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
        for part in parts:
            for mode in ("unmasked", "masked"):
                mine = [row for row in rows if ({"data": folder.name} | budget).items() <= row.items()]
                console.print(table(mine, part, mode, f"{folder.name}, {part}, {mode}"))


def read(folder: Path) -> tuple[Split, Vocabulary, np.ndarray]:
    split, items = prepare(source_of(folder))
    recipe = recipe_of("tiger", len(split.train), items, {})
    return split, items.vocabulary, item_vectors(split.train, items, recipe)[1]


def measure(
    name: str,
    seed: int,
    minutes: float,
    prepared: tuple[Split, Vocabulary, np.ndarray],
    parts: list[str],
    users: int | None,
    save: Path | None,
    console: Console,
) -> dict[str, Any]:
    """One run: its curve, what it costs, and its numbers on each part, both modes."""
    split, items, vectors = prepared
    make, config = RETRIEVERS[name]
    training = replace(config.train, epochs=EPOCHS, minutes=minutes, seed=seed)
    retriever = make(items, replace(config, train=training), vectors)
    console.print(f"{name}, seed {seed}")
    about = machine()
    retriever.fit(split.train, split.validation, report=Printer(console, 60.0))
    counts = np.bincount(split.train.item, minlength=len(items))
    results: dict[str, Any] = {}
    started = time.perf_counter()
    for part in parts:
        targets = getattr(split, part)
        if users and users < len(targets):
            targets = targets.take(np.sort(np.random.default_rng(0).permutation(len(targets))[:users]))
        for mode, mask in (("unmasked", False), ("masked", True)):
            found = evaluate(retriever, targets, exclude_seen=mask, popularity=counts, batch=512)
            kept = {key: value for key, value in found.metrics.items() if key in KEPT or "[" in key}
            results.setdefault(part, {})[mode] = {key: None if v != v else v for key, v in kept.items()}
    with tempfile.TemporaryDirectory() as folder:
        kept_in = (save or Path(folder)) / f"{name}-{seed}"
        retriever.save(kept_in)
        megabytes = sum(file.stat().st_size for file in kept_in.iterdir()) / 1e6
    return {
        "results": results,
        "curve": [(line["epoch"], line["score"]) for line in retriever.history["history"]],
        "training_minutes": retriever.history["seconds"] / 60,
        "measuring_minutes": (time.perf_counter() - started) / 60,
        "megabytes": megabytes,
        "parameters": sum(p.numel() for p in retriever.network.parameters()),
        "machine": about,
    }


def table(rows: list[dict[str, Any]], part: str, mode: str, title: str) -> Table:
    """A line a retriever: the mean over its seeds, with the standard deviation where there are several."""
    shown = Table(title=title)
    for column in ("retriever", "seeds", *KEPT, "minutes", "MB"):
        shown.add_column(column, justify="left" if column == "retriever" else "right")
    for name in RETRIEVERS:
        mine = [row for row in rows if row["name"] == name]
        if not mine:
            continue
        cells = []
        for key in KEPT:
            values = np.array([row["results"][part][mode][key] for row in mine])
            spread = f"\n±{values.std(ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.4f}{spread}")
        cost = [np.mean([row[key] for row in mine]) for key in ("training_minutes", "megabytes")]
        shown.add_row(name, str(len(mine)), *cells, *(f"{value:.1f}" for value in cost))
    return shown


if __name__ == "__main__":
    main()
