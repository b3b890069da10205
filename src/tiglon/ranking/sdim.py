"""SDIM: attention by hash collisions, with a table a user that candidates only look up.

Cao et al., "Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", CIKM 2022,
https://arxiv.org/abs/2205.10249

Idea. m random hyperplanes in groups of τ give m/τ signatures of τ bits. A behaviour whose signature equals the
candidate's, which happens with probability (1 − θ/π)^τ, is counted. So the sum over each signature's bucket is
an attention without a product, and the sums know nothing of the candidate: a table (m/τ, 2^τ, D) a user holds
them all.

Covered: the sampling-based attention (eqs. 6–9: signatures, bucket sums, ℓ2 norm, the mean over signatures),
the behaviour sequence encoding (BSE) table and its look-up (§4.4).

Deviations. Signatures are those of an item's inherent features, the part that candidate and behaviour share;
the sums are over all features.

Cost: the table L·D·m/τ sums, once a user; a candidate H·m products and m/τ look-ups, whatever L is.

Letters: B requests, K candidates, L behaviours, m hashes, G = m/τ signatures, S = 2^τ values of one, H width
of an item, D width of the interest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours

_AT_ONCE = 4096  # behaviours summed at once: a bound on memory


class Sdim(nn.Module):
    """`table` once a user, `read` for each candidate.

    hashes: m, in signatures of `group` = τ. `hyperplanes` are never trained and saved with the model.
    """

    def __init__(self, embed: FeatureEmbedding, *, hashes: int = 48, group: int = 3) -> None:
        super().__init__()
        if group < 1 or hashes < group or hashes % group:
            raise ConfigError(
                f"hashes={hashes}, group={group}",
                rule="hashes is a multiple of group, and both are at least 1",
                fix="The paper has 48 and 3",
            )
        self.group = group
        self.width = embed.inherent_width + embed.cross_count * embed.cross_width
        self.hyperplanes: Tensor
        self.register_buffer("hyperplanes", torch.randn(hashes, embed.inherent_width))

    def signatures(self, inherent: Tensor) -> Tensor:
        """(…, H) → (…, G) int64 in 0 … 2^τ − 1."""
        return signatures(inherent, self.hyperplanes, self.group)

    def table(self, embed: FeatureEmbedding, past: Behaviours) -> Tensor:
        """(B, G, S, D): what a server stores of a user. Those of two parts of a life add up to that of the whole."""
        inherent, cross = embed.behaviours(past)
        value_BLD = torch.cat([inherent, cross.flatten(-2)], dim=-1)
        weight_BL = past.mask.float() if past.size is None else past.size.masked_fill(~past.mask, 0.0)
        return bucket_table(self.signatures(inherent), value_BLD * weight_BL[..., None], 2**self.group)

    def read(self, embed: FeatureEmbedding, item_BK: Tensor, table_BGSD: Tensor) -> Tensor:
        """(B, K, D): the mean over signatures of the candidate's buckets, each of length 1, or 0 if empty."""
        signature_BKG = self.signatures(embed.inherent(item_BK))
        return look_up(F.normalize(table_BGSD, dim=-1), signature_BKG).mean(dim=2)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        return Interest(self.read(embed, item_BK, self.table(embed, past)))


def signatures(vectors: Tensor, hyperplanes_mH: Tensor, group: int) -> Tensor:
    """(…, H) → (…, m/τ) int64: the signs of τ products as a number.

    In float64, so that a product near 0 has the same sign in every batch.
    """
    bit = vectors.detach().double() @ hyperplanes_mH.double().T > 0
    return (bit.unflatten(-1, (-1, group)) << torch.arange(group)).sum(dim=-1)


def bucket_table(signature_BLG: Tensor, value_BLD: Tensor, size: int) -> Tensor:
    """(B, G, S, D): the sum of the values that share a signature, for each of its S = `size` values."""
    B, _, G = signature_BLG.shape
    table = value_BLD.new_zeros(B, G, size, value_BLD.shape[-1])
    for signature, value in zip(
        signature_BLG.split(_AT_ONCE, dim=1), value_BLD.split(_AT_ONCE, dim=1), strict=True
    ):
        member_BLGS = (signature[..., None] == torch.arange(size)).to(value.dtype)
        table = table + torch.einsum("blgs,bld->bgsd", member_BLGS, value)
    return table


def look_up(table_BGSD: Tensor, signature_BKG: Tensor) -> Tensor:
    """(B, K, G, D): each candidate's bucket of each signature."""
    B, G = table_BGSD.shape[:2]
    return table_BGSD[torch.arange(B)[:, None, None], torch.arange(G), signature_BKG]
