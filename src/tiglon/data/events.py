"""Tables to clean events: read, check, sort, remove duplicates, number the ids, k-core.

The stated rules
    ids         integers, or strings of 1 to 256 characters, never floats (a float64 cannot hold every integer
                above 2^53). A CSV has no types: its ids are integers where all read back as written, and
                strings after all beside a table whose ids are strings.
    times       whole numbers ≥ 0 in any unit that grows, kept as they are; datetimes and ISO 8601 strings
                become microseconds since 1970 (UTC), those without a zone as if they were UTC.
    duplicates  of lines with the same user, item and time the first one stays.
    order       by (user, time); lines at equal times keep the order of the source.
    dense ids   follow the sorted raw ids, so the order of the input does not matter.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa

from tiglon.errors import ConfigError, DataError, SchemaError, closest, did_you_mean
from tiglon.types import LONGEST_ID, MISSING, Interactions, Items, Vocabulary

Table: TypeAlias = (
    Any  # a path (.parquet, .csv, .jsonl, the last two also .gz), polars, pandas or Arrow table
)

_EXACT = 2.0**53  # the integers up to here are exact in a float64
_WHOLE = r"^(0|-?[1-9]\d*)$"  # as an integer is written
_FLOAT = r"^-?\d+(\.0+|(\.\d+)?[eE][-+]?\d+)$"  # an integer that was a float on its way


# -- tables ------------------------------------------------------------------------------------------------


def read_table(source: Table, *, ids: Sequence[str] = ()) -> pl.DataFrame:
    """Any table as a polars DataFrame.

    A CSV column becomes Int64 only where every value reads back as it was written: "007" and integers
    beyond 64 bits stay strings. Its blank lines are left out.
    ids: columns that hold names; those of a CSV never become floats.
    Raises DataError for a file that is empty or unreadable, SchemaError for a source that is no table.
    """
    if isinstance(source, (str, Path)):
        frame = _read_file(Path(source), ids)
    elif isinstance(source, pl.DataFrame):
        frame = source
    elif isinstance(source, pl.LazyFrame):
        frame = source.collect()
    elif isinstance(source, (pa.Table, pa.RecordBatch)):
        table = pa.Table.from_batches([source]) if isinstance(source, pa.RecordBatch) else source
        frame = pl.DataFrame(pl.from_arrow(table))
    elif type(source).__module__.split(".")[0] == "pandas":
        frame = _from_pandas(source)
    else:
        raise SchemaError(
            f"a table of type {type(source).__name__}",
            rule="A table is a path to .parquet, .csv or .jsonl, or a polars, pandas or Arrow table",
        )
    if frame.width == 0:
        raise DataError("a table without columns", fix="Check that this is the right file")
    return frame


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _read_file(path: Path, ids: Sequence[str]) -> pl.DataFrame:
    if path.is_dir():
        raise DataError(f"{path}, which is a folder", rule="A table is one file", fix="Join its files first")
    if not path.is_file():
        raise DataError(f"no file at {path}", fix="Check the path")
    kind = _kind(path)
    if kind not in ("parquet", "csv", "jsonl", "ndjson"):
        raise SchemaError(
            f"a file named {path.name}",
            rule="Tables are .parquet, .csv[.gz] or .jsonl[.gz]",
            fix="Convert it",
        )
    if path.stat().st_size == 0:
        raise DataError(f"an empty file: {path}", rule="A table has at least a header")
    try:
        if kind == "parquet":
            return pl.read_parquet(path, glob=False)
        content: Any = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path
        _require_utf8(content, path)
        return _read_csv(content, path, ids) if kind == "csv" else _read_ndjson(content, path, ids)
    except (pl.exceptions.PolarsError, OSError, EOFError) as error:
        said = str(error).partition("\n")[0]  # what follows is advice for polars' own callers
        fix = "Save it as UTF-8" if "utf-8" in said else "Check the file"
        raise DataError(f"{path} cannot be read as {kind}: {said}", fix=fix) from error


def _require_utf8(content: bytes | Path, path: Path) -> None:
    if isinstance(content, Path):
        with content.open("rb") as file:
            content = file.read(2)
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path} in UTF-16", rule="Tables of text are UTF-8", fix="Save it as UTF-8")


def _read_csv(content: bytes | Path, path: Path, ids: Sequence[str]) -> pl.DataFrame:
    columns = pl.read_csv(content, n_rows=0, infer_schema=False, glob=False).columns
    other = next((mark for mark in ";\t|" if mark in columns[0]), None)
    if len(columns) == 1 and other:
        raise SchemaError(
            f"{path} with one column, {columns[0]!r}",
            rule="The columns of a CSV are separated by commas",
            fix=f"Write it with ',' in place of {other!r}",
        )
    again = (re.fullmatch(r"(.+)_duplicated_\d+", name) for name in columns)  # as polars calls them
    if twice := next((found[1] for found in again if found and found[1] in columns), None):
        raise SchemaError(
            f"{path} with two columns '{twice}'",
            rule="Each column has a name of its own",
            fix="Rename or drop one of them",
        )
    try:
        frame = pl.read_csv(content, infer_schema=False, glob=False)
    except pl.exceptions.ComputeError as error:
        long = _long_line(content, len(columns))
        if long is None:
            raise
        line, values = long
        raise DataError(
            f"line {line} of {path} has {values} values, its header {len(columns)}",
            rule="No line of a CSV has more values than its header, and a value with a comma stands in quotes",
            fix="Correct that line",
        ) from error
    frame = frame.filter(pl.any_horizontal(pl.all().is_not_null()))
    return frame.with_columns(
        id_column(frame[name]) if name in ids else typed_column(frame[name]) for name in frame.columns
    )


def _long_line(content: bytes | Path, width: int) -> tuple[int, int] | None:
    """The number of the first line of a CSV with more values than `width`, and how many it has."""
    lines = csv.reader(io.StringIO(_text(content), newline=""))
    try:
        return next(((lines.line_num, len(values)) for values in lines if len(values) > width), None)
    except csv.Error:
        return None


def _read_ndjson(content: bytes | Path, path: Path, ids: Sequence[str]) -> pl.DataFrame:
    try:
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            frame = pl.read_ndjson(file, infer_schema_length=None)
        for name in ids:
            strings = frame.schema.get(name) == pl.String and frame[name].str.contains(r"^-?\d").any()
            if strings and (number := _number_of(name, content)) is not None:
                raise SchemaError(
                    f"column '{name}' of {path} mixes strings and numbers, such as {number}",
                    rule="5 and '5' are two ids",
                    fix="Write all of them in one way",
                )
        return frame
    except pl.exceptions.PolarsError as error:
        for number, line in enumerate(_text(content).split("\n"), start=1):
            if line.strip() and not _is_object(line):
                raise DataError(
                    f"line {number} of {path} is no JSON object: {_shortened(line.strip())}",
                    rule="Each line of a .jsonl is one JSON object",
                    fix="Correct that line",
                ) from error
        raise


def _number_of(name: str, content: bytes | Path) -> Any:
    """A number that stands for `name` in one of the lines, or None."""
    raw = content.read_bytes() if isinstance(content, Path) else content
    for found in re.finditer(rb"%s\s*:\s*[-\d]" % re.escape(json.dumps(name).encode()), raw):
        line = raw[raw.rfind(b"\n", 0, found.start()) + 1 :].partition(b"\n")[0]
        value = json.loads(line).get(name)
        if isinstance(value, (int, float)):
            return value
    return None


def _text(content: bytes | Path) -> str:
    raw = content.read_bytes() if isinstance(content, Path) else content
    return raw.decode("utf-8", errors="replace")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    """JSON has no NaN and no Infinity, though Python reads them."""
    raise ValueError(constant)


def id_column(text: pl.Series) -> pl.Series:
    """A column of strings as Int64 where every value reads back as written, else as it is."""
    return _integers(text) if text.str.contains(_WHOLE).all() else text


def floats_once(text: pl.Series) -> pl.Series:
    """Of ids in a CSV those that look as if integers had been floats on their way, where all are numbers."""
    whole, floats = text.str.contains(_WHOLE), text.str.contains(_FLOAT)
    return text.filter(floats) if (whole | floats).all() else text.clear()


def typed_column(text: pl.Series) -> pl.Series:
    """A column of strings as Int64 where every value reads back as written, else Float64, else as it is."""
    if text.str.contains(_WHOLE).all():
        return _integers(text)
    nulls = text.null_count()
    if text.str.contains(r"^-?(0|[1-9]\d*)?(\.\d*)?([eE][-+]?\d+)?$|^[-+]?(?i:nan|inf)$").all():
        number = text.cast(pl.Float64, strict=False)
        return number if number.null_count() == nulls else text
    return text


def _integers(text: pl.Series) -> pl.Series:
    """Whole numbers as Int64, and as they are where one is beyond 64 bits or all are null."""
    nulls = text.null_count()
    whole = text.cast(pl.Int64, strict=False)
    return whole if nulls < len(text) and whole.null_count() == nulls else text


def _from_pandas(source: Any) -> pl.DataFrame:
    try:
        return pl.DataFrame(pl.from_pandas(source))
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise SchemaError(
            f"a pandas table that Arrow cannot hold: {error}",
            rule="Each column holds values of one type",
            fix="Cast the column named above, for example df[column].astype(str)",
        ) from error


# -- columns -----------------------------------------------------------------------------------------------


def require_columns(
    present: list[str], needed: list[str], advice: Callable[[str, list[str]], str] = did_you_mean
) -> None:
    """SchemaError naming the first missing column, with advice on (missing, present)."""
    for name in needed:
        if name not in present:
            raise SchemaError(
                f"no column '{name}'", rule=f"Needed: {', '.join(needed)}", fix=advice(name, present)
            )


def rename(missing: str, present: list[str]) -> str:
    """What to do about a missing column."""
    close = closest(missing, present)
    which = f"'{close}'" if close else f"the column that holds it, of {', '.join(sorted(present))},"
    return f"Rename {which} to '{missing}'"


def clean_ids(column: pl.Series) -> pl.Series:
    """Raw ids as Int64 or String.

    Raises SchemaError on another type, DataError on a null and on a string that is empty or longer than
    LONGEST_ID.
    """
    name, kind, nulls = column.name, column.dtype, column.null_count()
    if kind.is_float() or kind == pl.Decimal:
        with_nulls = f" with {nulls} nulls" if nulls else ""
        pandas = "; in pandas a missing value makes floats of them: use dtype 'Int64'" if nulls else ""
        raise SchemaError(
            f"column '{name}' holds {kind}{with_nulls}, such as {_example(column)}",
            rule="Ids are integers or strings: a float cannot hold every integer above 2^53",
            fix=f"Read '{name}' as integers{pandas}",
        )
    if kind in (pl.Categorical, pl.Enum, pl.Null):
        column = column.cast(pl.String)
    elif not (kind.is_integer() or kind == pl.String):
        raise SchemaError(
            f"column '{name}' of type {kind}, such as {_example(column)}",
            rule="Ids are integers or strings",
            fix="Write one id a line" if kind.is_nested() else f"Cast '{name}' to a string",
        )
    if nulls:
        raise DataError(
            f"column '{name}' holds {nulls} nulls",
            rule="An id is never null",
            fix="Drop these lines, or find out why they lack an id",
        )
    if column.dtype == pl.String:
        wrong = column.filter(~column.str.len_chars().is_between(1, LONGEST_ID))
        if len(wrong):
            raise DataError(
                f"column '{name}' holds {len(wrong)} ids that are empty or too long, such as {_example(wrong)}",
                rule=f"An id has 1 to {LONGEST_ID} characters",
                fix="Shorten them, or drop these lines",
            )
        return column
    try:
        return column.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError as error:
        raise SchemaError(
            f"column '{name}' holds integers beyond 64 signed bits, such as {column.max()!r}",
            rule="Integer ids lie in −2^63 … 2^63−1",
            fix=f"Cast '{name}' to a string",
        ) from error


def clean_times(column: pl.Series) -> pl.Series:
    """Times as Int64 ≥ 0 by the rules at the top. Raises SchemaError or DataError."""
    name, kind = column.name, column.dtype
    if column.null_count():
        raise DataError(
            f"column '{name}' holds {column.null_count()} nulls",
            rule="Every event has a time",
            fix="Drop them",
        )
    if kind == pl.String:
        column = _from_iso(column)
    elif kind == pl.Null:
        column = column.cast(pl.Int64)
    elif kind.is_float():
        column = _from_float(column)
    elif not (kind.is_integer() or kind in (pl.Datetime, pl.Date)):
        raise SchemaError(
            f"column '{name}' of type {kind}",
            rule="Times are whole numbers or datetimes",
            fix=f"Cast '{name}'",
        )
    if column.dtype in (pl.Datetime, pl.Date):
        column = column.cast(pl.Datetime("us")).dt.timestamp("us")
    try:
        column = column.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"column '{name}' holds times beyond 64 bits", fix="Use a coarser unit") from error
    negative = int((column < 0).sum())
    if negative:
        raise DataError(
            f"column '{name}' holds {negative} negative times, such as {column.min()!r}",
            rule="Times are ≥ 0",
            fix="Drop these lines, or count from an earlier moment",
        )
    return column


def _from_float(column: pl.Series) -> pl.Series:
    number = column.to_numpy()
    whole = np.isfinite(number) & (number == np.floor(number)) & (np.abs(number) <= _EXACT)
    if not whole.all():
        raise SchemaError(
            f"column '{column.name}' holds {int((~whole).sum())} fractional or infinite times or NaN, "
            f"such as {number[~whole][0]}",
            rule="Times are whole numbers",
            fix="Drop those without a value; turn seconds with a fraction into whole milliseconds",
        )
    return column.cast(pl.Int64)


def _from_iso(column: pl.Series) -> pl.Series:
    dated = column.str.contains(r"^\d{4}-\d\d-\d\d")
    zoned = column.str.contains(r"[T ]\d\d.*(Z|[+-]\d\d(:?\d\d)?)$")
    if dated.all() and zoned.any() and not zoned.all():
        raise SchemaError(
            f"column '{column.name}' mixes times with a zone, such as {_example(column.filter(zoned))}, "
            f"and without one, such as {_example(column.filter(~zoned))}",
            rule="Either all times have a zone or none has",
            fix="Write a zone behind each of them, such as Z for UTC",
        )
    times = column.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
    whole = column.str.contains(_WHOLE)
    if whole.any() and not whole.all():
        raise SchemaError(
            f"column '{column.name}' mixes whole numbers, such as {_example(column.filter(whole))}, "
            f"and strings, such as {_example(column.filter(~whole))}",
            rule="Times are all whole numbers, or all datetimes",
            fix="Correct or drop the lines that are otherwise",
        )
    wrong = column.filter(~dated | times.is_null())
    if len(wrong):
        raise SchemaError(
            f"column '{column.name}' holds strings that are no dates, such as {_example(wrong)}",
            rule="Times are whole numbers, datetimes or ISO 8601 strings, such as 2024-01-31T18:30:00",
            fix=f"Write '{column.name}' with the year first, or cast it to integers or datetimes",
        )
    return times


def _example(column: pl.Series) -> str:
    values = column.drop_nulls().head(1).to_list()
    return _shortened(values[0]) if values else "null"


def _shortened(value: Any) -> str:
    """As Python writes it, at most about fifty characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 50 else f"{text[:40]}…"
    return repr(text) if isinstance(value, str) else text


