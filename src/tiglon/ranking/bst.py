"""BST: a transformer block over the last behaviours and the candidate, each knowing how long ago it was.

Paper: Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", DLP-KDD 2019,
https://arxiv.org/abs/1905.06874

Idea: the candidate is a member of the sequence, so that every behaviour is seen in its light and it in
theirs; a position is not an index but the time between the behaviour and the candidate.
Covers: §2.1 (embedding, positional feature pos(v_i) = t(v_t) − t(v_i)), §2.2 (eq. 2–6, one block).

Deviations
- [inherent | cross | position] is projected to `width`, so that the heads divide it.
- Times are bucketed by doubling: the paper does not say how. The candidate has bucket 0 and zeros for the
  cross features that it does not have.
- The block's output is flattened, newest first, and projected to `width`; the shell's MLP reads that, in
  place of the paper's 1024-512-256.
- An entry that stands for n behaviours is one position.

Cost: B·K sequences of 21, whatever the history's length.

Letters: B requests, K candidates, S positions (candidate + recent behaviours), D width, A heads, d width of
a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


def time_bucket(gap: Tensor, buckets: int) -> Tensor:
    """1 … buckets − 1, int64: one more for each doubling of `gap`, which is above 0; 0 is the candidate's."""
    return (1 + torch.log2(1 + gap.float()).floor().long()).clamp(1, buckets - 1)


class Block(nn.Module):
    """Self-attention and a feed-forward network, each S ← LayerNorm(S + Dropout(…)) (eq. 4–6)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(), nn.Linear(hidden, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """(B, S, D); every position reads every one where mask is True."""
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, S, d)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BS[:, None, None])
        x_BSD = self.norms[0](x_BSD + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.norms[1](x_BSD + self.dropout(self.feed(x_BSD)))


class BST(nn.Module):
    """One block over the candidate and the `recent` newest behaviours."""

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        recent: int = 20,
        width: int = 64,
        heads: int = 8,
        hidden: int = 256,
        dropout: float = 0.2,
        buckets: int = 48,
        position_width: int = 8,
    ) -> None:
        """recent, heads, dropout: the paper's. buckets: 2^46 units of time; a week of milliseconds is 2^29."""
        super().__init__()
        if width % heads:
            raise ConfigError(f"width={width}, heads={heads}", rule="The heads divide the width")
        if recent < 1 or buckets < 2:
            raise ConfigError(f"recent={recent}, buckets={buckets}", rule="recent ≥ 1, buckets ≥ 2")
        self.width, self.recent, self.buckets = width, recent, buckets
        self.position = nn.Embedding(buckets, position_width)
        nn.init.normal_(self.position.weight, std=0.05)
        self.enter = nn.Linear(
            embed.inherent_width + embed.cross_count * embed.cross_width + position_width, width
        )
        self.block = Block(width, heads, hidden, dropout)
        self.leave = nn.Linear((1 + recent) * width, width)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        x, mask = self.sequence(embed, item_BK, past)
        x = self.block(x, mask).masked_fill(~mask[..., None], 0.0)
        return Interest(self.leave(x.flatten(1)).unflatten(0, item_BK.shape))

    def sequence(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> tuple[Tensor, Tensor]:
        """(B·K, S, D) and which positions are real, (B·K, S): the candidate, then behaviours, newest first."""
        (B, K), J, C = item_BK.shape, embed.cross_count, embed.cross_width
        past = self._newest(past)
        behaviour = self._enter(
            embed.inherent(past.item), embed.cross(past.cross), time_bucket(past.gap, self.buckets)
        )
        candidate = self._enter(
            embed.inherent(item_BK), torch.zeros(B, K, J, C), torch.zeros(B, K, dtype=torch.long)
        )
        x = torch.cat([candidate[:, :, None], behaviour[:, None].expand(-1, K, -1, -1)], dim=2)
        mask = F.pad(past.mask, (1, 0), value=True)[:, None].expand(-1, K, -1)
        return x.flatten(0, 1), mask.flatten(0, 1)

    def _newest(self, past: Behaviours) -> Behaviours:
        """Exactly `recent` entries, newest first, so that a place in the flattened output means the same for all."""
        if past.mask.shape[1] == 0:  # nobody has a past: one entry of padding to point at
            B, J = len(past.item), past.cross.shape[-1]
            past = Behaviours(
                torch.zeros(B, 1, dtype=torch.long),
                torch.zeros(B, 1, J, dtype=torch.long),
                torch.ones(B, 1),
                torch.zeros(B, 1, dtype=torch.bool),
            )
        index = past.lengths[:, None] - 1 - torch.arange(self.recent)
        return past.take(index.clamp(min=-1))

    def _enter(self, inherent: Tensor, cross: Tensor, bucket: Tensor) -> Tensor:
        return self.enter(torch.cat([inherent, cross.flatten(-2), self.position(bucket)], dim=-1))
