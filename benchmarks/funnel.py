"""Does the funnel beat each of its retrievers, and the training-free sum?

    python benchmarks/funnel.py DATA/amazon2014-beauty --tiger runs/beauty-0/tiger [--also runs/two_tower …]
    python benchmarks/funnel.py complete-journey --tiger demo/complete-journey/tiger

FOLDER holds interactions.parquet and items.parquet; --tiger is a model that was trained on the same split
(`benchmarks/tiger.py`, or the folder `tiger` of a bundle), --also are others (`benchmarks/dense.py --save`); without
them the funnel has the baselines alone.
The fusion learns on half of at most --learn users' validation targets and selects its penalty on the other
half; the test is read once. Prints a table with 95% intervals, seen items masked and not, the paired
difference to the best other row, and the weights; --users samples the users who are tested, and --json keeps
every number.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from baselines import prepare
from machine import machine, machine_line
from rich.console import Console
from tiger import source_of

from tiglon.evaluation.protocol import difference, evaluate, table, to_json
from tiglon.retrieval.neighbours import NeighbourSum, Popularity, Repeats
from tiglon.retrieval.retriever import Retriever
from tiglon.retrieval.tiger import Tiger
from tiglon.serving.bundle import load_retriever
from tiglon.serving.funnel import Funnel, FunnelConfig, learn

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("data", type=Path, metavar="FOLDER|complete-journey")
    arguments.add_argument("--tiger", type=Path, metavar="DIR")
    arguments.add_argument("--also", type=Path, nargs="+", default=[], metavar="DIR")
    arguments.add_argument("--users", type=int, help="who are tested; default: all")
    arguments.add_argument("--learn", type=int, default=FunnelConfig.users, help="who teach and select")
    arguments.add_argument("--shown", action="store_true", help="only with seen items shown")
    arguments.add_argument("--masked", action="store_true", help="only with seen items masked")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--json", type=Path, metavar="FILE")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    split, items = prepare(source_of(given.data))
    test = split.test
    if given.users is not None:
        test = test.take(np.sort(np.random.default_rng(0).permutation(len(test))[: given.users]))

    total = NeighbourSum().fit(split.train, items)
    popularity = Popularity().fit(split.train, items)
    baselines: list[Retriever] = [popularity, total.text, total.together, total]
    repeats = Repeats().fit(split.train, items)
    trained: list[Retriever] = [] if given.tiger is None else [Tiger.load(given.tiger)]
    trained += [load_retriever(folder) for folder in given.also]
    config = FunnelConfig(users=given.learn)
    console = Console(width=120, highlight=False)
    console.print(machine_line())
    report: dict[str, object] = {"machine": machine(), "data": str(given.data), "learn": given.learn}
    for masked in [m for m in (True, False) if not (given.shown and m) and not (given.masked and not m)]:
        sources = [*baselines, *([] if masked else [repeats]), *trained]
        began = time.monotonic()
        fusion = learn(sources, popularity.counts, split.validation, config, exclude_seen=masked)
        learned = time.monotonic() - began
        rows = [*sources, Funnel(sources, popularity.counts, fusion, config)]
        found = [evaluate(row, test, exclude_seen=masked) for row in rows]
        title = f"{given.data}, test: {len(items):,} items; the fusion learned in {learned:.0f} s"
        console.print(table(found, METRICS, title=title, intervals=True))
        *others, funnel = found
        best = {m: max(others, key=lambda e: e.metrics[m]) for m in ("recall@10", "ndcg@10")}
        gaps = {m: difference(funnel, e, m) for m, e in best.items()}
        for metric, (gap, low, high) in gaps.items():
            console.print(f"{metric}: funnel − {best[metric].name} = {gap:+.4f} ({low:+.4f} … {high:+.4f})")
        report["masked" if masked else "shown"] = {
            **to_json(found, split="test"),
            "differences": gaps,
            "weights": fusion.to_json()["weights"],
        }
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
