"""What networks of dense retrieval share: the past that they read, vectors of items, vectors of users.

Letters: B users, K interests, L history, N items, C width of the content, D width, T targets.
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.interests import disagreement
from tiglon.nn.transformer import Dropout
from tiglon.retrieval.prefixes import QUIET, centred, mean_row, mean_vector, principal_axes
from tiglon.retrieval.repetition import Repetition
from tiglon.retrieval.softmax import Negatives, catalogue_softmax, sampled_softmax
from tiglon.retrieval.windows import Batch

STRANGERS = 0.1  # of the users in training, who are taken for nobody known
OWN = 2 * QUIET  # size of an item's first random vector where content speaks from the start


class Past(NamedTuple):
    """What B users did before some moment.

    item, moment: (B, L) int64, as in `windows.Batch`.   now: (B,) the moment to predict: only what lies
    before it is read.   user: (B,) int64, as `Histories.user` has it, −1 for a stranger.
    """

    item: Tensor
    moment: Tensor
    now: Tensor
    user: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Past:
        """Of a batch whose rows have one target each."""
        return cls(batch.item, batch.moment, batch.moment[batch.target], batch.user)

    @property
    def mask(self) -> Tensor:
        """(B, L) bool: what is past."""
        return self.moment < self.now[:, None]

    @property
    def age(self) -> Tensor:
        """(B, L) int64 moments ago, 1 for the latest; below 1 where nothing is past."""
        return self.now[:, None] - self.moment


class ItemTower(nn.Module):
    """An item's vector: its own, plus its content through one projection that begins as the principal axes.

    content: (N, C), or the width C where it is to come from a file; None for ids alone.
    """

    def __init__(self, items: int, width: int, content: np.ndarray | int | None = None) -> None:
        super().__init__()
        self.own = nn.Embedding(items, width)
        nn.init.normal_(self.own.weight, std=(1.0 if content is None else OWN) * width**-0.5)
        self.content: Tensor | None
        self.mean: Tensor | None
        if content is None:
            self.register_buffer("content", None)
            self.register_buffer("mean", None)
            return
        if isinstance(content, int):
            content = np.zeros((items, content), np.float32)
        mean = mean_vector(content)
        content = centred(content, mean)
        self.register_buffer("content", torch.from_numpy(content))
        self.register_buffer("mean", torch.from_numpy(mean))
        self.project = nn.Parameter(torch.from_numpy(principal_axes(content, width)))

    def table(self) -> Tensor:
        """(N, D) of all items."""
        own = self.own.weight
        return own if self.content is None else own + self.content @ self.project

    def forward(self, item: Tensor, table: Tensor | None = None) -> Tensor:
        """(…, D) of dense items (…), out of `table` where that was made already."""
        if table is not None:
            return F.embedding(item, table)
        own = self.own(item)
        return own if self.content is None else own + self.content[item] @ self.project

    def products(self, user: Tensor, item: Tensor) -> Tensor:
        """(T, M) of users (T, D) with dense items (T, M), many of them the same."""
        distinct, at = item.unique(return_inverse=True)
        return (user @ self(distinct).T).gather(1, at)

    @torch.no_grad()
    def add(self, content: np.ndarray) -> None:
        """New items after the old, by their content (M, C) float32.

        What they have of their own is the mean of those that are known: there a softmax has put that most items
        are wanted little. At zero, new items would take twice the places that they are worth.
        """
        if self.content is None or self.mean is None:
            raise ConfigError(
                "new items for a retriever that knows items by their ids alone",
                rule="An item without events is known by its content",
                fix="Give `vectors` when the retriever is made, and fit it anew",
            )
        more = torch.from_numpy(centred(content, self.mean.numpy()))
        own = self.own.weight
        own = torch.cat([own, mean_row(own).expand(len(content), -1)])
        self.own = nn.Embedding.from_pretrained(own, freeze=False)
        self.content = torch.cat([self.content, more])


class HashedUsers(nn.Module):
    """A vector of who the user is, shared by those in one of `buckets`; strangers have one of their own, which is
    learned from every tenth user.

    buckets: 0 for no vector at all, which is (B, 0).
    """

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.buckets, self.width = buckets, width if buckets else 0
        self.vector = nn.Embedding(buckets + 1, self.width)
        nn.init.normal_(self.vector.weight, std=max(width, 1) ** -0.5)

    def forward(self, user: Tensor) -> Tensor:
        """(B, width) of hashed users (B,), −1 for a stranger."""
        if not self.buckets:
            return self.vector.weight.new_zeros(len(user), 0)
        stranger = user < 0
        if self.training:
            stranger = stranger | (torch.rand(len(user)) < STRANGERS)
        return self.vector(torch.where(stranger, self.buckets, user % self.buckets))


class DenseNetwork(nn.Module, abc.ABC):
    """Items have a vector each, users one or several; a score is the best product.

    repetition: what is added to its logit where the user had the item.   temperature: score of a logit of 1.
    """

    items: ItemTower
    repetition: Repetition
    temperature: float = 1.0

    def vectors(self) -> Tensor:
        """(N, D) of the items, as they are scored."""
        return self.items.table()

    @abc.abstractmethod
    def users(self, past: Past, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Interests (B, K, D) and which of them there are (B, K) bool. table: (N, D), `items.table()`."""

    @abc.abstractmethod
    def loss(self, batch: Batch, negatives: Negatives | None = None) -> Tensor:
        """(T,) of the batch's targets; over the whole catalogue, or over drawn negatives."""


