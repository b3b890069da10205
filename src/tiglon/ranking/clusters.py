"""Clusters of a life: what TWIN V2 does offline, before anybody asks.

"TWIN V2: Scaling Ultra-Long User Behavior Sequence Modeling for Enhanced CTR Prediction at Kuaishou"
Si et al., CIKM 2024, https://arxiv.org/abs/2407.16357, the offline part; the unit is in `twin_v2.py`.

A life of up to a million behaviours becomes about a tenth as many *leaves*:

    group   the behaviours by how much of the item was consumed         (`Groups`)
    divide  each group by k-means, a set of n into ⌊n^0.3⌋ children,
            and each child again, until no set holds more than γ = 20   (`divide`)
    stand   for each leaf the member nearest its centroid               (`representatives`)
    join    later behaviours to the leaf that they are near             (`join`)

A set of equal vectors cannot be divided by k-means: it is cut into chunks by time.

Deviations. Centroids are fitted on `sample` behaviours a child and all behaviours then assigned once, as
nothing hangs on the last step of k-means where the children are divided again; a set of no more than that
is clustered whole. By which vectors is the caller's choice: items' as published, or the search's keys
(`LifelongRanker.cluster`). Whole lives are clustered where no `cap` is given. What joins, and how, is ours:
the paper clusters everything again every two weeks.

Cost. One assignment a level: with D numbers an item, about Σ n^0.3 ≈ 100 distances a behaviour in a life of
10^6. Memory beside the input: three integers a behaviour. Nothing is drawn that does not hang on the set
alone, so the leaves are the same in any order and on any number of threads.

Letters: E behaviours, L of one life, N items, D width, C leaves, M behaviours in leaves, S sets, n of one set.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from tiglon.data.histories import offsets_of
from tiglon.errors import ConfigError, DataError

_MOST_GROUPS = 128
_CELL = 128  # leaves of all groups a cell, at least: short lives are searched whole
_PROBES = 4


@dataclass(frozen=True)
class ClusterConfig:
    largest: int = 20  # γ, behaviours in a leaf; TWIN V2: 20
    power: float = 0.3  # a set of n has ⌊n^power⌋ children, at least 2; TWIN V2: 0.3
    cap: int | None = None  # only so many most recent behaviours of a life; TWIN V2: 100,000; None: all
    iterations: int = 5  # of k-means
    sample: int = 32  # behaviours a child that centroids are fitted on
    reach: float = 2.0  # a behaviour may join a leaf this many times the group's typical radius away

    def __post_init__(self) -> None:
        if (
            self.largest < 1
            or self.iterations < 1
            or self.sample < 2
            or (self.cap is not None and self.cap < 1)
        ):
            raise ConfigError(
                f"largest={self.largest}, cap={self.cap}, iterations={self.iterations}, sample={self.sample}",
                rule="All are at least 1, the sample at least 2",
                fix="Pass cap=None for whole lives",
            )
        if not 0 < self.power < 1 or not self.reach >= 0:
            raise ConfigError(f"power={self.power}, reach={self.reach}", rule="0 < power < 1 and reach ≥ 0")


# -- groups --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Which behaviours may share a leaf: those in the same interval of a column.

    column: a feature of the histories; None puts all behaviours into one group.
    boundaries: rising; a value falls into group g if boundaries[g−1] ≤ value < boundaries[g].
    What is not finite or below `lowest` is unknown and has the last group, number len(boundaries) + 1.
    """

    column: str | None = None
    boundaries: tuple[float, ...] = ()
    lowest: float | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.boundaries).all() or (np.diff(self.boundaries) <= 0).any():
            raise ConfigError(f"group boundaries {self.boundaries}", rule="Boundaries are finite and rise")
        if len(self.boundaries) > 125:
            raise ConfigError(f"{len(self.boundaries) + 1} groups", rule="There are at most 126 groups")

    @classmethod
    def by_completion(cls, column: str = "completion", groups: int = 5) -> Groups:
        """By equal shares of [0, 1]; above 1 counts as 1, and a missing or negative one is unknown.

        TWIN V2: 5 groups of play time / duration. `completion_ratio` makes the column.
        """
        if groups < 1:
            raise ConfigError(f"groups={groups}", rule="There is at least one group")
        return cls(column, tuple(g / groups for g in range(1, groups)), lowest=0.0)

    @classmethod
    def by_quantile(cls, column: str, values: np.ndarray, groups: int = 5) -> Groups:
        """By quantiles of a column that stands in for a completion ratio, such as price or quantity.

        values: of past behaviours alone. Equal quantiles merge, so there may be fewer groups.
        """
        if groups < 1:
            raise ConfigError(f"groups={groups}", rule="There is at least one group")
        known = np.asarray(values, dtype=np.float64)
        known = known[np.isfinite(known)]
        if not known.size:
            raise DataError(f"no finite value in '{column}'", rule="Quantiles are fitted on known values")
        cuts = np.unique(np.quantile(known, np.arange(1, groups) / groups, method="higher"))
        return cls(column, tuple(cuts[cuts > known.min()].tolist()))

    def of(self, values: np.ndarray) -> np.ndarray:
        """(E,) int8 groups of (E,) values."""
        values = np.asarray(values, dtype=np.float64)
        group = np.searchsorted(np.asarray(self.boundaries), values, side="right")
        known = np.isfinite(values)
        if self.lowest is not None:
            known &= values >= self.lowest
        return np.where(known, group, len(self.boundaries) + 1).astype(np.int8)


