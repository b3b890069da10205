"""Whatever is asked, the rules hold; whatever happens to a file of a bundle, it is noticed."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import BundleError
from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RankRequest, RecommendRequest

USERS = st.integers(-2, 65)  # 0 … 59 are known
ITEMS = st.one_of(st.integers(-2, 45), st.text(max_size=3).filter(bool))  # 0 … 39 are known
SOME = st.lists(ITEMS, max_size=12)


@pytest.fixture(scope="module")
def engine(bundle_path):
    """Nothing changes it."""
    return Engine(Bundle.load(bundle_path))


@st.composite
def requests(draw):
    who = draw(st.sampled_from(["user", "history", "both"]))
    return RecommendRequest(
        user_id=draw(USERS) if who != "history" else None,
        history=draw(SOME) if who != "user" else None,
        k=draw(st.integers(1, 60)),
        exclude_seen=draw(st.sampled_from([None, True, False])),
        allow=draw(st.one_of(st.none(), SOME)),
        deny=draw(st.one_of(st.just([]), SOME)),
        at_most=draw(st.one_of(st.just({}), st.just({"category": 2}))),
        budget_ms=draw(st.sampled_from([None, 1, 60_000])),
        explain=draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(requests(), min_size=1, max_size=4))
def test_whatever_is_asked_the_rules_hold(engine, asked):
    bundle = engine.bundle
    category = dict(zip(bundle.items.table["item_id"], bundle.items.table["category"], strict=True))
    for request, answer in zip(asked, engine.recommend_many(asked), strict=True):
        ids = [item.item_id for item in answer.items]
        assert len(ids) == len(set(ids)) <= request.k
        assert set(ids) <= set(category) - set(request.deny)
        if request.allow is not None:
            assert set(ids) <= set(request.allow)
        hides = bundle.exclude_seen if request.exclude_seen is None else request.exclude_seen
        if hides and request.history is not None:
            assert not set(ids) & set(request.history)
        for most in request.at_most.values():
            named = [category[item] for item in ids if category[item] is not None]
            assert all(named.count(value) <= most for value in set(named))
        assert (answer.filtered == []) or request.explain


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(ITEMS, min_size=1, max_size=12), st.one_of(st.none(), USERS), SOME)
def test_whatever_is_ranked_every_item_comes_back_once(engine, items, user, history):
    answer = engine.rank(RankRequest(user_id=user, history=history if user is None else None, items=items))
    given_back = [item.item_id for item in answer.items] + list(answer.unknown)
    assert sorted(map(repr, given_back)) == sorted(set(map(repr, items)))
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_happens_to_a_file_is_noticed(bundle_path, tmp_path_factory, data):
    files = sorted(p.relative_to(bundle_path) for p in bundle_path.rglob("*") if p.is_file())
    folder = tmp_path_factory.mktemp("harmed") / "bundle"
    shutil.copytree(bundle_path, folder)
    name = data.draw(st.sampled_from(files), label="file")
    content = bytearray((folder / name).read_bytes())
    harm = data.draw(st.sampled_from(["flip", "cut", "grow", "remove"]), label="harm")
    if harm == "remove" or not content:
        (folder / name).unlink()
    else:
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        if harm == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        harmed = content[:place] if harm == "cut" else content + b"\0" * (harm == "grow")
        (folder / name).write_bytes(harmed)
    try:
        loaded = Bundle.load(folder)
    except BundleError:
        return
    # The moment of writing is the one thing that no checksum covers.
    assert name.name == "manifest.json"
    assert loaded.version == Bundle.load(bundle_path).version
