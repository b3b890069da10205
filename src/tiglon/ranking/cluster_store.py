"""Clustered lives beside the histories: made offline, read point-in-time, kept up as lives go on.

    store = ClusterStore.build(histories, vectors, until=monday, work="clusters.work")   # goes on if killed
    store.save("clusters"); store = ClusterStore.load("clusters", histories, vectors)
    store.before(users, time=t)           leaves up to `until`, then behaviours in [until, t), each of size 1
    store, report = store.update(longer_histories, vectors, until=tuesday)

A leaf is a *virtual item* (TWIN V2): the dense id and the categorical features of the member nearest the
centroid, the mean of the numerical features and of the time, and `cluster_size`, how many behaviours it stands
for. A read has the shape of a history with that one feature more, so whatever reads histories reads these.

Nothing is stored that can be computed: centroids come from the members and the vectors, whose version is kept.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numba import njit

from tiglon.data.features import FittedFeatures
from tiglon.data.folders import written_aside
from tiglon.data.histories import CLUSTER_SIZE, HistoryStore, offsets_of
from tiglon.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    DataError,
    LeakageError,
    SchemaError,
    did_you_mean,
)
from tiglon.ranking.clusters import (
    ClusterConfig,
    Groups,
    Leaves,
    divide,
    join,
    mean_times,
    mean_values,
    representatives,
)
from tiglon.semantic_ids import storage
from tiglon.types import MISSING, Histories, ItemVectors, Vocabulary, hash_ids

FORMAT = 2
_BLOCK_EVENTS = 1_000_000
_SETS_A_USER = 128  # more than groups


@dataclass(frozen=True)
class ClusterSettings:
    """What made a store, and what must be the same to go on with it."""

    vectors: str  # `vectors_version`
    until: int  # behaviours strictly before are in leaves
    groups: Groups
    config: ClusterConfig
    categorical: tuple[str, ...]  # features that a virtual item has from one member
    past: str  # `past_version`
    coded: bool = False  # the features are codes now, which groups and averages do not speak of


@dataclass(frozen=True)
class UpdateReport:
    """behaviours: in leaves now, of which `new` came in.   leaves: now, of which `changed` are not as they were.
    moved: earlier behaviours that are in another leaf than before.
    """

    behaviours: int
    new: int
    leaves: int
    changed: int
    moved: int

    def __str__(self) -> str:
        earlier = max(self.behaviours - self.new, 1)
        return (
            f"{self.new:,} new behaviours; {self.changed:,} of {self.leaves:,} leaves changed "
            f"({self.changed / max(self.leaves, 1):.1%}); {self.moved:,} earlier behaviours moved ({self.moved / earlier:.1%})"
        )


@dataclass(frozen=True, eq=False)
class ClusterStore:
    """histories: the raw lives.   virtual: the leaves of the same users, oldest first by mean time, with features
    `cluster_size` and `cluster_group`.   member: (M,) int32 places in their user's life, leaf by leaf.   counted: (U,) behaviours
    of each user before `until`, with those beyond the cap.
    """

    histories: HistoryStore
    virtual: HistoryStore
    member: np.ndarray
    counted: np.ndarray
    settings: ClusterSettings

    def __post_init__(self) -> None:
        if self.virtual.features[CLUSTER_SIZE].sum() != len(self.member) or len(self.counted) != len(
            self.virtual
        ):
            raise DataError(
                f"leaves of {self.virtual.features[CLUSTER_SIZE].sum()} behaviours with {len(self.member)} members"
            )

    def __len__(self) -> int:
        """How many users."""
        return len(self.virtual)

    @property
    def users(self) -> Vocabulary:
        return self.virtual.users

    @property
    def items(self) -> Vocabulary:
        return self.virtual.items

    @property
    def leaves(self) -> Leaves:
        """The leaves as rows of `histories`."""
        sizes = self.virtual.features[CLUSTER_SIZE]
        start = np.repeat(self.histories.offsets[:-1], np.diff(self.virtual.offsets))
        return Leaves(self.member + np.repeat(start, sizes), offsets_of(sizes))

    # -- made ------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        histories: HistoryStore,
        vectors: ItemVectors,
        *,
        until: int | None = None,
        groups: Groups | None = None,
        config: ClusterConfig | None = None,
        categorical: Sequence[str] = (),
        threads: int = 1,
        work: str | Path | None = None,
        report: Callable[[float], None] | None = None,
    ) -> ClusterStore:
        """Cluster every life up to `until` (None: all of it). The result is the same for any `threads`.

        vectors: the ranker's, (N, D) or (N + 1, D) with the unknown item last; without that row it is zero.
        categorical: features that are names, whatever their type; all others are averaged.
        work: a folder of finished blocks of users, from which a killed job goes on; delete it afterwards.
        report: is told the share that is done.
        Raises DataError, SchemaError for an unknown column, ConfigError for the work of another job.
        """
        groups, config = groups or Groups(), config or ClusterConfig()
        _require_columns(histories, groups, categorical)
        table = _table(vectors, histories.items)
        if until is None:
            until = int(histories.time.max()) + 1 if len(histories.time) else 0
        version = vectors_version(vectors, histories.items)
        past = past_version(histories, int(until))
        settings = ClusterSettings(version, int(until), groups, config, tuple(categorical), past)
        start, stop = _lives(histories, settings.until)
        blocks, done = [], 0
        for users in _blocks(stop - start):
            path = Path(work) / f"{users.start}.safetensors" if work is not None else None
            job = _plain(settings) | {"stop": int(users.stop)}
            leaves = _finished(path, job)
            if leaves is None:
                leaves = _divided(histories, users, start[users], stop[users], table, settings, threads)
                if path is not None:
                    _finish(path, leaves, job)
            blocks.append(leaves)
            done += int((stop - start)[users].sum())
            if report is not None:
                report(done / max(int((stop - start).sum()), 1))
        virtual = _stand(histories, _end_to_end(blocks), table, settings)
        return cls._of(histories, vectors, virtual, stop - start, settings)

    @classmethod
    def _of(
        cls,
        histories: HistoryStore,
        vectors: ItemVectors,
        v: _VirtualItems,
        counted: np.ndarray,
        settings: ClusterSettings,
    ) -> ClusterStore:
        """Virtual items in any order become those of a store: by user and mean time, of equals the oldest first."""
        order = np.lexsort((v.leaves.first, v.time, v.owner))
        leaves, owner = v.leaves.take(order), v.owner[order]
        virtual = HistoryStore(
            histories.users,
            histories.items,
            offsets_of(np.bincount(owner, minlength=len(histories))),
            v.item[order],
            v.time[order],
            {name: column[order] for name, column in v.features.items()},
        )
        member = (leaves.member - np.repeat(histories.offsets[owner], leaves.sizes)).astype(np.int32)
        version = vectors_version(vectors, histories.items, virtual.item)
        return cls(histories, virtual, member, counted, replace(settings, vectors=version))

    # -- read ------------------------------------------------------------------------------------------------

    def before(
        self,
        users: np.ndarray | Sequence[int],
        time: np.ndarray | Sequence[int] | int | None = None,
        last: int | None = None,
    ) -> Histories:
        """What each of B users did strictly before `time`: leaves, then the behaviours that came after them.

        The arguments are those of `HistoryStore.before`; `last` counts entries. The features are those of the
        histories and `cluster_size`. Raises LeakageError where a time lies before `until`: a leaf knows no less.
        """
        start, stop = self._raw(users, time)
        if last is not None and last < 1:
            raise ConfigError(
                f"last={last}", rule="A history holds at least one entry", fix="Pass None for all"
            )
        leaves = self.virtual.before(users)
        found = _appended(leaves, self.histories, start, stop)
        return found if last is None else found.last(last)

    def lengths(
        self,
        users: np.ndarray | Sequence[int],
        time: np.ndarray | Sequence[int] | int | None = None,
        last: int | None = None,
    ) -> np.ndarray:
        """(B,) entries that `before` reads; the same arguments and errors."""
        start, stop = self._raw(users, time)
        user = np.asarray(users, dtype=np.int64)
        leaves = np.where(user == MISSING, 0, self.virtual.offsets[user + 1] - self.virtual.offsets[user])
        entries = leaves + stop - start
        return entries if last is None else np.minimum(entries, last)

    def behaviours(self, users: np.ndarray, time: np.ndarray) -> np.ndarray:
        """(B,) how many there are before `time`, clustered or not, those that a cap left out with them."""
        return self.histories.lengths(users, time)

    def _raw(
        self, users: np.ndarray | Sequence[int], time: np.ndarray | Sequence[int] | int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B,), (B,): the rows of behaviours from `until` on and before `time`."""
        if time is not None and np.size(time) and np.min(time) < self.settings.until:
            raise LeakageError(
                f"a request at {np.min(time)} of lives that are clustered up to {self.settings.until}",
                rule="A leaf holds behaviours up to that moment and cannot be read before it",
                fix="Cluster with `until` at or before the first request",
            )
        clustered, all_of = (self.histories.lengths(users, moment) for moment in (self.settings.until, time))
        begin = self.histories.offsets[np.asarray(users, dtype=np.int64)]
        return begin + clustered, begin + all_of

    # -- kept up ---------------------------------------------------------------------------------------------

    def update(
        self, histories: HistoryStore, vectors: ItemVectors, until: int | None = None, threads: int = 1
    ) -> tuple[ClusterStore, UpdateReport]:
        """The store up to a later `until`, without clustering everything again; see `clusters.join`.

        histories: the same lives, longer, perhaps with new users and items.   vectors: the same for the old items.
        The cap holds when lives are clustered; later behaviours come on top of it. Raises DataError, ConfigError.
        """
        if self.settings.coded:
            raise ConfigError(
                "an update of clusters whose features are codes",
                rule="Groups and averages are of the numbers that were coded",
                fix="Keep the clusters of the numbers, update these, and code the result: store.coded(features)",
            )
        old = self.onto(histories)
        old.require(vectors)
        table = _table(vectors, histories.items)
        if until is None:
            until = max(int(histories.time.max()) + 1, self.settings.until)
        if until < self.settings.until:
            raise ConfigError(
                f"an update up to {until} of clusters up to {self.settings.until}",
                rule="An update goes forward in time",
                fix="Build anew to go back",
            )
        settings = replace(self.settings, until=int(until), past=past_version(histories, int(until)))
        begin, stop = _lives(histories, until)
        grown = stop > begin + old.counted
        clustered = np.diff(old.virtual.offsets) > 0
        with ThreadPoolExecutor(threads) as pool:
            joined = list(pool.map(old._joiner(table, stop), np.flatnonzero(grown & clustered).tolist()))
        start = np.where(grown & ~clustered, begin, stop)  # lives that begin; no rows of others
        fresh = _divided(histories, slice(0, len(histories)), start, stop, table, settings, threads)
        changed = _end_to_end([*(life.leaves for life in joined), fresh])
        kept = np.ones(len(old.virtual.item), bool)
        for life in joined:
            kept[life.replaced] = False
        virtual = _both(old._virtual_items(np.flatnonzero(kept)), _stand(histories, changed, table, settings))
        store = self._of(histories, vectors, virtual, stop - begin, settings)
        new = len(store.member) - len(old.member)
        moved = sum(life.moved for life in joined)
        return store, UpdateReport(len(store.member), new, len(virtual.leaves), len(changed), moved)

    def _joiner(self, table: np.ndarray, stop: np.ndarray) -> Callable[[int], _Joined]:
        """user → what becomes of this life's leaves when its behaviours up to row stop[user] join."""
        raw, leaves, c = self.histories, self.leaves, self.settings.config

        def joined(user: int) -> _Joined:
            a, b = self.virtual.offsets[user : user + 2]
            mine = slice(leaves.offsets[a], leaves.offsets[b])
            begin = leaves.first[a:b].min()
            rows = np.arange(begin, stop[user])
            before = np.full(len(rows), -1)
            before[leaves.member[mine] - begin] = np.repeat(np.arange(b - a), leaves.sizes[a:b])
            label, group = before.copy(), _groups_of(raw, rows, self.settings.groups)
            item = _rows(raw.item[rows], table)
            join(item, group, label, table, c.largest, c.power, c.iterations, c.sample, c.reach)
            moved = (before >= 0) & (label != before)
            touched = np.zeros(label.max() + 1, bool)
            touched[label[(before < 0) | moved]] = touched[before[moved]] = True
            inside = touched[label]
            replaced = a + np.flatnonzero(touched[: b - a])
            return _Joined(_by_label(rows[inside], label[inside]), replaced, int(moved.sum()))

        return joined

    def _virtual_items(self, leaf: np.ndarray) -> _VirtualItems:
        """Some of the store's own."""
        v = self.virtual
        owner = np.repeat(np.arange(len(v)), np.diff(v.offsets))
        features = {name: column[leaf] for name, column in v.features.items()}
        return _VirtualItems(self.leaves.take(leaf), owner[leaf], v.item[leaf], v.time[leaf], features)

    def onto(self, histories: HistoryStore) -> ClusterStore:
        """The same leaves over a log that went on: users and items may be more and have other dense ids.

        Raises DataError where the past itself changed, SchemaError where the features did.
        """
        if {*histories.features, *RESERVED} != self.virtual.features.keys():
            raise SchemaError(
                f"histories with the features {', '.join(histories.features) or 'none'}",
                rule=f"These leaves were made of {', '.join(self.virtual.features)}",
                fix="Build the histories with the same features, or cluster anew",
            )
        place, item = histories.users.encode(self.users.raw), histories.items.encode(self.items.raw)
        counted = np.zeros(len(histories), np.int64)
        counted[place[place >= 0]] = self.counted[place >= 0]
        start, stop = _lives(histories, self.settings.until)
        changed = int((counted != stop - start).sum()) + int((place < 0).sum())
        other = not changed and self.settings.past != past_version(histories, self.settings.until)
        if changed or other or (item < 0).any():
            raise DataError(
                f"{changed or 'some'} users whose behaviours before {self.settings.until} are not those that were "
                f"clustered, {int((item < 0).sum())} items that are gone",
                rule="A log may grow only from that moment on",
                fix="Cluster anew",
            )
        if self.users == histories.users and self.items == histories.items:
            return ClusterStore(histories, self.virtual, self.member, self.counted, self.settings)
        v = self.virtual
        owner = np.repeat(place, np.diff(v.offsets))
        order = np.argsort(owner, kind="stable")
        member = Leaves(self.member, offsets_of(v.features[CLUSTER_SIZE])).take(order).member
        virtual = HistoryStore(
            histories.users,
            histories.items,
            offsets_of(np.bincount(owner, minlength=len(histories))),
            np.where(v.item[order] < 0, -1, item[v.item[order]]).astype(np.int32),
            v.time[order],
            {name: column[order] for name, column in v.features.items()},
        )
        return ClusterStore(histories, virtual, member, counted, self.settings)

    def require(
        self,
        vectors: ItemVectors | None = None,
        groups: Groups | None = None,
        config: ClusterConfig | None = None,
    ) -> None:
        """Raise ConfigError where the leaves were made with others than these; None is not compared."""
        made = self.settings
        given: dict[str, tuple[Any, Any]] = {
            "groups": (groups, made.groups),
            "settings": (config, made.config),
        }
        if vectors is not None:
            given["vectors"] = (vectors_version(vectors, self.items, self.virtual.item), made.vectors)
        for name, (value, known) in given.items():
            if value is not None and value != known:
                raise ConfigError(
                    f"clusters made with other {name}: {known}, not {value}",
                    rule="Leaves are read and continued with the vectors, groups and settings that made them",
                    fix="Cluster anew",
                )

    def coded(self, features: FittedFeatures) -> ClusterStore:
        """The same lives with the codes of cross features, as ranking tasks read them: averages are taken of
        numbers first and coded then. The histories must hold the numbers. Raises SchemaError."""

        return self.as_codes(lambda of: features.line_codes(pl.DataFrame(of)))

    def as_codes(self, codes: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> ClusterStore:
        """The same lives with other features, a function of those that they have."""
        own = {name: self.virtual.features[name] for name in RESERVED}
        histories = replace(self.histories, features=codes(self.histories.features))
        virtual = codes({k: v for k, v in self.virtual.features.items() if k not in RESERVED})
        past = past_version(histories, self.settings.until)
        return replace(
            self,
            histories=histories,
            virtual=replace(self.virtual, features=virtual | own),
            settings=replace(self.settings, past=past, coded=True),
        )

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; the raw histories are not in it. Raises StorageError."""
        about = {"format": FORMAT, "settings": _plain(self.settings), "features": list(self.virtual.features)}
        with written_aside(Path(directory), "clusters.json") as aside:
            self.virtual.save(aside / "virtual")
            np.save(aside / "member.npy", self.member)
            np.save(aside / "counted.npy", self.counted)
            (aside / "clusters.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        histories: HistoryStore,
        vectors: ItemVectors | None = None,
        groups: Groups | None = None,
        config: ClusterConfig | None = None,
    ) -> ClusterStore:
        """Map the folder into memory beside its histories, which may have grown since (`onto`).

        vectors, groups, config: what is in use now, compared with what made the leaves where given.
        Raises BundleDamagedError, BundleVersionError, ConfigError, DataError.
        """
        directory = Path(directory)
        try:
            about = json.loads((directory / "clusters.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise BundleVersionError(
                    f"clusters of format {about['format']} in {directory}",
                    rule=f"This Tiglon reads format {FORMAT}",
                    fix="Update Tiglon" if about["format"] > FORMAT else "Cluster anew",
                )
            virtual = HistoryStore.load(directory / "virtual")
            member = np.load(directory / "member.npy", mmap_mode="r" if len(virtual.item) else None)
            counted = np.load(directory / "counted.npy")
            store = cls(histories, virtual, np.asarray(member), counted, _settings(about["settings"]))
        except (OSError, ValueError, KeyError, TypeError, BundleDamagedError) as error:
            raise BundleDamagedError(
                f"clusters in {directory} cannot be read: {error}",
                rule="A cluster store has clusters.json, virtual, member and counted",
                fix="Cluster anew",
            ) from error
        store.require(vectors, groups, config)
        return store.onto(histories)


CLUSTER_GROUP = "cluster_group"
RESERVED = (CLUSTER_SIZE, CLUSTER_GROUP)  # features of leaves


def vectors_version(vectors: ItemVectors, items: Vocabulary, which: np.ndarray | None = None) -> str:
    """Names the vectors of the dense items `which` (None: all), whatever other items there are, in any order."""
    rows = np.arange(len(items)) if which is None else np.unique(which[which >= 0])
    if len(vectors) <= rows.max(initial=-1):
        raise _other_catalogue(vectors, items)
    names = hash_ids(items)[rows]
    bits = np.ascontiguousarray(vectors.values[rows]).view(np.uint32)
    return f"{vectors.encoder} {int(_row_hashes(bits, names).sum(dtype=np.uint64)):016x}"


def past_version(histories: HistoryStore, until: int) -> str:
    """Names what every user did before `until`, whatever dense ids users and items have."""
    start, stop = _lives(histories, until)
    who, what = hash_ids(histories.users), np.append(hash_ids(histories.items), np.uint64(0))
    columns = {"": histories.time, " ": what[histories.item]} | histories.features
    total = 0
    for name, column in sorted(columns.items()):
        if column.dtype.kind == "f":
            column = np.where(np.isnan(column), np.nan, column).astype(np.float64).view(np.uint64)
        total += int(_past_hash(who, start, stop, column, np.uint64(zlib.crc32(name.encode()))))
    return f"{total % 2**64:016x}"


@njit(cache=True)
def _past_hash(
    who: np.ndarray, start: np.ndarray, stop: np.ndarray, column: np.ndarray, salt: np.uint64
) -> np.uint64:
    """Of a column in the rows start:stop of each user: who, which place in their life, which value."""
    total = np.uint64(0)
    for u in range(len(start)):
        for row in range(start[u], stop[u]):
            h = who[u] ^ salt
            for part in (np.uint64(row - start[u]), np.uint64(column[row])):
                h = (h ^ part) * np.uint64(0x9E3779B97F4A7C15)
                h ^= h >> np.uint64(29)
            total += h
    return total


@njit(cache=True)
def _row_hashes(bits: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """(n,) uint64 of rows (n, D) uint32."""
    hashes = np.empty(len(bits), np.uint64)
    for i in range(len(bits)):
        h = seed[i]
        for d in range(bits.shape[1]):
            h = (h ^ np.uint64(bits[i, d])) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        hashes[i] = h
    return hashes


def _table(vectors: ItemVectors, items: Vocabulary) -> np.ndarray:
    """(N + 1, D), the unknown item last."""
    if len(vectors) == len(items) + 1:
        return np.ascontiguousarray(vectors.values)
    if len(vectors) != len(items):
        raise _other_catalogue(vectors, items)
    return np.concatenate([vectors.values, np.zeros((1, vectors.values.shape[1]), np.float32)])


def _other_catalogue(vectors: ItemVectors, items: Vocabulary) -> DataError:
    return DataError(
        f"{len(vectors)} vectors for a catalogue of {len(items)} items",
        rule="There is one vector an item, and perhaps one more for the unknown",
        fix="Take the vectors and the histories from the same catalogue version",
    )


def _require_columns(histories: HistoryStore, groups: Groups, categorical: Sequence[str]) -> None:
    for name in [*categorical, *([groups.column] if groups.column is not None else [])]:
        if name not in histories.features:
            raise SchemaError(
                f"no feature '{name}' in the histories",
                rule="Groups and categories are features of the histories",
                fix=did_you_mean(name, histories.features) if histories.features else "Build them with it",
            )
    for name in RESERVED:
        if name in histories.features:
            raise SchemaError(f"a feature '{name}' in the histories", rule="Leaves have one of that name")


def _lives(histories: HistoryStore, until: int) -> tuple[np.ndarray, np.ndarray]:
    """(U,), (U,): the rows of every user's behaviours before `until`."""
    start = histories.offsets[:-1]
    return start, start + histories.lengths(np.arange(len(histories)), until)


def _groups_of(histories: HistoryStore, rows: np.ndarray, groups: Groups) -> np.ndarray:
    """(n,) int8"""
    if groups.column is None:
        return np.zeros(len(rows), np.int8)
    return groups.of(histories.features[groups.column][rows])


def _rows(item: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Dense items as rows of the table."""
    return np.where(item < 0, len(table) - 1, item).astype(np.int64)


# -- virtual items -----------------------------------------------------------------------------------------------


class _VirtualItems(NamedTuple):
    """C leaves and what stands for them, in any order.   leaves: rows of the histories.   owner: (C,) dense users."""

    leaves: Leaves
    owner: np.ndarray
    item: np.ndarray
    time: np.ndarray
    features: dict[str, np.ndarray]


class _Joined(NamedTuple):
    """leaves: of one life that are not as they were.   replaced: numbers of those that they take the place of.
    moved: earlier behaviours that are in another leaf than before."""

    leaves: Leaves
    replaced: np.ndarray
    moved: int


def _stand(
    histories: HistoryStore, leaves: Leaves, table: np.ndarray, settings: ClusterSettings
) -> _VirtualItems:
    """Each leaf becomes a virtual item."""
    item = _rows(histories.item[leaves.member], table)
    nearest = leaves.member[representatives(item, leaves.offsets, table)]
    features = {
        name: column[nearest]
        if name in settings.categorical
        else mean_values(column[leaves.member], leaves.offsets).astype(np.result_type(column, np.float32))
        for name, column in histories.features.items()
    }
    features[CLUSTER_SIZE] = leaves.sizes.astype(np.int32)
    features[CLUSTER_GROUP] = _groups_of(histories, leaves.first, settings.groups)
    return _VirtualItems(
        leaves,
        np.searchsorted(histories.offsets, leaves.first, side="right") - 1,
        histories.item[nearest].astype(np.int32),
        mean_times(histories.time[leaves.member], leaves.offsets),
        features,
    )


def _both(a: _VirtualItems, b: _VirtualItems) -> _VirtualItems:
    return _VirtualItems(
        _end_to_end([a.leaves, b.leaves]),
        np.concatenate([a.owner, b.owner]),
        np.concatenate([a.item, b.item]),
        np.concatenate([a.time, b.time]),
        {name: np.concatenate([column, b.features[name]]) for name, column in a.features.items()},
    )


# -- blocks of users ---------------------------------------------------------------------------------------------


def _blocks(lengths: np.ndarray) -> list[slice]:
    """Neighbouring users with about _BLOCK_EVENTS behaviours together, or one user with more."""
    ends = np.cumsum(lengths)
    cuts = np.flatnonzero(np.diff((ends - lengths) // _BLOCK_EVENTS)) + 1
    edges = [0, *cuts.tolist(), len(lengths)] if len(lengths) else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _divided(
    histories: HistoryStore,
    users: slice,
    start: np.ndarray,
    stop: np.ndarray,
    table: np.ndarray,
    settings: ClusterSettings,
    threads: int,
) -> Leaves:
    """The leaves of the rows start:stop of each of these users, at most `cap` of the newest."""
    if settings.config.cap is not None:
        start = np.maximum(start, stop - settings.config.cap)
    lengths = stop - start
    offsets = offsets_of(lengths)
    rows = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    owner = np.repeat(np.arange(users.start, users.stop), lengths)
    key = owner * _SETS_A_USER + _groups_of(histories, rows, settings.groups)
    return divide(rows, _rows(histories.item[rows], table), key, table, settings.config, threads)


def _end_to_end(parts: Sequence[Leaves]) -> Leaves:
    if not parts:
        return Leaves(np.empty(0, np.int64), np.zeros(1, np.int64))
    return Leaves(
        np.concatenate([part.member for part in parts]),
        offsets_of(np.concatenate([part.sizes for part in parts])),
    )


def _finish(path: Path, leaves: Leaves, job: dict[str, Any]) -> None:
    """Keep a block; a file by this name is always whole."""
    aside = path.with_suffix(".part")
    storage.write(aside, {"member": leaves.member, "offsets": leaves.offsets}, job)
    os.replace(aside, path)


def _finished(path: Path | None, job: dict[str, Any]) -> Leaves | None:
    """The block as an earlier call left it, or None."""
    if path is None or not path.exists():
        return None
    arrays, made = storage.read(path)
    if made != job:
        changed = sorted(key for key in job.keys() | made.keys() if job.get(key) != made.get(key))
        raise ConfigError(
            f"{path.parent} is the work of another job ({', '.join(changed)} differ)",
            rule="A job goes on with the histories, vectors and settings it began with",
            fix="Delete the folder to start anew",
        )
    return Leaves(arrays["member"], arrays["offsets"])


# -- reads and updates -------------------------------------------------------------------------------------------


def _appended(leaves: Histories, raw: HistoryStore, start: np.ndarray, stop: np.ndarray) -> Histories:
    """Each user's leaves, then the rows start:stop as entries of size 1."""
    lengths = stop - start
    offsets = leaves.offsets + offsets_of(lengths)
    at = np.arange(lengths.sum()) + np.repeat(start - offsets_of(lengths)[:-1], lengths)
    is_raw = np.zeros(offsets[-1], bool)
    begin = offsets[1:] - lengths
    is_raw[np.arange(len(at)) + np.repeat(begin - offsets_of(lengths)[:-1], lengths)] = True

    def both(older: np.ndarray, newer: np.ndarray) -> np.ndarray:
        whole = np.empty(len(is_raw), np.result_type(older, newer))
        whole[~is_raw], whole[is_raw] = older, newer
        return whole

    features = {name: both(leaves.features[name], column[at]) for name, column in raw.features.items()}
    features[CLUSTER_SIZE] = both(leaves.features[CLUSTER_SIZE], np.ones(len(at), np.int32))
    item = both(leaves.item, raw.item[at].astype(np.int64))
    return Histories(offsets, item, both(leaves.time, raw.time[at]), features, leaves.user)


def _by_label(rows: np.ndarray, label: np.ndarray) -> Leaves:
    """The leaves of rows (M,), rising, with these labels (M,)."""
    order = np.argsort(label, kind="stable")
    opens = np.flatnonzero(np.diff(label[order], prepend=-1))
    return Leaves(rows[order], np.append(opens, len(rows)))


# -- settings ----------------------------------------------------------------------------------------------------


def _plain(settings: ClusterSettings) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(settings)))


def _settings(about: dict[str, Any]) -> ClusterSettings:
    groups = about["groups"] | {"boundaries": tuple(about["groups"]["boundaries"])}
    parts = {
        "groups": Groups(**groups),
        "config": ClusterConfig(**about["config"]),
        "categorical": tuple(about["categorical"]),
    }
    return ClusterSettings(**(about | parts))