# -- events ------------------------------------------------------------------------------------------------


def tidy(frame: pl.DataFrame) -> pl.DataFrame:
    """Columns user, item, time, …: without duplicates (the first stays), sorted by (user, time), stable."""
    once = frame.unique(["user", "item", "time"], keep="first", maintain_order=True)
    return once.sort("user", "time", maintain_order=True)


def read_interactions(
    source: Table,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    items: Vocabulary | None = None,
) -> Interactions:
    """A clean log from any table; columns beside the three named ones are kept in `extra`.

    items: number the items by this vocabulary instead of by the log's own items.
    Raises SchemaError, DataError.
    """
    table = read_table(source, ids=(user, item))
    require_columns(table.columns, [user, item, time], rename)
    if table.height == 0:
        raise DataError("a log without events", rule="A log has at least one line")
    raw_user, raw_item, when = clean_ids(table[user]), clean_ids(table[item]), clean_times(table[time])
    users = vocabulary_of(raw_user)
    if items is None:
        items = ids_of(source, raw_item.unique().sort())
    elif is_csv(source):
        raw_item = _as_in(items, raw_item)
    require_same_type(raw_item, items)
    dense_item = items.encode(raw_item)
    if (dense_item == MISSING).any():
        missing = raw_item.filter(pl.Series(dense_item == MISSING))
        raise DataError(
            f"{missing.n_unique()} items of the log are not in the given vocabulary, such as {missing[0]!r}",
            fix="Read the log without one, then use align(interactions, items)",
        )
    numbered = pl.DataFrame(
        {
            "user": users.encode(raw_user).astype(np.int32),
            "item": dense_item.astype(np.int32),
            "time": when,
            "row": np.arange(table.height),
        }
    )
    numbered = tidy(numbered)
    extra = table.drop(user, item, time)
    return Interactions(
        user=numbered["user"].to_numpy(),
        item=numbered["item"].to_numpy(),
        time=numbered["time"].to_numpy(),
        users=users,
        items=items,
        extra=extra[numbered["row"].to_numpy()] if extra.width else pl.DataFrame(),
    )


