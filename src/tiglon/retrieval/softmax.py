"""−log softmax of the next item: over the whole catalogue, over drawn items, over the others of a batch.

Sampled items stand for the catalogue if each weighs 1 / (how often it is expected among them): logQ, after
Bengio and Senécal 2008, https://doi.org/10.1109/TNN.2007.912312, and Yi et al. 2019 (`frequency`). The positive is
there with certainty, so it is neither corrected nor counted among the others: Khrylchenko et al. 2025,
https://arxiv.org/abs/2507.09331.

Letters: T targets, C candidates, N items, D width, L items of a row, M items that came before.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiglon.errors import ConfigError
from tiglon.retrieval.repetition import Had


class Negatives(NamedTuple):
    """Drawn items, with repetitions. item: (C,) int64.   log_count: (C,) log of how often each is expected."""

    item: Tensor
    log_count: Tensor


class UnigramSampler:
    """Draws items as often as they are in the log. counts: (N,) events; each has one more, so that all are drawn."""

    def __init__(self, counts: np.ndarray, number: int) -> None:
        if number < 1:
            raise ConfigError(f"{number} negatives", rule="At least one is drawn")
        smoothed = counts.astype(np.float64) + 1
        self.number = number
        self.cumulative = torch.from_numpy(np.cumsum(smoothed / smoothed.sum()))
        self.log_count = torch.from_numpy(np.log(number * smoothed / smoothed.sum()).astype(np.float32))

    def draw(self) -> Negatives:
        """`number` independent draws, from torch's generator."""
        place = torch.rand(self.number, dtype=torch.float64)
        item = torch.searchsorted(self.cumulative, place, right=True).clamp(max=len(self.log_count) - 1)
        return Negatives(item, self.log_count[item])


def catalogue_softmax(
    user_TD: Tensor, vectors_ND: Tensor, target_T: Tensor, had: Had | None = None
) -> Tensor:
    """(T,) −log softmax of each target's product among those of all items."""
    logits_TN = (user_TD @ vectors_ND.T).float()
    if had is not None:
        row, place = torch.nonzero(had.there, as_tuple=True)
        logits_TN.index_put_((row, had.item[row, place]), had.offset[row, place], accumulate=True)
    return F.cross_entropy(logits_TN, target_T, reduction="none")


def sampled_softmax(
    user_TD: Tensor,
    target_TD: Tensor,
    drawn_CD: Tensor,
    target_T: Tensor,
    drawn: Negatives,
    had: Had | None = None,
    had_TM: Tensor | None = None,
) -> Tensor:
    """(T,) the same, the other items estimated by the drawn ones; a draw of the target itself is left out.

    target_TD, drawn_CD: the vectors of the targets and of the drawn items.   had_TM: the products of what came before;
    that is not estimated, so a draw of it is left out, too.
    """
    positive_T = (user_TD * target_TD).sum(dim=-1).float()
    others_TC = (user_TD @ drawn_CD.T).float() - drawn.log_count
    others_TC = others_TC.masked_fill(target_T[:, None] == drawn.item, -torch.inf)
    if had is not None:
        assert had_TM is not None
        others_TC = others_TC.masked_fill(_is_among(drawn.item, had.item, had.there), -torch.inf)
        own_TM = had.there & (had.item == target_T[:, None])
        positive_T = positive_T + torch.where(own_TM, had.offset, 0.0).sum(dim=1)
        known_TM = had_TM.float() + had.offset
        others_TC = torch.cat([others_TC, known_TM.masked_fill(~had.there | own_TM, -torch.inf)], dim=1)
    return torch.cat([positive_T[:, None], others_TC], dim=1).logsumexp(dim=1) - positive_T


def in_batch_softmax(score_TC: Tensor, hidden_TC: Tensor, log_count_C: Tensor | None = None) -> Tensor:
    """(T,) −log softmax of each row's own column, which is that of its number, among those not hidden.

    score: of each row with the batch's targets, and with any further candidates after them (C ≥ T).
    hidden: candidates that are no negatives of a row; its own column is never hidden.
    log_count: log of how often a candidate is expected among a row's negatives; None for no correction.
    """
    own_TC = torch.eye(*score_TC.shape, dtype=torch.bool)
    logits = score_TC.float()
    if log_count_C is not None:
        logits = torch.where(own_TC, logits, logits - log_count_C)
    logits = logits.masked_fill(hidden_TC & ~own_TC, -torch.inf)
    return logits.logsumexp(dim=1) - logits.diagonal()


def accidental_hits(candidate_C: Tensor, item_TM: Tensor, there_TM: Tensor, user_T: Tensor) -> Tensor:
    """(T, C) bool: candidates that are a row's target itself or are known to be liked by its user.

    candidate: the targets of the T rows first.   item, there: what each row's user had.   user: who it is,
    negative for strangers; one user's targets are liked in all of that user's rows.
    """
    t = len(user_T)
    distinct, column_C = candidate_C.unique(return_inverse=True)
    same_TT = torch.eye(t, dtype=torch.bool) | ((user_T[:, None] == user_T) & (user_T >= 0))
    row, other = torch.nonzero(same_TT, as_tuple=True)
    liked = torch.zeros(t, len(distinct), dtype=torch.bool)
    liked[row, column_C[:t][other]] = True
    return liked[:, column_C] | _is_among(candidate_C, item_TM, there_TM)


def _is_among(candidate_C: Tensor, item_TL: Tensor, mask_TL: Tensor) -> Tensor:
    """(T, C) bool: candidates that a row's items hold."""
    distinct, column_C = candidate_C.unique(return_inverse=True)
    found = torch.zeros(len(item_TL), len(distinct), dtype=torch.bool)
    if len(distinct):
        at_TL = torch.searchsorted(distinct, item_TL).clamp(max=len(distinct) - 1)
        row, place = torch.nonzero((distinct[at_TL] == item_TL) & mask_TL, as_tuple=True)
        found[row, at_TL[row, place]] = True
    return found[:, column_C]
