import gzip

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiglon.data.events import align, clean_times, k_core, read_interactions, read_items, read_table
from tiglon.errors import ConfigError, DataError, SchemaError
from tiglon.types import Interactions, Vocabulary

LOG = pl.DataFrame(
    {
        "user_id": ["b", "a", "b", "a", "b"],
        "item_id": [30, 10, 10, 20, 30],
        "timestamp": [5, 2, 1, 1, 5],
        "price": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
)


def lines(log: Interactions) -> list[tuple]:
    """(user, item, time) in raw ids."""
    return list(zip(log.users.decode(log.user), log.items.decode(log.item), log.time.tolist(), strict=True))


# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["parquet", "csv", "csv.gz", "jsonl", "jsonl.gz", "polars", "lazy", "pandas", "arrow"]
)
def test_every_kind_of_table_gives_the_same_log(tmp_path, kind):
    path = tmp_path / f"log.{kind}"
    if kind == "parquet":
        LOG.write_parquet(path)
    elif kind.startswith("csv"):
        text = LOG.write_csv().encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    elif kind.startswith("jsonl"):
        text = LOG.write_ndjson().encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    source = {"polars": LOG, "lazy": LOG.lazy(), "pandas": LOG.to_pandas(), "arrow": LOG.to_arrow()}.get(
        kind, path
    )
    log = read_interactions(source)
    assert lines(log) == [("a", 20, 1), ("a", 10, 2), ("b", 10, 1), ("b", 30, 5)]
    assert log.extra["price"].to_list() == [4.0, 2.0, 3.0, 1.0]


def test_csv_keeps_what_a_number_would_lose(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "zip,big,huge,plain,real,gap\n007,9007199254740993,99999999999999999999,-5,1.5,1\n012,2,3,6,2,\n"
    )
    table = read_table(path)
    assert table["zip"].to_list() == ["007", "012"]
    assert table["big"].to_list() == [2**53 + 1, 2]
    assert table["huge"].to_list() == ["99999999999999999999", "3"]
    assert table["plain"].to_list() == [-5, 6]
    assert table["real"].to_list() == [1.5, 2.0]
    assert table["gap"].to_list() == [1, None]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_an_empty_file(tmp_path, ending):
    path = tmp_path / f"log.{ending}"
    path.touch()
    with pytest.raises(DataError, match=r"an empty file: .*log\.\w+\. A table has at least a header"):
        read_interactions(path)


def test_a_header_without_lines(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"a log without events"):
        read_interactions(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"no file at"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "log.xlsx").write_bytes(b"x")
    with pytest.raises(SchemaError, match=r"Tables are \.parquet, \.csv"):
        read_table(tmp_path / "log.xlsx")
    (tmp_path / "log.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"cannot be read as parquet"):
        read_table(tmp_path / "log.parquet")
    with pytest.raises(SchemaError, match=r"a table of type dict"):
        read_table({"user_id": [1]})


def test_a_pandas_column_of_mixed_types():
    with pytest.raises(SchemaError, match=r"Each column holds values of one type"):
        read_table(pd.DataFrame({"user_id": [1, "a", {}]}))


# -- ids ---------------------------------------------------------------------------------------------------


def test_a_missing_column_and_its_neighbour():
    with pytest.raises(SchemaError, match=r"no column 'timestamp'\..*Did you mean 'timestmp'\?"):
        read_interactions(LOG.rename({"timestamp": "timestmp"}))


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_nulls(column):
    with pytest.raises(DataError, match=f"column '{column}' holds 1 nulls"):
        read_interactions(LOG.with_columns(pl.when(pl.col("price") > 1).then(column)))


def test_integers_that_pandas_made_floats():
    frame = pd.DataFrame({"user_id": [1, None], "item_id": [1, 2], "timestamp": [1, 2]})
    with pytest.raises(
        SchemaError, match=r"'user_id' holds Float64 with 1 nulls.*a float cannot hold.*dtype 'Int64'"
    ):
        read_interactions(frame)


def test_ids_of_another_type():
    with pytest.raises(SchemaError, match=r"column 'item_id' of type Boolean"):
        read_interactions(LOG.with_columns(item_id=pl.lit(True)))
    with pytest.raises(SchemaError, match=r"integers beyond 64 signed bits"):
        read_interactions(LOG.with_columns(item_id=pl.lit(2**64 - 1, pl.UInt64)))


def test_large_and_foreign_ids_come_back_as_they_were():
    users, items = ["søren", "日本語", "", "👩‍🍳"], [2**53 + 1, 2**53, -(2**63), 2**63 - 1]
    log = read_interactions(pl.DataFrame({"user_id": users, "item_id": items, "timestamp": [1, 2, 3, 4]}))
    assert {(u, i) for u, i, _ in lines(log)} == set(zip(users, items, strict=True))


def test_categorical_ids_are_strings():
    log = read_interactions(LOG.with_columns(pl.col("user_id").cast(pl.Categorical)))
    assert log.users.raw.to_pylist() == ["a", "b"]


# -- times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, expected",
    [
        (pl.Series([1, 2], dtype=pl.UInt8), [1, 2]),
        (pl.Series([1.0, 2.0]), [1, 2]),
        (pl.Series(["1970-01-01", "1970-01-02"]).str.to_date(), [0, 86_400_000_000]),
        (pl.Series(["1970-01-01T00:00:01", "1970-01-01T00:00:02"]), [1_000_000, 2_000_000]),
        (pl.Series(["1970-01-01T01:00:01+01:00"]), [1_000_000]),
        (pl.Series([1_500_000_000]).cast(pl.Datetime("ns")), [1_500_000]),
    ],
)
def test_times_become_integers(times, expected):
    assert clean_times(times.alias("t")).to_list() == expected


