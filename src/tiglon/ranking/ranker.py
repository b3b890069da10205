"""The shell of every ranker: embed → short-term interest + long-term interest + the rest → MLP → task heads.

Beside candidate and interest the MLP reads their product, elementwise after a projection of the candidate:
whether an interest is in this very item is a product, which an MLP of sums is slow to learn. It also reads how
often and how long ago the candidate's values occurred (`intersection.py`): attention forgets how many there were.

What a paper of this field adds is an interest unit: one small class that reads a user's behaviours for a
candidate. The shell, the features and the training are the same for all, so that a comparison compares
the units.

Two more parts are there on request: a crossing layer (`crosses.py`) over the features of candidate, user and
request and the interests, each a field of one width; and who asks (`gates.py`): a gate multiplies the MLP's input and
its hidden layers by factors, a trunk takes the MLP's place.

Letters: B requests, K candidates, L behaviours, J cross features, X profile features, T tasks,
H width of an item, D width of an interest, F fields, W width of the MLP's input, C width of what is crossed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, require_counts, require_dropout, require_weights
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.intersection import PER_FEATURE, intersect
from tiglon.ranking.tasks import MMoE, Towers, mlp
from tiglon.types import Behaviours, RankingBatch


class Interest(NamedTuple):
    """vector: (B, K, D).   loss: of the unit's auxiliary task, a scalar already weighted, or None.
    logit: (B, K) of an auxiliary task that predicts the first task's label itself, or None; the shell adds
    `logit_weight` times its binary cross-entropy.
    chosen: (B, K, k) or (B, 1, k) positions of the behaviours that were attended, −1 for none, or None.
    weight: like `chosen` broadcast over K: how much each counted, the mean over heads; explains an answer.
    """

    vector: Tensor
    loss: Tensor | None = None
    chosen: Tensor | None = None
    weight: Tensor | None = None
    logit: Tensor | None = None
    logit_weight: float = 1.0


class InterestUnit(Protocol):
    """Reads what a user did, for each candidate. An nn.Module; padding never changes what it returns,
    an empty history gives finite numbers, and of equal behaviours the newest come first."""

    width: int  # D

    def __call__(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest: ...


class CrossLayer(Protocol):
    """Crosses fields, (…, F, width of a field) → (…, C). An nn.Module."""

    width: int  # C
    beside: bool  # True: its output goes to the heads, beside the MLP's; False: into the MLP

    def __call__(self, fields: Tensor) -> Tensor: ...


class Gate(Protocol):
    """Profile codes (B, X), candidates (B, K, H) and the MLP's input (B, K, W) → what the input and each hidden
    layer are multiplied by, each (B or 1, K or 1, its width) or (1,). An nn.Module."""

    def __call__(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]: ...


class Trunk(Protocol):
    """Profile codes (B, X) and the MLP's input (B, K, W) → hidden layers (B, K, width), each of those that it was made
    for; or, by_task, one (B, K, T, width), the last. An nn.Module."""

    by_task: bool

    def __call__(self, profile_BX: Tensor, x_BKW: Tensor) -> list[Tensor]: ...

    def own(self) -> list[nn.Parameter]:
        """What one task alone reads."""


@dataclass(frozen=True)
class RankerConfig:
    recent: int = 50  # behaviours that the short-term unit reads; TWIN: 50
    hidden: tuple[int, ...] = (200, 80)  # DIN: 200, 80
    dropout: float = 0.0
    intersections: bool = True  # counts of the candidate's values in the life
    experts: int = 0  # of MMoE or M2M, each with the hidden layers above; 0: all tasks share one bottom
    tower: tuple[int, ...] = ()  # hidden layers of each task's own; none: a linear head
    field_width: int = 16  # to which a crossing layer's fields are projected

    def __post_init__(self) -> None:
        require_counts(self, "recent", "field_width")
        require_weights(self, "experts")
        require_dropout(self)
        if min((*self.hidden, *self.tower), default=1) < 1:
            raise ConfigError(f"hidden={self.hidden}, tower={self.tower}", rule="A layer is at least 1 wide")


class Ranker(nn.Module):
    """Scores candidates; logits (B, K, T).

    short reads the most recent `config.recent` behaviours, long all of them; None leaves one out.
    cross: fields, width of a field → layer.   gate: embedding, widths of the MLP's input and hidden layers → gate.
    trunk: the same, number of tasks, settings → what takes the MLP's place.
    Raises ConfigError for a gate with MMoE, whose experts have their layers apart.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        long: InterestUnit | None,
        short: InterestUnit | None = None,
        tasks: Sequence[str] = ("label",),
        config: RankerConfig | None = None,
        cross: Callable[[int, int], CrossLayer] | None = None,
        gate: Callable[[FeatureEmbedding, Sequence[int]], Gate] | None = None,
        trunk: Callable[[FeatureEmbedding, Sequence[int], int, RankerConfig], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or RankerConfig()
        self.embed, self.long, self.short, self.tasks = embed, long, short, tuple(tasks)
        widths = [unit.width for unit in (short, long) if unit is not None]
        self.match = nn.ModuleList(nn.Linear(embed.inherent_width, width) for width in widths)
        width = embed.inherent_width + embed.profile_width + 2 * sum(widths)
        if c.intersections:
            width += PER_FEATURE * embed.item_codes.shape[1]
        tables = [*embed.items, *embed.profiles]
        self.field_widths = [*(table.embedding_dim for table in tables), *widths]
        self.cross = None if cross is None else cross(len(self.field_widths), c.field_width)
        if self.cross is not None:
            self.fields = nn.ModuleList(
                nn.Linear(width, c.field_width, bias=False) for width in self.field_widths
            )
            width += 0 if self.cross.beside else self.cross.width
        if gate is not None and c.experts:
            raise ConfigError(
                f"a gate and {c.experts} experts",
                rule="A gate multiplies the layers of one MLP",
                fix="Set experts=0, or leave the gate out",
            )
        self.gate = None if gate is None else gate(embed, [width, *c.hidden])
        T, last = len(self.tasks), c.hidden[-1] if c.hidden else width
        self.conditional = trunk is not None
        self.trunk: Any  # a module
        if trunk is not None:
            self.trunk = trunk(embed, [width, *c.hidden], T, c)
        elif c.experts:
            self.trunk = MMoE(width, T, c.experts, c.hidden, c.dropout)
        else:
            self.trunk = mlp(width, c.hidden, c.dropout)
        if self.cross is not None and self.cross.beside:
            last += self.cross.width
        apart = self.trunk.by_task if self.conditional else c.experts > 0
        self.heads: nn.Module = (
            Towers(last, T, c.tower, c.dropout) if apart or c.tower else nn.Linear(last, T)
        )

    def forward(self, batch: RankingBatch) -> Tensor:
        """Logits (B, K, T)."""
        return self.score(batch)[0]

    def score(self, batch: RankingBatch) -> tuple[Tensor, list[Interest]]:
        """Logits (B, K, T), and what the units found, the short-term one first."""
        (*_, last), beside, found = self._read(batch)
        if beside is not None:
            last = torch.cat(
                [last, beside if last.dim() == 2 else beside[:, None].expand(-1, len(self.tasks), -1)], -1
            )
        return self.heads(last).unflatten(0, batch.item.shape).float(), found

    def hidden(self, batch: RankingBatch) -> list[Tensor]:
        """(B·K, width) of each hidden layer, as the gate leaves it; of MMoE (B·K, T, width) of its mixture alone."""
        return self._read(batch)[0][1:]

    def _read(self, batch: RankingBatch) -> tuple[list[Tensor], Tensor | None, list[Interest]]:
        """The MLP's input and layers, (B·K, W) …; what goes to the heads beside them; and what the units found."""
        B, K = batch.item.shape
        found = []
        if self.short is not None:
            found.append(self.short(self.embed, batch.item, batch.past.last(self.config.recent)))
        if self.long is not None:
            found.append(self.long(self.embed, batch.item, batch.past))
        candidate = self.embed.inherent(batch.item)
        matched = [match(candidate) * f.vector for match, f in zip(self.match, found, strict=True)]
        profile = self.embed.profile(batch.profile)[:, None].expand(B, K, -1)
        parts = [candidate, *(f.vector for f in found), *matched, profile]
        if self.config.intersections:
            parts.append(intersect(self.embed, batch.item, batch.past))
        beside = None
        if self.cross is not None:
            known = torch.cat([candidate, profile, *(f.vector for f in found)], dim=-1)
            split = zip(self.fields, known.split(self.field_widths, dim=-1), strict=True)
            crossed = self.cross(torch.stack([project(value) for project, value in split], dim=-2))
            if self.cross.beside:
                beside = crossed.flatten(0, 1)
            else:
                parts.append(crossed)
        x = torch.cat(parts, dim=-1)
        if self.conditional:
            layers = [h.flatten(0, 1) for h in (x, *self.trunk(batch.profile, x))]
        elif self.gate is None:
            layers = self._layers(x.flatten(0, 1), [])
        else:
            scales = self.gate(batch.profile, candidate, x)
            layers = self._layers(x.flatten(0, 1), [scale.expand(B, K, -1).flatten(0, 1) for scale in scales])
        return layers, beside, found

    def _layers(self, x_nW: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
        """The MLP's input and hidden layers, each multiplied by its scale if there are any."""
        if not isinstance(self.trunk, nn.Sequential):
            return [x_nW, self.trunk(x_nW)]
        layers = [x_nW * scales[0] if scales else x_nW]
        for n in range(0, len(self.trunk), 3):  # linear, PReLU, dropout
            h = self.trunk[n : n + 3](layers[-1])
            layers.append(h * scales[len(layers)] if scales else h)
        return layers

    def loss(self, batch: RankingBatch) -> Tensor:
        """(n,) binary cross-entropy of the n labels there are, the units' auxiliary losses added to each."""
        with self.embed.holding(batch.item, batch.past.item):
            logits, found = self.score(batch)
        return _cross_entropy(logits, batch.label) + _auxiliary(found, batch.label[..., 0])

    def losses(self, batch: RankingBatch) -> dict[str, Tensor]:
        """Task → (n_t,) binary cross-entropy of its labels; the units' auxiliary losses are the first task's."""
        with self.embed.holding(batch.item, batch.past.item):
            logits, found = self.score(batch)
        losses = {
            name: _cross_entropy(logits[..., t], batch.label[..., t]) for t, name in enumerate(self.tasks)
        }
        losses[self.tasks[0]] = losses[self.tasks[0]] + _auxiliary(found, batch.label[..., 0])
        return losses

    def shared_and_own(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that all tasks read, and those of heads and MMoE's gates, which one task does."""
        own = [*self.heads.parameters()]
        if not isinstance(self.trunk, nn.Sequential):
            own += self.trunk.own()
        names = {id(p) for p in own}
        return [p for p in self.parameters() if id(p) not in names], own


def _cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """(n,) of the n labels there are."""
    known = ~torch.isnan(label)
    return F.binary_cross_entropy_with_logits(logit[known], label[known], reduction="none")


def _auxiliary(found: Sequence[Interest], label_BK: Tensor) -> Tensor:
    """What the units add to each loss, by their own tasks; a scalar."""
    total = torch.zeros(())
    for interest in found:
        if interest.loss is not None:
            total = total + interest.loss
        if interest.logit is not None:
            total = total + interest.logit_weight * _mean_cross_entropy(interest.logit, label_BK)
    return total


def _mean_cross_entropy(logit_BK: Tensor, label_BK: Tensor) -> Tensor:
    """The mean over the labels there are; 0 without any."""
    known = ~torch.isnan(label_BK)
    total = F.binary_cross_entropy_with_logits(logit_BK[known].float(), label_BK[known], reduction="sum")
    return total / known.sum().clamp(min=1)
