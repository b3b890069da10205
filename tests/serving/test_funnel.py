"""Merging and learning, on lists whose right order is known."""

import json

import numpy as np
import pytest

from tiglon.errors import BundleDamagedError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.retrieval.neighbours import Popularity
from tiglon.retrieval.retriever import Retriever
from tiglon.retrieval.topk import top_items
from tiglon.serving import funnel as funnels
from tiglon.serving.bundle import Bundle
from tiglon.serving.funnel import Funnel, FunnelConfig, Fusion, Lists, features, gather, learn
from tiglon.types import MISSING, Candidates, Histories, Targets, Vocabulary

SMALL = FunnelConfig(candidates=3, dense=3, generated=3)


class Listed(Retriever):
    """Finds what it is told to."""

    def __init__(self, name, item, score, n_items=10):
        self.name, self.items = name, Vocabulary(list(range(n_items)))
        self.found = Candidates(np.array(item), np.array(score, np.float32), name)

    def retrieve(self, histories, k, *, exclude_seen=True, deny=None):
        item = self.found.item
        denied = np.zeros(item.shape, bool) if deny is None else deny[item]
        item, order = np.where(denied, MISSING, item), np.argsort(denied, axis=1, kind="stable")[:, :k]
        score = np.take_along_axis(np.where(denied, -np.inf, self.found.score), order, axis=1)
        return Candidates(np.take_along_axis(item, order, axis=1), score, self.name)


class Told(Retriever):
    """Scores items by a table that knows each user's number: the first item of the history."""

    def __init__(self, name, table):
        self.name, self.items, self.table = name, Vocabulary(list(range(table.shape[1]))), table

    def retrieve(self, histories, k, *, exclude_seen=True, deny=None):
        rows = self.table[histories.item[histories.offsets[:-1]]]
        return top_items(rows, k, histories if exclude_seen else None, source=self.name)


def popularity(counts):
    retriever = Popularity()
    retriever.items, retriever.counts = Vocabulary(list(range(len(counts)))), np.array(counts)
    return retriever


# -- the pool ----------------------------------------------------------------------------------------------


def test_each_item_stands_once_with_its_place_at_every_retriever():
    a = Listed("a", [[4, 2, 7], [1, MISSING, MISSING]], [[3, 2, 1], [5, -np.inf, -np.inf]])
    b = Listed("b", [[7, 4, 9], [0, 1, 2]], [[0.9, 0.5, 0.1], [3, 2, 1]])
    pool = gather([a, b], Histories.of([[0], []]), 10, SMALL)
    assert pool.names == ("a", "b")
    assert pool.offsets.tolist() == [0, 4, 7]
    assert pool.item.tolist() == [2, 4, 7, 9, 0, 1, 2]
    assert pool.rank.tolist() == [[2, 0], [1, 2], [3, 1], [0, 3], [0, 1], [1, 2], [0, 3]]
    expected = [[2, np.nan], [3, 0.5], [1, 0.9], [np.nan, 0.1], [np.nan, 3], [5, 2], [np.nan, 1]]
    assert np.array_equal(pool.score, np.array(expected, np.float32), equal_nan=True)
    second = pool.only(1)
    assert (second.offsets.tolist(), second.item.tolist()) == ([0, 3], [0, 1, 2])
    assert second.rank.tolist() == pool.rank[4:].tolist()


def test_a_catalogue_tells_the_score_of_every_candidate_whoever_found_it():
    listed = Listed("listed", [[5, 6, 8]], [[3, 2, 1]])
    pool = gather([popularity([9, 8, 7, 1, 1, 4.5, 0, 0]), listed], Histories.of([[0]]), 10, SMALL)
    assert pool.item.tolist() == [1, 2, 5, 6, 8]  # item 0 was seen
    assert pool.score[:, 0].tolist() == pytest.approx([8 / 9, 7 / 9, 0.5, 0, 0])  # 8 came later: no score
    assert pool.rank[:, 0].tolist() == [1, 2, 3, 0, 0]


