"""EAGER and what each of its parts is worth, beside TIGER: the same folder, the same minutes.

    python benchmarks/eager.py DATA/amazon2014-beauty --out runs/eager-beauty --minutes 20 [--seed 0]
                               [--threads 2] [--rows eager,tiger] [--set transfer=0.5]

Rows: EAGER, without either task and without both, with the released code's InfoNCE, with behaviour vectors of a DIN as in
the paper, each stream alone, and the released code's ranking against the paper's on the same weights; TIGER by
`--recipe`. Behaviour vectors are learned once, for a fifth of the minutes (`--behaviour-minutes`), and every row that
reads them has as many minutes less. Text is the title (twice), brand and categories, for EAGER alone; TIGER's IDs know co-occurrence, too.

Weights are selected on the validation; the test is read once a row, on all users, seen items masked and not.
Every row keeps its checkpoints and its result.json in --out, and a row that has one is not run again: a killed
run goes on when the same command is given. --set changes settings of EAGER: model.width=128, train.lr=0.002.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from machine import machine, machine_line
from rich.console import Console
from tiger import Printer, arguments, changes_of, item_vectors, measure, prepare, recipe_of, source_of
from tiger import run as run_tiger

from tiglon.data.features import ITEM, Feature, FeatureSchema, fit
from tiglon.data.ranking import BasketConfig, next_basket
from tiglon.data.split import Split
from tiglon.errors import ConfigError, did_you_mean
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.ranking.ranker import RankerConfig
from tiglon.recipes import override
from tiglon.retrieval.eager import Eager, EagerConfig, behaviour_vectors, eager_ids
from tiglon.retrieval.sasrec import SasRecConfig
from tiglon.train.checkpoint import write_text
from tiglon.train.loop import TrainConfig
from tiglon.types import Interactions, Items

ROWS: dict[str, dict[str, Any]] = {
    "eager": {},
    "without contrast": {"contrast": 0.0},
    "without transfer": {"transfer": 0.0},
    "without tasks": {"contrast": 0.0, "transfer": 0.0},
    "info-nce": {"contrast_loss": "info-nce"},
    "din vectors": {},
    "behaviour alone": {"streams": ("behaviour",)},
    "semantic alone": {"streams": ("semantic",)},
}
TIGER, DIN = "tiger", "din vectors"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a folder a row")
    parser.add_argument(
        "--behaviour-minutes", type=float, metavar="M", help="by default a fifth of --minutes"
    )
    parser.add_argument("--rows", default=",".join([*ROWS, TIGER]), help="which of them, with commas between")
    parser.set_defaults(minutes=20.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console(width=150)
    console.print(machine_line())
    rows = given.rows.split(",")
    for row in rows:
        if row not in (*ROWS, TIGER):
            raise ConfigError(f"unknown row '{row}'", fix=did_you_mean(row, (*ROWS, TIGER)))
    split, items = prepare(source_of(given.folder))
    first = given.behaviour_minutes or given.minutes / 5
    if first >= given.minutes:
        raise ConfigError(
            f"{first:g} of {given.minutes:g} minutes for behaviour vectors", rule="Fewer than all"
        )
    folder = given.out / "vectors"
    vectors = item_matrices(split, items, first, given.seed, folder, console)
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        out = given.out / row.replace(" ", "-")
        if (out / "result.json").is_file():
            results[row] = json.loads((out / "result.json").read_text(encoding="utf-8"))
            continue
        console.print(f"\n[bold]{row}")
        if row == TIGER:
            changes = changes_of(argparse.Namespace(**vars(given) | {"settings": []}))  # those are EAGER's
            options = {"users": given.users, "test": not given.no_test, "baselines": False}
            results[row] = run_tiger(given.folder, given.recipe, changes, out, **options)
            continue
        changes = dict(setting.split("=", 1) for setting in given.settings)
        config = replace(override(EagerConfig(), changes), **ROWS[row])
        budget = given.minutes - (first if "behaviour" in config.streams else 0.0)
        epochs = min(15, max(2, 1_000_000 // len(split.train)))  # as the recipe of TIGER plans them
        plan = replace(config.train, epochs=epochs, minutes=budget, seed=given.seed)
        config = replace(config, train=plan)
        read = vectors
        if row == DIN:
            learned = kept(folder / "din.npy", din_vectors, split.train, first, given.seed, folder, console)
            read = vectors | {"behaviour": learned}
        results[row] = run_row(split, items, read, config, out, given, console)
    report(results, given.folder.name, given.minutes, "validation" if given.no_test else "test", console)
    (given.out / "result.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def item_matrices(
    split: Split, items: Items, minutes: float, seed: int, folder: Path, console: Console
) -> dict[str, np.ndarray]:
    """The vectors of both streams; those of behaviour from `folder` where they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of("tiger", len(split.train), items, {"ids.behaviour": "0"})
    text, semantic = item_vectors(split.train, items, recipe)
    console.print(f"semantics: {text.described()}")
    learn = partial(sasrec_vectors, text=semantic)
    learned = kept(folder / "behaviour.npy", learn, split.train, minutes, seed, folder, console)
    return {"behaviour": learned, "semantic": semantic}


