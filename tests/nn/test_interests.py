"""Interests: squash and routing by their definitions, read-out with signs, disagreement in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiglon.nn.interests import disagreement, label_aware, route, squash

torch.set_num_threads(1)
B, K, L, D = 3, 4, 6, 8


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everyone(k=K, users=B):
    return torch.ones(users, k, dtype=torch.bool)


# -- squash ------------------------------------------------------------------------------------------------


def test_squash_is_its_formula():
    x = draw(5, D)
    length = x.norm(dim=1, keepdim=True)
    for power in (0.0, 0.2, 1.0):
        expected = (length**2 / (1 + length**2)) ** power * x / length
        torch.testing.assert_close(squash(x, power), expected)
    torch.testing.assert_close(squash(x, 0.0).norm(dim=1), torch.ones(5))


def test_squash_keeps_the_direction_and_shortens_with_the_power():
    x = draw(5, D)
    lengths = torch.stack([squash(x, p).norm(dim=1) for p in (0.0, 0.1, 0.5, 1.0, 2.0)])
    assert (lengths.diff(dim=0) < 0).all()
    assert (lengths[1:] < 1).all()
    for p in (0.0, 0.2, 1.0):
        torch.testing.assert_close(F.cosine_similarity(squash(x, p), x), torch.ones(5))


@pytest.mark.parametrize("power", [0.0, 0.2, 1.0])
def test_squash_of_nothing_is_nothing_with_a_finite_gradient(power):
    x = torch.zeros(D, requires_grad=True)
    squash(x, power).sum().backward()
    assert (squash(x, power) == 0).all()
    assert x.grad.isfinite().all()


# -- routing -----------------------------------------------------------------------------------------------


def by_hand(votes, logits, mask, present, iterations):
    """One user's routing with loops. votes: (K, L, D)."""
    logits = logits.clone()
    for _ in range(iterations):
        weight = torch.zeros(K, L)
        for j in range(L):
            if mask[j]:
                shares = [math.exp(logits[k, j]) if present[k] else 0.0 for k in range(K)]
                weight[:, j] = torch.tensor([share / sum(shares) for share in shares])
        capsules = torch.stack([squash(sum(weight[k, j] * votes[k, j] for j in range(L))) for k in range(K)])
        for k in range(K):
            for j in range(L):
                logits[k, j] += capsules[k] @ votes[k, j]
    return capsules, weight


