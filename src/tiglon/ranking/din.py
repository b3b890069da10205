"""DIN: a candidate decides how much each behaviour counts, and the counts need not sum to one.

Paper: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
https://arxiv.org/abs/1706.06978

Idea: v_U(A) = Σ_j a(e_j, v_A) e_j, a sum whose weights come from a small network, so that interest depends on
the candidate. Without a softmax, two behaviours that fit are twice the evidence of one.
Covers: the local activation unit (§4.3, eq. 3), Dice (§5.2, eq. 9), mini-batch-aware L2 (§5.1, eq. 4–7).

Deviations
- The network reads [e, v, e − v, e ⊙ v], as the released code does; the paper's figure draws e, v and an
  outer product.
- A behaviour has cross features, a candidate has none: e = [e_h | e_c] enters the network and the sum whole,
  difference and product are of the inherent parts.
- An entry that stands for n behaviours counts n times in the sum, once in Dice's statistics.
- The L2 covers the tables of inherent features, the only large ones.

Cost: B·L·K·(F + F') floats an activation for hidden widths F, F' (80, 40); Dice keeps a few of them for its
gradient: at B = 8, K = 10, L = 4,000 0.9 GB and 3 s of one core a training step, 0.4 GB and 0.8 s to read.
Nothing of width 4E is ever made: the first layer of a concatenation is a sum of layers, and that of e ⊙ v is
e times a matrix of the candidate's own.

Letters: B requests, K candidates, L behaviours, H width of an item, E width of a behaviour (H + cross),
F hidden width, N items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class Dice(nn.Module):
    """f(s) = p s + (1 − p) α s with p = σ((s − E[s]) / √(Var[s] + ε)), each of F channels apart (eq. 9).

    Trained with the mean and variance of the batch's real rows, read with their running means.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, momentum: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps  # ε: paper 1e-8
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, s: Tensor, real: Tensor) -> Tensor:
        """s: (…, F).   real: bool, broadcasts to (…); what is False there is left out of the statistics."""
        s = s.float()
        mean, variance = self._moments(s, real) if self.training else (self.mean, self.variance)
        scale = (variance + self.eps).rsqrt()
        p = torch.sigmoid(torch.addcmul(-mean * scale, s, scale))
        return s * torch.addcmul(self.alpha, 1 - self.alpha, p)

    def _moments(self, s: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (F,) over the real rows, which also move the running ones."""
        weight_R, s_RF = real.expand(s.shape[:-1]).flatten().float(), s.flatten(0, -2)
        n = weight_R.count_nonzero()
        if n == 0:
            return self.mean, self.variance
        with torch.autocast(s.device.type, enabled=False):
            mean = weight_R @ s_RF / n
            variance = weight_R @ (s_RF - mean).square() / n
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.variance.lerp_(variance, self.momentum)
        return mean, variance


class ActivationUnit(nn.Module):
    """a(e, v) = MLP([e, v, e_h − v, e_h ⊙ v]): the local activation unit (§4.3)."""

    def __init__(self, behaviour_width: int, item_width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.widths = [behaviour_width, item_width, item_width, item_width]
        self.first = nn.Linear(sum(self.widths), hidden[0])
        self.rest = nn.ModuleList(
            nn.Linear(width, following) for width, following in zip(hidden, [*hidden[1:], 1], strict=True)
        )
        self.dice = nn.ModuleList(Dice(width) for width in hidden)

    def forward(self, behaviour_BLE: Tensor, target_BKH: Tensor, mask_BL: Tensor) -> Tensor:
        """Weights (B, L, K), any sign and size; meaningless on padding."""
        x_BLKF, real_BL1 = self.first_layer(behaviour_BLE, target_BKH), mask_BL[..., None]
        for dice, linear in zip(self.dice, self.rest, strict=True):
            x_BLKF = linear(dice(x_BLKF, real_BL1))
        return x_BLKF.squeeze(-1)

    def first_layer(self, behaviour_BLE: Tensor, target_BKH: Tensor) -> Tensor:
        """`first` of the concatenation, (B, L, K, F), without making the concatenation."""
        of_e, of_v, of_difference, of_product = self.first.weight.split(self.widths, dim=1)
        K, H = target_BKH.shape[1:]
        inherent_BLH = behaviour_BLE[..., :H]
        from_e_BLF = behaviour_BLE @ of_e.T + inherent_BLH @ of_difference.T + self.first.bias
        from_v_BKF = target_BKH @ (of_v - of_difference).T
        product_BKFH = target_BKH[:, :, None] * of_product  # (e ⊙ v) Wᵀ = e (v ⊙ W)ᵀ
        x_BLKF = (inherent_BLH @ product_BKFH.flatten(1, 2).mT).unflatten(-1, (K, -1))
        return x_BLKF + from_e_BLF[:, :, None] + from_v_BKF[:, None]


class DIN(nn.Module):
    """Σ_j a(e_j, v) e_j over all behaviours; zeros for an empty history (eq. 3).

    l2: λ of the mini-batch-aware L2, returned as `Interest.loss` in training; 0 leaves it out (paper: 0.01).
    item_count: (N + 1,) how often each item, the unknown one last, occurs in the training samples: n_j.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        hidden: tuple[int, ...] = (80, 40),
        l2: float = 0.0,
        item_count: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"hidden={hidden}", rule="There is at least one hidden layer, at least 1 wide")
        if l2 < 0:
            raise ConfigError(f"l2={l2}", rule="l2 is 0 or above")
        if l2 and item_count is None:
            raise ConfigError(
                f"l2={l2} without item_count",
                rule="The mini-batch-aware L2 divides by how often a row occurs",
                fix="Pass how often each item occurs in the training samples, or l2=0",
            )
        self.width = embed.inherent_width + embed.cross_count * embed.cross_width  # E
        self.activation = ActivationUnit(self.width, embed.inherent_width, hidden)
        self.l2 = l2
        self.counts = [] if item_count is None else code_counts(embed, item_count)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        behaviour_BLE = torch.cat([embed.inherent(past.item), embed.cross(past.cross).flatten(-2)], dim=-1)
        weight_BLK = self.activation(behaviour_BLE, embed.inherent(item_BK), past.mask)
        weight_BLK = weight_BLK.masked_fill(~past.mask[..., None], 0.0)
        if past.size is not None:
            weight_BLK = weight_BLK * past.size[..., None]
        vector_BKE = weight_BLK.mT @ behaviour_BLE
        loss = None
        if self.l2 and self.training:
            used = torch.cat([item_BK.flatten(), past.item[past.mask]])
            loss = self.l2 * mini_batch_aware_l2(embed, used, self.counts)
        return Interest(vector_BKE, loss)


