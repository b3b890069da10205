"""Feature intersection: how often, and how long ago, a candidate's values occur in a user's life. No parameters.

What an explicit cross of the field's rankers says (特征求交): for each inherent feature of the candidate (its id,
brand, category …), the behaviours of the past that share its value. Attention divides by its sum and so forgets
how many there were; a count doesn't.

For each feature two numbers, both 0 where the value never occurred or is unknown:
    ln(1 + n)                      n behaviours share the value; one that stands for a cluster counts as its size
    ln((1 + N) / (1 + m))          N behaviours of the life, m of them since the last that shares the value
The second asks "how long ago" in behaviours, so that it has no unit and needs no fit.

Letters: B requests, K candidates, L behaviours, F inherent features.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.types import Behaviours

PER_FEATURE = 2


def intersect(embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
    """(B, K, 2F) float32: the counts of all features, then the recencies. Cost: F·(L + K) a request."""
    codes = embed.item_codes.numpy()
    count, since = np.zeros((2, max(table.num_embeddings for table in embed.items)))
    size_BL = past.mask.float() if past.size is None else past.size.masked_fill(~past.mask, 0.0)
    found = np.zeros((2, *item_BK.shape, codes.shape[1]), np.float32)
    _count(codes, count, since, item_BK.numpy(), past.item.numpy(), size_BL.numpy(), found)
    return torch.from_numpy(np.concatenate(found, axis=-1))


@njit(cache=True)
def _count(
    codes: np.ndarray,
    count: np.ndarray,
    since: np.ndarray,
    candidate_BK: np.ndarray,
    item_BL: np.ndarray,
    size_BL: np.ndarray,
    found: np.ndarray,
) -> None:
    """count, since: of each code, 0 now and afterwards; only what occurs is touched."""
    B, K = candidate_BK.shape
    L, F = item_BL.shape[1], codes.shape[1]
    for f in range(F):
        for b in range(B):
            total = 0.0
            for j in range(L - 1, -1, -1):  # newest first
                code = codes[item_BL[b, j], f]
                if size_BL[b, j] > 0.0 and code > 0:
                    if count[code] == 0.0:
                        since[code] = total
                    count[code] += size_BL[b, j]
                total += size_BL[b, j]
            for k in range(K):
                code = codes[candidate_BK[b, k], f]
                if count[code] > 0.0:
                    found[0, b, k, f] = np.log1p(count[code])
                    found[1, b, k, f] = np.log((1.0 + total) / (1.0 + since[code]))
            for j in range(L):
                count[codes[item_BL[b, j], f]] = since[codes[item_BL[b, j], f]] = 0.0
