"""Requests and answers on one small bundle: raw ids are 0 … 39, so they are the dense ids, too."""

import dataclasses
import threading
import time

import numpy as np
import polars as pl
import pytest

from tiglon.data.features import fit
from tiglon.data.histories import HistoryStore
from tiglon.data.ranking import BasketConfig, next_basket
from tiglon.data.split import leave_last_out
from tiglon.errors import ConfigError, DataError, SchemaError, StorageError, UnknownIdError
from tiglon.evaluation.protocol import evaluate
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.recipes import ranking_schema
from tiglon.retrieval.neighbours import CatalogueScorer
from tiglon.serving.bundle import Bundle, require_same_log
from tiglon.serving.catalogue import Catalogue
from tiglon.serving.engine import Engine, _moments
from tiglon.serving.funnel import gather, weigh
from tiglon.serving.lifelong import Lifelong
from tiglon.serving.messages import (
    EventsRequest,
    ItemsRequest,
    RankRequest,
    RecommendRequest,
    SimilarRequest,
)
from tiglon.serving.state import LmdbState
from tiglon.types import Histories

NOON = 1_600_000_000  # in the bundle's log


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return Bundle.load(bundle_path)


@pytest.fixture(scope="module")
def engine(bundle):
    """Nothing changes it."""
    return Engine(bundle)


@pytest.fixture
def live(bundle, tmp_path):
    """One that may be changed."""
    state = LmdbState(tmp_path / "state")
    yield Engine(bundle, state)
    state.close()


def ask(engine, **request):
    return engine.recommend(RecommendRequest(**request))


def ids(answer):
    return [item.item_id for item in answer.items]


def tell(engine, *events):
    names = ("user_id", "item_id", "timestamp", "event_id")
    return engine.events(EventsRequest(events=[dict(zip(names, e, strict=False)) for e in events]))


# -- who asks ----------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_funnel(engine, bundle):
    for user in (3, 7):
        life = bundle.histories.before([user])
        expected = bundle.funnel(True).retrieve(life, 10)
        answer = ask(engine, user_id=user, k=10)
        assert ids(answer) == expected.item[0].tolist()
        assert [i.score for i in answer.items] == pytest.approx(expected.score[0].tolist(), abs=1e-4)
        assert (answer.bundle, answer.user_id, answer.degraded) == (bundle.version, user, [])
        assert set(answer.sources) == {r.name for r in bundle.sources(True)}
        assert {i.source for i in answer.items} <= set(answer.sources)


