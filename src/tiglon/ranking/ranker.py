"""The shell of every ranker: embed → short-term interest + long-term interest + the rest → MLP → task heads.

Beside candidate and interest the MLP reads their product, elementwise after a projection of the candidate:
whether an interest is in this very item is a product, which an MLP of sums is slow to learn. It also reads how
often and how long ago the candidate's values occurred (`intersection.py`): attention forgets how many there were.

What a paper of this field adds is an interest unit: one small class that reads a user's behaviours for a
candidate. The shell, the features and the training are the same for all, so that a comparison compares
the units.

Letters: B requests, K candidates, L behaviours, J cross features, X profile features, T tasks,
H width of an item, D width of an interest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@dataclass(frozen=True)
class RankerConfig:
    recent: int = 50  # behaviours that the short-term unit reads; TWIN: 50
    hidden: tuple[int, ...] = (200, 80)  # DIN: 200, 80
    dropout: float = 0.0
    intersections: bool = True  # counts of the candidate's values in the life
    experts: int = 0  # of MMoE, each with the hidden layers above; 0: all tasks share one bottom
    tower: tuple[int, ...] = ()  # hidden layers of each task's own; none: a linear head


class Ranker(nn.Module):
    """Scores candidates; logits (B, K, T).

    short reads the most recent `config.recent` behaviours, long all of them; None leaves one out.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        long: InterestUnit | None,
        short: InterestUnit | None = None,
        tasks: Sequence[str] = ("label",),
        config: RankerConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or RankerConfig()
        self.embed, self.long, self.short, self.tasks = embed, long, short, tuple(tasks)
        widths = [unit.width for unit in (short, long) if unit is not None]
        self.match = nn.ModuleList(nn.Linear(embed.inherent_width, width) for width in widths)
        width = embed.inherent_width + embed.profile_width + 2 * sum(widths)
        if c.intersections:
            width += PER_FEATURE * embed.item_codes.shape[1]
        T, last = len(self.tasks), c.hidden[-1] if c.hidden else width
        self.trunk: nn.Module = mlp(width, c.hidden, c.dropout)
        self.heads: nn.Module = nn.Linear(last, T)
        if c.experts:
            self.trunk = MMoE(width, T, c.experts, c.hidden, c.dropout)
        if c.experts or c.tower:
            self.heads = Towers(last, T, c.tower, c.dropout)

    def forward(self, batch: RankingBatch) -> Tensor:
        """Logits (B, K, T)."""
        return self.score(batch)[0]

    def score(self, batch: RankingBatch) -> tuple[Tensor, list[Interest]]:
        """Logits (B, K, T), and what the units found, the short-term one first."""
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
        x = torch.cat(parts, dim=-1)
        return self.heads(self.trunk(x.flatten(0, 1))).unflatten(0, (B, K)).float(), found

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
        if isinstance(self.trunk, MMoE):
            own += self.trunk.gates.parameters()
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
