"""Against TWIN's equations written down a second time, with loops."""

import math

import numpy as np
import pytest
import torch

from tiglon.nn.target_attention import HIDDEN, TargetAttention
from tiglon.types import Behaviours

B, K, L, J, C, H, A, D = 2, 3, 7, 2, 4, 6, 2, 5


@pytest.fixture
def attention():
    torch.manual_seed(1)
    made = TargetAttention(H, J, C, heads=A, head_width=3, width=D, identity=False)
    with torch.no_grad():
        made.beta.normal_()
    return made.double()


@pytest.fixture
def world():
    torch.manual_seed(2)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 4:] = False
    return (
        torch.randn(B, K, H).double(),
        torch.randn(B, L, H).double(),
        torch.randn(B, L, J, C).double(),
        mask,
    )


def alpha_of(attention, world, size=None):
    item, inherent, cross, mask = world
    bias = attention.bias(cross)
    return attention.score(attention.queries(item), attention.keys(inherent), bias, mask, size)


def test_scores_and_interest_are_those_of_the_paper(attention, world):
    item, inherent, cross, mask = (x.numpy() for x in world)
    Wq, Wh, Wv, Wo = (
        getattr(attention, name).weight.detach().numpy() for name in ("query", "key", "value", "out")
    )
    w, beta, d = attention.cross.detach().numpy(), attention.beta.detach().numpy(), attention.head_width
    alpha = alpha_of(attention, world)
    vector, weight = attention.mix(alpha, *world[1:3])
    for b in range(B):
        n = int(mask[b].sum())
        for k in range(K):
            heads = []
            for a in range(A):
                part = slice(a * d, (a + 1) * d)
                logit = [
                    (Wh[part] @ inherent[b, i]) @ (Wq[part] @ item[b, k]) / math.sqrt(d)
                    + sum((cross[b, i, j] @ w[j]) * beta[a, j] for j in range(J))
                    for i in range(n)
                ]
                np.testing.assert_allclose(alpha[b, k, a, :n].detach(), logit, atol=1e-12)
                share = np.exp(logit) / np.exp(logit).sum()
                np.testing.assert_allclose(weight[b, k, a, :n].detach(), share, atol=1e-12)
                behaviours = np.concatenate([inherent[b, :n], cross[b, :n].reshape(n, -1)], axis=1)
                heads.append(share @ (behaviours @ Wv[part].T))
            np.testing.assert_allclose(vector[b, k].detach(), Wo @ np.concatenate(heads), atol=1e-12)


def test_padding_has_no_weight_though_real_scores_are_negative(attention, world):
    item, inherent, cross, mask = world
    alpha = alpha_of(attention, (-item, inherent, cross, mask))
    assert (alpha[1, :, :, 4:] == HIDDEN).all()
    assert (attention.mix(alpha, inherent, cross)[1][1, :, :, 4:] == 0).all()


def test_a_cross_feature_moves_the_score_of_its_behaviour_alone(attention, world):
    item, inherent, cross, mask = world
    moved = cross.clone()
    change = torch.randn(J, C).double()
    moved[0, 2] += change
    difference = alpha_of(attention, (item, inherent, moved, mask)) - alpha_of(attention, world)
    expected = attention.beta @ (change * attention.cross).sum(-1)
    torch.testing.assert_close(difference[0, :, :, 2], expected.expand(K, A))
    difference[0, :, :, 2] = 0
    assert (difference.nan_to_num() == 0).all()  # −inf less −inf is NaN, on padding


def test_the_softmax_does_not_cancel_cross_features(attention, world):
    _, inherent, cross, _ = world
    plain, _ = attention.mix(alpha_of(attention, world), inherent, cross)
    with torch.no_grad():
        attention.beta.mul_(3)
    assert not torch.allclose(attention.mix(alpha_of(attention, world), inherent, cross)[0], plain)


