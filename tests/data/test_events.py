import gzip

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiglon.data.events import (
    align,
    clean_times,
    items_as_in,
    k_core,
    read_interactions,
    read_items,
    read_table,
)
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
    path = tmp_path / "[b] *" / f"log.{kind}"  # a path is a name, no pattern
    path.parent.mkdir()
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
    with pytest.raises(DataError, match=r"which is a folder. A table is one file. Join its files first"):
        read_table(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_other_encodings_are_told(tmp_path, encoding, ending):
    raw = ("\ufeff" if encoding == "utf-16-le" else "").encode("utf-16-le") + "item_id,title\n1,é\n".encode(
        encoding
    )
    path = tmp_path / f"items.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    with pytest.raises(DataError, match=r"Save it as UTF-8"):
        read_items(path)


def test_blank_lines_of_a_csv_are_none(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,a,5\n\n2,b,6\n,,\n\n")
    assert lines(read_interactions(tmp_path / "log.csv")) == [(1, "a", 5), (2, "b", 6)]


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
@pytest.mark.parametrize(
    "text, message",
    [
        (
            "user_id;item_id\n1;2,5\n",
            "one column, 'user_id;item_id'. The columns of a CSV are separated by commas. "
            "Write it with ',' in place of ';'.",
        ),
        ("user_id\titem_id\n1\t2\n", r"Write it with ',' in place of '\t'."),
        ('a,b\n"x\ny",2\n1,2,3\n', "has 3 values, its header 2. No line of a CSV has more values"),
        ('a,b\n1,"2\n', "cannot be read as csv: could not parse"),
    ],
)
def test_what_no_csv_holds(tmp_path, ending, text, message):
    path = tmp_path / f"log.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    with pytest.raises(DataError) as error:
        read_table(path)
    assert message in str(error.value)
    assert "truncate_ragged_lines" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_line_is_named(tmp_path):
    (tmp_path / "log.csv").write_text('a,b\n"x\ny",2\n1,2,3\n')
    with pytest.raises(DataError, match=r"^line 4 of .*log\.csv has 3 values"):
        read_table(tmp_path / "log.csv")


@pytest.mark.parametrize("bad", ['{"a": ', "[1]", "5", "xx", '{"a": NaN}', '{"a": 1} {"a": 2}'])
def test_a_bad_line_of_json_is_named(tmp_path, bad):
    (tmp_path / "log.jsonl").write_text(f'{{"a": 1}}\n\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(DataError) as error:
        read_table(tmp_path / "log.jsonl")
    assert f"line 3 of {tmp_path}/log.jsonl is no JSON object: {bad.strip()!r}." in str(error.value)
    assert str(error.value).endswith("Each line of a .jsonl is one JSON object. Correct that line.")


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,item_id,timestamp\n1,2,3,4\n")
    with pytest.raises(SchemaError, match=r"with two columns 'item_id'. Each column has a name of its own"):
        read_interactions(tmp_path / "log.csv")


def test_numbers_and_strings_of_one_json_column_are_two_ids(tmp_path):
    path = tmp_path / "log.jsonl"
    line = '{{"user_id": {}, "item_id": "a", "timestamp": 1, "note": {{"user_id": 5, "t": "\\"user_id\\": 6"}}}}\n'
    path.write_text(line.format('"1"') + line.format('"2"'))
    assert read_interactions(path).users.raw.to_pylist() == ["1", "2"]
    path.write_text(line.format('"1"') + line.format("1"))
    with pytest.raises(SchemaError, match=r"column 'user_id' of .* mixes strings and numbers, such as 1\."):
        read_interactions(path)


def test_a_pandas_column_of_mixed_types():
    with pytest.raises(SchemaError, match=r"Each column holds values of one type"):
        read_table(pd.DataFrame({"user_id": [1, "a", {}]}))


# -- ids ---------------------------------------------------------------------------------------------------


def test_a_missing_column_and_its_neighbour():
    with pytest.raises(SchemaError, match=r"no column 'timestamp'\..*Rename 'timestmp' to 'timestamp'\."):
        read_interactions(LOG.rename({"timestamp": "timestmp"}))
    with pytest.raises(SchemaError, match=r"Rename 'USER_ID' to 'user_id'\."):
        read_interactions(LOG.rename({"user_id": "USER_ID"}))
    with pytest.raises(
        SchemaError, match=r"Rename the column that holds it, of sku, timestamp, user_id, to 'item_id'\."
    ):
        read_interactions(LOG.select("user_id", "timestamp", pl.col("item_id").alias("sku")))


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
    with pytest.raises(SchemaError, match=r"'item_id' holds Float64, such as 1\.0\..*as integers\.$"):
        read_interactions(LOG.with_columns(item_id=pl.col("price")))
    with pytest.raises(SchemaError, match=r"integers beyond 64 signed bits"):
        read_interactions(LOG.with_columns(item_id=pl.lit(2**64 - 1, pl.UInt64)))


@pytest.mark.parametrize(
    "value, message",
    [
        ([1, 2], "column 'item_id' of type List(Int64), such as [1, 2]."),
        ({"a": 1}, "column 'item_id' of type Struct({'a': Int64}), such as {'a': 1}."),
        (list(range(99)), "such as [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1…."),
    ],
)
def test_nested_ids(value, message):
    with pytest.raises(SchemaError) as error:
        read_items(pl.DataFrame({"item_id": [value]}))
    assert message in str(error.value)
    assert str(error.value).endswith("Ids are integers or strings. Write one id a line.")


def test_the_length_of_an_id():
    longest = "é" * 256
    items = read_items(pl.DataFrame({"item_id": [longest, "a"]}))
    assert items.vocabulary.raw.to_pylist() == ["a", longest]
    with pytest.raises(DataError) as error:
        read_items(pl.DataFrame({"item_id": [longest + "é", "a", ""]}))
    assert str(error.value) == (
        f"column 'item_id' holds 2 ids that are empty or too long, such as '{'é' * 40}…'. "
        "An id has 1 to 256 characters. Shorten them, or drop these lines."
    )
    with pytest.raises(DataError, match=r"column 'user_id' holds 1 ids .* such as ''\."):
        read_interactions(LOG.with_columns(user_id=pl.Series(["", "a", "b", "c", "d"])))


def test_ids_of_a_csv_are_no_floats(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,price\n1e5,1.0,1,1e5\n2e5,2,2,2e5\n")
    log = read_interactions(path)
    assert lines(log) == [("1e5", "1.0", 1), ("2e5", "2", 2)]
    assert log.extra["price"].to_list() == [1e5, 2e5]
    assert read_items(path).vocabulary.raw.to_pylist() == ["1.0", "2"]


def test_large_and_foreign_ids_come_back_as_they_were():
    users, items = ["søren", "日本語", " ", "👩‍🍳"], [2**53 + 1, 2**53, -(2**63), 2**63 - 1]
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
        (pl.Series(["1970-01-01 01:00:01+01", "1970-01-01T00:00:00.5Z"]), [1_000_000, 500_000]),
        (pl.Series(["1970-01-01", "1970-01-01T00:00", "1970-01-01 00:00:01"]), [0, 0, 1_000_000]),
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
        (["1970-01-01", "1970-02-30"], "strings that are no dates, such as '1970-02-30'"),
        (["1970-01-01", ""], "strings that are no dates, such as ''"),
        (["1970-01-01", "01/02/2024"], r"such as '01/02/2024'\..* ISO 8601.*with the year first"),
        (
            ["1700000000", "timestamp"],
            "'t' mixes whole numbers, such as '1700000000', and strings, such as 'timestamp'",
        ),
        (["05-01-2024"], "strings that are no dates, such as '05-01-2024'"),
        (["1970-01-01T00:00Z", "05-01-2024"], "strings that are no dates, such as '05-01-2024'"),
        (
            ["1970-01-01T00:00", "1970-01-02T00:00Z", "1970-01-03"],
            r"'t' mixes times with a zone, such as '1970-01-02T00:00Z', "
            r"and without one, such as '1970-01-01T00:00'\. Either all times have a zone or none has",
        ),
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


@pytest.fixture
def written(tmp_path):
    """A log and a catalogue as CSV, with these item ids."""

    def write(log_ids, item_ids):
        log = pl.DataFrame({"user_id": 1, "item_id": log_ids, "timestamp": range(len(log_ids))})
        log.write_csv(tmp_path / "log.csv")
        pl.DataFrame({"item_id": item_ids, "title": [f"item {i}" for i in item_ids]}).write_csv(
            tmp_path / "items.csv"
        )
        return tmp_path / "log.csv", tmp_path / "items.csv"

    return write


@pytest.mark.parametrize(
    "log_ids, item_ids, all_ids",
    [
        (["0036", "A21"], ["5001", "301", "A21"], ["0036", "301", "5001", "A21"]),
        (["0036", "301"], ["5001", "301"], ["0036", "301", "5001"]),
        (["5001", "301"], ["0036", "301"], ["0036", "301", "5001"]),
        (["5001", "301"], ["77", "301"], [77, 301, 5001]),
    ],
)
def test_ids_of_a_csv_take_the_type_of_the_other_table(written, log_ids, item_ids, all_ids):
    log, items = written(log_ids, item_ids)
    aligned = align(read_interactions(log), read_items(items))
    assert aligned.items.vocabulary.raw.to_pylist() == all_ids
    assert [str(i) for _, i, _ in lines(aligned.interactions)] == log_ids
    titles = dict(aligned.items.table.select("item_id", "title").rows())
    assert titles == {i: f"item {i}" if str(i) in item_ids else None for i in all_ids}
    assert aligned.items.table["item_id"].to_list() == all_ids


def test_new_items_of_a_csv_take_the_type_of_the_known_ones(written):
    _, items = written(["A21"], ["5001", "301"])
    new = read_items(items)
    assert items_as_in(Vocabulary([7]), new) is new
    named = items_as_in(Vocabulary(["0036", "A21"]), new)
    assert named.vocabulary.raw.to_pylist() == named.table["item_id"].to_list() == ["301", "5001"]
    assert named.table["title"].to_list() == ["item 301", "item 5001"]


def test_only_the_integers_of_a_csv_may_be_strings(written):
    log, items = written([5001, 301], ["5001", "A21"])
    strings = pl.DataFrame({"item_id": ["5001", "A21"]})
    for typed, read in ((strings, log), (read_items(items).table, log)):
        assert align(read_interactions(read), read_items(typed)).unknown == ["301"]
    assert lines(read_interactions(log, items=Vocabulary(["301", "5001"]))) == [(1, "5001", 0), (1, "301", 1)]
    with pytest.raises(
        SchemaError,
        match=r"integers in one table, such as 301, and strings in the other, such as 'A21'\. "
        r"The two tables .*Cast 'item_id' in one of them, or correct what is no whole number\.",
    ):
        align(read_interactions(pl.read_csv(log)), read_items(items))


# -- items -------------------------------------------------------------------------------------------------


def test_items_come_in_the_order_of_their_ids():
    items = read_items(pl.DataFrame({"title": ["c", "a"], "asin": ["z", "y"]}), item="asin")
    assert items.vocabulary.raw.to_pylist() == ["y", "z"]
    assert items.table.to_dict(as_series=False) == {"item_id": ["y", "z"], "title": ["a", "c"]}


def test_an_item_twice():
    with pytest.raises(DataError, match=r"1 items stand more than once in the table, such as 5"):
        read_items(pl.DataFrame({"item_id": [5, 6, 5]}))


@pytest.mark.parametrize("details", ["{}", "[{}]", '{"size": 1, "more": {}}'])
def test_objects_without_fields_are_refused_at_once(tmp_path, details):
    """Parquet, in which items are kept after the training, has none."""
    file = tmp_path / "items.jsonl"
    file.write_text(f'{{"item_id": 1, "title": "x", "details": {details}}}\n')
    with pytest.raises(SchemaError, match=r"the column 'details', of .*Leave the column out"):
        read_items(file)
    file.write_text(file.read_text().replace("{}", '{"a": null}'))
    read_items(file).table.write_parquet(tmp_path / "items.parquet")


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


@pytest.mark.parametrize("unknown", ["add", "drop", "error"])
def test_tables_that_share_no_item_are_told(unknown):
    log = read_interactions(pl.DataFrame({"user_id": [1, 1], "item_id": ["01", "02"], "timestamp": [1, 2]}))
    items = read_items(pl.DataFrame({"item_id": ["1", "2"]}))
    with pytest.raises(
        DataError, match="no item of the log is in the item table: '01' in the log, '1' in the table"
    ):
        align(log, items, unknown=unknown)


def test_an_empty_table_lacks_every_item():
    for empty in (
        pl.DataFrame({"item_id": []}),
        pl.DataFrame(schema={"item_id": pl.String, "title": pl.String}),
    ):
        for ids in ([3, 1], ["b", "a"]):
            log = read_interactions(pl.DataFrame({"user_id": [1, 1], "item_id": ids, "timestamp": [1, 2]}))
            found = align(log, read_items(empty))
            assert found.items.vocabulary.raw.to_pylist() == sorted(ids)


def test_a_second_column_of_ids_is_told():
    with pytest.raises(SchemaError, match="a column 'item_id' beside 'sku', which holds the ids"):
        read_items(pl.DataFrame({"sku": [1, 2], "item_id": [5, 5]}), item="sku")


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
