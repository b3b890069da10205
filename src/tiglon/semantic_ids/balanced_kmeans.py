"""EAGER's codes: hierarchical k-means whose clusters all have the same size.

Wang et al., "EAGER: Two-Stream Generative Recommender with Behavior-Semantic Collaboration", KDD 2024,
https://arxiv.org/abs/2406.14017, §3.3: the catalogue is divided into k clusters of equal size, each of these
again, until a leaf holds one item; an item's codes are the path to its leaf. No two items collide, so there is
no collision digit, and no code is rarer than another.

Clusters of n items hold ⌊n/k⌋ or ⌈n/k⌉, exactly. Ordinary k-means gives the first centres; then, in turns,
items are dealt out to the seats of the clusters at the least total squared distance, and centres move to the
means. The dealing is Bertsekas' auction (Bertsekas and Castañón, "The auction algorithm for the transportation
problem", 1989): items bid for seats, a full cluster's price rises, and the total comes within n·ε of the least
possible one.

Items that arrive later (not in the paper) go down the frozen tree, `ClusterTree`: nothing moves for them.

Cost: N·k distances at once (100 MB for 100,000 items and 256 clusters).

Letters: N items, M new ones, D width, V clusters of a level (k above), S levels, P nodes of a level.
"""

from __future__ import annotations

import numba
import numpy as np

from tiglon.errors import CapacityError, ConfigError, DataError
from tiglon.semantic_ids.kmeans import kmeans
from tiglon.semantic_ids.tokenizer import require_vectors
from tiglon.types import Vocabulary, hash_ids

TOLERANCE = 0.1  # ε, as a share of the mean squared distance to the nearest centre
LEAST = 0.02  # that distance, at least, as a share of the mean one to all centres
SAMPLE = 2**14  # points that the first centres are learned from


def balanced_codes(
    vectors: np.ndarray, keys: Vocabulary, branches: int = 256, *, levels: int = 2, seed: int = 0
) -> np.ndarray:
    """(N, S) int32 unique codes: the path of each item through balanced clusters of clusters.

    vectors: (N, D) finite; copies and zeros are fine.   keys: the N raw ids, whose hash breaks ties and numbers
    the items of a last cluster, so that no order of the table enters the codes.
    levels: S, at least 2; it grows until branches^S reaches N. In a catalogue of at most `branches` items each
        is a cluster of its own, and the codes after the first are 0.
    Raises ConfigError, DataError.
    """
    if branches < 2 or levels < 2:
        raise ConfigError(f"branches={branches}, levels={levels}", rule="Both are at least 2")
    vectors = require_vectors(vectors)
    if len(vectors) != len(keys):
        raise DataError(f"{len(vectors)} vectors for {len(keys)} items")
    while branches**levels < len(vectors):
        levels += 1
    codes = np.zeros((len(vectors), levels), np.int32)
    groups = [np.argsort(hash_ids(keys), kind="stable")]
    if len(vectors):
        mean = vectors[groups[0]].mean(axis=0, dtype=np.float64)
        vectors = vectors - mean  # what all have in common would hide what sets them apart
        vectors = np.ldexp(vectors, -np.frexp(np.abs(vectors).max())[1])  # or squares overflow
        vectors = vectors.astype(np.float32)
    random = np.random.default_rng(seed)
    for level in range(levels):
        below: list[np.ndarray] = []
        for rows in groups:
            code = balanced_kmeans(vectors[rows], branches, random)
            codes[rows, level] = code
            below += [rows[code == c] for c in range(min(branches, len(rows)))]
        groups = [rows for rows in below if len(rows) > 1]
    return codes


class ClusterTree:
    """The clusters of a catalogue as they were made, in which items that arrive later find their codes."""

    def __init__(self, codes: np.ndarray, vectors: np.ndarray) -> None:
        """codes: (N, S) of `balanced_codes`.   vectors: (N, D), those that they were made of."""
        self.last_codes = int(codes[:, -1].max(initial=-1)) + 1
        # By level: the means (P, D) of what lies below each node; where the next level's (P + 1,) begin below it.
        self.centres: list[np.ndarray] = []
        self.first_child: list[np.ndarray] = []
        for level in range(1, codes.shape[1]):
            nodes, at = np.unique(codes[:, :level], axis=0, return_inverse=True)
            total = np.zeros((len(nodes), vectors.shape[1]))
            np.add.at(total, at.ravel(), vectors)
            self.centres.append(total / np.bincount(at.ravel())[:, None])
            if level > 1:
                _, first = np.unique(nodes[:, :-1], axis=0, return_index=True)
                self.first_child.append(np.append(first, len(nodes)))
        self.nodes = nodes  # (P, S − 1), the paths to the last clusters

    def place(self, vectors: np.ndarray, taken: np.ndarray, size: int) -> np.ndarray:
        """(M, S) int32 codes for new items (M, D), one after the other: at each level they go to the nearest
        centre below which there is room, and there they take the next code that no item ever had.

        taken: (n, S) all codes that were given, those of the catalogue and of items placed before.
        size: the last codes are 0 … size − 1. Codes that the catalogue has in any cluster are left out.
        Raises CapacityError where no cluster has room.
        """
        _, at = np.unique(np.concatenate([self.nodes, taken[:, :-1]]), axis=0, return_inverse=True)
        following = np.full(len(self.nodes), self.last_codes)
        np.maximum.at(following, at.ravel()[len(self.nodes) :], taken[:, -1] + 1)
        if len(vectors) > (size - following).sum():
            raise CapacityError(
                f"{len(vectors)} new items, and room for {(size - following).sum()} in EAGER's clusters",
                rule="New items never move old ones",
                fix="Make the codes anew, of all items, and fit anew",
            )
        room = [size - following]
        for first in reversed(self.first_child):
            room.insert(0, np.add.reduceat(room[0], first[:-1]))
        codes = np.empty((len(vectors), taken.shape[1]), np.int32)
        for row, vector in enumerate(vectors.astype(np.float64)):  # squares must not overflow
            low, high = 0, len(room[0])
            for level, centres in enumerate(self.centres):
                distance = np.square(centres[low:high] - vector).sum(axis=1)
                node = low + int(np.where(room[level][low:high] > 0, distance, np.inf).argmin())
                room[level][node] -= 1
                if level < len(self.first_child):
                    low, high = self.first_child[level][node : node + 2]
            codes[row] = *self.nodes[node], following[node]
            following[node] += 1
        return codes


