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

Cost: B·L·K·(F + F') floats twice in training, for hidden widths F, F' (80, 40), what Dice reads and what it gives:
at B = 8, K = 10, L = 4,000 0.8 GB and 0.6 s of one core a training step; 0.06 GB and 0.24 s to read, where nothing is kept.
Nothing of width 4E is ever made: the first layer of a concatenation is e times a matrix of the candidate's own,
plus a vector.

Letters: B requests, K candidates, L behaviours, H width of an item, E width of a behaviour (H + cross),
F hidden width, N items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.dice import Dice
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import MISSING, Behaviours

_CELLS = 1 << 19  # numbers between two layers that are held where nothing is kept: 2 MiB, a core's caches


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

    def forward(
        self, behaviour_BLE: Tensor, target_BKH: Tensor, mask_BL: Tensor, known_BK: Tensor | None = None
    ) -> Tensor:
        """Weights (B, L, K), any sign and size; meaningless on padding.

        known_BK: what is False there is left out of Dice's statistics, as padding is.
        """
        matrix_BEM, vector_B1M = self.of_candidates(target_BKH)
        if self.training or torch.is_grad_enabled():
            real = mask_BL[..., None] if known_BK is None else mask_BL[..., None] & known_BK[:, None]
            return self.rest_of(torch.baddbmm(vector_B1M, behaviour_BLE, matrix_BEM), real)
        # Nothing is kept: some behaviours of one request at a time.
        some = max(1, _CELLS // max(1, matrix_BEM.shape[2]))
        weight_BLK = behaviour_BLE.new_empty(*mask_BL.shape, target_BKH.shape[1])
        for e_LE, mask_L, matrix, vector, weight_LK in zip(
            behaviour_BLE, mask_BL, matrix_BEM, vector_B1M, weight_BLK, strict=True
        ):
            parts = zip(e_LE.split(some), mask_L.split(some), weight_LK.split(some), strict=True)
            for e, mask, weight in parts:
                weight[:] = self.rest_of(torch.addmm(vector, e, matrix), mask[..., None])
        return weight_BLK

    def of_candidates(self, target_BKH: Tensor) -> tuple[Tensor, Tensor]:
        """What `first` of the concatenation is for each candidate: e times a matrix, (B, E, K·F), plus a vector,
        (B, 1, K·F): e Wₑᵀ + (e_h − v) W₋ᵀ + (e_h ⊙ v) W×ᵀ + v Wᵥᵀ, without making the concatenation."""
        of_e, of_v, of_difference, of_product = self.first.weight.split(self.widths, dim=1)
        B, K, H = target_BKH.shape
        of_h, of_c = of_e.split([H, of_e.shape[1] - H], dim=1)
        for_h_BKFH = target_BKH[:, :, None] * of_product + (of_h + of_difference)
        for_e_BKFE = torch.cat([for_h_BKFH, of_c.expand(B, K, -1, -1)], dim=-1)
        vector_BKF = target_BKH @ (of_v - of_difference).T + self.first.bias
        return for_e_BKFE.flatten(1, 2).mT, vector_BKF.flatten(1)[:, None]

    def rest_of(self, x_M: Tensor, real: Tensor) -> Tensor:
        """(…, K·F), what counts, (…, 1 or K) → what the layers after the first make of it, (…, K)."""
        x = x_M.unflatten(-1, (-1, self.first.out_features))
        for dice, linear in zip(self.dice, self.rest, strict=True):
            x = linear(dice(x, real))
        return x.squeeze(-1)


class DIN(nn.Module):
    """Σ_j a(e_j, v) e_j over all behaviours; zeros for an empty history (eq. 3).

    l2: λ of the mini-batch-aware L2, returned as `Interest.loss` in training; 0 leaves it out (paper: 0.01).
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        hidden: tuple[int, ...] = (80, 40),
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"hidden={hidden}", rule="There is at least one hidden layer, at least 1 wide")
        if l2 < 0:
            raise ConfigError(f"l2={l2}", rule="l2 is 0 or above")
        self.width = embed.inherent_width + embed.cross_count * embed.cross_width  # E
        self.activation = ActivationUnit(self.width, embed.inherent_width, hidden)
        self.l2 = l2
        self.counts: list[Tensor] = []

    def count(self, embed: FeatureEmbedding, item_count: Tensor) -> None:
        """What l2 needs before training: (N + 1,) how often each item, the unknown one last, occurs in the samples: n_j."""
        self.counts = code_counts(embed, item_count)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        behaviour_BLE = torch.cat([embed.inherent(past.item), embed.cross(past.cross).flatten(-2)], dim=-1)
        known_BK = item_BK != MISSING  # no candidate at all, or one that nobody knows
        weight_BLK = self.activation(behaviour_BLE, embed.inherent(item_BK), past.mask, known_BK)
        weight_BLK = weight_BLK.masked_fill(~past.mask[..., None], 0.0)
        if past.size is not None:
            weight_BLK = weight_BLK * past.size[..., None]
        vector_BKE = weight_BLK.mT @ behaviour_BLE
        loss = None
        if self.l2 and self.training:
            if not self.counts:
                raise ConfigError(
                    f"l2={self.l2} without counts",
                    rule="The mini-batch-aware L2 divides by how often a row occurs",
                    fix="Call count(embed, how often each item occurs in the training samples), or set l2=0",
                )
            used = torch.cat([item_BK[known_BK], past.item[past.mask]])
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
