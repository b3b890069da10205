import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from filelock import FileLock

from tiglon import recipes
from tiglon.data.events import read_interactions
from tiglon.errors import ConfigError, DataError, StorageError
from tiglon.recipes import (
    IdsConfig,
    Reporter,
    override,
    repeat_share,
    tiger,
    tiger_paper,
    train,
)
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.tiger_paper import PaperConfig
from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest


class Listener(Reporter):
    def __init__(self):
        self.lines, self.shares = [], []

    def say(self, line):
        self.lines.append(line)

    def share(self, task, share, note=""):
        self.shares.append((task, share))


# -- recipes and their settings ------------------------------------------------------------------------


def test_the_recipe_grows_with_the_data():
    small, large = tiger(13_000, 300), tiger(150_000, 12_000)
    assert isinstance(small.tiger.model, CausalConfig)
    assert small.tiger.model.width < large.tiger.model.width
    assert (small.ids.codes, large.ids.codes) == (64, 256)
    assert large.tiger.model == CausalConfig()


def test_the_paper_recipe_is_the_paper_whatever_the_data():
    recipe = tiger_paper(100, 10)
    assert recipe.tiger.model == PaperConfig()
    assert (recipe.ids.tokenizer, recipe.ids.levels, recipe.ids.codes) == ("rqvae", 3, 256)
    assert recipe.exclude_seen is False
    assert not recipe.tiger.renormalise


@pytest.mark.parametrize(
    "key, text, read",
    [
        ("train.lr", "0.002", lambda r: r.tiger.train.lr == 0.002),
        ("tiger.train.lr", "0.002", lambda r: r.tiger.train.lr == 0.002),
        ("train.bfloat16", "False", lambda r: r.tiger.train.bfloat16 is False),
        ("train.bfloat16", "true", lambda r: r.tiger.train.bfloat16 is True),
        ("train.minutes", "2", lambda r: r.tiger.train.minutes == 2.0),
        ("train.minutes", "none", lambda r: r.tiger.train.minutes is None),
        ("train.betas", "0.9,0.95", lambda r: r.tiger.train.betas == (0.9, 0.95)),
        ("model.width", "64", lambda r: r.tiger.model.width == 64),
        ("window", "20", lambda r: r.tiger.window == 20),
        ("ids.tokenizer", "lsh", lambda r: r.ids.tokenizer == "lsh"),
        ("text.template", "{title}", lambda r: r.text.template == "{title}"),
        ("exclude_seen", "false", lambda r: r.exclude_seen is False),
    ],
)
def test_override_reads_values_by_their_type(key, text, read):
    before = tiger()
    assert read(override(before, {key: text}))
    assert before == tiger()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.lrr": "1"}, "unknown setting 'train.lrr'. Did you mean 'train.lr'?"),
        ({"wibble": "1"}, "unknown setting 'wibble'. Known: "),
        ({"name": "mine"}, "unknown setting 'name'"),
        ({"train.epochs": "2.5"}, "train.epochs=2.5. train.epochs is of type int."),
        ({"train.bfloat16": "maybe"}, "train.bfloat16=maybe. train.bfloat16 is of type bool."),
        ({"train.lr": "nan"}, "train.lr=nan. train.lr is of type float."),
        ({"train.betas": "0.9"}, "train.betas=0.9"),
        ({"train.lr": "-1"}, "lr=-1.0"),
        ({"train.clip": "0"}, "clip > 0 and 0 ≤ betas < 1"),
        ({"train.clip": "-1"}, "clip=-1.0"),
        ({"sasrec.train.betas": "2,3"}, "betas=(2.0, 3.0)"),
        ({"train.warmup": "-1"}, "warmup is at least 0"),
        ({"train.final_lr": "-3"}, "final_lr is at least 0"),
        ({"train.weight_decay": "-1"}, "weight_decay is at least 0"),
        ({"train.seed": "-1"}, "seed is at least 0"),
        ({"ids.seed": "-1"}, "seed is at least 0"),
        ({"ids.behaviour": "-1"}, "behaviour is at least 0"),
        ({"funnel.seed": "-1"}, "seed is at least 0"),
        ({"funnel.penalties": ""}, "There is at least one, each at least 0 and finite"),
        ({"funnel.penalties": "1,-1"}, "penalties=(1.0, -1.0)"),
        ({"ids.tokenizer": "kmeans"}, "tokenizer 'kmeans'. Known: lsh, random, residual-kmeans, rqvae"),
    ],
)
def test_override_refuses_what_it_cannot_read(changes, message):
    with pytest.raises(ConfigError) as error:
        override(tiger(), changes)
    assert message in str(error.value)


