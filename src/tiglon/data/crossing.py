"""Crossing without parameters: a combination of values becomes one value of its own.

    FeatureSchema([..., Feature("brand", "inherent"), Feature("size", "inherent"),
                   Feature("brand × size", "inherent", of=("brand", "size"), min_count=5)])

declares a cross-ID: `tiglon.data.features` fits it on the training lines and computes it in the same way when it
serves. For several values a row (tags of the item, tags of the user) `cartesian` makes all pairs, which a
`CrossId` codes like any others:

    offsets, left, right = cartesian(tags, liked)
    crossed = CrossId.fit([left, right], min_count=5)
    nn.EmbeddingBag(crossed.size, 8, mode="sum")(crossed.codes([left, right]), offsets[:-1])     no pair: zeros

What is crossed are codes, 0 for unknown, never text joined to text: "a_b" with "c" is not "a" with "b_c".

Combinations are found by a salted 64-bit hash in a sorted table of those that training kept. Each has a code of
its own: should two of them hash alike, the next salt is taken. One that training never saw takes the code
of another with probability n / 2⁶⁴. The table costs 8 bytes a combination, a quarter of one row of an embedding
that is 8 wide, so that it saves little to let combinations share rows, as plain hashing does.

Letters: n rows, T values of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from tiglon.data.histories import offsets_of
from tiglon.errors import ConfigError, DataError

_SALTS = 8  # are tried; of a million combinations two hash alike with a chance of 3 in 10⁸


@dataclass(frozen=True, eq=False)
class CrossId:
    """Combinations of codes → 1 … size − 1; 0 where a part is unknown or training kept no such combination.

    salt: of the hash.   fingerprint: rising uint64 of the combinations that have a code.
    """

    salt: int
    fingerprint: np.ndarray

    @property
    def size(self) -> int:
        return len(self.fingerprint) + 1

    @classmethod
    def fit(
        cls,
        parts: Sequence[np.ndarray],
        lines: np.ndarray | None = None,
        *,
        min_count: int = 1,
        salt: int = 0,
    ) -> CrossId:
        """Keep the combinations of at least `min_count` training lines.

        parts: two or more (n,) codes, row by row.   lines: (n,) training lines of each row; None: one each.
        salt: below 2⁶³; of different crosses different. Raises ConfigError, DataError.
        """
        if min_count < 1:
            raise ConfigError(f"min_count={min_count}", rule="A combination needs at least one training line")
        _require_parts(parts)
        columns = {f"part {p}": part for p, part in enumerate(parts)}
        counted = pl.DataFrame(
            {**columns, "lines": np.ones(len(parts[0]), np.int64) if lines is None else lines}
        )
        counted = counted.filter(pl.all_horizontal(pl.col(list(columns)) > 0)).group_by(list(columns)).sum()
        kept = counted.filter(pl.col("lines") >= min_count)
        combinations = [kept[column].to_numpy() for column in columns]
        for tried in range(salt, salt + _SALTS):
            found = np.unique(fingerprints(combinations, tried))
            if len(found) == kept.height:
                return cls(tried, found)
        raise DataError(
            f"{kept.height:,} combinations of which two hash alike under each of {_SALTS} salts",
            rule="Every combination has a code of its own",
            fix="Cross fewer features, or raise min_count",
        )

    def codes(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) int32. Raises DataError."""
        _require_parts(parts)
        if not len(self.fingerprint):
            return np.zeros(len(parts[0]), np.int32)
        found = fingerprints(parts, self.salt)
        place = np.searchsorted(self.fingerprint, found)
        known = self.fingerprint[np.minimum(place, len(self.fingerprint) - 1)] == found
        for part in parts:
            known &= part > 0
        return np.where(known, place + 1, 0).astype(np.int32)


def fingerprints(parts: Sequence[np.ndarray], salt: int) -> np.ndarray:
    """(n,) uint64 that depend on every part and on their order: splitmix64, chained."""
    mixed = _mix(np.full(len(parts[0]), salt, np.uint64))
    for part in parts:
        mixed = _mix(mixed ^ part.astype(np.uint64))
    return mixed


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection of 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _require_parts(parts: Sequence[np.ndarray]) -> None:
    if len(parts) < 2:
        raise ConfigError(f"a cross of {len(parts)} features", rule="A cross is of at least two")
    if len({len(part) for part in parts}) > 1:
        raise DataError(
            f"parts of {', '.join(str(len(part)) for part in parts)} rows", rule="All have one code a row"
        )
    if any(len(part) and part.min() < 0 for part in parts):
        raise DataError("a code below 0", rule="Codes are 0 for unknown, or above")


# -- several values a row ----------------------------------------------------------------------------------


class Multi(NamedTuple):
    """Several codes a row, or none: row r has code[offsets[r]:offsets[r + 1]].

    offsets: (n + 1,) int64.   code: (T,).
    """

    offsets: np.ndarray
    code: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Multi:
        """From a list of codes a row."""
        lengths = np.array([len(row) for row in rows], np.int64)
        code = np.array([value for row in rows for value in row], np.int64)
        return cls(offsets_of(lengths), code)


def cartesian(left: Multi, right: Multi) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every value of `left` with every value of `right`, row by row; a row where either is empty has none.

    Returns offsets (n + 1,), and the left and right codes of the pairs, the right one running faster.
    Raises DataError for different numbers of rows.
    """
    if len(left.offsets) != len(right.offsets):
        raise DataError(
            f"{len(left.offsets) - 1} rows and {len(right.offsets) - 1} rows",
            rule="A product is taken row by row",
        )
    inner = np.diff(right.offsets)
    pairs = np.diff(left.offsets) * inner
    offsets = offsets_of(pairs)
    row = np.repeat(np.arange(len(pairs)), pairs)
    nth = np.arange(offsets[-1]) - offsets[row]
    return (
        offsets,
        left.code[left.offsets[row] + nth // inner[row]],
        right.code[right.offsets[row] + nth % inner[row]],
    )
