"""What is remembered is what would be answered; an event, a k or a rule makes another question."""

import numpy as np
import pytest

from tiglon.retrieval.retriever import Retriever
from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import EventsRequest, ItemsRequest, RecommendRequest
from tiglon.serving.remembered import Remembered
from tiglon.serving.state import LmdbState
from tiglon.types import Candidates, Histories


class Counting(Retriever):
    name = "counting"

    def __init__(self, inner):
        self.inner, self.items, self.asked = inner, inner.items, []

    def retrieve(self, histories, k, *, exclude_seen=True, deny=None):
        self.asked.append(len(histories))
        found = self.inner.retrieve(histories, k, exclude_seen=exclude_seen, deny=deny)
        return Candidates(found.item, found.score, self.name)


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return Bundle.load(bundle_path)


def test_what_is_remembered_is_what_would_be_answered(bundle):
    counting, remembered = Counting(bundle.tiger), Remembered()
    lives = bundle.histories.before([1, 2, 3, 4])
    for rows, new in (([0, 1], 2), ([1, 0, 2], 1), ([2, 1], 0), ([0, 1, 2, 3], 1)):
        some = lives.take(np.array(rows))
        found, asked = remembered.retrieve(counting, some, 7, exclude_seen=True)
        expected = bundle.tiger.retrieve(some, 7)
        assert asked == new
        assert np.array_equal(found.item, expected.item)
        assert np.allclose(found.score, expected.score, atol=1e-5)
    assert counting.asked == [2, 1, 1]


def test_another_question_is_asked_anew(bundle):
    counting, remembered = Counting(bundle.tiger), Remembered()
    life = Histories.of([[1, 2, 3]])
    later = Histories(life.offsets, life.item, np.array([0, 1, 1]))  # a basket
    someone = Histories(life.offsets, life.item, life.time, user=np.array([5]))
    longer = Histories.of([[1, 2, 3, 4]])
    for lives, k, hidden in (
        (life, 5, True),
        (life, 6, True),
        (life, 5, False),
        (later, 5, True),
        (someone, 5, True),
        (longer, 5, True),
    ):
        assert remembered.retrieve(counting, lives, k, exclude_seen=hidden)[1] == 1
    assert remembered.retrieve(counting, life, 5, exclude_seen=True)[1] == 0
    for item in (1, 2):
        deny = np.arange(len(bundle.items)) == item
        for new in (1, 0):
            assert remembered.retrieve(counting, life, 5, exclude_seen=True, deny=deny)[1] == new


def test_the_oldest_are_forgotten(bundle):
    counting, remembered = Counting(bundle.popularity), Remembered(most=2)
    lives = [Histories.of([[item]]) for item in range(3)]
    for life, new in ((0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1)):  # 1 was asked for longest ago
        assert remembered.retrieve(counting, lives[life], 3, exclude_seen=True)[1] == new
    nobody = Histories.of([])
    assert remembered.retrieve(counting, nobody, 3, exclude_seen=True)[0].item.shape == (0, 0)


def test_the_engine_asks_again_when_an_event_or_a_change_comes(bundle, tmp_path, monkeypatch):
    state = LmdbState(tmp_path / "state")
    engine, asked = Engine(bundle, state), []
    real = type(bundle.tiger).retrieve

    def counted(self, histories, k, **options):
        asked.append(len(histories))
        return real(self, histories, k, **options)

    monkeypatch.setattr(type(bundle.tiger), "retrieve", counted)
    request = RecommendRequest(user_id=3, k=5, request_id="r")
    first = engine.recommend(request)
    assert engine.recommend(request) == first
    assert asked == [1]
    now = int(bundle.histories.time.max()) + 60
    event = {"user_id": 3, "item_id": first.items[0].item_id, "timestamp": now}
    engine.events(EventsRequest(events=[event]))
    assert engine.recommend(request) != first
    assert asked == [1, 1]
    engine.items(ItemsRequest(remove=[first.items[1].item_id]))
    after = engine.recommend(request)
    assert first.items[1].item_id not in [item.item_id for item in after.items]
    assert asked == [1, 1, 1]
    state.close()
