"""Each user's life, stored once: offsets, items, times and cross features, memory-mapped.

    store = HistoryStore.build(interactions, features=["quantity"])
    store.save("histories"); store = HistoryStore.load("histories")
    store.before(users, time=t, last=100)         what these users did strictly before t

`build_from_parquet` makes the same folder from a log that is larger than memory. Its two passes: count the
events of each user, then deal the events into buckets of neighbouring users on disk, and sort each bucket.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from tiglon.data.events import clean_ids, clean_times, require_columns, tidy
from tiglon.data.folders import reading, written_aside
from tiglon.errors import ConfigError, DataError, SchemaError
from tiglon.types import MISSING, Histories, Interactions, Vocabulary, user_names

FORMAT = 1
CLUSTER_SIZE = "cluster_size"  # the feature that says how many behaviours an entry stands for
_BATCH_ROWS = 1 << 20
_BUCKET_EVENTS = 2_000_000
_MOST_BUCKETS = 512  # one open file each
_HEADER_BYTES = 128  # of a one-dimensional .npy file


@dataclass(frozen=True, eq=False)
class HistoryStore:
    """The lives of U users, E events in all; user u owns rows offsets[u]:offsets[u+1], oldest first.

    offsets: (U+1,) int64.   item: (E,) int32 dense.   time: (E,) int64.   features: name → (E,) numbers.
    """

    users: Vocabulary
    items: Vocabulary
    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.users) + 1 or self.offsets[-1] != len(self.item):
            raise DataError(
                f"{len(self.offsets)} offsets for {len(self.users)} users, {len(self.item)} events"
            )
        for name, column in (("time", self.time), *self.features.items()):
            if len(column) != len(self.item):
                raise DataError(f"{len(column)} values of '{name}' for {len(self.item)} events")

    def __len__(self) -> int:
        """How many users."""
        return len(self.users)

    @classmethod
    def build(cls, interactions: Interactions, features: Sequence[str] = ()) -> HistoryStore:
        """From a log in memory, without copying it. features: numeric columns of `interactions.extra`."""
        require_columns(interactions.extra.columns, list(features))
        lengths = np.bincount(interactions.user, minlength=len(interactions.users))
        return cls(
            interactions.users,
            interactions.items,
            offsets_of(lengths),
            interactions.item,
            interactions.time,
            {name: _numbers(interactions.extra[name]) for name in features},
        )

    def before(
        self,
        users: np.ndarray | Sequence[int],
        time: np.ndarray | Sequence[int] | int | None = None,
        last: int | None = None,
    ) -> Histories:
        """What each of B users did strictly before `time`, at most the `last` so many events.

        users: (B,) dense ids; MISSING (−1) is an unknown user, whose history is empty.
        time: one moment, or (B,) one a user; None reads whole lives.
        """
        start, stop = self._span(users, time, last)
        lengths = stop - start
        offsets = offsets_of(lengths)
        rows = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        features = {name: column[rows] for name, column in self.features.items()}
        who = self._names[users]
        return Histories(offsets, self.item[rows].astype(np.int64), self.time[rows], features, who)

    @cached_property
    def _names(self) -> np.ndarray:
        """(U + 1,) what `Histories.user` calls each user, the stranger last, so that MISSING finds it."""
        return np.append(user_names(self.users), MISSING)

    def behaviours(self, users: np.ndarray, time: np.ndarray) -> np.ndarray:
        """(B,) how many there are before `time`."""
        return self.lengths(users, time)

    def lengths(
        self,
        users: np.ndarray | Sequence[int],
        time: np.ndarray | Sequence[int] | int | None = None,
        last: int | None = None,
    ) -> np.ndarray:
        """(B,) int64, how many events `before` would read; the same arguments."""
        start, stop = self._span(users, time, last)
        return stop - start

    def _span(self, users: Any, time: Any, last: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(B,), (B,): the rows start:stop of each user."""
        users = np.asarray(users, dtype=np.int64)
        if users.size and not MISSING <= users.min() <= users.max() < len(self):
            raise DataError(f"a dense user outside 0 … {len(self) - 1}")
        if last is not None and last < 1:
            raise ConfigError(
                f"last={last}", rule="A history holds at least one event", fix="Pass None for all"
            )
        start = self.offsets[users]
        stop = self.offsets[users + 1]
        stop = np.where(users == MISSING, start, stop)
        if time is not None:
            moment = np.asarray(time, dtype=np.int64)
            if moment.shape not in ((), users.shape):
                raise DataError(
                    f"{moment.shape} times for {len(users)} users", rule="One time, or one a user"
                )
            stop = _first_not_before(self.time, start, stop, np.broadcast_to(moment, users.shape))
        if last is not None:
            start = np.maximum(start, stop - last)
        return start, stop

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing. Raises StorageError."""
        with written_aside(Path(directory), "histories.json") as aside:
            np.save(aside / "item.npy", self.item)
            np.save(aside / "time.npy", self.time)
            for index, column in enumerate(self.features.values()):
                np.save(aside / f"feature_{index}.npy", column)
            _save_frame(aside, self.users, self.items, np.diff(self.offsets), list(self.features))

    @classmethod
    def load(cls, directory: str | Path) -> HistoryStore:
        """Map the folder into memory: nothing but the vocabularies and offsets is read before it is asked for.

        Raises BundleDamagedError, BundleVersionError.
        """
        directory = Path(directory)
        with reading(
            directory,
            "histories.json",
            FORMAT,
            what="histories",
            rule="A history store has histories.json, users, items, offsets, item, time and its features",
            fix="Build it anew from the log",
        ) as about:
            users = Vocabulary(pq.read_table(directory / "users.parquet")["user_id"])
            items = Vocabulary(pq.read_table(directory / "items.parquet")["item_id"])
            features = {
                name: _map(directory / f"feature_{index}.npy") for index, name in enumerate(about["features"])
            }
            offsets = np.load(directory / "offsets.npy")
            return cls(
                users, items, offsets, _map(directory / "item.npy"), _map(directory / "time.npy"), features
            )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths → (n+1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@njit(cache=True)
def _first_not_before(
    time: np.ndarray, start: np.ndarray, stop: np.ndarray, moment: np.ndarray
) -> np.ndarray:
    """(B,) the first row in start:stop whose time is ≥ moment, by bisection."""
    found = np.empty(len(start), np.int64)
    for b in range(len(start)):
        low, high = start[b], stop[b]
        while low < high:
            middle = (low + high) // 2
            if time[middle] < moment[b]:
                low = middle + 1
            else:
                high = middle
        found[b] = low
    return found


def _numbers(column: pl.Series) -> np.ndarray:
    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        raise SchemaError(
            f"feature '{column.name}' of type {column.dtype}",
            rule="Cross features are numbers",
            fix="Number its categories first",
        )
    if column.null_count():
        raise DataError(f"feature '{column.name}' holds {column.null_count()} nulls", fix="Fill them first")
    return column.to_numpy()


# -- a log larger than memory --------------------------------------------------------------------------------


def build_from_parquet(
    paths: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    features: Sequence[str] = (),
) -> HistoryStore:
    """Write the history store of a log of any size into `out_dir`, and map it.

    The rules are those of `tiglon.data.events`, the result that of `HistoryStore.build`; files may hold a feature
    as other types of number, which become the one that holds them all. In memory at once:
    the vocabularies, one batch of 2^20 lines, one bucket of about two million events (more where a single
    user has more). On disk meanwhile: one copy of the events. Raises SchemaError, DataError, StorageError.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in files:
        if not path.is_file():
            raise DataError(f"no file at {path}", fix="Check the path")
    kinds = _feature_types(files, (user, item, time), features)
    users, lengths = _count(files, user)
    items, _ = _count(files, item)
    if not len(users):
        raise DataError("a log without events", rule="A log has at least one line")
    with written_aside(Path(out_dir), "histories.json") as aside:
        buckets, dtype = _deal(files, (user, item, time, *features), kinds, users, items, lengths, aside)
        lengths = _gather(buckets, dtype, len(users), aside)
        _save_frame(aside, users, items, lengths, list(features))
    return HistoryStore.load(out_dir)