def vocabulary_of(raw: pl.Series) -> Vocabulary:
    """The distinct raw ids in sorted order."""
    return Vocabulary(raw.unique().sort())


class CsvIds(Vocabulary):
    """The ids of a CSV. It has no types: where these are integers, they may as well be strings."""


def is_csv(source: Table) -> bool:
    """Whether a table is a file without types."""
    return isinstance(source, (str, Path)) and _kind(Path(source)) == "csv"


def ids_of(source: Table, raw: pa.Array | pl.Series) -> Vocabulary:
    """The vocabulary of ids that stand in a source."""
    return CsvIds(raw) if is_csv(source) else Vocabulary(raw)


def _as_in(others: Vocabulary, raw: pl.Series) -> pl.Series:
    """Integers as strings where the others are strings."""
    strings = len(others) and not pa.types.is_integer(others.raw.type)
    return raw.cast(pl.String) if strings and raw.dtype.is_integer() else raw


def items_as_in(others: Vocabulary, items: Items) -> Items:
    """The catalogue, the integers of a CSV as strings where the others are strings."""
    ids = pl.Series("item_id", items.vocabulary.raw)
    if not isinstance(items.vocabulary, CsvIds) or _as_in(others, ids).dtype == ids.dtype:
        return items
    table = items.table.with_columns(_as_in(others, ids)).sort("item_id")
    return Items(Vocabulary(table["item_id"]), table)


