"""A seeded world whose right answers are known, of any size.

Items lie in clusters; their text is made of the cluster's words; inside a cluster popularity is Zipf's. A user
moves from one cluster to another over life. The next event is, with probability `repeat`, one of the user's
own earlier events; otherwise a cluster is drawn from the interest of the moment and an item by popularity:

    p(item | life so far) = repeat · share of the item in life so far
                          + (1 − repeat) · interest[cluster of item] · popularity[item]

`World.oracle` is that formula: no recommender does better. Ids carry no information.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from tiglon.data.sources import Source
from tiglon.errors import ConfigError
from tiglon.types import Histories

_USERS_A_BLOCK = 4096  # each block has its own random stream, so a world does not depend on how it is read
_YEAR = 365 * 24 * 3600
_EPOCH = 1_600_000_000
_WORDS_A_CLUSTER = 12
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


@dataclass(frozen=True, eq=False)
class World:
    """U users, N items, C clusters; the ids in the tables are 0 … U−1 and 0 … N−1.

    cluster: (N,) each item's.   popularity: (N,) each item's share of its cluster.
    origin, destination: (U,) the clusters between which a user's interest moves.   lengths: (U,) events.
    focus: how much of the interest lies on these two; the rest is spread over all clusters.
    """

    items: pl.DataFrame
    cluster: np.ndarray
    popularity: np.ndarray
    origin: np.ndarray
    destination: np.ndarray
    lengths: np.ndarray
    clusters: int
    focus: float
    repeat: float
    seed: int

    def source(self) -> Source:
        """All events and items as tables."""
        return Source(pl.concat(self.blocks()), self.items, "A synthetic world with known answers.")

    def blocks(self) -> Iterator[pl.DataFrame]:
        """The events (user_id, item_id, timestamp) of 4,096 users at a time, by user and time."""
        for start in range(0, len(self.lengths), _USERS_A_BLOCK):
            yield self._block(np.arange(start, min(start + _USERS_A_BLOCK, len(self.lengths))))

    def interest(self, users: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(B, C) what clusters users (B,) draw from at their event number `position` (B,), from 0."""
        age = self._age(users, position)
        interest = np.full((len(users), self.clusters), (1 - self.focus) / self.clusters)
        rows = np.arange(len(users))
        interest[rows, self.origin[users]] += self.focus * (1 - age)
        interest[rows, self.destination[users]] += self.focus * age
        return interest

    def oracle(self, users: np.ndarray, histories: Histories) -> np.ndarray:
        """(B, N) the true probability of each item as the next event of users (B,) after their whole past."""
        lengths = histories.lengths
        p_BN = self.interest(users, lengths)[:, self.cluster] * self.popularity
        p_BN *= np.where(lengths > 0, 1 - self.repeat, 1.0)[:, None]
        share = self.repeat / np.maximum(lengths, 1)
        np.add.at(p_BN, (histories.owner, histories.item), share[histories.owner])
        return p_BN

    def _age(self, users: np.ndarray, position: np.ndarray) -> np.ndarray:
        return np.minimum(position / np.maximum(self.lengths[users] - 1, 1), 1.0)

    def _block(self, users: np.ndarray) -> pl.DataFrame:
        rng = np.random.default_rng([self.seed, int(users[0])])
        lengths = self.lengths[users]
        first = np.cumsum(lengths) - lengths
        user = np.repeat(users, lengths)
        position = np.arange(len(user)) - np.repeat(first, lengths)

        # Interest: with 1 − focus any cluster, else the destination with the probability of the age.
        moved = rng.random(len(user)) < self._age(user, position)
        cluster = np.where(moved, self.destination[user], self.origin[user])
        anywhere = rng.random(len(user)) >= self.focus
        cluster = np.where(anywhere, rng.integers(self.clusters, size=len(user)), cluster)

        # Popularity: cluster c owns the interval c … c+1 of one cumulative sum.
        order = np.argsort(self.cluster, kind="stable")
        share = np.cumsum(self.popularity[order])
        drawn = np.searchsorted(share, cluster + rng.random(len(user)), side="right")
        last_of_cluster = np.searchsorted(self.cluster[order], cluster, side="right") - 1
        item = order[np.minimum(drawn, last_of_cluster)]  # rounding must not leave the cluster

        # Repeats: point to an earlier event, then follow the pointers to where each chain begins.
        rows = np.arange(len(user))
        again = (rng.random(len(user)) < self.repeat) & (position > 0)
        earlier = (
            rows - position + np.minimum((rng.random(len(user)) * position).astype(np.int64), position - 1)
        )
        source = np.where(again, earlier, rows)
        while (source != source[source]).any():
            source = source[source]

        begin = rng.integers(0, _YEAR // 2, size=len(users))
        gaps = 1 + rng.exponential(_YEAR / 2 / lengths.repeat(lengths)).astype(np.int64)
        elapsed = np.cumsum(gaps)
        elapsed -= np.repeat(elapsed[first], lengths)
        time = _EPOCH + np.repeat(begin, lengths) + elapsed
        return pl.DataFrame({"user_id": user, "item_id": item[source], "timestamp": time})


def synthetic(
    users: int,
    items: int,
    events_per_user: int,
    seed: int = 0,
    *,
    clusters: int = 20,
    focus: float = 0.9,
    repeat: float = 0.2,
    zipf: float = 1.0,
) -> World:
    """A world with on average `events_per_user` events a user (log-normal, at least 3). Raises ConfigError."""
    if min(users, items, clusters) < 1 or events_per_user < 3 or clusters > items:
        raise ConfigError(
            f"{users} users, {items} items, {clusters} clusters, {events_per_user} events a user",
            rule="There are at least one user and one item, three events a user, an item a cluster",
        )
    if not (0 <= focus <= 1 and 0 <= repeat <= 1):
        raise ConfigError(f"focus={focus}, repeat={repeat}", rule="Both lie in 0 … 1")
    rng = np.random.default_rng(seed)
    cluster = rng.permutation(np.arange(items) % clusters)
    popularity = _zipf_within(cluster, clusters, zipf, rng)
    sigma = 0.6
    lengths = events_per_user * rng.lognormal(-(sigma**2) / 2, sigma, size=users)
    return World(
        items=_item_table(cluster, clusters, rng),
        cluster=cluster,
        popularity=popularity,
        origin=rng.integers(clusters, size=users),
        destination=rng.integers(clusters, size=users),
        lengths=np.maximum(np.round(lengths), 3).astype(np.int64),
        clusters=clusters,
        focus=focus,
        repeat=repeat,
        seed=seed,
    )


def _zipf_within(cluster: np.ndarray, clusters: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """(N,) 1/rank^exponent, ranks at random inside each cluster, summing to 1 in each."""
    order = np.lexsort((rng.random(len(cluster)), cluster))
    sizes = np.bincount(cluster, minlength=clusters)
    rank = np.empty(len(cluster), np.int64)
    rank[order] = np.arange(len(cluster)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    weight = (1.0 + rank) ** -exponent
    return weight / np.bincount(cluster, weight, minlength=clusters)[cluster]


def _item_table(cluster: np.ndarray, clusters: int, rng: np.random.Generator) -> pl.DataFrame:
    """item_id, title (four words of the cluster and one that all share), category."""
    n_words = (clusters + 1) * _WORDS_A_CLUSTER
    words = np.array([_word(number) for number in rng.permutation(n_words)]).reshape(clusters + 1, -1)
    own = words[cluster[:, None], rng.integers(_WORDS_A_CLUSTER, size=(len(cluster), 4))]
    common = words[clusters, rng.integers(_WORDS_A_CLUSTER, size=len(cluster))]
    parts = pl.DataFrame({f"w{i}": own[:, i] for i in range(4)} | {"w4": common})
    return pl.DataFrame(
        {
            "item_id": np.arange(len(cluster)),
            "title": parts.select(pl.concat_str(parts.columns, separator=" ")).to_series(),
            "category": words[cluster, 0],
        }
    )


def _word(number: int) -> str:
    """A different pronounceable word for each number: its digits in base 14 as syllables, at least three."""
    syllables: list[str] = []
    while number or len(syllables) < 3:
        number, digit = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)
