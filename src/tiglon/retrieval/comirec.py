"""ComiRec: several interests by routing (DR) or by self-attention (SA), and lists that trade fit for variety.

Cen et al., "Controllable Multi-Interest Framework for Recommendation", KDD 2020, https://arxiv.org/abs/2005.09347

Covered: §3.2 dynamic routing with a matrix for each position and interest and zero first logits (algorithm 1);
self-attentive extraction A = softmax(tanh(H W₁) W₂), V = Aᵀ H (eq. 3–5), positions in the scores alone; training by the
best interest for the target (eq. 6–8); §3.3 controllable aggregation (eq. 10, algorithm 2).

Aggregation. Q(u, S) = Σ f(u, i) + λ · (pairs of S of different categories); an item is added where f − λ · (chosen ones
of its category) is largest, which is the same step. With one category an item this greedy choice is exact: the
t-th item of a category brings f − λ·(t − 1), less with every t, and the best k of such gains form the best list.
(With categories that overlap it would not be.) eq. 10 counts ordered pairs, so its λ is half of ours.

Deviations:
- a position is a number of moments back, not a place in the file: the items of one basket share it;
- the softmax runs over the whole catalogue up to 50,000 items, and over drawn ones, corrected, beyond (paper:
  10 drawn items a target);
- the matrices of DR begin as the identity and noise, so that at first an interest is near the items that it
  came from; only the last round of routing has a gradient;
- interests times one learned scale; an empty history has one learned interest (`towers.InterestNetwork`);
- what one had before is likelier or less likely by a learned weight (`repetition`).

Letters: B users, K interests, L history, D width, A width of the attention, N items, k items of a list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError, require_counts, require_weights
from tiglon.nn.interests import label_aware, route
from tiglon.nn.transformer import HIDDEN, Linear
from tiglon.retrieval.dense import DenseConfig, DenseRetriever
from tiglon.retrieval.retriever import require_k
from tiglon.retrieval.topk import tie_keys
from tiglon.retrieval.towers import InterestNetwork, Past
from tiglon.retrieval.windows import REMEMBERED
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Candidates, Histories


@dataclass(frozen=True)
class ComiRecConfig(DenseConfig):
    extractor: Literal["dr", "sa"] = "sa"
    interests: int = 4  # paper: 4
    iterations: int = 3  # of routing; paper: 3
    attention: int = 4  # width of SA's attention, in widths; paper: 4
    window: int = 20  # paper: 20
    disagreement: float = 0.0  # λ of the regulariser; paper: none
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor not in ("dr", "sa"):
            raise ConfigError(f"extractor={self.extractor!r}", rule="The extractor is 'dr' or 'sa'")
        require_counts(self, "interests", "iterations", "attention")
        require_weights(self, "disagreement")


class DynamicRouting(nn.Module):
    """Algorithm 1: each position has a matrix for each interest, so zero logits do not leave them alike."""

    def __init__(self, config: ComiRecConfig) -> None:
        super().__init__()
        c = self.config = config
        noise = torch.randn(c.window, c.interests, c.width, c.width) * (0.5 * c.width**-0.5)
        self.matrix = nn.Parameter(torch.eye(c.width) + noise)

    def forward(self, x_BLD: Tensor, position_BL: Tensor, mask_BL: Tensor) -> Tensor:
        c, (users, length, width) = self.config, x_BLD.shape
        votes = x_BLD.new_zeros(users, c.interests, length, width, dtype=torch.float32)
        for position in range(int(position_BL.max()) + 1 if length else 0):  # one product for all who have it
            row, at = torch.nonzero(position_BL == position, as_tuple=True)
            vote = torch.einsum("nd,kde->nke", x_BLD[row, at], self.matrix[position]).float()
            votes = votes.index_put((row[:, None], torch.arange(c.interests), at[:, None]), vote)
        logits = torch.zeros(users, c.interests, length)
        present = torch.ones(users, c.interests, dtype=torch.bool)
        return route(votes, logits, mask_BL, present, c.iterations, 1.0)[0]


class SelfAttention(nn.Module):
    """eq. 3–5: an interest is a mean of the behaviours, weighted by what they are and where they stand."""

    def __init__(self, config: ComiRecConfig) -> None:
        super().__init__()
        c = config
        self.position = nn.Embedding(c.window, c.width)
        nn.init.normal_(self.position.weight, std=c.width**-0.5)
        self.w1 = Linear(c.width, c.attention * c.width, 1.0)
        self.w2 = Linear(c.attention * c.width, c.interests, (c.attention * c.width) ** -0.5)

    def weights(self, x_BLD: Tensor, position_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, K, L): rows sum to 1 over what is there, and are zero where nothing is."""
        score_BLK = self.w2(torch.tanh(self.w1(x_BLD + self.position(position_BL)))).float()
        hidden = score_BLK.masked_fill(~mask_BL[..., None], HIDDEN)
        return hidden.softmax(dim=1).nan_to_num(0.0).transpose(1, 2)

    def forward(self, x_BLD: Tensor, position_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.weights(x_BLD, position_BL, mask_BL) @ x_BLD.float()


class ComiRecNetwork(InterestNetwork):
    """items: N.   content: as in `ItemTower`."""

    def __init__(self, items: int, config: ComiRecConfig, content: np.ndarray | int | None = None) -> None:
        c = config
        super().__init__(items, c.width, c.dropout, c.disagreement, content)
        self.config = c
        self.extractor = DynamicRouting(c) if c.extractor == "dr" else SelfAttention(c)

    def extract(self, x_BLD: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        c = self.config
        position = (past.age - 1).clamp(0, c.window - 1)
        interests = self.extractor(x_BLD, position, past.mask)
        return interests, torch.ones(len(x_BLD), c.interests, dtype=torch.bool)

    def read_out(self, interests_BKD: Tensor, present_BK: Tensor, target_BD: Tensor) -> Tensor:
        """eq. 6: the interest that fits the target best, alone."""
        return label_aware(interests_BKD, present_BK, target_BD, math.inf)


class ComiRec(DenseRetriever):
    """Retrieve by the best product of a user's interests with an item.

    ComiRec(items.vocabulary, ComiRecConfig(extractor="dr")).fit(split.train, split.validation)
    """

    Config = ComiRecConfig
    config: ComiRecConfig

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"comirec {self.config.extractor}"

    def _network(self, content: np.ndarray | int | None) -> ComiRecNetwork:
        return ComiRecNetwork(len(self.items), self.config, content)

    def retrieve_diverse(
        self,
        histories: Histories,
        k: int,
        categories: np.ndarray,
        weight: float,
        *,
        exclude_seen: bool = True,
        deny: np.ndarray | None = None,
    ) -> Candidates:
        """Lists of k that trade fit for variety, out of the union of each interest's k best.

        categories: (N,) one label an item.   weight: λ; 0 is the plain merged list.   Scores as in `aggregate`.
        """
        require_k(k)
        if len(categories) != len(self.items):
            raise DataError(f"categories of {len(categories)} items for a catalogue of {len(self.items)}")
        item, score = [], []
        _, vectors, index = self._ready()
        for start in range(0, max(len(histories), 1), 256):
            some = histories.take(slice(start, start + 256))
            interests, present = self.users(some)
            users, many, width = interests.shape
            hidden = some if exclude_seen else some.last(REMEMBERED)
            each = np.repeat(np.arange(users), many)
            lists = index.search(
                interests.reshape(users * many, width),
                k,
                present=present.reshape(-1, 1),
                seen=hidden.take(each),
                deny=deny,
            )
            owner, had, had_fit = self._had(some, interests, present, deny)
            for b in range(users):
                found = lists.item[b * many : (b + 1) * many]
                union = np.unique(found[found != MISSING])
                fit = (interests[b][present[b]] @ vectors[union].T).max(axis=0, initial=-np.inf)
                if not exclude_seen:
                    union = np.concatenate([union, had[owner == b]])
                    fit = np.concatenate([fit, had_fit[owner == b]])
                place, gain = aggregate(fit, categories[union], k, weight, tie_keys(union))
                row = np.full(min(k, len(self.items)), MISSING, np.int64)
                row[: len(place)] = union[place]
                item.append(row)
                score.append(np.pad(gain, (0, len(row) - len(gain)), constant_values=-np.inf))
        shape = (len(histories), min(k, len(self.items)))
        rows = np.array(item, np.int64).reshape(shape), np.array(score, np.float32).reshape(shape)
        return Candidates(*rows, self.name)


def aggregate(
    fit: np.ndarray, category: np.ndarray, k: int, weight: float, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the min(k, n) chosen of n items, in the order of their choice, and what each brought:
    its fit − weight · (items of its category chosen before). What they bring never rises.

    fit, category: (n,).   order: (n,) which of equal gains goes first, the lower. Raises ConfigError for a weight
    below 0 or infinite.
    """
    if not 0 <= weight < np.inf:
        raise ConfigError(f"a weight of {weight}", rule="The weight of variety is at least 0 and finite")
    gain = fit.astype(np.float64)
    chosen, gained = [], []
    for _ in range(min(k, len(fit))):
        best = int(np.lexsort((order, -gain))[0])
        chosen.append(best)
        gained.append(gain[best])
        gain[category == category[best]] -= weight
        gain[best] = -np.inf
    lowest = np.finfo(np.float32).min  # of a weight that float32 cannot hold
    return np.array(chosen, np.int64), np.maximum(gained, lowest).astype(np.float32)
