"""MIMN's compiled steps beside their definition in torch's operations: how many times as fast, and how far apart.

    python benchmarks/mimn_steps.py [--users 32] [--behaviours 1000] [--turns 3] [--threads 1]

The definition is the one that the tests compare with (tests/ranking/test_mimn.py). Random weights, behaviours 136 wide,
the paper's eight slots; both take turns in one process, the state alone and with gradients; medians of CPU time.
Their memories are compared; which channel a step updates is a hard choice, and rounding turns one in a few thousand.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine_line

sys.path.append(str(Path(__file__).parent.parent / "tests" / "ranking"))
from test_mimn import unrolled

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.mimn import MIMN, MemoryState
from tiglon.train.memory import kept
from tiglon.types import Behaviours

ITEMS, CROSSES = 2_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("users", 32), ("behaviours", 1_000), ("turns", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine_line())
    torch.manual_seed(0)
    codes = np.append(np.arange(1, ITEMS + 1), 0)[:, None]
    embed = FeatureEmbedding(codes, (ITEMS + 1,), (112,), (5,) * CROSSES)
    unit = MIMN(embed)
    with kept():
        for B in (1, given.users):
            past = lives(B, given.behaviours)
            ways = {
                "definition": lambda s, p=past: unrolled(unit, embed, s, p),
                "compiled": lambda s, p=past: unit.update(embed, s, p),
            }
            with torch.no_grad():
                a, b = (way(unit.begin(B)).memory for way in ways.values())
            apart = float((a - b).abs().max() / a.abs().max())
            for gradient in (False, True):
                seconds: dict[str, list[float]] = {name: [] for name in ways}
                for turn in range(given.turns + 1):
                    for name, way in ways.items():
                        began = time.process_time()
                        with torch.set_grad_enabled(gradient):
                            state: MemoryState = way(unit.begin(B))
                        if gradient:
                            torch.cat([part.flatten() for part in state]).sum().backward()
                        if turn:  # the first compiles
                            seconds[name].append(time.process_time() - began)
                slow, fast = (statistics.median(times) for times in seconds.values())
                what = "with gradients" if gradient else "the state alone"
                print(f"{B} users, {given.behaviours:,} behaviours, {what}: {slow / fast:.1f} times as fast, "
                      f"{1e6 * fast / B / given.behaviours:.1f} µs a step; memories apart by {apart:.0e}")  # fmt: skip


def lives(B: int, L: int) -> Behaviours:
    item, cross = torch.randint(ITEMS, (B, L)), torch.randint(5, (B, L, CROSSES))
    return Behaviours(item, cross, torch.rand(B, L) + 1, torch.ones(B, L, dtype=torch.bool))


if __name__ == "__main__":
    main()
