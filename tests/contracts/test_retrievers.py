"""What every retriever promises. A new one joins with a line in RETRIEVERS: a function from a tiny world
(training log, catalogue) to the fitted retriever."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch

from tiglon.data.histories import HistoryStore
from tiglon.errors import BundleVersionError, ConfigError, DataError, UnknownIdError
from tiglon.retrieval.comirec import ComiRec, ComiRecConfig
from tiglon.retrieval.eager import Eager, EagerConfig, eager_ids
from tiglon.retrieval.mind import Mind, MindConfig
from tiglon.retrieval.neighbours import CoOccurrence, NeighbourSum, Popularity, Repeats, TextNeighbours
from tiglon.retrieval.retriever import Retriever
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.retrieval.tiger import Tiger, TigerConfig
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.two_tower import TwoTower, TwoTowerConfig
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.random_ids import RandomIds
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Histories, Interactions, Items, Vocabulary

TINY = TigerConfig(
    CausalConfig(width=16, heads=2, head_width=8, hidden=32, encoder_layers=1, decoder_layers=1),
    TrainConfig(epochs=1, evaluations=1, bfloat16=False),
)


def random_ids(items: Items) -> SemanticIds:
    return SemanticIds.assign(RandomIds(2, 8).encode_keys(items.vocabulary), (8, 8), items.vocabulary)


def eager(log: Interactions, items: Items, **changes: int) -> Eager:
    config = EagerConfig(TINY.model, TINY.train, branches=8, **changes)
    rows = np.random.default_rng(0).normal(size=(2, len(items), 6)).astype(np.float32)
    vectors = {"behaviour": rows[0], "semantic": rows[1]}
    return Eager(eager_ids(vectors, items.vocabulary, config), items.vocabulary, config, vectors).fit(log)


def grown_eager(log: Interactions, items: Items) -> Eager:
    """The last items arrived after training."""
    old = max(len(items) - 3, 1)
    fitted = Items(Vocabulary(items.vocabulary.raw.slice(0, old)), items.table[:old])
    past = log.take(log.item < old)
    made = eager(replace(past, items=fitted.vocabulary), fitted)
    made.add_items(items.vocabulary, np.random.default_rng(1).normal(size=(len(items) - old, 6)))
    made.log = HistoryStore.build(log)
    return made


RETRIEVERS: dict[str, Callable[[Interactions, Items], Retriever]] = {
    "popularity": lambda log, items: Popularity().fit(log, items),
    "text neighbours": lambda log, items: TextNeighbours().fit(log, items),
    "co-occurrence": lambda log, items: CoOccurrence().fit(log, items),
    "sum": lambda log, items: NeighbourSum().fit(log, items),
    "repeats": lambda log, items: Repeats().fit(log, items),
    "sasrec": lambda log, items: SasRec(
        items.vocabulary, SasRecConfig(width=16, heads=2, hidden=32, layers=1, train=TINY.train)
    ).fit(log),
    "two_tower": lambda log, items: TwoTower(
        items.vocabulary, TwoTowerConfig(width=16, hidden=16, uniform=8, users=5, train=TINY.train)
    ).fit(log),
    "mind": lambda log, items: Mind(
        items.vocabulary, MindConfig(width=16, hidden=16, interests=3, train=TINY.train)
    ).fit(log),
    "comirec dr": lambda log, items: ComiRec(
        items.vocabulary, ComiRecConfig(extractor="dr", width=16, interests=3, train=TINY.train)
    ).fit(log),
    "comirec sa": lambda log, items: ComiRec(
        items.vocabulary, ComiRecConfig(extractor="sa", width=16, interests=3, train=TINY.train)
    ).fit(log),
    "eager": eager,
    "eager, few beams": partial(eager, beams=12),
    "eager, grown": grown_eager,
    "tiger": lambda log, items: Tiger(random_ids(items), items.vocabulary, TINY).fit(log),
    "tiger, few beams": lambda log, items: Tiger(
        random_ids(items), items.vocabulary, replace(TINY, beams=12)
    ).fit(log),
}

N = 30
KINDS = ["soap", "brush", "towel", "sponge", "comb"]


def world(n_items=N, n_users=25, ids: Callable[[int], object] = lambda i: 1000 + i):
    """Users who stay with one kind of item; item n−1 was never bought."""
    rng = np.random.default_rng(0)
    raw = [ids(i) for i in range(n_items)]
    titles = [f"{KINDS[i % 5]} number {i % 3} of {KINDS[i % 5]} works" for i in range(n_items)]
    items = Items(Vocabulary(raw), pl.DataFrame({"item_id": raw, "title": titles}))
    kinds = rng.integers(0, 5, n_users)
    bought = max(n_items - 1, 1)
    lives = [(kind + 5 * rng.integers(0, 6, 8)) % bought for kind in kinds]
    log = Interactions(
        user=np.repeat(np.arange(n_users), 8).astype(np.int32),
        item=np.concatenate(lives).astype(np.int32),
        time=np.tile(np.array([1, 2, 3, 3, 4, 5, 5, 6]), n_users),
        users=Vocabulary([f"user {u}" for u in range(n_users)]),
        items=items.vocabulary,
    )
    return log, items


@pytest.fixture(scope="module", params=RETRIEVERS.values(), ids=RETRIEVERS.keys())
def factory(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(factory):
    return factory(*world())


@pytest.fixture(scope="module")
def histories():
    log, _ = world()
    known = HistoryStore.build(log).before(np.arange(25))
    return Histories.of([*known, [], [3], [N - 1], list(range(20)), [4, 4, 4, 4]])


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("k", [1, 7, N, 5 * N])
def test_lists_are_valid(fitted, histories, k, exclude_seen):
    found = fitted.retrieve(histories, k, exclude_seen=exclude_seen)
    assert len(found) == len(histories)
    assert found.item.shape[1] <= min(k, N)
    assert found.source
    for seen, items, scores in zip(histories, found.item, found.score, strict=True):
        there = items != MISSING
        assert (np.diff(there.astype(int)) <= 0).all()  # missing ones stand at the end
        items, scores = items[there], scores[there]
        assert ((items >= 0) & (items < N)).all()
        assert len(np.unique(items)) == len(items)
        assert np.isfinite(scores).all()
        assert (np.diff(scores) <= 0).all()
        if exclude_seen:
            assert not np.isin(items, seen).any()


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("left", [0, 1, 4, 14, 20, N])
def test_denied_items_leave_their_places_to_others(fitted, histories, left, exclude_seen):
    """As if the whole catalogue had been ranked and the denied left out, the scores of the others as they are."""
    deny = np.ones(N, bool)
    deny[np.random.default_rng(left).permutation(N)[:left]] = False
    whole = fitted.retrieve(histories, N, exclude_seen=exclude_seen)
    found = fitted.retrieve(histories, 5, exclude_seen=exclude_seen, deny=deny)
    beams = getattr(getattr(fitted, "config", None), "beams", N)
    for user in range(len(histories)):
        there = found.item[user] != MISSING
        open_ = (whole.item[user] != MISSING) & ~deny[whole.item[user]]
        assert there.sum() == min(5, open_.sum())
        assert not deny[found.item[user, there]].any()
        if beams >= N:  # a narrow beam may lose the best
            np.testing.assert_array_equal(found.item[user, there], whole.item[user, open_][:5])
            np.testing.assert_allclose(
                found.score[user, there], whole.score[user, open_][:5], rtol=1e-4, atol=1e-5
            )


def test_a_denial_of_another_catalogue_is_told(fitted):
    for deny in (np.zeros(N + 1, bool), np.zeros(N)):
        with pytest.raises(DataError, match=f"deny is one bool for each of the {N} items"):
            fitted.retrieve(Histories.of([[1]]), 3, deny=deny)


def test_fewer_than_k_when_the_catalogue_has_fewer(fitted):
    found = fitted.retrieve(Histories.of([[0, 1, 2]]), 5 * N)
    assert 0 < (found.item != MISSING).sum() <= N - 3


def test_a_shorter_list_begins_the_longer_one(fitted, histories):
    np.testing.assert_array_equal(
        fitted.retrieve(histories, 3).item, fitted.retrieve(histories, 9).item[:, :3]
    )


def test_a_user_alone_is_that_user_in_a_batch(fitted, histories):
    together = fitted.retrieve(histories, 9)
    for user, items in enumerate(histories):
        alone = fitted.retrieve(Histories.of([items]), 9)
        np.testing.assert_array_equal(alone.item[0], together.item[user])
        np.testing.assert_allclose(alone.score[0], together.score[user], rtol=1e-5)


def test_asked_twice_it_answers_the_same(fitted, factory, histories):
    first = fitted.retrieve(histories, 9)
    np.testing.assert_array_equal(fitted.retrieve(histories, 9).item, first.item)
    np.testing.assert_array_equal(factory(*world()).retrieve(histories, 9).item, first.item)


def test_similar_items_are_others_best_first(fitted):
    if fitted.name in ("popularity", "repeats"):
        with pytest.raises(ConfigError, match="compares no items"):
            fitted.similar_items([1003])
        return
    some, fewer = fitted.similar_items([1003, 1007], k=5), fitted.similar_items([1003], k=2)
    assert [item for item, _ in fewer[0]] == [item for item, _ in some[0][:2]]
    for item, row in zip((1003, 1007), some, strict=True):
        assert 0 < len(row) <= 5
        assert len({other for other, _ in row} | {item}) == len(row) + 1
        assert {other for other, _ in row} <= set(range(1000, 1000 + N))
        assert (np.diff([score for _, score in row]) <= 0).all()
    assert len(fitted.similar_items([1003], k=5 * N)[0]) <= N - 1
    with pytest.raises(UnknownIdError):
        fitted.similar_items([77])
    with pytest.raises(ConfigError, match="k of 0"):
        fitted.similar_items([1003], k=0)


def test_nobody_asked(fitted):
    assert len(fitted.retrieve(Histories.of([]), 5)) == 0


@pytest.mark.parametrize(
    "ids", [lambda i: 2**60 + 7 * i, lambda i: f"zahnbürste-{i}"], ids=["int64", "string"]
)
def test_people_meet_their_own_ids(factory, ids):
    log, items = world(ids=ids)
    retriever = factory(log, items)
    raw = [ids(i) for i in range(N)]
    (given,) = retriever.recommend(history=[[raw[3], raw[8], "never heard of", None]], k=4)
    assert len(given) == 4
    assert {item for item, _ in given} <= set(raw) - {raw[3], raw[8]}
    assert given == retriever.recommend(history=[[raw[3], raw[8]]], k=4)[0]
    dense = retriever.retrieve(Histories.of([[3, 8]]), 4)
    assert [item for item, _ in given] == items.vocabulary.decode(dense.item[0])


def test_known_users_are_answered_from_the_log(fitted):
    log, _ = world()
    if fitted.log is None:
        fitted.log = HistoryStore.build(log)
    store = HistoryStore.build(log)
    found = fitted.recommend(["user 4", "user 2"], k=5, exclude_seen=False)
    expected = fitted.retrieve(store.before(np.array([4, 2])), 5, exclude_seen=False)
    assert [[item for item, _ in row] for row in found] == [log.items.decode(row) for row in expected.item]


def test_an_unknown_user_is_told(fitted):
    if fitted.log is None:
        fitted.log = HistoryStore.build(world()[0])
    with pytest.raises(UnknownIdError, match="unknown user 'nobody'"):
        fitted.recommend(["nobody"])


def test_a_history_or_a_log_is_asked_for(fitted):
    with pytest.raises(ConfigError, match="neither a stored log nor a history"):
        fitted.recommend()


@pytest.mark.parametrize("k", [0, -3, 1.5])
def test_a_bad_k_is_told(fitted, k):
    for ask in (lambda: fitted.recommend(history=[[]], k=k), lambda: fitted.retrieve(Histories.of([[1]]), k)):
        with pytest.raises(ConfigError, match="k is a whole number of at least 1"):
            ask()


def test_an_item_that_nobody_bought_is_no_error(fitted):
    assert (fitted.retrieve(Histories.of([[N - 1]]), 5).item != N - 1).all()


def test_random_numbers_of_others_are_left_alone(factory, fitted, tmp_path):
    fitted.save(tmp_path / "kept")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    factory(*world(n_items=10, n_users=3))
    type(fitted).load(tmp_path / "kept")
    assert torch.rand(1) == expected


def test_saved_and_loaded_it_answers_the_same(fitted, histories, tmp_path):
    fitted.save(tmp_path / "kept")
    again = type(fitted).load(tmp_path / "kept")
    assert again.items == fitted.items
    before, after = fitted.retrieve(histories, 9), again.retrieve(histories, 9)
    np.testing.assert_array_equal(after.item, before.item)
    np.testing.assert_array_equal(after.score, before.score)
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_catalogue_of_one_item(factory):
    retriever = factory(*world(n_items=1, n_users=3))
    histories = Histories.of([[], [0]])
    assert retriever.retrieve(histories, 3, exclude_seen=False).item.max() == 0
    assert (retriever.retrieve(histories, 3).item[1] == MISSING).all()


def test_networks_of_an_older_format_say_so(fitted, tmp_path):
    fitted.save(tmp_path / "kept")
    about = tmp_path / "kept" / "retriever.json"
    if about.is_file() and (kept := json.loads(about.read_text()))["format"] > 1:
        about.write_text(json.dumps(kept | {"format": 1}))
        with pytest.raises(BundleVersionError, match=r"of format 1 .* reads formats from 2.* Train it anew"):
            type(fitted).load(tmp_path / "kept")