def test_every_setting_can_be_named():
    places = list(recipes._paths(tiger()))
    names = {".".join(path).removeprefix("tiger.") for path in places}
    assert len(names) == len(places)
    assert {"train.lr", "sasrec.train.lr", "ids.codes"} <= names
    flat = json.dumps(dataclasses.asdict(tiger()))
    assert all(f'"{path[-1]}"' in flat for path in places)


# -- what the data say -----------------------------------------------------------------------------------


def test_repeats_are_counted_within_a_user():
    table = pl.DataFrame(
        {"user_id": [1, 1, 1, 2, 2], "item_id": [7, 7, 8, 7, 8], "timestamp": [1, 2, 3, 1, 2]}
    )
    assert repeat_share(read_interactions(table)) == pytest.approx(1 / 5)


def test_what_is_odd_in_a_log_is_said_in_training_too():
    times = [1_700_000_000, 1_700_000_000, 1_700_000_001_000]
    log = pl.DataFrame({"user_id": ["1", "1", "NaN"], "item_id": [7, 7, 8], "timestamp": times})
    listener = Listener()
    recipes._read(log, pl.DataFrame({"item_id": [7, 8]}), listener)
    assert "1 lines repeat a user, item and time; the first of each stays" in listener.lines
    assert any("Warning: time: two units are mixed: 1700000000 is 2023" in line for line in listener.lines)
    assert any("Warning: user_id: 1 of the ids, such as 'NaN', may" in line for line in listener.lines)


# -- the job ---------------------------------------------------------------------------------------------


def test_training_says_what_it_does_and_leaves_nothing_beside_the_bundle(world_tables, tiny, tmp_path):
    listener = Listener()
    log = pl.read_parquet(world_tables / "interactions.parquet")
    stranger = pl.DataFrame({"user_id": [0], "item_id": [999], "timestamp": [1]})
    bundle = train(
        pl.concat([log, stranger]),
        world_tables / "items.parquet",
        tmp_path / "out",
        changes=tiny,
        reporter=listener,
    )
    said = "\n".join(listener.lines)
    share = 1 / (log.height + 1)
    assert f"1 items of the log ({share:.1%} of the events) are not in the item table, such as 999" in said
    assert "seen items are not recommended again" in said
    assert ("testing tiger", 1.0) in listener.shares
    assert listener.shares[-1] == ("testing funnel", 1.0)
    assert os.listdir(tmp_path) == ["out"]
    assert [row["name"] for row in bundle.metrics["rows"]] == [
        "popularity",
        "text neighbours",
        "co-occurrence",
        "text + co-occurrence",
        "tiger",
        "sasrec",
        "two_tower",
        "funnel",
    ]
    assert bundle.recipe["tiger"]["train"]["epochs"] == 2
    assert 999 in bundle.items.vocabulary.raw.to_pylist()


def test_where_users_repeat_themselves_seen_items_stay(tiny, tmp_path):
    log = pl.DataFrame(
        {"user_id": np.repeat(np.arange(20), 6), "item_id": np.tile([1, 2, 1, 2, 3, 4], 20)}
    ).with_columns(timestamp=pl.int_range(pl.len()))
    listener = Listener()
    items = pl.DataFrame({"item_id": [1, 2, 3, 4], "title": ["tea", "milk", "bread", "jam"]})
    bundle = train(log, items, tmp_path / "out", changes=tiny, reporter=listener)
    assert (  # of the moments to learn from, not of those to test on
        "50% of the events repeat an item of the same user: seen items stay in the ranking" in listener.lines
    )
    assert bundle.exclude_seen is False
    assert {r.item_id for r in bundle.recommend([0], 10)[0]} == {1, 2, 3, 4}
    assert "repeats" in [row["name"] for row in bundle.metrics["rows"]]


