"""ComiRec: both extractors by loops, the gradient's one way, and lists against brute force."""

import itertools

import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError, DataError
from tiglon.nn.interests import squash
from tiglon.retrieval.comirec import ComiRec, ComiRecConfig, DynamicRouting, SelfAttention, aggregate
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Histories, Vocabulary

torch.set_num_threads(1)

N, K, L, D = 30, 3, 6, 16
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
FAST = TrainConfig(epochs=1, evaluations=1, bfloat16=False)
TINY = ComiRecConfig(width=D, interests=K, window=L, train=FAST)


def settings(**changes):
    return ComiRecConfig(**{**TINY.__dict__, **changes})


def comirec(**changes):
    return ComiRec(ITEMS, settings(**changes))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = draw(2, L, D)
POSITION = torch.tensor([[4, 3, 2, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()


# -- extractors --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_routing_is_algorithm_1():
    module = DynamicRouting(settings())
    found = module(X, POSITION, MASK)
    for b in range(2):
        there = [j for j in range(L) if MASK[b, j]]
        votes = {(j, k): X[b, j] @ module.matrix[POSITION[b, j], k] for j in there for k in range(K)}
        logit = torch.zeros(len(there), K)
        for _ in range(3):
            weight = logit.softmax(dim=1)
            v = [squash(sum(weight[n, k] * votes[j, k] for n, j in enumerate(there))) for k in range(K)]
            for n, j in enumerate(there):
                for k in range(K):
                    logit[n, k] += v[k] @ votes[j, k]
        torch.testing.assert_close(found[b], torch.stack(v), rtol=1e-4, atol=1e-5)
        assert found[b].std(dim=0).max() > 1e-2  # zero logits, and yet not alike


@torch.no_grad()
def test_attention_is_equations_3_to_5():
    module = SelfAttention(settings())
    weight, found = module.weights(X, POSITION, MASK), module(X, POSITION, MASK)
    torch.testing.assert_close(weight.sum(dim=2), torch.ones(2, K))
    assert (weight.transpose(1, 2)[~MASK] == 0).all()
    for b in range(2):
        h = X[b, MASK[b]]
        score = torch.tanh((h + module.position(POSITION[b, MASK[b]])) @ module.w1.weight) @ module.w2.weight
        torch.testing.assert_close(found[b], score.softmax(dim=0).T @ h)  # values without positions


@torch.no_grad()
def test_one_interest_is_attention_pooling():
    module = SelfAttention(settings(interests=1))
    score = module.w2(torch.tanh(module.w1(X + module.position(POSITION))))[..., 0]
    pooled = torch.einsum("bl,bld->bd", score.masked_fill(~MASK, -torch.inf).softmax(dim=1), X)
    torch.testing.assert_close(module(X, POSITION, MASK)[:, 0], pooled)


@pytest.mark.parametrize("extractor", ["dr", "sa"])
def test_the_gradient_reaches_the_chosen_interest_alone(extractor):
    network = comirec(extractor=extractor).network
    interests = draw(2, K, D).requires_grad_()
    target = draw(2, D, seed=1)
    network.read_out(interests, torch.ones(2, K, dtype=torch.bool), target).sum().backward()
    best = (interests @ target[..., None])[..., 0].argmax(dim=1)
    touched = (interests.grad != 0).any(dim=2)
    assert torch.equal(touched, torch.nn.functional.one_hot(best, K).bool())


@pytest.mark.parametrize("extractor", ["dr", "sa"])
def test_more_interests_than_items_short_and_long_histories(extractor):
    made = comirec(extractor=extractor, interests=9)
    histories = Histories.of([[], [4], [4, 4], list(range(25))])
    interests, _ = made.users(histories)
    assert np.isfinite(interests).all()
    found = made.retrieve(histories, 8)
    for row, seen in zip(found.item, histories, strict=True):
        there = row[row != MISSING]
        assert len(np.unique(there)) == len(there) == min(8, N - len(np.unique(seen)))


@pytest.mark.parametrize("extractor", ["dr", "sa"])
def test_a_baskets_items_have_no_order(extractor):
    made = comirec(extractor=extractor)
    scores = [
        made.score(Histories(np.array([0, 4]), np.array(items), np.array([1, 2, 2, 3])))
        for items in ([5, 7, 9, 2], [5, 9, 7, 2])
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-5)


# -- aggregation -------------------------------------------------------------------------------------------


def quality(places, fit, category, weight):
    """Q(u, S) over unordered pairs, and how many of them differ."""
    differ = sum(category[i] != category[j] for i, j in itertools.combinations(places, 2))
    return fit[list(places)].sum() + weight * differ, differ


def cases(n=9, k=4):
    rng = np.random.default_rng(0)
    for _ in range(25):
        yield rng.normal(size=n), rng.integers(0, 3, n), k


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 2.0])
def test_greedy_has_no_gap_to_brute_force_with_one_category_an_item(weight):
    for fit, category, k in cases():
        greedy, gain = aggregate(fit, category, k, weight, np.arange(len(fit)))
        best = max(
            quality(places, fit, category, weight)[0] for places in itertools.combinations(range(len(fit)), k)
        )
        assert quality(greedy, fit, category, weight)[0] == pytest.approx(best)
        assert (np.diff(gain) <= 1e-6).all()


def test_more_weight_never_lowers_variety_nor_raises_fit():
    for fit, category, k in cases():
        lists = [aggregate(fit, category, k, w, np.arange(len(fit)))[0] for w in (0.0, 0.1, 0.3, 1.0, 5.0)]
        differ = [quality(places, fit, category, 0.0)[1] for places in lists]
        total = [fit[places].sum() for places in lists]
        assert differ == sorted(differ)
        assert total == sorted(total, reverse=True)


def test_each_step_is_the_papers():
    """The largest f + λ · (chosen ones of another category)."""
    for fit, category, k in cases():
        places, _ = aggregate(fit, category, k, 0.4, np.arange(len(fit)))
        for step, place in enumerate(places):
            gains = {
                i: fit[i] + 0.4 * sum(category[i] != category[j] for j in places[:step])
                for i in range(len(fit))
                if i not in places[:step]
            }
            assert gains[place] == pytest.approx(max(gains.values()))


def test_without_weight_it_is_the_merged_list():
    made = comirec()
    histories = Histories.of([[3, 1], [], [4], list(range(20))])
    for exclude_seen in (True, False):
        plain = made.retrieve(histories, 7, exclude_seen=exclude_seen)
        diverse = made.retrieve_diverse(histories, 7, np.arange(N) % 3, 0.0, exclude_seen=exclude_seen)
        np.testing.assert_array_equal(diverse.item, plain.item)
        np.testing.assert_allclose(diverse.score, plain.score, rtol=1e-4, atol=1e-5)


def test_weight_brings_variety():
    made, category = comirec(), np.arange(N) % 5
    histories = Histories.of([[3, 1], [4, 8, 9]])
    kinds = [
        [len(np.unique(category[row])) for row in made.retrieve_diverse(histories, 5, category, w).item]
        for w in (0.0, 1e6)
    ]
    assert kinds[1][0] >= kinds[0][0]
    assert kinds[1][1] == 5 > kinds[0][1]
    assert len(made.retrieve_diverse(Histories.of([]), 5, category, 1.0)) == 0


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="'dr' or 'sa'"):
        comirec(extractor="mind")
    for name in ("interests", "iterations", "attention"):
        with pytest.raises(ConfigError, match=f"{name} is at least 1"):
            comirec(**{name: 0})
    with pytest.raises(ConfigError, match="at least 0"):
        comirec(disagreement=-1.0)
    with pytest.raises(ConfigError, match="weight of variety is at least 0 and finite"):
        aggregate(np.ones(3), np.zeros(3), 2, np.inf, np.arange(3))
    with pytest.raises(ConfigError, match="weight of variety"):
        comirec().retrieve_diverse(Histories.of([[1]]), 3, np.zeros(N), -1.0)
    with pytest.raises(DataError, match="categories of 3 items for a catalogue of 30"):
        comirec().retrieve_diverse(Histories.of([[1]]), 3, np.zeros(3), 1.0)
