"""Ranking from two tables: recipes, the task that they make, and the command line."""

import json
import re
import shutil
import sys

import numpy as np
import polars as pl
import pytest

from tiglon import cli
from tiglon.data.events import align, read_interactions, read_items
from tiglon.errors import ConfigError, DataError
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.ranking.units import UNITS
from tiglon.recipes import (
    RANKING_RECIPES,
    override,
    ranking_schema,
    ranking_tasks,
    require_free_ranker,
    train_ranker,
)
from tiglon.serving.bundle import Bundle

TINY = {
    "unit.heads": "1",
    "unit.head_width": "8",
    "unit.width": "8",
    "network.hidden": "8",
    "train.epochs": "1",
    "train.evaluations": "1",
}


def tables(users=30, events=6):
    """Baskets of two; each user keeps to one half of the catalogue."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "user_id": f"u{u}",
            "item_id": int(i) + 10 * (u % 2),
            "timestamp": 100 * e,
            "price": float(rng.integers(1, 9)),
            "channel": ["shop", "web"][int(rng.integers(2))],
            "receipt_id": int(rng.integers(10**9)),
            "always": 1,
        }
        for u in range(users)
        for e in range(events)
        for i in rng.choice(10, 2, replace=False)
    ]
    items = pl.DataFrame(
        {
            "item_id": range(20),
            "title": [f"thing {i}" for i in range(20)],
            "kind": ["a" if i < 10 else "b" for i in range(20)],
            "weight": [float(i) for i in range(20)],
            "tags": [["x"]] * 20,
            "maker_id": [i % 5 for i in range(20)],
        }
    )
    return pl.DataFrame(lines), items


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    for name, table in zip(("log", "items"), tables(), strict=True):
        table.write_parquet(path / f"{name}.parquet")
    return path


@pytest.fixture(scope="module")
def aligned():
    log, items = tables()
    return align(read_interactions(log), read_items(items))[:2]


@pytest.fixture
def tiglon(monkeypatch, capsys):
    """Runs the command line; (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tiglon", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


# -- recipes -------------------------------------------------------------------------------------------------


def test_every_unit_is_a_recipe_and_all_else_is_the_same():
    assert set(RANKING_RECIPES) == {*UNITS, "short"}
    assert {override(recipe, {"long": "none"}) for recipe in RANKING_RECIPES.values()} == {
        LifelongConfig(long="none")
    }


@pytest.mark.parametrize("name", UNITS)
def test_every_recipe_scores_and_learns(name, aligned):
    log, items = aligned
    learn, *_ = ranking_tasks(log, items, ranking_schema(items, log))
    few = learn.select(np.arange(12))
    settings = override(RANKING_RECIPES[name], {key: v for key, v in TINY.items() if key != "unit.width"})
    ranker = LifelongRanker.of(few, settings)
    before = ranker.score(few)
    after = ranker.fit(few).score(few)
    assert np.isfinite(after).all()
    assert not np.array_equal(before, after)


def test_settings_by_their_names():
    settings = override(
        RANKING_RECIPES["full_attention"],
        {"network.hidden": "64,32,16", "unit.chosen": "7", "longest": "200", "train.lr": "0.002"},
    )
    assert settings.network.hidden == (64, 32, 16)
    assert (settings.unit.chosen, settings.longest, settings.train.lr) == (7, 200, 0.002)
    with pytest.raises(ConfigError, match=r"unknown setting 'unit.choosen'\. Did you mean 'unit.chosen'\?"):
        override(settings, {"unit.choosen": "7"})
    with pytest.raises(ConfigError, match="no interest unit named 'twni'"):
        override(settings, {"long": "twni"})
    with pytest.raises(ConfigError, match=r"network.hidden=a,b\. network.hidden is of type"):
        override(settings, {"network.hidden": "a,b"})


# -- the task ------------------------------------------------------------------------------------------------


def test_the_schema_of_two_tables(aligned):
    log, items = aligned
    found = {f.name: (f.role, f.kind) for f in ranking_schema(items, log).features}
    assert found == {
        "item_id": ("inherent", "category"),
        "kind": ("inherent", "category"),  # title names each item apart, tags are lists
        "weight": ("inherent", "number"),
        "maker_id": ("inherent", "category"),
        "gap": ("cross", "number"),
        "price": ("cross", "number"),
        "channel": ("cross", "category"),  # receipt_id is an identifier, always has one value
    }


def test_the_last_moment_is_the_test(aligned):
    log, items = aligned
    learn, validation, test = ranking_tasks(log, items, ranking_schema(items, log))
    assert set(test.time) == {500}
    assert set(validation.time) == {400}
    assert set(learn.time) == {100, 200, 300}
    assert len(test) == len(validation) == 30
    assert (test.lengths == 10).all()
    assert (learn.lengths == 2 * (learn.time // 100)).all()


def test_what_is_held_out_teaches_nothing():
    """An item that occurs in last moments alone has no vector of its own and is no candidate; a price that
    occurs there alone moves no boundary."""
    log, items = tables()
    last = (log["timestamp"] == 500) & (log["user_id"] < "u2")
    log = log.with_columns(
        item_id=pl.when(last).then(19).otherwise(pl.col("item_id").clip(0, 18)),
        price=pl.when(last).then(1e6).otherwise(pl.col("price")),
    )
    clean, catalogue, _ = align(read_interactions(log), read_items(items))
    parts = ranking_tasks(clean, catalogue, ranking_schema(catalogue, clean))
    new = catalogue.vocabulary.encode([19])[0]
    features = parts[0].features
    assert features.item_codes[new, 0] == 0
    assert features.item_codes[:new, 0].all()
    assert features.coders["price"].boundaries.max() < 10
    assert all((part.item != new).all() for part in parts)


def test_too_short_a_log():
    log, items = tables(events=2)
    clean, catalogue, _ = align(read_interactions(log), read_items(items))
    with pytest.raises(DataError, match="30 users, none with three moments"):
        ranking_tasks(clean, catalogue, ranking_schema(catalogue, clean))


# -- the job, and the command line ---------------------------------------------------------------------------


def test_train_and_evaluate(tiglon, folder, bundle_path, tmp_path):
    out = tmp_path / "ranker"
    changes = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "--recipe", "full_attention", "--interactions", folder / "log.parquet", "--items"]
    command += [folder / "items.parquet", "--out", out, *changes]
    status, stdout, stderr = tiglon(*command)
    assert status == 0, stderr
    assert "full_attention" in stdout
    assert "gauc" in stdout
    assert "…" not in stdout
    assert "Features: item_id (inherent), gap (cross)" in stderr
    assert not out.with_name(".ranker.work").exists()

    status, again, _ = tiglon("evaluate", out)
    assert status == 0
    shown = re.findall(r"\.\d{4}", stdout)
    assert shown
    assert re.findall(r"\.\d{4}", again) == shown
    status, found, _ = tiglon("evaluate", out, "--split", "validation", "--json")
    row = json.loads(found)["rows"][0]
    assert (row["name"], row["task"]) == ("full_attention", "next_basket")
    assert row["gauc"] == pytest.approx(LifelongRanker.load(out).history["best"])

    for option in ("--exclude-seen", "--include-seen"):
        status, stdout, stderr = tiglon("evaluate", out, option)
        assert (status, stdout) == (1, "")
        assert stderr == (
            f"error: {option} with {out}, which is a ranker. A ranker orders the candidates that it is given, seen "
            "or not. Leave it out.\n"
        )

    status, _, stderr = tiglon(*command)
    assert status == 1
    assert "where a ranker stands already. Choose another path, or pass --overwrite." in stderr
    command[command.index(out)] = bundle_path
    status, _, stderr = tiglon(*command, "--overwrite")
    assert (status, f"Pass --into {bundle_path}, or choose another path." in stderr) == (1, True)


def test_the_lives_of_a_ranker_are_clustered(tiglon, folder, bundle_path, tmp_path):
    out = tmp_path / "ranker"
    train_ranker(
        folder / "log.parquet", folder / "items.parquet", out, RANKING_RECIPES["twin_v2"], changes=TINY
    )
    whole = LifelongRanker.load(out)
    status, _, stderr = tiglon("cluster", out, "--by", "prise")
    assert status == 1
    assert "groups by 'prise'. Groups are of a number of each behaviour: " in stderr
    assert "Did you mean 'price'?" in stderr

    status, _, stderr = tiglon("cluster", out, "--by", "price", "--groups", 2, "--until", 400)
    assert status == 0, stderr
    assert "240 behaviours of 30 users became" in stderr  # four of six baskets of two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranker"]
    ranker = LifelongRanker.load(out)
    store = ranker.clusters
    assert store.settings.until == 400
    assert set(store.virtual.features["cluster_group"]) == {0, 1}
    asked = ["u3", "u8"], [[1, 12], [5]]
    expected = whole.predict(*asked)
    assert not np.allclose(np.concatenate(ranker.predict(*asked)), np.concatenate(expected), atol=1e-7)
    assert tiglon("evaluate", out)[0] == 0

    assert tiglon("cluster", out, "--keys")[0] == 0  # all of each life
    assert " keys " in LifelongRanker.load(out).clusters.settings.vectors
    status, _, stderr = tiglon("evaluate", out)
    assert status == 1
    assert "Cluster with `until` at or before the first request" in stderr
    status, _, stderr = tiglon("cluster", bundle_path)
    assert status == 1
    assert "A funnel reads lives as they are now" in stderr


def test_python_gives_the_same_ranker(folder, tmp_path):
    recipe = RANKING_RECIPES["mean_pooling"]
    ranker, found = train_ranker(
        folder / "log.parquet", folder / "items.parquet", tmp_path / "r", recipe, minutes=1, changes=TINY
    )
    assert found[0].name == "mean_pooling"
    assert ranker.config.train.minutes == 1
    assert LifelongRanker.load(tmp_path / "r").version == ranker.version
    assert len(ranker.predict(["u3", "nobody"], [[1, 12], [5]])[0]) == 2


def test_what_stands_there_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="which exists and is no bundle"):
            require_free_ranker(tmp_path / "mine", overwrite)


def test_an_unknown_recipe_comes_back_with_a_suggestion(tiglon, folder, tmp_path):
    status, _, stderr = tiglon(
        "train", "--recipe", "sim_herd", "--interactions", folder / "log.parquet",
        "--items", folder / "items.parquet", "--out", tmp_path / "x",
    )  # fmt: skip
    assert status == 1
    assert "no recipe named 'sim_herd'. Did you mean 'sim_hard'?" in stderr


def test_a_damaged_ranker_is_one_clean_message(tiglon, tmp_path):
    (tmp_path / "ranker.json").write_text("{")
    status, _, stderr = tiglon("evaluate", tmp_path)
    assert status == 1
    assert stderr.startswith("error: a ranker in")


# -- crosses, gates and several tasks, from the shell ----------------------------------------------------------


@pytest.fixture(scope="module")
def bought(tmp_path_factory):
    """The same tables with how many were bought."""
    path = tmp_path_factory.mktemp("bought")
    log, items = tables()
    quantity = np.random.default_rng(1).integers(1, 4, len(log))
    log.with_columns(quantity=pl.Series(quantity)).write_parquet(path / "log.parquet")
    items.write_parquet(path / "items.parquet")
    return path


@pytest.fixture
def train(tiglon, bought, tmp_path):
    def run(out, **changes):
        given = [part for key, value in (TINY | changes).items() for part in ("--set", f"{key}={value}")]
        command = ["train", "--recipe", "full_attention", "--interactions", bought / "log.parquet"]
        return tiglon(*command, "--items", bought / "items.parquet", "--out", tmp_path / out, *given)

    return run


def test_a_cross_and_a_gate_are_trained_and_kept(train, tmp_path):
    status, _, err = train("gated", cross="dcn_v2", gate="poso", gate_by="activity,user_id")
    assert status == 0, err
    assert "activity (context), user_id (user)" in err
    ranker = LifelongRanker.load(tmp_path / "gated")
    assert (ranker.config.cross, ranker.config.gate) == ("dcn_v2", "poso")
    assert ranker.config.gate_by == ("activity", "user_id")
    known, stranger = ranker.predict(["u3", "nobody"], [[1, 12], [1, 12]])
    assert np.isfinite([*known, *stranger]).all()


def test_the_probe_shows_before_and_after(train, tiglon, tmp_path):
    assert train("plain", gate_by="activity")[0] == 0
    assert train("gated", gate="poso", gate_by="activity")[0] == 0
    both = ("probe", tmp_path / "plain", tmp_path / "gated")
    status, out, err = tiglon(*both)
    assert (status, err) == (0, "")
    assert "What turning a feature over moves" in out
    status, out, _ = tiglon(*both, "--json")
    rows = json.loads(out)["rows"]
    assert [(row["ranker"], row["feature"]) for row in rows] == [(str(path), "activity") for path in both[1:]]
    assert all(row["hidden"] > 0 and row["logit"] > 0 for row in rows)


def test_what_cannot_be_probed(train, tiglon, bundle_path, tmp_path):
    assert train("plain")[0] == 0
    status, out, err = tiglon("probe", tmp_path / "plain")
    assert (status, out) == (1, "")
    assert err == (
        "error: a probe of 'full_attention', which reads nothing of who asks. A probe turns over a feature of the "
        "user or the context. Train it with gate_by=activity, without a gate and with one.\n"
    )
    assert train("asks", gate_by="activity")[0] == 0
    status, _, err = tiglon("probe", tmp_path / "asks", "--feature", "activty")
    assert (status, err) == (1, "error: no feature 'activty' of who asks. Did you mean 'activity'?\n")
    status, _, err = tiglon("probe", bundle_path)
    assert (status, "which has no ranker. Train one into it: tiglon train" in err) == (1, True)
    status, _, err = tiglon("probe", tmp_path / "nowhere")
    assert (status, "a ranker in" in err) == (1, True)


def test_several_tasks_are_trained_by_a_method_of_their_name(train, tiglon, tmp_path):
    changes = {
        "tasks": "next_basket,quantity_2",
        "method": "pcgrad",
        "network.experts": 2,
        "network.tower": 4,
    }
    status, out, err = train("several", **changes)
    assert status == 0, err
    ranker = LifelongRanker.load(tmp_path / "several")
    assert (ranker.tasks, ranker.config.method) == (("next_basket", "quantity_2"), "pcgrad")
    assert "quantity_2" in out
    status, found, _ = tiglon("evaluate", tmp_path / "several", "--json")
    assert [row["task"] for row in json.loads(found)["rows"]] == ["next_basket", "quantity_2"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "pcgard"}, "no multi-task method named 'pcgard'. Did you mean 'pcgrad'?"),
        ({"method": "pcgrad"}, "method=pcgrad for 1 task. A method weighs several tasks."),
        ({"tasks": "next_basket,quantity2"}, "no task 'quantity2'. Did you mean 'quantity_2'?"),
        ({"tasks": "within_30_days"}, "look ahead, here into the moments that are held out"),
        (
            {"gate": "poso"},
            "gate=poso without gate_by. A gate reads something of who asks. Set gate_by=activity",
        ),
        ({"gate": "poso", "gate_by": "actvity"}, "Did you mean 'activity'?"),
        ({"gate": "lhuc", "gate_by": "activity,user_id"}, "It has one vector an id: pass one column"),
        (
            {"gate": "poso", "gate_by": "activity", "network.experts": 2},
            "A gate multiplies the layers of one MLP",
        ),
        ({"network.hidden": "-1"}, "A layer is at least 1 wide"),
        ({"network.tower": "0"}, "A layer is at least 1 wide"),
        ({"network.recent": "-1"}, "recent is at least 1"),
        ({"network.dropout": "1"}, "dropout lies in 0 … 1"),
        ({"cross": "dcn2"}, "no crossing layer named 'dcn2'. Did you mean 'dcn'?"),
    ],
)
def test_what_cannot_be_trained_is_said_before_it_is(train, tmp_path, changes, message):
    status, out, err = train("x", **changes)
    assert (status, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_task_of_a_column_that_is_not_there(tiglon, folder, tmp_path):
    command = ["train", "--recipe", "din", "--interactions", folder / "log.parquet", "--items"]
    status, _, err = tiglon(
        *command, folder / "items.parquet", "--out", tmp_path / "x", "--set", "tasks=next_basket,quantity_2"
    )
    assert status == 1
    assert "no column 'quantity'" in err.splitlines()[-1]


def test_a_gated_ranker_joins_a_bundle(tiglon, bundle_path, world_tables, tmp_path):
    """In the funnel it knows who asks, and how much they did."""
    copy = shutil.copytree(bundle_path, tmp_path / "copy")
    given = {"gate": "ppnet", "gate_by": "activity,user_id", "cross": "fm"}
    changes = [part for key, value in (TINY | given).items() for part in ("--set", f"{key}={value}")]
    tables = (
        "--interactions",
        world_tables / "interactions.parquet",
        "--items",
        world_tables / "items.parquet",
    )
    status, _, err = tiglon("train", *tables, "--recipe", "din", "--into", copy, *changes)
    assert status == 0, err
    status, out, _ = tiglon("probe", copy, "--json")
    assert [row["feature"] for row in json.loads(out)["rows"]] == ["user_id", "activity"]
    bundle = Bundle.load(copy)
    assert bundle.lifelong is not None
    ranker = bundle.ranker
    lives = bundle.histories.before(np.array([0, 5]))
    asked = bundle.lifelong._task(lives, np.array([0, 1, 2]), np.array([1, 2]))
    theirs = ranker.asked(ranker.histories.users.decode([0, 5]), [[1], [2]])
    ours = asked.batches(2)[0].profile
    assert ours.gt(0).all()
    assert ours.equal(theirs.batches(2)[0].profile)
    assert tiglon("recommend", copy, "--user", 3)[0] == 0
