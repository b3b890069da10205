"""The controls that every lifelong ranker stands beside: pooling without a target, and attention over all.

Mean pooling is that of YouTubeDNN (Covington et al., RecSys 2016, https://doi.org/10.1145/2959100.2959190):
one vector a user, whatever the candidate. `FullAttention` is what two-stage rankers approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class MeanPooling(nn.Module):
    """The mean of all behaviours' features; zeros for an empty history."""

    def __init__(self, embed: FeatureEmbedding) -> None:
        super().__init__()
        self.width = embed.inherent_width + embed.cross_count * embed.cross_width

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        weight_BL = past.mask.float() if past.size is None else past.mask * past.size
        weight_BL = weight_BL / weight_BL.sum(dim=1, keepdim=True).clamp(min=1)
        inherent = (weight_BL[..., None] * embed.inherent(past.item)).sum(dim=1)
        cross = (weight_BL[..., None, None] * embed.cross(past.cross)).sum(dim=1).flatten(1)
        mean_BD = torch.cat([inherent, cross], dim=-1)
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
        )

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        attention = self.attention
        inherent, cross = embed.inherent(past.item), embed.cross(past.cross)
        query = attention.queries(embed.inherent(item_BK))
        alpha = attention.score(query, attention.keys(inherent), attention.bias(cross), past.mask, past.size)
        vector, _ = attention.mix(alpha, inherent, cross)
        return Interest(vector)
