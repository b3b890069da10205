"""MIMN: one event at a time is all at once to the bit; writes land where they point; the state never grows.

The definition, in torch's own operations, of what `memory_steps` computes begins below."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking import memory_steps
from tiglon.ranking.memory_steps import project
from tiglon.ranking.mimn import MIMN, MemoryState, address, usage_share, utilisation_loss
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


def unrolled(unit: MIMN, embed: FeatureEmbedding, state: MemoryState, behaviours: Behaviours) -> MemoryState:
    """`update` by its definition: a step a time for all users."""
    x_BLE = torch.cat([embed.inherent(behaviours.item), embed.cross(behaviours.cross).flatten(-2)], dim=-1)
    for t in range(x_BLE.shape[1]):
        new, at = step(unit, state, x_BLE[:, t]), behaviours.mask[:, t]
        state = MemoryState(
            *(torch.where(at.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, state, strict=True))
        )
    return state


def write(memory_BMD, weight_BM, erase_BD, add_BD) -> torch.Tensor:
    """M ← M ∘ (1 − w eᵀ) + w aᵀ."""
    weight_BM1 = weight_BM[..., None]
    return memory_BMD * (1 - weight_BM1 * erase_BD[:, None]) + weight_BM1 * add_BD[:, None]


def step(unit: MIMN, state: MemoryState, x_BE: torch.Tensor) -> MemoryState:
    memory = state.memory
    controller = unit.controller(torch.cat([x_BE, state.last_read], dim=-1), state.controller)
    key, strength = unit.heads(controller).unflatten(-1, (2, -1)).split([unit.slot_width, 1], dim=-1)
    read, weight = address(key.tanh(), F.softplus(strength) + 1, memory).unbind(1)
    spread = F.softmax(unit.transfer(usage_share(state.usage)).unflatten(-1, (unit.slots, -1)), dim=-1)
    weight = (weight[:, None] @ spread).squeeze(1)
    erase, add = unit.change(controller).chunk(2, dim=-1)
    return MemoryState(
        write(memory, weight, erase.sigmoid(), add.tanh()),
        induced(unit, state.channels, read, memory, x_BE),
        controller,
        (read[:, None] @ memory).squeeze(1),
        state.usage + weight,
    )


def induced(unit: MIMN, channels, read, memory, x_BE) -> torch.Tensor:
    at = read.topk(unit.top, dim=1).indices[..., None]
    slot = memory.detach().gather(1, at.expand(-1, -1, unit.slot_width))
    at = at.expand(-1, -1, unit.channel_width)
    before = channels.gather(1, at)
    x = x_BE[:, None].expand(-1, unit.top, -1)
    after = unit.induce(torch.cat([x, slot], dim=-1).flatten(0, 1), before.flatten(0, 1))
    return channels.scatter(1, at, after.view_as(before))


def some_state(unit: MIMN, B: int) -> MemoryState:
    torch.manual_seed(2)
    state = MemoryState(*(torch.randn(x.shape) * 0.5 for x in unit.begin(B)))
    return state._replace(usage=torch.rand(B, unit.slots) * 3 + 1)


def learnt(update, unit: MIMN, embed: FeatureEmbedding, state: MemoryState, behaviours: Behaviours):
    """The state after, and the gradient of a random sum of its numbers in everything before."""
    state = MemoryState(*(x.detach().clone().requires_grad_() for x in state))
    after = update(unit, embed, state, behaviours)
    torch.manual_seed(3)
    given = [torch.randn(x.shape) for x in after]
    before = {**state._asdict(), **dict(unit.named_parameters()), **dict(embed.named_parameters())}
    grads = torch.autograd.grad(after, list(before.values()), given, allow_unused=True)
    return after, dict(zip(before, grads, strict=True))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    most = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * most)


@pytest.mark.parametrize(
    "B, L, sizes",
    [
        (3, 20, {}),
        (3, 20, {"top": 2}),
        (1, 1, {}),
        (5, 7, {"slots": 8, "slot_width": 32, "channel_width": 32}),
        (2, 60, {"slots": 3, "slot_width": 9, "channel_width": 17, "top": 3}),
        (2, 12, {"slots": 1, "slot_width": 1, "channel_width": 1}),
    ],
)
def test_update_and_its_gradients_by_definition(B, L, sizes):
    embed = embedding()
    unit, behaviours = mimn(embed, **sizes), past(B, L)
    arguments = (unit, embed, some_state(unit, B), behaviours)
    found, of_found = learnt(MIMN.update, *arguments)
    expected, of_expected = learnt(unrolled, *arguments)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for name, grad in of_expected.items():
        if grad is not None:
            close(of_found[name], grad)
        elif of_found[name] is not None:
            assert (of_found[name] == 0).all(), name


def test_the_first_memory_learns_by_definition():
    embed = embedding()
    unit, behaviours = mimn(embed), past(3, 15)
    grads = []
    for update in (MIMN.update, unrolled):
        after = update(unit, embed, unit.begin(3), behaviours)
        grads.append(torch.autograd.grad(sum(x.square().sum() for x in after), unit.start)[0])
    close(*grads)


def test_without_gradients_the_bits_are_the_same():
    embed = embedding()
    unit, behaviours = mimn(embed), past(3, 15)
    state = some_state(unit, 3)
    before = [x.clone() for x in state]
    with_gradients = unit.update(embed, state, behaviours)
    assert all(x.requires_grad for x in with_gradients)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = unit.update(embed, state, behaviours)
        assert not any(x.requires_grad for x in found)
        assert all(torch.equal(a, b) for a, b in zip(found, with_gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_gradient_can_be_asked_for_twice():
    embed = embedding()
    unit = mimn(embed)
    after = unit.update(embed, unit.begin(3), past(3, 15))
    total = sum(x.sum() for x in after)
    one, other = (torch.autograd.grad(total, unit.heads.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)


def test_threads_change_no_bit_of_a_state(monkeypatch):
    embed = embedding()
    unit, behaviours = mimn(embed, top=2), past(5, 15)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(memory_steps, "_SHARD", 1)
        with torch.no_grad():
            found.append(unit.update(embed, unit.begin(5), behaviours))
        found.append(learnt(MIMN.update, unit, embed, some_state(unit, 5), behaviours))
    (one, (_, of_one), other, (_, of_other)) = found
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for name in MemoryState._fields:
        assert torch.equal(of_one[name], of_other[name])


def test_a_row_is_projected_alike_whatever_stands_beside_it():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(131, 45), torch.randn(12, 45), torch.randn(12)
    together = project(x, weight, bias)
    torch.testing.assert_close(together, F.linear(x, weight, bias))
    assert torch.equal(together, torch.cat([project(row, weight, bias) for row in x.split(1)]))
    assert torch.equal(together[7:], project(x[7:], weight, bias))


def test_who_did_nothing_keeps_a_state_between_those_who_did():
    embed = embedding()
    unit, behaviours = mimn(embed), past(3, 9, seed=4)
    behaviours.mask[1] = False
    before = some_state(unit, 3)
    found, expected = unit.update(embed, before, behaviours), unrolled(unit, embed, before, behaviours)
    for ours, theirs, old in zip(found, expected, before, strict=True):
        close(ours, theirs)
        assert torch.equal(ours[1], old[1])


def test_a_state_is_float32_whatever_it_was_stored_as():
    embed = embedding()
    unit, nothing = mimn(embed), past(2, 3)
    stored = MemoryState(*(part.half() for part in some_state(unit, 2)))
    for behaviours in (past(2, 3), nothing._replace(mask=torch.zeros_like(nothing.mask))):
        assert {part.dtype for part in unit.update(embed, stored, behaviours)} == {torch.float32}


def test_nobody_has_a_state_too():
    embed = embedding()
    unit = mimn(embed)
    assert [
        x.shape[0] for x in unit.update(embed, unit.begin(0), past(2, 3).take(torch.zeros(0, 3).long()))
    ] == [0] * 5


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
    embed = embedding()
    unit, slot, add = mimn(embed), 2, torch.tensor([0.3, -0.7, 2.0, 0.0, -1.5])
    with torch.no_grad():
        for layer in (unit.heads, unit.change, unit.transfer):
            layer.weight.zero_()
            layer.bias.zero_()
        unit.start.copy_(torch.eye(4, 5))
        # Behind key and strength to read stand those to write: the key is (0, 0, 1, 0, 0).
        unit.heads.bias[6 + slot], unit.heads.bias[11] = 20, 500
        unit.change.bias[:5], unit.change.bias[5:] = 50, add
        unit.transfer.bias.copy_(200 * torch.eye(4).flatten())
    found = unit.update(embed, unit.begin(1), past(1, 1)).memory[0]
    expected = torch.eye(4, 5)
    expected[slot] = add.tanh()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-7)
    others = [i for i in range(4) if i != slot]
    assert (found[others] - expected[others]).abs().max() < 1e-37  # e^−87, which is as near as eˣ comes to 0


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
    embed = embedding()
    unit, behaviours = mimn(embed, top=top), past(2, 1)
    memory, channels, controller, last_read, _ = state = some_state(unit, 2)
    x = torch.cat([embed.inherent(behaviours.item), embed.cross(behaviours.cross).flatten(-2)], dim=-1)[:, 0]
    found = unit.update(embed, state, behaviours).channels
    head = unit.heads(unit.controller(torch.cat([x, last_read], dim=-1), controller))[:, :6]
    read = address(head[:, None, :5].tanh(), F.softplus(head[:, None, 5:]) + 1, memory)[:, 0]
    for b, order in enumerate(read.argsort(dim=1, descending=True).tolist()):
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
