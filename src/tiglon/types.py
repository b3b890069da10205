"""The few objects that cross borders: validated once when made, trusted afterwards.

Raw ids (what the user's tables hold: integers or strings) live in a `Vocabulary`; everything else
speaks dense ids, 0 … n−1. Dense ids are names, never numbers: nothing may be derived from their order.

Letters: E events, B users in a batch, L history, N items, D width, S code positions, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tiglon.errors import DataError, LeakageError, UnknownIdError

if TYPE_CHECKING:
    from torch import Tensor

MISSING = -1  # a dense id that is not there: an unknown item, or a candidate list shorter than K
LONGEST_ID = 256  # characters of a raw id; it has at least one
_FEW = 16  # times fewer ids than a vocabulary has are looked up one by one


class Vocabulary:
    """Raw ids to dense ids and back; the raw type (int64 or string) is kept.

    Raises DataError on null or repeated ids.
    """

    def __init__(self, raw: pa.Array | pl.Series | Sequence[Any]) -> None:
        array = raw.to_arrow() if isinstance(raw, pl.Series) else pa.array(raw)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if pa.types.is_integer(array.type):
            array = array.cast(pa.int64())
        elif len(array) == 0 or pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = array.cast(pa.large_string())
        else:
            raise DataError(f"ids of type {array.type}", rule="Ids are integers or strings")
        if array.null_count:
            raise DataError(f"{array.null_count} null ids", rule="An id is never null")
        if len(pc.unique(array)) != len(array):
            raise DataError(f"{len(array)} ids of which some repeat", rule="A vocabulary lists each id once")
        self.raw = array
        self._hashes: tuple[np.ndarray, np.ndarray] | None = None  # ascending, and whose each is

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} ids of {self.raw.type})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.raw.equals(other.raw)

    __hash__ = None  # type: ignore[assignment]

    def encode(self, raw: pa.Array | pl.Series | Sequence[Any]) -> np.ndarray:
        """Dense ids (n,) int64 of raw ids; MISSING where one is unknown or of another type."""
        array = raw.to_arrow() if isinstance(raw, pl.Series) else raw
        if not isinstance(array, (pa.Array, pa.ChunkedArray)):
            # A list from a user may mix types; only those of the vocabulary's own type can match.
            kind = int if pa.types.is_integer(self.raw.type) else str
            if set(map(type, array)) != {kind} or (
                kind is int and not -(2**63) <= min(array) <= max(array) < 2**63
            ):
                array = [_plain(value, kind) for value in array]
            array = pa.array(array, type=self.raw.type, from_pandas=True)
        try:
            array = array.cast(self.raw.type)
        except pa.ArrowInvalid:
            return np.full(len(array), MISSING, dtype=np.int64)
        if _FEW * len(array) < len(self) and isinstance(array, pa.Array) and not array.null_count:
            found = self._few(array)
            if found is not None:
                return found
        found = pc.fill_null(pc.index_in(array, value_set=self.raw), MISSING)
        return found.to_numpy(zero_copy_only=False).astype(np.int64)

    def _few(self, array: pa.Array) -> np.ndarray | None:
        """As `encode`, for few ids of our own type: by sorted hashes, which are made once. None where two ids
        have one hash, as one pair in 10^19 does."""
        if self._hashes is None:
            hashes = _hash(self.raw)
            order = np.argsort(hashes)
            self._hashes = hashes[order], order
        hashes, order = self._hashes
        wanted = _hash(array)
        at = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
        found = np.where(hashes[at] == wanted, order[at], MISSING)
        there = pa.array(found, mask=found == MISSING)
        same = pc.equal(self.raw.take(there), array)
        return found if pc.all(same).as_py() in (True, None) else None

    def require(self, raw: Sequence[Any], kind: str) -> np.ndarray:
        """`encode`, or UnknownIdError naming the first unknown ids. `kind` is "user" or "item"."""
        dense = self.encode(raw)
        if (dense == MISSING).any():
            unknown = [value for value, index in zip(raw, dense, strict=True) if index == MISSING][:3]
            ids = "integer ids" if pa.types.is_integer(self.raw.type) else "string ids"
            example = [value for value in self.raw[:2].to_pylist() if value != ""][:1]
            raise UnknownIdError(
                f"unknown {kind} {', '.join(map(repr, unknown))}",
                rule=f"There are {len(self)} known {kind}s, with {ids}",
                fix=f"Pass an id from the log, such as {example[0]!r}" if example else "",
            )
        return dense

    def decode(self, dense: np.ndarray | Sequence[int]) -> list[Any]:
        """Raw ids of dense ids (n,); None where MISSING."""
        dense = np.asarray(dense, dtype=np.int64)
        if dense.size and (dense.min() < MISSING or dense.max() >= len(self)):
            raise DataError(f"a dense id outside 0 … {len(self) - 1}")
        return self.raw.take(pa.array(dense, mask=dense == MISSING)).to_pylist()


def hash_ids(keys: Vocabulary) -> np.ndarray:
    """(n,) uint64: a hash of each raw id (FNV-1a of its bytes, then mixed), the same everywhere."""
    return _hash(keys.raw)


def _hash(raw: pa.Array) -> np.ndarray:
    if pa.types.is_integer(raw.type):
        text = raw.to_numpy(zero_copy_only=False).astype("<i8").view(np.uint8)
        offsets = np.arange(len(raw) + 1, dtype=np.int64) * 8
    else:
        raw = raw.cast(pa.large_string())
        _, ends, data = raw.buffers()
        text = np.frombuffer(data or b"", np.uint8)
        offsets = np.frombuffer(ends or bytes(8), np.int64)[raw.offset : raw.offset + len(raw) + 1]
    return _fnv(text, offsets)


def user_names(users: Vocabulary) -> np.ndarray:
    """(U,) int64 ≥ 0: what `Histories.user` calls each user."""
    return (hash_ids(users) >> np.uint64(1)).astype(np.int64)


@numba.njit(cache=True)
def _fnv(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(hashes)):
        h = np.uint64(0xCBF29CE484222325)
        for j in range(offsets[i], offsets[i + 1]):
            h = (h ^ np.uint64(text[j])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        hashes[i] = h ^ (h >> np.uint64(33))
    return hashes


def _plain(value: Any, kind: type) -> Any:
    """`value` where it is of the vocabulary's kind (numpy scalars too), else None."""
    value = value.item() if isinstance(value, np.generic) else value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value if -(2**63) <= value < 2**63 else None
    return value if kind is str and isinstance(value, str) else None


