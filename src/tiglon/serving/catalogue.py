"""One moment of the catalogue: a bundle, which of its items may be returned, and who stands in for the new ones.

A change makes the next `Catalogue`; a request keeps the one that it began with.

Letters: N items, D width of their vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from tiglon.data.text import render
from tiglon.errors import DataError, SchemaError, did_you_mean
from tiglon.retrieval.index import ExactIndex
from tiglon.retrieval.topk import tie_order
from tiglon.serving.bundle import Bundle
from tiglon.serving.funnel import Funnel
from tiglon.serving.remembered import Remembered
from tiglon.types import MISSING, Items, Vocabulary

_TEXT = 200  # characters shown of an item
_LIKES = 5  # items behind which a new one may stand: more, should the nearest be hidden from a user


@dataclass(frozen=True, eq=False)
class Catalogue:
    bundle: Bundle
    # What the catalogue before knew of the first of the new items: their `stand_in`, their `likes`.
    _stood: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _liked: np.ndarray = field(default_factory=lambda: np.empty((0, _LIKES), np.int64))

    def __len__(self) -> int:
        """How many items, removed ones too."""
        return len(self.bundle.items)

    @property
    def items(self) -> Vocabulary:
        return self.bundle.items.vocabulary

    @property
    def alive(self) -> np.ndarray:
        """(N,) bool: not removed."""
        return self.bundle.tiger.ids.alive

    @cached_property
    def whole(self) -> bool:
        """Whether nothing was removed."""
        return bool(self.alive.all())

    @cached_property
    def trained(self) -> int:
        """The first so many items are known to the retrievers without training."""
        return len(self.bundle.neighbours.items)

    @cached_property
    def stand_in(self) -> np.ndarray:
        """(N,) each item; for a new one the trained item with the nearest vector, removed or not, MISSING where
        there is none."""
        found = np.arange(len(self))
        known = self.trained + len(self._stood)
        found[self.trained : known] = self._stood
        if len(self) > known:
            found[known:] = self.nearest(np.arange(known, len(self)), 1)[0][:, 0]
        return found

    @cached_property
    def likes(self) -> np.ndarray:
        """(M, 5) the living trained items with the nearest vectors of each new one, best first, then MISSING."""
        found = np.full((len(self) - self.trained, _LIKES), MISSING, np.int64)
        found[: len(self._liked)] = self._liked
        stale = ((found != MISSING) & ~self.alive[found]).any(axis=1)
        stale[len(self._liked) :] = True
        if stale.any():
            near = self.nearest(self.trained + np.flatnonzero(stale), _LIKES, alive=True)[0]
            found[stale] = MISSING
            found[stale, : near.shape[1]] = near
        return found

    def nearest(self, items: np.ndarray, k: int, *, alive: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(M, k) the trained items with the nearest vectors, best first, and their cosines.

        alive: only those that were not removed.
        """
        deny = ~self.alive[: self.trained] if alive else None
        found = self._index.search(_unit(self.bundle.vectors[items]), k, deny=deny)
        return np.where(found.score > 0, found.item, MISSING), found.score

    @cached_property
    def _index(self) -> ExactIndex:
        return ExactIndex(_unit(self.bundle.vectors[: self.trained]))

    @cached_property
    def silent(self) -> np.ndarray:
        """(N,) bool: new items whose content is like that of no other, as where it is empty."""
        return self.stand_in == MISSING

    def newcomers(self, barred: np.ndarray) -> dict[int, list[int]]:
        """Trained item → the new ones that stand behind it, which is the nearest that is not `barred` (N,)."""
        nearest = self.likes[:, 0]
        if not barred[nearest[nearest != MISSING]].any():
            return self.behind_nearest
        free = (self.likes != MISSING) & ~barred[self.likes]
        first = self.likes[np.arange(len(free)), free.argmax(axis=1)]
        return self._behind(np.where(free.any(axis=1), first, MISSING))

    @cached_property
    def behind_nearest(self) -> dict[int, list[int]]:
        """`newcomers` where nothing is barred."""
        return self._behind(self.likes[:, 0])

    def _behind(self, like: np.ndarray) -> dict[int, list[int]]:
        behind: dict[int, list[int]] = {}
        for item, near in enumerate(like.tolist(), self.trained):
            if near != MISSING and self.alive[item]:
                behind.setdefault(near, []).append(item)
        return behind

    @cached_property
    def funnels(self) -> dict[bool, Funnel]:
        """By whether seen items are hidden."""
        return {hidden: self.bundle.funnel(hidden) for hidden in (True, False)}

    @cached_property
    def remembered(self) -> Remembered:
        """What slow retrievers answered since this moment of the catalogue began."""
        return Remembered()

    @cached_property
    def popular(self) -> np.ndarray:
        """(n,) all items that are alive, those with the most training events first."""
        counts = np.zeros(len(self), np.int64)
        counts[: self.trained] = self.bundle.popularity.counts
        order = np.lexsort((tie_order(len(self)), -counts))
        return order[self.alive[order]]

    def describe(self, items: np.ndarray, template: str | None = None) -> list[str]:
        """What the catalogue says about dense items, at most 200 characters each; their ids without words.

        template: as of `data.text.render`; None: the bundle's. Raises SchemaError for a column that is not there.
        """
        table = self.bundle.items.table[items.tolist()]
        template = template or self.bundle.text.template
        names = [str(raw) for raw in table["item_id"]]
        if not template or not len(items):
            return names
        rows = Items(Vocabulary(pl.Series(range(table.height))), table)  # an item may stand there twice
        return [words[:_TEXT] or name for words, name in zip(render(rows, template), names, strict=True)]

    @cached_property
    def texts(self) -> pl.Series:
        """(N,) `describe` of every item, in small letters."""
        return pl.Series(self.describe(np.arange(len(self))), dtype=pl.String).str.to_lowercase()

    def find(self, text: str, k: int) -> np.ndarray:
        """At most k items that are alive, whose id begins with `text` or whose description holds it."""
        ids = self.bundle.items.table["item_id"].cast(pl.String)
        there = ids.str.starts_with(text) | self.texts.str.contains(text.lower(), literal=True)
        return np.flatnonzero(there.to_numpy() & self.alive)[:k]

    # -- changes -------------------------------------------------------------------------------------

    def with_rows(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Catalogue, int, int]:
        """The next catalogue, how many rows were new items, and how many changed known ones.

        A changed item keeps its semantic ID. Raises SchemaError, DataError, CapacityError.
        """
        bundle, schema = self.bundle, self.bundle.items.table.schema
        ids = [row["item_id"] for row in rows]
        if len(set(ids)) < len(ids):
            raise DataError("an item that stands twice in `add`", rule="A request names an item once")
        for row in rows:
            for column in row:
                if column not in schema:
                    raise SchemaError(
                        f"item {row['item_id']!r} with the column '{column}'",
                        rule=f"The items of this bundle have {', '.join(schema)}",
                        fix=did_you_mean(column, schema),
                    )
        dense = self.items.encode(ids)
        gone = [raw for raw, at in zip(ids, dense, strict=True) if at != MISSING and not self.alive[at]]
        if gone:
            raise DataError(
                f"item {gone[0]!r}, which was removed",
                rule="A removed item never comes back",
                fix="Give it another id",
            )
        known = [(int(at), row) for at, row in zip(dense, rows, strict=True) if at != MISSING]
        table = bundle.items.table
        changed = _changed(table, known)
        if changed.height:
            table = table.update(changed, on="item_id", include_nulls=True)
            bundle = replace(bundle, items=Items(bundle.items.vocabulary, table))
        new = [dict(row) for at, row in zip(dense, rows, strict=True) if at == MISSING]
        if new:
            bundle = bundle.add_items(_table(new, schema))
        return self._next(bundle), len(new), changed.height

    def without(self, items: np.ndarray) -> Catalogue:
        """Dense items are never returned again. Raises DataError where no item would be left."""
        left = int(self.alive.sum()) - int(self.alive[items].sum())
        if not left:
            raise DataError("a removal of all items", rule="A catalogue keeps at least one item")
        return self._next(self.bundle.remove_items(items))

    def _next(self, bundle: Bundle) -> Catalogue:
        """The moment after a change. Vectors never change, so only those of newer items are compared anew."""
        # It answers in the name of the bundle that was published; the changes are kept beside that.
        bundle = replace(bundle, manifest=self.bundle.manifest, path=self.bundle.path)
        after = Catalogue(bundle, self.stand_in[self.trained :], self.likes)
        if "_index" in self.__dict__:
            after.__dict__["_index"] = self._index
        return after


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows (M, D) of length 1, as float32; rows of zeros stay."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9))


def _changed(table: pl.DataFrame, known: Sequence[tuple[int, Mapping[str, Any]]]) -> pl.DataFrame:
    """The whole new rows of those items whose row says something new."""
    rows = []
    for at, given in known:
        old = table.row(at, named=True)
        new = {**old, **given}
        if new != old:
            rows.append(new)
    return _table(rows, table.schema)


def _table(rows: Sequence[Mapping[str, Any]], schema: pl.Schema) -> pl.DataFrame:
    """Rows as a table of a bundle's own columns; null where a row says nothing. Raises SchemaError."""
    columns = []
    for name, kind in schema.items():
        values = [row.get(name) for row in rows]
        try:
            columns.append(pl.Series(name, values, dtype=kind, strict=True))
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            wrong = next((v for v in values if not _fits(v, kind)), values[0])
            raise SchemaError(
                f"{name}={wrong!r}",
                rule=f"The column '{name}' of this bundle's items is of type {kind}",
                fix="Give it a value of that type, or null",
            ) from error
    return pl.DataFrame(columns)


def _fits(value: Any, kind: Any) -> bool:
    try:
        pl.Series([value], dtype=kind, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return False
    return True