@pytest.mark.parametrize(
    "behaviour, said",
    [
        ("0", "No column of words in the item table: semantic IDs are random"),
        ("0.7", "from what is used together;"),
    ],
)
def test_a_table_without_words_gets_other_ids(world_tables, tiny, tmp_path, behaviour, said):
    listener = Listener()
    items = pl.read_parquet(world_tables / "items.parquet").select("item_id")
    changes = tiny | {"ids.behaviour": behaviour}
    bundle = train(
        world_tables / "interactions.parquet", items, tmp_path / "out", changes=changes, reporter=listener
    )
    assert said in "\n".join(listener.lines)
    assert len(np.unique(bundle.tiger.ids.codes[:, :-1], axis=0)) > 10


@pytest.mark.parametrize("worded", [True, False])
def test_every_retriever_can_join_the_funnel_and_new_items_join_them(world_tables, tiny, tmp_path, worded):
    names = ["mind", "comirec", "eager", "two_tower", "sasrec"]
    small = {"mind.width": "8", "mind.hidden": "16", "comirec.width": "8", "eager.branches": "8"}
    small |= {
        f"eager.model.{name}": value for name, value in (("width", "8"), ("heads", "1"), ("hidden", "16"))
    }
    small |= {f"{name}.train.{key}": "1" for name in names for key in ("epochs", "evaluations")}
    items = pl.read_parquet(world_tables / "items.parquet")
    if not worded:
        items, small = items.select("item_id"), small | {"ids.behaviour": "0"}
    bundle = train(
        world_tables / "interactions.parquet",
        items,
        tmp_path / "all",
        changes=tiny | small | {"retrievers": ",".join(names)},
    )
    names[1] = "comirec sa"  # as it is made
    assert list(bundle.others) == names
    measured = [row["name"] for row in bundle.metrics["rows"]]
    assert set(names) < set(measured)
    assert measured[-1] == "funnel"
    for found in Engine(bundle).recommend(RecommendRequest(user_id=1, explain=True)).items:
        assert {"tiger", "sasrec"} <= {source.name for source in found.reasons.sources} | set(names)
    new = items[:1].with_columns(item_id=pl.lit(777, items["item_id"].dtype))
    grown = bundle.add_items(new)
    there = [name for name, other in grown.others.items() if len(other.items) == len(grown.items)]
    assert there == (names if worded else [])  # without words the others read its like
    assert len(grown.recommend([1], k=5)[0]) == 5


def test_retrievers_are_named_once_and_known(tiny):
    assert override(tiger(), {"retrievers": ""}).retrievers == ()
    assert override(tiger(), {"retrievers": "mind"}).retrievers == ("mind",)
    with pytest.raises(ConfigError, match=r"no retriever named 'eagre'.*'eager'"):
        override(tiger(), {"retrievers": "sasrec,eagre"})
    with pytest.raises(ConfigError, match=r"retrievers=mind,mind\. Each is named once"):
        override(tiger(), {"retrievers": "mind,mind"})


def test_a_budget_is_shared_by_all_that_learn():
    found = recipes.in_minutes(override(tiger(), {"retrievers": "sasrec,mind,eager"}), 17)
    shares = [getattr(found, name).train.minutes for name in ("tiger", *found.retrievers)]
    assert shares == pytest.approx([7, 1.5, 1.5, 7])
    assert recipes.in_minutes(override(tiger(), {"retrievers": ""}), 20).tiger.train.minutes == 20