def test_what_is_not_allowed_takes_no_place():
    allowed = np.ones(10, bool)
    allowed[[0, 6]] = False
    listed = Listed("listed", [[5, 6, 8]], [[3, 2, 1]])
    pool = gather(
        [popularity([9, 8, 7, 1]), listed],
        Histories.of([[1]]),
        10,
        SMALL,
        exclude_seen=False,
        allowed=allowed,
        extra=np.array([9]),
    )
    assert pool.item.tolist() == [1, 2, 3, 5, 8, 9]
    assert pool.rank.tolist() == [[1, 0], [2, 0], [3, 0], [0, 1], [0, 2], [0, 0]]


def test_who_is_not_asked_finds_nothing():
    listed, spent = Listed("listed", [[5, 6, 8]], [[3, 2, 1]]), []
    pool = gather(
        [popularity([3, 2, 1]), listed],
        Histories.of([[]]),
        10,
        SMALL,
        skip={"listed"},
        spent=lambda name, seconds: spent.append(name),
    )
    assert not pool.rank[:, 1].any()
    assert spent == ["popularity"]
    assert np.isfinite(features(pool, Histories.of([[]]), np.zeros(10))).all()


def test_each_gives_as_many_as_it_can(bundle):
    """A product with every item costs the same for any number of them; of a beam's items each costs."""
    sources, config = bundle.sources(True), FunnelConfig(candidates=5, dense=7, generated=3)
    for k, expected in ((1, (5, 7, 3)), (9, (9, 9, 3))):
        pool = gather(sources, bundle.histories.before(np.arange(2)), 40, config, k=k)
        found = dict(zip(pool.names, ((pool.rank > 0).sum(axis=0) / 2).tolist(), strict=True))
        assert tuple(found[name] for name in ("popularity", "two_tower", "tiger")) == expected
        assert found["sasrec"] == found["two_tower"]


# -- features ----------------------------------------------------------------------------------------------


