import numpy as np
import polars as pl
import pytest

from tiglon.data.events import floats_once
from tiglon.data.inspect import Verdict, inspect, is_valid
from tiglon.data.synthetic import synthetic

DAY = 86_400
LOG = pl.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 2, 2, 1],
        "item_id": ["a", "b", "a", "c", "a", "d", "a"],
        "timestamp": [1_600_000_000 + DAY * day for day in (0, 1, 2, 2, 0, 1, 0)],
        "price": [1.0, None, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
)
ITEMS = pl.DataFrame(
    {"item_id": ["a", "b", "c", "e"], "title": ["A", " ", None, "E"], "tags": [[], ["x"], [], []]}
)


def found(verdicts: list[Verdict]) -> dict[str, Verdict]:
    assert all(str(verdict) for verdict in verdicts)
    return {verdict.subject: verdict for verdict in verdicts}


def test_a_small_log_line_by_line():
    verdicts = inspect(LOG, ITEMS)
    assert is_valid(verdicts)
    lines = {subject: (verdict.level, verdict.text) for subject, verdict in found(verdicts).items()}
    assert lines["interactions"][1] == "7 rows; user_id Int64, item_id String, timestamp Int64, price Float64"
    assert lines["user_id"] == ("ok", "Int64, no nulls, 2 distinct")
    assert lines["price"] == ("note", "1 nulls (14.3%)")
    assert lines["duplicates"][0] == "note"
    assert lines["duplicates"][1].startswith("1 rows repeat a user, item and time (14.29%)")
    assert lines["size"] == ("ok", "6 events, 2 users, 4 items")
    assert lines["time"] == ("ok", "2020-09-13 to 2020-09-15 (2 days), read as seconds")
    assert lines["baskets"][0] == "note"
    assert "33.3% of the events share" in lines["baskets"][1]
    assert "mean 3.0, median 3" in lines["events a user"][1]
    assert "0 users have one event; 1 have fewer than three moments" in lines["short lives"][1]
    assert lines["repeats"][0] == "warning"
    assert "16.7% of the events" in lines["repeats"][1]
    assert "exclude_seen=False" in lines["repeats"][1]
    assert lines["5-core"][0] == "note"
    assert lines["item text"] == ("warning", "1 items have none; filled: title 50.0%, tags 25.0%")
    assert lines["log and items"][0] == "warning"
    assert lines["log and items"][1].startswith(
        "1 items of the log are not in the table (16.7% of the events)"
    )


def test_a_sound_log():
    source = synthetic(200, 50, 20, seed=1, clusters=5, repeat=0.0).source()
    verdicts = inspect(source.interactions, source.items)
    assert is_valid(verdicts)
    assert found(verdicts)["log and items"].level == "ok"
    assert found(verdicts)["id order"].level == "ok"


@pytest.mark.parametrize("unit, factor", [("seconds", 1), ("milliseconds", 1_000), ("microseconds", 10**6)])
def test_units_of_time(unit, factor):
    verdicts = found(inspect(LOG.with_columns(pl.col("timestamp") * factor)))
    assert verdicts["time"].text == f"2020-09-13 to 2020-09-15 (2 days), read as {unit}"


def test_mixed_units_of_time():
    first, last = 1_600_000_000, 1_600_000_000_000 + DAY * 1000
    verdict = found(inspect(LOG.with_columns(timestamp=pl.Series([first, last] * 3 + [first]))))["time"]
    assert verdict.level == "warning"
    assert verdict.text == (
        f"two units are mixed: {first} is 2020-09-13 in seconds, {last} is 2020-09-14 in milliseconds; "
        "write all times in one"
    )
    early = pl.Series(["1970-01-12T00:00:00"] + ["2020-01-01T00:00:00"] * 6)  # what reads as milliseconds
    assert found(inspect(LOG.with_columns(timestamp=early)))["time"].level == "note"


def test_an_order_is_no_time():
    verdict = found(inspect(LOG.with_columns(timestamp=pl.int_range(7))))["time"]
    assert verdict.level == "note"
    assert "0 to 6 is no unit of calendar time" in verdict.text


def test_ids_in_order_of_arrival():
    log = pl.DataFrame({"user_id": np.zeros(30, int), "item_id": np.arange(30), "timestamp": np.arange(30)})
    verdict = found(inspect(log))["id order"]
    assert verdict.level == "warning"
    assert "+1.00: ids used as numbers would show the future" in verdict.text


