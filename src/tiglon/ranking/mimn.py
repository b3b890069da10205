"""MIMN: a life in a memory of fixed size, which is written at every behaviour and read at every request.

Paper: Pi et al., "Practice on Long Sequential User Behavior Modeling for Click-Through Rate Prediction",
KDD 2019, https://arxiv.org/abs/1905.09248

Idea: a neural Turing machine with a few slots reads and writes once a behaviour; a second memory of as many
channels follows how the content of each slot evolves. Neither grows with the history, so a server keeps them
per user (the paper's User Interest Center), updates them when something happens, and a request only reads.
Covers: NTM (§4.2: memory read, memory write), memory utilisation regularisation (§4.3), memory induction unit
(§4.4), incremental serving (§5).

    unit = MIMN(embed)
    state = unit.begin(1)
    state = unit.update(embed, state, past)      when behaviours happen, one or many: the result is the same
    interest = unit.read(embed, state, item)     at a request

Deviations
- Utilisation so far enters the transfer matrix P_t = softmax(W_g g_t + b) and the loss as shares of all
  writes, so that neither depends on how long the history is; b starts P_t near the identity. (The released
  code shifts and sharpens the write weights instead.)
- The first contents of the memory are learned.
- The induction unit takes slot contents without their gradient, as the released code does.
- A request reads the memory with the key of a controller step on the candidate, and the channels by scaled
  dot-product attention; the paper draws the first and leaves the second open.
- Training and `forward` read at most `longest` behaviours (paper: 1,000); `update` has no limit.
- An entry that stands for n behaviours is one step.

Cost: a step of one user is some forty thousand products (E = 136), most of them x's; with gradients three times as
much, and 4 KB are kept a step (`memory_steps.py`). Beside the same steps as operations of torch, one thread, 1,000
behaviours: for one user 107 times as fast, for 32 6.8 times, with gradients 14; a single behaviour costs the same, the
price of calls. A request costs the same at any length.

Letters: B users, K candidates, L behaviours, M slots and channels, D width of a slot, C width of a channel,
E width of a behaviour, R behaviours of all users, G = 3C gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.memory_steps import Weights, project, steps
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class MemoryState(NamedTuple):
    """All that is kept of B users; row b is one user's, to be stored and loaded as it is.

    memory: (B, M, D).   channels: (B, M, C).   controller: (B, C).   last_read: (B, D).
    usage: (B, M), how much was written to each slot, M numbers that sum to the number of behaviours.
    """

    memory: Tensor
    channels: Tensor
    controller: Tensor
    last_read: Tensor
    usage: Tensor


def address(key: Tensor, strength: Tensor, memory: Tensor) -> Tensor:
    """w = softmax_i(β cos(k, M_i)) of Q keys: (B, Q, D), (B, Q, 1), (B, M, D) → (B, Q, M)."""
    cosine = F.normalize(key, dim=-1) @ F.normalize(memory, dim=-1).mT
    return F.softmax(strength * cosine, dim=-1)


def usage_share(usage_BM: Tensor) -> Tensor:
    """How the writes so far were spread over the slots; zeros before the first."""
    return usage_BM / usage_BM.sum(dim=-1, keepdim=True).clamp(min=1)


def utilisation_loss(usage_BM: Tensor) -> Tensor:
    """Σ_i (share_i − mean share)², the mean over users; 0 if and only if all slots are used alike."""
    share_BM = usage_share(usage_BM)
    return (share_BM - share_BM.mean(dim=-1, keepdim=True)).square().sum(dim=-1).mean()


class MIMN(nn.Module):
    """Reads of memory and channels with the candidate, side by side.

    slots: M (paper: 4 to 8).   top: channels updated at each behaviour.
    regularise: λ of the utilisation loss, which is returned in training only.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        slots: int = 8,
        slot_width: int = 32,
        channel_width: int = 32,
        top: int = 1,
        regularise: float = 0.1,
        longest: int = 1000,
    ) -> None:
        super().__init__()
        if not 1 <= top <= slots:
            raise ConfigError(f"top={top}, slots={slots}", rule="top is between 1 and slots")
        if longest < 1 or regularise < 0:
            raise ConfigError(
                f"longest={longest}, regularise={regularise}", rule="longest ≥ 1, regularise ≥ 0"
            )
        M, D, C = slots, slot_width, channel_width
        self.slots, self.slot_width, self.channel_width, self.top = M, D, C, top
        self.regularise, self.longest, self.width = regularise, longest, D + C
        self.cross_shape = (embed.cross_count, embed.cross_width)
        behaviour_width = embed.inherent_width + embed.cross_count * embed.cross_width  # E
        self.start = nn.Parameter(torch.randn(M, D) * 0.5)
        self.controller = nn.GRUCell(behaviour_width + D, C)
        self.heads = nn.Linear(C, 2 * (D + 1))  # key and β, to read and to write
        self.change = nn.Linear(C, 2 * D)  # what to erase, what to add
        self.transfer = nn.Linear(M, M * M)  # W_g, b
        with torch.no_grad():
            self.transfer.bias.copy_(4.0 * torch.eye(M).flatten())
        self.induce = nn.GRUCell(behaviour_width + D, C)  # shared by all channels
        self.ask = nn.Linear(behaviour_width, C, bias=False)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        state = self.update(embed, self.begin(len(item_BK)), past.last(self.longest))
        loss = self.regularise * utilisation_loss(state.usage) if self.regularise and self.training else None
        return Interest(self.read(embed, state, item_BK), loss)

    def begin(self, B: int) -> MemoryState:
        """The state of B users who did nothing yet."""
        M, D, C = self.slots, self.slot_width, self.channel_width
        memory = self.start.expand(B, -1, -1)
        zeros = memory.new_zeros
        return MemoryState(memory, zeros(B, M, C), zeros(B, C), zeros(B, D), zeros(B, M))

    def update(self, embed: FeatureEmbedding, state: MemoryState, past: Behaviours) -> MemoryState:
        """The state after these behaviours (B, L), in float32 always.

        Every step runs the same code on its own numbers, so that one call with many behaviours and many calls with one give the
        same bits. Raises DataError where state and behaviours are of different users.
        """
        if len(past.mask) != len(state.usage):
            raise DataError(
                f"behaviours of {len(past.mask)} users for a state of {len(state.usage)}",
                rule="Row b of both is the same user",
            )
        state = MemoryState(*(part.float() for part in state))
        if not past.mask.any():
            return state
        item_R, cross_RJ = past.item[past.mask], past.cross[past.mask]
        x_RE = torch.cat([embed.inherent(item_R), embed.cross(cross_RJ).flatten(-2)], dim=-1).float()
        with torch.autocast(x_RE.device.type, enabled=False):
            weight_2GE, bias_2G, weights = self._sorted(x_RE.shape[1])
            from_x_R2G = project(x_RE, weight_2GE, bias_2G).unflatten(-1, (2, -1))
            after = steps(from_x_R2G, past.mask, tuple(state), weights, self.top)
        return MemoryState(*after)

    def read(self, embed: FeatureEmbedding, state: MemoryState, item_BK: Tensor) -> Tensor:
        """The interest of each candidate, (B, K, D + C); the state stays as it is."""
        B, K = item_BK.shape
        no_cross = torch.zeros(B, K, self.cross_shape[0] * self.cross_shape[1])
        x_BKE = torch.cat([embed.inherent(item_BK), no_cross], dim=-1)
        before = [
            part[:, None].expand(-1, K, -1).flatten(0, 1) for part in (state.last_read, state.controller)
        ]
        hidden = self.controller(torch.cat([x_BKE.flatten(0, 1), before[0]], dim=-1), before[1])
        key, strength = self._heads(hidden)
        weight_BKM = address(key[:, 0].view(B, K, -1), strength[:, 0].view(B, K, 1), state.memory)
        channel_BKM = F.softmax(self.ask(x_BKE) @ state.channels.mT * self.channel_width**-0.5, dim=-1)
        return torch.cat([weight_BKM @ state.memory, channel_BKM @ state.channels], dim=-1)

    def _heads(self, controller: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (n, 2, D) and strengths (n, 2, 1) to read and to write with."""
        key, strength = self.heads(controller).unflatten(-1, (2, -1)).split([self.slot_width, 1], dim=-1)
        return key.tanh(), F.softplus(strength) + 1

    def _sorted(self, E: int) -> tuple[Tensor, Tensor, Weights]:
        """What both GRUs do to a behaviour, (2G, E) and (2G,), and all else that a step needs."""
        C = self.channel_width
        first, second = self.controller, self.induce
        input_2GI = torch.stack([first.weight_ih, second.weight_ih])
        of_input_2G, of_hidden_2G = (
            torch.stack([first.bias_ih, second.bias_ih]),
            torch.stack([first.bias_hh, second.bias_hh]),
        )
        heads, change = self.heads, self.change
        unused = heads.bias.new_zeros(-(len(heads.bias) + len(change.bias)) % 8, C)  # to fill vectors up
        weights = Weights(
            input_2GI[..., E:],
            torch.stack([first.weight_hh, second.weight_hh]),
            of_hidden_2G[:, 2 * C :],
            torch.cat([heads.weight, change.weight, unused]),
            torch.cat([heads.bias, change.bias, unused[:, 0]]),
            self.transfer.weight,
            self.transfer.bias,
        )
        bias_2G = of_input_2G + F.pad(of_hidden_2G[:, : 2 * C], (0, C))  # two gates only add them up
        return input_2GI[..., :E].flatten(0, 1), bias_2G.flatten(), weights
