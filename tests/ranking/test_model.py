import dataclasses
import itertools
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.features import Feature, FeatureSchema, fit
from tiglon.data.ranking import BasketConfig, next_basket
from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError, LeakageError
from tiglon.evaluation.ranking import gauc
from tiglon.ranking.clusters import ClusterConfig, Groups
from tiglon.ranking.model import LifelongConfig, LifelongRanker, category_of, measure_task, occurrences
from tiglon.ranking.ranker import RankerConfig
from tiglon.ranking.units import UNITS, UnitConfig
from tiglon.train.loop import TrainConfig
from tiglon.train.multitask import DWA, PCGrad
from tiglon.types import Vocabulary

SCHEMA = FeatureSchema(
    [
        Feature("item_id", "inherent", width=8),
        Feature("group", "inherent", width=4),
        Feature("gap", "cross", "number"),
        Feature("amount", "cross", "number"),
        Feature("hour", "context"),
    ]
)
CONFIG = LifelongConfig(
    short="none",
    unit=UnitConfig(heads=2, head_width=8, width=8),
    network=RankerConfig(hidden=(32,)),
    train=TrainConfig(epochs=5, lr=6e-2, bfloat16=False, evaluations=2, average=0.9, weight_decay=0.0),
)
GROUPS, EACH = 4, 5


def world():
    """Each user keeps to one of four groups of five items; user "u0" has one event only."""
    rng = np.random.default_rng(0)
    rows = [("u0", "g0i0", 5, 1.0, 0)]
    for user in range(1, 41):
        rows += [
            (f"u{user}", f"g{user % GROUPS}i{rng.integers(EACH)}", 10 * n + user % 3, float(rng.integers(4)), n % 24)
            for n in range(int(rng.integers(8, 30)))
        ]  # fmt: skip
    log = pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "amount", "hour"], orient="row")
    items = pl.DataFrame(
        {
            "item_id": [f"g{g}i{i}" for g in range(GROUPS) for i in range(EACH)],
            "group": [f"group {g}" for g in range(GROUPS) for _ in range(EACH)],
        }
    )
    return log, items


@pytest.fixture(scope="module")
def task():
    log, items, _ = align(
        *(read(table) for read, table in zip((read_interactions, read_items), world(), strict=True))
    )
    features = fit(SCHEMA, items, log)
    counts = np.bincount(log.item, minlength=len(items))
    config = BasketConfig(first=2, negatives=6, power=0.0, day=1)
    return next_basket(log, features, counts, config=config, tasks=("next_basket", "within_30_days"))


@pytest.fixture(scope="module")
def ranker(task):
    last = np.append(task.user[1:] != task.user[:-1], True)
    return LifelongRanker.of(task, CONFIG).fit(task.select(~last), task.select(last))


# -- learning ------------------------------------------------------------------------------------------------


def test_it_learns_what_a_user_keeps_to(ranker, task):
    found = ranker.evaluate(task)
    assert [e.task for e in found] == ["next_basket", "within_30_days"]
    untrained = LifelongRanker.of(task, CONFIG).evaluate(task)[0].metrics["gauc"]
    assert found[0].metrics["gauc"] > 0.85 > untrained
    assert ranker.history["best"] > 0.8


def test_the_same_seed_gives_the_same_weights(ranker, task):
    few = task.select(np.arange(60))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=1))
    a, b = (LifelongRanker.of(few, config).fit(few, few) for _ in range(2))
    assert a.version == b.version != ranker.version


def test_a_killed_run_goes_on(task, tmp_path):
    few = task.select(np.arange(80))
    whole = LifelongRanker.of(few, CONFIG).fit(few)

    def kill(progress):
        raise KeyboardInterrupt  # at the first report, the last step's where training is that fast

    config = dataclasses.replace(CONFIG.train, checkpoint_minutes=0.0)
    resumed = dataclasses.replace(CONFIG, train=config)
    with pytest.raises(KeyboardInterrupt):
        LifelongRanker.of(few, resumed).fit(few, directory=tmp_path, report=kill)
    again = LifelongRanker.of(few, resumed).fit(few, directory=tmp_path)
    assert again.version == whole.version


