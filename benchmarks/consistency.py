"""Does the search find what the attention wants? Every two-stage unit on Complete Journey, fresh and stale.

    python benchmarks/consistency.py [--units twin …] [--seeds 0 1 2] [--ages 0 1 4 16 64] [--learn 10000] [--threads 2]

Each unit learns from the same requests, once through. Then, on the longest lives of test households: of the hundred
behaviours that its own attention scores highest, the share that its search finds (Chang et al. 2023, figure 3). Age a:
the search reads tables made a updates ago, while the attention has the weights of now; an update is a step of Adam on
32 more requests at the recipe's highest rate. SIM hard reads no tables, so it has no age.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from lifelong_quality import CLUSTERED, clustered, first
from machine import machine_line

from tiglon.data.ranking import RankingTask, complete_journey_task
from tiglon.ranking.consistency import consistency_by_age, consistency_of
from tiglon.ranking.model import LifelongRanker
from tiglon.recipes import RANKING_RECIPES

UNITS = ("sim_hard", "sim_soft", "eta", "dare", "twin", CLUSTERED)
ASKED = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", nargs="+", default=list(UNITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ages", type=int, nargs="+", default=[0, 1, 4, 16, 64])
    parser.add_argument("--learn", type=int, default=10_000, help="requests to learn from")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    learn, _, test, note = complete_journey_task(seed=0)
    print(machine_line() + "\n" + note)
    learn = first(learn, given.learn)
    longest = test.select(np.sort(np.argsort(-test.lengths, kind="stable")[:ASKED]))
    print(f"{ASKED} requests over {longest.lengths.min():,} … {longest.lengths.max():,} behaviours\n")
    print(f"{'found, by age':<16}" + "".join(f"{age:>16}" for age in given.ages))
    for unit in given.units:
        rows = [aged(unit, seed, learn, longest, given.ages) for seed in given.seeds]
        cells = [spread([row[age] for row in rows if age in row]) for age in given.ages]
        print(f"{unit:<16}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def aged(unit: str, seed: int, learn: RankingTask, asked: RankingTask, ages: list[int]) -> dict[int, float]:
    """age → share of the true hundred that the search finds."""
    config = RANKING_RECIPES[unit]
    train = replace(config.train, epochs=1, evaluations=1, seed=seed)
    ranker = LifelongRanker.of(learn, replace(config, train=train)).fit(learn)
    if unit == CLUSTERED:
        asked = clustered(ranker, asked)
    (batch,) = asked.batches(ASKED, cells=10**9)
    search, embed = ranker.network.long, ranker.network.embed
    if not hasattr(search, "refresh"):
        return {0: consistency_of(search, embed, batch)}
    return consistency_by_age(search, embed, batch, updates(ranker, learn), ages)


def updates(ranker: LifelongRanker, learn: RankingTask) -> Callable[[], None]:
    """What makes one step of training at each call."""
    config, network = ranker.config, ranker.network
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay
    )
    batches = itertools.cycle(learn.batches(config.requests, seed=config.train.seed + 1))

    def update() -> None:
        network.train()
        optimizer.zero_grad()
        network.loss(next(batches)).mean().backward()
        optimizer.step()
        network.eval()

    return update


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
