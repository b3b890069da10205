"""The trie's build time, bytes an item, and µs a step, at 10^5, 10^6 and 10^7 random items.

    python benchmarks/trie.py [--items 100000 1000000 10000000] [--nodes 140]

IDs are 3 × 256 random codes and the collision digit. A step asks for the children of `--nodes` prefixes,
as a beam search does (2 users × 70 beams); the median of many random batches is shown, for every depth,
for a fresh trie and for one with 1% of its items added and 1% removed since it was built.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tiglon.semantic_ids.trie import Trie

SIZES = (256, 256, 256, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--nodes", type=int, default=140)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    measure(random_ids(1000, random), options.nodes, 2, random)  # compiles
    print(f"{'items':>11} {'build':>8} {'bytes/item':>10}   µs a step at depth 0, 1, 2, 3 (children found)")
    for count in options.items:
        codes = random_ids(count, random)
        start = time.perf_counter()
        trie = Trie.build(codes, SIZES)
        build = time.perf_counter() - start
        steps = measure(codes, options.nodes, options.steps, random, trie)
        print(f"{count:>11,} {build:>7.2f}s {trie.nbytes / count:>10.1f}   {steps}")
        changed = Trie.build(codes[: -count // 100], SIZES)
        start = time.perf_counter()
        changed = changed.add(codes[-count // 100 :], np.arange(count - -(-count // 100), count))
        added = time.perf_counter() - start
        start = time.perf_counter()
        changed = changed.remove(np.arange(count // 100))
        removed = time.perf_counter() - start
        steps = measure(codes, options.nodes, options.steps, random, changed)
        print(f"{'':>11} add 1% {added:.2f} s, remove 1% {removed:.2f} s   {steps}", flush=True)


def random_ids(count: int, random: np.random.Generator) -> np.ndarray:
    """(count, 4) int32, unique, in random order."""
    codes = np.empty((count, 4), np.int32)
    codes[:, :3] = random.integers(0, 256, (count, 3))
    key = (codes[:, 0] * 256 + codes[:, 1]) * 256 + codes[:, 2]
    order = np.argsort(key, kind="stable")
    first = np.searchsorted(key[order], key[order])
    codes[order, 3] = np.arange(count) - first
    return codes


def measure(
    codes: np.ndarray, nodes: int, steps: int, random: np.random.Generator, trie: Trie | None = None
) -> str:
    trie = trie or Trie.build(codes, SIZES)
    columns = []
    for depth in range(4):
        taken, found = [], 0
        for _ in range(steps):
            prefixes = trie.find(codes[random.integers(0, len(codes), nodes), :depth])
            prefixes = prefixes[prefixes >= 0]
            start = time.perf_counter()
            offsets, _, _ = trie.children(prefixes, depth)
            taken.append(time.perf_counter() - start)
            found += int(offsets[-1])
        columns.append(f"{np.median(taken) * 1e6:.0f} ({found / steps:,.0f})")
    return "   ".join(columns)


if __name__ == "__main__":
    main()