def balanced_kmeans(
    points: np.ndarray, size: int, random: np.random.Generator, iterations: int = 8
) -> np.ndarray:
    """(N,) int32: a cluster of `size` for each of points (N, D) float32; ⌊N/size⌋ or ⌈N/size⌉ a cluster.

    Up to `size` points are clusters of their own, in their order.
    """
    if len(points) <= size:
        return np.arange(len(points), dtype=np.int32)
    sample = random.choice(len(points), SAMPLE, replace=False) if len(points) > SAMPLE else slice(None)
    centres = kmeans(points[sample], size, random, iterations)
    code = np.empty(0, np.int32)
    for _ in range(iterations):
        before, code = code, assign(_squared_distances(points, centres))
        if np.array_equal(code, before):
            break
        first = np.concatenate([[0], np.cumsum(np.bincount(code, minlength=size))])
        total = np.add.reduceat(points[np.argsort(code, kind="stable")], first[:-1])
        centres = (total / np.diff(first)[:, None]).astype(np.float32)
    return code


def assign(cost_NV: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """(N,) int32 clusters of equal size, N ≥ V, at nearly the least total cost.

    The clusters that most points are nearest to have ⌈N/V⌉ seats, the others ⌊N/V⌋. The total is above the
    least one by at most N·ε, ε = tolerance · the mean over points of their smallest cost, or of LEAST of all costs
    where that is more: most points may be copies of one another, and then dearer seats are all that is left to them.
    """
    n, size = cost_NV.shape
    seats = np.full(size, n // size)
    wanted = np.bincount(cost_NV.argmin(axis=1), minlength=size)
    seats[np.argsort(-wanted, kind="stable")[: n % size]] += 1
    nearest, usual = (float(cost.mean(dtype=np.float64)) for cost in (cost_NV.min(axis=1), cost_NV))
    epsilon = tolerance * max(nearest, LEAST * usual) or 1.0
    return _auction(np.ascontiguousarray(cost_NV, np.float32), seats, epsilon)


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, V) float32."""
    squared = points @ (-2 * centres.T)
    squared += np.einsum("nd,nd->n", points, points)[:, None]
    squared += np.einsum("vd,vd->v", centres, centres)
    return np.maximum(squared, 0, out=squared)


@numba.njit(cache=True)
def _auction(cost: np.ndarray, seats: np.ndarray, epsilon: float) -> np.ndarray:
    """Points without a seat bid, one after the other, as long as there are any.

    A bid is the price at which the point's best cluster would be ε worse than its second best. A full cluster
    gives up its lowest bid for a higher one; its price is the lowest that it holds.
    """
    n, size = cost.shape
    code = np.empty(n, np.int32)
    bid = np.empty(n)
    price = np.zeros(size)
    held = np.empty((size, seats.max()), np.int64)  # points by cluster
    filled = np.zeros(size, np.int64)
    waiting = np.arange(n)[::-1].copy()
    left = n
    while left:
        left -= 1
        point = waiting[left]
        best, second, at = np.inf, np.inf, 0
        for c in range(size):
            value = cost[point, c] + price[c]
            if value < best:
                best, second, at = value, best, c
            elif value < second:
                second = value
        bid[point] = price[at] + (second - best if size > 1 else 0.0) + epsilon
        code[point] = at
        if filled[at] < seats[at]:
            held[at, filled[at]] = point
            filled[at] += 1
        else:
            lowest = 0
            for j in range(filled[at]):
                if bid[held[at, j]] < bid[held[at, lowest]]:
                    lowest = j
            waiting[left] = held[at, lowest]
            left += 1
            held[at, lowest] = point
        if filled[at] == seats[at]:
            price[at] = np.inf
            for j in range(filled[at]):
                price[at] = min(price[at], bid[held[at, j]])
    return code
