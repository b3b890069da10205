"""Whether people come back to what they had: shoes are not bought twice, milk is.

A product of vectors cannot say either, as an item is always like itself, and a network that must learn it from
examples pays with what it could say of other items. Here it is learned beside the network, as odds: those of an item
that a user had are multiplied by the sum of a weight exp(w) for each time, w by how many moments ago. After the repeat
mode of RepeatNet (Ren et al., AAAI 2019, https://arxiv.org/abs/1812.02646), which chooses between repeating and exploring.

Where items are written code by code, the odds of a code are multiplied by the mean of that factor over the items below
it, as if they were equally likely: (K_1 + … + K_m + n − m) / n where m of n were had. At the last code it is exact.

It is learned of what came before each target in the whole life, not only in the window that a network reads, as
answers look for it there, too.

Letters: B users, T targets, M items that a user had, A steps of age, S code positions, V codes of a position, W beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.nn.transformer import HIDDEN
from tiglon.retrieval.windows import AGES, REMEMBERED, Batch, Earlier, histories_moments
from tiglon.semantic_ids.trie import Trie
from tiglon.types import MISSING, Histories

STEP = 10.0  # w has far to go, at a rate of learning made for vectors
LARGEST = 80.0  # |w|: float32 still counts e⁸⁰ of a thousand times, and e⁻⁸⁰
PRIOR = 1e-7  # of w², where it is learned alone: of what never happens, the likeliest w is −∞
LEAST = 1e-6  # factor of a code


class Had(NamedTuple):
    """What came before each target. item: (T, M) int64, each once.   offset: (T, M) float32, what it adds to its
    item's logit.   there: (T, M) bool; elsewhere there is nothing."""

    item: Tensor
    offset: Tensor
    there: Tensor


class Repetition(nn.Module):
    """log K = log Σ exp(w), at first the logarithm of how often one had an item."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(AGES) + 1))

    def log_weight(self, age: Tensor) -> Tensor:
        """w of ages, in moments."""
        return self._w()[torch.bucketize(age, torch.tensor(AGES), right=True)]

    def _w(self) -> Tensor:
        return (STEP * self.weight).clamp(-LARGEST, LARGEST)

    def forward(self, earlier: Earlier) -> Had:
        there_TM = earlier.there
        with torch.autocast("cpu", enabled=False):
            total_TM = earlier.times @ self._w().exp()
        return Had(earlier.item, torch.where(there_TM, total_TM, 1.0).log(), there_TM)

    def before(self, batch: Batch) -> Had:
        """What came before each target of a batch, in their order."""
        return self(batch.before())

    def learn_alone(self, had: Earlier, score_BM: Tensor, others_B: Tensor, truth: Sequence[Tensor]) -> None:
        """Learn w where all else is fixed: the maximum of the likelihood of what came next, and of a wide prior.

        had: of B users.   score: (B, M) its logits.   others: (B,) log Σ exp of the logits of all other items.   truth: user (T,), item (T,) and logit (T,) of what came next.
        """
        user_T, item_T, score_T = truth
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            item, offset, there = self(had)
            had_B = (score_BM + offset).masked_fill(~there, HIDDEN).logsumexp(dim=1)
            own_TM = there[user_T] & (item[user_T] == item_T[:, None])
            gained_T = torch.where(own_TM, offset[user_T], 0.0).sum(dim=1)
            value = (torch.logaddexp(others_B, had_B)[user_T] - score_T - gained_T).mean()
            value = value + PRIOR * (STEP * self.weight).square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def of(self, histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each user had, each item once: owner (n,) ascending, item (n,), and its offset (n,) float32."""
        histories = histories.last(REMEMBERED)
        owner, moment = histories.owner, histories_moments(histories)
        now = np.zeros(len(histories), np.int64)
        np.maximum.at(now, owner, moment + 1)
        weight = self.log_weight(torch.from_numpy(now[owner] - moment)).double().exp().numpy()
        many = int(histories.item.max(initial=0)) + 1
        pair, which = np.unique(owner * many + histories.item, return_inverse=True)
        total = np.bincount(which, weight, minlength=len(pair))
        return pair // many, pair % many, np.log(total).astype(np.float32)


def padded(owner: np.ndarray, users: int, value: np.ndarray, fill: float) -> np.ndarray:
    """Values (n,) of ascending owners (n,) as rows (users, M), filled up."""
    counts = np.bincount(owner, minlength=users)
    rows = np.full((users, int(counts.max(initial=0))), fill, value.dtype)
    rows[owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)] = value
    return rows


# -- code by code ------------------------------------------------------------------------------------------


class Returns(NamedTuple):
    """What was had, in codes. codes: (…, M, S) int64.   gain: (…, M, S), (K − 1) / n of the n items below the first
    1 … S codes; 0 where there is nothing."""

    codes: Tensor
    gain: Tensor

    @classmethod
    def before(cls, had: Had, codes_NS: Tensor, shares_NS: Tensor) -> Returns:
        """Of the targets of a batch."""
        gain = torch.where(had.there, had.offset.expm1(), 0.0)
        return cls(codes_NS[had.item], gain[..., None] * shares_NS[had.item])

    @classmethod
    def of(cls, repetition: Repetition, histories: Histories, codes_NS: Tensor, trie: Trie) -> Returns:
        """Of users (B,), as a decoder of W beams reads it: (B, 1, M, S)."""
        owner, item, offset = repetition.of(histories)
        codes_nS = codes_NS[item]
        gain_nS = torch.from_numpy(np.expm1(offset))[:, None] * shares(trie, codes_nS.numpy())
        at = torch.from_numpy(
            padded(owner, len(histories), np.arange(len(item)), MISSING)
        )  # the last: nothing
        codes, gain = (F.pad(rows, (0, 0, 0, 1))[at][:, None] for rows in (codes_nS, gain_nS))
        return cls(codes, gain)

    def log_factor(self, before: Tensor, size: int) -> Tensor:
        """(…, V) what it adds to the logits of the code after `before` (…, s)."""
        s = before.shape[-1]
        below = (self.codes[..., :s] == before[..., None, :]).all(dim=-1)
        gain = torch.where(below, self.gain[..., s], 0.0)
        total = gain.new_zeros(*gain.shape[:-1], size)
        total = total.scatter_add(-1, self.codes[..., s].expand(gain.shape), gain)
        return total.clamp(min=LEAST - 1).log1p()


def shares(trie: Trie, codes: np.ndarray) -> Tensor:
    """(N, S) of items with codes (N, S): one over how many items lie below their first 1 … S codes; 0 for none."""
    made = np.zeros(codes.shape, np.float32)
    there = trie.find(codes) >= 0  # a removed item is below no prefix, though others may be
    for s in range(codes.shape[1]):
        made[there, s] = 1 / trie.count(trie.find(codes[there, : s + 1]), s + 1)
    return torch.from_numpy(made)
