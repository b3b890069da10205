import pytest
from pydantic import ValidationError

from tiglon.serving.messages import (
    Event,
    EventsRequest,
    FindResponse,
    ForgetResponse,
    ItemsRequest,
    ItemsResponse,
    LookupResponse,
    RankRequest,
    RankResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarResponse,
    UserResponse,
    as_json,
)


def test_ids_are_never_converted():
    assert RecommendRequest(user_id=5).user_id == 5
    assert RecommendRequest(user_id="5").user_id == "5"
    assert RecommendRequest(history=[5, "5"]).history == [5, "5"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "neither user_id nor history; give one, be it an empty history"),
        ({"user_id": True}, "valid integer"),
        ({"user_id": 5.0}, "valid integer"),
        ({"user_id": 2**63}, "less than"),
        ({"user_id": ""}, "at least 1 character"),
        ({"user_id": "x" * 257}, "at most 256 characters"),
        ({"user_id": "\ud800"}, "valid string"),
        ({"user_id": 1, "k": 0}, "greater than or equal to 1"),
        ({"user_id": 1, "k": -3}, "greater than or equal to 1"),
        ({"user_id": 1, "k": 10**6}, "less than or equal to 1000"),
        ({"user_id": 1, "k": "5"}, "valid integer"),
        ({"user_id": 1, "k": True}, "valid integer"),
        ({"user_id": 1, "explain": "yes"}, "valid boolean"),
        ({"user_id": 1, "budget_ms": 0}, "greater than or equal to 1"),
        ({"user_id": 1, "at_most": {"brand": 0}}, "greater than or equal to 1"),
        ({"user_id": 1, "kk": 5}, "Extra inputs are not permitted"),
        ({"user_id": 1, "request_id": "two\nlines"}, "match pattern"),
        ({"user_id": 1, "request_id": "ends\n"}, "match pattern"),
        ({"history": [1] * 10_001}, "at most 10000 items"),
        ({"history": [None]}, "valid integer"),
        ({"history": [[1]]}, "valid integer"),
    ],
)
def test_bad_requests_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        RecommendRequest(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"timestamp": 1.5}, "valid integer"),
        ({"timestamp": 2**63}, "less than"),
        ({"features": {"price": float("nan")}}, "finite number"),
        ({"features": {"price": "3"}}, "valid number"),
        ({"event_id": ""}, "at least 1 character"),
    ],
)
def test_bad_events_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Event(**{"user_id": 1, "item_id": 2, "timestamp": 3, **given})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"user_id": ""}, "at least 1 character"),
        ({"item_id": "x" * 257}, "at most 256 characters"),
        ({"item_id": 2**63}, "less than"),
    ],
)
def test_events_are_sent_with_ids_within_their_bounds(given, message):
    event = {"user_id": 1, "item_id": 2, "timestamp": 3, **given}
    for sent in (event, Event(**event)):
        with pytest.raises(ValidationError, match=message):
            EventsRequest(events=[sent])
    good = Event(user_id="a", item_id=2, timestamp=3, event_id="e", features={"price": 1.5})
    assert [as_json(event) for event in EventsRequest(events=[good]).events] == [as_json(good)]


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "neither items to add nor items to remove"),
        ({"add": [{"item_id": 5}], "remove": [4, 5]}, "the item 5 to add and to remove"),
        ({"add": [{"title": "x"}]}, r"add\[0\] has the item_id None; it is a whole number or a string"),
        ({"add": [{"item_id": 1}, {"item_id": True}]}, r"add\[1\] has the item_id True"),
        ({"add": [{"item_id": 1.5}]}, r"add\[0\] has the item_id 1.5"),
        ({"add": [{"item_id": ""}]}, r"add\[0\] has the item_id ''; .* or a string of 1 … 256 characters"),
        ({"add": [{"item_id": "x" * 257}]}, r"add\[0\] has the item_id 'x{79}; it is a whole number or a"),
        ({"add": [{"item_id": 1, "weight": float("inf")}]}, "finite number"),
        ({"remove": [None]}, "valid integer"),
    ],
)
def test_bad_changes_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        ItemsRequest(**given)


def test_a_row_keeps_the_types_of_its_values():
    row = {"item_id": 1, "new": True, "price": 2.5, "sizes": [1.0, 2.0], "tags": ["a"], "brand": None}
    (kept,) = ItemsRequest(add=[row]).add
    assert kept == row
    assert [type(value) for value in kept.values()] == [type(value) for value in row.values()]


def test_what_is_ranked_is_named():
    with pytest.raises(ValidationError, match="at least 1 item"):
        RankRequest(user_id=1, items=[])


def test_messages_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        RecommendRequest(user_id=1).k = 5


@pytest.mark.parametrize("raw", ["", "x" * 300, 2**70])
def test_an_answer_tells_whatever_id_there_is(raw):
    item, named = {"item_id": raw, "score": 1.0, "source": "tiger"}, {"request_id": "a", "bundle": "b"}
    event = {"user_id": raw, "item_id": raw, "timestamp": 3}
    reasons = {"sources": [], "attended": [{"item_id": raw, "timestamp": 3, "weight": 1.0}]}
    filtered = [{"item_id": raw, "rule": "seen"}]
    for answer in (
        RecommendResponse(**named, user_id=raw, items=[{**item, "reasons": reasons}], filtered=filtered),
        RankResponse(**named, user_id=raw, items=[item], unknown=[raw]),
        SimilarResponse(**named, item_id=raw, items=[item]),
        ItemsResponse(**named, added=0, changed=0, removed=0, unknown=[raw]),
        UserResponse(user_id=raw, known=True, events=[event]),
        ForgetResponse(user_id=raw, events=1),
        LookupResponse(bundle="b", items=[{"item_id": raw, "text": "x"}]),
        FindResponse(bundle="b", users=[raw], items=[{"item_id": raw, "text": "x"}]),
    ):
        assert type(answer)(**as_json(answer)) == answer


def test_an_answer_comes_back_from_json():
    answer = RecommendResponse(
        request_id="a", bundle="b", user_id="5", items=[{"item_id": 5, "score": 1.0, "source": "tiger"}]
    )
    assert RecommendResponse(**as_json(answer)) == answer