@dataclass(frozen=True, eq=False)
class Interactions:
    """A click log, sorted by (user, time); rows at equal times keep the order of the source.

    user, item: (E,) int32 dense ids.   time: (E,) int64, any unit that grows.
    extra: E rows of every other column (event, label_*, price, quantity …).
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    users: Vocabulary
    items: Vocabulary
    extra: pl.DataFrame = field(default_factory=pl.DataFrame)

    def __post_init__(self) -> None:
        if not len(self.user) == len(self.item) == len(self.time):
            raise DataError("columns of different lengths")
        if self.extra.width and self.extra.height != len(self.user):
            raise DataError(f"extra columns of {self.extra.height} rows for {len(self.user)} events")
        for name, dense, vocabulary in (("user", self.user, self.users), ("item", self.item, self.items)):
            if dense.size and (dense.min() < 0 or dense.max() >= len(vocabulary)):
                raise DataError(f"a dense {name} id outside its vocabulary of {len(vocabulary)}")
        step_user, step_time = np.diff(self.user), np.diff(self.time)
        if ((step_user < 0) | ((step_user == 0) & (step_time < 0))).any():
            raise DataError("unsorted events", rule="Interactions are sorted by (user, time)")

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Interactions:
        """The same log with only these rows: a bool mask (E,) or ascending row numbers."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        extra = self.extra[rows] if self.extra.width else self.extra
        return Interactions(self.user[rows], self.item[rows], self.time[rows], self.users, self.items, extra)