@pytest.mark.parametrize("tokenizer", ["lsh", "random", "rqvae"])
def test_other_tokenizers_train_too(world_tables, tiny, tmp_path, tokenizer):
    changes = tiny | {"ids.tokenizer": tokenizer, "train.epochs": "1"}
    bundle = train(
        world_tables / "interactions.parquet", world_tables / "items.parquet", tmp_path / "o", changes=changes
    )
    found = Engine(bundle).recommend(RecommendRequest(user_id=1, k=3, explain=True)).items
    assert {"tiger", "sasrec"} <= {source.name for item in found for source in item.reasons.sources}


def test_a_catalogue_of_one_item(tiny, tmp_path):
    log = pl.DataFrame({"user_id": [1] * 4, "item_id": [5] * 4, "timestamp": [1, 2, 3, 4]})
    items = pl.DataFrame({"item_id": [5], "title": ["the only one"]})
    bundle = train(log, items, tmp_path / "out", changes=tiny)
    assert [r.item_id for r in bundle.recommend([1], 10)[0]] == [5]


def test_users_of_few_events_only_teach_and_a_log_of_them_alone_is_refused(world_tables, tiny, tmp_path):
    log = pl.DataFrame({"user_id": [1, 2, 2], "item_id": [1, 1, 2], "timestamp": [1, 1, 2]})
    with pytest.raises(DataError, match="2 users, none with three moments"):
        train(log, world_tables / "items.parquet", tmp_path / "out", changes=tiny)
    assert not (tmp_path / "out").exists()


def test_what_stands_at_out_is_not_replaced_unasked(world_tables, bundle_path, tiny, tmp_path):
    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    with pytest.raises(
        ConfigError, match=r"where a bundle stands already\. Choose another path, or pass --ov"
    ):
        train(*tables, bundle_path, changes=tiny)
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.tex").write_text("x")
    with pytest.raises(ConfigError, match="which exists and is no bundle"):
        train(*tables, mine, changes=tiny, overwrite=True)
    assert (mine / "chapter.tex").exists()


def test_an_unfinished_run_of_other_settings_is_not_mixed_in(world_tables, tiny, tmp_path):
    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    work = tmp_path / ".out.work"
    work.mkdir()
    for job in ('{"job": "another"}', ""):
        (work / "job.json").write_text(job)
        (work / "checkpoint.safetensors").write_bytes(b"x")
        with pytest.raises(ConfigError, match="an unfinished run of other data or settings"):
            train(*tables, tmp_path / "out", changes=tiny)
        assert (work / "checkpoint.safetensors").exists()
    (work / "checkpoint.safetensors").unlink()  # nothing was learned: there is nothing to lose
    train(*tables, tmp_path / "out", changes=tiny)
    assert os.listdir(tmp_path) == ["out"]


def test_one_process_trains_for_a_place(world_tables, tiny, tmp_path):
    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    work = tmp_path / ".out.work"
    work.mkdir()
    with FileLock(work / ".lock"), pytest.raises(ConfigError, match="that another process is at"):
        train(*tables, tmp_path / "out", changes=tiny)
    assert work.exists()
    train(*tables, tmp_path / "out", changes=tiny)
    assert os.listdir(tmp_path) == ["out"]


def test_what_came_to_out_meanwhile_is_not_replaced(world_tables, bundle_path, tiny, tmp_path, monkeypatch):
    tables, out = (world_tables / "interactions.parquet", world_tables / "items.parquet"), tmp_path / "out"
    real = Bundle.evaluate

    def slow(self, *given, **options):
        shutil.copytree(bundle_path, out)
        return real(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "evaluate", slow)
        with pytest.raises(ConfigError, match="where a bundle stands already"):
            train(*tables, out, changes=tiny | {"train.epochs": "3"})
    version = Bundle.load(out).version
    assert version == Bundle.load(bundle_path).version
    listener = Listener()
    train(*tables, out, changes=tiny | {"train.epochs": "3"}, overwrite=True, reporter=listener)
    assert not [task for task, _ in listener.shares if task == "training"]
    assert Bundle.load(out).version != version


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_made(world_tables, tiny, tmp_path):
    tables, listener = (world_tables / "interactions.parquet", world_tables / "items.parquet"), Listener()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Choose a place that can be written to"):
        train(*tables, tmp_path / "file" / "out", changes=tiny, reporter=listener)
    assert not any("vectors" in line for line in listener.lines)


