"""Vectors of prefixes: rows, content that adds up, one softmax over pairs, items that arrive later."""

import itertools

import numpy as np
import pytest
import torch

from tiglon.retrieval import prefixes as module
from tiglon.retrieval.prefixes import Prefixes, mean_vector

torch.set_num_threads(1)

SIZES = (4, 3, 5)
N, C, D = 14, 6, 16
RNG = np.random.default_rng(0)
CODES = RNG.permutation(list(itertools.product(*map(range, SIZES))))[:N].astype(np.int32)
VECTORS = RNG.normal(size=(N, C)).astype(np.float32)
ALL = torch.from_numpy(CODES.astype(np.int64))


def prefixes(some=slice(None)):
    """With random own vectors: at zero, where they begin, a wrong row would not show."""
    torch.manual_seed(0)
    made = Prefixes(SIZES, D, CODES[some], VECTORS[some])
    torch.nn.init.normal_(made.own.weight[1:].data)
    return made.eval()


def centred(vectors, of=VECTORS):
    vectors = vectors - of.mean(axis=0)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_every_prefix_of_a_trained_item_has_one_row_and_new_ones_have_none():
    made = prefixes(slice(9))
    rows = made.nodes(ALL)
    assert rows[:, 0].tolist() == (CODES[:, 0] + 1).tolist()
    named = {}
    for i, codes in enumerate(CODES.tolist()):
        for s in range(1, len(SIZES)):
            prefix = tuple(codes[: s + 1])
            trained = any(tuple(other[: s + 1]) == prefix for other in CODES[:9].tolist())
            assert (rows[i, s] > 0) == trained
            if trained:
                assert named.setdefault(prefix, rows[i, s].item()) == rows[i, s].item()
    assert len(set(named.values())) == len(named) == len(made.own.weight) - 1 - SIZES[0]


def test_content_along_a_path_adds_up_to_the_items_own():
    made = prefixes()
    total = made.projected[made.nodes(ALL)].sum(dim=1)
    torch.testing.assert_close(total, centred(VECTORS) @ made.project.detach(), rtol=1e-4, atol=1e-5)


def test_at_first_products_of_content_are_those_of_the_item_vectors():
    """The projection begins as principal axes: with D ≥ C nothing is lost."""
    made = prefixes()
    total = made.projected[made.nodes(ALL)].sum(dim=1)
    goal = centred(VECTORS)
    torch.testing.assert_close(total @ total.T, goal @ goal.T, rtol=1e-4, atol=1e-5)


