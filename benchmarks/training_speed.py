"""Targets a second in training: Hugging Face's T5 as peers train it, `tiger_paper` and `tiger`.

    python benchmarks/training_speed.py DATA/amazon2014-beauty [--seconds 40] [--turns 3] [--json FILE]

All learn the same targets of the same log in one process, in turns. Theirs: T5ForConditionalGeneration at
the paper's size, histories of 20 items padded to 80 tokens, 256 rows a step, dropout .1, AdamW, gradients
clipped, in float32 (as peers do) and under bfloat16 autocast. Ours: the recipes' own batches and precision,
through the package's training loop. A figure is the median of the turns; the first is not counted. Without
FOLDER the log is a synthetic world of Beauty's size. Needs transformers (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from decoding import t5_of
from machine import machine, machine_line
from tiger import identify, item_vectors, prepare, recipe_of

from tiglon.data.histories import HistoryStore
from tiglon.data.sources import tables
from tiglon.data.synthetic import synthetic
from tiglon.recipes import make_tokenizer
from tiglon.retrieval.tiger import Tiger
from tiglon.retrieval.tiger_paper import PaperConfig, PaperTiger
from tiglon.retrieval.windows import WindowBatches, moments
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.train.loop import train
from tiglon.types import Interactions, Items, user_names

TOKENS = 80
ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long a turn lasts")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine_line())

    source = tables(given.folder) if given.folder else synthetic(22_000, 12_000, 9, seed=0).source()
    split, items = prepare(source)
    recipe = recipe_of("tiger", len(split.train), items, {})
    _, vectors = item_vectors(split.train, items, recipe)
    ids = identify(make_tokenizer(recipe.ids).fit(vectors), vectors, items)
    name = given.folder.name if given.folder else "synthetic world"
    print(f"{name}: {len(split.train):,} training events, {len(items):,} items, IDs of {ids.sizes}")

    runners = {
        "HF T5, float32": t5_runner(ids, split.train, bfloat16=False),
        "HF T5, bfloat16 autocast": t5_runner(ids, split.train, bfloat16=True),
        "tiger_paper": our_runner("tiger_paper", ids, split.train, items, vectors),
        "tiger": our_runner("tiger", ids, split.train, items, vectors),
    }
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(given.turns + 1):
        for name, run in runners.items():
            start = time.perf_counter(), time.process_time()
            targets = run(given.seconds)
            if turn:
                speeds[name].append(targets / (time.perf_counter() - start[0]))
                cpu[name].append(targets / (time.process_time() - start[1]))
    base = float(np.median(speeds["HF T5, float32"])), float(np.median(cpu["HF T5, float32"]))
    print(f"{'':<26} {'targets/s':>10} {'ratio':>8} {'of CPU time':>12}")
    rows = []
    for name in runners:
        speed, per_cpu = float(np.median(speeds[name])), float(np.median(cpu[name]))
        rows.append(
            {
                "name": name,
                "targets_per_second": speed,
                "ratio": speed / base[0],
                "targets_per_cpu_second": per_cpu,
                "turns": speeds[name],
            }
        )
        print(f"{name:<26} {speed:>10,.0f} {speed / base[0]:>7.1f}× {per_cpu / base[1]:>11.1f}×")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")


def t5_runner(ids: SemanticIds, log: Interactions, *, bfloat16: bool) -> Callable[[float], int]:
    """Train for about so many seconds; how many targets were learned from."""
    torch.manual_seed(0)
    paper = PaperTiger(ids.sizes, PaperConfig())
    t5 = t5_of(paper, dropout=0.1).train()
    optimizer = torch.optim.AdamW(t5.parameters(), lr=3e-4, weight_decay=0.035)
    store, moment = HistoryStore.build(log), moments(log)
    windows = paper.windows(store.offsets, moment, TOKENS // len(ids.sizes))
    tokens = torch.from_numpy(ids.codes.astype(np.int64)) + paper.offsets
    random = np.random.default_rng(0)

    def run(seconds: float) -> int:
        targets, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            rows = windows[random.integers(0, len(windows), ROWS)]
            at = rows[:, :1] + np.arange(TOKENS // len(ids.sizes))
            past = at < rows[:, 2:]
            past &= moment[np.where(past, at, 0)] < moment[rows[:, 2]][:, None]
            item = torch.from_numpy(log.item[np.where(past, at, 0)].astype(np.int64))
            mask = torch.from_numpy(past).repeat_interleave(len(ids.sizes), dim=1)
            history = tokens[item].flatten(1).masked_fill(~mask, 0)
            truth = tokens[torch.from_numpy(log.item[rows[:, 2]].astype(np.int64))]
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = t5(input_ids=history, attention_mask=mask.long(), labels=truth).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
            optimizer.step()
            targets += ROWS
        return targets

    return run


def our_runner(
    recipe: str, ids: SemanticIds, log: Interactions, items: Items, vectors: np.ndarray
) -> Callable[[float], int]:
    """The same, by the package's loop over the recipe's batches."""
    settings = recipe_of(recipe, len(log), items, {}).tiger
    tiger = Tiger(ids, items.vocabulary, settings, vectors=vectors)
    store, moment = HistoryStore.build(log), moments(log)
    windows = tiger.network.windows(store.offsets, moment, settings.window)
    wanted, user = np.ones(len(log), bool), user_names(log.users)[log.user]

    def run(seconds: float) -> int:
        learned = 0

        def batches(epoch: int) -> WindowBatches:
            return WindowBatches(log.item, moment, wanted, user, windows, settings.batch_targets, [0, epoch])

        def loss(network: object, batch):  # type: ignore[no-untyped-def]
            nonlocal learned
            losses = tiger.loss(batch).sum(dim=1)
            learned += len(losses)
            return losses

        config = replace(settings.train, minutes=seconds / 60, evaluations=1)
        train(tiger.network, batches, loss, None, config)
        return learned

    return run


if __name__ == "__main__":
    main()