@pytest.mark.parametrize(
    "times, message",
    [
        ([3, -1], r"column 't' holds 1 negative times, such as -1\. Times are ≥ 0"),
        (["soon", "1970-01-01"], "'t' holds strings that are no dates, such as 'soon'"),
        ([1.5, 2.0], r"1 fractional or infinite times or NaN, such as 1\.5"),
        ([float("nan"), 2.0], "such as nan"),
        ([True, False], "column 't' of type Boolean"),
    ],
)
def test_bad_times(times, message):
    with pytest.raises(DataError, match=message):
        clean_times(pl.Series("t", times))


# -- order and duplicates ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=40
    ),
    seed=st.integers(0, 99),
)
@example(rows=[(0, 1, 0), (0, 0, 0), (0, 1, 0)], seed=0)
def test_the_log_is_the_sorted_set_of_its_lines(rows, seed):
    def read(rows):
        frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
        return read_interactions(frame.with_row_index("line"))

    log = read(rows)
    kept = {row: line for line, row in reversed(list(enumerate(rows)))}  # the first line of each row
    expected = sorted(kept, key=lambda row: (row[0], row[2], kept[row]))
    assert lines(log) == expected
    assert log.extra["line"].to_list() == [kept[row] for row in expected]
    shuffled = read([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])
    assert shuffled.users == log.users
    assert shuffled.items == log.items
    assert sorted(lines(shuffled)) == sorted(lines(log))


def test_given_item_vocabulary():
    log = read_interactions(LOG, items=Vocabulary([30, 20, 10]))
    assert log.items.decode(log.item) == [20, 10, 10, 30]
    with pytest.raises(DataError, match=r"1 items of the log are not in the given vocabulary, such as 20"):
        read_interactions(LOG, items=Vocabulary([30, 10]))
    with pytest.raises(SchemaError, match=r"the same id of the same type"):
        read_interactions(LOG, items=Vocabulary(["30", "20", "10"]))


# -- items -------------------------------------------------------------------------------------------------


def test_items_come_in_the_order_of_their_ids():
    items = read_items(pl.DataFrame({"title": ["c", "a"], "asin": ["z", "y"]}), item="asin")
    assert items.vocabulary.raw.to_pylist() == ["y", "z"]
    assert items.table.to_dict(as_series=False) == {"item_id": ["y", "z"], "title": ["a", "c"]}


def test_an_item_twice():
    with pytest.raises(DataError, match=r"1 items stand more than once in the table, such as 5"):
        read_items(pl.DataFrame({"item_id": [5, 6, 5]}))


def test_items_that_the_table_lacks():
    log = read_interactions(LOG)
    items = read_items(pl.DataFrame({"item_id": [40, 10, 30], "title": ["d", "a", "c"]}))

    added = align(log, items)
    assert added.unknown == [20]
    assert added.items.table.rows() == [(10, "a"), (20, None), (30, "c"), (40, "d")]
    assert added.interactions.items is added.items.vocabulary
    assert lines(added.interactions) == lines(log)

    dropped = align(log, items, unknown="drop")
    assert dropped.unknown == [20]
    assert dropped.items is items
    assert lines(dropped.interactions) == [line for line in lines(log) if line[1] != 20]

    with pytest.raises(DataError, match=r"1 items of the log are not in the item table, such as 20"):
        align(log, items, unknown="error")
    with pytest.raises(ConfigError, match=r"It is 'error', 'drop' or 'add'"):
        align(log, items, unknown="ignore")


def test_dropping_items_drops_users_without_events():
    log = read_interactions(pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [0, 0]}))
    aligned = align(log, read_items(pl.DataFrame({"item_id": [2]})), unknown="drop")
    assert aligned.interactions.users.raw.to_pylist() == [2]
    with pytest.raises(DataError, match=r"no item of the log is in the item table"):
        align(log, read_items(pl.DataFrame({"item_id": [3]})), unknown="drop")
    with pytest.raises(SchemaError, match=r"the same id of the same type"):
        align(log, read_items(pl.DataFrame({"item_id": ["1", "2"]})))


# -- k-core ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_k_core_is_what_removing_one_by_one_leaves(pairs):
    rows = [(user, item, time) for time, (user, item) in enumerate(pairs)]
    log = read_interactions(pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row"))
    left = list(rows)
    while True:
        poor = [
            row
            for row in left
            if sum(r[0] == row[0] for r in left) < 2 or sum(r[1] == row[1] for r in left) < 3
        ]
        if not poor:
            break
        left.remove(poor[0])
    if left:
        core = k_core(log, 2, 3)
        assert lines(core) == sorted(left, key=lambda row: (row[0], row[2]))
        assert core.items.raw.to_pylist() == sorted({item for _, item, _ in left})
        assert core.users.raw.to_pylist() == sorted({user for user, _, _ in left})
    else:
        with pytest.raises(DataError, match=r"None of the .* events survives"):
            k_core(log, 2, 3)


def test_arrow_record_batch():
    assert read_table(pa.RecordBatch.from_pydict({"a": [1]})).to_dict(as_series=False) == {"a": [1]}
