"""MIMN: one event at a time is all at once to the bit; writes land where they point; the state never grows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.mimn import MIMN, address, usage_share, utilisation_loss, write
from tiglon.types import MISSING, Behaviours

torch.set_num_threads(1)
N, J = 12, 2


def embedding() -> FeatureEmbedding:
    codes = np.append(np.arange(1, N + 1), 0)[:, None]
    torch.manual_seed(0)
    return FeatureEmbedding(codes, (N + 1,), (6,), (5,) * J, std=0.5, cross_width=3)


def past(B: int, L: int, seed: int = 0) -> Behaviours:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(L + 1, (B, 1), generator=g)
    return Behaviours(
        torch.randint(MISSING, N, (B, L), generator=g),
        torch.randint(5, (B, L, J), generator=g),
        torch.rand(B, L, generator=g) * 100 + 1,
        torch.arange(L) < lengths.clamp(min=1),
    )


def part(behaviours: Behaviours, start: int, stop: int) -> Behaviours:
    return Behaviours(*(x[:, start:stop] for x in behaviours[:4]))


def mimn(embed: FeatureEmbedding, **settings) -> MIMN:
    torch.manual_seed(1)
    return MIMN(embed, **{"slots": 4, "slot_width": 5, "channel_width": 3} | settings)


ITEM = torch.tensor([[0, 5, 7], [3, 4, 11]])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 100))
def test_streaming_is_the_unrolled_batch_bit_for_bit(L, cuts, seed):
    embed = embedding()
    unit, behaviours = mimn(embed), past(2, L, seed)
    whole = unit.update(embed, unit.begin(2), behaviours)
    one_by_one = chunks = unit.begin(2)
    for t in range(L):
        one_by_one = unit.update(embed, one_by_one, part(behaviours, t, t + 1))
    edges = [0, *sorted(min(cut, L) for cut in cuts), L]
    for start, stop in itertools.pairwise(edges):
        chunks = unit.update(embed, chunks, part(behaviours, start, stop))
    for a, b, c in zip(whole, one_by_one, chunks, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    unit.eval()
    assert torch.equal(unit(embed, ITEM, behaviours).vector, unit.read(embed, one_by_one, ITEM))


def test_the_size_of_the_state_knows_nothing_of_length():
    embed = embedding()
    unit = mimn(embed)
    short, long = (unit.update(embed, unit.begin(2), past(2, L)) for L in (1, 60))
    assert [x.shape for x in short] == [x.shape for x in long] == [x.shape for x in unit.begin(2)]


def test_a_user_in_a_batch_is_the_user_alone():
    embed = embedding()
    unit, behaviours = mimn(embed), past(2, 9)
    both = unit.update(embed, unit.begin(2), behaviours)
    alone = unit.update(embed, unit.begin(1), Behaviours(*(x[1:] for x in behaviours[:4])))
    torch.testing.assert_close(tuple(x[1:] for x in both), tuple(alone))


def test_a_one_hot_write_with_full_erasure_overwrites_that_slot_exactly():
    torch.manual_seed(0)
    memory, add = torch.randn(2, 4, 5), torch.randn(2, 5)
    weight = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]])
    found = write(memory, weight, torch.ones(2, 5), add)
    expected = memory.clone()
    expected[0, 2], expected[1, 0] = add
    assert torch.equal(found, expected)


def test_a_write_by_its_definition():
    torch.manual_seed(0)
    memory, weight, erase, add = torch.randn(4, 5), torch.rand(4), torch.rand(5), torch.randn(5)
    expected = memory * (1 - torch.outer(weight, erase)) + torch.outer(weight, add)
    torch.testing.assert_close(write(memory[None], weight[None], erase[None], add[None])[0], expected)


def test_addressing_is_a_softmax_of_cosines():
    torch.manual_seed(0)
    key, strength, memory = torch.randn(1, 2, 5), torch.rand(1, 2, 1) + 1, torch.randn(1, 4, 5)
    found = address(key, strength, memory)
    for q in range(2):
        cosine = torch.cosine_similarity(key[0, q], memory[0], dim=-1)
        torch.testing.assert_close(found[0, q], torch.softmax(strength[0, q] * cosine, dim=0))
    assert address(torch.zeros(1, 1, 5), torch.ones(1, 1, 1), torch.zeros(1, 4, 5)).isfinite().all()


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_the_utilisation_loss_is_zero_only_for_uniform_use(counts):
    loss = utilisation_loss(torch.tensor([counts], dtype=torch.float32))
    assert (loss == 0) == (len(set(counts)) == 1)


def test_the_utilisation_loss_by_hand_whatever_the_length():
    usage = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    torch.testing.assert_close(utilisation_loss(usage), torch.tensor((0.25**2 + 0.25**2) / 2))
    torch.testing.assert_close(utilisation_loss(100 * usage), utilisation_loss(usage))
    assert (usage_share(torch.zeros(1, 4)) == 0).all()


def test_every_behaviour_writes_one_in_all():
    embed = embedding()
    unit, behaviours = mimn(embed), past(2, 9)
    usage = unit.update(embed, unit.begin(2), behaviours).usage
    torch.testing.assert_close(usage.sum(dim=1), behaviours.lengths.float())


def test_the_transfer_matrix_learns_to_spread_the_writes():
    embed = embedding()
    unit = mimn(embed, regularise=1.0)
    behaviours = past(8, 12)
    item = torch.zeros(8, 1, dtype=torch.long)
    optimizer = torch.optim.Adam(unit.transfer.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = unit(embed, item, behaviours).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("top", [1, 2])
def test_only_the_channels_read_most_change_by_the_shared_gru(top):
    torch.manual_seed(0)
    embed = embedding()
    unit = mimn(embed, top=top)
    channels, memory, x = torch.randn(2, 4, 3), torch.randn(2, 4, 5), torch.randn(2, 12)
    read = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.4, 0.2, 0.1, 0.3]])
    found = unit._induce(channels, read, memory, x)
    for b, order in enumerate([[1, 2], [0, 3]]):
        for i in range(4):
            new = unit.induce(torch.cat([x[b], memory[b, i]])[None], channels[b, i][None])[0]
            torch.testing.assert_close(found[b, i], new if i in order[:top] else channels[b, i])


def test_reading_changes_nothing_and_depends_on_the_candidate():
    embed = embedding()
    unit = mimn(embed)
    state = unit.update(embed, unit.begin(2), past(2, 9))
    before = [x.clone() for x in state]
    found = unit.read(embed, state, ITEM)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-4
    torch.testing.assert_close(unit.read(embed, state, ITEM[:, 1:2]), found[:, 1:2])


def test_a_user_without_a_past_has_the_first_state():
    embed = embedding()
    unit, empty = mimn(embed), past(2, 3)
    empty.mask[:] = False
    begin = unit.begin(2)
    for L in (0, 3):
        found = unit.update(embed, begin, part(empty, 0, L))
        assert all(torch.equal(a, b) for a, b in zip(found, begin, strict=True))
    found = unit(embed, ITEM, empty)
    assert found.vector.isfinite().all()
    assert found.loss == 0


def test_every_weight_learns():
    embed = embedding()
    unit = mimn(embed)
    found = unit(embed, ITEM, past(2, 9))
    (found.vector.square().sum() + found.loss).backward()
    assert [name for name, p in unit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_forward_reads_the_most_recent_and_is_silent_about_its_loss_when_not_training():
    embed = embedding()
    unit, behaviours = mimn(embed, longest=4).eval(), past(2, 9)
    torch.testing.assert_close(unit(embed, ITEM, behaviours), unit(embed, ITEM, behaviours.last(4)))
    assert unit(embed, ITEM, behaviours).loss is None


def test_bad_calls_are_named():
    embed = embedding()
    with pytest.raises(ConfigError, match=r"top=5, slots=4.*top is between 1 and slots"):
        mimn(embed, top=5)
    with pytest.raises(ConfigError, match=r"longest=0.*longest ≥ 1"):
        mimn(embed, longest=0)
    unit = mimn(embed)
    with pytest.raises(DataError, match=r"behaviours of 2 users for a state of 3.*the same user"):
        unit.update(embed, unit.begin(3), past(2, 4))
