"""A language model as the last stage of the funnel: it orders, within its time, and never breaks an answer."""

import re

import numpy as np
import pytest

from tiglon.llm.client import Endpoint
from tiglon.llm.recommender import Listwise, Ranked
from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return Bundle.load(bundle_path)


@pytest.fixture
def engine(bundle, server):
    return Engine(bundle, reranker=Listwise(Endpoint(server.url, "tiny", seconds=5)))


def ask(engine, **request):
    return engine.recommend(RecommendRequest(**({"user_id": 3, "k": 20} | request)))


def ids(answer):
    return [item.item_id for item in answer.items]


def backwards(body):
    """By the texts, from z to a: an order that has nothing to do with where each was shown."""
    shown = re.findall(r"^#(\d+): (.*)$", body["messages"][0]["content"], re.MULTILINE)
    return " > ".join(f"#{n}" for n, _ in sorted(shown, key=lambda pair: pair[1], reverse=True))


def test_it_orders_the_first_and_nothing_else(engine, bundle, server):
    server.say = backwards
    plain, found = ask(Engine(bundle)), ask(engine)
    assert sorted(ids(found)) == sorted(ids(plain))
    assert found.degraded == []
    texts = {item.item_id: item.text for item in engine.lookup(ids(found)).items}
    read = [texts[i] for i in ids(found)]
    assert read == sorted(read, reverse=True)
    assert ids(found) != ids(plain)
    scores = [item.score for item in found.items]
    assert (np.diff(scores) < 0).all()
    assert len(server.asked) == 2


def test_it_says_what_it_moved(engine, bundle, server):
    server.say = backwards
    plain = {item.item_id: item.score for item in ask(Engine(bundle), exclude_seen=False).items}
    for item in ask(engine, exclude_seen=False, explain=True).items:
        if item.item_id in plain:
            moved = item.reasons.features.get("language model", 0.0)
            assert item.score - moved == pytest.approx(plain[item.item_id], abs=1e-4)


@pytest.mark.parametrize(
    "said", [500, b"not json", "I like them all!", '["Caviar", "Champagne", "Caviar"]'], ids=str
)
def test_without_an_answer_of_use_the_funnels_order_stands(engine, bundle, server, said):
    server.say = lambda body: said
    found = ask(engine)
    assert found.degraded == ["language model skipped: no answer of use in time"]
    assert ids(found) == ids(ask(Engine(bundle)))


def test_invented_and_repeated_items_never_reach_an_answer(engine, bundle, server):
    server.say = lambda body: '#2 > #2 > #999 > "Caviar" > #0 > #2'
    found = ask(engine)
    assert sorted(ids(found)) == sorted(ids(ask(Engine(bundle))))
    assert found.degraded == []


def test_a_slow_model_is_cut_off(bundle, server):
    server.slowly = 0.05
    slow = Engine(bundle, reranker=Listwise(Endpoint(server.url, "tiny"), seconds=0.2))
    found = ask(slow)
    assert found.degraded == ["language model skipped: no answer of use in time"]
    assert ids(found) == ids(ask(Engine(bundle)))


class Timed:
    """Writes down how long it may take."""

    def __init__(self):
        self.seconds = []

    def rank(self, history, candidates, seconds=None):
        self.seconds.append(seconds)
        order = np.arange(len(candidates))
        return Ranked(order, order, order, 0.0, 1)


def test_it_has_what_is_left_of_the_budget(bundle):
    model = Timed()
    engine = Engine(bundle, reranker=model)
    ask(engine)
    assert ask(engine, budget_ms=60_000).degraded == []
    assert model.seconds[0] is None
    assert 0 < model.seconds[1] < 60


def test_a_model_that_does_not_fit_into_the_budget_is_left_out(bundle):
    model = Timed()
    engine = Engine(bundle, reranker=model)
    engine.pace["language model"] = 100.0
    found = ask(engine, budget_ms=60_000)
    assert found.degraded == ["language model skipped: time budget"]
    assert model.seconds == []
    assert ids(found) == ids(ask(Engine(bundle)))


def test_a_budget_that_is_over_before_the_first_time(bundle):
    model = Timed()
    found = ask(Engine(bundle, reranker=model), budget_ms=1)
    assert "language model skipped: time budget" in found.degraded
    assert len(found.items) == 20


def test_nothing_is_asked_about_a_stranger(engine, server):
    assert ask(engine, user_id="nobody").degraded == ["unknown user: popularity"]
    assert not server.asked