@pytest.mark.parametrize("shared", [True, False])
def test_routing_is_its_definition(shared):
    votes = draw(B, 1 if shared else K, L, D)
    logits = draw(B, K, L, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    capsules, weight = route(votes, logits, mask, present, 3, 1.0)
    for b in range(B):
        expected = by_hand(votes[b].expand(K, L, D), logits[b], mask[b], present[b], 3)
        torch.testing.assert_close(capsules[b], expected[0])
        torch.testing.assert_close(weight[b], expected[1])
    assert (capsules.norm(dim=-1) < 1).all()


def test_a_gradient_flows_through_the_last_round_alone():
    """The capsule's gradient is that of a weighted sum whose weights are constants."""
    votes = draw(1, 1, L, D).requires_grad_()
    mask, weights_of = torch.ones(1, L, dtype=torch.bool), draw(1, K, D, seed=5)
    capsules, weight = route(votes, draw(1, K, L, seed=1), mask, everyone(users=1), 3, 1.0)
    (capsules * weights_of).sum().backward()
    again = votes.detach().clone().requires_grad_()
    (squash(weight.detach() @ again[:, 0]) * weights_of).sum().backward()
    torch.testing.assert_close(votes.grad, again.grad)


# -- read-out ----------------------------------------------------------------------------------------------


def test_large_products_have_powers_all_the_same():
    interests = torch.tensor([[[300.0], [-300.0], [5.0]]], requires_grad=True)
    found = label_aware(interests, everyone(3, 1), torch.ones(1, 1), 16)
    found.sum().backward()
    assert found.item() == 300
    assert interests.grad.isfinite().all()


def test_label_aware_attention_goes_from_the_mean_to_the_best():
    interests, target = draw(B, K, D) * 2, draw(B, D, seed=1)
    score = (interests @ target[..., None])[..., 0]
    best = interests[torch.arange(B), score.argmax(dim=1)]
    torch.testing.assert_close(label_aware(interests, everyone(), target, 0), interests.mean(dim=1))
    torch.testing.assert_close(
        label_aware(interests, everyone(), target, 1),
        (score.softmax(dim=1)[..., None] * interests).sum(dim=1),
    )
    for power in (12.0, math.inf):
        torch.testing.assert_close(label_aware(interests, everyone(), target, power), best)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_a_better_fit_weighs_more_also_below_zero(power):
    """An even power without its sign would prefer the worst interest."""
    score = torch.tensor([-2.0, -0.5, 0.0, 1.5])
    interests = torch.eye(4)[None] * score[:, None]
    weight = label_aware(interests, everyone(4, 1), torch.ones(1, 4), power)[0] / score
    assert weight[0] < weight[1] < weight[3]
    scaled = torch.cat([interests[:, :2], interests[:, 2:] - 0.1], dim=1).requires_grad_()
    label_aware(scaled, everyone(4, 1), torch.ones(1, 4), power).sum().backward()
    assert scaled.grad.isfinite().all()


def test_absent_interests_are_never_read():
    interests, target = draw(B, K, D), draw(B, D, seed=1)
    present = torch.tensor([[1, 1, 0, 0]]).bool().expand(B, K)
    for power in (0, 1.0, 2.0, math.inf):
        alone = label_aware(interests[:, :2], everyone(2), target, power)
        torch.testing.assert_close(label_aware(interests, present, target, power), alone)


def test_the_best_interest_alone_gets_the_gradient():
    interests, target = draw(B, K, D).requires_grad_(), draw(B, D, seed=1)
    label_aware(interests, everyone(), target, math.inf).sum().backward()
    best = (interests @ target[..., None])[..., 0].argmax(dim=1)
    touched = interests.grad.abs().sum(dim=-1) > 0
    assert torch.equal(touched, F.one_hot(best, K).bool())


# -- disagreement ------------------------------------------------------------------------------------------


def test_disagreement_is_minus_the_mean_cosine_of_all_pairs():
    interests = draw(B, K, D)
    cosine = F.cosine_similarity(interests[:, :, None], interests[:, None], dim=-1)
    torch.testing.assert_close(disagreement(interests, everyone()), -cosine.mean(dim=(1, 2)))
    assert ((disagreement(interests, everyone()) >= -1) & (disagreement(interests, everyone()) <= 0)).all()
    rescaled = interests * torch.tensor([0.1, 3.0, 1.0, 20.0])[:, None]
    torch.testing.assert_close(disagreement(rescaled, everyone()), disagreement(interests, everyone()))


def test_disagreement_of_like_orthogonal_and_single_interests():
    alike = draw(1, 1, D).expand(1, K, D)
    assert disagreement(alike, everyone(users=1)).item() == pytest.approx(-1)
    assert disagreement(torch.eye(K)[None], everyone(users=1)).item() == pytest.approx(-1 / K)
    single = draw(1, 1, D).requires_grad_()
    found = disagreement(single, everyone(1, 1))
    found.backward()
    assert found.item() == pytest.approx(-1)
    torch.testing.assert_close(single.grad, torch.zeros_like(single), atol=1e-6, rtol=0)


def test_absent_and_zero_interests_do_not_count():
    interests = draw(1, K, D)
    present = torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(
        disagreement(interests, present), disagreement(interests[:, :2], everyone(2, 1))
    )
    zeros = torch.zeros(1, K, D, requires_grad=True)
    disagreement(zeros, everyone(users=1)).sum().backward()
    assert zeros.grad.isfinite().all()


def test_minimising_less_disagreement_pulls_interests_apart():
    """The sign: a step on −weight · disagreement lowers the mean cosine."""
    interests = (draw(B, K, D) + 1).requires_grad_()
    before = disagreement(interests, everyone())
    (-0.5 * before.sum()).backward()
    with torch.no_grad():
        assert (disagreement(interests - 0.1 * interests.grad, everyone()) > before).all()
