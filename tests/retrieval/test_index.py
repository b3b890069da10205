"""The indexes against sorting all products: interests merged, filters inside, ties by the house's rule."""

import builtins

import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError, DataError, MissingExtraError
from tiglon.retrieval import index as index_module
from tiglon.retrieval.index import ExactIndex, FaissIndex
from tiglon.retrieval.topk import top_items
from tiglon.types import MISSING, Histories

torch.set_num_threads(1)
N, D, B, K = 60, 8, 7, 3


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VECTORS, INTERESTS = draw(N, D), draw(B, K, D, seed=1)
PRESENT = np.arange(K) < np.array([3, 2, 1, 3, 1, 2, 3])[:, None]
SEEN = Histories.of([[], [0], list(range(N)), [3, 3, 5], list(range(N - 2)), [9], list(range(30))])
DENY = np.arange(N) % 7 == 0


@pytest.fixture(params=[ExactIndex, FaissIndex])
def make(request, monkeypatch):
    monkeypatch.setattr(index_module, "_BLOCK", 13)
    monkeypatch.setattr(index_module, "_SCORES", 100)
    return request.param


def by_sorting(interests, k, present, seen, deny):
    """(item, score) of each user, by definition."""
    lists = []
    for b, user in enumerate(interests):
        scores = np.where(present[b][:, None], user @ VECTORS.T, -np.inf).max(axis=0)
        hidden = set(seen.take(slice(b, b + 1)).item.tolist()) | set(np.flatnonzero(deny).tolist())
        best = sorted((-scores[i], i) for i in range(N) if i not in hidden and scores[i] > -np.inf)[:k]
        lists.append([(i, -s) for s, i in best])
    return lists


@pytest.mark.parametrize("k", [1, 5, 20, 3 * N])
@pytest.mark.parametrize("filters", [False, True])
def test_it_is_sorting_all_products(make, k, filters):
    seen = SEEN if filters else Histories.of([[]] * B)
    deny = DENY if filters else np.zeros(N, bool)
    given = {"seen": SEEN, "deny": DENY} if filters else {}
    found = make(VECTORS).search(INTERESTS, k, present=PRESENT, **given)
    assert found.item.shape == (B, min(k, N))
    for b, expected in enumerate(by_sorting(INTERESTS, k, PRESENT, seen, deny)):
        there = found.item[b] != MISSING
        assert found.item[b][there].tolist() == [i for i, _ in expected]
        np.testing.assert_allclose(found.score[b][there], [s for _, s in expected], rtol=1e-5)


def test_one_interest_may_come_without_its_axis(make):
    index = make(VECTORS)
    alone, wide = index.search(INTERESTS[:, 0], 9), index.search(INTERESTS[:, :1], 9)
    np.testing.assert_array_equal(alone.item, wide.item)