def test_a_method_by_its_name_is_that_method(task, tmp_path):
    few = task.select(np.arange(60))
    short = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=1))
    named = LifelongRanker.of(few, dataclasses.replace(short, method="pcgrad")).fit(few, few)
    given = LifelongRanker.of(few, short).fit(few, few, method=PCGrad(few.tasks))
    assert named.version == given.version != LifelongRanker.of(few, short).fit(few, few).version
    named.save(tmp_path / "ranker")
    assert LifelongRanker.load(tmp_path / "ranker").config == named.config
    both = LifelongRanker.of(few, dataclasses.replace(short, method="pcgrad"))
    period = len(few.batches(short.requests))
    assert (
        both.fit(few, few, method=DWA(few.tasks, period)).version != named.version
    )  # what is given goes first


def test_a_task_of_other_labels_is_refused(ranker, task):
    other = dataclasses.replace(task, label=task.label[:, :1], tasks=("next_basket",))
    with pytest.raises(
        DataError, match=r"a task with the labels next_basket\. This ranker has a head for next"
    ):
        ranker.fit(other)
    with pytest.raises(DataError, match="labels next_basket"):
        ranker.evaluate(other)


def test_a_checkpoint_of_other_labels_or_lives_is_not_gone_on_with(task, tmp_path):
    few = task.select(np.arange(60))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=1))
    LifelongRanker.of(few, config).fit(few, directory=tmp_path)
    lives = few.store
    for other in (
        dataclasses.replace(few, label=1 - few.label),
        dataclasses.replace(few, tasks=("a", "b")),
        dataclasses.replace(few, time=few.time + 1),
        dataclasses.replace(few, store=dataclasses.replace(lives, item=lives.item[::-1].copy())),
    ):
        with pytest.raises(ConfigError, match="a checkpoint of another training"):
            LifelongRanker.of(other, config).fit(other, directory=tmp_path)
    with pytest.raises(ConfigError, match="a checkpoint of another training"):
        LifelongRanker.of(few, config).fit(few, task.select(np.arange(60, 90)), directory=tmp_path)


def test_requests_without_a_label_teach_nothing(task):
    """They are left out, be they alone in a batch or not."""
    few = task.select(np.arange(60))
    known = np.arange(0, 60, 5)
    label = np.full_like(few.label, np.nan)
    at = np.isin(few.owner, known)
    label[at] = few.label[at]
    config = dataclasses.replace(
        CONFIG, requests=1, train=dataclasses.replace(CONFIG.train, epochs=1, evaluations=1)
    )
    sparse = dataclasses.replace(few, label=label)
    versions = [LifelongRanker.of(t, config).fit(t).version for t in (sparse, sparse.select(known))]
    assert versions[0] == versions[1]


def test_a_task_of_other_features_is_refused(ranker, task):
    features = dataclasses.replace(task.features, item_codes=np.roll(task.features.item_codes, 1, axis=0))
    with pytest.raises(DataError, match="a task of other items or features than the ranker's"):
        ranker.evaluate(dataclasses.replace(task, features=features))


# -- scores --------------------------------------------------------------------------------------------------


def test_scores_come_in_the_order_of_the_task_whatever_the_batches(ranker, task):
    score = ranker.score(task)
    assert score.shape == (len(task.item), 2)
    for requests in (5, 64):
        other = LifelongRanker.of(task, dataclasses.replace(CONFIG, requests=requests))
        other.network.load_state_dict(ranker.network.state_dict())
        np.testing.assert_allclose(other.score(task), score, atol=1e-5)
    rows = np.random.default_rng(0).permutation(len(task))[:20]
    some = task.select(rows)
    expected = np.concatenate([score[task.offsets[r] : task.offsets[r + 1]] for r in rows])
    np.testing.assert_allclose(ranker.score(some), expected, atol=1e-5)


