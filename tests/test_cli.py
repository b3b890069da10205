"""Every command, and every bad input, as a person meets them: exit status, stdout, stderr."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tiglon import cli
from tiglon.recipes import RANKING_RECIPES, Reporter, add_ranker
from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest
from tiglon.serving.publish import current, publish, versions


@pytest.fixture
def tiglon(monkeypatch, capsys):
    """Runs the command line; (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tiglon", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def train(tiglon, tiny, tmp_path, world_tables):
    """Trains on given tables (the world's where none are) with the tiny settings."""

    def run(log=None, items=None, *more, out=tmp_path / "out"):
        changes = [part for key, value in tiny.items() for part in ("--set", f"{key}={value}")]
        log = world_tables / "interactions.parquet" if log is None else log
        items = world_tables / "items.parquet" if items is None else items
        return tiglon("train", "--interactions", log, "--items", items, "--out", out, *changes, *more)

    return run


def write(path: Path, table) -> Path:
    pl.DataFrame(table).write_parquet(path)
    return path


# -- what works --------------------------------------------------------------------------------------------


def test_train_evaluate_recommend(train, tiglon, tmp_path):
    status, out, err = train()
    assert status == 0
    assert "text + co-occurrence" in out and "tiger" in out  # noqa: PT018
    assert "training 100%" in err
    assert f"Go on: tiglon recommend {tmp_path / 'out'} --user 0" in err

    status, out, _ = tiglon("evaluate", tmp_path / "out", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["split"], found["users"]) == ("test", 60)
    assert {"name", "recall@10", "ndcg@10"} <= set(found["rows"][0])
    assert found["rows"] == Bundle.load(tmp_path / "out").metrics["rows"]

    status, out, _ = tiglon("recommend", tmp_path / "out", "--user", 3, "--k", 4, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["user_id"] == 3
    assert [set(item) for item in answer["items"]] == [{"item_id", "score", "source"}] * 4
    assert answer["bundle"] == Bundle.load(tmp_path / "out").version


def test_evaluate_prints_a_table_that_fits_a_terminal(tiglon, bundle_path):
    status, out, err = tiglon("evaluate", bundle_path, "--split", "validation", "--include-seen")
    assert status == 0
    assert "Validation, seen items shown" in out
    assert "recall@10" in out and "repeats" in out  # noqa: PT018
    assert max(map(len, out.splitlines())) <= 80
    assert "testing tiger 100%" in err


def test_recommend_shows_what_the_items_are(tiglon, bundle_path):
    status, out, err = tiglon("recommend", bundle_path, "--user", 3, "--k", 2)
    bundle = Bundle.load(bundle_path)
    best = Engine(bundle).recommend(RecommendRequest(user_id=3, k=2)).items[0]
    title = bundle.items.table["title"][best.item_id]
    assert (status, err) == (0, "")
    assert title in out


def test_recommend_for_a_history_says_what_it_skips(tiglon, bundle_path):
    status, out, err = tiglon("recommend", bundle_path, "--history", "1, 2,4711", "--k", 3, "--json")
    assert status == 0
    assert err == "not in the catalogue, and skipped: 4711\n"
    expected = Engine(Bundle.load(bundle_path)).recommend(RecommendRequest(history=[1, 2], k=3)).items
    assert [item["item_id"] for item in json.loads(out)["items"]] == [r.item_id for r in expected]


def test_an_empty_history_is_a_history(tiglon, bundle_path):
    for nothing in ("", " "):
        status, out, err = tiglon("recommend", bundle_path, "--history", nothing, "--k", 3, "--json")
        assert (status, err) == (0, "empty history: popularity\n")
        assert {item["source"] for item in json.loads(out)["items"]} == {"popularity"}


def test_recommend_says_who_found_each_item(tiglon, bundle_path):
    status, out, _ = tiglon("recommend", bundle_path, "--user", 3, "--k", 2, "--explain")
    assert status == 0
    assert out.count("(place ") >= 2


def test_a_ranker_joins_a_bundle_and_a_home(tiglon, bundle_path, world_tables, tmp_path):
    tables = (
        "--interactions",
        world_tables / "interactions.parquet",
        "--items",
        world_tables / "items.parquet",
    )
    small = ("--set", "train.epochs=1", "--set", "train.evaluations=1")
    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    status, out, err = tiglon("train", *tables, "--recipe", "din", "--into", copy, *small)
    assert status == 0, err
    assert "seen items hidden: its log-odds weigh " in err
    assert "GAUC" in out.upper() and "funnel" in out  # noqa: PT018
    bundle = Bundle.load(copy)
    assert bundle.ranker is not None
    assert bundle.version != Bundle.load(bundle_path).version
    assert tiglon("recommend", copy, "--user", 3)[0] == 0
    assert os.listdir(tmp_path) == ["copy"]

    home = tmp_path / "home"
    assert tiglon("publish", bundle_path, home)[0] == 0
    assert tiglon("train", *tables, "--recipe", "din", "--into", home, *small)[0] == 0
    assert len(versions(home)) == 2
    assert Bundle.load(current(home)).ranker is not None


@pytest.mark.parametrize("published", [False, True])
def test_what_changed_while_a_ranker_learned_stays(
    bundle_path, world_tables, tmp_path, monkeypatch, published
):
    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    new = write(tmp_path / "new.parquet", {"item_id": [500], "title": ["defide lagoba"]})
    place = tmp_path / "place"
    if published:
        publish(bundle_path, place)
    else:
        shutil.copytree(bundle_path, place)
    real, asked = Bundle.with_ranker, []

    def slow(self, *given, **options):
        asked.append(self)
        if len(asked) == 1:
            changed = self.add_items(new)
            if published:
                publish(changed, place)
            else:
                changed.save(place)
        return real(self, *given, **options)

    monkeypatch.setattr(Bundle, "with_ranker", slow)
    changes = {"train.epochs": "1", "train.evaluations": "1"}
    bundle, _ = add_ranker(*tables, place, RANKING_RECIPES["din"], changes=changes)
    assert len(asked) == 2
    assert bundle.ranker is not None
    assert 500 in bundle.items.table["item_id"]


def test_a_ranker_that_was_learned_is_not_learned_again(bundle_path, world_tables, tmp_path, monkeypatch):
    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    changes = {"train.epochs": "1", "train.evaluations": "1"}

    def stopped(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "with_ranker", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_ranker(*tables, copy, RANKING_RECIPES["din"], changes=changes)
    shares = []

    class Listener(Reporter):
        def share(self, task, share, note=""):
            shares.append(task)

    bundle, _ = add_ranker(*tables, copy, RANKING_RECIPES["din"], changes=changes, reporter=Listener())
    assert "training" not in shares
    assert bundle.ranker is not None
    assert os.listdir(tmp_path) == ["copy"]


def test_a_home_is_read_as_its_current_bundle_is(tiglon, bundle_path, tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    tiglon("publish", bundle_path, home)
    for command in (
        ("recommend", "--user", 3, "--json"),
        ("evaluate", "--split", "validation", "--json"),
        ("ids", "report"),
    ):
        words = 2 if command[0] == "ids" else 1
        found, expected = (tiglon(*command[:words], place, *command[words:]) for place in (home, bundle_path))
        assert found[0] == 0, found[2]
        drop = re.compile(r'"request_id": "\w+"')
        assert drop.sub("", found[1]) == drop.sub("", expected[1])
    assert tiglon("publish", home, other)[0] == 0
    assert versions(other) == versions(home)


def test_a_home_is_not_written_to(train, tiglon, bundle_path, tmp_path):
    home = tmp_path / "home"
    tiglon("publish", bundle_path, home)
    before = sorted(home.rglob("*"))
    new = write(tmp_path / "new.parquet", {"item_id": [500], "title": ["x"]})
    status, _, err = tiglon("ids", "update", home, "--items", new)
    assert (status, err.startswith(f"error: {home} is a home of published bundles. What is ")) == (1, True)
    for more in ((), ("--overwrite",), ("--recipe", "din")):
        status, _, err = train(None, None, *more, out=home)
        assert status == 1
        assert err.startswith(f"error: {home}, which is a home of published bundles. Choose another path")
    assert sorted(home.rglob("*")) == before


def test_a_ranker_in_a_bundles_place_is_named(train, tiglon, bundle_path, tmp_path):
    ranker = tmp_path / "ranker"
    ranker.mkdir()
    (ranker / "ranker.json").write_text("{}")
    new = write(tmp_path / "new.parquet", {"item_id": [500], "title": ["x"]})
    for command in (
        ("recommend", ranker, "--user", 3),
        ("serve", ranker, "--port", 0),
        ("publish", ranker, tmp_path / "home"),
        ("ids", "report", ranker),
        ("ids", "update", ranker, "--items", new),
    ):
        status, out, err = tiglon(*command)
        assert (status, out) == (1, "")
        assert err.startswith(
            f"error: {ranker} is a ranker. A ranker orders what a bundle finds. Give a bundle"
        )
    status, _, err = train(out=ranker)
    assert (status, err) == (1, f"error: {ranker}, which is a ranker. Choose another path.\n")
    status, _, err = tiglon("publish", bundle_path, ranker)
    assert (status, err.startswith(f"error: {ranker}, which is a ranker. A home is a folder of")) == (1, True)
    assert os.listdir(ranker) == ["ranker.json"]


def test_square_brackets_and_odd_ids_are_shown_as_they_are(train, tiglon, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"SKU[a{i}]" for i in range(12)]
    lives = np.stack([rng.permutation(12)[:6] for _ in range(20)]).ravel()
    users = np.repeat(["-o'neil [/b]", *(f"user {u}" for u in range(19))], 6)
    log = {"user_id": users, "item_id": [names[i] for i in lives], "timestamp": list(range(120))}
    title = ["iPhone [refurbished] 64GB", "[/x]", "[red]", "a :apple:", *(f"[b]thing {i}" for i in range(8))]
    items = {"item_id": names, "title": title}
    out = tmp_path / "[b] 1"
    status, shown, err = train(
        write(tmp_path / "log.parquet", log), write(tmp_path / "i.parquet", items), out=out
    )
    assert status == 0, err
    assert "Test: the last moment of each user" in shown
    command = shlex.split(err.splitlines()[-1].partition("Go on: ")[2])
    assert command == ["tiglon", "recommend", str(out), "--user=-o'neil [/b]"]
    status, shown, err = tiglon(*command[1:], "--k", 12, "--include-seen", "--explain")
    assert (status, err) == (0, "")
    for name, words in zip(names, title, strict=True):
        assert re.search(rf"^ *{re.escape(name)} +{re.escape(words)} ", shown, re.MULTILINE), name

    for user in ("", "x" * 300):
        status, shown, err = tiglon("recommend", out, "--user", user)
        assert (status, shown) == (1, "")
        assert err.startswith(
            f"error: the id {user!r:.80}. An id is a whole number of 64 bits, or a string of 1 …"
        )
    status, _, err = tiglon("recommend", out, "--history", f"{names[0]},,{names[1]}")
    assert (status, err.startswith("error: the id ''. An id is ")) == (1, True)


@pytest.mark.parametrize("more", [["--recipe", "tiger"], ["--recipe", "din", "--out", "x"]])
def test_only_a_ranker_joins_a_bundle(tiglon, bundle_path, world_tables, more):
    tables = (
        "--interactions",
        world_tables / "interactions.parquet",
        "--items",
        world_tables / "items.parquet",
    )
    status, _, err = tiglon("train", *tables, "--into", bundle_path, *more)
    assert status == 1
    assert err.startswith("error: --into with ")
    assert err.endswith("Give --out alone, or a ranker's recipe, such as --recipe twin.\n")


def test_a_ranker_of_other_tables_is_refused_before_it_is_trained(
    tiglon, bundle_path, world_tables, tmp_path
):
    log = write(tmp_path / "log.parquet", pl.read_parquet(world_tables / "interactions.parquet")[5:])
    items = world_tables / "items.parquet"
    status, _, err = tiglon(
        "train", "--interactions", log, "--items", items, "--recipe", "din", "--into", bundle_path
    )
    assert status == 1
    assert "which is not the bundle's" in err.splitlines()[-1]


def test_publish_rollback_prune(tiglon, bundle_path, tmp_path):
    home = tmp_path / "home"
    first = Bundle.load(bundle_path).version
    status, out, err = tiglon("publish", bundle_path, home)
    assert (status, out, err) == (0, "", f"{home} answers with version {first}\n")
    later = shutil.copytree(bundle_path, tmp_path / "later")
    tiglon(
        "ids", "update", later, "--items", write(tmp_path / "n.parquet", {"item_id": [500], "title": ["x"]})
    )
    second = Bundle.load(later).version
    assert tiglon("publish", later, home)[2] == f"{home} answers with version {second}\n"
    assert tiglon("rollback", home) == (0, "", f"{home} answers with version {first}\n")
    status, _, err = tiglon("rollback", home)
    assert (status, err.startswith(f"error: a rollback of {first}, before which nothing is")) == (1, True)
    assert tiglon("prune", home, "--keep", 1)[:2] == (0, f"{second}\n")
    assert tiglon("prune", home, "--keep", 0)[0] == 1
    status, _, err = tiglon("rollback", tmp_path / "none")
    assert (status, "no bundle is published in" in err) == (1, True)


def test_a_key_is_printed_once_and_may_have_a_limit(tiglon, tmp_path):
    file = tmp_path / "keys.json"
    _, token, told = tiglon("key", file, "--name", "shop", "--per-minute", 600)
    assert token.strip() not in file.read_text()
    assert "Authorization: Bearer KEY" in told
    (kept,) = json.loads(file.read_text())["keys"]
    assert (kept["name"], kept["scopes"], kept["per_minute"]) == ("shop", ["read"], 600)
    status, _, told = tiglon("key", file, "--name", "other", "--per-minute", 0)
    assert (status, "per_minute=0. A key may send at least one request a minute." in told) == (1, True)


def test_ids_report_and_plot(tiglon, bundle_path, tmp_path):
    status, out, _ = tiglon("ids", "report", bundle_path, "--plot", tmp_path / "ids.png")
    assert status == 0
    assert out.startswith("Semantic IDs of 40 items")
    assert out == (bundle_path / "ids_report.txt").read_text()
    assert (tmp_path / "ids.png").read_bytes().startswith(b"\x89PNG")
    for place, message in (
        (tmp_path / "no" / "such" / "x.png", "could not be written: No such file or directory. Nothing was"),
        (
            tmp_path / "ids.zzz",
            "a picture named 'ids.zzz'. Its name ends in .png, .svg, .pdf. Name it FILE.png.",
        ),
    ):
        status, out, err = tiglon("ids", "report", bundle_path, "--plot", place)
        assert (status, out) == (1, "")
        assert message in err


def test_ids_update(tiglon, bundle_path, tmp_path):
    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    new = write(tmp_path / "new.parquet", {"item_id": [500, 1], "title": ["defide lagoba", "known"]})
    known = "{} of the items are known, and were left as they are\n"
    status, _, err = tiglon("ids", "update", copy, "--items", new)
    assert status == 0
    became = f"version {Bundle.load(bundle_path).version} became {Bundle.load(copy).version}"
    assert err == known.format(1) + f"1 new items; {became}\n"
    more = pl.read_parquet(new).with_columns(colour=pl.lit("red"), size=pl.lit(1))
    status, _, err = tiglon("ids", "update", copy, "--items", write(tmp_path / "more.parquet", more))
    assert (status, err) == (
        0,
        known.format(2) + "ignored, as the bundle's items have no such columns: colour, size\n"
        "no item of the table is new; the bundle stays as it is\n",
    )
    _, out, _ = tiglon("recommend", copy, "--user", 3, "--k", 100, "--include-seen", "--json")
    assert 500 in [item["item_id"] for item in json.loads(out)["items"]]


def test_data_inspect_and_validate(tiglon, world_tables, tmp_path):
    tables = world_tables / "interactions.parquet", "--items", world_tables / "items.parquet"
    status, out, _ = tiglon("data", "inspect", *tables)
    assert status == 0
    assert "60 users, 40 items" in out
    assert tiglon("data", "validate", *tables)[0] == 0
    bad = write(tmp_path / "bad.parquet", {"user_id": [1], "item": [2], "timestamp": [-3]})
    status, out, _ = tiglon("data", "validate", bad)
    assert status == 1
    assert "The column is missing. Rename 'item' to 'item_id'." in out and "negative" in out  # noqa: PT018


def test_data_get_knows_its_sets(tiglon):
    status, out, _ = tiglon("data", "get")
    assert status == 0
    assert "ml-1m                   6 MB" in out.splitlines()
    status, _, err = tiglon("data", "get", "amazon-beuty")
    assert status == 1
    assert err == "error: no data set named 'amazon-beuty'. Did you mean 'amazon-beauty'?\n"


def test_doctor_looks_at_everything(tiglon):
    status, out, _ = tiglon("doctor")
    assert status == 0
    subjects = [line[8:26].strip() for line in out.splitlines()]
    assert subjects == [
        "tiglon",
        "python",
        "torch",
        "bfloat16",
        "cores",
        "memory",
        "disk",
        "demo data",
        "text models",
    ]


def test_csv_and_jsonl_and_ids_of_any_kind(train, tiglon, tmp_path):
    """Ids above 2^53 and non-ASCII ones come back as they were."""
    rng = np.random.default_rng(0)
    big = [2**60 + i for i in range(12)]
    lives = np.stack([rng.permutation(12)[:6] for _ in range(20)]).ravel()
    log = pl.DataFrame(
        {
            "user_id": [f"Kündin {u} 买家" for u in np.repeat(np.arange(20), 6)],
            "item_id": [big[i] for i in lives],
            "timestamp": list(range(120)),
        }
    )
    log.write_csv(tmp_path / "log.csv")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    pl.DataFrame({"item_id": big, "title": [f"thé n° {i}" for i in range(12)]}).write_ndjson(
        tmp_path / "items.jsonl"
    )
    status, _, err = train(tmp_path / "log.csv.gz", tmp_path / "items.jsonl")
    assert status == 0, err
    _, out, _ = tiglon("recommend", tmp_path / "out", "--user", "Kündin 7 买家", "--json")
    answer = json.loads(out)
    assert answer["user_id"] == "Kündin 7 买家"
    found = {item["item_id"] for item in answer["items"]}
    assert found <= set(big)
    assert len(found) == 6  # of twelve items, six were seen


# -- language models ---------------------------------------------------------------------------------------


def backwards(body):
    """All candidates by their texts, from z to a."""
    shown = re.findall(r"^#(\d+): (.*)$", body["messages"][0]["content"], re.MULTILINE)
    return " > ".join(f"#{n}" for n, _ in sorted(shown, key=lambda pair: pair[1], reverse=True))


def test_a_language_model_orders_what_is_recommended(tiglon, bundle_path, endpoint):
    asked = ("recommend", bundle_path, "--user", 3, "--k", 20, "--json")
    model = ("--reranker", endpoint.url, "--reranker-model", "tiny", "--reranker-text", "title")
    plain = json.loads(tiglon(*asked)[1])
    endpoint.say = backwards
    status, out, err = tiglon(*asked, *model, "--reranker-seconds", 60)
    assert (status, err) == (0, "")
    found = [item["item_id"] for item in json.loads(out)["items"]]
    assert sorted(found) == sorted(item["item_id"] for item in plain["items"])
    title = dict(Bundle.load(bundle_path).items.table.select("item_id", "title").iter_rows())
    assert [title[item] for item in found] == sorted(map(title.get, found), reverse=True)
    assert endpoint.asked[0]["model"] == "tiny"


def test_a_slow_language_model_is_left_out_and_that_is_said(tiglon, bundle_path, endpoint):
    asked = ("recommend", bundle_path, "--user", 3, "--json")
    plain = json.loads(tiglon(*asked)[1])
    endpoint.slowly = 0.05
    model = ("--reranker", endpoint.url, "--reranker-model", "tiny", "--reranker-seconds", 0.2)
    status, out, err = tiglon(*asked, *model)
    found = json.loads(out)
    assert (status, err) == (0, "language model skipped: no answer of use in time\n")
    assert found["degraded"] == ["language model skipped: no answer of use in time"]
    assert found["items"] == plain["items"]


@pytest.mark.parametrize(
    "options, status, message",
    [
        (("--reranker", "http://localhost/v1"), 2, "--reranker and --reranker-model go together"),
        (("--reranker-model", "tiny"), 2, "--reranker and --reranker-model go together"),
        (
            ("--reranker", "ftp://x", "--reranker-model", "tiny"),
            1,
            "An endpoint is an address of http or https",
        ),
        (
            ("--reranker", "http://localhost/v1", "--reranker-model", "tiny", "--reranker-text", "titel"),
            1,
            "Did you mean 'title'?",
        ),
    ],
)
def test_a_language_model_that_cannot_be_asked(tiglon, bundle_path, options, status, message):
    found, out, err = tiglon("recommend", bundle_path, "--user", 3, *options)
    assert (found, out) == (status, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_describe_items_asks_once_and_says_what_it_cost(tiglon, endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TIGLON_LLM_KEY", "secret-key")
    items = write(tmp_path / "items.parquet", {"item_id": [1, 2, 3], "title": ["milk", "bread", "milk"]})
    endpoint.say = lambda body: 400 if "bread" in body["messages"][0]["content"] else "White and wet."
    out = tmp_path / "known.parquet"
    command = ("describe", items, "--endpoint", endpoint.url, "--model", "tiny", "--out", out)
    status, _, err = tiglon(*command, "--prices", 1_000_000, 2_000_000)
    assert status == 0
    assert pl.read_parquet(out)["knowledge"].to_list() == ["White and wet.", None, "White and wet."]
    assert "2 calls, 0 answers remembered, 7 tokens asked and 3 answered" in err
    assert "cost 13.0000" in err
    assert "1 items have none" in err

    endpoint.say = lambda body: "Baked."
    status, _, err = tiglon(*command)
    assert "1 calls, 1 answers remembered" in err
    assert pl.read_parquet(out)["knowledge"].to_list() == ["White and wet.", "Baked.", "White and wet."]
    write(items, {"item_id": [1, 2, 3, 4], "title": ["milk", "bread", "milk", "tea"]})
    status, _, err = tiglon(*command)
    assert (status, "1 calls, 2 answers remembered" in err) == (0, True)
    assert pl.read_parquet(out)["item_id"].to_list() == [1, 2, 3, 4]
    assert {headers["Authorization"] for _, headers in endpoint.headers} == {"Bearer secret-key"}
    assert sorted(os.listdir(tmp_path)) == ["items.parquet", "known-answers", "known.parquet"]


def test_describe_says_what_is_wrong(tiglon, endpoint, tmp_path):
    items = write(tmp_path / "items.parquet", {"item_id": [1], "title": ["milk"]})
    command = ("describe", items, "--endpoint", endpoint.url, "--model", "tiny", "--out")
    assert tiglon(*command, tmp_path / "x.csv")[2].startswith("error: --out ")
    assert (
        "the column 'title', which the items have"
        in tiglon(*command, tmp_path / "x.parquet", "--column", "title")[2]
    )
    assert not endpoint.asked
    endpoint.say = lambda body: 401
    status, _, err = tiglon(*command, tmp_path / "x.parquet")
    assert (status, "answered 401" in err) == (1, True)
    assert os.listdir(tmp_path) == ["items.parquet"]
    asked = len(endpoint.asked)
    write(tmp_path / "log.parquet", {"user_id": [1], "item_id": [1], "timestamp": [1]})
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("log", "items", "text"):
        before = (tmp_path / f"{name}.parquet").read_bytes()
        status, _, err = tiglon(*command, tmp_path / f"{name}.parquet")
        assert (status, "which is no table of these items with the column 'knowledge'" in err) == (1, True)
        assert (tmp_path / f"{name}.parquet").read_bytes() == before
    assert len(endpoint.asked) == asked


# -- bad input ---------------------------------------------------------------------------------------------

LOG = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}


@pytest.mark.parametrize(
    "log, message",
    [
        ({"user_id": [1], "item": [1], "timestamp": [1]}, "no column 'item_id'. Needed: user_id, item_id"),
        (LOG | {"item_id": [1, None, 3]}, "column 'item_id' holds 1 nulls. An id is never null"),
        (LOG | {"user_id": [1.0, float("nan"), 1.0]}, "column 'user_id' holds Float64"),
        (LOG | {"timestamp": [1, -2, 3]}, "column 'timestamp' holds 1 negative times, such as -2"),
        (LOG | {"timestamp": ["now", "then", "x"]}, "strings that are no dates, such as 'now'"),
        (LOG | {"item_id": ["1", "2", "3"]}, "The two tables name an item by the same id of the same type"),
        ({name: values[:0] for name, values in LOG.items()}, "column 'user_id'|a log without events"),
        ({name: values[:1] for name, values in LOG.items()}, "1 users, none with three moments"),
    ],
)
def test_a_bad_log_is_one_clean_message(train, tmp_path, log, message):
    status, out, err = train(write(tmp_path / "log.parquet", log))
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert any(part in last for part in message.split("|")), last
    assert sorted(os.listdir(tmp_path)) == ["log.parquet"]


@pytest.mark.parametrize(
    "items, message",
    [
        ({"item_id": [1, 1], "title": ["a", "b"]}, "1 items stand more than once in the table, such as 1"),
        ({"id": [1], "title": ["a"]}, "no column 'item_id'"),
        ({"item_id": [1, None], "title": ["a", "b"]}, "column 'item_id' holds 1 nulls"),
    ],
)
def test_a_bad_item_table_is_one_clean_message(train, tmp_path, items, message):
    status, _, err = train(None, write(tmp_path / "items.parquet", items))
    assert status == 1
    assert message in err.splitlines()[-1]


def test_files_that_are_none(train, tmp_path):
    assert "no file at" in train(tmp_path / "none.parquet")[2]
    (tmp_path / "empty.csv").touch()
    assert "an empty file" in train(tmp_path / "empty.csv")[2]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is none")
    assert "cannot be read as parquet" in train(tmp_path / "broken.parquet")[2]


def test_a_stopped_training_says_so_and_goes_on(train, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "with_funnel", interrupted)
        status, _, err = train()
    assert status == 130
    assert err.splitlines()[-1] == "Stopped. A training goes on when the same command is given again."
    status, out, err = train()
    assert status == 0
    assert "Going on with the run in " in out + err


def test_items_without_text_and_shuffled_rows_and_duplicates_are_taken(train, world_tables, tmp_path):
    log = pl.read_parquet(world_tables / "interactions.parquet")
    items = pl.read_parquet(world_tables / "items.parquet")
    mute = items.with_columns(pl.when(pl.col("item_id") < 5).then(None).otherwise("title").alias("title"))
    mixed = pl.concat([log, log]).sample(fraction=1.0, shuffle=True, seed=1)
    assert train(write(tmp_path / "log.parquet", mixed), write(tmp_path / "items.parquet", mute))[0] == 0
    assert len(Bundle.load(tmp_path / "out").histories.item) == len(log)


def test_a_catalogue_of_one_item_and_k_beyond_it(train, tiglon, tmp_path):
    log = write(tmp_path / "log.parquet", LOG | {"item_id": [1, 1, 1]})
    items = write(tmp_path / "items.parquet", {"item_id": [1], "title": ["the only one"]})
    assert train(log, items)[0] == 0
    _, out, _ = tiglon("recommend", tmp_path / "out", "--user", 1, "--k", 50, "--include-seen", "--json")
    assert [item["item_id"] for item in json.loads(out)["items"]] == [1]


def test_an_unknown_user_gets_what_is_popular_and_is_told(tiglon, bundle_path):
    status, out, err = tiglon("recommend", bundle_path, "--user", 4711, "--k", 2, "--json")
    assert (status, err) == (0, "unknown user: popularity\n")
    assert {item["source"] for item in json.loads(out)["items"]} == {"popularity"}
    for user in ("Anna", ""):
        status, _, err = tiglon("recommend", bundle_path, "--user", user)
        assert (status, err) == (1, f"error: the id '{user}'. Ids here are whole numbers, such as 0.\n")
    status, _, err = tiglon("recommend", bundle_path, "--user", 2**70)
    assert (status, f"the id '{2**70}'. An id is a whole number of 64 bits" in err) == (1, True)


def test_unknown_settings_and_recipes_come_with_a_suggestion(train):
    status, _, err = train(None, None, "--set", "train.epoch=3")
    assert (status, err.splitlines()[-1]) == (
        1,
        "error: unknown setting 'train.epoch'. Did you mean 'train.epochs'?",
    )
    status, _, err = train(None, None, "--recipe", "tigre")
    assert (status, err) == (1, "error: no recipe named 'tigre'. Did you mean 'tiger'?\n")


@pytest.mark.parametrize("minutes", [-1, 0, "nan", "inf"])
def test_minutes_that_are_none(train, tiglon, tmp_path, minutes):
    message = f"error: --minutes {minutes}. Training takes some minutes, more than 0.\n"
    assert train(None, None, "--minutes", minutes) == (1, "", message)
    assert train(None, None, "--recipe", "twin", "--minutes", minutes) == (1, "", message)
    assert tiglon("demo", "--out", tmp_path / "demo", "--minutes", minutes) == (1, "", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["wibble"],
        ["train", "--out", "x"],
        ["train", "--interactions", "x", "--items", "y"],
        ["publish", "x"],
        ["recommend", "x"],
        ["recommend", "x", "--user", "1", "--history", "2"],
        ["recommend", "x", "--user", "1", "--k", "many"],
    ],
)
def test_wrong_usage_has_status_2(tiglon, arguments):
    assert tiglon(*arguments)[0] == 2


def test_a_setting_without_a_value_is_wrong_usage(train):
    status, _, err = train(None, None, "--set", "train.epochs")
    assert status == 2
    assert "KEY=VALUE" in err


@pytest.mark.parametrize("command", [["evaluate"], ["recommend", "--user", "1"], ["ids", "report"]])
def test_bundles_that_cannot_be_read(tiglon, bundle_path, tmp_path, command):
    def run(path):
        return (
            tiglon(command[0], *command[1:2], path, *command[2:])
            if command[0] == "ids"
            else tiglon(command[0], path, *command[1:])
        )

    status, _, err = run(tmp_path / "none")
    assert status == 1
    assert err.startswith(f"error: no bundle at {tmp_path / 'none'}. ")

    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    (copy / "tiger" / "network.safetensors").unlink()
    assert (
        run(copy)[2] == f"error: tiger/network.safetensors is missing from {copy}. Copy the bundle again.\n"
    )
    shutil.copy(bundle_path / "metrics.json", copy / "tiger" / "network.safetensors")
    assert "tiger/network.safetensors in" in run(copy)[2]

    content = json.loads((copy / "manifest.json").read_text()) | {"format": 99}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert run(copy)[2].startswith("error: a bundle of format 99")


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from tiglon.cli import main
main()
"""


@pytest.mark.parametrize("limit", [700, 9_000])
def test_a_full_disk_leaves_nothing_half_written(bundle_path, tmp_path, limit):
    """No file can grow beyond the limit, as if the disk were full."""
    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    new = write(tmp_path / "new.parquet", {"item_id": [500], "title": ["defide lagoba"]})
    command = [sys.executable, "-c", FULL, str(limit), "ids", "update", str(copy), "--items", str(new)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "Nothing was changed there" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["copy", "new.parquet"]
    assert Bundle.load(copy).version == Bundle.load(bundle_path).version
