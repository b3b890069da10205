"""SASRec: self-attention over what a user did, a product with every item, nothing generated.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, https://arxiv.org/abs/1808.09781

Idea. The state after each event predicts the next one: its product with an item's vector is the item's
score. All events of a life are targets of one causal pass. It is the baseline that generative retrieval must beat.

Covered: §III-A embedding (shared between input and prediction), §III-B self-attention, point-wise
feed-forward, residual connections; §III-D prediction.

Deviations:
- the loss is the cross-entropy over the whole catalogue (eq. 7 has one drawn negative), which later studies
  find decides the comparison (Klenitskiy and Vasilev, https://arxiv.org/abs/2309.07602); beyond 50,000 items
  over 8,192 drawn ones, corrected (`softmax.py`);
- relative biases over moments rather than absolute positions; events of one moment (a basket) see each other
  but no target of their own moment; T5's blocks (pre-norm, RMSNorm);
- a matrix between state and product; where the last moment is a basket, the state is the mean over it;
- a start state, so that first events are targets too and an empty history has an answer;
- what one had before is likelier or less likely by a learned weight (`repetition`);
- with `vectors`, an item's vector is its own plus its content through one projection that begins as the
  principal axes, as TIGER's prefix vectors do (`towers.ItemTower`); without, ids alone, as published.

Cost: a product with N items a target, in training and in answering.

Letters: B users, L history, Q queries of a row, N items, D width, C width of the content, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, require_counts
from tiglon.nn.moments import START, MomentBias, latest
from tiglon.nn.transformer import Dropout, EncoderLayer, Linear
from tiglon.retrieval.dense import DenseConfig, DenseRetriever
from tiglon.retrieval.repetition import Repetition
from tiglon.retrieval.softmax import Negatives, catalogue_softmax, sampled_softmax
from tiglon.retrieval.towers import DenseNetwork, ItemTower, Past
from tiglon.retrieval.windows import Batch, overlapping_windows
from tiglon.train.loop import TrainConfig


@dataclass(frozen=True)
class SasRecConfig(DenseConfig):
    width: int = 128  # paper: 50
    heads: int = 4  # paper: 1
    hidden: int = 512  # paper: the width
    layers: int = 2  # paper: 2
    dropout: float = 0.3  # paper: 0.5 on sparse data
    distances: int = 32  # buckets of the relative bias, in moments
    window: int = 50  # paper: 50
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "layers", "heads", "hidden", "distances")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width}, heads={self.heads}", rule="The heads share the width")


class SasRecNetwork(DenseNetwork):
    """items: N.   content: as in `ItemTower`."""

    def __init__(self, items: int, config: SasRecConfig, content: np.ndarray | int | None = None) -> None:
        super().__init__()
        c = config
        self.width = c.width
        self.items = ItemTower(items, c.width, content)
        self.start = nn.Parameter(torch.randn(c.width))
        block = (c.width, c.heads, c.width // c.heads, c.hidden, c.dropout)
        self.layers = nn.ModuleList(EncoderLayer(*block) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.bias = MomentBias(c.heads, c.distances)
        self.query = Linear(c.width, c.width, 0.0)
        nn.init.eye_(self.query.weight)
        self.dropout = Dropout(c.dropout)
        self.repetition = Repetition()

    def states(self, x_BLD: Tensor, moment_BL: Tensor, query_BQ: Tensor) -> Tensor:
        """(B, Q, D): what is known strictly before each moment of `query_BQ`."""
        x = x_BLD * self.width**0.5
        x = self.dropout(torch.cat([self.start.expand(len(x), 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=START)
        bias = self.bias(moment, moment, own=True)
        for layer in self.layers:
            x, _ = layer(x, bias)
        return self.query(latest(self.dropout(self.norm(x)), moment, query_BQ))

    def users(self, past: Past, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = self.states(self.items(past.item, table), past.moment, past.now[:, None])
        return states, torch.ones(len(states), 1, dtype=torch.bool)

    def loss(self, batch: Batch, negatives: Negatives | None = None) -> Tensor:
        """(T,) −log p(item), of all targets of a row in one pass."""
        table = self.items.table() if negatives is None else None
        x_BLD = self.items(batch.item, table)
        state_TD = self.states(x_BLD, batch.moment, batch.moment)[batch.target]
        target = batch.item[batch.target]
        had = self.repetition.before(batch)
        if table is not None:
            return catalogue_softmax(state_TD, table, target, had)
        assert negatives is not None
        drawn, own = self.items(negatives.item), x_BLD[batch.target]
        had_TM = self.items.products(state_TD, had.item)
        return sampled_softmax(state_TD, own, drawn, target, negatives, had, had_TM)


class SasRec(DenseRetriever):
    """Retrieve by the product of a user's state with every item.

    SasRec(items.vocabulary, vectors=vectors).fit(split.train, split.validation)
    """

    name = "sasrec"
    Config = SasRecConfig
    config: SasRecConfig

    def _network(self, content: np.ndarray | int | None) -> SasRecNetwork:
        return SasRecNetwork(len(self.items), self.config, content)

    def _windows(self, offsets: np.ndarray, moment: np.ndarray) -> np.ndarray:
        return overlapping_windows(offsets, moment, self.config.window)