Learned = Callable[[Interactions, float, int, Path, Printer], np.ndarray]


def kept(
    path: Path, learn: Learned, log: Interactions, minutes: float, seed: int, folder: Path, console: Console
) -> np.ndarray:
    """Behaviour vectors, from the file where they are there already."""
    about = path.with_suffix(".json")
    if not about.is_file():
        console.print(f"{path.stem} vectors, {minutes:g} minutes")
        np.save(path, learn(log, minutes, seed, folder / f"{path.stem} run", Printer(console)))
        write_text(about, json.dumps({"seed": seed, "minutes": minutes}))
    known = json.loads(about.read_text(encoding="utf-8"))
    if known != {"seed": seed, "minutes": minutes}:
        raise ConfigError(f"vectors of another run in {folder}", fix="Choose another --out")
    return np.load(path)


def sasrec_vectors(
    log: Interactions, minutes: float, seed: int, run: Path, report: Printer, *, text: np.ndarray
) -> np.ndarray:
    """(N, C), as `tiglon train` has them."""
    config = SasRecConfig(train=TrainConfig(epochs=10, minutes=minutes, evaluations=1, seed=seed))
    return behaviour_vectors(log, config, text=text, directory=run, report=report)


def din_vectors(log: Interactions, minutes: float, seed: int, run: Path, report: Printer) -> np.ndarray:
    """(N, C) item embeddings of a DIN that by ids alone tells what came next from 20 items drawn by popularity."""
    items = Items(log.items, pl.DataFrame({"item_id": log.items.raw}))
    features = fit(FeatureSchema([Feature(ITEM, "inherent", width=128)]), items, log)
    counts = np.bincount(log.item, minlength=len(items))
    task = next_basket(log, features, counts, config=BasketConfig(first=1, seed=seed))
    config = LifelongConfig(
        long="din",
        short="none",
        network=RankerConfig(intersections=False),
        train=TrainConfig(epochs=10, minutes=minutes, evaluations=1, seed=seed, bfloat16=False),
        longest=50,
        requests=128,
    )
    ranker = LifelongRanker.of(task, config).fit(task, directory=run, report=report)
    with torch.inference_mode():
        return ranker.network.embed.catalogue()[:-1].numpy()


def run_row(
    split: Split,
    items: Items,
    vectors: Mapping[str, np.ndarray],
    config: EagerConfig,
    out: Path,
    given: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """One row: train, measure by both rankings, keep."""
    before, started = machine(), time.process_time()
    ids = eager_ids(vectors, items.vocabulary, config)
    console.print(f"codes in {time.process_time() - started:.0f} CPU seconds")
    eager = Eager(ids, items.vocabulary, config, vectors)
    eager.fit(split.train, split.validation, directory=out / "run", report=Printer(console))
    eager.save(out / "eager")
    result: dict[str, Any] = {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in eager.network.parameters()),
        "kept": sum(p.numel() for n, p in eager.network.named_parameters() if not n.startswith("tasks.")),
        "steps": eager.history["steps"],
        "minutes": {"training": eager.history["seconds"] / 60},
        "curve": eager.history["history"],
        "machine": before,
    }
    rankings = ("both", "own") if len(config.streams) == 2 else ("own",)
    for part in ("validation",) if given.no_test else ("validation", "test"):
        for ranking in rankings:
            eager.config = replace(config, ranking=ranking)
            title = f"{given.folder.name}, ranking {ranking}"
            found = measure([eager], split, part, given.users, console, title)
            result[part if ranking == rankings[0] else f"{part}, ranking own"] = found
    write_text(out / "result.json", json.dumps(result, indent=1))
    return result


def report(results: Mapping[str, Any], name: str, minutes: float, part: str, console: Console) -> None:
    """The table: unmasked, then masked."""
    console.print(f"\n{name}, {part}, {minutes:g} minutes of training each, recall@10 / ndcg@10")
    console.print(f"{'':<24} {'nothing masked':>16} {'seen masked':>16} {'steps':>8} {'parameters':>11}")
    for row, result in results.items():
        for key in (part, f"{part}, ranking own"):
            if key in result:
                cells = [f"{r['recall@10']:.4f} / {r['ndcg@10']:.4f}" for r in result[key]["rows"]]
                label = row if key == part else f"{row}, ranking own"
                line = f"{label:<24} {cells[0]:>16} {cells[1]:>16}"
                console.print(f"{line} {result['steps']:>8,} {result['parameters']:>11,}")


if __name__ == "__main__":
    main()
