"""The k best items of a score matrix, with a stated rule for ties.

Ties are broken by a seeded hash of the item: at random as far as any order in the data goes, yet the same
for the same item in every batch and run, and when items are added. A tie broken by id order would favour
whatever that order stands for (time of arrival, popularity), and metrics of coarse scores would measure it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from tiglon.errors import DataError
from tiglon.retrieval.retriever import require_k
from tiglon.types import MISSING, Candidates, Histories


def top_items(
    scores: np.ndarray, k: int, banned: Histories | None = None, *, seed: int = 0, source: str = "scores"
) -> Candidates:
    """The min(k, N) best items of each user.

    scores: (B, N) float, −inf for an item that may not be returned.
    banned: items that each user may not get, such as the user's own history.
    Raises ConfigError for k < 1, DataError for a NaN or banned items of other users or catalogues.
    """
    require_k(k)
    users, n = scores.shape
    if np.isnan(scores).any():
        raise DataError(f"{int(np.isnan(scores).sum())} scores that are NaN", rule="A score is a number")
    if banned is not None:
        if len(banned) != users:
            raise DataError(f"banned items of {len(banned)} users for scores of {users}")
        require_dense(banned, n)
        scores = scores.copy()
        scores[banned.owner, banned.item] = -np.inf
    order = tie_order(n, seed)
    item = best_places(np.ascontiguousarray(scores), min(k, n), order)
    row = np.arange(users)[:, None]
    score = np.where(item == MISSING, -np.inf, scores[row, item])
    ranks = np.lexsort((order[item], -score), axis=1)
    item, score = item[row, ranks], score[row, ranks]
    return Candidates(item, score.astype(np.float32), source)


def each_once(item: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (B, m) in which no item stands twice: its best score stays, MISSING with −inf takes the other places.

    In the order of the items, MISSING anywhere.
    """
    order = np.lexsort((-score, item), axis=1)
    item, score = np.take_along_axis(item, order, axis=1), np.take_along_axis(score, order, axis=1)
    again = np.zeros(item.shape, bool)
    again[:, 1:] = item[:, 1:] == item[:, :-1]
    return np.where(again, MISSING, item), np.where(again, np.float32(-np.inf), score)


@lru_cache(maxsize=8)
def tie_order(n: int, seed: int = 0) -> np.ndarray:
    """(N,) `tie_keys` of items 0 … n − 1, read-only."""
    order = tie_keys(np.arange(n), seed)
    order.flags.writeable = False
    return order


def tie_keys(item: np.ndarray, seed: int = 0) -> np.ndarray:
    """Distinct uint64, one an item, of the shape of `item`; of items with equal scores the lowest goes first.

    SplitMix64 (Steele et al. 2014), a bijection of the item's number: new items never reorder old ones.
    """
    state = (item.astype(np.uint64) + np.uint64(1) + (np.uint64(seed) << np.uint64(32))) * np.uint64(
        0x9E3779B97F4A7C15
    )
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def require_dense(histories: Histories, n_items: int) -> None:
    """Raise DataError unless every item lies in 0 … n_items − 1."""
    if histories.item.size and not 0 <= histories.item.min() <= histories.item.max() < n_items:
        raise DataError(
            f"a dense item outside 0 … {n_items - 1}",
            rule="Histories speak the dense ids of the catalogue that the retriever was fitted on",
            fix="Align the log with the catalogue; leave unknown items out",
        )


def require_deny(deny: np.ndarray | None, n_items: int) -> None:
    """Raise DataError unless it is one bool for each item, or None."""
    if deny is not None and (deny.shape != (n_items,) or deny.dtype != bool):
        raise DataError(
            f"denied items of shape {deny.shape} and type {deny.dtype}",
            rule=f"deny is one bool for each of the {n_items} items",
        )


@njit(cache=True, nogil=True)
def best_places(scores: np.ndarray, k: int, order: np.ndarray) -> np.ndarray:
    """(B, k) where the best scores of each row stand, in no order; MISSING after the last one above −inf.

    order: (N,) which of two equal scores goes first, the lower.
    """
    users, n_items = scores.shape
    best = np.full((users, k), MISSING, np.int64)
    block = max(
        n_items // (4 * k), 1
    )  # with four blocks for each place, hardly more than k items reach the bar
    maxima = np.empty(-(-n_items // block), scores.dtype)
    for b in range(users):
        row, heap = scores[b], best[b]  # once k are found, a heap with the worst of them on top
        for m in range(len(maxima)):
            maxima[m] = row[m * block : (m + 1) * block].max()
        n, bar = 0, -np.inf
        if len(maxima) > k:
            bar = np.partition(maxima, len(maxima) - k)[
                len(maxima) - k
            ]  # k blocks have one item that reaches it
        for m in range(len(maxima)):
            if maxima[m] < bar:
                continue
            for i in range(m * block, min((m + 1) * block, n_items)):
                if row[i] < bar:
                    continue
                if n < k:
                    if row[i] > -np.inf:
                        heap[n] = i
                        n += 1
                        if n == k:
                            for at in range(k // 2 - 1, -1, -1):
                                _sift(heap, at, row, order)
                            bar = row[heap[0]]
                elif _worse(heap[0], i, row, order):
                    heap[0] = i
                    _sift(heap, 0, row, order)
                    bar = row[heap[0]]
    return best


@njit(cache=True, nogil=True)
def _sift(heap: np.ndarray, at: int, row: np.ndarray, order: np.ndarray) -> None:
    """Let the item at `at` sink below all that are worse."""
    while 2 * at + 1 < len(heap):
        child = 2 * at + 1
        if child + 1 < len(heap) and _worse(heap[child + 1], heap[child], row, order):
            child += 1
        if not _worse(heap[child], heap[at], row, order):
            return
        heap[child], heap[at] = heap[at], heap[child]
        at = child


@njit(cache=True, nogil=True)
def _worse(a: int, b: int, row: np.ndarray, order: np.ndarray) -> bool:
    return row[a] < row[b] or (row[a] == row[b] and order[a] > order[b])
