"""What is in your tables: a verdict a line. Bad tables make fatal verdicts, never an exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from tiglon.data.events import (
    Table,
    clean_ids,
    clean_times,
    floats_once,
    ids_of,
    k_core,
    read_interactions,
    read_items,
    read_table,
    rename,
    same_type,
)
from tiglon.data.split import LEAKING_CORRELATION, appearance_correlation, moment_starts
from tiglon.data.text import has_words, text_columns
from tiglon.errors import DataError, TiglonError
from tiglon.types import MISSING, Interactions, Items

Level = Literal["ok", "note", "warning", "fatal"]


@dataclass(frozen=True)
class Verdict:
    """One line: how bad, about what, and what was found."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8}{self.subject:<18}{self.text}"


def is_valid(verdicts: Sequence[Verdict]) -> bool:
    """Whether Tiglon can work with these tables: nothing is fatal."""
    return all(verdict.level != "fatal" for verdict in verdicts)


def inspect(
    interactions: Table,
    items: Table | None = None,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
) -> list[Verdict]:
    """Verdicts on a log and, if given, its item table; see `is_valid`."""
    try:
        table = read_table(interactions, ids=(user, item))
    except TiglonError as error:
        return [Verdict("fatal", "interactions", str(error))]
    verdicts = [_columns("interactions", table)]
    verdicts += _required(table, user, item, time)
    if is_valid(verdicts):
        log = read_interactions(table, user=user, item=item, time=time)
        log = replace(log, items=ids_of(interactions, log.items.raw))
        verdicts += [_duplicates(table, log), *_log(log, table[time].dtype)]
    else:
        log = None
    if items is not None:
        verdicts += _items(items, item, log)
    return verdicts


def _columns(subject: str, table: pl.DataFrame) -> Verdict:
    columns = ", ".join(f"{name} {kind}" for name, kind in table.schema.items())
    return Verdict("ok", subject, f"{table.height:,} rows; {columns}")


def _required(table: pl.DataFrame, user: str, item: str, time: str) -> list[Verdict]:
    """The three columns that a log needs, each looked at alone, so that all faults show at once."""
    verdicts = []
    if table.height == 0:
        verdicts.append(Verdict("fatal", "interactions", "The table has no rows."))
    for name, clean in ((user, clean_ids), (item, clean_ids), (time, clean_times)):
        if name not in table.columns:
            text = f"The column is missing. {rename(name, table.columns)}."
            verdicts.append(Verdict("fatal", name, text))
            continue
        try:
            clean(table[name])
        except DataError as error:
            verdicts.append(Verdict("fatal", name, str(error)))
        else:
            verdicts.append(
                Verdict("ok", name, f"{table[name].dtype}, no nulls, {table[name].n_unique():,} distinct")
            )
            if name != time:
                verdicts += odd_ids(table[name])
    for name in set(table.columns) - {user, item, time}:
        nulls = table[name].null_count()
        if nulls:
            verdicts.append(Verdict("note", name, f"{nulls:,} nulls ({nulls / table.height:.1%})"))
    return verdicts


def odd_ids(column: pl.Series) -> list[Verdict]:
    """Warnings of strings that may not be the ids that were meant."""
    if column.dtype != pl.String:
        return []
    nothing = column.filter(column.str.contains(r"(?i)^(nan|null|none|n/?a|undefined)$"))
    padded = column.filter(column.str.contains(r"^\s|\s$"))
    doubts = (
        (nothing, "may stand for no id; then leave these lines out"),
        (padded, "begin or end with a blank, which is a part of the id"),
        (
            floats_once(column),
            "look like floats, which may have made one id of several; export them as integers",
        ),
    )
    return [
        Verdict("warning", column.name, f"{len(odd):,} of the ids, such as {odd[0]!r}, {doubt}")
        for odd, doubt in doubts
        if len(odd)
    ]


def _duplicates(table: pl.DataFrame, log: Interactions) -> Verdict:
    repeated = table.height - len(log)
    text = f"{repeated:,} rows repeat a user, item and time ({repeated / table.height:.2%}); the first of each stays"
    return Verdict("note" if repeated else "ok", "duplicates", text)


def _log(log: Interactions, times: pl.DataType) -> list[Verdict]:
    return [
        Verdict("ok", "size", f"{len(log):,} events, {len(log.users):,} users, {len(log.items):,} items"),
        time_span(log, times),
        _baskets(log),
        _lengths(log),
        _short_lives(log),
        _popularity(log),
        _repeats(log),
        _order(log),
        _core(log),
    ]


_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


def _unit(moment: int) -> str | None:
    """The unit that puts a moment into the years 1990 … 2100, where it is believed."""
    for unit, per_second in _UNITS.items():
        if 631_152_000 <= moment / per_second < 4_102_444_800:
            return unit
    return None


def _date(moment: int, unit: str) -> str:
    return str(datetime.fromtimestamp(moment / _UNITS[unit], timezone.utc).date())


def time_span(log: Interactions, kind: pl.DataType) -> Verdict:
    """From when to when, by the unit that makes calendar dates of it."""
    first, last = int(log.time.min()), int(log.time.max())
    unit, other = _unit(first), _unit(last)
    if unit is None or other is None or (unit != other and not kind.is_numeric()):
        text = f"{first} to {last} is no unit of calendar time: an order only; do not split by global time"
        return Verdict("note", "time", text)
    if unit != other:
        text = (
            f"two units are mixed: {first} is {_date(first, unit)} in {unit}, "
            f"{last} is {_date(last, other)} in {other}; write all times in one"
        )
        return Verdict("warning", "time", text)
    days = (last - first) / _UNITS[unit] / 86_400
    text = f"{_date(first, unit)} to {_date(last, unit)} ({days:,.0f} days), read as {unit}"
    return Verdict("ok", "time", text)