def test_many_at_once_get_what_each_would_get_alone(engine):
    requests = [
        RecommendRequest(user_id=3, k=5, request_id="a"),
        RecommendRequest(history=[], k=5, request_id="b"),
        RecommendRequest(user_id=9, k=7, request_id="c"),
        RecommendRequest(user_id=5, k=5, exclude_seen=False, request_id="d"),
        RecommendRequest(user_id=4, k=5, deny=[1, 2, 3], request_id="e"),
        RecommendRequest(user_id=12, k=5, request_id="f"),
    ]
    together = engine.recommend_many(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = engine.recommend(request)
        assert answer.request_id == request.request_id
        assert ids(answer) == ids(alone)
        assert answer.degraded == alone.degraded


def test_a_history_is_read_in_place_of_the_stored_life(engine, bundle):
    life = bundle.histories.before([5]).item.tolist()
    assert ids(ask(engine, history=life)) == ids(ask(engine, user_id=5))
    assert ids(ask(engine, user_id=9, history=life)) == ids(ask(engine, user_id=5))


def test_who_is_not_known_gets_what_is_popular_and_is_told(engine, bundle):
    stranger = ask(engine, user_id=123456, k=4)
    assert stranger.degraded == ["unknown user: popularity"]
    assert ask(engine, user_id="3", k=4).degraded == ["unknown user: popularity"]  # not the user 3
    assert list(stranger.sources) == ["popularity"]
    assert {item.source for item in stranger.items} == {"popularity"}
    counts = bundle.popularity.counts[ids(stranger)]
    assert counts.tolist() == np.sort(bundle.popularity.counts)[::-1][:4].tolist()
    empty = ask(engine, history=[], k=4)
    assert empty.degraded == ["empty history: popularity"]
    nothing = ask(engine, history=["wibble", 10**18], k=4)
    assert nothing.degraded == [
        "2 of the history's items unknown: left out",
        "empty history: popularity",
    ]
    assert ids(stranger) == ids(empty) == ids(nothing)


def test_unknown_items_of_a_history_are_left_out_and_counted(engine):
    answer = ask(engine, history=[1, "wibble", 2])
    assert answer.degraded == ["1 of the history's items unknown: left out"]
    assert ids(answer) == ids(ask(engine, history=[1, 2]))


# -- rules -------------------------------------------------------------------------------------------------


def test_seen_items_are_hidden_as_the_bundle_was_made_or_as_asked(engine, bundle):
    seen = set(bundle.histories.before([3]).item.tolist())
    hidden = ask(engine, user_id=3, k=1000)
    assert set(ids(hidden)) == set(range(40)) - seen
    assert sorted(ids(ask(engine, user_id=3, k=1000, exclude_seen=False))) == list(range(40))


def test_denied_items_never_come_and_others_take_their_place(engine):
    first = ids(ask(engine, user_id=3, k=5))
    answer = ids(ask(engine, user_id=3, k=5, deny=[*first[:3], "unknown"]))
    assert len(set(answer)) == 5
    assert not set(first[:3]) & set(answer)
    assert first[3] in answer


def test_unknown_items_among_the_denied_and_allowed_are_told(engine):
    first = ids(ask(engine, user_id=3, k=5))
    answer = ask(engine, user_id=3, k=5, deny=[str(first[0])])
    assert ids(answer) == first
    assert answer.degraded == ["1 of the denied items unknown: left out"]
    assert ask(engine, user_id=3, k=5, allow=[first[0], 4444, "x"]).degraded == [
        "2 of the allowed items unknown: left out"
    ]
    assert ask(engine, user_id=3, k=5, deny=first[:1], allow=first).degraded == []


def test_only_allowed_items_come(engine):
    allowed = ids(ask(engine, user_id=3, k=30))[-4:]
    answer = ask(engine, user_id=3, k=10, allow=[*allowed, "unknown"])
    assert sorted(ids(answer)) == sorted(allowed)
    assert not ask(engine, user_id=3, allow=[]).items
    assert sorted(ids(ask(engine, user_id=999, k=10, allow=allowed))) == sorted(allowed)


def test_caps_hold_and_the_list_stays_full(engine, bundle):
    category = bundle.items.table["category"]
    answer = ids(ask(engine, user_id=3, k=6, at_most={"category": 2}))
    counts = {c: [category[i] for i in answer].count(c) for c in set(category)}
    assert len(answer) == 6
    assert max(counts.values()) == 2
    free = ids(ask(engine, user_id=3, k=30))
    assert [i for i in free if i in answer] == answer  # in the same order
    with pytest.raises(SchemaError) as error:
        ask(engine, user_id=3, at_most={"categori": 2})
    assert str(error.value) == (
        "at_most with the column 'categori'. Caps are on columns of the item table. Did you mean 'category'?"
    )


# -- reasons -----------------------------------------------------------------------------------------------


def test_reasons_are_the_places_at_each_retriever_and_add_up_to_the_score(engine, bundle):
    life = bundle.histories.before([3])
    answer = ask(engine, user_id=3, k=5, explain=True)
    lists = {r.name: r.retrieve(life, 40).item[0].tolist() for r in bundle.sources(True)}
    for item in answer.items:
        assert {s.name: s.rank for s in item.reasons.sources} == {
            name: found.index(item.item_id) + 1 for name, found in lists.items() if item.item_id in found
        }
        best = min(item.reasons.sources, key=lambda s: s.rank)
        assert item.source == best.name
        assert sum(item.reasons.features.values()) == pytest.approx(item.score, abs=1e-3)
    assert all(item.reasons is None for item in ask(engine, user_id=3).items)


def test_what_was_filtered_is_named_with_its_rule(engine, bundle):
    free = ids(ask(engine, user_id=3, k=10, exclude_seen=False))
    seen = set(bundle.histories.before([3]).item.tolist())
    answer = ask(engine, user_id=3, k=10, explain=True, deny=free)
    rules = {f.item_id: f.rule for f in answer.filtered}
    assert rules == {item: "seen" if item in seen else "denied" for item in free}
    allowed = ask(engine, user_id=3, k=10, explain=True, exclude_seen=False, allow=free[:2])
    assert {f.item_id: f.rule for f in allowed.filtered} == dict.fromkeys(free[2:], "not allowed")
    capped = ask(engine, user_id=3, k=10, explain=True, exclude_seen=False, at_most={"category": 1})
    assert {f.rule for f in capped.filtered} == {"at_most: category"}


# -- time and trouble --------------------------------------------------------------------------------------


def test_what_does_not_fit_into_the_budget_is_left_out_and_said(bundle):
    engine = Engine(bundle)
    plenty = ask(engine, user_id=3, budget_ms=60_000)
    assert plenty.degraded == []
    engine.pace["tiger"] = 100.0
    hurried = ask(engine, user_id=3, budget_ms=50)
    assert hurried.degraded == ["tiger skipped: time budget"]
    assert "tiger" not in hurried.sources
    assert len(hurried.items) == 10
    assert engine.pace["tiger"] < 100  # so that it is tried again one day
    assert ask(engine, user_id=3).degraded == []  # no budget, no haste


def test_of_those_with_a_budget_only_the_hurried_share_the_work(bundle, monkeypatch):
    engine, asked = Engine(bundle), []

    def counted(retrievers, lives, *rest, **rules):
        asked.append(len(lives))
        return gather(retrievers, lives, *rest, **rules)

    monkeypatch.setattr("tiglon.serving.engine.gather", counted)
    slow = [r.name for r in engine._catalogue.funnels[True].retrievers if not isinstance(r, CatalogueScorer)]
    engine.pace = dict.fromkeys(slow, 10.0)
    budgets = [50, 60_000, 40, None, 60_000]
    requests = [RecommendRequest(user_id=n, k=5, budget_ms=budget) for n, budget in enumerate(budgets)]
    answers = engine.recommend_many(requests)
    assert sorted(asked) == [1, 1, 1, 2]
    hurried = [f"{name} skipped: time budget" for name in slow]
    assert [answer.degraded for answer in answers] == [hurried, [], hurried, [], []]
    engine.pace = dict.fromkeys(slow, 10.0)
    assert [ids(answer) for answer in answers] == [ids(engine.recommend(request)) for request in requests]


def test_stages_are_told(bundle):
    told = []
    ask(Engine(bundle, on_stage=lambda name, seconds: told.append((name, seconds))), user_id=3)
    assert [name for name, _ in told] == [r.name for r in bundle.sources(True)] + ["fusion"]
    assert all(seconds > 0 for _, seconds in told)


class Down:
    """A state whose store is away."""

    def _refuse(self, *_, **__):
        raise StorageError("the store is down")

    append = life = forget = export = _refuse


def test_a_store_that_is_down_leaves_what_the_bundle_holds(bundle, engine):
    answer = ask(Engine(bundle, Down()), user_id=3)
    assert answer.degraded == ["state down: only what the bundle holds was read"]
    assert ids(answer) == ids(ask(engine, user_id=3))
    with pytest.raises(StorageError):
        tell(Engine(bundle, Down()), (3, 1, NOON + 5))


# -- events ------------------------------------------------------------------------------------------------


def test_the_next_request_sees_an_event(live, bundle):
    first = ids(ask(live, user_id=3, k=5))
    now = int(bundle.histories.time.max()) + 60
    done = tell(live, (3, first[0], now))
    assert (done.accepted, done.duplicates) == (1, 0)
    after = ids(ask(live, user_id=3, k=5))
    assert first[0] not in after
    life = bundle.histories.before([3]).item.tolist()
    assert after == ids(ask(live, history=[*life, first[0]], k=5))
    assert tell(live, (3, first[0], now)).duplicates == 1


def test_an_event_that_the_bundle_holds_counts_once(live, bundle):
    """As after a bundle that was trained on what the state has."""
    life = bundle.histories.before([3])
    before, told = live.user(3), list(zip(life.item.tolist(), life.time.tolist(), strict=True))
    tell(live, *((3, item, moment, f"e-{moment}") for item, moment in told[-2:]))
    assert live.user(3) == before
    assert live._life(live._catalogue, 3, []).item.tolist() == life.item.tolist()
    item, moment = told[-1]
    tell(live, (3, item, moment + 1))  # the same item at another time is another event
    assert [(e.item_id, e.timestamp) for e in live.user(3).events] == [*told, (item, moment + 1)]
    assert live._life(live._catalogue, 3, []).item.tolist() == [*life.item.tolist(), item]
    live.forget(3)
    tell(live, (3, item, moment))  # sent again, so it is to be known again
    assert [(e.item_id, e.timestamp) for e in live.user(3).events] == [(item, moment)]
    assert live._life(live._catalogue, 3, []).item.tolist() == [item]


def test_a_new_user_and_events_out_of_order(live):
    tell(live, *(("Ünal 买家", item, NOON + item) for item in (7, 5, 6)))
    assert [e.item_id for e in live.user("Ünal 买家").events] == [5, 6, 7]
    answer = ask(live, user_id="Ünal 买家")
    assert answer.degraded == []
    assert ids(answer) == ids(ask(live, history=[5, 6, 7]))


def test_nothing_of_bad_events_is_stored(live):
    with pytest.raises(UnknownIdError) as error:
        tell(live, (3, 1, NOON), (3, "wibble", NOON))
    assert str(error.value) == (
        "events[1] with the item 'wibble', which is not in the catalogue. An event is about an item of the "
        "catalogue; nothing of the request was stored. Add the item first, or leave the event out."
    )
    with pytest.raises(DataError, match=r"events\[0\] with the timestamp \d+, more than a day ahead"):
        tell(live, (3, 1, int(time.time()) + 10 * 86_400))
    for coarser_or_before_all in (NOON // 1000, -1):
        with pytest.raises(DataError, match=rf"{coarser_or_before_all}, long before there were logs"):
            tell(live, (3, 1, coarser_or_before_all))
    assert live.state.life(3) is None


@pytest.mark.parametrize(
    ("power", "unit"), [(0, "seconds"), (3, "milliseconds"), (6, "microseconds"), (9, "nanoseconds")]
)
def test_the_time_of_an_event_is_in_the_unit_of_the_log(power, unit):
    name, earliest, latest = _moments(np.array([10, NOON * 10**power]))
    assert name == f"{unit} since 1970"
    now = int(time.time())
    for other in (0, 3, 6, 9):
        assert (earliest <= now * 10**other <= latest) == (other == power)


def test_a_log_that_counts_days_takes_what_comes_after():
    name, earliest, latest = _moments(np.array([3, 400]))
    assert name == "whole numbers from 0, 400 the newest"
    assert (earliest, latest) == (0, 2**63 - 1)


def test_a_forgotten_user_is_a_stranger(live, bundle):
    own = len(bundle.histories.before([3]).item)
    tell(live, (3, 1, NOON), (3, 2, NOON + 1))
    assert live.forget(3).events == own + 2
    assert ask(live, user_id=3).degraded == ["unknown user: popularity"]
    assert not live.user(3).known
    assert live.forget(3).events == 0
    tell(live, (3, 8, NOON + 2))
    assert [e.item_id for e in live.user(3).events] == [8]


def test_a_users_life_is_told_whole(engine, bundle):
    life = bundle.histories.before([3])
    found = engine.user(3)
    assert [(e.item_id, e.timestamp) for e in found.events] == list(
        zip(life.item.tolist(), life.time.tolist(), strict=True)
    )
    assert not engine.user(4711).known


def test_without_a_state_nothing_is_taken(engine):
    for call in (lambda: tell(engine, (3, 1, NOON)), lambda: engine.forget(3)):
        with pytest.raises(ConfigError, match="no state to keep events in"):
            call()


# -- the catalogue -----------------------------------------------------------------------------------------


def change(engine, add=(), remove=()):
    return engine.items(ItemsRequest(add=list(add), remove=list(remove)))


@pytest.mark.parametrize("hide", ["remove", "deny", "seen"])
def test_a_new_item_stands_behind_the_next_like_when_the_nearest_is_hidden(live, bundle, hide):
    table = bundle.items.table
    like = ids(ask(live, user_id="nobody", k=1))[0]
    change(live, [{**table.row(int(like), named=True), "item_id": 1000}])
    now = live._catalogue
    nearest, second = now.likes[0, :2].tolist()
    asked = {"user_id": "nobody", "k": 40}
    assert place_behind(live, nearest, **asked) == 1
    if hide == "remove":
        change(live, remove=[nearest])
    elif hide == "deny":
        asked["deny"] = [nearest]
    else:  # by the networks it may stand elsewhere
        live.pace |= dict.fromkeys(("tiger", "sasrec", "two_tower"), 100.0)
        asked = {"history": [nearest], "exclude_seen": True, "k": 40, "budget_ms": 1000}
    assert place_behind(live, second, **asked) == 1
    if hide == "remove":
        assert live._catalogue.likes[0, 0] == second


def place_behind(engine, like, **asked):
    """How many places a new item stands behind an older one."""
    found = ids(ask(engine, **asked))
    return found.index(1000) - found.index(like)


def test_what_a_change_computes_is_what_a_start_computes(live, bundle):
    rng = np.random.default_rng(0)
    titles = bundle.items.table["title"].to_list()
    for step in range(6):
        new = [{"item_id": 1000 + 10 * step + n, "title": titles[rng.integers(40)]} for n in range(3)]
        change(live, new, remove=rng.integers(0, 1000 + 10 * step, 2).tolist())
    now, anew = live._catalogue, Catalogue(live._catalogue.bundle)
    np.testing.assert_array_equal(now.stand_in, anew.stand_in)
    np.testing.assert_array_equal(now.likes, anew.likes)
    vectors = np.asarray(bundle.vectors)[: now.trained]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = now.bundle.vectors[now.trained :] @ unit[now.alive[: now.trained]].T
    best = np.flatnonzero(now.alive[: now.trained])[cosine.argmax(axis=1)]
    apart = np.sort(cosine, axis=1)
    clear = apart[:, -1] - apart[:, -2] > 1e-5
    assert clear.any()
    np.testing.assert_array_equal(now.likes[clear, 0], best[clear])


def test_reasons_are_given_within_the_budget(bundle):
    stages = []
    engine = Engine(bundle, on_stage=lambda name, seconds: stages.append(name))
    engine.pace |= dict.fromkeys(("tiger", "sasrec", "two_tower"), 100.0)
    answer = ask(engine, user_id=3, k=3, budget_ms=1000, explain=True, deny=[1])
    assert answer.items[0].reasons is not None
    assert not {"tiger", "sasrec", "two_tower"} & set(stages)


def test_a_new_item_comes_at_once_behind_its_like_and_ids_stay(live, bundle):
    table = bundle.items.table
    first = ids(ask(live, user_id=3, k=10))[0]
    codes = live.bundle.tiger.ids.codes.copy()
    done = change(live, [{"item_id": 900, "title": table["title"][first]}])
    assert (done.added, done.changed, done.removed, done.bundle) == (1, 0, 0, bundle.version)
    assert np.array_equal(live.bundle.tiger.ids.codes[:40], codes)
    after = ask(live, user_id=3, k=10, explain=True)
    assert 900 in ids(after)
    assert after.bundle == bundle.version
    assert len(bundle.items) == 40  # the bundle itself is as it was
    assert ask(live, history=[900]).degraded == []  # read as what it is like
    assert 900 not in ids(ask(live, history=[900], k=1000))
    assert [i.item_id for i in live.similar(SimilarRequest(item_id=900, k=1)).items] == [first]
    assert ids(ask(live, user_id=3, allow=[900])) == [900]


def test_new_items_are_one_in_ten_unless_nothing_else_is_left(live, bundle):
    title, new = bundle.items.table["title"], range(900, 940)
    change(live, [{"item_id": 900 + i, "title": title[i]} for i in range(40)])
    for k, most in ((1, 1), (9, 1), (20, 2)):
        found = ids(ask(live, user_id=3, k=k))
        assert len(found) == k
        assert sum(item in new for item in found) <= most
    assert any(item in new for item in found)
    assert len(ids(ask(live, user_id=3, k=7, allow=list(new)))) == 7
    mixed = ask(live, user_id=3, k=10, allow=[*new, 0, 1], exclude_seen=False)
    assert len(mixed.items) == 10
    assert {0, 1} < set(ids(mixed))
    scores = [item.score for item in mixed.items]
    assert scores == sorted(scores, reverse=True)


def test_new_items_of_which_nothing_is_known_come_last(live):
    change(live, [{"item_id": 900 + i} for i in range(3)])
    for user in (3, 4, 5):
        assert not {900, 901, 902} & set(ids(ask(live, user_id=user, k=20, exclude_seen=False)))
        assert {900, 901, 902} < set(ids(ask(live, user_id=user, k=1000, exclude_seen=False)))


def test_a_removed_item_never_comes_back(live):
    first = ids(ask(live, user_id=3, k=4))
    done = change(live, remove=[*first[:2], first[0], "unknown"])
    assert (done.removed, done.unknown) == (2, ["unknown"])
    for request in ({"user_id": 3}, {"user_id": 4711}, {"history": first}, {"user_id": 3, "allow": first}):
        assert not set(first[:2]) & set(ids(ask(live, k=1000, exclude_seen=False, **request)))
    assert change(live, remove=first[:2]).removed == 0
    with pytest.raises(DataError) as error:
        change(live, [{"item_id": first[0], "title": "again"}])
    assert str(error.value) == (
        f"item {first[0]}, which was removed. A removed item never comes back. Give it another id."
    )
    found = ask(live, user_id=3, k=4, explain=True)
    assert {f.item_id: f.rule for f in found.filtered}[first[0]] == "removed"
    assert live.rank(RankRequest(user_id=3, items=first)).unknown == first[:2]
    assert first[0] not in [i.item_id for i in live.similar(SimilarRequest(item_id=first[1], k=40)).items]


def test_a_known_item_may_change_but_keeps_its_id(live):
    codes = live.bundle.tiger.ids.codes.copy()
    row = {"item_id": 5, "title": "another title"}
    assert change(live, [row]).changed == 1
    assert live.bundle.items.table["title"][5] == "another title"
    assert live.bundle.items.table["category"][5] is not None  # what was not said stays
    assert np.array_equal(live.bundle.tiger.ids.codes, codes)
    assert change(live, [row]).changed == 0


@pytest.mark.parametrize(
    "add, error, message",
    [
        ([{"item_id": "x", "title": "y"}], SchemaError, "item_id='x'"),
        ([{"item_id": 900, "titel": "y"}], SchemaError, "Did you mean 'title'?"),
        ([{"item_id": 900, "title": 5}], SchemaError, "title=5. The column 'title' of this bundle's items"),
        ([{"item_id": 900}, {"item_id": 900}], DataError, "an item that stands twice in `add`"),
    ],
)
def test_bad_changes_leave_the_catalogue_alone(live, add, error, message):
    with pytest.raises(error) as raised:
        change(live, [{"item_id": 901, "title": "good"}, *add], remove=[1])
    assert message in str(raised.value)
    assert len(live.bundle.items) == 40
    assert 1 in ids(ask(live, user_id=4711, k=1000))


def test_one_item_stays(live):
    with pytest.raises(DataError, match="a removal of all items"):
        change(live, remove=list(range(40)))
    change(live, remove=list(range(39)))
    assert ids(ask(live, user_id=3, k=10, exclude_seen=False)) == [39]


def test_a_request_keeps_the_catalogue_that_it_began_with(live):
    """Items come and go while others ask: no answer has an item that was removed before it began."""
    stop, wrong = threading.Event(), []

    def asking():
        while not stop.is_set():
            gone = set(removed)
            found = set(ids(ask(live, user_id=3, k=40, exclude_seen=False)))
            wrong.extend(gone & found)

    removed: list[int] = []
    thread = threading.Thread(target=asking)
    thread.start()
    for item in range(8):
        change(live, [{"item_id": 900 + item, "title": "new"}], remove=[item])
        removed.append(item)
    stop.set()
    thread.join()
    assert not wrong


# -- rank, similar -----------------------------------------------------------------------------------------


def test_given_items_are_ranked_as_the_funnel_orders_them(engine):
    order = ids(ask(engine, user_id=3, k=1000, exclude_seen=False))
    answer = engine.rank(RankRequest(user_id=3, items=[*sorted(order)[::3], "wibble", 3]))
    assert [i.item_id for i in answer.items] == [i for i in order if i in {*sorted(order)[::3], 3}]
    assert answer.unknown == ["wibble"]
    scores = [i.score for i in answer.items]
    assert scores == sorted(scores, reverse=True)


def test_similar_items_are_the_neighbours(engine, bundle):
    answer = engine.similar(SimilarRequest(item_id=4, k=3))
    expected = bundle.neighbours.similar_items([4], 3)[0]
    assert [(i.item_id, i.score) for i in answer.items] == expected
    with pytest.raises(UnknownIdError, match="unknown item 'wibble'"):
        engine.similar(SimilarRequest(item_id="wibble"))


# -- to be looked at ---------------------------------------------------------------------------------------


def test_the_tree_holds_every_item_once(engine, bundle):
    root = engine.tree()
    assert (root.count, root.depth) == (40, len(bundle.tiger.ids.sizes))
    leaves, open_ = [], [[]]
    while open_:
        node = engine.tree(open_.pop())
        assert sum(child.count for child in node.children) in (node.count, 0)
        for child in node.children:
            path = [*node.prefix, child.code]
            if len(path) == node.depth:
                (item,) = child.items
                assert bundle.tiger.ids.codes[item.item_id].tolist() == path
                assert bundle.items.table["title"][item.item_id] in item.text
                leaves.append(item.item_id)
            else:
                open_.append(path)
    assert sorted(leaves) == list(range(40))
    with pytest.raises(UnknownIdError, match=r"the prefix \[99\]\. No item is below it"):
        engine.tree([99])
    with pytest.raises(ConfigError, match=r"a prefix of 9 codes\. An ID has 4"):
        engine.tree([0] * 9)


def test_the_beam_ends_where_tigers_list_begins(engine, bundle):
    found = engine.beam(RecommendRequest(user_id=3, k=5))
    life = bundle.histories.before([3])
    expected = bundle.tiger.retrieve(life, 5)
    assert len(found.depths) == len(bundle.tiger.ids.sizes)
    assert [p.prefix for p in found.depths[-1]] == bundle.tiger.ids.codes[expected.item[0]].tolist()
    assert [p.score for p in found.depths[-1]] == pytest.approx(expected.score[0].tolist(), abs=1e-4)
    everything = bundle.tiger.retrieve(life, 40, exclude_seen=False)
    chance = np.exp(everything.score[0].astype(float))
    for kept in found.depths[:-1]:  # a prefix is as likely as all items below it
        for p in kept:
            below = (bundle.tiger.ids.codes[everything.item[0]][:, : len(p.prefix)] == p.prefix).all(axis=1)
            assert np.exp(p.score) == pytest.approx(chance[below].sum(), rel=1e-3)


# -- the lifelong ranker -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranker(bundle):
    """Untrained, but it attends."""
    log = bundle.log()
    features = fit(ranking_schema(bundle.items, log), bundle.items, log)
    task = next_basket(
        log,
        features,
        np.bincount(log.item, minlength=40),
        np.ones(len(log), bool),
        BasketConfig(first=1),
        store=features.store(log),
    )
    return LifelongRanker.of(task, LifelongConfig(long="twin"))


def test_the_ranker_orders_the_best_of_the_fusion(engine, bundle, ranker):
    plain, ranked = (
        {i.item_id: i.score for i in ask(e, user_id=3, k=10).items}
        for e in (engine, Engine(bundle, ranker=ranker))
    )
    chance = dict(zip(plain, ranker.predict([3], [list(plain)])[0].tolist(), strict=True))
    odds = {item: np.log(p / (1 - p)) for item, p in chance.items()}
    both = [item for item in plain if item in ranked]
    added = [ranked[item] - plain[item] - odds[item] for item in both]
    assert added == pytest.approx([added[0]] * len(added), abs=1e-3)  # log-odds, but for one constant


def test_reasons_name_the_behaviours_that_were_read(bundle, ranker):
    life = bundle.histories.before([3])
    answer = ask(Engine(bundle, ranker=ranker), user_id=3, k=2, explain=True)
    for item in answer.items:
        attended = item.reasons.attended
        assert attended
        assert {(a.item_id, a.timestamp) for a in attended} <= set(
            zip(life.item.tolist(), life.time.tolist(), strict=True)
        )
        expected = ranker.explain(3, item.item_id, k=5)
        assert [(a.item_id, a.weight) for a in attended] == [
            (e.item_id, pytest.approx(e.weight, abs=1e-5)) for e in expected
        ]


def test_the_ranker_reads_new_events_new_items_and_strangers(bundle, ranker, tmp_path):
    state = LmdbState(tmp_path / "state")
    engine = Engine(bundle, state, ranker=ranker)
    change(engine, [{"item_id": 900, "title": "new"}])
    tell(engine, (3, 900, NOON), ("new", 4, NOON + 1), ("new", 900, NOON + 2))
    for request in ({"user_id": 3}, {"user_id": "new"}, {"history": [900, 4]}, {"user_id": "nobody"}):
        assert len(ask(engine, k=5, explain=True, **request).items) == 5
    engine.pace["ranker"] = 100.0
    assert ask(engine, user_id=3, budget_ms=1000).degraded == ["ranker skipped: time budget"]
    state.close()


def test_a_history_without_times_has_just_ended(bundle):
    """In a log of seconds since 1970 its behaviours would else lie half a century back."""
    log = bundle.log()
    log = dataclasses.replace(log, time=log.time + 1_600_000_000)
    features = fit(ranking_schema(bundle.items, log), bundle.items, log)
    counts = np.bincount(log.item, minlength=40)
    task = next_basket(log, features, counts, np.ones(len(log), bool), BasketConfig(first=1))
    reader = Lifelong(LifelongRanker.of(task, LifelongConfig(long="twin")), bundle.items.vocabulary)
    asked = reader._task(Histories.of([[1, 2, 3]]), np.array([0, 1]), np.array([5]))
    assert asked.batches(1)[0].past.gap.tolist() == [[3, 2, 1]]


def test_many_lives_at_once_are_read_as_each_alone(bundle, ranker):
    reader = Lifelong(ranker, bundle.items.vocabulary)
    lives = bundle.histories.before([3, -1, 7])
    item = np.array([5, 1, 2, 30, 4, 4])
    together = reader.log_odds(lives, np.array([0, 3, 3, 6]), item)
    for b, rows in ((0, slice(0, 3)), (2, slice(3, 6))):
        alone = reader.log_odds(lives.take(slice(b, b + 1)), np.array([0, 3]), item[rows])
        assert together[rows] == pytest.approx(alone, abs=1e-4)


def test_cross_features_are_those_of_the_training_as_far_as_the_life_is_the_same(bundle):
    log = bundle.log()
    log = dataclasses.replace(log, extra=pl.DataFrame({"stars": np.arange(len(log)) % 5}))
    features = fit(ranking_schema(bundle.items, log), bundle.items, log)
    store = features.store(log)
    counts = np.bincount(log.item, minlength=40)
    task = next_basket(log, features, counts, np.ones(len(log), bool), BasketConfig(first=1), store=store)
    reader = Lifelong(LifelongRanker.of(task, LifelongConfig(long="twin")), bundle.items.vocabulary)
    whole = bundle.histories.before([3])
    (column,) = (store.before([3]).features[name] for name in store.features if "stars" in name)
    n = len(whole.item)
    earlier = whole.take(slice(0, 1))
    earlier = dataclasses.replace(
        earlier, offsets=np.array([0, n - 2]), item=whole.item[: n - 2], time=whole.time[: n - 2]
    )
    later = dataclasses.replace(
        whole,
        offsets=np.array([0, n + 1]),
        item=np.append(whole.item, 1),
        time=np.append(whole.time, whole.time[-1] + 5),
    )
    other = dataclasses.replace(whole, time=np.append(whole.time[:2], whole.time[2:] + 1))
    for life, known in ((whole, n), (earlier, n - 2), (later, n), (other, 2)):
        task = reader._task(life, np.array([0, 1]), np.array([5]))
        (found,) = (task.store.features[name] for name in task.store.features if "stars" in name)
        assert np.array_equal(found[:known], column[:known])
        assert not found[known:].any()


def test_a_ranker_weighs_what_the_validation_gives_it(bundle, ranker):
    whole = bundle.with_ranker(ranker)
    validation = leave_last_out(bundle.log()).validation
    for hidden in (True, False):
        assert np.array_equal(whole.fusions[hidden].weight, bundle.fusions[hidden].weight)
        _, found = weigh(whole.funnel(hidden), validation, exclude_seen=hidden)
        assert found[whole.fusions[hidden].ranker] == max(found.values())
        plain = evaluate(bundle.funnel(hidden), validation, exclude_seen=hidden)
        assert found[0.0] == pytest.approx(plain.metrics["ndcg@10"], abs=1e-6)
    names = [row["name"] for row in whole.metrics["rows"]]
    assert names == [row["name"] for row in bundle.metrics["rows"]]
    assert whole.metrics["rows"][:-1] == bundle.metrics["rows"][:-1]
    assert whole.metrics["lead"] is None  # it was that of the funnel without a ranker
    again = evaluate(whole.funnel(True), leave_last_out(bundle.log()).test)
    assert whole.metrics["rows"][-1]["ndcg@10"] == pytest.approx(again.metrics["ndcg@10"])


def test_a_ranker_without_weight_is_not_asked(bundle, ranker, engine):
    silent = {hidden: dataclasses.replace(f, ranker=0.0) for hidden, f in bundle.fusions.items()}
    told = []
    whole = dataclasses.replace(bundle, ranker=ranker, fusions=silent)
    asked = ask(Engine(whole, on_stage=lambda name, _: told.append(name)), user_id=3, k=3, explain=True)
    assert ids(asked) == ids(ask(engine, user_id=3, k=3))
    assert "ranker" not in told
    assert not asked.items[0].reasons.attended


def test_a_ranker_of_another_log_is_refused(bundle, ranker):
    log = bundle.histories
    other = HistoryStore(log.users, log.items, log.offsets, log.item, np.asarray(log.time) + 1)
    with pytest.raises(DataError) as error:
        require_same_log(other, ranker.histories)
    assert str(error.value).startswith(
        f"a ranker's log of {len(log.item):,} events, which is not the bundle's"
    )
    assert str(error.value).endswith("Train the ranker on the tables that the bundle was trained on.")


def test_a_bundle_carries_its_ranker(bundle, ranker, tmp_path):
    whole = dataclasses.replace(bundle, ranker=ranker, manifest={}, path=None)
    whole.save(tmp_path / "whole")
    loaded = Bundle.load(tmp_path / "whole")
    assert loaded.ranker.version == ranker.version
    assert ids(ask(Engine(loaded), user_id=3)) == ids(ask(Engine(bundle, ranker=ranker), user_id=3))
