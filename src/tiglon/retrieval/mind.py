"""MIND: a user's interests are capsules, which divide the behaviours among themselves by dynamic routing.

Li et al., "Multi-Interest Network with Dynamic Routing for Recommendation at Tmall", CIKM 2019,
https://arxiv.org/abs/1904.08030

Idea. One vector cannot stand for tea and tyres. Each behaviour votes with S·e for all capsules alike, is drawn to
those that agree with it, and a capsule is the squashed sum of its voters. In training the interests are mixed
by how well they fit the target; in answering an item is scored by the best of them.

Covered: §3.3 behaviour-to-interest routing (eq. 5–7) with one bilinear map S, fixed random first logits and an adaptive
number of interests (eq. 9, K' = max(1, min(K, log₂ |I_u|))), §3.4 label-aware attention (eq. 8), §3.5.
Squash with a power p after EasyRec, and the disagreement regulariser, as options (`nn/interests.py`).

Deviations:
- the first logits b_kj are a hash of item and capsule, normally distributed, rather than drawn a position: the
  order of the history changes nothing, and an answer is the same in every batch and run;
- S begins as the identity, and the layers above a capsule add to it, so that at first an interest is near the
  items that it came from; the profile is a hash of the user, on request;
- only the last round of routing has a gradient (the paper's words leave this open; its capsules' origin does so);
- powers keep the sign of negative scores; K' counts events;
- the softmax runs over the whole catalogue up to 50,000 items, and over drawn ones, corrected, beyond;
- interests times one learned scale; an empty history has one learned interest (`towers.InterestNetwork`);
- what one had before is likelier or less likely by a learned weight (`repetition`).

Letters: B users, K interests, L history, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, require_weights
from tiglon.nn.interests import label_aware, route
from tiglon.nn.transformer import Linear
from tiglon.retrieval.dense import DenseConfig, DenseRetriever
from tiglon.retrieval.towers import HashedUsers, InterestNetwork, Past
from tiglon.train.loop import TrainConfig


@dataclass(frozen=True)
class MindConfig(DenseConfig):
    interests: int = 4  # K; paper: 5 to 7
    iterations: int = 3  # paper: 3
    sigma: float = 1.0  # standard deviation of the first logits
    squash: float = 1.0  # its power, 0 … 1; paper: 1
    power: float = 2.0  # of the label-aware attention: 0 the mean … math.inf the best alone
    hidden: int = 512  # of the network above a capsule
    users: int = 0  # buckets of users; 0: known by their history alone
    disagreement: float = 0.0  # λ; the loss is less λ · disagreement
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interests < 1 or self.iterations < 1 or self.users < 0 or self.hidden < 1:
            raise ConfigError(
                f"interests={self.interests}, iterations={self.iterations}, users={self.users}, "
                f"hidden={self.hidden}",
                rule="There is at least one interest, one iteration, one hidden unit; users is at least 0",
            )
        if not (self.power == 0 or 1 <= self.power <= 16 or self.power == float("inf")):
            raise ConfigError(
                f"power={self.power}",
                rule="The power is 0, 1 … 16 or math.inf",
                fix="Take math.inf for the best interest alone",
            )
        require_weights(self, "sigma", "squash", "disagreement")
        if self.squash > 1:
            raise ConfigError(f"squash={self.squash}", rule="The power of squash lies in 0 … 1")


class MindNetwork(InterestNetwork):
    """items: N.   content: as in `ItemTower`."""

    def __init__(self, items: int, config: MindConfig, content: np.ndarray | int | None = None) -> None:
        c = config
        super().__init__(items, c.width, c.dropout, c.disagreement, content)
        self.config = c
        self.bilinear = Linear(c.width, c.width, 0.0)
        nn.init.eye_(self.bilinear.weight)
        self.who = HashedUsers(c.users, c.width)
        self.wi = Linear(c.width + self.who.width, c.hidden, c.width**-0.5)
        self.wo = Linear(c.hidden, c.width, 0.1 * c.hidden**-0.5)

    def extract(self, x_BLD: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """eq. 5–7, 9, then the network above each capsule."""
        c, mask = self.config, past.mask
        votes = self.bilinear(x_BLD).float()[:, None]
        present = number_of_interests(mask.sum(dim=1), c.interests)[:, None] > torch.arange(c.interests)
        logits = c.sigma * first_logits(past.item, c.interests)
        capsules, _ = route(votes, logits, mask, present, c.iterations, c.squash)
        who = self.who(past.user)[:, None].expand(-1, c.interests, -1)
        deep = self.wo(self.dropout(F.relu(self.wi(torch.cat([capsules, who], dim=2)))))
        return capsules + deep, present

    def read_out(self, interests_BKD: Tensor, present_BK: Tensor, target_BD: Tensor) -> Tensor:
        """eq. 8."""
        return label_aware(interests_BKD, present_BK, target_BD, self.config.power)


class Mind(DenseRetriever):
    """Retrieve by the best product of a user's capsules with an item.

    Mind(items.vocabulary, vectors=vectors).fit(split.train, split.validation)
    """

    name = "mind"
    Config = MindConfig
    config: MindConfig

    def _network(self, content: np.ndarray | int | None) -> MindNetwork:
        return MindNetwork(len(self.items), self.config, content)


def number_of_interests(behaviours: Tensor, most: int) -> Tensor:
    """(B,) K' = max(1, min(K, ⌊log₂ n⌋)) of n behaviours (B,)."""
    powers = 2 ** torch.arange(1, min(most, 62) + 1)
    return (behaviours[:, None] >= powers).sum(dim=1).clamp(min=1)


def first_logits(item_BL: Tensor, interests: int) -> Tensor:
    """(B, K, L) standard normal numbers, a function of item and interest alone (SplitMix64 and the inverse of
    the normal distribution)."""
    state = item_BL[:, None] * interests + torch.arange(1, interests + 1)[:, None]
    state = state * -7046029254386353131  # 2^64 / golden ratio, as a signed number
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * -4658895280553007687
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * -7723592293110705685
    state = state ^ (state >> 31 & (1 << 33) - 1)
    return torch.special.ndtri(((state >> 11 & (1 << 53) - 1).double() + 0.5) / 2.0**53).float()