def test_evaluation_is_that_of_the_formulas(ranker, task):
    found = ranker.evaluate(task, "mine")[0]
    score, owner = ranker.score(task)[:, 0], task.owner
    assert found.metrics["gauc"] == pytest.approx(gauc(score, task.label[:, 0], task.user[owner]))
    assert found.metrics["gauc/request"] == pytest.approx(gauc(score, task.label[:, 0], owner))
    assert found.name == "mine"
    short = task.lengths[owner] <= 50
    assert short.all()
    assert found.metrics["gauc[0–50]"] == pytest.approx(found.metrics["gauc"])


def test_one_score_may_stand_for_all_labels(task):
    found = measure_task("chance", task, np.zeros((len(task.item), 1)), probability=False)
    assert [e.metrics["gauc"] for e in found] == [0.5, 0.5]


# -- raw ids -------------------------------------------------------------------------------------------------


def test_predict_at_a_time_is_the_score_of_the_task(ranker, task):
    rows = np.array([3, 50, 9])
    some = task.select(rows)
    users = some.store.users.decode(some.user)
    lists = [
        some.store.items.decode(some.item[a:b]) for a, b in zip(some.offsets, some.offsets[1:], strict=False)
    ]
    context = pl.DataFrame({"hour": [str(code - 1) for code in range(3)]})
    found = ranker.predict(users, lists, some.time.tolist(), context=context)
    expected = dataclasses.replace(some, profile=ranker.features.profile_codes(some.user, context))
    np.testing.assert_allclose(np.concatenate(found), ranker.score(expected)[:, 0], atol=1e-6)
    assert [len(f) for f in found] == np.diff(some.offsets).tolist()
    second = ranker.predict(users, lists, some.time.tolist(), context=context, task="within_30_days")
    np.testing.assert_allclose(np.concatenate(second), ranker.score(expected)[:, 1], atol=1e-6)


def test_now_is_after_everything_that_is_stored(ranker):
    newest = int(ranker.histories.time.max())
    now = ranker.predict(["u7"], [["g3i0", "g1i1"]])
    np.testing.assert_array_equal(now, ranker.predict(["u7"], [["g3i0", "g1i1"]], newest + 1))
    early = ranker.predict(["u7"], [["g3i0", "g1i1"]], 30)
    assert not np.array_equal(now, early)


def test_predict_prefers_what_the_user_keeps_to(ranker):
    own, other = ranker.predict(["u9"], [["g1i0", "g2i0"]])[0]
    assert own > 2 * other


def test_the_unknown_get_a_probability(ranker):
    """Nobody and nothing of these ids was seen; an unknown candidate is known by nothing."""
    found = ranker.predict(["nobody", "u3", 17], [["g1i0", "no item"], ["no item", "neither", 3], []])
    assert [len(f) for f in found] == [2, 3, 0]
    assert all(((f > 0) & (f < 1)).all() for f in found)
    assert found[1][0] == found[1][1] == found[1][2]
    again = ranker.predict(["somebody"], [["g1i0", "no item"]])[0]
    np.testing.assert_allclose(again, found[0], atol=1e-7)


def test_nothing_asked_nothing_answered(ranker):
    assert ranker.predict([], []) == []
    assert ranker.predict(["u1"], [[]])[0].shape == (0,)


def test_a_user_alone_gets_the_scores_of_a_crowd(ranker):
    users = [f"u{u}" for u in range(12)]
    crowd = ranker.predict(users, [["g0i0", "g1i1", "g2i2"]] * 12)
    for user, found in zip(users, crowd, strict=True):
        np.testing.assert_allclose(ranker.predict([user], [["g0i0", "g1i1", "g2i2"]])[0], found, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.predict(["u1"], []), DataError, "0 lists of candidates for 1 users. One list a user."),
        (lambda r: r.predict(["u1"], ["g0i0"]), DataError, "a string in the place of a list of candidates. One"),
        (lambda r: r.predict(["u1"], [["g0i0"]], [1, 2]), DataError, "(2,) times for 1 users. One time"),
        (lambda r: r.predict(["u1"], [["g0i0"]], task="next_busket"), ConfigError, "no task 'next_busket'. Did you mean 'next_b"),
        (
            lambda r: r.predict(["u1"], [["g0i0"]], context=pl.DataFrame({"hour": [1, 2]})),
            DataError,
            "2 lines of context for 1 users.",
        ),
    ],
)  # fmt: skip
def test_bad_questions(ranker, call, error, message):
    with pytest.raises(error) as found:
        call(ranker)
    assert str(found.value).startswith(message)