def completion_ratio(played: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """(E,) float64 played/duration, at most 1; NaN where either is missing or negative, or the duration is 0."""
    played, duration = np.asarray(played, dtype=np.float64), np.asarray(duration, dtype=np.float64)
    if played.shape != duration.shape:
        raise DataError(
            f"{played.shape} play times for {duration.shape} durations", rule="One duration a behaviour"
        )
    known = (played >= 0) & (duration > 0) & np.isfinite(played) & np.isfinite(duration)
    return np.where(known, np.minimum(played / np.where(known, duration, 1.0), 1.0), np.nan)


# -- one life ------------------------------------------------------------------------------------------------


def cluster_life(
    vectors: np.ndarray,
    completion: np.ndarray | None = None,
    time: np.ndarray | None = None,
    groups: Groups | None = None,
    config: ClusterConfig | None = None,
) -> np.ndarray:
    """(L,) int64: which leaf each behaviour of a life is in, 0 … C−1 by mean time; −1 beyond the cap.

    vectors: (L, D) of the items.   completion: (L,), what `groups` reads; None is one group.
    time: (L,), never falling; None is 0 … L−1. Raises DataError.
    """
    config = config or ClusterConfig()
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError(f"vectors of shape {vectors.shape}", rule="One finite vector a behaviour, (L, D)")
    n = len(vectors)
    time = np.arange(n) if time is None else np.asarray(time)
    values = np.zeros(n) if completion is None else np.asarray(completion)
    if time.shape != (n,) or values.shape != (n,):
        raise DataError(
            f"times {time.shape} and completions {values.shape} for {n} behaviours",
            rule="One each a behaviour",
        )
    if (np.diff(time) < 0).any():
        raise DataError("times that fall", rule="A life comes oldest first", fix="Sort it by time")
    group = Groups().of(values) if completion is None else (groups or Groups.by_completion()).of(values)
    rows = np.arange(n)[-config.cap if config.cap else 0 :]
    leaves = divide(rows, rows, group[rows], vectors, config)
    order = np.argsort(mean_times(time[leaves.member], leaves.offsets), kind="stable")
    label = np.full(n, -1)
    label[leaves.member] = np.repeat(np.argsort(order), leaves.sizes)
    return label


# -- divide --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leaves:
    """Leaf c holds the rows member[offsets[c]:offsets[c + 1]], oldest first.   member (M,), offsets (C+1,)."""

    member: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(C,)"""
        return np.diff(self.offsets)

    @property
    def first(self) -> np.ndarray:
        """(C,) the oldest row of each."""
        return self.member[self.offsets[:-1]]

    def take(self, leaf: np.ndarray) -> Leaves:
        """These leaves, in this order."""
        sizes = self.sizes[leaf]
        offsets = offsets_of(sizes)
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[leaf] - offsets[:-1], sizes)
        return Leaves(self.member[at], offsets)


def divide(
    row: np.ndarray,
    item: np.ndarray,
    key: np.ndarray,
    table: np.ndarray,
    config: ClusterConfig,
    threads: int = 1,
) -> Leaves:
    """Divide behaviours into leaves of at most γ, those of one key apart from all others.

    row: (M,) names of behaviours, those of one key oldest first.   item: (M,) their rows in `table` (N, D).
    key: (M,) int, which set each is of: a user's group.   The leaves of the lowest key come first.
    """
    order = np.argsort(key, kind="stable")
    row, item, key = row[order].astype(np.int64), item[order].astype(np.int64), key[order]
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(key)) + 1, [len(row)]]).astype(np.int64)
    opens = np.zeros(len(row), np.bool_)
    if len(row):
        # Runs of neighbouring sets, of about equal numbers of behaviours; each run is one call without the lock.
        runs = np.unique(np.searchsorted(bounds, np.linspace(0, len(row), 8 * threads + 1)))
        arguments = (table, config.largest, config.power, config.iterations, config.sample)

        def run(edges: tuple[int, int]) -> None:
            _divide_sets(row, item, opens, bounds[edges[0] : edges[1] + 1], *arguments)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, itertools.pairwise(runs.tolist())))
    return Leaves(row, np.append(np.flatnonzero(opens), len(row)))


@njit(nogil=True, cache=True)
def _divide_sets(
    row: np.ndarray,
    item: np.ndarray,
    opens: np.ndarray,
    bounds: np.ndarray,
    table: np.ndarray,
    largest: int,
    power: float,
    iterations: int,
    sample: int,
) -> None:
    """Reorder row and item (M,) of each set bounds[s]:bounds[s + 1] leaf by leaf; `opens` where a leaf begins."""
    for s in range(len(bounds) - 1):
        a, b = bounds[s], bounds[s + 1]
        _divide_set(row[a:b], item[a:b], opens[a:b], table, largest, power, iterations, sample)


@njit(nogil=True, cache=True)
def _divide_set(
    row: np.ndarray,
    item: np.ndarray,
    opens: np.ndarray,
    table: np.ndarray,
    largest: int,
    power: float,
    iterations: int,
    sample: int,
) -> None:
    """The same for one set of n ≥ 1. Recursive k-means, with a stack of what is still too large."""
    n = len(row)
    child, row_aside, item_aside = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.int64)
    start, stop = np.empty(n // (largest + 1) + 1, np.int64), np.empty(n // (largest + 1) + 1, np.int64)
    depth = 0
    opens[0] = True
    if n > largest:
        start[0], stop[0], depth = 0, n, 1
    while depth:
        depth -= 1
        a, b = start[depth], stop[depth]
        children = max(2, int((b - a) ** power + 1e-9))
        count = _assign(item[a:b], table, _fit(item[a:b], table, children, iterations, sample), child[a:b])
        if count.max() == b - a:  # k-means saw one point, or nothing but copies of it in its sample
            count = _assign(item[a:b], table, _far_pair(item[a:b], table), child[a:b])
            if count.max() == b - a:  # nothing but copies: chunks by time
                opens[a:b:largest] = True
                continue
        place = np.cumsum(count) - count + a
        for c in range(len(count)):
            if count[c]:
                opens[place[c]] = True
            if count[c] > largest:
                start[depth], stop[depth] = place[c], place[c] + count[c]
                depth += 1
        for i in range(a, b):  # stable, so each child stays oldest first
            at = place[child[i]]
            row_aside[at], item_aside[at] = row[i], item[i]
            place[child[i]] += 1
        row[a:b], item[a:b] = row_aside[a:b], item_aside[a:b]


@njit(nogil=True, cache=True)
def _fit(item: np.ndarray, table: np.ndarray, k: int, iterations: int, sample: int) -> np.ndarray:
    """(≤ k, D) centroids of items (n,): k-means++ on an even sample, then Lloyd's iterations."""
    m = min(len(item), k * sample)
    some = np.empty(m, np.int64)
    for i in range(m):
        some[i] = item[i * len(item) // m]
    centre = np.empty((k, table.shape[1]), np.float32)
    apart = np.full(m, np.inf)  # squared distance from the nearest centre so far
    state = np.uint64(m)
    state, share = _random(state)
    chosen = int(share * m)
    for c in range(k):
        centre[c] = table[some[chosen]]
        for i in range(m):
            apart[i] = min(apart[i], _distance(table[some[i]], centre[c]))
        total = apart.sum()
        if total == 0:
            return centre[: c + 1]
        state, share = _random(state)
        left, chosen = share * total, -1
        for i in range(m):
            if apart[i] > 0:
                chosen = i
                left -= apart[i]
                if left < 0:
                    break
    child, before = np.empty(m, np.int32), np.full(m, -1, np.int32)
    for _ in range(iterations):
        count = _assign(some, table, centre, child)
        if (child == before).all():
            break
        before[:] = child
        for c in range(k):
            if count[c]:  # an empty one stays where it is
                centre[c] = 0
        for i in range(m):
            _add(centre[child[i]], table[some[i]], np.float32(1.0 / count[child[i]]))
    return centre


@njit(nogil=True, cache=True)
def _far_pair(item: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(2, D): the first of items (n,) and the one farthest from it."""
    centre = np.empty((2, table.shape[1]), np.float32)
    centre[0], centre[1], most = table[item[0]], table[item[0]], np.float32(0.0)
    for i in range(1, len(item)):
        d = _distance(table[item[i]], centre[0])
        if d > most:
            most = d
            centre[1] = table[item[i]]
    return centre


@njit(nogil=True, cache=True)
def _assign(item: np.ndarray, table: np.ndarray, centre: np.ndarray, child: np.ndarray) -> np.ndarray:
    """Write into `child` (n,) the nearest centre of each item, the first of equals; (k,) how many each has."""
    count = np.zeros(len(centre), np.int64)
    for i in range(len(item)):
        point, best, nearest = table[item[i]], np.float32(np.inf), 0
        for c in range(len(centre)):
            d = _distance(point, centre[c])
            if d < best:
                best, nearest = d, c
        child[i] = nearest
        count[nearest] += 1
    return count


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _distance(x: np.ndarray, y: np.ndarray) -> np.float32:
    """Squared and Euclidean; 0 for copies."""
    total = np.float32(0.0)
    for d in range(len(x)):
        step = x[d] - y[d]
        total += step * step
    return total


@njit(nogil=True, cache=True)
def _add(total: np.ndarray, x: np.ndarray, weight: np.float32) -> None:
    for d in range(len(x)):
        total[d] += weight * x[d]


@njit(nogil=True, cache=True)
def _random(state: np.uint64) -> tuple[np.uint64, float]:
    """SplitMix64: the next state, and a number in [0, 1)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, (z ^ (z >> np.uint64(31))) / 2.0**64


# -- stand ---------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def representatives(item: np.ndarray, offsets: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(C,) the place in `item` (M,) of each leaf's member nearest its centroid; the newest of equals."""
    found = np.empty(len(offsets) - 1, np.int64)
    centre = np.empty(table.shape[1], np.float32)
    for c in range(len(found)):
        _centroid(item[offsets[c] : offsets[c + 1]], table, centre)
        best = np.float32(np.inf)
        for i in range(offsets[c], offsets[c + 1]):
            d = _distance(table[item[i]], centre)
            if d <= best:
                best = d
                found[c] = i
    return found


@njit(nogil=True, cache=True)
def _centroid(item: np.ndarray, table: np.ndarray, centre: np.ndarray) -> None:
    """The mean of the items' vectors, into `centre`; that of copies is their vector to the last bit."""
    centre[:] = 0
    for i in range(len(item)):
        _draw(centre, table[item[i]], i + 1)


@njit(nogil=True, cache=True)
def _draw(centre: np.ndarray, x: np.ndarray, n: int) -> None:
    """The mean of n − 1 vectors becomes that of n, of which x is the last."""
    for d in range(len(x)):
        centre[d] += (x[d] - centre[d]) / np.float32(n)


def mean_times(time: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(C,) int64: the mean of each leaf's times (M,), rounded down: never after the newest member."""
    origin = time[offsets[:-1]]
    since = time - np.repeat(
        origin, np.diff(offsets)
    )  # small, where times themselves may not be exact floats
    return origin + np.floor(mean_values(since, offsets)).astype(np.int64)


def mean_values(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(C,) float64: the mean of each leaf's finite values (M,); NaN where there is none."""
    if len(offsets) == 1:
        return np.empty(0)
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), offsets[:-1])
    count = np.add.reduceat(known, offsets[:-1], dtype=np.int64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# -- join ----------------------------------------------------------------------------------------------------


class _Filed(NamedTuple):
    """The leaves of a life while behaviours join them, and where to look for the nearest one.

    A leaf c: centre (C, D), members (C,) how many, kind (C,) its group, newest (C,) member and from there back by older (L,).
    A cell s: the leaves that are nearest to seed (S, D) of their group, first[s] and from there by next (C,).
    used: [leaves, cells] so far.
    """

    centre: np.ndarray
    members: np.ndarray
    kind: np.ndarray
    newest: np.ndarray
    older: np.ndarray
    seed: np.ndarray
    seed_kind: np.ndarray
    first: np.ndarray
    next: np.ndarray
    used: np.ndarray


@njit(nogil=True, cache=True)
def join(
    item: np.ndarray,
    group: np.ndarray,
    leaf: np.ndarray,
    table: np.ndarray,
    largest: int,
    power: float,
    iterations: int,
    sample: int,
    reach: float,
) -> None:
    """Put a life's later behaviours, those with leaf −1, into leaves: `leaf` (L,) is changed in place.

    item: (L,) rows in `table`, oldest first.   group: (L,).   Leaves are numbered 0 … C−1, new ones from C on.
    One after the other, each joins the nearest leaf of its group (of equals the smallest) if its distance to
    the centroid is at most `reach` times the root mean square of that group's members before; otherwise it is
    a leaf of its own. A leaf that would hold more than γ is divided again, alone. In lives of more than about
    a thousand leaves a nearest leaf is looked for in the four nearest of its group's cells.
    """
    filed = _file_all(item, group, leaf, table, largest)
    near = reach**2 * _spread(item, group, leaf, table, filed.centre)
    for i in range(len(item)):
        if leaf[i] >= 0:
            continue
        leaf[i] = c = _nearest(table[item[i]], group[i], near[group[i]], filed)
        if c == filed.used[0]:
            filed.used[0] += 1
            _enter(i, c, item, group, table, filed)
            _file(c, filed)
        else:
            _enter(i, c, item, group, table, filed)
            if filed.members[c] > largest:
                _divide_leaf(c, item, group, leaf, table, filed, largest, power, iterations, sample)


@njit(nogil=True, cache=True)
def _file_all(
    item: np.ndarray, group: np.ndarray, leaf: np.ndarray, table: np.ndarray, largest: int
) -> _Filed:
    """The leaves as they are, in cells of about √C, with room for what may come."""
    n, leaves, width = len(item), leaf.max() + 1, table.shape[1]
    room = min(n, leaves + (leaf < 0).sum() * (largest + 1))
    step = max(int(np.sqrt(leaves)), _CELL)
    cells = leaves // step + 1 + _MOST_GROUPS
    filed = _Filed(
        np.empty((room, width), np.float32),
        np.zeros(room, np.int64),
        np.zeros(room, np.int64),
        np.full(room, -1),
        np.full(n, -1),
        np.empty((cells, width), np.float32),
        np.zeros(cells, np.int64),
        np.full(cells, -1),
        np.full(room, -1),
        np.array([leaves, 0]),
    )
    for i in range(n):
        if leaf[i] >= 0:
            _enter(i, leaf[i], item, group, table, filed)
    for c in range(0, leaves, step):
        _sow(c, filed)
    for c in range(leaves):
        _file(c, filed)
    return filed


@njit(nogil=True, cache=True)
def _spread(
    item: np.ndarray, group: np.ndarray, leaf: np.ndarray, table: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """(groups,) the mean squared distance of a group's members to their centroids."""
    total, members = np.zeros(_MOST_GROUPS), np.zeros(_MOST_GROUPS)
    for i in range(len(item)):
        if leaf[i] >= 0:
            total[group[i]] += _distance(table[item[i]], centre[leaf[i]])
            members[group[i]] += 1
    return total / np.maximum(members, 1)


@njit(nogil=True, cache=True)
def _nearest(x: np.ndarray, group: int, limit: float, filed: _Filed) -> int:
    """The leaf nearest to x in the nearest cells, of equals the smallest; the next free number if none is
    within √limit."""
    found, best = filed.used[0], np.float32(limit)
    cell, away = np.full(_PROBES, -1), np.full(_PROBES, np.inf, np.float32)
    for s in range(filed.used[1]):
        if filed.seed_kind[s] == group:
            d = _distance(x, filed.seed[s])
            at = _PROBES
            while at > 0 and d < away[at - 1]:
                at -= 1
                if at + 1 < _PROBES:
                    cell[at + 1], away[at + 1] = cell[at], away[at]
            if at < _PROBES:
                cell[at], away[at] = s, d
    for s in cell:
        c = filed.first[s] if s >= 0 else -1
        while c >= 0:
            d = _distance(x, filed.centre[c])
            if d < best or (d == best and (found == filed.used[0] or _smaller(c, found, filed.members))):
                found, best = c, d
            c = filed.next[c]
    return found


@njit(nogil=True, cache=True)
def _smaller(a: int, b: int, count: np.ndarray) -> bool:
    return count[a] < count[b] or (count[a] == count[b] and a < b)


@njit(nogil=True, cache=True)
def _enter(i: int, c: int, item: np.ndarray, group: np.ndarray, table: np.ndarray, filed: _Filed) -> None:
    """Behaviour i becomes the newest member of leaf c."""
    if filed.members[c] == 0:
        filed.centre[c] = 0
    filed.kind[c] = group[i]
    filed.members[c] += 1
    _draw(filed.centre[c], table[item[i]], filed.members[c])
    filed.older[i], filed.newest[c] = filed.newest[c], i


@njit(nogil=True, cache=True)
def _divide_leaf(
    c: int,
    item: np.ndarray,
    group: np.ndarray,
    leaf: np.ndarray,
    table: np.ndarray,
    filed: _Filed,
    largest: int,
    power: float,
    iterations: int,
    sample: int,
) -> None:
    """The members of leaf c alone are clustered again; the first of the new leaves keeps its number."""
    row, opens = np.empty(filed.members[c], np.int64), np.zeros(filed.members[c], np.bool_)
    at = filed.newest[c]
    for m in range(len(row) - 1, -1, -1):
        row[m], at = at, filed.older[at]
    _divide_set(row, item[row], opens, table, largest, power, iterations, sample)
    filed.newest[c], filed.members[c], into = -1, 0, c
    before = filed.used[0]
    for m in range(len(row)):
        if m and opens[m]:
            into = filed.used[0]
            filed.used[0] += 1
        leaf[row[m]] = into
        _enter(row[m], into, item, group, table, filed)
    for new in range(before, filed.used[0]):
        _file(new, filed)


@njit(nogil=True, cache=True)
def _sow(c: int, filed: _Filed) -> int:
    """A new cell around the centre of leaf c."""
    s = filed.used[1]
    filed.seed[s], filed.seed_kind[s] = filed.centre[c], filed.kind[c]
    filed.used[1] += 1
    return s


@njit(nogil=True, cache=True)
def _file(c: int, filed: _Filed) -> None:
    """Put leaf c into the nearest cell of its group, or into a new one if there is none."""
    home, best = -1, np.float32(np.inf)
    for s in range(filed.used[1]):
        if filed.seed_kind[s] == filed.kind[c]:
            d = _distance(filed.centre[c], filed.seed[s])
            if d < best:
                home, best = s, d
    if home < 0:
        home = _sow(c, filed)
    filed.next[c], filed.first[home] = filed.first[home], c
