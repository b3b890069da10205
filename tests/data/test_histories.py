import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.data import folders, histories
from tiglon.data.events import read_interactions
from tiglon.data.histories import HistoryStore, build_from_parquet
from tiglon.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    DataError,
    SchemaError,
    StorageError,
)

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=60)


def table_of(rows) -> pl.DataFrame:
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    return frame.with_columns(price=pl.Series(range(len(rows)), dtype=pl.Float32), sold=pl.lit(True))


def random_rows(n: int, seed: int = 0) -> list[tuple[int, int, int]]:
    rng = np.random.default_rng(seed)
    return list(zip(*(rng.integers(0, high, n).tolist() for high in (30, 20, 50)), strict=True))


def assert_same(a: HistoryStore, b: HistoryStore) -> None:
    assert a.users == b.users
    assert a.items == b.items
    assert a.features.keys() == b.features.keys()
    for name in ("offsets", "item", "time"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    for name, column in a.features.items():
        np.testing.assert_array_equal(column, b.features[name])
        assert column.dtype == b.features[name].dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    asked=st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 8)), max_size=8),
    last=st.none() | st.integers(1, 5),
)
def test_reads_are_exact_in_time(rows, asked, last):
    log = read_interactions(table_of(rows))
    store = HistoryStore.build(log, ["price"])
    users = np.array([min(user, len(log.users) - 1) for user, _ in asked], np.int64)
    found = store.before(users, time=np.array([time for _, time in asked], np.int64), last=last)
    assert len(found) == len(asked)
    for b, (user, (_, time)) in enumerate(zip(users, asked, strict=True)):
        rows_of = np.flatnonzero((log.user == user) & (log.time < time))[-(last or len(log)) :]
        part = slice(found.offsets[b], found.offsets[b + 1])
        np.testing.assert_array_equal(found.item[part], log.item[rows_of])
        np.testing.assert_array_equal(found.time[part], log.time[rows_of])
        np.testing.assert_array_equal(found.features["price"][part], log.extra["price"].to_numpy()[rows_of])


def test_whole_lives_and_one_time_for_all():
    store = HistoryStore.build(read_interactions(table_of([(0, 1, 1), (0, 2, 2), (1, 1, 3)])))
    assert len(store) == 2
    assert [x.tolist() for x in store.before([1, -1, 0])] == [[0], [], [0, 1]]
    assert [x.tolist() for x in store.before([1, 0], time=2)] == [[], [0]]
    assert len(store.before([])) == 0


def test_bad_reads():
    store = HistoryStore.build(read_interactions(table_of([(0, 1, 1), (1, 1, 3)])))
    with pytest.raises(DataError, match=r"a dense user outside 0 … 1"):
        store.before([2])
    with pytest.raises(ConfigError, match=r"last=0"):
        store.before([0], last=0)
    with pytest.raises(DataError, match=r"One time, or one a user"):
        store.before([0, 1], time=[1, 2, 3])


def test_building_copies_no_events():
    log = read_interactions(table_of(random_rows(50)))
    store = HistoryStore.build(log)
    assert np.shares_memory(store.item, log.item)
    assert np.shares_memory(store.time, log.time)


def test_features_are_numbers():
    log = read_interactions(table_of([(0, 1, 1)]).with_columns(brand=pl.lit("x"), gap=pl.lit(None, pl.Int64)))
    with pytest.raises(SchemaError, match=r"feature 'brand' of type String"):
        HistoryStore.build(log, ["brand"])
    with pytest.raises(DataError, match=r"feature 'gap' holds 1 nulls"):
        HistoryStore.build(log, ["gap"])
    with pytest.raises(SchemaError, match=r"no column 'prize'.*Did you mean 'price'"):
        HistoryStore.build(log, ["prize"])


# -- files -------------------------------------------------------------------------------------------------


def test_saved_and_mapped(tmp_path):
    store = HistoryStore.build(read_interactions(table_of(random_rows(100))), ["price", "sold"])
    store.save(tmp_path / "deep" / "store")
    loaded = HistoryStore.load(tmp_path / "deep" / "store")
    assert_same(loaded, store)
    assert isinstance(loaded.item.base, np.memmap)
    HistoryStore.build(read_interactions(table_of([(7, 1, 1)]))).save(tmp_path / "deep" / "store")  # replaces
    assert HistoryStore.load(tmp_path / "deep" / "store").users.raw.to_pylist() == [7]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]


