"""How often an item comes by in a stream, without counting: the gap between two of its appearances.

Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
https://doi.org/10.1145/3298689.3346996, §4.1, algorithms 2 and 3.

Idea. Remember when each item came last (A) and a moving mean of its gaps (B): B ← (1 − α)·B + α·(t − A), A ← t.
Its probability is 1/B. Items are hashed into buckets; two in one bucket make its gaps shorter, so of several
hashes the one with the longest gap is right.

Deviations:
- time counts examples rather than batches, so that an item may come several times in a batch and 1/B is the
  probability of one draw; one that a batch of n holds n/B times on average;
- B begins with the time of the first appearance, whose mean is the gap, rather than with a given value;
- an item that never came is taken to come next.

Letters: H hashes, M buckets, E examples.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from tiglon.errors import ConfigError


class FrequencyEstimator(nn.Module):
    """rate: α, in 0 … 1; the mean forgets with a time constant of 1/α appearances.   floor: no probability
    is below it, so that a rare item's correction stays bounded.

    A module for its buffers alone: they travel with the weights, into checkpoints and files.
    """

    def __init__(
        self,
        buckets: int = 1 << 16,
        hashes: int = 2,
        *,
        rate: float = 0.05,
        floor: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if buckets < 1 or hashes < 1 or not 0 < rate <= 1 or not 0 < floor <= 1:
            raise ConfigError(
                f"buckets={buckets}, hashes={hashes}, rate={rate}, floor={floor}",
                rule="There is at least one bucket and one hash; rate and floor lie above 0 and up to 1",
            )
        self.rate, self.floor, self.buckets = rate, floor, buckets
        random = np.random.default_rng(seed)
        self.multipliers = random.integers(0, 2**64, hashes, np.uint64) | np.uint64(1)
        self.last: Tensor
        self.gap: Tensor
        self.now: Tensor
        self.register_buffer("last", torch.zeros(hashes, buckets, dtype=torch.int64))
        self.register_buffer("gap", torch.zeros(hashes, buckets))  # 0: nothing came here yet
        self.register_buffer("now", torch.zeros(1, dtype=torch.int64))

    def update(self, items: Tensor) -> None:
        """Examples (E,) of dense items went by, in this order."""
        bucket = self._bucket(items)
        _follow(self.last.numpy(), self.gap.numpy(), self.now.numpy(), bucket, self.rate)

    def probability(self, items: Tensor) -> Tensor:
        """(…,) float32: with which probability one example is each of these items; at least `floor`."""
        gap = self.gap[torch.arange(len(self.gap))[:, None], torch.from_numpy(self._bucket(items.flatten()))]
        gap = torch.where(gap > 0, gap, self.now + 1.0)
        return (1 / gap.amax(dim=0)).clamp(self.floor, 1).view(items.shape)

    def _bucket(self, items: Tensor) -> np.ndarray:
        """(H, E) int64, by multiplicative hashing."""
        mixed = (items.numpy().astype(np.uint64) + np.uint64(1)) * self.multipliers[:, None]
        return ((mixed >> np.uint64(32)) % np.uint64(self.buckets)).astype(np.int64)


@njit(cache=True)
def _follow(last: np.ndarray, gap: np.ndarray, now: np.ndarray, bucket: np.ndarray, rate: float) -> None:
    for e in range(bucket.shape[1]):
        now[0] += 1
        for h in range(bucket.shape[0]):
            at = bucket[h, e]
            since = now[0] - last[h, at]
            gap[h, at] = since if gap[h, at] == 0 else (1 - rate) * gap[h, at] + rate * since
            last[h, at] = now[0]
