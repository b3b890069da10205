"""The controls that every lifelong ranker stands beside: pooling without a target, and plain target attention.

`MeanPooling` is that of YouTubeDNN (Covington et al., RecSys 2016, https://doi.org/10.1145/2959100.2959190):
one vector a user, whatever the candidate. `FullAttention` is what two-stage rankers approximate: over all L,
nothing searched. `MostRecent` and `ChunkPooling` are the two cheap ways to make L short: drop the old, or
average neighbours in time. All three attend as TWIN does (`nn/target_attention.py`), so that a comparison
with TWIN compares what is attended to, not how.

Letters: B requests, K candidates, L behaviours, k kept ones, M chunks, A heads, H width of an item,
J cross features, C width of a cross feature, D width of an interest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.search import require_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class MeanPooling(nn.Module):
    """The mean of all behaviours' features; zeros for an empty history. Cost: L·(H + JC) a user."""

    def __init__(self, embed: FeatureEmbedding) -> None:
        super().__init__()
        self.width = embed.inherent_width + embed.cross_count * embed.cross_width

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        weight_BL = _size(past)
        weight_BL = weight_BL / weight_BL.sum(dim=1, keepdim=True).clamp(min=1)
        inherent, cross = embed.behaviours(past)
        mean_BD = torch.einsum("bl,bld->bd", weight_BL, torch.cat([inherent, cross.flatten(-2)], dim=-1))
        return Interest(mean_BD[:, None].expand(-1, item_BK.shape[1], -1))


class FullAttention(nn.Module):
    """Target attention over every behaviour, all projections live: exact, and linear in L with a large constant."""

    def __init__(
        self, embed: FeatureEmbedding, *, heads: int = 4, head_width: int = 16, width: int = 64
    ) -> None:
        super().__init__()
        self.width = width
        self.attention = TargetAttention(
            embed.inherent_width,
            embed.cross_count,
            embed.cross_width,
            heads=heads,
            head_width=head_width,
            width=width,
            item_std=embed.std,
        )

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        vector, weight_BKL = _attend(self.attention, embed.inherent(item_BK), past, *embed.behaviours(past))
        at_BL = torch.arange(past.mask.shape[1]).masked_fill(~past.mask, -1)
        return Interest(vector, chosen=at_BL[:, None], weight=weight_BKL)


class MostRecent(FullAttention):
    """Target attention over the most recent k: what a ranker sees whose history is cut short."""

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        k: int = 100,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__(embed, heads=heads, head_width=head_width, width=width)
        self.k = require_k(k)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        k = min(self.k, past.mask.shape[1])
        newest_Bk = (past.lengths[:, None] - 1 - torch.arange(k)).clamp(min=-1)
        found = super().forward(embed, item_BK, past.take(newest_Bk) if k else past)
        return found._replace(chosen=newest_Bk[:, None])


class ChunkPooling(nn.Module):
    """Each `chunk` consecutive behaviours become their mean; target attention over the means.

    Chunks are counted from the oldest behaviour, so that a new one changes the last chunk alone. A mean counts
    as its n behaviours (ln n), which matters for the last chunk: with chunk=1 this is `FullAttention`.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        chunk: int = 20,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ConfigError(f"chunk={chunk}", rule="A chunk holds at least one behaviour")
        self.chunk, self.width = chunk, width
        self.attention = TargetAttention(
            embed.inherent_width,
            embed.cross_count,
            embed.cross_width,
            heads=heads,
            head_width=head_width,
            width=width,
            item_std=embed.std,
        )

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        inherent, cross = embed.behaviours(past)
        missing = -past.mask.shape[1] % self.chunk
        weight_BMc = F.pad(_size(past), (0, missing)).unflatten(1, (-1, self.chunk))
        size_BM = weight_BMc.sum(dim=2)
        share_BMc = weight_BMc / size_BM.clamp(min=1)[..., None]

        def means(x_BLD: Tensor) -> Tensor:
            x_BMcD = F.pad(x_BLD, (0, 0, 0, missing)).unflatten(1, (-1, self.chunk))
            return torch.einsum("bmc,bmcd->bmd", share_BMc, x_BMcD)

        chunks = past._replace(mask=size_BM > 0, size=size_BM)
        inherent, cross = means(inherent), means(cross.flatten(-2)).unflatten(-1, cross.shape[-2:])
        return Interest(_attend(self.attention, embed.inherent(item_BK), chunks, inherent, cross)[0])


def _size(past: Behaviours) -> Tensor:
    """(B, L) how many behaviours each entry stands for, 0 on padding."""
    return past.mask.float() if past.size is None else past.size.masked_fill(~past.mask, 0.0)


def _attend(
    attention: TargetAttention, item_BKH: Tensor, past: Behaviours, inherent_BLH: Tensor, cross_BLJC: Tensor
) -> tuple[Tensor, Tensor]:
    """The interest (B, K, D) and the weights (B, K, L), the mean over heads."""
    alpha = attention.logits(item_BKH, past, inherent_BLH, cross_BLJC)
    vector, weight_BKAL = attention.mix(alpha, inherent_BLH, cross_BLJC)
    return vector, weight_BKAL.mean(dim=2)