def test_ties_are_broken_as_everywhere():
    """Whole numbers, so that ties are exact, and many; blocks must not matter."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, (500, 3)).astype(np.float32)
    interests = rng.integers(-1, 2, (20, 3)).astype(np.float32)
    expected = top_items(interests @ vectors.T, 25)
    for block in (7, 500):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index_module, "_BLOCK", block)
            np.testing.assert_array_equal(ExactIndex(vectors).search(interests, 25).item, expected.item)


def test_zero_and_duplicate_vectors_are_items_like_others(make):
    vectors = np.concatenate([np.zeros((2, D), np.float32), np.repeat(VECTORS[:3], 2, axis=0)])
    found = make(vectors).search(INTERESTS, len(vectors))
    assert (np.sort(found.item, axis=1) == np.arange(len(vectors))).all()
    zero = make(vectors).search(np.zeros((1, D), np.float32), 3)
    assert (zero.item != MISSING).all()
    assert (zero.score == 0).all()


def test_a_user_without_interests_gets_nothing(make):
    found = make(VECTORS).search(INTERESTS, 4, present=np.zeros((B, K), bool))
    assert (found.item == MISSING).all()
    assert len(make(VECTORS).search(INTERESTS[:0], 4)) == 0


def test_no_interests_find_nothing(make):
    found = make(VECTORS).search(np.zeros((2, 0, D), np.float32), 3)
    assert found.item.tolist() == [[MISSING] * 3] * 2


def test_memory_is_bounded_by_the_block(monkeypatch):
    """No array of users × items is ever made."""
    largest = 0
    original = torch.Tensor.amax

    def watched(tensor, *args, **kwargs):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(index_module, "_BLOCK", 64)
    monkeypatch.setattr(index_module, "_SCORES", 64 * 12)
    monkeypatch.setattr(torch.Tensor, "amax", watched)
    ExactIndex(draw(5000, D)).search(draw(100, 3, D), 10)
    assert 0 < largest <= 64 * 12


def test_an_approximate_index_answers_the_same_call():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)
    interests = rng.normal(size=(10, 2, 16)).astype(np.float32)
    exact = ExactIndex(vectors).search(interests, 10)
    share = {}
    for name in ("HNSW32", "HNSW32 efSearch=200", "IVF32,Flat", "IVF32,Flat nprobe=32"):
        near = FaissIndex(vectors, name).search(interests, 10)
        share[name] = np.mean(
            [len(np.intersect1d(a, b)) / 10 for a, b in zip(exact.item, near.item, strict=True)]
        )
    assert share["HNSW32"] > 0.8
    assert share["HNSW32 efSearch=200"] > 0.99
    assert share["IVF32,Flat"] < 0.5
    assert share["IVF32,Flat nprobe=32"] == 1


def test_an_index_that_has_told_all_it_looks_at_is_not_asked_again():
    made, asked = FaissIndex(draw(2000, 16), "IVF32,Flat"), []

    class Watched:
        d = made.index.d

        def search(self, interests, k, inner=made.index):
            asked.append(k)
            return inner.search(interests, k)

    made.index = Watched()
    found = made.search(draw(10, 2, 16, seed=1), 500, deny=np.arange(2000) % 2 == 0)
    assert ((found.item != MISSING).sum(axis=1) > 0).all()
    assert asked == [500]


def test_bad_input_is_named(make):
    index = make(VECTORS)
    with pytest.raises(ConfigError, match="k is a whole number"):
        index.search(INTERESTS, 0)
    with pytest.raises(DataError, match="for items of width 8"):
        index.search(INTERESTS[..., :5], 3)
    with pytest.raises(DataError, match="seen items of 2 users for interests of 7"):
        index.search(INTERESTS, 3, seen=Histories.of([[], []]))
    with pytest.raises(DataError, match="one bool for each of the 60 items"):
        index.search(INTERESTS, 3, deny=DENY[:-1])
    with pytest.raises(DataError, match="presence of shape"):
        index.search(INTERESTS, 3, present=PRESENT[:, :2])
    with pytest.raises(DataError, match=r"presence of shape .* and type int64"):
        index.search(INTERESTS, 3, present=PRESENT.astype(np.int64))
    with pytest.raises(ConfigError, match="k of True"):
        index.search(INTERESTS, True)
    with pytest.raises(DataError, match=r"item vectors of shape \(8,\)"):
        make(VECTORS[0])
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="interests of type float32, 1 not finite"):
            index.search(np.where(np.arange(D) == 0, bad, INTERESTS[:1, :1]).astype(np.float32), 3)
        with pytest.raises(DataError, match="an index of no items"):
            make(np.empty((0, 4), np.float32))
        with pytest.raises(DataError, match="item vectors of type float32, 60 not finite"):
            make(np.where(np.arange(D) == 0, bad, VECTORS).astype(np.float32))


def test_without_faiss_it_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'tiglon\[faiss\]'"):
        FaissIndex(VECTORS)