@dataclass(frozen=True, eq=False)
class Items:
    """The catalogue: row i of `table` is dense item i; its id column is `item_id`."""

    vocabulary: Vocabulary
    table: pl.DataFrame

    def __post_init__(self) -> None:
        if self.table.height != len(self.vocabulary):
            raise DataError(f"{self.table.height} rows for {len(self.vocabulary)} item ids")

    def __len__(self) -> int:
        return len(self.vocabulary)


@dataclass(frozen=True, eq=False)
class Histories:
    """What B users did before a moment, oldest first, stored end to end without padding.

    offsets: (B+1,) int64; user b owns rows offsets[b]:offsets[b+1].
    item: (T,) int64 dense ids.   time: (T,) int64.   features: name → (T,) cross feature.
    user: (B,) int64, a hash of who it is that stays when the log grows, −1 for a stranger; or None.
    """

    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)
    user: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.user is not None and len(self.user) != len(self):
            raise DataError(f"{len(self.user)} users for {len(self)} histories")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.item) or (np.diff(self.offsets) < 0).any():
            raise DataError("offsets that do not run from 0 to the number of events without falling")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each user's items, oldest first."""
        return (self.item[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def owner(self) -> np.ndarray:
        """(T,) which of the B users each event belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def moments_ago(self) -> np.ndarray:
        """(T,) the age of each event: how many later moments its user has; 0 for the latest."""
        owner, time = self.owner, self.time
        if not len(owner):
            return np.empty(0, np.int64)
        moment = np.cumsum(np.concatenate([[True], (np.diff(owner) != 0) | (np.diff(time) != 0)]))
        return moment[self.offsets[owner + 1] - 1] - moment

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> Histories:
        """From one list of dense items a user, oldest first; times are positions."""
        lengths = np.array([len(items) for items in lists], dtype=np.int64)
        item = (
            np.concatenate([np.asarray(x, dtype=np.int64) for x in lists])
            if len(lists)
            else np.empty(0, np.int64)
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        time = np.arange(len(item)) - np.repeat(offsets[:-1], lengths)
        return cls(offsets, item, time)

    def last(self, n: int) -> Histories:
        """Only the most recent n events of each user."""
        return self._cut(np.arange(len(self)), np.maximum(self.offsets[:-1], self.offsets[1:] - n))

    def take(self, users: np.ndarray | slice) -> Histories:
        """The histories of some users: a slice, a bool mask (B,), or row numbers in any order."""
        rows = np.arange(len(self))[users]
        return self._cut(rows, self.offsets[rows])

    def _cut(self, rows: np.ndarray, start: np.ndarray) -> Histories:
        """The events from `start` (n,) on of the users `rows` (n,)."""
        lengths = self.offsets[rows + 1] - start
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        features = {name: value[at] for name, value in self.features.items()}
        user = None if self.user is None else self.user[rows]
        return Histories(offsets, self.item[at], self.time[at], features, user)


@dataclass(frozen=True, eq=False)
class Candidates:
    """A ranked list of items for each of B users.

    item: (B, K) int64 dense ids, best first, MISSING after the last one.
    score: (B, K) float32, falling along a row, −inf where MISSING.   source: which retriever.
    """

    item: np.ndarray
    score: np.ndarray
    source: str

    def __post_init__(self) -> None:
        if self.item.shape != self.score.shape or self.item.ndim != 2:
            raise DataError(f"items of shape {self.item.shape} with scores of shape {self.score.shape}")
        if np.isnan(self.score).any():
            raise DataError("a candidate score that is NaN")
        if (self.score[:, 1:] > self.score[:, :-1]).any():
            raise DataError("candidate scores that rise", rule="Candidates come best first")
        if not ((self.item == MISSING) == np.isneginf(self.score)).all():
            raise DataError("a missing candidate with a score, or a candidate scored −inf")
        ordered = np.sort(self.item, axis=1)
        if ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] != MISSING)).any():
            raise DataError("a candidate listed twice for one user")

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True, eq=False)
class Targets:
    """What to predict for each of B users: the next items, given everything strictly before them.

    user: (B,) dense ids.   histories: the past.   truth: what came next (one basket or one event;
    its order means nothing). Raises LeakageError where a target is not later than its history.
    """

    user: np.ndarray
    histories: Histories
    truth: Histories

    def __post_init__(self) -> None:
        if not len(self.user) == len(self.histories) == len(self.truth):
            raise DataError("users, histories and truths of different numbers")
        last = np.full(len(self), np.iinfo(np.int64).min)
        first = np.full(len(self), np.iinfo(np.int64).max)
        np.maximum.at(last, self.histories.owner, self.histories.time)
        np.minimum.at(first, self.truth.owner, self.truth.time)
        late = np.flatnonzero(last >= first)
        if late.size:
            raise LeakageError(
                f"{late.size} users whose history reaches the time of their target or past it",
                rule="A history holds only events strictly before its target",
                fix="Split with tiglon.data.split, which keeps the events of one moment together",
            )

    def __len__(self) -> int:
        return len(self.user)

    def take(self, users: np.ndarray | slice) -> Targets:
        """Some of the users, as `Histories.take` picks them."""
        return Targets(self.user[users], self.histories.take(users), self.truth.take(users))


@dataclass(frozen=True, eq=False)
class ItemVectors:
    """One vector an item. values: (N, D) float32, finite.   encoder: what made them, with its version."""

    values: np.ndarray
    encoder: str

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise DataError(f"vectors of shape {self.values.shape} and type {self.values.dtype}")
        if not np.isfinite(self.values).all():
            bad = int((~np.isfinite(self.values).all(axis=1)).sum())
            raise DataError(f"{bad} item vectors with NaN or infinite values", rule="Vectors are finite")

    def __len__(self) -> int:
        return len(self.values)


class Behaviours(NamedTuple):
    """What B users did before their request, as tensors: oldest first, padding after the newest.

    item: (B, L) int64 dense ids, MISSING where the item is unknown.   cross: (B, L, J) int64 codes of the
    cross features, 0 for unknown.   gap: (B, L) float32, time from the behaviour to the request, above 0.
    mask: (B, L) bool, False on padding.   size: (B, L) float32, how many behaviours one entry stands for
    (clusters); None where every entry is one.
    """

    item: Tensor
    cross: Tensor
    gap: Tensor
    mask: Tensor
    size: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64."""
        return self.mask.sum(dim=1)

    def take(self, index: Tensor) -> Behaviours:
        """The entries at positions (B, k), in that order; a position of −1 becomes padding."""
        import torch

        at = index.clamp(min=0)
        rows = torch.arange(len(at))[:, None]
        size = None if self.size is None else self.size[rows, at]
        mask = self.mask[rows, at] & (index >= 0)
        return Behaviours(self.item[rows, at], self.cross[rows, at], self.gap[rows, at], mask, size)

    def last(self, n: int) -> Behaviours:
        """Only the most recent n of each user."""
        import torch

        if self.mask.shape[1] <= n:
            return self
        return self.take(torch.arange(n) + (self.lengths - n).clamp(min=0)[:, None])


class RankingBatch(NamedTuple):
    """B requests of K candidates each.

    item: (B, K) int64 dense ids.   past: strictly before the request.   profile: (B, X) int64 codes of what
    is known of user and request, 0 for unknown.   label: (B, K, T) float32, NaN where there is none
    (a candidate that only pads the row has none at all).
    """

    item: Tensor
    past: Behaviours
    profile: Tensor
    label: Tensor
