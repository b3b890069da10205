"""The k best behaviours of each candidate, and attention to them; shared by the two-stage rankers.

Ties are broken newest first, and padding is never found, whatever the scores: a coarse score (Hamming
distance, say) ties in most rows, and a real behaviour may score below the zero of a padded one.

Letters: B requests, K candidates, L behaviours, k chosen ones, A heads, H width of an item,
J cross features, C width of a cross feature, D width of the interest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from tiglon.errors import ConfigError
from tiglon.nn.target_attention import TargetAttention
from tiglon.types import Behaviours

_ALL_ROWS = 6  # L / k from where masking all rows costs more than gathering k, measured on a CPU


def require_k(k: int) -> int:
    """k, or ConfigError unless it is a whole number of at least 1."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k={k!r}", rule="k, the behaviours that are kept, is a whole number of at least 1")
    return k


def top_k(score_BKL: Tensor, mask_BL: Tensor, k: int) -> Tensor:
    """(B, K, min(k, L)) positions of the best scores, best first, −1 after the last one.

    Behaviours with mask False or score −inf are never found. NaN counts as −inf. No gradient.
    """
    score = score_BKL.detach().masked_fill(~mask_BL[:, None], -torch.inf).float().contiguous()
    rows = score.flatten(0, 1).numpy()
    return torch.from_numpy(_top_k(rows, min(k, rows.shape[1]))).unflatten(0, score.shape[:2])


@njit(cache=True, nogil=True)
def _top_k(score: np.ndarray, k: int) -> np.ndarray:
    """(R, k) of scores (R, L): one pass from the newest to the oldest with a heap of the best k."""
    rows, length = score.shape
    found = np.full((rows, k), -1, np.int64)
    if k == 0:
        return found
    for r in range(rows):
        row, heap = score[r], found[r]  # once k are found, the worst of them on top
        n, bar = 0, -np.inf
        for at in range(length - 1, -1, -1):
            if not row[at] > bar:  # an equal one is older than all that are in the heap
                continue
            if n < k:
                heap[n] = at
                n += 1
                if n == k:
                    for top in range(k // 2 - 1, -1, -1):
                        _sift(heap, top, k, row)
            else:
                heap[0] = at
                _sift(heap, 0, k, row)
            if n == k:
                bar = row[heap[0]]
        if n < k:
            for top in range(n // 2 - 1, -1, -1):
                _sift(heap, top, n, row)
        for last in range(n - 1, 0, -1):  # the worst goes to the end, again and again
            heap[0], heap[last] = heap[last], heap[0]
            _sift(heap, 0, last, row)
    return found


@njit(cache=True, nogil=True)
def _sift(heap: np.ndarray, at: int, n: int, row: np.ndarray) -> None:
    """Let the position at `at` sink below all of the first n that are worse."""
    while 2 * at + 1 < n:
        child = 2 * at + 1
        if child + 1 < n and _worse(heap[child + 1], heap[child], row):
            child += 1
        if not _worse(heap[child], heap[at], row):
            return
        heap[child], heap[at] = heap[at], heap[child]
        at = child


@njit(cache=True, nogil=True)
def _worse(a: int, b: int, row: np.ndarray) -> bool:
    return row[a] < row[b] or (row[a] == row[b] and a < b)


def gather(past: Behaviours, chosen_BKk: Tensor) -> Behaviours:
    """Behaviours of shape (B, K, k, …): each candidate's own; a position of −1 becomes padding."""
    shape = chosen_BKk.shape[1:]
    flat = past.take(chosen_BKk.flatten(1))
    return Behaviours(*(None if part is None else part.unflatten(1, shape) for part in flat))  # type: ignore[arg-type]


def attend(
    attention: TargetAttention,
    item_BKH: Tensor,
    past: Behaviours,
    chosen_BKk: Tensor,
    features: Callable[[Behaviours], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Target attention of each candidate over its own chosen behaviours, all projections live.

    features: behaviours of shape (…) → their inherent (…, H) and cross features (…, J, C).
    Returns the interest (B, K, D) and the weights (B, K, k), the mean over heads, 0 where chosen is −1.
    """
    L, k = past.mask.shape[1], chosen_BKk.shape[2]
    if _ALL_ROWS * k >= L:
        return _attend_to_masked(attention, item_BKH, past, chosen_BKk, features)
    return _attend_to_gathered(attention, item_BKH, past, chosen_BKk, features)


def _attend_to_masked(
    attention: TargetAttention,
    item_BKH: Tensor,
    past: Behaviours,
    chosen_BKk: Tensor,
    features: Callable[[Behaviours], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Score all L and hide what a candidate did not choose: where most is chosen, that is less work."""
    here = chosen_BKk >= 0
    B, K, _ = chosen_BKk.shape
    L = past.mask.shape[1]
    wanted = torch.zeros(B, K, L + 1, dtype=torch.bool)
    wanted = wanted.scatter(2, chosen_BKk.masked_fill(~here, L), True)[..., :L]
    own = past._replace(mask=wanted & past.mask[:, None])
    inherent, cross = features(own)
    vector, weight_BKAL = attention.mix(attention.logits(item_BKH, own, inherent, cross), inherent, cross)
    weight_BKk = weight_BKAL.mean(dim=2).gather(2, chosen_BKk.clamp(min=0))
    return vector, weight_BKk.masked_fill(~here, 0.0)


def _attend_to_gathered(
    attention: TargetAttention,
    item_BKH: Tensor,
    past: Behaviours,
    chosen_BKk: Tensor,
    features: Callable[[Behaviours], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Project each behaviour that any candidate chose once, U of them, and let the candidates gather theirs."""
    here = chosen_BKk >= 0
    B, L = past.mask.shape
    row_BKk = chosen_BKk.clamp(min=0) + L * torch.arange(B)[:, None, None]
    row_U, at_BKk = row_BKk.unique(return_inverse=True)
    some = Behaviours(*(None if part is None else part.flatten(0, 1)[row_U] for part in past))  # type: ignore[arg-type]
    inherent, cross = features(some)

    A = attention.heads
    of_head_BKAk = at_BKk[:, :, None] * A + torch.arange(A)[:, None]

    def gathered(x_UAd: Tensor) -> Tensor:
        """(B, K, A, k, d). Head by head they lie as they are multiplied; but a gradient costs what there are rows."""
        if torch.is_grad_enabled():  # and an index's is far slower than an embedding's
            return F.embedding(at_BKk, x_UAd.flatten(1)).unflatten(-1, x_UAd.shape[1:]).transpose(2, 3)
        return F.embedding(of_head_BKAk, x_UAd.flatten(0, 1))

    size = None if some.size is None else some.size[at_BKk]
    bias_BKAk = gathered(attention.bias(cross).T[..., None]).squeeze(-1)
    key_BKAkd = gathered(attention.keys(inherent))
    alpha = attention.score(attention.queries(item_BKH), key_BKAkd, bias_BKAk, here, size)
    vector, weight_BKAk = attention.read(alpha, gathered(attention.values(inherent, cross)))
    return vector, weight_BKAk.mean(dim=2)
