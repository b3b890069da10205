"""DIN: intensity without a softmax, Dice by its definition, an L2 that touches only what the batch used."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.nn.dice import Dice
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.din import DIN, ActivationUnit, code_counts, mini_batch_aware_l2
from tiglon.types import Behaviours

torch.set_num_threads(1)
N, J = 12, 2


def embedding() -> FeatureEmbedding:
    codes = np.stack([np.append(np.arange(1, N + 1), 0), np.append(1 + np.arange(N) % 3, 0)], axis=1)
    return FeatureEmbedding(codes, (N + 1, 4), (6, 4), (5,) * J, std=0.5, cross_width=3)


def past(B: int, L: int, seed: int = 0) -> Behaviours:
    g = torch.Generator().manual_seed(seed)
    return Behaviours(
        torch.randint(N, (B, L), generator=g),
        torch.randint(5, (B, L, J), generator=g),
        torch.rand(B, L, generator=g) * 100 + 1,
        torch.ones(B, L, dtype=torch.bool),
    )


def rows(behaviours: Behaviours, index: list[int]) -> Behaviours:
    return behaviours.take(torch.tensor([index] * len(behaviours.item), dtype=torch.long))


def seasoned_din(embed: FeatureEmbedding, **settings) -> DIN:
    """Its statistics have seen data, its α is not zero; in eval mode."""
    torch.manual_seed(1)
    unit = DIN(embed, **settings)
    for dice in unit.activation.dice:
        torch.nn.init.normal_(dice.alpha)
    for seed in range(3):
        unit(embed, torch.arange(6).view(2, 3), past(2, 7, seed))
    return unit.eval()


ITEM = torch.tensor([[0, 5, 7], [3, 3, 11]])


def test_the_first_layer_is_that_of_the_concatenation():
    torch.manual_seed(0)
    unit = ActivationUnit(10, 6, (8, 4))
    e, v = torch.randn(2, 5, 10), torch.randn(2, 3, 6)
    e_BLKE, v_BLKH = e[:, :, None].expand(-1, -1, 3, -1), v[:, None].expand(-1, 5, -1, -1)
    h = e_BLKE[..., :6]
    expected = unit.first(torch.cat([e_BLKE, v_BLKH, h - v_BLKH, h * v_BLKH], dim=-1))
    matrix, vector = unit.of_candidates(v)
    found = torch.baddbmm(vector, e, matrix).view(2, 5, 3, 8)
    torch.testing.assert_close(found, expected)


def test_read_in_parts_or_whole():
    """With gradients all weights are made at once, without them some behaviours at a time."""
    torch.manual_seed(0)
    unit = ActivationUnit(10, 6, (80, 40)).eval()
    e, v, mask = torch.randn(2, 5_000, 10), torch.randn(2, 3, 6), torch.ones(2, 5_000, dtype=torch.bool)
    whole = unit(e, v, mask)
    with torch.no_grad():
        torch.testing.assert_close(unit(e, v, mask), whole)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 5), st.integers(0, 1000))
def test_a_behaviour_twice_counts_twice(j, seed):
    embed = embedding()
    unit, behaviours = seasoned_din(embed), past(2, 6, seed)
    others = [i for i in range(6) if i != j]

    def read(index: list[int]) -> torch.Tensor:
        return unit(embed, ITEM, rows(behaviours, index)).vector

    contribution = read([*others, j]) - read(others)
    torch.testing.assert_close(read([*others, j, j]) - read(others), 2 * contribution, rtol=1e-3, atol=1e-5)
    assert contribution.abs().max() > 1e-4


def test_the_order_of_behaviours_is_nothing():
    embed = embedding()
    unit, behaviours = seasoned_din(embed), past(2, 6)
    expected = unit(embed, ITEM, behaviours).vector
    torch.testing.assert_close(unit(embed, ITEM, rows(behaviours, [3, 1, 5, 0, 4, 2])).vector, expected)


def test_the_candidate_decides_what_counts():
    embed = embedding()
    found = seasoned_din(embed)(embed, ITEM, past(2, 6)).vector
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3
    torch.testing.assert_close(found[1, 0], found[1, 1])


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_neither_the_result_nor_the_statistics(training):
    embed = embedding()
    behaviours = past(2, 4)
    padded = rows(past(2, 9, seed=5), list(range(9)))
    padded.item[:, :4], padded.cross[:, :4], padded.gap[:, :4] = behaviours[:3]
    padded.mask[:, 4:] = False
    found = []
    for given_past in (behaviours, padded):
        unit = seasoned_din(embed).train(training)
        found.append((unit(embed, ITEM, given_past).vector, unit.activation.dice[0].mean))
    torch.testing.assert_close(found[0], found[1])


def test_a_column_without_a_candidate_changes_nothing():
    """Requests of one batch have more or fewer candidates; the last columns of the shorter are padding."""
    embed, behaviours, found = embedding(), past(2, 4), []
    counts = code_counts(embed, torch.arange(N + 1))
    for extra in (0, 5):
        unit = seasoned_din(embed)
        unit.l2, unit.counts = 0.1, counts
        item = torch.cat([ITEM, torch.full((2, extra), -1)], dim=1)
        read = unit.train()(embed, item, behaviours)
        found.append((read.vector[:, :3], read.loss, [dice.mean for dice in unit.activation.dice]))
    torch.testing.assert_close(found[0], found[1])


def test_an_entry_of_size_three_counts_three_times():
    embed = embedding()
    unit, behaviours = seasoned_din(embed), past(2, 3)
    sized = behaviours._replace(size=torch.tensor([[1.0, 3.0, 1.0]] * 2))
    expected = unit(embed, ITEM, rows(behaviours, [0, 1, 1, 1, 2])).vector
    torch.testing.assert_close(unit(embed, ITEM, sized).vector, expected)


@pytest.mark.parametrize("training", [True, False])
def test_no_past_is_zero(training):
    embed = embedding()
    unit, empty = seasoned_din(embed).train(training), past(2, 3)
    empty.mask[:] = False
    assert (unit(embed, ITEM, empty).vector == 0).all()
    assert (unit(embed, ITEM, rows(empty, [])).vector == 0).all()


def test_identical_behaviours_have_finite_gradients():
    """Variance 0: Dice divides by √ε."""
    embed = embedding()
    unit, behaviours = seasoned_din(embed).train(), past(1, 5)
    unit(embed, ITEM[:1, :1], rows(behaviours, [2] * 5)).vector.sum().backward()
    assert all(p.grad.isfinite().all() for p in [*unit.parameters(), *embed.items.parameters()])


def test_dice_by_its_definition():
    torch.manual_seed(0)
    dice, s = Dice(3), torch.randn(4, 5, 3) * 2 + 1
    torch.nn.init.normal_(dice.alpha)
    real = torch.rand(4, 5) < 0.7
    kept = s[real]
    mean, variance = kept.mean(dim=0), kept.var(dim=0, correction=0)
    p = torch.sigmoid((s - mean) / torch.sqrt(variance + 1e-8))
    torch.testing.assert_close(dice(s, real), p * s + (1 - p) * dice.alpha * s)
    torch.testing.assert_close(dice.mean, 0.1 * mean)
    torch.testing.assert_close(dice.variance, 0.9 + 0.1 * variance)

    dice.eval()
    p = torch.sigmoid((s - dice.mean) / torch.sqrt(dice.variance + 1e-8))
    expected = p * s + (1 - p) * dice.alpha * s
    torch.testing.assert_close(dice(s, real), expected)
    torch.testing.assert_close(dice(s[:1], real[:1]), expected[:1])


@pytest.mark.parametrize("training", [True, False])
def test_dice_has_the_gradients_of_its_definition(training):
    """Through the batch's mean and variance, too; over more rows than are passed over at a time."""
    torch.manual_seed(0)
    dice, real = Dice(80).train(training), torch.rand(4_000) < 0.8
    torch.nn.init.normal_(dice.alpha)
    s = (torch.randn(4_000, 80) * 2 + 1).requires_grad_()
    weight = torch.randn(4_000, 80)
    running = dice.mean.clone(), dice.variance.clone()
    found = torch.autograd.grad((dice(s, real) * weight).sum(), [s, dice.alpha])
    mean, variance = running
    if training:
        mean, variance = s[real].mean(dim=0), s[real].var(dim=0, correction=0)
    p = torch.sigmoid((s - mean) / torch.sqrt(variance + 1e-8))
    plain = p * s + (1 - p) * dice.alpha * s
    expected = torch.autograd.grad((plain * weight).sum(), [s, dice.alpha])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dice_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    s, real = torch.randn(60_000, 40), torch.rand(60_000) < 0.9  # enough for two threads
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            dice, given_s = Dice(40), s.clone().requires_grad_()
            torch.nn.init.constant_(dice.alpha, 0.3)
            out = dice(given_s, real)
            found.append([out, dice.mean, dice.variance, *torch.autograd.grad(out, [given_s, dice.alpha], s)])
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [(0, 3), (7, 1), (2, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dice_of_any_shape_and_type(shape, dtype):
    s, real = torch.randn(shape).to(dtype), torch.ones(shape[:-1], dtype=torch.bool)
    dice = Dice(shape[-1]).eval()
    torch.nn.init.constant_(dice.alpha, 0.25)
    p = torch.sigmoid(s.float() / (1 + 1e-8) ** 0.5)
    expected = (p * s.float() + (1 - p) * 0.25 * s.float()).to(dtype)
    for width in (None, torch.bfloat16):  # its own numbers, too
        torch.testing.assert_close(dice.to(width or torch.float32)(s, real), expected, rtol=0.01, atol=0.01)
    assert dice.train().float()(s.transpose(0, -2).contiguous().transpose(0, -2), real).shape == shape


def test_dice_of_bfloat16_is_that_of_the_same_numbers_in_float32():
    torch.manual_seed(0)
    s, real = (torch.randn(4_000, 80) * 2 + 1).bfloat16(), torch.rand(4_000) < 0.8
    weight = torch.randn(4_000, 80).bfloat16() * real[:, None]
    found = []
    for given_s in (s.clone(), s.float()):
        dice = Dice(80)
        torch.nn.init.constant_(dice.alpha, 0.3)
        given_s.requires_grad_()
        out = dice(given_s, real)
        assert out.dtype == given_s.dtype
        of_s, of_alpha = torch.autograd.grad(out, [given_s, dice.alpha], weight.to(out.dtype))
        found.append((out.float(), of_s.float(), of_alpha, dice.mean, dice.variance))
    for ours, theirs, tolerance in zip(*found, (0.01, 0.01, 1e-4, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_one_gradient_through_a_batch_without_a_real_row_and_one_with():
    """Its running mean, which the first reads, moves before the gradient is taken."""
    dice, s = Dice(3), torch.randn(4, 3, requires_grad=True)
    nobody, all_four = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    (dice(s, nobody).sum() + dice(s, all_four).sum()).backward()
    assert s.grad.isfinite().all()


def test_statistics_are_never_taken_in_bfloat16():
    torch.manual_seed(0)
    s, real = torch.randn(4, 5, 3), torch.ones(4, 5, dtype=torch.bool)
    plain, low = Dice(3), Dice(3)
    expected = plain(s, real)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(s, real), expected)
    assert torch.equal(low.mean, plain.mean)
    assert torch.equal(low.variance, plain.variance)


def test_dice_without_a_real_row_keeps_its_statistics():
    dice = Dice(3)
    assert dice(torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)).isfinite().all()
    assert (dice.mean == 0).all()
    assert (dice.variance == 1).all()


# -- mini-batch-aware L2 ---------------------------------------------------------------------------


def test_l2_of_rows_in_the_batch_alone_each_by_its_count():
    embed = embedding()
    item_count = torch.arange(N + 1)
    counts = code_counts(embed, item_count)
    mini_batch_aware_l2(embed, torch.tensor([4, 4, 7]), counts).backward()
    of_item, of_kind = (table.weight.grad for table in embed.items)
    kinds = {k: sum(i for i in range(N) if 1 + i % 3 == k) for k in (1, 2, 3)}
    for code in range(N + 1):
        expected = 2 * embed.items[0].weight[code] / max(code - 1, 1) if code in (5, 8) else torch.zeros(6)
        torch.testing.assert_close(of_item[code], expected, rtol=1e-5, atol=0)
    for code in range(4):
        expected = 2 * embed.items[1].weight[code] / kinds[2] if code == 2 else torch.zeros(4)
        torch.testing.assert_close(of_kind[code], expected, rtol=1e-5, atol=0)


def test_the_unit_returns_its_l2_in_training_when_asked():
    embed = embedding()
    behaviours = past(2, 4)
    behaviours.mask[:, 2:] = False
    behaviours.item[:] = torch.tensor([1, 2, 8, 9])  # the last two pad
    item_count = torch.ones(N + 1)
    unit = DIN(embed, l2=0.01)
    unit.count(embed, item_count)
    used = torch.cat([ITEM.flatten(), behaviours.item[:, :2].flatten()])
    expected = 0.01 * mini_batch_aware_l2(embed, used, code_counts(embed, item_count))
    torch.testing.assert_close(unit(embed, ITEM, behaviours).loss, expected)
    assert unit.eval()(embed, ITEM, behaviours).loss is None
    assert DIN(embed)(embed, ITEM, behaviours).loss is None


def test_bad_settings_are_named():
    embed = embedding()
    with pytest.raises(ConfigError, match=r"l2=0\.01 without counts.*divides by how often a row occurs"):
        DIN(embed, l2=0.01)(embed, ITEM, past(2, 4))
    with pytest.raises(ConfigError, match=r"l2=-1.*0 or above"):
        DIN(embed, l2=-1)
    with pytest.raises(ConfigError, match=r"hidden=\(\).*at least one hidden layer"):
        DIN(embed, hidden=())
    with pytest.raises(DataError, match=r"item_count of shape \(3,\).*13 items, the unknown one last"):
        DIN(embed, l2=0.01).count(embed, torch.ones(3))
