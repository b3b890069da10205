"""Attention over the moments of a life: what may be seen, how far away it is, what came last.

A moment is all that happened at one time: one event, or a basket. Letters: B users, Q queries, K keys,
q positions of a query, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiglon.nn.transformer import HIDDEN

START = -1  # the moment of the state that stands for an empty history: before all others, always seen


class MomentBias(nn.Module):
    """A learned bias for how many moments back a key lies. Nothing that came later is seen.

    distances: buckets; the first half exact, then logarithmic, doubling every sixth of the rest.
    positions: q, of one query; each has biases of its own.
    """

    def __init__(self, heads: int, distances: int, positions: int = 1) -> None:
        super().__init__()
        self.distances = distances
        self.weight = nn.Parameter(torch.zeros(distances + 1, heads, positions))  # the last row: START

    def bucket(self, distance: Tensor) -> Tensor:
        half = self.distances // 2
        far = half + (torch.log2(distance.clamp(min=1) / half) * half / 3).long()
        return torch.where(distance < half, distance.clamp(min=0), far.clamp(half, self.distances - 1))

    def forward(self, query_BQ: Tensor, key_BK: Tensor, *, own: bool) -> Tensor:
        """Bias (B, H, Q·q, K) between moments; −inf on keys later than the query and, unless `own`, on those
        of its own moment. B is 1 where all users agree."""
        if (query_BQ == query_BQ[:1]).all() and (key_BK == key_BK[:1]).all():
            query_BQ, key_BK = query_BQ[:1], key_BK[:1]
        distance = query_BQ[:, :, None] - key_BK[:, None, :]
        start = (key_BK == START)[:, None, :]
        hidden = (distance < 0 if own else distance <= 0) & ~start
        bias = self.weight[torch.where(start, self.distances, self.bucket(distance))]
        bias_BQKHq = bias.masked_fill(hidden[..., None, None], HIDDEN)
        return bias_BQKHq.permute(0, 3, 1, 4, 2).flatten(2, 3)


def latest(states_BKD: Tensor, key_BK: Tensor, query_BQ: Tensor) -> Tensor:
    """(B, Q, D): the mean state of the latest moment before each query's."""
    before = torch.where(key_BK[:, None] < query_BQ[..., None], key_BK[:, None], START - 1)
    of_latest = (before == before.amax(dim=-1, keepdim=True)).to(states_BKD.dtype)
    return of_latest / of_latest.sum(dim=-1, keepdim=True) @ states_BKD
