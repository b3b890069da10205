"""Two towers: a user's vector, an item's vector, their cosine; the other targets of a batch are the negatives.

Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019,
https://doi.org/10.1145/3298689.3346996; mixed negatives after Yang et al., "Mixed Negative Sampling for Learning
Two-tower Neural Networks in Recommendations", WWW 2020, https://doi.org/10.1145/3366424.3386195.

Idea. Items come into a batch as often as they are popular, so an in-batch softmax takes popularity out of the
scores: what it learns is log P(i|u)/P(i). Less log of how often each is expected there (logQ, from a
streaming estimate), it learns log P(i|u). The correction is for training; what is served is the plain cosine.

Covered: §3 batch softmax, L2 norm and temperature (eq. 3–5), §4.1 streaming frequency estimation. One way: a user
chooses among items, not an item among users.

User tower: the history, read with the items' vectors, attended to by content and by age; beside it the latest
moment and, on request, a hash of who the user is; a two-layer network on top of their sum.
Item tower: a vector of its own plus its content (text, behaviour, attributes) through one projection. A column of
content that is 1 where an item has an attribute is that attribute's embedding there.

Deviations:
- negatives are the batch's other targets together with `uniform` drawn items, so that items without events are
  negatives too, and with the last `bank` targets of earlier batches, whose vectors are those of now; all are
  corrected for how often they are expected in that mixture;
- the positive is not corrected (Khrylchenko et al. 2025, see `softmax.py`); what the row's user had within
  the window, and the other targets that the batch has of the same user, are no negatives;
- what one had before is likelier or less likely by a weight that is learned last, on the validation (`repetition`): no
  batch says it. The score that selects the weights knows it, of the same users: six numbers of some thousand;
- the frequency estimate counts examples, not batches (`frequency.py`);
- no rewards: every event weighs the same.

Cost: a product with the batch's items a target, in training; with N items in answering.

Letters: B users, L history, D width, T targets, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.transformer import HIDDEN, Dropout, Linear
from tiglon.retrieval.dense import DenseConfig, DenseRetriever
from tiglon.retrieval.frequency import FrequencyEstimator
from tiglon.retrieval.repetition import Repetition
from tiglon.retrieval.softmax import Negatives, accidental_hits, in_batch_softmax
from tiglon.retrieval.towers import DenseNetwork, HashedUsers, ItemTower, Past
from tiglon.retrieval.windows import REMEMBERED, Batch, earlier_of
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Targets


@dataclass(frozen=True)
class TwoTowerConfig(DenseConfig):
    hidden: int = 512  # of both two-layer networks
    temperature: float = 0.05  # paper: tuned, between .02 and .1
    uniform: int = 1024  # drawn negatives beside those of the batch; 0: none
    bank: int = 0  # negatives that are targets of the batches before
    logq: bool = True  # correct for how often an item is among the negatives
    rate: float = 0.05  # of the frequency estimate; paper: .01
    users: int = 0  # buckets of users; 0: known by their history alone
    ages: int = 32  # moments back that are told apart
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = min(self.uniform, self.bank, self.users) >= 0 and min(self.ages, self.hidden) >= 1
        if not (0 < self.temperature < math.inf and 0 < self.rate <= 1 and counts):
            raise ConfigError(
                f"temperature={self.temperature}, uniform={self.uniform}, bank={self.bank}, users={self.users}, "
                f"ages={self.ages}, hidden={self.hidden}, rate={self.rate}",
                rule="The temperature is above 0 and finite, the rate lies in 0 … 1 without 0, uniform, bank and users are "
                "at least 0, ages and hidden at least 1",
            )


class TwoTowerNetwork(DenseNetwork):
    """items: N.   content: as in `ItemTower`."""

    def __init__(self, items: int, config: TwoTowerConfig, content: np.ndarray | int | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.items = ItemTower(items, c.width, content)
        self.stranger = nn.Parameter(torch.randn(c.width) * c.width**-0.5)
        self.who = HashedUsers(c.users, c.width)
        self.age_bias = nn.Parameter(-0.3 * torch.arange(c.ages))  # the latest moment weighs most at first
        self.key = Linear(c.width, c.hidden, c.width**-0.5)
        self.attention = Linear(c.hidden, 1, 0.0)
        self.wi = Linear(2 * c.width + self.who.width, c.hidden, (2 * c.width) ** -0.5)
        self.wo = Linear(c.hidden, c.width, 0.1 * c.hidden**-0.5)
        self.dropout = Dropout(c.dropout)
        self.frequency = FrequencyEstimator(rate=c.rate)
        self.bank: Tensor
        if c.bank:
            self.register_buffer("bank", torch.full((c.bank,), MISSING))
        self.repetition = Repetition()  # learned last: what one had is no negative of a batch
        self.temperature = c.temperature

    def vectors(self) -> Tensor:
        return F.normalize(self.items.table(), dim=-1)

    def users(self, past: Past, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 1, D) of length 1."""
        x_BLD, mask, age = self.dropout(self.items(past.item, table)), past.mask, past.age
        logit_BL = self.attention(torch.tanh(self.key(x_BLD)))[..., 0].float()
        logit_BL = logit_BL + self.age_bias[(age - 1).clamp(0, self.config.ages - 1)]
        history_BD = _mean(x_BLD, logit_BL, mask)
        latest_BD = _mean(x_BLD, torch.zeros_like(logit_BL), mask & (age == 1))
        nobody = ~mask.any(dim=1, keepdim=True)
        history_BD = torch.where(nobody, self.stranger, history_BD)
        both = torch.cat([history_BD, latest_BD, self.who(past.user)], dim=1)
        deep = self.wo(self.dropout(F.relu(self.wi(both))))
        user_BD = F.normalize(history_BD + latest_BD + deep.float(), dim=-1)
        return user_BD[:, None], torch.ones(len(user_BD), 1, dtype=torch.bool)

    def loss(self, batch: Batch, negatives: Negatives | None = None) -> Tensor:
        """(T,) of a batch whose rows have one target each; in training mode its items are counted."""
        c, past, target = self.config, Past.of(batch), batch.item[batch.target]
        n_items = len(self.items.own.weight)
        earlier = self.bank[self.bank != MISSING] if c.bank else target[:0]
        candidate = torch.cat([target, torch.randint(n_items, (c.uniform,)), earlier])
        if self.training:
            self.frequency.update(target)
            if c.bank:
                self.bank.copy_(torch.cat([self.bank, target])[-c.bank :])
        log_count = None
        if c.logq:
            popular = (len(target) - 1 + len(earlier)) * self.frequency.probability(candidate)
            expected = popular + c.uniform / n_items
            log_count = expected.clamp(min=1e-9).log()
        user_TD = self.users(past)[0][:, 0].float()
        with torch.autocast("cpu", enabled=False):
            item_CD = F.normalize(self.items(candidate).float(), dim=-1)
            score_TC = user_TD @ item_CD.T / c.temperature
        hidden = accidental_hits(candidate, past.item, past.mask, past.user)
        return in_batch_softmax(score_TC, hidden, log_count)


