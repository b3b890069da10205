"""Queries a second of the exact index beside faiss flat, in one run, and whether both find the same.

    python benchmarks/index.py [--items 100000,1000000] [--width 64] [--k 100] [--users 256] [--threads 1]

Random unit vectors; one interest and four interests a user; nothing filtered, and 50 seen items a user. The two take
turns, three times, and the fastest turn of each counts.
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
import torch
from machine import machine_line
from rich.console import Console
from rich.table import Table

from tiglon.retrieval.index import ExactIndex, FaissIndex
from tiglon.types import Histories


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="100000,1000000")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    console, rng = Console(width=150), np.random.default_rng(0)
    console.print(machine_line())
    shown = Table(title=f"users a second, width {given.width}, k {given.k}, {given.users} users at once")
    for column in ("items", "interests", "seen", "exact", "faiss flat", "exact / faiss", "same items"):
        shown.add_column(column, justify="right")
    for n in map(int, given.items.split(",")):
        vectors = unit(rng.normal(size=(n, given.width)))
        indexes = ExactIndex(vectors), FaissIndex(vectors)
        for interests in (1, 4):
            queries = unit(rng.normal(size=(given.users, interests, given.width)))
            for seen in (None, Histories.of(list(rng.integers(0, n, (given.users, 50))))):
                best, found = [np.inf, np.inf], []
                for _ in range(given.turns):
                    found = []
                    for which, index in enumerate(indexes):
                        start = time.perf_counter()
                        found.append(index.search(queries, given.k, seen=seen).item)
                        best[which] = min(best[which], time.perf_counter() - start)
                same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(*found, strict=True)]) / given.k
                speed = [given.users / seconds for seconds in best]
                numbers = [f"{n:,}", str(interests), "50" if seen else "–", *(f"{s:,.0f}" for s in speed)]
                shown.add_row(*numbers, f"{speed[0] / speed[1]:.2f}", f"{same:.4f}")
    console.print(shown)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
