"""Targets a second in training: RecTools' SASRec and ours, the same size and loss, in turns.

    pip install --no-deps rectools implicit pytorch-lightning lightning-utilities torchmetrics typeguard attrs
    python benchmarks/sasrec_speed.py [DATA/amazon2014-beauty] [--turns 3] [--threads 2] [--json FILE]

Both learn from the same log: width 128, two layers of four heads, windows of 50, dropout .2, the softmax over the
whole catalogue, item ids alone. Theirs: `SASRecModel.fit`, --steps steps of 128 rows, float32, as it comes, without its
checkpoints and bars. Ours: an epoch of `SasRec.fit`, in float32 and as the recipe has it, in bfloat16. Reading the log
is part of both. A target is an event that is predicted; theirs are all but each user's first, as many a step as users
have on average. The median of the turns, the first of which is not counted. Without FOLDER the log is a synthetic
world of Beauty's size.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import machine, machine_line
from pytorch_lightning import Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from tiger import prepare

from tiglon.data.sources import tables
from tiglon.data.synthetic import synthetic
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.train.loop import TrainConfig
from tiglon.types import Interactions

CONFIG = SasRecConfig(dropout=0.2, train=TrainConfig(epochs=1, bfloat16=False))
WINDOW, ROWS = CONFIG.window, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of theirs, a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(machine_line())
    source = tables(given.folder) if given.folder else synthetic(22_000, 12_000, 9, seed=0).source()
    split, items = prepare(source)
    log = split.train
    name = given.folder.name if given.folder else "synthetic world"
    print(f"{name}: {len(log):,} training events, {len(items):,} items")

    half = replace(CONFIG, train=replace(CONFIG.train, bfloat16=True))
    runners: dict[str, Callable[[], int]] = {
        "RecTools, float32": lambda: theirs(log, given.steps),
        "tiglon, float32": lambda: ours(log, CONFIG),
        "tiglon, bfloat16": lambda: ours(log, half),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for turn in range(given.turns + 1):
        for runner, run in runners.items():
            start = time.perf_counter(), time.process_time()
            targets = run()
            wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            if turn:
                speeds[runner].append((targets / wall, targets / cpu))
    found = {runner: np.median(turns, axis=0) for runner, turns in speeds.items()}
    base = found["RecTools, float32"]
    print(f"{'':<20} {'targets/s':>10} {'ratio':>8} {'of CPU time':>12}")
    for runner, speed in found.items():
        ratio = speed / base
        print(f"{runner:<20} {speed[0]:>10,.0f} {ratio[0]:>7.1f}× {ratio[1]:>11.1f}×")
    if given.json:
        rows = {runner: speed.tolist() for runner, speed in found.items()}
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


def theirs(log: Interactions, steps: int) -> int:
    """How many targets so many steps have, about."""
    table = pd.DataFrame(
        {
            Columns.User: log.user,
            Columns.Item: log.item,
            Columns.Datetime: pd.to_datetime(log.time, unit="s"),
            Columns.Weight: 1.0,
        }
    )

    def trainer() -> Trainer:
        return Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_blocks=CONFIG.layers,
        n_heads=CONFIG.heads,
        n_factors=CONFIG.width,
        dropout_rate=CONFIG.dropout,
        session_max_len=WINDOW,
        batch_size=ROWS,
        loss="softmax",
        epochs=1,
        train_min_user_interactions=2,
        get_trainer_func=trainer,
    )
    model.fit(Dataset.construct(table))
    held = np.minimum(np.bincount(log.user), WINDOW + 1)
    return int(steps * ROWS * (held[held > 1] - 1).mean())


def ours(log: Interactions, config: SasRecConfig) -> int:
    SasRec(log.items, config).fit(log)
    return len(log)


if __name__ == "__main__":
    main()
