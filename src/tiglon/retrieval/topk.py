"""The k best items of a score matrix, with a stated rule for ties.

Ties are broken by a seeded hash of the item: at random as far as any order in the data goes, yet the same
for the same item in every batch, run and catalogue. A tie broken by id order would favour whatever that
order stands for (time of arrival, popularity), and metrics of coarse scores would measure it.
"""

from __future__ import annotations

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
    item, score = _best(np.ascontiguousarray(scores), min(k, n), tie_order(n, seed))
    return Candidates(item, score.astype(np.float32), source)


def tie_order(n: int, seed: int = 0) -> np.ndarray:
    """(N,) distinct uint64, one an item; of items with equal scores the lowest goes first.

    SplitMix64 (Steele et al. 2014), a bijection of the item's number: new items never reorder old ones.
    """
    state = (np.arange(1, n + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))) * np.uint64(
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


@njit(cache=True)
def _best(
    scores: np.ndarray, k: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover (compiled)
    """(B, k) items and scores by (score falling, order rising); MISSING where the score is −inf."""
    users = len(scores)
    item = np.full((users, k), MISSING, np.int64)
    score = np.full((users, k), -np.inf, scores.dtype)
    if k == 0:
        return item, score
    for b in range(users):
        cost = -scores[b]
        worst = np.partition(cost, k - 1)[k - 1]
        # All that tie with the k-th are kept until the order among equals is known.
        kept = np.flatnonzero((cost <= worst) & (cost < np.inf))
        kept = kept[np.argsort(order[kept])]
        kept = kept[np.argsort(cost[kept], kind="mergesort")][:k]
        item[b, : len(kept)] = kept
        score[b, : len(kept)] = scores[b][kept]
    return item, score
