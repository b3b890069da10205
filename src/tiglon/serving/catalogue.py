"""One moment of the catalogue: a bundle, which of its items may be returned, and who stands in for the new ones.

A change makes the next `Catalogue`; a request keeps the one that it began with.

Letters: N items, D width of their vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from tiglon.data.text import render
from tiglon.errors import DataError, SchemaError, did_you_mean
from tiglon.retrieval.topk import tie_order
from tiglon.serving.bundle import Bundle
from tiglon.serving.funnel import Funnel
from tiglon.serving.remembered import Remembered
from tiglon.types import MISSING, Items, Vocabulary

_TEXT = 200  # characters shown of an item


@dataclass(frozen=True, eq=False)
class Catalogue:
    bundle: Bundle

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
        """(N,) each item; for a new one the trained item with the nearest vector, MISSING where there is none."""
        found = np.arange(len(self))
        if len(self) > self.trained:
            found[self.trained :] = self.nearest(np.arange(self.trained, len(self)), 1)[0][:, 0]
        return found

    def nearest(self, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(M, k) the trained items with the nearest vectors, best first, and their cosines."""
        vectors = np.asarray(self.bundle.vectors, np.float32)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)[:, None]
        cosine = unit[items] @ unit[: self.trained].T
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        cosine = np.take_along_axis(cosine, best, axis=1)
        return np.where(cosine > 0, best, MISSING), cosine

    @cached_property
    def silent(self) -> np.ndarray:
        """(N,) bool: new items whose content is like that of no other, as where it is empty."""
        return self.stand_in == MISSING

    @cached_property
    def newcomers(self) -> dict[int, list[int]]:
        """Trained item → the new ones that stand behind it."""
        behind: dict[int, list[int]] = {}
        for item in range(self.trained, len(self)):
            if self.alive[item]:
                behind.setdefault(int(self.stand_in[item]), []).append(item)
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
        # It answers in the name of the bundle that was published; the changes are kept beside that.
        bundle = replace(bundle, manifest=self.bundle.manifest, path=self.bundle.path)
        return Catalogue(bundle), len(new), changed.height

    def without(self, items: np.ndarray) -> Catalogue:
        """Dense items are never returned again. Raises DataError where no item would be left."""
        left = int(self.alive.sum()) - int(self.alive[items].sum())
        if not left:
            raise DataError("a removal of all items", rule="A catalogue keeps at least one item")
        bundle = self.bundle.remove_items(items)
        return Catalogue(replace(bundle, manifest=self.bundle.manifest, path=self.bundle.path))


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