def test_features_by_hand():
    listed = Listed("listed", [[4, 2, 7]], [[-1, -2, -4]])
    history = Histories(np.array([0, 4]), np.array([2, 5, 2, 4]), np.array([10, 10, 20, 30]))
    pool = gather([listed], history, 10, SMALL, exclude_seen=False, extra=np.array([9]))
    share = np.arange(10) / 10
    found = dict(
        zip(
            funnels.feature_names(["listed"]),
            features(pool, history, share.astype(np.float32)).T,
            strict=True,
        )
    )
    assert pool.item.tolist() == [2, 4, 7, 9]
    assert found["listed: score"].tolist() == [-1, 0, -3, -4]  # below the best; not found, one below the last
    assert found["listed: place"].tolist() == pytest.approx([1 / 12, 1 / 11, 1 / 13, 0])
    assert found["listed: found"].tolist() == [1, 1, 1, 0]
    assert found["popularity"].tolist() == pytest.approx([0.2, 0.4, 0.7, 0.9])
    assert found["had"].tolist() == [1, 1, 0, 0]
    assert found["times had"].tolist() == pytest.approx([np.log(3), np.log(2), 0, 0])
    assert found["share of moments"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert found["how lately"].tolist() == pytest.approx([1 / 2, 1, 0, 0])
    assert found["how long ago"].tolist() == pytest.approx([np.log(2), 0, 0, 0])
    assert found["had once"].tolist() == [0, 1, 0, 0]
    assert found["had, popular"].tolist() == pytest.approx([0.2, 0.4, 0, 0])
    weight = [np.log(0.01 + w) - np.log(0.01) for w in (0.9**2 + 0.9, 1, 0, 0)]
    assert found["weight of the past, 0.9"].tolist() == pytest.approx(weight)


# -- learning ----------------------------------------------------------------------------------------------


def world(users=400, n_items=30, seed=0):
    """A retriever that knows what is taken, in most cases; one that guesses; and the targets."""
    random = np.random.default_rng(seed)
    truth = random.integers(1, n_items, users)
    right = random.random((users, n_items))
    right[np.arange(users), truth] += 0.8 * (random.random(users) < 0.9)
    wrong = random.random((users, n_items))
    # The histories name the users, so that `Told` can look them up: user u's first item is u.
    tables = [np.pad(t, ((0, 0), (0, users))) for t in (right, wrong)]
    histories = Histories.of([[u] for u in range(users)])
    later = Histories(np.arange(users + 1), truth, np.ones(users, np.int64))
    return [Told("right", tables[0]), Told("wrong", tables[1])], Targets(np.arange(users), histories, later)


def test_the_fusion_learns_whom_to_believe():
    (right, wrong), targets = world()
    learned, fresh = targets.take(slice(0, 300)), targets.take(slice(300, 400))
    counts = np.ones(len(right.items), np.int64)
    config = FunnelConfig(generated=10)
    fusion = learn([right, wrong], counts, learned, config, exclude_seen=False)
    again = learn([right, wrong], counts, learned, config, exclude_seen=False)
    assert np.array_equal(fusion.weight, again.weight)

    def ndcg(retriever):
        return evaluate(retriever, fresh, ks=(10,), exclude_seen=False).metrics["ndcg@10"]

    untrained = ndcg(Funnel([right, wrong], counts, config=config))
    trained = ndcg(Funnel([right, wrong], counts, fusion, config))
    assert trained > 0.98 * ndcg(right) > untrained + 0.1


def test_too_few_users_teach_nothing():
    (right, wrong), targets = world(users=8)
    fusion = learn([right, wrong], np.ones(38, np.int64), targets, exclude_seen=False)
    assert np.array_equal(fusion.weight, Fusion.untrained(["right", "wrong"]).weight)


def test_weights_are_the_log_odds_of_what_is_taken():
    """Two candidates, a feature that the first has: it is taken by 80 of 100 users, so weight = ln(80 / 20)."""
    taken = np.zeros((100, 2), bool)
    taken[:80, 0] = taken[80:, 1] = True
    column = np.tile(np.array([[1.0], [0.0]], np.float32), (100, 1))
    lists = Lists(column, np.full(100, 2), taken.reshape(-1), np.ones(100, int))
    assert lists.fit(0.0) == pytest.approx([np.log(4)], rel=1e-3)
    assert abs(lists.fit(1.0)[0]) < 1
    assert lists.ndcg(np.array([1.0])) == pytest.approx(0.8 + 0.2 / np.log2(3))


def test_users_of_whom_nothing_was_found_teach_nothing():
    column = np.array([[1.0], [0.0], [0.3]], np.float32)
    some = Lists(
        np.tile(column, (2, 1)), np.array([3, 3]), np.array([1, 0, 0, 0, 1, 0], bool), np.ones(2, int)
    )
    more = Lists(
        np.tile(column, (3, 1)), np.array([3, 3, 3]), np.append(some.taken, [False] * 3), np.ones(3, int)
    )
    assert more.useful() == some.useful() == 2
    assert more.fit(0.01) == pytest.approx(some.fit(0.01))
    assert more.ndcg(np.ones(1)) == pytest.approx(some.ndcg(np.ones(1)) * 2 / 3)  # but they count


def test_targets_that_nobody_found_count_against_a_list():
    lists = Lists(np.array([[2.0], [1.0]], np.float32), np.array([2]), np.array([True, False]), np.array([3]))
    assert lists.ndcg(np.ones(1)) == pytest.approx(1 / (1 + 1 / np.log2(3) + 1 / 2))


def test_the_sum_of_neighbours_is_what_it_says_alone(bundle):
    """Its parts are not looked up twice; also for who has none, and where popularity stands in."""
    lives = bundle.histories.before([3, -1, 7])
    pool = gather(bundle.sources(True), lives, 40, bundle.funnel_config, k=40, extra=np.arange(40))
    for r, retriever in enumerate(bundle.sources(True)[:4]):
        assert np.array_equal(pool.score[:, r].reshape(3, 40), retriever.score(lives))


def test_untrained_the_places_alone_count():
    names = funnels.feature_names(["a", "b"])
    weight = dict(zip(names, Fusion.untrained(["a", "b"]).weight.tolist(), strict=True))
    assert {name for name, value in weight.items() if value} == {"a: place", "b: place"}


# -- as a retriever ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return Bundle.load(bundle_path)


def test_a_list_does_not_depend_on_who_else_is_asked(bundle):
    funnel = bundle.funnel(True)
    histories = bundle.histories.before(np.arange(20))
    together = funnel.retrieve(histories, 10)
    for b in (0, 7, 19):
        alone = funnel.retrieve(histories.take(slice(b, b + 1)), 10)
        assert np.array_equal(alone.item[0], together.item[b])
        assert np.allclose(alone.score[0], together.score[b], atol=1e-4)


def test_seen_items_are_hidden_and_the_catalogue_bounds_k(bundle):
    histories = bundle.histories.before(np.arange(5))
    found = bundle.funnel(True).retrieve(histories, 1000)
    assert found.item.shape == (5, 40)
    for own, row in zip(histories, found.item, strict=True):
        assert set(row[row != MISSING]) == set(range(40)) - set(own)
    shown = bundle.funnel(False).retrieve(histories, 1000, exclude_seen=False)
    assert all(set(row) == set(range(40)) for row in shown.item)


def test_the_test_is_not_among_what_the_fusion_reads(bundle):
    """Learned again from the training's own validation, whatever the last moments were."""
    again = bundle.with_funnel(bundle.funnel_config)
    for hidden in (True, False):
        assert np.allclose(again.fusions[hidden].weight, bundle.fusions[hidden].weight, rtol=1e-3, atol=1e-3)


def test_a_fusion_weighs_the_retrievers_that_it_learned_with():
    with pytest.raises(DataError) as error:
        Funnel([popularity([1, 2])], np.array([1, 2]), Fusion.untrained(["tiger"]))
    assert str(error.value) == (
        "a fusion of tiger for popularity. A fusion weighs the retrievers that it learned with. "
        "Learn it anew with tiglon.serving.funnel.learn."
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"candidates": 0}, "candidates=0"),
        ({"dense": 0}, "dense=0"),
        ({"generated": -1}, "generated=-1"),
        ({"users": 1}, "users=1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FunnelConfig(**options)


# -- files -------------------------------------------------------------------------------------------------


def test_weights_come_back_from_the_file_as_they_were(tmp_path):
    random = np.random.default_rng(0)
    names = ("a", "b")
    weight = random.normal(size=len(funnels.feature_names(names))).astype(np.float32)
    funnels.save({True: Fusion(names, weight)}, FunnelConfig(7, 8, 9), tmp_path / "funnel")
    fusions, config = funnels.load(tmp_path / "funnel")
    assert (list(fusions), config) == ([True], FunnelConfig(7, 8, 9))
    assert np.array_equal(fusions[True].weight, weight)


def test_an_older_funnel_asks_for_what_it_learned_with(tmp_path):
    funnels.save({}, FunnelConfig(generated=50), tmp_path / "funnel")
    file = tmp_path / "funnel" / "funnel.json"
    about = json.loads(file.read_text())
    del about["dense"]
    file.write_text(json.dumps(about))
    assert funnels.load(tmp_path / "funnel")[1].dense == 50


def test_a_newer_funnel_is_not_read(tmp_path):
    funnels.save({}, FunnelConfig(), tmp_path / "funnel")
    file = tmp_path / "funnel" / "funnel.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="a funnel of format 2; this Tiglon reads up to 1"):
        funnels.load(tmp_path / "funnel")


def test_a_bundle_without_its_weights_is_damaged(bundle_path, tmp_path):
    assert (bundle_path / "funnel" / "funnel.json").is_file()
    with pytest.raises(BundleDamagedError):
        Bundle.load(tmp_path)