class TwoTower(DenseRetriever):
    """Retrieve by the cosine of a user's vector with every item's.

    TwoTower(items.vocabulary, vectors=vectors).fit(split.train, split.validation)
    """

    name = "two_tower"
    Config = TwoTowerConfig
    config: TwoTowerConfig

    def _network(self, content: np.ndarray | int | None) -> TwoTowerNetwork:
        return TwoTowerNetwork(len(self.items), self.config, content)

    def _samples(self) -> bool:
        return False  # a batch has its own negatives

    def _learn_last(self, targets: Targets) -> None:
        """Whether people come back, with all else as it is."""
        had, truth = targets.histories.last(REMEMBERED), targets.truth
        before = earlier_of(had)
        scores, others, wanted = [], [], []
        vectors = self.vectors().T / self.config.temperature
        for start in range(0, len(had), 64):
            rows = slice(start, start + 64)
            logits = self.users(targets.histories.take(rows))[0][:, 0] @ vectors
            some, next_ones = had.take(rows), truth.take(rows)
            scores.append(np.take_along_axis(logits, before.item[rows].numpy(), axis=1))
            wanted.append(logits[next_ones.owner, next_ones.item])
            logits[some.owner, some.item] = -np.inf
            others.append(torch.from_numpy(logits).logsumexp(dim=1))
        owner, item = torch.from_numpy(truth.owner), torch.from_numpy(truth.item.astype(np.int64))
        self.network.repetition.learn_alone(
            before,
            torch.from_numpy(np.concatenate(scores)),
            torch.cat(others),
            (owner, item, torch.from_numpy(np.concatenate(wanted))),
        )


def _mean(x_BLD: Tensor, logit_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """(B, D) float32: the mean of what is there, weighted by softmax(logit); zeros where nothing is."""
    weight_BL = logit_BL.masked_fill(~mask_BL, HIDDEN).softmax(dim=1).nan_to_num(0.0)
    return (weight_BL[:, None] @ x_BLD.float())[:, 0].float()
