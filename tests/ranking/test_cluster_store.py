import json
import shutil

import numpy as np
import polars as pl
import pytest

from tiglon.data.events import read_interactions
from tiglon.data.features import Feature, FeatureSchema, fit
from tiglon.data.histories import HistoryStore
from tiglon.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    DataError,
    LeakageError,
    SchemaError,
)
from tiglon.ranking import cluster_store
from tiglon.ranking.cluster_store import ClusterStore
from tiglon.ranking.clusters import ClusterConfig, Groups
from tiglon.types import Items, ItemVectors

ITEMS, UNTIL = 60, 1000


def log(users: int = 12, events: int = 2500, seed: int = 0) -> pl.DataFrame:
    """Lives of very different lengths, times 0 … 1,100, and a user who comes after `UNTIL`."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": np.minimum(rng.geometric(0.2, events), users) - 1,
            "item_id": rng.integers(ITEMS, size=events),
            "timestamp": rng.integers(0, 1100, events),
            "completion": np.round(rng.random(events), 3),
            "tab": rng.integers(0, 4, events),
        }
    ).unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
    late = pl.DataFrame(
        {
            "user_id": [50] * 3,
            "item_id": [1, 2, 3],
            "timestamp": [1050, 1060, 1070],
            "completion": [0.5] * 3,
            "tab": [0] * 3,
        }
    )
    return pl.concat([frame, late])


def stored(frame: pl.DataFrame) -> HistoryStore:
    return HistoryStore.build(read_interactions(frame), ["completion", "tab"])


def vectors(seed: int = 0, encoder: str = "ranker 1") -> ItemVectors:
    return ItemVectors(np.random.default_rng(seed).normal(size=(ITEMS, 6)).astype(np.float32), encoder)


def built(histories: HistoryStore, until: int | None = UNTIL, **more) -> ClusterStore:
    options = {"groups": Groups.by_completion(), "categorical": ["tab"]} | more
    return ClusterStore.build(histories, vectors(), until=until, **options)


@pytest.fixture(scope="module")
def histories() -> HistoryStore:
    return stored(log())


@pytest.fixture(scope="module")
def store(histories) -> ClusterStore:
    return built(histories)


def assert_same(a: ClusterStore, b: ClusterStore) -> None:
    assert a.settings == b.settings
    for name in ("member", "counted"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("offsets", "item", "time"):
        np.testing.assert_array_equal(getattr(a.virtual, name), getattr(b.virtual, name))
    assert a.virtual.features.keys() == b.virtual.features.keys()
    for name, column in a.virtual.features.items():
        np.testing.assert_array_equal(column, b.virtual.features[name])


def assert_keeps_promises(store: ClusterStore) -> None:
    """Leaves partition each life up to `until`; none is large or mixes users or groups."""
    raw, leaves = store.histories, store.leaves
    first = raw.offsets[:-1]
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, store.counted, strict=True)])
    np.testing.assert_array_equal(np.sort(leaves.member), rows)
    assert (raw.time[leaves.member] < store.settings.until).all()
    assert leaves.sizes.max() <= store.settings.config.largest
    group = store.settings.groups.of(raw.features["completion"])
    owner = np.searchsorted(raw.offsets, leaves.member, side="right") - 1
    for c in range(len(leaves)):
        members = slice(leaves.offsets[c], leaves.offsets[c + 1])
        assert len(set(group[leaves.member[members]])) == 1
        assert len(set(owner[members])) == 1
        assert (np.diff(leaves.member[members]) > 0).all()


# -- virtual items -------------------------------------------------------------------------------------------


def test_leaves_partition_every_life(store):
    assert_keeps_promises(store)
    assert store.virtual.features["cluster_size"].sum() == store.counted.sum()


def test_a_leaf_becomes_a_virtual_item(store, histories):
    table, leaves, virtual = vectors().values, store.leaves, store.virtual
    for c in range(len(leaves)):
        rows = leaves.member[leaves.offsets[c] : leaves.offsets[c + 1]]
        item = histories.item[rows]
        apart = ((table[item] - table[item].mean(0)) ** 2).sum(1)
        near = rows[np.isclose(apart, apart.min(), rtol=1e-4)]
        assert virtual.item[c] in histories.item[near]
        assert virtual.features["tab"][c] in histories.features["tab"][near]
        np.testing.assert_allclose(
            virtual.features["completion"][c], histories.features["completion"][rows].mean(), rtol=1e-6
        )
        assert virtual.time[c] == histories.time[rows].sum() // len(rows)
        assert virtual.features["cluster_size"][c] == len(rows)
    assert virtual.features["tab"].dtype == histories.features["tab"].dtype


def test_leaves_come_oldest_first(store):
    for user in range(len(store)):
        assert (np.diff(store.virtual.time[slice(*store.virtual.offsets[user : user + 2])]) >= 0).all()


def test_an_unknown_item_has_the_last_vector_or_none(histories):
    item = histories.item.copy()
    item[::7] = -1
    odd = HistoryStore(
        histories.users, histories.items, histories.offsets, item, histories.time, histories.features
    )
    plain = built(odd)
    assert_keeps_promises(plain)
    assert (plain.virtual.item == -1).any()
    with_row = ItemVectors(np.concatenate([vectors().values, np.zeros((1, 6), np.float32)]), "ranker 1")
    assert_same(
        plain,
        ClusterStore.build(odd, with_row, until=UNTIL, groups=plain.settings.groups, categorical=["tab"]),
    )


def test_no_events_at_all():
    raw = stored(log()[:1])
    empty = ClusterStore.build(raw, ItemVectors(np.ones((1, 3), np.float32), "x"), until=0)
    assert len(empty.virtual.item) == 0
    assert empty.before([0, -1], 2000).lengths.tolist() == [1, 0]


# -- reads ---------------------------------------------------------------------------------------------------


def test_a_read_is_leaves_then_later_behaviours(store, histories):
    users, time = np.array([0, 3, -1, 12, 0]), np.array([1090, 1001, 1050, 1065, UNTIL])
    found = store.before(users, time)
    raw = histories.before(users, time)
    for b in range(len(users)):
        mine = slice(*found.offsets[b : b + 2])
        all_raw = raw.time[slice(*raw.offsets[b : b + 2])]
        assert found.features["cluster_size"][mine].sum() == len(all_raw)
        later = all_raw >= UNTIL
        n = later.sum()
        end = found.offsets[b + 1]
        raw_rows = np.arange(raw.offsets[b], raw.offsets[b + 1])[later]
        np.testing.assert_array_equal(found.item[end - n : end], raw.item[raw_rows])
        np.testing.assert_array_equal(found.time[end - n : end], raw.time[raw_rows])
        np.testing.assert_array_equal(found.features["tab"][end - n : end], raw.features["tab"][raw_rows])
        assert (found.features["cluster_size"][end - n : end] == 1).all()
        assert (np.diff(found.time[mine]) >= 0).all()
    assert found.lengths.tolist() == store.lengths(users, time).tolist()
    assert found.lengths[2] == 0
    np.testing.assert_array_equal(found.user, raw.user)


def test_only_the_last_entries(store):
    found = store.before([0, 12], 1100, last=5)
    whole = store.before([0, 12], 1100)
    assert found.lengths.tolist() == store.lengths([0, 12], 1100, last=5).tolist() == [5, 3]
    np.testing.assert_array_equal(found.item[:5], whole.item[: whole.offsets[1]][-5:])
    with pytest.raises(
        ConfigError, match=r"last=0\. A history holds at least one entry\. Pass None for all\."
    ):
        store.before([0], 1100, last=0)


def test_leaves_are_not_read_before_they_end(store):
    for read in (store.before, store.lengths):
        with pytest.raises(LeakageError, match=r"a request at 999 of lives that are clustered up to 1000\."):
            read([0, 1], np.array([1000, 999]))


def test_whole_lives(store):
    assert store.before([0]).features["cluster_size"].sum() == np.diff(store.histories.offsets)[0]


def test_one_behaviour_a_leaf_is_the_history(histories):
    single = built(histories, config=ClusterConfig(largest=1))
    users = np.arange(len(histories))
    found, raw = single.before(users, 1100), histories.before(users, 1100)
    np.testing.assert_array_equal(found.offsets, raw.offsets)
    np.testing.assert_array_equal(found.item, raw.item)
    np.testing.assert_array_equal(found.time, raw.time)
    assert (found.features["cluster_size"] == 1).all()


def test_the_cap_leaves_older_behaviours_out(histories):
    capped = built(histories, config=ClusterConfig(cap=100))
    sizes = np.add.reduceat(capped.virtual.features["cluster_size"], capped.virtual.offsets[:-2])
    np.testing.assert_array_equal(sizes, np.minimum(capped.counted[:-1], 100))
    assert capped.leaves.member[capped.leaves.member < histories.offsets[1]].min() == capped.counted[0] - 100


def test_codes_are_of_averages():
    frame = log()
    interactions = read_interactions(frame)
    catalogue = Items(interactions.items, pl.DataFrame({"item_id": interactions.items.raw}))
    schema = FeatureSchema([Feature("item_id", "inherent"), Feature("completion", "cross", kind="number")])
    features = fit(schema, catalogue, interactions)
    numbers = built(stored(frame))
    coded = numbers.coded(features)
    means = pl.DataFrame({"completion": numbers.virtual.features["completion"]})
    np.testing.assert_array_equal(
        coded.virtual.features["completion"], features.line_codes(means)["completion"]
    )
    found = coded.before([0, 1], 1100)
    assert set(found.features) == {"completion", "cluster_size"}
    assert features.cross_codes(found, np.array([1100, 1100])).max() > 1


# -- the job -------------------------------------------------------------------------------------------------


def test_threads_and_blocks_change_nothing(histories, store, monkeypatch):
    monkeypatch.setattr(cluster_store, "_BLOCK_EVENTS", 300)
    assert len(cluster_store._blocks(np.diff(histories.offsets))) > 3
    shares = []
    assert_same(built(histories, threads=3, report=shares.append), store)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_killed_job_goes_on(histories, store, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_store, "_BLOCK_EVENTS", 300)
    divided, real = [], cluster_store._divided

    def dies(histories, users, *rest):
        if len(divided) == 2:
            raise KeyboardInterrupt
        divided.append(users)
        return real(histories, users, *rest)

    monkeypatch.setattr(cluster_store, "_divided", dies)
    with pytest.raises(KeyboardInterrupt):
        built(histories, work=tmp_path)
    before = list(divided)

    def goes_on(histories, users, *rest):
        divided.append(users)
        return real(histories, users, *rest)

    monkeypatch.setattr(cluster_store, "_divided", goes_on)
    assert_same(built(histories, work=tmp_path), store)
    assert divided == cluster_store._blocks(store.counted)  # each once
    assert before == divided[:2]
    assert_same(built(histories, work=tmp_path), store)
    assert len(divided) == len(cluster_store._blocks(store.counted))


def test_the_work_of_another_job_is_refused(histories, tmp_path):
    built(histories, work=tmp_path)
    with pytest.raises(ConfigError, match=r"the work of another job \(config differ\).*Delete the folder"):
        built(histories, work=tmp_path, config=ClusterConfig(largest=10))
    other = log().with_columns(completion=1 - pl.col("completion"))  # as many events of the same items
    with pytest.raises(ConfigError, match=r"the work of another job \(past differ\)"):
        built(stored(other), work=tmp_path)


def test_bad_columns_and_vectors(histories):
    with pytest.raises(SchemaError, match=r"no feature 'complation'.*Did you mean 'completion'\?"):
        built(histories, groups=Groups.by_completion("complation"))
    with pytest.raises(SchemaError, match="no feature 'brand' in the histories"):
        built(histories, categorical=["brand"])
    few = ItemVectors(vectors().values[:50], "ranker 1")
    with pytest.raises(
        DataError, match=r"50 vectors for a catalogue of 60 items\..*the same catalogue version"
    ):
        ClusterStore.build(histories, few)
    sized = HistoryStore.build(
        read_interactions(log().with_columns(cluster_size=pl.lit(1))), ["cluster_size"]
    )
    with pytest.raises(SchemaError, match="a feature 'cluster_size' in the histories"):
        ClusterStore.build(sized, vectors())


# -- kept up -------------------------------------------------------------------------------------------------


def test_an_update_touches_little():
    frame = log(users=5, events=9000)
    whole = stored(frame)
    early = built(whole, until=1080)
    late, report = early.update(whole, vectors(), until=1090)
    assert_keeps_promises(late)
    assert late.settings.until == 1090
    assert report.behaviours == late.counted.sum()
    assert report.new == (late.counted - early.counted).sum() > 50
    assert report.moved < 2 * report.new
    assert report.changed <= 2 * report.new
    assert f"{report.new:,} new behaviours" in str(report)

    # The leaves that are not reported are as they were.
    def content(store):
        leaves = store.leaves
        return {
            tuple(leaves.member[a:b]) for a, b in zip(leaves.offsets[:-1], leaves.offsets[1:], strict=True)
        }

    old, new = content(early), content(late)
    assert report.leaves == len(new)
    assert len(new - old) <= report.changed <= len(new - old) + len(old - new)


def test_an_update_without_news_changes_nothing(store, histories):
    again, report = store.update(histories, vectors(), until=UNTIL)
    assert_same(again, store)
    assert (report.new, report.changed, report.moved) == (0, 0, 0)


def test_an_update_by_threads_is_the_same(store, histories):
    one, two = (store.update(histories, vectors(), until=1100, threads=t)[0] for t in (1, 2))
    assert_same(one, two)
    assert_keeps_promises(one)
    assert one.counted[12] == 3  # the user who came later


def test_a_log_that_grew(store):
    """New users and items shift every dense id; the leaves stay with their raw ids."""
    more = pl.DataFrame(
        {
            "user_id": [-5, -5, 0],
            "item_id": [-7, 3, -7],
            "timestamp": [1010, 1020, 1030],
            "completion": [1.0] * 3,
            "tab": [1] * 3,
        }
    )
    grown = stored(pl.concat([log(), more]))
    table = np.zeros((ITEMS + 1, 6), np.float32)
    table[1:] = vectors().values
    table[0] = 0.3
    grown_vectors = ItemVectors(table, "ranker 1")
    moved = store.onto(grown)
    moved.require(grown_vectors)
    assert_keeps_promises(moved)
    np.testing.assert_array_equal(
        moved.before([1], 1100).time[: store.lengths([0], UNTIL)[0]], store.before([0], UNTIL).time
    )
    assert moved.before([1], UNTIL).item.tolist() == (store.before([0], UNTIL).item + 1).tolist()
    later, report = store.update(grown, grown_vectors)
    assert_keeps_promises(later)
    assert later.counted[0] == 2
    assert report.behaviours == len(grown.item)


def test_the_past_may_not_change(store):
    late = pl.concat(
        [
            log(),
            log()[:1].with_columns(
                item_id=pl.lit(1, pl.Int64), timestamp=pl.lit(500, pl.Int64), tab=pl.lit(0, pl.Int64)
            ),
        ]
    )
    with pytest.raises(
        DataError, match=r"1 users whose behaviours before 1000 are not those .* Cluster anew\."
    ):
        store.onto(stored(late))
    with pytest.raises(DataError, match="users whose behaviours before 1000"):
        store.onto(stored(log().filter(pl.col("user_id") != 3)))
    for column in ("item_id", "completion"):
        first = pl.int_range(pl.len()) == 0
        swapped = log().with_columns(
            pl.when(first).then(pl.col(column).max()).otherwise(column).alias(column)
        )
        with pytest.raises(DataError, match="some users whose behaviours before 1000"):
            store.onto(stored(swapped))


def test_codes_are_not_updated(store):
    interactions = read_interactions(log())
    catalogue = Items(interactions.items, pl.DataFrame({"item_id": interactions.items.raw}))
    schema = FeatureSchema([Feature("item_id", "inherent"), Feature("completion", "cross", kind="number")])
    coded = store.coded(fit(schema, catalogue, interactions))
    with pytest.raises(ConfigError, match=r"clusters whose features are codes.*store\.coded\(features\)"):
        coded.update(coded.histories, vectors())


def test_the_features_may_not_change(store):
    bare = HistoryStore.build(read_interactions(log()), ["tab"])
    with pytest.raises(
        SchemaError, match=r"histories with the features tab\. These leaves were made of comp"
    ):
        store.update(bare, vectors())


def test_an_update_goes_forward_with_the_same_vectors(store, histories):
    with pytest.raises(
        ConfigError, match=r"an update up to 900 of clusters up to 1000\. An update goes forward"
    ):
        store.update(histories, vectors(), until=900)
    for other in (vectors(seed=1), vectors(encoder="ranker 2")):
        with pytest.raises(
            ConfigError, match=r"clusters made with other vectors: ranker 1 \w{16}, not .*Cluster anew"
        ):
            store.update(histories, other)


# -- files ---------------------------------------------------------------------------------------------------


def test_saved_and_mapped(store, histories, tmp_path):
    store.save(tmp_path / "clusters")
    loaded = ClusterStore.load(
        tmp_path / "clusters", histories, vectors(), store.settings.groups, ClusterConfig()
    )
    assert_same(loaded, store)
    assert isinstance(loaded.member.base, np.memmap)
    found, expected = (s.before([0, 3], 1100) for s in (loaded, store))
    np.testing.assert_array_equal(found.item, expected.item)


def test_other_versions_are_refused(store, histories, tmp_path):
    store.save(tmp_path / "clusters")
    for given, name in [
        ((vectors(1),), "vectors"),
        ((None, Groups()), "groups"),
        ((None, None, ClusterConfig(largest=10)), "settings"),
    ]:
        with pytest.raises(ConfigError, match=f"clusters made with other {name}: .* Cluster anew"):
            ClusterStore.load(tmp_path / "clusters", histories, *given)


@pytest.mark.parametrize(
    "file", ["clusters.json", "member.npy", "counted.npy", "virtual/time.npy", "virtual"]
)
def test_damage(store, histories, tmp_path, file):
    store.save(tmp_path / "clusters")
    path = tmp_path / "clusters" / file
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleDamagedError, match=r"clusters in .* cannot be read: .* Cluster anew\."):
        ClusterStore.load(tmp_path / "clusters", histories)


def test_members_of_other_leaves_are_damage(store, histories, tmp_path):
    store.save(tmp_path / "clusters")
    np.save(tmp_path / "clusters" / "member.npy", store.member[:-1])
    with pytest.raises(BundleDamagedError, match="behaviours with"):
        ClusterStore.load(tmp_path / "clusters", histories)


def test_a_newer_format(store, histories, tmp_path):
    store.save(tmp_path / "clusters")
    path = tmp_path / "clusters" / "clusters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(BundleVersionError, match=r"clusters of format 99 in .* Update Tiglon\."):
        ClusterStore.load(tmp_path / "clusters", histories)