def same_type(log: Vocabulary, items: Items) -> tuple[pl.Series, Items]:
    """The raw item ids of a log and the catalogue, both with integers or both with strings.

    Raises SchemaError where they are not, and the integers are not those of a CSV.
    """
    raw = pl.Series("item_id", log.raw)
    if isinstance(log, CsvIds):
        raw = _as_in(items.vocabulary, raw)
    items = items_as_in(log, items)
    require_same_type(raw, items.vocabulary)
    return raw, items


def require_same_type(raw: pl.Series, vocabulary: Vocabulary) -> None:
    """SchemaError where the ids of two tables are integers here and strings there."""
    others = pl.Series(vocabulary.raw)
    if len(others) and len(raw) and others.dtype.is_integer() != raw.dtype.is_integer():
        integers, strings = (raw, others) if raw.dtype.is_integer() else (others, raw)
        names = strings.filter(~strings.str.contains(_WHOLE))
        raise SchemaError(
            f"item ids are integers in one table, such as {_example(integers)}, and strings in the other, "
            f"such as {_example(names if len(names) else strings)}",
            rule="The two tables name an item by the same id of the same type",
            fix=f"Cast '{raw.name}' in one of them{', or correct what is no whole number' if len(names) else ''}",
        )


def read_items(source: Table, *, item: str = "item_id") -> Items:
    """A catalogue from any table: row i is dense item i, in the order of the sorted raw ids.

    Raises SchemaError, DataError where an item stands twice.
    """
    table = read_table(source, ids=(item,))
    require_columns(table.columns, [item], rename)
    if item != "item_id" and "item_id" in table.columns:
        raise SchemaError(
            f"a column 'item_id' beside '{item}', which holds the ids",
            rule="The column of ids becomes 'item_id'",
            fix="Drop or rename the other",
        )
    ids = clean_ids(table[item]).alias("item_id")
    repeated = ids.filter(ids.is_duplicated())
    if len(repeated):
        raise DataError(
            f"{repeated.n_unique()} items stand more than once in the table, such as {repeated[0]!r}",
            rule="An item table has one line an item",
            fix="Keep one line of each, for example with unique('item_id')",
        )
    for name, kind in table.schema.items():
        if not _storable(kind):
            raise SchemaError(
                f"the column '{name}', of {kind}",
                rule="Items are kept as Parquet, which has no objects without fields",
                fix="Leave the column out",
            )
    table = table.drop(item).insert_column(0, ids).sort("item_id")
    return Items(ids_of(source, table["item_id"]), table)