@pytest.mark.parametrize(
    "log, subject, text",
    [
        (LOG.drop("user_id"), "user_id", "The column is missing"),
        (LOG.with_columns(item_id=pl.lit(None, pl.String)), "item_id", "7 nulls"),
        (LOG.with_columns(timestamp=pl.lit(-5)), "timestamp", "7 negative times"),
        (LOG.with_columns(timestamp=pl.lit("x")), "timestamp", "strings that are no dates"),
        (LOG.with_columns(item_id=pl.lit("")), "item_id", "An id has 1 to 256 characters"),
        (LOG.with_columns(user_id=pl.lit(1.0)), "user_id", "Ids are integers or strings"),
        (LOG[:0], "interactions", "no rows"),
        (pl.DataFrame(), "interactions", "a table without columns"),
        ({}, "interactions", "a table of type dict"),
        ("no-such-file.csv", "interactions", "no file at"),
    ],
)
def test_what_is_fatal(log, subject, text):
    verdicts = inspect(log, ITEMS)
    assert not is_valid(verdicts)
    assert any(v.level == "fatal" and v.subject == subject and text in v.text for v in verdicts)


def test_all_faults_show_at_once():
    verdicts = inspect(LOG.drop("user_id").with_columns(timestamp=-1))
    assert {v.subject for v in verdicts if v.level == "fatal"} == {"user_id", "timestamp"}


def test_strings_that_may_be_no_ids_are_doubted():
    log = pl.DataFrame(
        {"user_id": ["1", "NULL", "2 "], "item_id": ["na", "nano", "b"], "timestamp": [1, 2, 3]}
    )
    doubted = [
        (v.subject, v.text) for v in inspect(log) if v.level == "warning" and v.subject.endswith("_id")
    ]
    assert doubted == [
        ("user_id", "1 of the ids, such as 'NULL', may stand for no id; then leave these lines out"),
        ("user_id", "1 of the ids, such as '2 ', begin or end with a blank, which is a part of the id"),
        ("item_id", "1 of the ids, such as 'na', may stand for no id; then leave these lines out"),
    ]


@pytest.mark.parametrize(
    "items, subject, text",
    [
        (pl.DataFrame({"item_id": ["a", "a"]}), "items", "stand more than once"),
        (pl.DataFrame({"item_id": ["a", "b" * 257]}), "items", "An id has 1 to 256 characters"),
        (pl.DataFrame({"id": ["a"]}), "items", "no column 'item_id'"),
        (pl.DataFrame({"item_id": ["z"]}), "log and items", "no item of the log is in the table"),
        (pl.DataFrame({"item_id": [1, 2]}), "log and items", "Cast 'item_id' in one of them"),
    ],
)
def test_fatal_item_tables(items, subject, text):
    verdicts = inspect(LOG, items)
    assert not is_valid(verdicts)
    assert any(v.level == "fatal" and v.subject == subject and text in v.text for v in verdicts)


def test_items_without_any_text():
    assert found(inspect(LOG, ITEMS.select("item_id")))["item text"].level == "warning"


def test_item_text_is_what_training_reads():
    table = ITEMS.with_columns(
        image_url=pl.lit("a.png"), sku=pl.lit("x1"), blank=pl.lit(" "), page=pl.lit("https://a.b")
    )
    assert found(inspect(LOG, table))["item text"] == found(inspect(LOG, ITEMS))["item text"]
    verdict = found(inspect(LOG, table.drop("title", "tags")))["item text"]
    assert verdict.level == "warning"
    assert "no column of words" in verdict.text


def test_csv_ids_beside_strings(tmp_path):
    LOG.with_columns(item_id=pl.Series([5, 6, 5, 7, 5, 8, 5])).write_csv(tmp_path / "log.csv")
    pl.DataFrame({"item_id": [5, 6, 7, 8], "title": "t"}).write_csv(tmp_path / "items.csv")
    named = pl.DataFrame({"item_id": ["5", "6", "7", "8", "A21"], "title": "t"})

    verdict = found(inspect(tmp_path / "log.csv", named))["log and items"]
    assert verdict.level == "ok"
    assert "the integers of the CSV count as strings" in verdict.text
    log = LOG.with_columns(item_id=pl.lit("5"))
    assert found(inspect(log, tmp_path / "items.csv"))["log and items"].level == "ok"
    verdict = found(inspect(tmp_path / "log.csv", tmp_path / "items.csv"))["log and items"]
    assert (verdict.level, "count as strings" in verdict.text) == ("ok", False)


def test_ids_of_a_csv_are_no_floats(tmp_path):
    LOG.with_columns(user_id=pl.Series(["1e5", "2e5", *["3e5"] * 5])).write_csv(tmp_path / "log.csv")
    user = [v for v in inspect(tmp_path / "log.csv") if v.subject == "user_id"]
    assert [(v.level, v.text.partition("; ")[0]) for v in user] == [
        ("ok", "String, no nulls, 3 distinct"),
        ("warning", "7 of the ids, such as '1e5', look like floats, which may have made one id of several"),
    ]


@pytest.mark.parametrize(
    "ids, odd",
    [
        (["1", "5.0"], 1),
        (["-5.00", "1.00E+12"], 2),
        (["1.5", "2.0"], 0),
        (["a", "1e5"], 0),
        (["007", "1.0"], 0),
    ],
)
def test_ids_that_were_floats_are_doubted(ids, odd):
    assert len(floats_once(pl.Series(ids))) == odd