# -- why -----------------------------------------------------------------------------------------------------


def test_explain_names_the_users_own_behaviours_by_weight(ranker):
    found = ranker.explain("u9", "g1i0", k=4)
    store = ranker.histories
    life = store.before(store.users.encode(["u9"]))
    real = set(zip(store.items.decode(life.item), life.time.tolist(), strict=True))
    assert len(found) == 4
    assert all((a.item_id, a.time) in real for a in found)
    weights = [a.weight for a in found]
    assert weights == sorted(weights, reverse=True)
    every = ranker.explain("u9", "g1i0", k=1000)
    assert len(every) == len(life.item)
    assert sum(a.weight for a in every) == pytest.approx(1.0, abs=1e-5)
    assert ranker.explain("u9", "g1i0", time=0) == []
    assert ranker.explain("nobody", "g1i0") == []


def test_the_short_unit_explains_where_there_is_no_long_one(task):
    config = dataclasses.replace(
        CONFIG, long="none", short="full_attention", network=RankerConfig(recent=3, hidden=(8,))
    )
    ranker = LifelongRanker.of(task, config)
    store = task.store
    life = store.before(store.users.encode(["u9"]))
    assert sorted(a.time for a in ranker.explain("u9", "g1i0")) == life.time[-3:].tolist()
    assert ranker.name == "recent 3"


def test_a_unit_that_pools_explains_nothing(task):
    ranker = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="mean_pooling"))
    with pytest.raises(ConfigError, match="'mean_pooling' does not say which behaviours it attends to"):
        ranker.explain("u9", "g1i0")


# -- settings ------------------------------------------------------------------------------------------------


def test_category_of_the_hard_search(task):
    log, items = world()
    items = items.with_columns(price=pl.int_range(pl.len()).cast(pl.Float64))
    schema = FeatureSchema([*SCHEMA.features, Feature("price", "inherent", "number", buckets=12)])
    log, items, _ = align(read_interactions(log), read_items(items))
    assert category_of(fit(schema, items, log), None) == 1  # a bucket of prices is no category
    assert category_of(task.features, None) == 1
    assert category_of(task.features, "item_id") == 0
    with pytest.raises(ConfigError, match=r"no inherent feature 'gruop'\. Did you mean 'group'\?"):
        category_of(task.features, "gruop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long": "twni"}, "no interest unit named 'twni'."),
        (
            {"short": "all_attention"},
            "no interest unit named 'all_attention'. Did you mean 'full_attention'?",
        ),
        ({"requests": 0}, "requests=0. requests is at least 1."),
        ({"longest": 0}, "longest=0. At least one behaviour is read. Pass None for all."),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError) as error:
        LifelongConfig(**settings)
    assert str(error.value).startswith(message)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(ranker, task, tmp_path_factory):
    path = tmp_path_factory.mktemp("rankers") / "mine"
    ranker.save(path, {"test": task.select(np.arange(30))})
    return path


def test_what_was_saved_answers_the_same(ranker, task, folder):
    again = LifelongRanker.load(folder)
    np.testing.assert_array_equal(again.score(task), ranker.score(task))
    assert again.version == ranker.version
    assert again.config == ranker.config
    assert again.tasks == ranker.tasks
    assert again.history == ranker.history
    users, lists = ["u3", "nobody"], [["g1i0"], ["g2i2"]]
    np.testing.assert_array_equal(again.predict(users, lists), ranker.predict(users, lists))
    kept, expected = again.requests(folder, "test"), task.select(np.arange(30))
    np.testing.assert_array_equal(again.score(kept), ranker.score(expected))
    np.testing.assert_array_equal(kept.label, expected.label)
    assert again.evaluate(kept)[0].metrics == ranker.evaluate(expected)[0].metrics
    with pytest.raises(ConfigError, match="no requests named 'validation'"):
        again.requests(folder, "validation")


