"""The catalogue's semantic IDs: who has which, which version, and how they may change.

Items with the same L codes are told apart by one more code, the collision digit (TIGER §3.1: "we
append an extra token at the end of their ordered semantic codes to make them unique"). It is always
appended, so that every ID has the same length.

Three rules hold for the life of a catalogue. An ID, once given, never changes. It is never given to
another item, not even after its own is removed. Within a group the first digits go by a hash of the raw
id: raw ids often ascend with time, and a digit that says which item is newer leaks the future.

Letters: N items, L levels of a tokenizer, S = L + 1 positions of an ID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tiglon.errors import BundleDamagedError, CapacityError, DataError
from tiglon.semantic_ids import storage
from tiglon.types import Vocabulary, hash_ids


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """One ID for each dense item; row i is item i. Changes make a new object and leave this one alone.

    codes: (N, S) int32, unique rows; the last position is the collision digit.
    sizes: how many codes each position has.
    alive: (N,) bool; a removed item keeps its row, so that its ID is never given away.
    parent: the version from which this one was derived.
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    alive: np.ndarray
    parent: str | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.shape[1] != len(self.sizes) or self.codes.dtype != np.int32:
            raise DataError(f"codes of shape {self.codes.shape} and type {self.codes.dtype} for {self.sizes}")
        if self.alive.shape != (len(self.codes),) or self.alive.dtype != bool:
            raise DataError(f"an alive mask of shape {self.alive.shape} for {len(self.codes)} items")
        _require_range(self.codes, self.sizes)
        ordered = np.sort(_groups(self.codes, self.sizes))
        if (ordered[1:] == ordered[:-1]).any():
            raise DataError("two items with one ID", rule="Semantic IDs are unique")
        self.codes.flags.writeable = self.alive.flags.writeable = False

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def version(self) -> str:
        """Hash of the content: equal IDs have equal versions, whatever their history."""
        digest = hashlib.sha256(repr(tuple(map(int, self.sizes))).encode())
        digest.update(np.ascontiguousarray(self.codes).tobytes())
        digest.update(self.alive.tobytes())
        return digest.hexdigest()[:16]

    @property
    def offsets(self) -> np.ndarray:
        """(S,) int64: where each position's tokens start; the digit comes last, so it can grow."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """(N, S) int64: codes + offsets, so that code 7 of two positions are two tokens."""
        return self.codes + self.offsets

    @classmethod
    def assign(
        cls,
        codes: np.ndarray,
        sizes: Sequence[int],
        keys: Vocabulary | Sequence[Any],
        digit_size: int | None = None,
    ) -> SemanticIds:
        """IDs for a new catalogue.

        codes: (N, L) of a tokenizer with `sizes`.   keys: the N raw ids.
        digit_size: how many items may share L codes; by default a power of two, at least 256 and at
            least twice the largest group.
        Raises CapacityError where a group is larger than `digit_size`.
        """
        if digit_size is None:
            codes = np.asarray(codes)
            _require_range(codes, sizes)
            largest = int(np.unique(_groups(codes, sizes), return_counts=True)[1].max(initial=1))
            digit_size = 1 << (max(256, 2 * largest) - 1).bit_length()
        sizes = tuple(int(size) for size in sizes)
        nothing = cls(np.empty((0, len(sizes) + 1), np.int32), (*sizes, digit_size), np.empty(0, bool))
        ids = nothing.add(codes, keys)
        return cls(ids.codes, ids.sizes, ids.alive)

    def add(self, codes: np.ndarray, keys: Vocabulary | Sequence[Any], *, grow: bool = False) -> SemanticIds:
        """With M new items in the rows after these; no ID of this object changes.

        codes: (M, L) of the same tokenizer.   keys: the M raw ids.
        Raises CapacityError where a group is full, unless `grow`: then the digit's size doubles.
        """
        codes = np.ascontiguousarray(codes, np.int32)
        keys = keys if isinstance(keys, Vocabulary) else Vocabulary(keys)
        if codes.ndim != 2 or codes.shape[1] != len(self.sizes) - 1 or len(codes) != len(keys):
            raise DataError(
                f"codes of shape {codes.shape} for {len(keys)} items",
                rule=f"Each new item has {len(self.sizes) - 1} codes",
            )
        _require_range(codes, self.sizes)
        both = np.concatenate([self.codes[:, :-1], codes])
        group = np.unique(_groups(both, self.sizes), return_inverse=True)[1]
        old, new = np.split(group, [len(self)])
        free = np.zeros(group.max(initial=-1) + 1, np.int64)
        np.maximum.at(free, old, self.codes[:, -1] + 1)
        order = np.lexsort((hash_ids(keys), new))
        rank = np.empty(len(new), np.int64)
        first = np.searchsorted(new[order], new[order])
        rank[order] = np.arange(len(new)) - first
        digit = free[new] + rank
        needed = int(digit.max(initial=-1)) + 1
        digit_size = self.sizes[-1]
        if needed > digit_size and not grow:
            raise CapacityError(
                f"{needed} items with the same {len(self.sizes) - 1} codes, removed ones included",
                rule=f"The collision digit tells {digit_size} apart",
                fix="Pass grow=True or a larger digit_size, or use more levels or codes",
            )
        while digit_size < needed:
            digit_size *= 2
        rows = np.column_stack([codes, digit.astype(np.int32)])
        return SemanticIds(
            np.concatenate([self.codes, rows]),
            (*self.sizes[:-1], digit_size),
            np.concatenate([self.alive, np.ones(len(rows), bool)]),
            self.version,
        )

    def remove(self, items: np.ndarray | Sequence[int]) -> SemanticIds:
        """Without these dense items: their rows stay, no longer alive, and their IDs stay theirs."""
        return self._mark(items, False)

    def restore(self, items: np.ndarray | Sequence[int]) -> SemanticIds:
        """With these removed items back, under their old IDs."""
        return self._mark(items, True)

    def _mark(self, items: np.ndarray | Sequence[int], alive: bool) -> SemanticIds:
        rows = np.asarray(items, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise DataError(f"a dense item outside 0 … {len(self) - 1}")
        marked = self.alive.copy()
        marked[rows] = alive
        return SemanticIds(self.codes, self.sizes, marked, self.version)

    def save(self, directory: Path) -> None:
        """Write ids.safetensors to `directory`."""
        settings = {"sizes": list(self.sizes), "version": self.version, "parent": self.parent}
        storage.write(
            Path(directory) / "ids.safetensors", {"codes": self.codes, "alive": self.alive}, settings
        )

    @classmethod
    def load(cls, directory: Path) -> SemanticIds:
        """What `save` wrote. Raises BundleDamagedError where it is not whole."""
        path = Path(directory) / "ids.safetensors"
        arrays, settings = storage.read(path)
        with storage.reading(path):
            ids = cls(arrays["codes"], tuple(settings["sizes"]), arrays["alive"], settings["parent"])
            if ids.version != settings["version"]:
                raise BundleDamagedError(
                    f"{path} has version {ids.version}, not {settings['version']}",
                    fix="Copy the folder again",
                )
        return ids


def churn(old: SemanticIds, new: SemanticIds) -> np.ndarray:
    """(S,) share of items whose first l codes differ, l = 1 … S, among items alive in both."""
    if len(old.sizes) != len(new.sizes):
        raise DataError(f"IDs of {len(old.sizes)} and of {len(new.sizes)} positions cannot be compared")
    common = min(len(old), len(new))
    both = old.alive[:common] & new.alive[:common]
    differs = old.codes[:common][both] != new.codes[:common][both]
    return np.logical_or.accumulate(differs, axis=1).mean(axis=0) if both.any() else np.zeros(len(old.sizes))


def _groups(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(N,) int64: a number for each row of codes, equal for equal rows, in lexicographic order."""
    number, span = np.zeros(len(codes), np.int64), 1
    for code, size in zip(codes.T, sizes, strict=False):
        if span * size >= 2**62:
            values, number = np.unique(number, return_inverse=True)
            span = len(values)
        number, span = number * size + code, span * size
    return number


def _require_range(codes: np.ndarray, sizes: Sequence[int]) -> None:
    for position, (code, size) in enumerate(zip(codes.T, sizes, strict=False)):
        if code.size and (code.min() < 0 or code.max() >= size):
            raise DataError(
                f"codes {code.min()} … {code.max()} at position {position}",
                rule=f"Position {position} has the codes 0 … {size - 1}",
            )