def mini_batch_aware_l2(embed: FeatureEmbedding, item: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """Σ_j ‖w_j‖² / n_j over the rows j that these items use, each once, in all inherent tables (eq. 6).

    item: any shape, the items of one batch.   counts: of `code_counts`. Summed over the batches of an epoch,
    a row is regularised about once for all its occurrences, and a row that is absent is not touched.
    """
    codes = embed.item_codes[item.flatten()]
    total = embed.item_codes.new_zeros((), dtype=torch.float32)
    for f, (table, count) in enumerate(zip(embed.items, counts, strict=True)):
        row = codes[:, f].unique()
        total = total + (table(row).square().sum(dim=-1) / count[row].clamp(min=1)).sum()
    return total


def code_counts(embed: FeatureEmbedding, item_count: Tensor) -> list[Tensor]:
    """n_j: how often each code of each inherent feature occurs, from how often each item does, (N + 1,)."""
    if item_count.shape != (len(embed.item_codes),):
        raise DataError(
            f"item_count of shape {tuple(item_count.shape)}",
            rule=f"It counts each of {len(embed.item_codes)} items, the unknown one last",
        )
    return [
        torch.zeros(table.num_embeddings).index_add_(0, embed.item_codes[:, f], item_count.float())
        for f, table in enumerate(embed.items)
    ]
