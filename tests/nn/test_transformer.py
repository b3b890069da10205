"""Transformer blocks against T5's formulas, torch's own attention, and what a cache must not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.t5.modeling_t5 import T5Attention

from tiglon.nn.transformer import HIDDEN, Attention, DecoderLayer, Dropout, EncoderLayer, attend, t5_bucket

torch.set_num_threads(1)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("buckets, longest", [(32, 128), (16, 40)])
def test_buckets_are_those_of_t5(both_ways, buckets, longest):
    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distance, both_ways, buckets, longest)
    ours = t5_bucket(distance, buckets, longest, both_ways)
    torch.testing.assert_close(ours, theirs)
    assert ours.min() == 0
    assert ours.max() == buckets - 1


def test_attention_is_the_softmax_of_unscaled_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    bias = torch.randn(2, 3, 4, 6)
    bias[0, :, :, 4:] = HIDDEN
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    found = attend(q, (k, v), bias)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))
    k[0, :, 4:] = v[0, :, 4:] = 99.0
    torch.testing.assert_close(attend(q, (k, v), bias)[0], found[0])


def test_keys_and_values_are_two_projections():
    torch.manual_seed(0)
    attention = Attention(width=6, heads=2, head_width=4)
    memory = torch.randn(3, 5, 6)
    k, v = attention.keys_values(memory)
    both = memory @ attention.kv.weight
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), both[..., :8])
    torch.testing.assert_close(v.transpose(1, 2).flatten(2), both[..., 8:])


@pytest.mark.parametrize("step", ["encoder", "decoder"])
def test_states_kept_from_before_change_nothing(step):
    torch.manual_seed(0)
    if step == "encoder":
        run = EncoderLayer(8, 2, 4, 16, dropout=0.3).eval()
    else:
        run = DecoderLayer(8, 2, 4, 16, dropout=0.3).eval().over_codes
    x = torch.randn(3, 5, 8)
    bias = torch.randn(2, 5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), HIDDEN)
    whole, _ = run(x, bias)
    past, pieces = None, []
    for i in range(5):
        piece, past = run(x[:, i : i + 1], bias[:, i : i + 1, : i + 1], past)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


# -- dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    n = 200_003
    out = Dropout(rate)(torch.ones(n))
    rounded = round(rate * 256) / 256
    spread = 5 * math.sqrt(rounded * (1 - rounded) / n)
    assert (out == 0).float().mean() == pytest.approx(rounded, abs=spread)
    assert out.mean() == pytest.approx(1, abs=spread / (1 - rounded))
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([1 / (1 - rounded)]))


def test_dropout_does_not_favour_a_place():
    """Eight elements share a draw; each of the eight must have the rate, and neighbours no correlation."""
    torch.manual_seed(0)
    kept = (Dropout(0.25)(torch.ones(40_000, 8)) != 0).float()
    assert kept.mean(dim=0).sub(0.75).abs().max() < 0.012
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 0.03


def test_dropout_does_nothing_when_evaluating_or_at_rate_0():
    x = torch.randn(7, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_dropout_follows_the_seed():
    x, drop = torch.randn(5, 13), Dropout(0.4)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    torch.testing.assert_close(drop(x), first, rtol=0, atol=0)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_value_did(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 11, dtype=kind, requires_grad=True)
    out = Dropout(0.5)(x)
    assert out.dtype == kind
    out.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), out.detach())
