"""ETA: search by fingerprints of a few bits, so that the search is end-to-end with the embeddings.

Chen et al., "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model", 2021,
https://arxiv.org/abs/2108.04468

Idea. A fixed random matrix H turns an embedding into the signs of H e; the number of differing bits grows with
the angle. Behaviours whose fingerprints differ least from the candidate's are attended to. One embedding table
serves search and attention, so the search is never older than the model.

Covered: SimHash (§4.2.1), Hamming distance by XOR and popcount, top-k and multi-head target attention
(§4.2.2), fingerprints stored beside the embeddings (§4.3).

Deviations. Fingerprints are those of an item's inherent features, the part that candidate and behaviour share.
Ties, which most rows have at the k-th place, are broken newest first. Attention is `TargetAttention`, that of
all two-stage units here. 64 bits, a machine word (the public code has 32), and k = 100 (it has 50).

Cost a request: L·⌈m/64⌉ words looked up, K·L·⌈m/64⌉ XORs and popcounts, attention over K·k behaviours. Without
stored fingerprints also L·H·m products.

Letters: B requests, K candidates, L behaviours, k chosen ones, N items, m bits, W words of 64 bits, H width of
an item.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.search import attend, require_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.item_cache import catalogue_version
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours

_MOST_BITS = 2**16 - 2  # a distance, m + 1 included, is 16 bits


class Fingerprints(NamedTuple):
    """bits: (N + 1, W), the unknown item last.   catalogue: `catalogue_version` of the items."""

    bits: Tensor
    catalogue: str


class Eta(nn.Module):
    """Attention over the k behaviours whose fingerprints are nearest to the candidate's.

    bits: m. `hyperplanes` is H: never trained, saved with the model.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        k: int = 100,
        bits: int = 64,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= _MOST_BITS:
            raise ConfigError(f"bits={bits}", rule=f"A fingerprint has 1 … {_MOST_BITS} bits")
        self.k, self.width = require_k(k), width
        self.hyperplanes: Tensor
        self.register_buffer("hyperplanes", torch.randn(bits, embed.inherent_width))
        self.attention = TargetAttention(
            embed.inherent_width,
            embed.cross_count,
            embed.cross_width,
            heads=heads,
            head_width=head_width,
            width=width,
            item_std=embed.std,
        )
        self.stored: Fingerprints | None = None

    @torch.no_grad()
    def refresh(self, embed: FeatureEmbedding) -> None:
        """Store every item's fingerprint, of today's weights; eval mode looks them up from now on."""
        bits = fingerprints(embed.catalogue(), self.hyperplanes)
        self.use(Fingerprints(bits, catalogue_version(embed)), embed)

    def use(self, stored: Fingerprints | None, embed: FeatureEmbedding) -> None:
        """Search by these, be they stale. Raises DataError where they are of other items."""
        if stored is not None and stored.catalogue != catalogue_version(embed):
            raise DataError(
                f"fingerprints of {len(stored.bits) - 1} items, catalogue {stored.catalogue[:12]}",
                rule="Fingerprints serve the catalogue that they were made for",
                fix="Make them anew: unit.refresh(embed)",
            )
        self.stored = stored

    @torch.no_grad()
    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, min(k, L)) positions, nearest first."""
        query_BKW = fingerprints(embed.inherent(item_BK), self.hyperplanes)
        if self.stored is not None and not self.training:
            key_BLW = self.stored.bits[past.item]
        else:
            key_BLW = fingerprints(embed.inherent(past.item), self.hyperplanes)
        return nearest(query_BKW, key_BLW, past.mask, len(self.hyperplanes), self.k)

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of the attention for every behaviour; −inf on padding."""
        return self.attention.logits(embed.inherent(item_BK), past, *embed.behaviours(past))

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        chosen = self.search(embed, item_BK, past)
        vector, weight = attend(self.attention, embed.inherent(item_BK), past, chosen, embed.behaviours)
        return Interest(vector, chosen=chosen, weight=weight)


def fingerprints(vectors: Tensor, hyperplanes_mH: Tensor) -> Tensor:
    """(…, H) → (…, W) int64: bit i of the m is 1 where row i of H gives a product above 0; unused bits are 0.

    In float64, so that a product near 0 has the same sign in every batch.
    """
    bit = vectors.detach().double() @ hyperplanes_mH.double().T > 0
    packed = np.packbits(bit.numpy(), axis=-1, bitorder="little")
    missing = -packed.shape[-1] % 8
    packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)])
    return torch.from_numpy(packed.view("<i8"))


def hamming(query_BKW: Tensor, key_BLW: Tensor, mask_BL: Tensor, bits: int) -> Tensor:
    """(B, K, L) int32: how many bits differ; m + 1 on padding, further than any behaviour."""
    B, K, _ = query_BKW.shape
    distance = np.empty((B, K, mask_BL.shape[1]), np.uint16)
    query, key, mask = (x.contiguous().numpy() for x in (query_BKW, key_BLW, mask_BL))
    for b in range(B):
        for q in range(K):
            _distances(query[b, q].view(np.uint64), key[b].view(np.uint64), mask[b], bits, distance[b, q])
    return torch.from_numpy(distance.astype(np.int32))


def nearest(query_BKW: Tensor, key_BLW: Tensor, mask_BL: Tensor, bits: int, k: int) -> Tensor:
    """(B, K, min(k, L)) positions of the smallest distances, nearest first and of equal ones newest first;
    −1 after the last."""
    query, key, mask = (x.contiguous().numpy() for x in (query_BKW, key_BLW, mask_BL))
    return torch.from_numpy(
        _nearest(query.view(np.uint64), key.view(np.uint64), mask, bits, min(k, mask.shape[1]))
    )


@njit(cache=True, nogil=True)
def _nearest(query: np.ndarray, key: np.ndarray, mask: np.ndarray, bits: int, k: int) -> np.ndarray:
    """A counting sort of the distances, of which only the first k places are written."""
    B, K, _ = query.shape
    L = mask.shape[1]
    found = np.full((B, K, k), -1, np.int64)
    distance = np.empty(L, np.uint16)
    for b in range(B):
        for q in range(K):
            _distances(query[b, q], key[b], mask[b], bits, distance)
            place = np.zeros(bits + 3, np.int64)  # place[d]: where the next behaviour of distance d goes
            for at in range(L):
                place[distance[at] + 1] += 1
            last = 0  # the distance of the k-th
            for d in range(bits + 1):
                place[d + 1] += place[d]
                if place[d] < k:
                    last = d
            for at in range(L - 1, -1, -1):
                d = distance[at]
                if d <= last:
                    if place[d] < k:
                        found[b, q, place[d]] = at
                    place[d] += 1
    return found


@njit(cache=True, nogil=True)
def _distances(query: np.ndarray, key: np.ndarray, mask: np.ndarray, bits: int, distance: np.ndarray) -> None:
    """Fill distance (L,) from words (W,) and (L, W)."""
    for at in range(len(mask)):
        differing = np.uint64(0)
        for w in range(len(query)):
            differing += _popcount(query[w] ^ key[at, w])
        distance[at] = differing if mask[at] else bits + 1


@njit(cache=True, nogil=True)
def _popcount(x: np.uint64) -> np.uint64:
    """Bits set, by sums of neighbours (Warren, Hacker's Delight, 5–1); compilers know it as one instruction."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