def _storable(kind: pl.DataType) -> bool:
    """Whether Parquet can hold it."""
    if isinstance(kind, (pl.List, pl.Array)):
        return _storable(kind.inner)  # type: ignore[arg-type]
    if isinstance(kind, pl.Struct):
        return bool(kind.fields) and all(_storable(field.dtype) for field in kind.fields)  # type: ignore[arg-type]
    return kind != pl.Object


class Aligned(NamedTuple):
    """A log and a catalogue that share one vocabulary; `unknown` are the items the table lacked."""

    interactions: Interactions
    items: Items
    unknown: list[Any]


def align(
    interactions: Interactions, items: Items, unknown: Literal["error", "drop", "add"] = "add"
) -> Aligned:
    """Number the log's items by the catalogue. Where one of them is a CSV with integers and the other has
    strings, the integers become the strings that stand there.

    unknown: what to do with an item of the log that the table lacks. "add": it joins the catalogue with
    null in every column; "drop": its events go, and users without any other; "error": DataError.
    """
    if unknown not in ("error", "drop", "add"):
        raise ConfigError(f"unknown={unknown!r}", rule="It is 'error', 'drop' or 'add'")
    raw, items = same_type(interactions.items, items)
    absent = raw.filter(pl.Series(items.vocabulary.encode(raw) == MISSING))
    if len(absent) == len(raw) and (len(items) or unknown == "drop"):
        raise DataError(
            f"no item of the log is in the item table: {_example(raw)} in the log, "
            f"{_example(pl.Series(items.vocabulary.raw))} in the table",
            rule="The two tables name an item by the same id",
            fix="Look for zeros or letters before a number that one of them lacks",
        )
    if len(absent) and unknown == "error":
        raise DataError(
            f"{len(absent)} items of the log are not in the item table, such as {absent[0]!r}",
            rule="With unknown='error' the table holds every item of the log",
            fix="Add them to the table, or pass unknown='add' or 'drop'",
        )
    if len(absent) and unknown == "add":
        missing = pl.DataFrame({"item_id": absent})
        known = items.table.cast({"item_id": absent.dtype})  # an empty table's may be of another type
        table = pl.concat([known, missing], how="diagonal").sort("item_id")
        items = Items(Vocabulary(table["item_id"]), table)
    dense = items.vocabulary.encode(raw)[interactions.item]
    keep = dense != MISSING
    log = interactions.take(keep)
    present, user = np.unique(log.user, return_inverse=True)
    aligned = Interactions(
        user.astype(np.int32),
        dense[keep].astype(np.int32),
        log.time,
        _subset(log.users, present),
        items.vocabulary,
        log.extra,
    )
    return Aligned(aligned, items, absent.to_list())


