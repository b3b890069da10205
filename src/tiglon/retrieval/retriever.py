"""What every retriever is: histories in, candidates out; and, for people, raw ids in and raw ids out."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiglon.data.histories import HistoryStore
from tiglon.errors import ConfigError, DataError
from tiglon.types import MISSING, Candidates, Histories, Vocabulary


class Retriever(abc.ABC):
    """Finds a few hundred items for each user.

    A fitted retriever has `items`, the catalogue's vocabulary; with `log`, the stored histories,
    it also answers for users by their raw ids.
    """

    name: str
    items: Vocabulary
    log: HistoryStore | None = None

    @abc.abstractmethod
    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        """The k best items for each history, best first; fewer where the catalogue has fewer.

        Pass whole histories: a retriever keeps as much of them as it reads. With `exclude_seen`
        no item of a user's own history is returned.   deny: (N,) bool, items that nobody may get; they are
        left out inside the search, so that a list is as long as the others allow.
        """

    def recommend(
        self,
        users: Sequence[Any] | None = None,
        k: int = 10,
        history: Sequence[Sequence[Any]] | None = None,
        exclude_seen: bool = True,
    ) -> list[list[tuple[Any, float]]]:
        """(raw item id, score) lists, best first, for known users or for given histories.

        users: raw user ids, whose stored histories are read.
        history: instead of `users`, one list of raw item ids a user, oldest first; unknown items are skipped.
        Raises UnknownIdError for a user that the log does not have, ConfigError for a bad k and for both.
        """
        require_k(k)
        require_one(users, history)
        if history is not None:
            dense = [self.items.encode(items) for items in history]
            histories = Histories.of([items[items != MISSING] for items in dense])
        elif self.log is not None and users is not None:
            histories = self.log.before(self.log.users.require(users, "user"))
        else:
            raise ConfigError("neither a stored log nor a history", fix="Pass history=[[item ids], …]")
        return raw_lists(self.retrieve(histories, k, exclude_seen=exclude_seen), self.items)

    def alike(self, items: np.ndarray, k: int) -> Candidates:
        """The k items most alike to each of these dense items (B,), never itself; perhaps fewer.

        Raises ConfigError from a retriever that compares no items, such as popularity.
        """
        raise ConfigError(
            f"'{self.name}' compares no items",
            fix="Ask one that does, such as text neighbours, co-occurrence, SASRec or TIGER",
        )

    def similar_items(self, items: Sequence[Any], k: int = 10) -> list[list[tuple[Any, float]]]:
        """(raw item id, score) lists for raw item ids, best first. Raises UnknownIdError, ConfigError."""
        require_k(k)
        return raw_lists(self.alike(self.items.require(items, "item"), k), self.items)


def raw_lists(found: Candidates, items: Vocabulary) -> list[list[tuple[Any, float]]]:
    """(raw item id, score) lists."""
    return [
        [(item, float(s)) for item, s in zip(items.decode(row[row != MISSING]), score, strict=False)]
        for row, score in zip(found.item, found.score, strict=True)
    ]


def require_one(users: object, history: object) -> None:
    """Raise ConfigError for users and histories at once: which of two lives counts?"""
    if users is not None and history is not None:
        raise ConfigError(
            "users and a history", rule="A stored life is read, or a given one", fix="Pass one of them"
        )


def require_k(k: int) -> None:
    """Raise ConfigError unless k is a positive number of candidates."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k of {k!r}", rule="k is a whole number of at least 1")


def item_matrix(vectors: Any, items: int, what: str = "item vectors", width: int | None = None) -> np.ndarray:
    """Vectors as (N, C) float32. Raises DataError unless there is a finite one for each of `items`, C of `width`."""
    same = "all of one width" if width is None else f"{width} wide, from the encoder of the old ones"
    rule = f"There is one finite vector for each of {items} items, {same}"
    try:
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} that are no matrix of numbers", rule=rule) from error
    fits = rows.ndim == 2 and len(rows) == items and width in (None, rows.shape[1])
    if not fits or not np.isfinite(rows).all():
        strange = int((~np.isfinite(rows)).sum())
        also = f" with {strange} numbers that are not finite" if strange else ""
        raise DataError(f"{what} of shape {rows.shape}{also}", rule=rule)
    return rows
