"""The one-pass network: every shortcut it takes must leave each target's probability as it was."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.nn.transformer import PADDING
from tiglon.retrieval.beam import beam_search
from tiglon.retrieval.repetition import Returns, shares
from tiglon.retrieval.tiger_causal import CausalConfig, CausalTiger
from tiglon.retrieval.windows import Batch
from tiglon.semantic_ids.trie import Trie

torch.set_num_threads(1)

SIZES = (4, 3, 5)
N = 14
CODES = torch.from_numpy(
    np.random.default_rng(0).permutation(list(itertools.product(*map(range, SIZES))))[:N].astype(np.int64)
)
# Lives as (item, moment): one click a moment, baskets (also first and last), one event, a long one.
LIVES = [
    [(3, 0), (1, 1), (4, 2), (1, 3), (5, 4)],
    [(9, 0), (2, 0), (6, 1), (5, 2), (3, 2), (5, 2), (8, 3), (9, 3)],
    [(7, 0)],
    [(i * 5 % N, m) for m, i in enumerate(range(23))],
]


def network(codes=CODES, seed=0, **changes):
    """A small one with random biases: at 0, where they begin, a wrong bias would not show."""
    torch.manual_seed(seed)
    config = CausalConfig(
        width=16,
        heads=2,
        head_width=8,
        hidden=32,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.3,
        distances=12,
    )
    if codes is None:
        model = CausalTiger(SIZES, replace(config, **changes))
    else:
        vectors = np.random.default_rng(1).normal(size=(len(codes), 24)).astype(np.float32)
        model = CausalTiger(SIZES, replace(config, **changes), codes.numpy(), vectors)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.normal_()
        model.prefixes.own.weight[1:].normal_(std=0.5)
    return model.eval()


NETWORKS = {
    "as it comes": lambda: network(),
    "some new": lambda: network(CODES[:9]),
    "arrived": lambda: network(CODES[:9]).extended(CODES[9:].numpy(), np.eye(24, dtype=np.float32)[: N - 9]),
    "code after code": lambda: network(pairs=0),
    "no content": lambda: network(content=False),
    "no prefixes": lambda: network(None),
}


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return NETWORKS[request.param]()


def batch(lives, width=None):
    """Codes (B, L, S), moments (B, L), padded at the end with item 0."""
    width = width or max(map(len, lives))
    item = torch.zeros(len(lives), width, dtype=torch.int64)
    moment = torch.full((len(lives), width), PADDING)
    for row, life in enumerate(lives):
        for at, (i, m) in enumerate(life):
            item[row, at], moment[row, at] = i, m
    return CODES[item], moment


def below(items):
    """For each position the codes (T, V) of catalogue items that share the item's codes before it."""
    masks = []
    for depth, size in enumerate(SIZES):
        mask = torch.zeros(len(items), size, dtype=torch.bool)
        for row, item in enumerate(items):
            same = (CODES[:, :depth] == CODES[item, :depth]).all(dim=1)
            mask[row, CODES[same, depth]] = True
        masks.append(mask)
    return masks


@torch.no_grad()
def losses(model, lives, renormalise=False, width=None):
    """A list a life of (events, S) losses, all events being targets of one pass."""
    codes, moment = batch(lives, width)
    target = moment < PADDING
    allowed = below([i for life in lives for i, _ in life]) if renormalise else None
    found = model.loss(codes, moment, target, allowed)
    return list(found.split([len(life) for life in lives]))


@torch.no_grad()
def of_prefix(model, life, at, renormalise=False):
    """The loss of one event, from only what came strictly before it."""
    alone = [event for event in life if event[1] < life[at][1]] + [life[at]]
    codes, moment = batch([alone])
    target = torch.zeros_like(moment, dtype=torch.bool)
    target[0, -1] = True
    return model.loss(codes, moment, target, below([life[at][0]]) if renormalise else None)[0]


