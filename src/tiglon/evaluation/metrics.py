"""Metrics of ranked lists, as pure functions on arrays.

    hit, relevant = judge(ranked, truth)        which ranks hit; how many there were to hit
    recall(hit, relevant, k=10).mean()          every metric of a user is an array (B,), so it can be resampled
    bootstrap(recall(hit, relevant, k=10))      a 95% interval of its mean

A list hits on the *item*. Ranks count from 1. A metric of a user without truth is undefined: NaN.
Sums over a list run over the K ranks asked for; a list shorter than K has no hits after its end.

Letters: B users, K ranks, N items, T truths of all users end to end, M metrics, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tiglon.errors import ConfigError, DataError
from tiglon.types import MISSING, Histories

Metric = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def judge(ranked: np.ndarray, truth: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Compare lists with truths: hit (B, K) bool, relevant (B,) int64, the number of distinct true items.

    ranked: (B, K) dense ids, best first, MISSING after the last one, no item twice.
    Raises DataError where the numbers of users differ.
    """
    _require_lists(ranked, len(truth))
    n = 1 + max(ranked.max(initial=MISSING), truth.item.max(initial=MISSING))
    true = np.unique(truth.owner * n + truth.item)
    asked = np.arange(len(ranked))[:, None] * n + ranked
    hit = np.isin(asked, true) & (ranked != MISSING)
    relevant = np.bincount(true // max(n, 1), minlength=len(truth))
    return hit, relevant


# -- of a user: (B,) ---------------------------------------------------------------------------------------


def recall(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Recall@K = |hits in the first K| / |truth|. With more than K true items it cannot reach 1."""
    return _divide(_hits(hit, k), relevant)


def recall_capped(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """|hits in the first K| / min(K, |truth|): 1 for a perfect list. Some libraries call this Recall@K."""
    return _divide(_hits(hit, k), np.minimum(relevant, k))


def precision(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Precision@K = |hits in the first K| / K; a short list is not forgiven."""
    return np.where(relevant > 0, _hits(hit, k) / k, np.nan)


def hit_rate(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """HR@K = 1 where any of the first K hits. Its mean is a share of users, unlike `pooled_recall`."""
    return np.where(relevant > 0, _hits(hit, k) > 0, np.nan)


def ndcg(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """NDCG@K = Σ_{r ≤ K} hit_r / log2(r + 1)  ÷  Σ_{r ≤ min(K, |truth|)} 1 / log2(r + 1).

    The ideal list holds as many true items as fit, not as many as were hit: one hit of three at rank 3
    scores .2346 (Järvelin and Kekäläinen 2002, binary gains).
    """
    _require_k(k)
    gain = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0], np.cumsum(gain)])[np.minimum(relevant, k)]
    found = hit[:, :k]
    return _divide(found @ gain[: found.shape[1]], ideal)


def reciprocal_rank(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """1 / rank of the first hit within K, else 0. Its mean is MRR@K."""
    _require_k(k)
    found = hit[:, :k]
    if not found.shape[1]:
        return np.where(relevant > 0, 0.0, np.nan)
    return np.where(relevant > 0, found.any(axis=1) / (1 + found.argmax(axis=1)), np.nan)


def average_precision(hit: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """AP@K = Σ_{r ≤ K} hit_r · |hits in the first r| / r  ÷  |truth|. Its mean is MAP@K (trec_eval's map_cut)."""
    _require_k(k)
    found = hit[:, :k]
    precisions = np.cumsum(found, axis=1) / np.arange(1, found.shape[1] + 1)
    return _divide((found * precisions).sum(axis=1), relevant)


USER_METRICS: dict[str, Metric] = {
    "recall": recall,
    "ndcg": ndcg,
    "hr": hit_rate,
    "mrr": reciprocal_rank,
    "map": average_precision,
    "precision": precision,
    "recall_capped": recall_capped,
}


def category_entropy(ranked: np.ndarray, categories: np.ndarray, k: int) -> np.ndarray:
    """(B,) −Σ p log2 p over the categories of the first K items, in bits; 0 for one category or no list.

    categories: (N,) one label an item, of any type that sorts.
    """
    user, count = _category_counts(ranked, categories, k)
    share = count / np.bincount(user, weights=count, minlength=len(ranked))[user]
    return np.bincount(user, weights=-share * np.log2(share), minlength=len(ranked))


def category_diversity(ranked: np.ndarray, categories: np.ndarray, k: int) -> np.ndarray:
    """(B,) the share of pairs among the first K items whose categories differ (Cen et al. 2020, ComiRec, §5.3);
    0 for a list of fewer than two.

    categories: as `category_entropy` takes them.
    """
    user, count = _category_counts(ranked, categories, k)
    length = np.bincount(user, weights=count, minlength=len(ranked))
    pairs = length * (length - 1)
    same = np.bincount(user, weights=count * (count - 1), minlength=len(ranked))
    return np.divide(pairs - same, pairs, out=np.zeros(len(ranked)), where=pairs > 0)


def _category_counts(ranked: np.ndarray, categories: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(P,) user and (P,) how many of the first K items, of each category that a user's list has."""
    _require_k(k)
    top = ranked[:, :k]
    _, label = np.unique(categories, return_inverse=True)
    row, column = np.nonzero(top != MISSING)
    n = int(label.max(initial=0)) + 1
    pair, count = np.unique(row * n + label[top[row, column]], return_counts=True)
    return pair // n, count


# -- of all lists ------------------------------------------------------------------------------------------


def pooled_recall(hit: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Σ_users |hits in the first K| / Σ_users |truth|: a ratio of sums, where users with more truth weigh more."""
    total = relevant.sum()
    return float(_hits(hit, k).sum() / total) if total else float("nan")


def coverage(ranked: np.ndarray, n_items: int, k: int) -> float:
    """Distinct items in the first K of any list / N."""
    return float((exposure(ranked, n_items, k) > 0).mean())


def gini(ranked: np.ndarray, n_items: int, k: int) -> float:
    """Gini of exposure, over the whole catalogue: 0 when all items are shown equally often, (N−1)/N when one is.

    G = Σ_i (2i − N − 1) x_i / (N Σ x), x sorted to rise; i counts from 1.
    """
    shown = np.sort(exposure(ranked, n_items, k))
    total = shown.sum()
    rank = np.arange(1, n_items + 1)
    return float(((2 * rank - n_items - 1) * shown).sum() / (n_items * total)) if total else float("nan")


def exposure(ranked: np.ndarray, n_items: int, k: int) -> np.ndarray:
    """(N,) in how many lists each item stands among the first K."""
    _require_k(k)
    top = ranked[:, :k]
    return np.bincount(top[top != MISSING], minlength=n_items)


POPULARITY_BINS = ("new", "tail", "middle", "head")


def popularity_bins(counts: np.ndarray) -> np.ndarray:
    """(N,) int: a place in POPULARITY_BINS for each item, by its training events `counts` (N,).

    Head: the most popular items, which make up the first third of all events; middle and tail likewise
    the second and the last third; new: no event at all. Equal counts fall into the same bin.
    """
    level, place, size = np.unique(counts, return_inverse=True, return_counts=True)
    events = level * size
    above = (events[::-1].cumsum()[::-1] - events) / max(events.sum(), 1)
    third = 3 - np.minimum((3 * above).astype(np.int64), 2)
    return np.where(level > 0, third, 0)[place]


def recall_by_popularity(
    ranked: np.ndarray, truth: Histories, counts: np.ndarray, k: int
) -> dict[str, tuple[float, int]]:
    """bin → (share of its true items that stand in their user's first K, number of its true items).

    counts: (N,) training events an item, see `popularity_bins`. The ratio is pooled; NaN for an empty bin.
    """
    _require_lists(ranked, len(truth))
    _require_k(k)
    n = len(counts)
    true = np.unique(truth.owner * n + truth.item)
    top = ranked[:, :k]
    asked = (np.arange(len(ranked))[:, None] * n + top)[top != MISSING]
    found = np.isin(true, asked)
    bins = popularity_bins(counts)[true % n]
    total = np.bincount(bins, minlength=len(POPULARITY_BINS))
    hits = np.bincount(bins, weights=found, minlength=len(POPULARITY_BINS))
    return {
        name: (float(h / t) if t else float("nan"), int(t))
        for name, h, t in zip(POPULARITY_BINS, hits, total, strict=True)
    }


# -- how sure ----------------------------------------------------------------------------------------------

_RESAMPLES_AT_ONCE = 20  # draws of all users held in memory together


def bootstrap(
    values: np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the mean over users, by resampling users n times with replacement (percentile method).

    values: (B,) one metric, or (B, M) several, resampled together; low and high are () or (M,).
    Raises DataError without users or with a NaN (drop users without truth first).
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or np.isnan(values).any():
        raise DataError(
            f"{len(values)} values, {int(np.isnan(values).sum())} of them NaN",
            rule="An interval needs at least one user, and a value of each",
            fix="Leave out users without truth",
        )
    if n < 1 or not 0 < level < 1:
        raise ConfigError(f"n={n}, level={level}", rule="n is at least 1 and the level lies between 0 and 1")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            _resampled_means(values, min(_RESAMPLES_AT_ONCE, n - done), rng)
            for done in range(0, n, _RESAMPLES_AT_ONCE)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _resampled_means(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, …) means of values (B, …) over n draws of B users with replacement."""
    b = len(values)
    drawn = rng.integers(b, size=(n, b)) + b * np.arange(n)[:, None]
    times = np.bincount(drawn.ravel(), minlength=n * b).reshape(n, b)
    return times.astype(np.float64) @ values / b


def bootstrap_difference(
    a: np.ndarray, b: np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of mean(a − b) of the same users in the same order; without 0 inside, the two differ."""
    if np.shape(a) != np.shape(b):
        raise DataError(
            f"values of shapes {np.shape(a)} and {np.shape(b)}",
            rule="A paired difference needs the same users",
        )
    return bootstrap(np.asarray(a) - np.asarray(b), n, seed, level)


# -- inside ------------------------------------------------------------------------------------------------


def _hits(hit: np.ndarray, k: int) -> np.ndarray:
    _require_k(k)
    return hit[:, :k].sum(axis=1)


def _divide(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(value, by, out=np.full(len(value), np.nan), where=by > 0)


def _require_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k of {k}", rule="A metric looks at the first k ≥ 1 ranks")


def _require_lists(ranked: np.ndarray, users: int) -> None:
    if ranked.ndim != 2 or len(ranked) != users:
        raise DataError(f"lists of shape {ranked.shape} for {users} users", rule="One ranked list a user")
