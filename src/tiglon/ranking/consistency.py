"""Consistency: what share of the behaviours that matter most does a search find?

A two-stage unit attends to the k behaviours that its search chose. Its own attention (the exact search unit),
asked about all L, would have chosen others: the ones with the highest logits. The share of these that the
search found is its consistency, 1 where both stages score alike (Chang et al. 2023, TWIN,
https://arxiv.org/abs/2302.02352, fig. 3 and table 4: of the true top 100, SIM hard finds 40, TWIN 94 with
a cache 15 minutes old). A unit whose search reads stored tables loses by their age, which is measured, too.

Letters: B requests, K candidates, L behaviours, k chosen ones, A heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import merge
from tiglon.nn.search import top_k
from tiglon.types import Behaviours, RankingBatch


class TwoStage(Protocol):
    """What is measured: an interest unit (an nn.Module) that says what it searches for and what it finds."""

    k: int
    training: bool

    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, k) positions of the chosen, −1 for none."""

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of the attention for every behaviour, of the weights as they are; −inf on padding."""

    def train(self, mode: bool = True) -> object: ...


class Refreshable(TwoStage, Protocol):
    """A two-stage unit whose search reads stored tables in eval mode; they grow old while the weights learn."""

    def refresh(self, embed: FeatureEmbedding) -> None:
        """Make the tables anew from the weights as they are."""


def consistency(search_BKk: Tensor, truth_BKk: Tensor, mask_BK: Tensor | None = None) -> float:
    """The mean share of the true positions that are among the found ones; −1 is no position in either.

    mask_BK: False for candidates that do not count. Those without a true position never do.
    Raises DataError where none is left.
    """
    wanted = truth_BKk >= 0
    hit = (truth_BKk[..., :, None] == search_BKk[..., None, :]).any(dim=-1) & wanted
    counts = wanted.any(dim=2) if mask_BK is None else wanted.any(dim=2) & mask_BK
    if not counts.any():
        raise DataError(
            "no candidate with a behaviour to find", rule="Consistency is a mean over such candidates"
        )
    return float((hit.sum(dim=2)[counts] / wanted.sum(dim=2)[counts]).double().mean())


@torch.no_grad()
def true_top(
    unit: TwoStage, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours, k: int | None = None
) -> Tensor:
    """(B, K, min(k, L)) positions that the unit's attention scores highest; k is the unit's own unless given.

    With several heads their ranked lists are traversed in turn, duplicates dropped, until k are found (TWIN §4.3).
    """
    k = unit.k if k is None else k
    alpha = unit.logits(embed, item_BK, past)
    K, A = alpha.shape[1:3]
    each_head = top_k(alpha.flatten(1, 2), past.mask, k).unflatten(1, (K, A))
    return merge(each_head, k)[..., : min(k, past.mask.shape[1])]


@torch.no_grad()
def consistency_of(unit: TwoStage, embed: FeatureEmbedding, batch: RankingBatch) -> float:
    """Of the unit as it answers (eval mode), over the candidates of a batch that have a label."""
    training = unit.training
    unit.train(False)
    try:
        found = unit.search(embed, batch.item, batch.past)
        truth = true_top(unit, embed, batch.item, batch.past)
    finally:
        unit.train(training)
    return consistency(found.expand(*batch.item.shape, -1), truth, ~batch.label.isnan().all(dim=-1))


def consistency_by_age(
    unit: Refreshable,
    embed: FeatureEmbedding,
    batch: RankingBatch,
    update: Callable[[], object],
    ages: Sequence[int] = (0, 1, 2, 4),
) -> dict[int, float]:
    """age → consistency with tables that so many updates of the weights were not told to. 0 is fresh.

    update: one update of the ranker's weights, as training does it; called max(ages) times, on from here.
    The unit's tables are fresh again when this returns. Raises ConfigError for a negative age or none.
    """
    if not ages or min(ages) < 0:
        raise ConfigError(
            f"ages={tuple(ages)}", rule="Ages are numbers of updates, at least one of them, from 0 on"
        )
    unit.refresh(embed)
    measured = {}
    for age in range(max(ages) + 1):
        if age:
            update()
        if age in ages:
            measured[age] = consistency_of(unit, embed, batch)
    unit.refresh(embed)
    return measured