def test_nothing_in_the_folder_is_a_pickle(folder):
    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".npy", ".parquet"}


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["ranker.json", "network.safetensors", "features", "histories"])
def test_a_missing_part_is_named(copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        LifelongRanker.load(copy)


def test_one_flipped_bit_of_the_weights_is_noticed(copy):
    path = copy / "network.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleDamagedError, match="were saved"):
        LifelongRanker.load(copy)


def test_a_newer_format_is_refused(copy):
    about = json.loads((copy / "ranker.json").read_text())
    (copy / "ranker.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BundleVersionError, match="a ranker of format 99"):
        LifelongRanker.load(copy)


@pytest.mark.parametrize(
    ("unit", "setting", "of"),
    [
        ("din", {"l2": 0.5}, lambda unit: unit.l2),
        ("eta", {"bits": 3}, lambda unit: len(unit.hyperplanes)),
        ("mimn", {"slots": 2}, lambda unit: len(unit.start)),
    ],
)
def test_settings_of_one_unit_reach_it(task, unit, setting, of):
    changed = dataclasses.replace(CONFIG.unit, **setting)
    ranker = LifelongRanker.of(task, dataclasses.replace(CONFIG, long=unit, unit=changed))
    assert [of(ranker.network.long)] == list(setting.values())


@pytest.mark.parametrize("longest", [None, 3])
def test_din_divides_its_l2_by_how_often_the_samples_hold_an_item(task, longest):
    expected = np.zeros(len(task.store.items) + 1, np.int64)
    for batch in task.batches(8, last=longest):
        for item in (batch.item[~batch.label[..., 0].isnan()], batch.past.item[batch.past.mask]):
            np.add.at(expected, item.numpy(), 1)
    assert occurrences(task, longest).tolist() == expected.tolist()
    unit = dataclasses.replace(CONFIG.unit, l2=0.1)
    one = dataclasses.replace(CONFIG.train, epochs=1, evaluations=1)
    config = dataclasses.replace(CONFIG, long="din", unit=unit, longest=longest, train=one)
    ranker = LifelongRanker.of(task, config).fit(task)
    f = [feature.name for feature in task.features.schema.of("inherent")].index("item_id")
    count = torch.zeros_like(ranker.network.long.counts[f])
    count.index_add_(0, ranker.network.embed.item_codes[:, f], torch.from_numpy(expected).float())
    assert torch.equal(ranker.network.long.counts[f], count)


# -- what it reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_at_or_after_a_request_is_read(task, unit):
    ranker = LifelongRanker.of(task, dataclasses.replace(CONFIG, long=unit))
    users, candidates = ["u1", "u7", "u9"], [["g1i0", "g2i3"]] * 3
    found = ranker.predict(users, candidates, time=61)
    log, _, _ = align(
        *(read(table) for read, table in zip((read_interactions, read_items), world(), strict=True))
    )
    ranker.histories = task.features.store(log.take(log.time < 61))
    np.testing.assert_array_equal(
        np.concatenate(ranker.predict(users, candidates, time=61)), np.concatenate(found)
    )
    assert (log.time == 61).any()


@pytest.mark.parametrize("unit", ["twin", "twin_v2", "dare", "sim_soft", "eta"])
def test_stored_tables_change_no_answer_and_training_forgets_them(task, unit):
    ranker = LifelongRanker.of(task, dataclasses.replace(CONFIG, long=unit))
    live = ranker.score(task)
    np.testing.assert_allclose(ranker.refresh().score(task), live, atol=1e-6)
    train = dataclasses.replace(CONFIG.train, epochs=1)
    ranker.config = dataclasses.replace(ranker.config, train=train)
    found = ranker.fit(task).score(task)
    assert not np.allclose(found, live)
    np.testing.assert_allclose(ranker.refresh().score(task), found, atol=1e-6)


# -- clustered lives ---------------------------------------------------------------------------------------


def test_clusters_of_one_behaviour_answer_as_the_whole_lives(task, ranker):
    """With leaves of size 1 nothing is averaged, and ln n = 0."""
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    candidates = [["g1i0", "g2i3"], ["g0i0", "g3i1"]]
    whole = v2.predict(["u1", "u7"], candidates)
    store = v2.cluster(config=ClusterConfig(largest=1))
    assert store.virtual.features["cluster_size"].max() == 1
    np.testing.assert_allclose(v2.predict(["u1", "u7"], candidates), whole, atol=1e-6)


def test_groups_and_averages_are_of_numbers(task):
    """Of the middle of the bucket that stands in the histories, which is all that a ranker keeps of a number."""
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    coder, code = task.features.coders["amount"], v2.histories.features["amount"]
    np.testing.assert_array_equal(coder.of(coder.values), np.arange(coder.size))
    store = v2.cluster(groups=Groups("amount", (1.5,)))
    kept, leaves = store.virtual.features, store.leaves
    assert set(kept["cluster_group"]) == {0, 1}
    for c in range(len(leaves)):
        members = coder.values[code[leaves.member[leaves.offsets[c] : leaves.offsets[c + 1]]]]
        assert ((members >= 1.5) == kept["cluster_group"][c]).all()
        assert kept["amount"][c] == coder.of(np.array([members.mean()]))[0]
    assert store.virtual.features["amount"].dtype == code.dtype


def test_lives_are_clustered_by_what_the_search_compares(task):
    """Items have a side, which their keys tell, and something larger, which keys leave out."""
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    with torch.no_grad():
        v2.network.long.attention.key.weight[:, 1:] = 0
        side = v2.network.embed.items[0].weight[:, 0]
        side.copy_(torch.arange(len(side)) % 2)
        v2.network.embed.items[0].weight[:, 1:] *= 100
    codes = task.features.item_codes[:, 0]

    def purity(store):
        items, leaves = v2.histories.item, store.leaves
        sides = [codes[items[leaves.member[a:b]]] % 2 for a, b in itertools.pairwise(leaves.offsets)]
        return np.mean([len(set(side)) == 1 for side in sides if len(side) > 1])

    by_keys = v2.cluster(by_keys=True, config=ClusterConfig(largest=4))
    assert by_keys.settings.vectors.startswith(f"ranker {v2.version} keys ")
    assert purity(by_keys) == 1
    assert purity(v2.cluster(config=ClusterConfig(largest=4))) < 1
    with pytest.raises(ConfigError, match="clustered lives for 'mean_pooling'"):
        LifelongRanker.of(task, dataclasses.replace(CONFIG, long="mean_pooling")).cluster()


def test_clustered_lives_are_saved_and_explained(task, tmp_path):
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    store = v2.cluster()
    assert len(store.virtual.item) < len(v2.histories.item)
    expected = v2.predict(["u1"], [["g1i0", "g2i3"]])
    v2.save(tmp_path / "ranker")
    again = LifelongRanker.load(tmp_path / "ranker")
    assert again.clusters is not None
    np.testing.assert_array_equal(again.predict(["u1"], [["g1i0", "g2i3"]]), expected)
    found = again.explain("u1", "g1i0", k=3)
    assert 1 <= len(found) <= 3
    assert all(behaviour.item_id.startswith("g1") for behaviour in found)


def test_the_activity_of_a_clustered_life_is_that_of_the_life():
    """However few of its entries are read, and however many behaviours a cap left out."""
    log, items, _ = align(
        *(read(table) for read, table in zip((read_interactions, read_items), world(), strict=True))
    )
    features = fit(FeatureSchema([*SCHEMA.features, Feature("activity", "context", "number")]), items, log)
    counts = np.bincount(log.item, minlength=len(items))
    asked = next_basket(log, features, counts, config=BasketConfig(first=2, negatives=6, day=1))
    v2 = LifelongRanker.of(asked, dataclasses.replace(CONFIG, long="twin_v2", longest=5))
    users, candidates = [f"u{i}" for i in range(1, 41)], [["g1i0"]] * 40

    def profile():
        return np.concatenate([b.profile for b in v2.asked(users, candidates).batches(7, last=5)])

    whole = profile()
    assert len(np.unique(whole[:, -1])) > 3
    for config in (ClusterConfig(largest=2), ClusterConfig(largest=2, cap=4)):
        v2.cluster(config=config)
        np.testing.assert_array_equal(profile(), whole)


def test_longer_histories_take_the_clusters_with_them(task):
    """A new user who stands between two old ones gives the later ones other dense numbers."""
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    v2.cluster()
    users, candidates = [f"u{i}" for i in range(1, 41)], [["g1i0", "g2i3"]] * 40
    expected = v2.predict(users, candidates)
    table, items = world()
    now = int(v2.histories.time.max()) + 1
    more = pl.DataFrame([("u10b", "g0i0", now, 1.0, 0)], table.columns, orient="row")
    log, _, _ = align(read_interactions(pl.concat([table, more])), read_items(items))
    v2.histories = task.features.store(log)
    assert v2.histories.users != task.store.users
    np.testing.assert_allclose(v2.predict(users, candidates, now), expected, atol=1e-6)


def test_histories_of_other_items_are_refused(task):
    ranker = LifelongRanker.of(task, CONFIG)
    kept = ranker.histories
    other = dataclasses.replace(kept, items=Vocabulary([f"x{i}" for i in range(len(kept.items))]))
    with pytest.raises(DataError, match="a log of other items than the features know"):
        ranker.histories = other
    with pytest.raises(DataError, match="a log of other items than the features know"):
        LifelongRanker(task.features, other, task.tasks, CONFIG)
    assert ranker.histories is kept


def test_a_label_may_be_named_item(task, tmp_path):
    named = dataclasses.replace(task, tasks=("item", "item_"))
    ranker = LifelongRanker.of(named, CONFIG)
    ranker.save(tmp_path / "ranker", {"test": named})
    again = LifelongRanker.load(tmp_path / "ranker").requests(tmp_path / "ranker", "test")
    np.testing.assert_array_equal(again.item, named.item)
    np.testing.assert_array_equal(again.label, named.label)


def test_a_clustered_life_is_not_read_before_it_ends(task):
    v2 = LifelongRanker.of(task, dataclasses.replace(CONFIG, long="twin_v2"))
    v2.cluster()
    with pytest.raises(LeakageError, match="clustered up to"):
        v2.predict(["u1"], [["g1i0"]], time=10)


# -- crossing layers and gates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["pepnet", "m2m", "apg"])
def test_crosses_and_gates_are_named_and_kept(task, tmp_path, gate):
    config = dataclasses.replace(CONFIG, cross="dcn_v2", gate=gate, gate_by=("hour",))
    ranker = LifelongRanker.of(task, config)
    ranker.save(tmp_path / "ranker")
    loaded = LifelongRanker.load(tmp_path / "ranker")
    assert loaded.config == config
    assert np.array_equal(loaded.score(task), ranker.score(task))


def test_rankers_from_before_crosses_and_gates_still_load(ranker, task, tmp_path):
    ranker.save(tmp_path / "ranker")
    file = tmp_path / "ranker" / "ranker.json"
    about = json.loads(file.read_text())
    for name in ("cross", "gate", "gate_by", "method", "tasks"):
        del about["config"][name]
    del about["config"]["network"]["field_width"]
    file.write_text(json.dumps(about))
    assert np.array_equal(LifelongRanker.load(tmp_path / "ranker").score(task), ranker.score(task))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"cross": "dcn2"}, r"no crossing layer named 'dcn2'\. Did you mean 'dcn'\?"),
        ({"method": "pcgard"}, r"no multi-task method named 'pcgard'\. Did you mean 'pcgrad'\?"),
        ({"gate": "possum"}, r"no gate named 'possum'\. Did you mean 'poso'\?"),
        ({"gate": "poso", "gate_by": ("hours",)}, r"a gate by 'hours'.*Did you mean 'hour'\?"),
        ({"gate": "poso"}, r"It reads at least one, and there are 1\. Give the schema a user or context"),
    ],
)
def test_what_cannot_be_crossed_or_gated(task, settings, words):
    with pytest.raises(ConfigError, match=words):
        LifelongRanker.of(task, dataclasses.replace(CONFIG, **settings))
