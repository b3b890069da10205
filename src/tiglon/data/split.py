"""Splits that cannot leak: leave-last-out, by global time, and the checks.

A *moment* is all lines of one user with one timestamp: a basket, a page of ratings. It never straddles a
split, and its lines never count as "next" of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from tiglon.errors import ConfigError, DataError, LeakageError, SchemaError, did_you_mean
from tiglon.types import Histories, Interactions, Targets, user_names


@dataclass(frozen=True, eq=False)
class Split:
    """Train on `train`, select on `validation`, read `test` once.

    Dense ids are those of the whole log. skipped: users who are in the log but not in `test`.
    """

    train: Interactions
    validation: Targets
    test: Targets
    skipped: int


def leave_last_out(interactions: Interactions) -> Split:
    """Each user's last moment is the test, the one before is the validation, the rest is training.

    A user with fewer than three moments stays in training whole and is counted in `skipped`. The test's
    history includes the validation's events.
    """
    log = interactions
    first = moment_starts(log)  # (M,) the first row of each moment
    owner = log.user[first]
    moments = np.bincount(owner, minlength=len(log.users))
    asked = np.flatnonzero(moments >= 3)
    life = np.searchsorted(log.user, asked)  # the user's first row
    last = np.cumsum(moments)[asked] - 1  # the user's last moment
    test, validation = first[last], first[last - 1]
    end = np.searchsorted(log.user, asked, side="right")
    held_out = np.zeros(len(log) + 1, np.int64)
    held_out[validation] += 1
    held_out[end] -= 1
    return Split(
        train=log.take(np.cumsum(held_out[:-1]) == 0),
        validation=_targets(log, asked, life, validation, test),
        test=_targets(log, asked, life, test, end),
        skipped=len(log.users) - len(asked),
    )


def by_time(interactions: Interactions, validation_start: int, test_start: int) -> Split:
    """Training is everything before `validation_start`; the windows follow it, in the log's unit of time.

    The target is a user's first moment inside the window, and the history all of the user's life before
    the window (which is all of it before the target). A user without history or without an event in a
    window is not asked in it; `skipped` counts those not in the test.
    """
    if not validation_start < test_start:
        raise ConfigError(
            f"a validation from {validation_start} and a test from {test_start}",
            rule="The test starts after the validation does",
        )
    log = interactions
    train = log.take(log.time < validation_start)
    validation = _window(log, validation_start, test_start)
    test = _window(log, test_start, None)
    for name, size in (
        ("training event", len(train)),
        ("validation user", len(validation)),
        ("test user", len(test)),
    ):
        if size == 0:
            raise DataError(
                f"no {name} with the validation from {validation_start} and the test from {test_start}",
                rule=f"The log runs from {log.time.min()} to {log.time.max()}",
                fix="Choose moments inside it, in the same unit",
            )
    return Split(train, validation, test, skipped=len(log.users) - len(test))


def _window(log: Interactions, start: int, stop: int | None) -> Targets:
    before = np.bincount(log.user[log.time < start], minlength=len(log.users))
    life = np.searchsorted(log.user, np.arange(len(log.users) + 1))
    target = life[:-1] + before  # the row of each user's first event at `start` or later
    first = moment_starts(log)
    after = np.append(first, len(log))[np.searchsorted(first, target, side="right").clip(max=len(first))]
    exists = target < life[1:]
    if stop is not None:
        exists &= log.time[np.minimum(target, len(log) - 1)] < stop
    asked = np.flatnonzero(exists & (before > 0))
    return _targets(log, asked, life[asked], target[asked], after[asked])


def moment_starts(interactions: Interactions) -> np.ndarray:
    """(M,) the first row of each moment."""
    new = (np.diff(interactions.user) != 0) | (np.diff(interactions.time) != 0)
    return np.flatnonzero(np.concatenate([[True], new])) if len(interactions) else np.empty(0, np.int64)


def _targets(
    log: Interactions, user: np.ndarray, start: np.ndarray, target: np.ndarray, stop: np.ndarray
) -> Targets:
    """Histories are rows start:target, truths rows target:stop, all (B,)."""
    return Targets(user, _rows(log, user, start, target), _rows(log, user, target, stop))


def _rows(log: Interactions, user: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Histories:
    lengths = stop - start
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    return Histories(
        offsets, log.item[rows].astype(np.int64), log.time[rows], user=user_names(log.users)[user]
    )


# -- leaks -------------------------------------------------------------------------------------------------

LEAKING_CORRELATION = 0.95  # |Spearman's ρ| of an item's number with its first appearance
_FEWEST_ITEMS = 10  # below this, chance alone reaches it too often


def check(split: Split) -> None:
    """Raise LeakageError where the future is visible.

    1. A target at or before the end of its own history. 2. A target event, or a later one of the same
    user, in the training log.
    """
    for name, targets in (("validation", split.validation), ("test", split.test)):
        Targets(targets.user, targets.histories, targets.truth)  # raises on the first leak
        _check_training(split.train, targets, name)


def _check_training(train: Interactions, targets: Targets, name: str) -> None:
    from_time = np.full(len(train.users), np.iinfo(np.int64).max)
    np.minimum.at(from_time, targets.user[targets.truth.owner], targets.truth.time)
    late = np.flatnonzero(train.time >= from_time[train.user])
    if not late.size:
        return
    training = pl.DataFrame({"user": train.user[late], "item": train.item[late], "time": train.time[late]})
    truth = pl.DataFrame(
        {
            "user": targets.user[targets.truth.owner].astype(np.int32),
            "item": targets.truth.item.astype(np.int32),
            "time": targets.truth.time,
        }
    )
    same = training.join(truth, on=["user", "item", "time"], how="semi").height
    raise LeakageError(
        f"{late.size} training events at or after their user's {name} target, {same} of them the target itself",
        rule="Training holds nothing of a user from the moment of the target on",
        fix="Train on the `train` of the same split",
    )


def check_numeric_features(interactions: Interactions, columns: Sequence[str]) -> None:
    """Raise LeakageError where a number tells when its item first appeared.

    Call it with the columns that a model will read as numbers; "item_id" means the raw ids. A column is a
    leak when it is a property of the item (one value an item; a value that changes from event to event,
    such as the week, is no such thing) and its rank correlates by ≥ .95, up or down, with the item's first
    appearance: a model could read from it which items are still to come. Ids as names are safe in any order.
    """
    for name in columns:
        value = _numbers(interactions, name)
        correlation = appearance_correlation(interactions, value)
        if abs(correlation) >= LEAKING_CORRELATION:
            raise LeakageError(
                f"column '{name}' follows the order in which items first appear "
                f"(rank correlation {correlation:+.3f})",
                rule="A number that tells when an item appeared shows the future",
                fix=f"Use '{name}' as a name (a category) only, or renumber it at random",
            )


def check_id_order(interactions: Interactions) -> None:
    """`check_numeric_features` of the raw item ids: call it before using them as numbers."""
    check_numeric_features(interactions, ["item_id"])


def appearance_correlation(interactions: Interactions, value: np.ndarray) -> float:
    """Spearman's ρ of the items' numbers (value: (E,), one an event) with their first appearance.

    0 where the value is not one an item, is constant, or there are fewer than ten items.
    """
    items = (
        pl.DataFrame({"item": interactions.item, "time": interactions.time, "value": value})
        .group_by("item")
        .agg(pl.col("time").min(), low=pl.col("value").min(), high=pl.col("value").max())
        .drop_nulls()
    )
    if items.height < _FEWEST_ITEMS or (items["low"] != items["high"]).any():
        return 0.0
    ranks = items.select(pl.col("time", "low").rank("average")).to_numpy()
    if (ranks.std(axis=0) == 0).any():
        return 0.0
    return float(np.corrcoef(ranks.T)[0, 1])


def _numbers(interactions: Interactions, name: str) -> np.ndarray:
    if name == "item_id":
        raw = interactions.items.raw
        if not pa.types.is_integer(raw.type):
            raise SchemaError("item ids that are strings", rule="A numeric feature holds numbers")
        return raw.to_numpy(zero_copy_only=False)[interactions.item]
    if name not in interactions.extra.columns:
        raise SchemaError(
            f"no column '{name}'", fix=did_you_mean(name, ["item_id", *interactions.extra.columns])
        )
    column = interactions.extra[name]
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise SchemaError(f"column '{name}' of type {column.dtype}", rule="A numeric feature holds numbers")
    return column.to_numpy()