def k_core(interactions: Interactions, k_user: int = 5, k_item: int = 5) -> Interactions:
    """The largest log whose every user has ≥ k_user events and every item ≥ k_item, newly numbered.

    Raises DataError where nothing is left.
    """
    log = interactions
    while len(log):
        few_user = np.bincount(log.user, minlength=len(log.users)) < k_user
        few_item = np.bincount(log.item, minlength=len(log.items)) < k_item
        drop = few_user[log.user] | few_item[log.item]
        if not drop.any():
            return compact(log)
        log = log.take(~drop)
    raise DataError(
        f"a core of {k_user} events a user and {k_item} an item",
        rule=f"None of the {len(interactions)} events survives it",
        fix="Choose smaller numbers",
    )


def compact(interactions: Interactions) -> Interactions:
    """The same events with vocabularies of only the users and items that occur."""
    users, user = np.unique(interactions.user, return_inverse=True)
    items, item = np.unique(interactions.item, return_inverse=True)
    return Interactions(
        user.astype(np.int32),
        item.astype(np.int32),
        interactions.time,
        _subset(interactions.users, users),
        _subset(interactions.items, items),
        interactions.extra,
    )


def _subset(vocabulary: Vocabulary, dense: np.ndarray) -> Vocabulary:
    return vocabulary if len(dense) == len(vocabulary) else Vocabulary(vocabulary.raw.take(pa.array(dense)))