def _baskets(log: Interactions) -> Verdict:
    sizes = np.diff(np.append(moment_starts(log), len(log)))
    shared = sizes[sizes > 1].sum() / len(log)
    text = f"{shared:.1%} of the events share their user and time with others"
    if shared > 0.05:
        return Verdict(
            "note", "baskets", f"{text}; they count as one moment, and the next moment is what is predicted"
        )
    return Verdict("ok", "baskets", text)


def _lengths(log: Interactions) -> Verdict:
    lengths = np.bincount(log.user)
    low, middle, high, top = np.percentile(lengths, [10, 50, 90, 99])
    return Verdict(
        "ok",
        "events a user",
        f"mean {lengths.mean():.1f}, median {middle:.0f}, 10–90% {low:.0f}–{high:.0f}, "
        f"99% {top:.0f}, most {lengths.max():,}",
    )


def _short_lives(log: Interactions) -> Verdict:
    moments = np.bincount(log.user[moment_starts(log)], minlength=len(log.users))
    single, short = int((np.bincount(log.user) == 1).sum()), int((moments < 3).sum())
    text = f"{single:,} users have one event; {short:,} have fewer than three moments and cannot be tested"
    return Verdict(
        "warning" if short > len(log.users) / 2 else "note" if short else "ok", "short lives", text
    )


def _popularity(log: Interactions) -> Verdict:
    counts = np.sort(np.bincount(log.item))[::-1]
    top = max(1, len(counts) // 100)
    share = counts[:top].sum() / len(log)
    few = float((counts < 5).mean())
    text = f"the top 1% of the items ({top:,}) take {share:.1%} of the events; {few:.1%} of the items have fewer than 5"
    return Verdict("note" if share > 0.5 else "ok", "popularity", text)


def _repeats(log: Interactions) -> Verdict:
    pairs = log.user.astype(np.int64) * len(log.items) + log.item
    share = 1 - len(np.unique(pairs)) / len(log)
    text = f"{share:.1%} of the events are of an item that the user had before"
    if share > 0.1:
        return Verdict(
            "warning", "repeats", f"{text}: recommend with exclude_seen=False, or these cannot be hit"
        )
    return Verdict("ok", "repeats", text)


def _order(log: Interactions) -> Verdict:
    if not pa.types.is_integer(log.items.raw.type):
        return Verdict("ok", "id order", "item ids are strings and cannot be used as numbers")
    raw = log.items.raw.to_numpy(zero_copy_only=False)[log.item]
    correlation = appearance_correlation(log, raw)
    text = f"rank correlation of item ids with first appearance {correlation:+.2f}"
    if abs(correlation) >= LEAKING_CORRELATION:
        return Verdict("warning", "id order", f"{text}: ids used as numbers would show the future")
    return Verdict("ok", "id order", text)


def _core(log: Interactions) -> Verdict:
    try:
        core = k_core(log, 5, 5)
    except DataError:
        return Verdict("note", "5-core", "nothing is left: no group of users and items with 5 events each")
    text = f"{len(core):,} events, {len(core.users):,} users, {len(core.items):,} items ({len(core) / len(log):.1%}) are left"
    return Verdict("ok", "5-core", text)


def _items(source: Table, item: str, log: Interactions | None) -> list[Verdict]:
    try:
        table = read_table(source, ids=(item,))
        verdicts = [_columns("items", table)]
        catalogue = read_items(table, item=item)
    except TiglonError as error:
        return [Verdict("fatal", "items", str(error))]
    verdicts.append(_text(catalogue))
    if log is not None:
        catalogue = Items(ids_of(source, catalogue.vocabulary.raw), catalogue.table)
        verdicts.append(_coverage(log, catalogue))
    return verdicts


def _text(items: Items) -> Verdict:
    """Of the columns that training reads."""
    columns = text_columns(items)
    if not columns:
        return Verdict("warning", "item text", "no column of words: items can be known by their events only")
    filled = np.stack([has_words(items, name).to_numpy() for name in columns])
    without = int((~filled.any(axis=0)).sum())
    text = ", ".join(f"{name} {share:.1%}" for name, share in zip(columns, filled.mean(axis=1), strict=True))
    level: Level = "warning" if without > len(items) / 10 else "note" if without else "ok"
    return Verdict(level, "item text", f"{without:,} items have none; filled: {text}")


def _coverage(log: Interactions, catalogue: Items) -> Verdict:
    try:
        raw, items = same_type(log.items, catalogue)
    except DataError as error:
        return Verdict("fatal", "log and items", str(error))
    absent = items.vocabulary.encode(raw) == MISSING
    if absent.all():
        text = f"no item of the log is in the table: {raw[0]!r} in the log, {items.vocabulary.raw[0]!s} in the table"
        return Verdict("fatal", "log and items", text if len(items) else "the item table has no rows")
    events = int(absent[log.item].sum())
    text = (
        f"{int(absent.sum()):,} items of the log are not in the table ({events / len(log):.1%} of the events)"
    )
    if log.items.raw.type != catalogue.vocabulary.raw.type:
        text = f"{text}; the integers of the CSV count as strings, as in the other table"
    if absent.any():
        return Verdict("warning", "log and items", f"{text}; they join it without text")
    return Verdict("ok", "log and items", text)
