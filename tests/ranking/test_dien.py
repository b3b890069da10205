"""DIEN: AUGRU between a GRU and standing still; an auxiliary loss that looks one step ahead, never at itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.dien import AUGRU, DIEN, auxiliary_loss, draw_negatives
from tiglon.types import Behaviours

torch.set_num_threads(1)
N, J = 12, 2


def embedding() -> FeatureEmbedding:
    codes = np.append(np.arange(1, N + 1), 0)[:, None]
    torch.manual_seed(0)
    return FeatureEmbedding(codes, (N + 1,), (6,), (5,) * J, std=0.5, cross_width=3)


def past(B: int, L: int, seed: int = 0) -> Behaviours:
    g = torch.Generator().manual_seed(seed)
    return Behaviours(
        torch.randint(N, (B, L), generator=g),
        torch.randint(5, (B, L, J), generator=g),
        torch.rand(B, L, generator=g) * 100 + 1,
        torch.ones(B, L, dtype=torch.bool),
    )


ITEM = torch.tensor([[0, 5, 7], [3, 4, 11]])


def test_full_attention_makes_augru_a_gru():
    torch.manual_seed(0)
    augru, x = AUGRU(4), torch.randn(2, 6, 4)
    state = torch.zeros(2, 4)
    for t in range(6):
        state = augru.cell(x[:, t], state)
    torch.testing.assert_close(augru(x, torch.ones(2, 3, 6)), state[:, None].expand(-1, 3, -1))


def test_no_attention_leaves_the_state_alone():
    torch.manual_seed(0)
    augru, x, attention = AUGRU(4), torch.randn(2, 6, 4), torch.rand(2, 3, 6)
    attention[:, :, [2, 4]] = 0
    kept = [0, 1, 3, 5]
    assert torch.equal(augru(x, attention), augru(x[:, kept], attention[:, :, kept]))
    assert (augru(x, torch.zeros(2, 3, 6)) == 0).all()


def test_attention_scales_the_update_gate():
    """One step by hand, from the equations: u is what torch calls 1 − z."""
    torch.manual_seed(0)
    augru, x, a = AUGRU(4), torch.randn(1, 2, 4), torch.tensor([[[0.7, 0.3]]])
    cell, h = augru.cell, torch.zeros(1, 4)
    for t in range(2):
        gates_x = x[:, t] @ cell.weight_ih.T + cell.bias_ih
        gates_h = h @ cell.weight_hh.T + cell.bias_hh
        r, u = torch.sigmoid(gates_x + gates_h)[:, :4], 1 - torch.sigmoid(gates_x + gates_h)[:, 4:8]
        proposed = torch.tanh(gates_x[:, 8:] + r * gates_h[:, 8:])
        scaled = a[0, 0, t] * u
        h = (1 - scaled) * h + scaled * proposed
    torch.testing.assert_close(augru(x, a)[:, 0], h)


def test_the_auxiliary_loss_by_its_definition():
    torch.manual_seed(0)
    h, e, negative = torch.randn(3, 2, 5, 4).unbind(0)
    counted = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool()
    terms = [
        torch.log(torch.sigmoid(h[b, t] @ e[b, t + 1]))
        + torch.log(1 - torch.sigmoid(h[b, t] @ negative[b, t + 1]))
        for b in range(2)
        for t in range(4)
        if counted[b, t + 1]
    ]
    torch.testing.assert_close(auxiliary_loss(h, e, negative, counted), -torch.stack(terms).mean())


def test_the_auxiliary_loss_looks_one_step_ahead():
    """h_t meets e_{t+1} and no other: neither its own behaviour nor the first one at all."""
    torch.manual_seed(0)
    h, e, negative = (torch.randn(1, 4, 3, requires_grad=True) for _ in range(3))
    counted = torch.ones(1, 4, dtype=torch.bool)
    grad_h, grad_e, grad_negative = torch.autograd.grad(
        auxiliary_loss(h, e, negative, counted), (h, e, negative)
    )
    assert (grad_e[:, 0] == 0).all()
    assert (grad_negative[:, 0] == 0).all()
    assert (grad_h[:, -1] == 0).all()
    only = torch.zeros(1, 4, dtype=torch.bool)
    only[0, 2] = True
    grad_h, grad_e = torch.autograd.grad(auxiliary_loss(h, e, negative, only), (h, e))
    assert grad_h.abs().sum(-1).nonzero().tolist() == [[0, 1]]
    assert grad_e.abs().sum(-1).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("L", [0, 1])
def test_no_pair_no_auxiliary_loss(L):
    embed, behaviours = embedding(), past(2, L)
    found = DIEN(embed)(embed, ITEM, behaviours)
    assert found.vector.isfinite().all()
    assert found.loss is None or found.loss == 0


def test_negatives_are_real_behaviours_and_follow_the_seed():
    behaviours = past(3, 40)
    item = behaviours.item.clone()
    item[:, 30:] = 99
    mask = item != 99
    torch.manual_seed(3)
    first = draw_negatives(item, mask)
    assert (first[mask] != 99).all()
    assert len(first[mask].unique()) == N
    torch.manual_seed(3)
    assert torch.equal(draw_negatives(item, mask), first)
    torch.manual_seed(3)
    assert torch.equal(draw_negatives(item[:, :30], mask[:, :30])[mask[:, :30]], first[mask])
    assert draw_negatives(item, torch.zeros_like(mask)).shape == item.shape


def test_a_negative_that_is_the_positive_is_left_out():
    embed, behaviours = embedding(), past(2, 6)
    behaviours.item[:] = 4
    assert DIEN(embed)(embed, ITEM, behaviours).loss == 0


def test_the_auxiliary_loss_is_there_in_training_only_and_weighted():
    embed, behaviours = embedding(), past(2, 6)
    torch.manual_seed(0)
    unit = DIEN(embed, auxiliary=0.5)
    torch.manual_seed(1)
    half = unit(embed, ITEM, behaviours).loss
    unit.auxiliary = 1.0
    torch.manual_seed(1)
    torch.testing.assert_close(unit(embed, ITEM, behaviours).loss, 2 * half)
    assert half > 0
    assert unit.eval()(embed, ITEM, behaviours).loss is None
    assert DIEN(embed, auxiliary=0.0)(embed, ITEM, behaviours).loss is None


def test_padding_changes_nothing_even_in_training():
    embed, behaviours = embedding(), past(2, 4)
    padded = past(2, 9, seed=4)
    padded.item[:, :4], padded.cross[:, :4], padded.gap[:, :4] = behaviours[:3]
    padded.mask[:, 4:] = False
    unit, found = DIEN(embed), []
    for given_past in (behaviours, padded):
        torch.manual_seed(2)
        found.append(unit(embed, ITEM, given_past)[:2])
    torch.testing.assert_close(found[0], found[1])


def test_attention_is_of_the_candidate_over_interests():
    embed = embedding()
    unit, h, target = DIEN(embed), torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    found = unit.attention(h, target, mask)
    for k in range(3):
        score = torch.stack([h[0, t] @ unit.attend.weight @ target[0, k] for t in range(3)])
        torch.testing.assert_close(found[0, k, :3], F.softmax(score, dim=0))
    assert (found[0, :, 3:] == 0).all()
    assert (found[1] == 0).all()


def test_order_matters_and_the_old_is_not_read():
    embed, behaviours = embedding(), past(2, 8)
    unit = DIEN(embed, longest=5).eval()
    found = unit(embed, ITEM, behaviours).vector
    reverse = behaviours.take(torch.arange(7, -1, -1).expand(2, -1))
    assert (unit(embed, ITEM, reverse).vector - found).abs().max() > 1e-3
    torch.testing.assert_close(unit(embed, ITEM, behaviours.last(5)).vector, found)
    behaviours.item[:, :3] = 1
    torch.testing.assert_close(unit(embed, ITEM, behaviours).vector, found)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"longest=0, auxiliary=1\.0.*longest ≥ 1, auxiliary ≥ 0"):
        DIEN(embedding(), longest=0)
