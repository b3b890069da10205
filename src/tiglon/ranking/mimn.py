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

Cost: a loop over time: for 8 users on one busy core 0.6 ms a step, 3 ms with gradients, which keep 0.2 MB a
step; most of it is the price of a call, so larger batches cost little more. A request costs the same at any
length.

Letters: B users, K candidates, L behaviours, M slots and channels, D width of a slot, C width of a channel,
E width of a behaviour.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
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


def write(memory_BMD: Tensor, weight_BM: Tensor, erase_BD: Tensor, add_BD: Tensor) -> Tensor:
    """M ← M ∘ (1 − w eᵀ) + w aᵀ."""
    weight_BM1 = weight_BM[..., None]
    return memory_BMD * (1 - weight_BM1 * erase_BD[:, None]) + weight_BM1 * add_BD[:, None]


def usage_share(usage_BM: Tensor) -> Tensor:
    """How the writes so far were spread over the slots; zeros before the first."""
    return usage_BM / usage_BM.sum(dim=-1, keepdim=True).clamp(min=1)


def utilisation_loss(usage_BM: Tensor) -> Tensor:
    """Σ_i (share_i − mean share)², the mean over users; 0 if and only if all slots are used alike."""
    share_BM = usage_share(usage_BM)
    return (share_BM - share_BM.mean(dim=-1, keepdim=True)).square().sum(dim=-1).mean()


def choose(these: Tensor, new: MemoryState, old: MemoryState) -> MemoryState:
    """`new` for the users where `these` (B,) is True, `old` for the others."""
    at = these[:, None]
    return MemoryState(
        torch.where(at[..., None], new.memory, old.memory),
        torch.where(at[..., None], new.channels, old.channels),
        *(torch.where(at, a, b) for a, b in zip(new[2:], old[2:], strict=True)),
    )


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

        Every step is computed apart, so that one call with many behaviours and many calls with one give the
        same bits. Raises DataError where state and behaviours are of different users.
        """
        if len(past.mask) != len(state.usage):
            raise DataError(
                f"behaviours of {len(past.mask)} users for a state of {len(state.usage)}",
                rule="Row b of both is the same user",
            )
        behaviour_BLE = torch.cat([embed.inherent(past.item), embed.cross(past.cross).flatten(-2)], dim=-1)
        longest = int(past.lengths.max()) if past.mask.numel() else 0
        steps = zip(behaviour_BLE[:, :longest].unbind(1), past.mask[:, :longest].unbind(1), strict=True)
        with torch.autocast(behaviour_BLE.device.type, enabled=False):
            for x_BE, happened_B in steps:
                following = self._step(state, x_BE)
                if not happened_B.all():
                    following = choose(happened_B, following, state)
                state = following
        return state

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

    def _step(self, state: MemoryState, x_BE: Tensor) -> MemoryState:
        memory_BMD = state.memory
        controller = self.controller(torch.cat([x_BE, state.last_read], dim=-1), state.controller)
        read_BM, write_BM = address(*self._heads(controller), memory_BMD).unbind(1)
        write_BM = self._rebalance(write_BM, state.usage)
        erase_BD, add_BD = self.change(controller).chunk(2, dim=-1)
        return MemoryState(
            write(memory_BMD, write_BM, erase_BD.sigmoid(), add_BD.tanh()),
            self._induce(state.channels, read_BM, memory_BMD, x_BE),
            controller,
            (read_BM[:, None] @ memory_BMD).squeeze(1),
            state.usage + write_BM,
        )

    def _heads(self, controller: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (n, 2, D) and strengths (n, 2, 1) to read and to write with."""
        key, strength = self.heads(controller).unflatten(-1, (2, -1)).split([self.slot_width, 1], dim=-1)
        return key.tanh(), F.softplus(strength) + 1

    def _rebalance(self, weight_BM: Tensor, usage_BM: Tensor) -> Tensor:
        """w̃ = w P with P = softmax(W_g g + b), a matrix whose rows sum to one: so does w̃ (§4.3)."""
        P_BMM = F.softmax(self.transfer(usage_share(usage_BM)).unflatten(-1, (self.slots, -1)), dim=-1)
        return (weight_BM[:, None] @ P_BMM).squeeze(1)

    def _induce(self, channels_BMC: Tensor, read_BM: Tensor, memory_BMD: Tensor, x_BE: Tensor) -> Tensor:
        """The `top` channels that were read most take in [x, M_i]; the others stay (§4.4)."""
        at_BT1 = read_BM.topk(self.top, dim=1).indices[..., None]
        slot_BTD = memory_BMD.detach().gather(1, at_BT1.expand(-1, -1, self.slot_width))
        at_BTC = at_BT1.expand(-1, -1, self.channel_width)
        before_BTC = channels_BMC.gather(1, at_BTC)
        x_BTE = x_BE[:, None].expand(-1, self.top, -1)
        after = self.induce(torch.cat([x_BTE, slot_BTD], dim=-1).flatten(0, 1), before_BTC.flatten(0, 1))
        return channels_BMC.scatter(1, at_BTC, after.view_as(before_BTC))