def test_the_scale_divides_the_product_only(attention, world):
    item, inherent, cross, mask = world
    alpha = alpha_of(attention, (torch.zeros_like(item), inherent, cross, mask))
    torch.testing.assert_close(alpha[0], attention.bias(cross)[0].expand(K, -1, -1))


def test_n_equal_behaviours_are_one_with_ln_n(attention, world):
    item, inherent, cross, mask = (x[:1] for x in world)
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 5.0, 1.0]]).double()
    n = size[0].long()
    raw = (
        item,
        inherent.repeat_interleave(n, 1),
        cross.repeat_interleave(n, 1),
        mask.repeat_interleave(n, 1),
    )
    expected, _ = attention.mix(alpha_of(attention, raw), *raw[1:3])
    found, _ = attention.mix(alpha_of(attention, (item, inherent, cross, mask), size), inherent, cross)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    without, _ = attention.mix(alpha_of(attention, (item, inherent, cross, mask)), inherent, cross)
    assert (without - expected).abs().max() > 1e-3


def test_no_behaviour_gives_zeros(attention, world):
    item, inherent, cross, mask = world
    for behaviours in (slice(None), slice(0)):
        none = (inherent[:, behaviours], cross[:, behaviours], torch.zeros_like(mask)[:, behaviours])
        vector, weight = attention.mix(alpha_of(attention, (item, *none)), *none[:2])
        assert (vector == 0).all()
        assert (weight == 0).all()


def test_candidates_with_behaviours_of_their_own(attention, world):
    item, _, _, _ = world
    torch.manual_seed(3)
    inherent, cross = torch.randn(B, K, L, H).double(), torch.randn(B, K, L, J, C).double()
    mask, size = torch.rand(B, K, L) < 0.6, 1 + 5 * torch.rand(B, K, L).double()
    keys, values = (x.transpose(2, 3) for x in (attention.keys(inherent), attention.values(inherent, cross)))
    score = attention.score(attention.queries(item), keys, attention.bias(cross), mask, size)
    vector, weight = attention.read(score, values)
    for k in range(K):
        one = (item[:, k : k + 1], inherent[:, k], cross[:, k], mask[:, k])
        alpha = alpha_of(attention, one, size[:, k])
        torch.testing.assert_close(score[:, k], alpha[:, 0])
        alone, share = attention.mix(alpha, inherent[:, k], cross[:, k])
        torch.testing.assert_close(vector[:, k], alone[:, 0])
        torch.testing.assert_close(weight[:, k], share[:, 0])


def test_logits_are_the_score_of_live_projections(attention, world):
    item, inherent, cross, mask = world
    size = 1 + torch.rand(B, L).double()
    past = Behaviours(torch.zeros(B, L), torch.zeros(B, L, J), torch.ones(B, L), mask, size)
    assert torch.equal(attention.logits(item, past, inherent, cross), alpha_of(attention, world, size))


def test_it_may_begin_as_a_similarity():
    torch.manual_seed(4)
    attention = TargetAttention(H, J, C, heads=4, head_width=16)
    items = torch.randn(3, H)
    product = (attention.queries(items)[:, None] * attention.keys(items)[None]).sum((-1, -2))
    torch.testing.assert_close(product / product[0, 0], items @ items.T / (items[0] @ items[0]))
    apart = TargetAttention(H, J, C, identity=False)
    assert not torch.equal(apart.query.weight, apart.key.weight)


@pytest.mark.parametrize("width", [20, 64, 200])
@pytest.mark.parametrize("std", [0.05, 1.0])
def test_an_item_begins_at_four_with_itself(width, std):
    torch.manual_seed(5)
    attention = TargetAttention(width, 0, C, heads=4, head_width=16, item_std=std)
    items = std * torch.randn(500, width)
    itself = (attention.queries(items) * attention.keys(items)).sum(-1) / 16**0.5
    torch.testing.assert_close(itself.mean(0), torch.full((4,), 4.0), atol=0.5, rtol=0)