def _feature_types(files: Sequence[Path], core: tuple[str, ...], features: Sequence[str]) -> list[np.dtype]:
    """The type of each feature that holds it in every file. Raises SchemaError where files do not fit together."""
    found: list[list[np.dtype]] = [[] for _ in features]
    first: dict[str, str] = {}
    for path in files:
        schema = pl.read_parquet_schema(path)
        try:
            require_columns(list(schema), [*core, *features])
        except SchemaError as error:
            raise SchemaError(f"{path}: {error.given}", rule=error.rule, fix=error.fix) from error
        for name in core:
            kind = schema[name]
            kind_of = "integers" if kind.is_integer() else "times" if kind.is_temporal() else "strings"
            if first.setdefault(name, kind_of) != kind_of:
                raise SchemaError(
                    f"column '{name}' holds {kind_of} in {path} and {first[name]} in {files[0]}",
                    rule="All files of a log hold a column as one type",
                    fix="Cast it in one of them",
                )
        for types, name in zip(found, features, strict=True):
            types.append(_numbers(pl.Series(name, [], schema[name])).dtype)
    return [np.result_type(*types) for types in found]


def _count(files: Sequence[Path], name: str) -> tuple[Vocabulary, np.ndarray]:
    """The distinct ids of a column, sorted, and (n,) how often each occurs."""
    total = None
    for path in files:
        counted = pl.scan_parquet(path, glob=False).group_by(name).len().collect(engine="streaming")
        counted = counted.select(clean_ids(counted[name]), pl.col("len").cast(pl.Int64))
        total = counted if total is None else pl.concat([total, counted]).group_by(name).sum()
    assert total is not None
    total = total.sort(name)
    return Vocabulary(total[name]), total["len"].to_numpy()