def test_content_of_a_prefix_is_the_mean_of_the_items_below():
    made = prefixes()
    path = made.projected[made.nodes(ALL)].cumsum(dim=1)
    goal = centred(VECTORS) @ made.project.detach()
    for i, codes in enumerate(CODES):
        for s in range(1, len(SIZES) + 1):
            below = (CODES[:, :s] == codes[:s]).all(axis=1)
            torch.testing.assert_close(path[i, s - 1], goal[below].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_what_the_projection_learns_moves_every_item():
    made = prefixes().train()
    made.vectors()[made.nodes(ALL[:1])].sum().backward()
    assert made.project.grad.abs().max() > 0
    assert (made.own.weight.grad.abs().sum(dim=1) > 0).sum() == len(SIZES)  # and only its own rows


@pytest.mark.parametrize("pairs", [True, False])
def test_held_vectors_change_nothing_but_the_cost(pairs):
    made = prefixes().train()
    some = ALL[[3, 7, 3]]
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(1))

    def outcome():
        logits = [made.logits(x, some[:, :s]) for s in range(len(SIZES))]
        logits += [made.first_logits(x)] if pairs else []
        loss = sum(found.square().sum() for found in logits) + made(some).square().sum()
        made.zero_grad()
        loss.backward()
        return [*logits, *(p.grad.clone() for p in made.parameters())]

    made.forget()
    goal = outcome()
    with made.holding(some, pairs):
        assert len(made.vectors()) < len(made.own.weight)
        found = outcome()
    assert len(made.vectors()) == len(made.own.weight)
    for ours, theirs in zip(found, goal, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_are_products_with_the_vectors_that_are_read():
    made = prefixes(slice(9))
    x = torch.randn(N, D)
    for s in range(len(SIZES)):
        found = made.logits(x, ALL[:, :s])
        for i, c in itertools.product(range(N), range(SIZES[s])):
            written = torch.cat([ALL[i, :s], torch.tensor([c])])
            torch.testing.assert_close(found[i, c], x[i] @ made(written)[-1], rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # answers take another way
            torch.testing.assert_close(made.logits(x, ALL[:, :s]), found.detach(), rtol=1e-5, atol=1e-5)


def test_first_codes_weigh_what_their_pairs_weigh():
    made = prefixes(slice(4))  # some first codes have no item
    x = torch.randn(3, D)
    found = made.first_logits(x)
    for first in range(SIZES[0]):
        pairs = {tuple(codes[:2]) for codes in CODES[:4].tolist() if codes[0] == first}
        vectors = [made(torch.tensor(pair)).sum(dim=0) for pair in pairs]
        alone = x @ made(torch.tensor([first]))[0]
        goal = torch.logsumexp(torch.stack([x @ v for v in vectors], dim=1), dim=1) if pairs else alone
        torch.testing.assert_close(found[:, first], goal, rtol=1e-4, atol=1e-4)
    assert len({codes[0] for codes in CODES[:4].tolist()}) < SIZES[0]


def test_a_first_code_whose_pairs_are_far_behind_is_not_taken_for_one_without_pairs():
    made = prefixes()
    with torch.no_grad():
        pairs, first = made.rows[0], made.keys[0] // SIZES[1] - 1
        code = int(first[0])
        made.own.weight[pairs[first == code]] = -300.0
        made.own.weight[code + 1] = 100.0  # its own vector, which says the contrary
    made.forget()
    x = torch.ones(1, D)
    assert made.first_logits(x)[0].argmin() == code


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**-27, 2.0**60])
def test_the_unit_of_vectors_does_not_matter(unit):
    expected, found = (
        module.centred(vectors, mean_vector(vectors)) for vectors in (VECTORS, VECTORS * np.float32(unit))
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_what_vectors_have_in_common_does_not_matter():
    grid = np.round(8 * VECTORS)
    expected, found = (
        module.centred(vectors, mean_vector(vectors)) for vectors in (grid, grid + np.float32(2**13))
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_rounding_is_not_taken_for_content():
    vectors = np.full((1001, 3), 0.1, np.float32)
    assert np.abs(module.centred(vectors, mean_vector(vectors) + np.float32(1e-8))).max() < 0.1
    assert not module.centred(np.zeros((4, 3), np.float32), np.zeros(3, np.float32)).any()


def test_items_that_arrive_bring_their_content_and_move_nothing():
    made = prefixes(slice(9))
    before = made(ALL[:9]).detach()
    longer = made.extended(CODES[9:], VECTORS[9:])
    torch.testing.assert_close(longer(ALL[:9]), before)
    rows = longer.nodes(ALL)
    assert (rows > 0).all()
    total = longer.projected[rows].sum(dim=1)
    goal = centred(VECTORS, VECTORS[:9]) @ made.project.detach()
    torch.testing.assert_close(total, goal, rtol=1e-4, atol=1e-5)
    for s in range(1, len(SIZES)):
        new = rows[9:, s][rows[9:, s] >= len(made.own.weight)]
        torch.testing.assert_close(
            longer.own.weight[new], made.own.weight[made.rows[s - 1]].mean(dim=0).expand(len(new), -1)
        )
    assert (made.nodes(ALL[9:])[:, -1] == 0).all()  # the old one does not know them


def test_one_by_one_is_all_at_once():
    together = prefixes(slice(9)).extended(CODES[9:], VECTORS[9:])
    alone = prefixes(slice(9))
    for i in range(9, N):
        alone = alone.extended(CODES[i : i + 1], VECTORS[i : i + 1])
    torch.testing.assert_close(alone(ALL), together(ALL))
    torch.testing.assert_close(alone.nodes(ALL), together.nodes(ALL))


@pytest.mark.parametrize("vectors", [None, VECTORS])
def test_without_new_vectors_or_without_content_new_prefixes_are_silent(vectors):
    made = Prefixes(SIZES, D, CODES[:9], VECTORS[:9] if vectors is None else None).eval()
    longer = made.extended(CODES[9:], vectors)
    new = longer.nodes(ALL[9:])[:, -1]
    assert (new > 0).all()
    assert (longer.vectors()[new] == 0).all()


def test_without_codes_only_first_codes_have_rows():
    made = Prefixes(SIZES, D)
    assert (made.nodes(ALL)[:, 1:] == 0).all()
    assert made(ALL).shape == (N, len(SIZES), D)