def test_a_run_that_goes_on_has_the_vectors_it_began_with(world_tables, tiny, tmp_path, monkeypatch):
    """On another number of threads they would differ in the last bit, and checkpoints be refused."""
    tables, out = (world_tables / "interactions.parquet", world_tables / "items.parquet"), tmp_path / "out"
    changes = tiny | {"retrievers": "eager"}
    began = []

    def stopped(self, *given, **options):
        began.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "with_funnel", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(*tables, out, changes=changes)
    (first,) = began
    learned = first.tiger.history["seconds"]
    (tmp_path / ".out.work/eager/behaviour/vectors.safetensors").unlink()  # stopped while they were learned
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "_vectors", lambda *_: pytest.fail("made anew"))
        patch.setattr(recipes, "_identify", lambda *_: pytest.fail("made anew"))
        patch.setattr(recipes, "co_occurrence_vectors", lambda *_: pytest.fail("made anew"))
        bundle = train(*tables, out, changes=changes)
    np.testing.assert_array_equal(bundle.vectors, first.vectors)
    assert bundle.tiger.ids.version == first.tiger.ids.version
    assert bundle.minutes["tiger"] >= learned / 60
    assert bundle.version == train(*tables, tmp_path / "other", changes=changes).version


def test_users_of_other_names_are_another_log(world_tables, tiny, tmp_path, monkeypatch):
    log, items = pl.read_parquet(world_tables / "interactions.parquet"), world_tables / "items.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "with_funnel", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(log, items, tmp_path / "out", changes=tiny)
    with pytest.raises(ConfigError, match="an unfinished run of other data"):
        train(log.with_columns(pl.col("user_id") + 1), items, tmp_path / "out", changes=tiny)


KILLED = """
import json, sys
import torch
from tiglon.recipes import Reporter, train
torch.set_num_threads(1)
folder, out, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
class Loud(Reporter):
    def share(self, task, share, note=""):
        print(task, share, flush=True)
train(folder + "/interactions.parquet", folder + "/items.parquet", out, changes=changes, reporter=Loud())
"""


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(world_tables, tiny, tmp_path):
    changes = tiny | {"train.epochs": "12", "train.evaluations": "2", "train.checkpoint_minutes": "0.0001"}
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(world_tables), str(out), json.dumps(changes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / ".out.work" / "checkpoint.safetensors"
    deadline = time.monotonic() + 600
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not out.exists()

    tables = world_tables / "interactions.parquet", world_tables / "items.parquet"
    listener = Listener()
    resumed = train(*tables, out, changes=changes, reporter=listener)
    assert any(line.startswith("Going on with the run in ") for line in listener.lines)
    unbroken = train(*tables, tmp_path / "other", changes=changes)
    assert resumed.metrics["rows"] == unbroken.metrics["rows"]
    assert resumed.version == unbroken.version
    assert set(resumed.minutes) == {"tiger", *resumed.others}
    assert all(minutes > 0 for minutes in resumed.minutes.values())
    assert resumed.recommend([1, 2], 5) == unbroken.recommend([1, 2], 5)


def test_a_full_disk_leaves_the_old_bundle(world_tables, bundle_path, monkeypatch, tmp_path):
    bundle = Bundle.load(bundle_path)
    bundle.save(tmp_path / "out")
    before = Bundle.load(tmp_path / "out").version

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiglon.serving.bundle._flush", full)
    with pytest.raises(
        StorageError, match=r"No space left on device\. Nothing was changed there\. Free some"
    ):
        bundle.save(tmp_path / "out")
    assert Bundle.load(tmp_path / "out").version == before
    assert os.listdir(tmp_path) == ["out"]


def test_ids_config_is_checked_when_made():
    with pytest.raises(ConfigError):
        IdsConfig(tokenizer="nothing")  # type: ignore[arg-type]