# -- one pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
def test_each_targets_loss_is_that_of_its_prefix_alone(model, renormalise):
    together = losses(model, LIVES, renormalise)
    for life, found in zip(LIVES, together, strict=True):
        for at in range(len(life)):
            torch.testing.assert_close(
                found[at], of_prefix(model, life, at, renormalise), rtol=1e-5, atol=1e-5
            )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_comes_later_or_at_the_same_moment_changes_nothing(model, data):
    life = data.draw(st.sampled_from(LIVES[:2]))
    at = data.draw(st.integers(0, len(life) - 1))
    other = data.draw(st.integers(0, N - 1).filter(lambda i: i != life[at][0]))
    changed = [*life[:at], (other, life[at][1]), *life[at + 1 :]]
    before, after = losses(model, [life])[0], losses(model, [changed])[0]
    free = [j for j, (_, m) in enumerate(life) if m <= life[at][1] and j != at]
    torch.testing.assert_close(after[free], before[free], rtol=1e-5, atol=1e-5)
    later = [j for j, (_, m) in enumerate(life) if m > life[at][1]]
    if later:
        assert (after[later] - before[later]).abs().max() > 1e-4


def test_padding_and_other_users_change_nothing(model):
    together = losses(model, LIVES, width=40)
    for life, found in zip(LIVES, together, strict=True):
        torch.testing.assert_close(found, losses(model, [life])[0], rtol=1e-5, atol=1e-5)


def test_the_order_of_the_history_matters(model):
    life = LIVES[0]
    shuffled = [(life[j][0], m) for m, j in enumerate([2, 0, 3, 1])] + [life[4]]
    assert (losses(model, [shuffled])[0][4] - losses(model, [life])[0][4]).abs().max() > 1e-3


def test_the_order_inside_a_basket_does_not(model):
    life = LIVES[1]
    order = [1, 0, 2, 5, 3, 4, 7, 6]
    before, after = losses(model, [life])[0], losses(model, [[life[j] for j in order]])[0]
    torch.testing.assert_close(after, before[order], rtol=1e-5, atol=1e-5)


def test_only_distances_in_moments_count(model):
    """A row may begin in the middle of a life: its numbers of moments need not begin with 0."""
    later = [[(i, m + 17) for i, m in life] for life in LIVES]
    for before, after in zip(losses(model, LIVES), losses(model, later), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_the_first_event_is_predicted_from_the_start_state_alone(model):
    lives = [[(6, 0), (1, 1)], [(6, 0), (2, 1)], [(8, 0), (6, 0)]]
    first, second, basket = losses(model, lives)
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[0], basket[1])
    model.zero_grad()
    codes, moment = batch(lives[:1])
    target = torch.tensor([[True, False]])
    model.loss(codes, moment, target, None).sum().backward()
    assert model.start.grad.abs().max() > 0


