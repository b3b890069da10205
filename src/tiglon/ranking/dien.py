"""DIEN: interests evolve; a recurrent network follows the one that the candidate asks for.

Paper: Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019,
https://arxiv.org/abs/1809.03672

Idea: a GRU turns behaviours e_t into interests h_t, each taught to tell the next behaviour from another one;
attention of the candidate scales the update gate of a second GRU, so that what does not concern the candidate
leaves its state alone.
Covers: interest extractor and auxiliary loss (eq. 1–7), attention (eq. 9), AUGRU (eq. 13–15).

Deviations
- Only the most recent `longest` behaviours are read (paper: 50 to 100): AUGRU is a loop over time.
- h_t is as wide as an item and the auxiliary loss multiplies it with the inherent part of e_{t+1}, so that
  eq. 6 needs no projection, and cross features, of which a negative has none, give nothing away.
- Negatives are drawn from the real behaviours of the batch; where the draw is the positive item itself, the
  pair is left out. The loss is a mean over pairs rather than over users.
- An entry that stands for n behaviours is one step.

Cost: `longest` steps of (B·K, H) × (H, 3H); at B = 8, K = 10, H = 64, 50 behaviours
take 15 ms of one core to read and 42 ms to train on.

Letters: B requests, K candidates, L behaviours, H width of an item and of all states, R real behaviours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


def auxiliary_loss(
    interest_BLH: Tensor, item_BLH: Tensor, negative_BLH: Tensor, counted_BL: Tensor
) -> Tensor:
    """−mean [log σ(h_t · e_{t+1}) + log(1 − σ(h_t · ê_{t+1}))], a scalar; 0 without a pair (eq. 6).

    item, negative: e and ê, of which entry 0 is never used.   counted: False leaves entry t + 1 out.
    """
    h, counted = interest_BLH[:, :-1], counted_BL[:, 1:]
    positive = F.logsigmoid((h * item_BLH[:, 1:]).sum(dim=-1))
    negative = F.logsigmoid(-(h * negative_BLH[:, 1:]).sum(dim=-1))
    loss = (positive + negative).masked_fill(~counted, 0.0).sum()
    return -loss / counted.sum().clamp(min=1)


def draw_negatives(item_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """For each behaviour the item of a random behaviour of the batch, (B, L); its own on padding."""
    real = mask_BL.flatten().nonzero().squeeze(1)
    draw = (torch.rand(len(real)) * len(real)).long().clamp(max=len(real) - 1)
    negative = item_BL.flatten().clone()
    negative[real] = item_BL.flatten()[real[draw]]
    return negative.view_as(item_BL)


class AUGRU(nn.Module):
    """A GRU whose update gate is scaled by attention: ũ = a·u, h ← (1 − ũ) ∘ h + ũ ∘ h̃ (eq. 13–15).

    a = 1 is the GRU, a = 0 leaves the state as it is. The weights are those of torch's GRUCell, whose gate z
    says how much to *keep*: u = 1 − z.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x_BLH: Tensor, attention_BKL: Tensor) -> Tensor:
        """The state after the last step, (B, K, H), from zeros."""
        cell, H = self.cell, x_BLH.shape[-1]
        x_BL1G = F.linear(x_BLH, cell.weight_ih, cell.bias_ih)[:, :, None]  # the same for all candidates
        state_BKH = x_BLH.new_zeros(*attention_BKL.shape[:2], H)
        for x_B1G, a_BK in zip(x_BL1G.unbind(1), attention_BKL.unbind(2), strict=True):
            s_BKG = F.linear(state_BKH, cell.weight_hh, cell.bias_hh)
            reset, keep = torch.sigmoid(x_B1G[..., : 2 * H] + s_BKG[..., : 2 * H]).chunk(2, dim=-1)
            proposed = torch.tanh(x_B1G[..., 2 * H :] + reset * s_BKG[..., 2 * H :])
            state_BKH = state_BKH + a_BK[..., None] * (1 - keep) * (proposed - state_BKH)
        return state_BKH


class DIEN(nn.Module):
    """The last state of AUGRU; zeros for an empty history.

    longest: most recent behaviours that are read (paper: 50 to 100).
    auxiliary: α, weight of the auxiliary loss, which is returned in training only (released code: 1).
    """

    def __init__(self, embed: FeatureEmbedding, *, longest: int = 50, auxiliary: float = 1.0) -> None:
        super().__init__()
        if longest < 1 or auxiliary < 0:
            raise ConfigError(f"longest={longest}, auxiliary={auxiliary}", rule="longest ≥ 1, auxiliary ≥ 0")
        self.longest, self.auxiliary = longest, auxiliary
        self.width = embed.inherent_width  # H
        self.extract = nn.GRU(
            embed.inherent_width + embed.cross_count * embed.cross_width, self.width, batch_first=True
        )
        self.attend = nn.Linear(self.width, self.width, bias=False)  # W of eq. 9
        self.evolve = AUGRU(self.width)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        past = past.last(self.longest)
        if past.mask.shape[1] == 0:
            return Interest(torch.zeros(*item_BK.shape, self.width))
        inherent_BLH = embed.inherent(past.item)
        cross = embed.cross(past.cross).flatten(-2)
        with torch.autocast(inherent_BLH.device.type, enabled=False):  # in small steps casts cost more
            # Causal, and padding comes after the newest: it changes no state that is read.
            interest_BLH, _ = self.extract(torch.cat([inherent_BLH, cross], dim=-1))
            attention_BKL = self.attention(interest_BLH, embed.inherent(item_BK), past.mask)
            vector_BKH = self.evolve(interest_BLH, attention_BKL)
        loss = None
        if self.auxiliary and self.training:
            negative_BL = draw_negatives(past.item, past.mask)
            counted_BL = past.mask & (negative_BL != past.item)
            loss = auxiliary_loss(interest_BLH, inherent_BLH, embed.inherent(negative_BL), counted_BL)
            loss = self.auxiliary * loss
        return Interest(vector_BKH, loss)

    def attention(self, interest_BLH: Tensor, target_BKH: Tensor, mask_BL: Tensor) -> Tensor:
        """a_t = softmax_t(h_t W e_a), (B, K, L); exactly 0 on padding, so that AUGRU stands still (eq. 9)."""
        score_BKL = self.attend(target_BKH) @ interest_BLH.mT
        hidden = ~mask_BL[:, None]
        weight = F.softmax(score_BKL.masked_fill(hidden, torch.finfo(score_BKL.dtype).min), dim=-1)
        return weight.masked_fill(hidden, 0.0)