def _deal(
    files: Sequence[Path],
    columns: Sequence[str],
    kinds: Sequence[np.dtype],
    users: Vocabulary,
    items: Vocabulary,
    lengths: np.ndarray,
    aside: Path,
) -> tuple[list[Path], np.dtype]:
    """Deal the events into bucket files of neighbouring users, in the source's order; and their record type."""
    ends = np.cumsum(lengths)
    size = max(_BUCKET_EVENTS, -(-int(ends[-1]) // _MOST_BUCKETS))
    bucket_of_user = (ends - lengths) // size
    buckets = [aside / f"bucket_{index}.bin" for index in range(int(bucket_of_user[-1]) + 1)]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(bucket.open("wb", buffering=0)) for bucket in buckets]
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=list(columns)):
                frame = pl.DataFrame(pl.from_arrow(batch)).select(columns)
                records = _records(frame, kinds, users, items)
                bucket = bucket_of_user[records["user"]]
                order = np.argsort(bucket, kind="stable")
                bounds = np.searchsorted(bucket[order], np.arange(len(buckets) + 1))
                records = records[order]
                for writer, a, b in zip(writers, bounds[:-1], bounds[1:], strict=True):
                    _write(writer, records[a:b])
    return buckets, records.dtype


def _records(
    frame: pl.DataFrame, kinds: Sequence[np.dtype], users: Vocabulary, items: Vocabulary
) -> np.ndarray:
    """Raw columns (user, item, time, features …) → (n,) records with dense ids, the features as `kinds`."""
    user, item, time, *features = frame.get_columns()
    columns = {
        "user": users.encode(clean_ids(user)).astype(np.int32),
        "item": items.encode(clean_ids(item)).astype(np.int32),
        "time": clean_times(time).to_numpy(),
    } | {
        f"feature_{index}": _numbers(column).astype(kind, copy=False)
        for index, (column, kind) in enumerate(zip(features, kinds, strict=True))
    }
    records = np.empty(len(frame), np.dtype([(name, column.dtype) for name, column in columns.items()]))
    for name, column in columns.items():
        records[name] = column
    return records


def _gather(buckets: Sequence[Path], dtype: np.dtype, n_users: int, aside: Path) -> np.ndarray:
    """Tidy each bucket and append it to the arrays of the store; (U,) the events of each user."""
    lengths = np.zeros(n_users, np.int64)
    columns = list(dtype.names or ())
    with contextlib.ExitStack() as stack:
        arrays = {
            name: stack.enter_context(_GrowingArray(aside / f"{name}.npy", dtype[name]))
            for name in columns[1:]
        }
        for bucket in buckets:
            records = np.fromfile(bucket, dtype)
            bucket.unlink()
            events = tidy(pl.DataFrame({name: records[name] for name in columns}))
            lengths += np.bincount(events["user"].to_numpy(), minlength=n_users)
            for name, array in arrays.items():
                array.append(events[name].to_numpy())
    return lengths


class _GrowingArray:
    """A one-dimensional .npy file that is appended to; its header learns the length when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.file, self.dtype, self.length = path.open("wb+", buffering=0), dtype, 0

    def __enter__(self) -> _GrowingArray:
        self._write_header()
        return self

    def append(self, values: np.ndarray) -> None:
        _write(self.file, values.astype(self.dtype, copy=False))
        self.length += len(values)

    def __exit__(self, *error: object) -> None:
        with self.file:
            if error[0] is None:
                self.file.seek(0)
                self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header for the longest length there can be, so rewriting it never moves the data.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


# -- files ---------------------------------------------------------------------------------------------------


def _write(file: Any, values: np.ndarray) -> None:
    """All bytes or an OSError: an unbuffered write may stop short."""
    view = memoryview(values.tobytes())
    while view:
        view = view[file.write(view) :]


def _save_frame(
    directory: Path, users: Vocabulary, items: Vocabulary, lengths: np.ndarray, features: list[str]
) -> None:
    """What stands beside the event arrays."""
    np.save(directory / "offsets.npy", offsets_of(lengths))
    pq.write_table(pa.table({"user_id": users.raw}), directory / "users.parquet")
    pq.write_table(pa.table({"item_id": items.raw}), directory / "items.parquet")
    about = {"format": FORMAT, "features": features}
    (directory / "histories.json").write_text(json.dumps(about), encoding="utf-8")


def _map(path: Path) -> np.ndarray:
    """A plain array over the mapped file (an empty file cannot be mapped)."""
    array = np.load(path, mmap_mode="r") if path.stat().st_size > _HEADER_BYTES else np.load(path)
    return np.asarray(array)