class InterestNetwork(DenseNetwork):
    """Networks that read several interests out of a set of behaviours (MIND, ComiRec): what is theirs alone
    is `extract` and `read_out`.

    weight: λ of the disagreement; the loss is that of the next item − λ · disagreement.

    Interests are multiplied by one learned scale, because capsules are shorter than 1 and a softmax over
    such products cannot be sharp. An empty history has one learned interest.
    """

    def __init__(
        self, items: int, width: int, dropout: float, weight: float, content: np.ndarray | int | None
    ) -> None:
        super().__init__()
        self.items = ItemTower(items, width, content)
        self.stranger = nn.Parameter(torch.randn(width) * width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.dropout = Dropout(dropout)
        self.weight = weight
        self.repetition = Repetition()

    @abc.abstractmethod
    def extract(self, x_BLD: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Interests (B, K, D) and their presence (B, K) from the vectors of what is past."""

    @abc.abstractmethod
    def read_out(self, interests_BKD: Tensor, present_BK: Tensor, target_BD: Tensor) -> Tensor:
        """(B, D): the user as one vector, knowing the target; for training alone."""

    def users(self, past: Past, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        interests, present = self.extract(self.dropout(self.items(past.item, table)), past)
        nobody = ~past.mask.any(dim=1)
        first = torch.arange(interests.shape[1]) == 0
        interests = torch.where(nobody[:, None, None], self.stranger.to(interests.dtype), interests)
        present = torch.where(nobody[:, None], first, present)
        return interests * self.log_scale.exp(), present

    def loss(self, batch: Batch, negatives: Negatives | None = None) -> Tensor:
        table = self.items.table() if negatives is None else None
        target = batch.item[batch.target]
        past = Past.of(batch)
        interests, present = self.users(past, table)
        target_TD = self.items(target, table)
        user_TD = self.read_out(interests, present, target_TD)
        had = self.repetition.before(batch)
        if negatives is None:
            assert table is not None
            loss = catalogue_softmax(user_TD, table, target, had)
        else:
            drawn, had_TM = self.items(negatives.item), self.items.products(user_TD, had.item)
            loss = sampled_softmax(user_TD, target_TD, drawn, target, negatives, had, had_TM)
        return loss - self.weight * disagreement(interests, present) if self.weight else loss
