"""Clustering lives for TWIN V2: behaviours a second, what is left of a life, and the price of an update.

    python benchmarks/clustering.py [--lengths 1000 10000 100000 1000000] [--width 32] [--threads 1]

Lives of a synthetic world: items in tight clusters, popularity after Zipf, an interest that drifts through
life, completion ratios at random. The last 1% of every life is new: `until` stands before it, and an update
takes it in. Many short lives together make up at least `--events` behaviours. Storage counts what an online
read maps: of a raw behaviour its item, time and completion, of a leaf these and its size and group.
Seconds are of the processor (all threads), so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from tiglon.data.histories import HistoryStore, offsets_of
from tiglon.ranking.cluster_store import ClusterStore
from tiglon.ranking.clusters import ClusterConfig, Groups
from tiglon.types import ItemVectors, Vocabulary

ITEMS, TOPICS = 20_000, 200
Result = TypeVar("Result")


def world(lives: int, length: int, width: int, seed: int = 0) -> tuple[HistoryStore, ItemVectors]:
    """`lives` users of `length` behaviours each at times 0 … length − 1."""
    rng = np.random.default_rng(seed)
    topic = np.sort(rng.integers(TOPICS, size=ITEMS))
    vectors = rng.normal(size=(TOPICS, width))[topic] + 0.5 * rng.normal(size=(ITEMS, width))
    first = np.searchsorted(topic, np.arange(TOPICS + 1))
    age = np.tile(np.arange(length) / length, lives)
    home = np.repeat(rng.integers(TOPICS, size=lives), length)
    liked = (home + (40 * age).astype(np.int64) + rng.geometric(0.1, lives * length)) % TOPICS
    rank = (first[liked + 1] - first[liked]) * rng.random(lives * length) ** 3  # the popular come first
    return HistoryStore(
        Vocabulary(np.arange(lives).tolist()),
        Vocabulary(np.arange(ITEMS).tolist()),
        offsets_of(np.full(lives, length)),
        (first[liked] + rank.astype(np.int64)).astype(np.int32),
        np.tile(np.arange(length), lives),
        {"completion": rng.random(lives * length, dtype=np.float32)},
    ), ItemVectors(vectors.astype(np.float32), "synthetic")


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def online_bytes(store: HistoryStore) -> int:
    return store.item.nbytes + store.time.nbytes + sum(column.nbytes for column in store.features.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settings = {
        "groups": Groups.by_completion(),
        "config": ClusterConfig(cap=None),
        "threads": options.threads,
    }
    tiny, vectors = world(2, 200, options.width)
    ClusterStore.build(tiny, vectors, until=190, **settings).update(tiny, vectors)  # compiles
    print(
        "| behaviours a life | lives | behaviours/s | leaves | largest | online storage "
        "| update, s | of clustering | leaves changed | behaviours moved |\n" + "|---" * 10 + "|"
    )
    for length in options.lengths:
        lives = max(options.events // length, 1)
        raw, vectors = world(lives, length, options.width)
        until = length - length // 100
        store, seconds = timed(lambda: ClusterStore.build(raw, vectors, until=until, **settings))  # noqa: B023
        (later, report), again = timed(lambda: store.update(raw, vectors, threads=options.threads))  # noqa: B023
        clustered = lives * until
        saved = 1 - online_bytes(store.virtual) / (online_bytes(raw) * until / length)
        print(
            f"| {length:,} | {lives} | {clustered / seconds:,.0f} | {len(store.leaves) / clustered:.1%} "
            f"| {later.virtual.features['size'].max()} | −{saved:.1%} | {again:.2f} | {again / seconds:.1%} "
            f"| {report.changed / report.leaves:.1%} | {report.moved / clustered:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