def test_labels_mean_nothing(model):
    """Other names for the codes of each level: the same losses."""
    before = losses(model, LIVES, renormalise=True)
    names = [torch.from_numpy(np.random.default_rng(s).permutation(size)) for s, size in enumerate(SIZES)]
    new_codes = torch.stack([name[CODES[:, s]] for s, name in enumerate(names)], dim=-1)
    ours = model.prefixes
    known = (ours.nodes(CODES)[:, -1] > 0).numpy()
    renamed = network(new_codes[known] if known.any() else None, content=False, pairs=model.config.pairs)
    theirs = renamed.prefixes
    with torch.no_grad():
        rest = {name: p for name, p in model.state_dict().items() if not name.startswith("prefixes")}
        renamed.load_state_dict(rest, strict=False)
        theirs.own.weight[1 + names[0]] = ours.vectors()[1 : 1 + SIZES[0]]
        theirs.own.weight[theirs.nodes(new_codes)] = ours.vectors()[ours.nodes(CODES)]
        theirs.forget()
        for s, name in enumerate(names[1:], start=1):
            at = ours.offsets[s]
            theirs.code.weight[at + name] = ours.code.weight[at : at + SIZES[s]]
        codes, moment = batch(LIVES)
        allowed = below([i for life in LIVES for i, _ in life])
        for s, name in enumerate(names):
            moved = torch.empty_like(allowed[s])
            moved[:, name] = allowed[s]
            allowed[s] = moved
        codes = torch.stack([name[codes[..., s]] for s, name in enumerate(names)], dim=-1)
        after = renamed.loss(codes, moment, moment < PADDING, allowed)
    torch.testing.assert_close(after, torch.cat(before), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_gradients_are_finite_and_reach_every_parameter(bfloat16):
    model = network().train()
    codes, moment = batch(LIVES, width=30)
    allowed = below([i for life in LIVES for i, _ in life])
    item = torch.tensor([[i for i, _ in life] + [0] * (30 - len(life)) for life in LIVES])
    lives = Batch(item, moment, moment < PADDING, torch.zeros(len(LIVES), dtype=torch.int64))
    weight = shares(Trie.build(CODES.numpy().astype(np.int32), SIZES), CODES.numpy())
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        returns = Returns.before(model.repetition.before(lives), CODES, weight)
        loss = model.loss(codes, moment, moment < PADDING, allowed, returns=returns)
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()
    loss.mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


# -- decoding ----------------------------------------------------------------------------------------


def now(lives):
    return torch.tensor([max((m for _, m in life), default=-1) + 1 for life in lives])


def score_of_each_item(model, life, renormalise):
    """(N,) log p of each item as the next event, each by its own teacher-forced pass."""
    moment = int(now([life])[0])
    rows = [losses(model, [[*life, (i, moment)]], renormalise)[0][-1].sum() for i in range(N)]
    return -torch.stack(rows).double().numpy()


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_beam_as_wide_as_the_catalogue_is_exhaustive(model, renormalise):
    lives = [*LIVES, []]
    codes, moment = batch(lives)
    with torch.inference_mode():
        step = model.decoder_for(model.encode(codes, moment), now(lives))
    trie = Trie.build(CODES.numpy().astype(np.int32), SIZES)
    found = beam_search(step, trie, len(lives), N, width=N, renormalise=renormalise)
    for user, life in enumerate(lives):
        truth = score_of_each_item(model, life, renormalise)
        np.testing.assert_array_equal(found.item[user], np.argsort(-truth))
        np.testing.assert_allclose(found.score[user], np.sort(truth)[::-1], atol=1e-5)
        total = np.exp(truth).sum()
        assert total == pytest.approx(1, abs=1e-5) if renormalise else total < 0.999


def test_code_after_code_is_teacher_forcing(model):
    """Beams that are reordered, dropped and doubled on the way must keep their own past."""
    rng = np.random.default_rng(5)
    codes, moment = batch(LIVES)
    with torch.inference_mode():
        step = model.decoder_for(model.encode(codes, moment), now(LIVES))
    path = np.zeros((len(LIVES), 1, 0), np.int64)  # the codes that each beam has written
    beam = code = None
    for depth, (width, size) in enumerate(zip((1, 7, 4), SIZES, strict=True)):
        if depth:
            beam = rng.integers(path.shape[1], size=(len(LIVES), width))
            code = rng.integers(SIZES[depth - 1], size=(len(LIVES), width))
            path = np.concatenate([np.take_along_axis(path, beam[..., None], 1), code[..., None]], axis=2)
        found = torch.from_numpy(step(depth, beam, code)).log_softmax(-1)
        for user, life in enumerate(LIVES):
            for w in range(width):
                for c in range(size):
                    written = [*path[user, w], c, *[0] * (len(SIZES) - depth - 1)]
                    history, times = batch([[*life, (0, int(now([life])[0]))]])
                    history[0, -1] = torch.tensor(written)
                    target = torch.zeros_like(times, dtype=torch.bool)
                    target[0, -1] = True
                    with torch.no_grad():
                        expected = -model.loss(history, times, target, None)[0, depth]
                    assert found[user, w, c].item() == pytest.approx(expected.item(), abs=1e-5)


# -- windows -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(2, 25))
def test_windows_hold_every_event_once_with_enough_before_it(lengths, window):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    moment = np.concatenate([np.arange(n) for n in lengths])
    life = np.repeat(np.arange(len(lengths)), lengths)
    rows = CausalTiger.windows(offsets, moment, window)
    targets = np.concatenate([np.arange(first, stop) for _, stop, first in rows] or [np.empty(0, int)])
    np.testing.assert_array_equal(np.sort(targets), np.arange(offsets[-1]))
    for start, stop, first in rows:
        assert start <= first < stop
        assert stop - start <= window
        assert life[start] == life[stop - 1]
        assert start == offsets[life[start]] or first - start >= window // 2
        assert start > offsets[life[start]] or first == start