def test_damage_and_a_newer_format(tmp_path):
    store = HistoryStore.build(read_interactions(table_of(random_rows(100))))
    store.save(tmp_path / "a")
    (tmp_path / "a" / "time.npy").unlink()
    with pytest.raises(
        BundleDamagedError, match=r"histories in .*a cannot be read: .*time\.npy.*Build it anew"
    ):
        HistoryStore.load(tmp_path / "a")
    store.save(tmp_path / "b")
    content = (tmp_path / "b" / "item.npy").read_bytes()
    (tmp_path / "b" / "item.npy").write_bytes(content[:-8])
    with pytest.raises(BundleDamagedError):
        HistoryStore.load(tmp_path / "b")
    store.save(tmp_path / "c")
    (tmp_path / "c" / "histories.json").write_text(json.dumps({"format": 99, "features": []}))
    with pytest.raises(BundleVersionError, match=r"histories of format 99.*Update Tiglon"):
        HistoryStore.load(tmp_path / "c")
    with pytest.raises(BundleDamagedError):
        HistoryStore.load(tmp_path / "none")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    HistoryStore.build(read_interactions(table_of([(7, 1, 1)]))).save(tmp_path / "store")
    large = HistoryStore.build(read_interactions(table_of(random_rows(5000))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(StorageError, match=r"store could not be written.*Nothing was changed there"):
            large.save(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert HistoryStore.load(tmp_path / "store").users.raw.to_pylist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# -- larger than memory --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=ROWS, cut=st.integers(0, 60))
def test_the_streamed_store_is_the_built_one(tmp_path_factory, rows, cut):
    folder = tmp_path_factory.mktemp("log")
    table = table_of(rows)
    parts = [part for part in (table[:cut], table[cut:]) if part.height]
    for number, part in enumerate(parts):
        part.write_parquet(folder / f"{number}.parquet")
    paths = [folder / f"{number}.parquet" for number in range(len(parts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histories, "_BATCH_ROWS", 7)
        patch.setattr(histories, "_BUCKET_EVENTS", 5)
        streamed = build_from_parquet(paths, folder / "store", features=["price", "sold"])
    assert_same(streamed, HistoryStore.build(read_interactions(table), ["price", "sold"]))
    assert not [path for path in (folder / "store").iterdir() if "bucket" in path.name]


def test_string_ids_and_datetimes_stream_too(tmp_path):
    table = table_of(random_rows(200)).with_columns(
        pl.format("ü{}", "user_id").alias("user_id"), pl.from_epoch("timestamp", time_unit="s")
    )
    table.write_parquet(tmp_path / "log.parquet")
    streamed = build_from_parquet(tmp_path / "log.parquet", tmp_path / "store")
    assert_same(streamed, HistoryStore.build(read_interactions(table)))


@pytest.mark.parametrize("text", [pl.String, pl.Categorical, pl.Enum([f"u{29 - i}" for i in range(30)])])
def test_files_may_hold_a_column_as_other_types(tmp_path, text):
    table = table_of(random_rows(90)).with_columns(
        user_id=pl.format("u{}", "user_id"), sold=pl.col("item_id") > 3
    )
    kinds = [
        {"user_id": text, "item_id": pl.Int32, "price": pl.Int64, "sold": pl.Boolean},
        {"user_id": pl.String, "item_id": pl.Int64, "price": pl.Float32, "sold": pl.Int8},
        {"user_id": text, "item_id": pl.UInt64, "price": pl.Float64, "sold": pl.UInt8},
    ]
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    for number, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        table[30 * number : 30 * number + 30].cast(kind).write_parquet(path)
    one = table.cast({"price": pl.Float64, "sold": pl.Int16})
    expected = HistoryStore.build(read_interactions(one), ["price", "sold"])
    assert_same(build_from_parquet(paths, tmp_path / "store", features=["price", "sold"]), expected)
    turned = build_from_parquet(paths[::-1], tmp_path / "store", features=["price"])
    assert sorted(turned.features["price"].tolist()) == list(range(90))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"user_id": pl.String},
            r"column 'user_id' holds strings in .*b\.parquet and integers in .*a\.parquet",
        ),
        ({"timestamp": pl.Datetime}, r"column 'timestamp' holds times in .*b\.parquet and integers in"),
        ({"price": None}, r"b\.parquet: no column 'price'"),
    ],
)
def test_files_that_do_not_fit_together_are_told(tmp_path, change, message):
    table = table_of(random_rows(20))
    table.write_parquet(tmp_path / "a.parquet")
    other = table.drop(change) if None in change.values() else table.cast(change)
    other.write_parquet(tmp_path / "b.parquet")
    with pytest.raises(SchemaError, match=message):
        build_from_parquet(
            [tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "store", features=["price"]
        )
    assert not (tmp_path / "store").exists()


def test_only_a_store_is_replaced_by_a_store(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    table_of(random_rows(20)).write_parquet(own / "log.parquet")
    with pytest.raises(ConfigError, match=r"the folder .*own, which holds files but no histories\.json"):
        build_from_parquet(own / "log.parquet", own)
    store = build_from_parquet(own / "log.parquet", tmp_path / "store")
    with pytest.raises(ConfigError, match=r"log\.parquet, which is a file"):
        store.save(own / "log.parquet")
    assert [path.name for path in own.iterdir()] == ["log.parquet"]
    store.save(tmp_path / "store")


@pytest.mark.parametrize("at_once", [True, False])
def test_what_stood_there_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, at_once):
    store = HistoryStore.build(read_interactions(table_of(random_rows(20))))
    monkeypatch.chdir(tmp_path)
    store.save("store")
    real = os.replace

    def refuse_the_new(source, target):
        if Path(target).name == "store" and Path(source).name != "old":
            raise OSError(errno.EIO, "the disk")
        real(source, target)

    def exchanged(one, other):
        if at_once:
            raise OSError(errno.EIO, "the disk")
        return False

    monkeypatch.setattr(os, "replace", refuse_the_new)
    monkeypatch.setattr(folders, "_exchanged", exchanged)
    with pytest.raises(StorageError, match="Nothing was changed there"):
        store.save("store")
    assert_same(HistoryStore.load("store"), store)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_working_folder_can_be_replaced(tmp_path, monkeypatch):
    store = HistoryStore.build(read_interactions(table_of(random_rows(20))))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store.save(".")
    assert_same(HistoryStore.load(tmp_path / "here"), store)


def test_bad_logs_leave_nothing(tmp_path):
    path = tmp_path / "log.parquet"
    table = table_of(random_rows(20))
    for bad, message in (
        (table.with_columns(user_id=pl.lit(None, pl.Int64)), "'user_id' holds 1 nulls"),
        (table.with_columns(timestamp=-1), "20 negative times"),
        (table.with_columns(item_id=pl.lit(1.5)), "Ids are integers or strings"),
        (table.with_columns(price=pl.lit("x")), "feature 'price' of type String"),
        (table.drop("timestamp"), "no column 'timestamp'"),
        (table[:0], "a log without events"),
    ):
        bad.write_parquet(path)
        with pytest.raises(DataError, match=message):
            build_from_parquet(path, tmp_path / "store", features=["price"])
        assert [entry.name for entry in tmp_path.iterdir()] == ["log.parquet"]
    with pytest.raises(DataError, match=r"no file at"):
        build_from_parquet(tmp_path / "none.parquet", tmp_path / "store")


def test_a_full_disk_while_streaming(tmp_path, monkeypatch):
    table_of(random_rows(100)).write_parquet(tmp_path / "log.parquet")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(histories, "_write", full)
    with pytest.raises(StorageError, match=r"No space left on device.*Free some space"):
        build_from_parquet(tmp_path / "log.parquet", tmp_path / "store")
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.parquet"]


def test_lengths_are_those_that_would_be_read():
    store = HistoryStore.build(read_interactions(table_of(random_rows(400))))
    users, time = np.arange(-1, len(store)), np.arange(len(store) + 1) * 2
    for last in (None, 3):
        np.testing.assert_array_equal(
            store.lengths(users, time, last), store.before(users, time, last).lengths
        )
