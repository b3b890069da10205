"""Losses against loops; what samples stand for; and the two things that in-batch softmax learns."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.errors import ConfigError
from tiglon.retrieval.frequency import FrequencyEstimator
from tiglon.retrieval.softmax import (
    Had,
    Negatives,
    UnigramSampler,
    accidental_hits,
    catalogue_softmax,
    in_batch_softmax,
    sampled_softmax,
)

torch.set_num_threads(1)
T, N, D = 6, 20, 5


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- in the batch ------------------------------------------------------------------------------------------


def nothing_hidden(t=T, c=None):
    return torch.zeros(t, c or t, dtype=torch.bool)


@pytest.mark.parametrize("corrected", [False, True])
def test_in_batch_softmax_is_its_loop(corrected):
    score, hidden = draw(T, T + 3), draw(T, T + 3, seed=1) > 0.5
    log_count = draw(T + 3, seed=2) if corrected else None
    found = in_batch_softmax(score, hidden, log_count)
    for t in range(T):
        total = own = math.exp(score[t, t])
        for c in range(T + 3):
            if c != t and not hidden[t, c]:
                total += math.exp(score[t, c] - (log_count[c] if corrected else 0.0))
        assert found[t].item() == pytest.approx(-math.log(own / total), rel=1e-5)


def test_a_batch_of_one_has_no_loss():
    score = draw(1, 1).requires_grad_()
    loss = in_batch_softmax(score, torch.ones(1, 1, dtype=torch.bool), torch.tensor([-math.inf]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert score.grad.item() == 0.0


def test_the_order_of_a_batch_does_not_matter():
    score, order = draw(T, T), torch.randperm(T, generator=torch.Generator().manual_seed(0))
    mixed = in_batch_softmax(score[order][:, order], nothing_hidden())
    torch.testing.assert_close(mixed, in_batch_softmax(score, nothing_hidden())[order])


def test_two_halves_are_not_the_whole():
    score, half = draw(T, T), T // 2
    halves = [in_batch_softmax(score[s, s], nothing_hidden(half)) for s in (slice(half), slice(half, T))]
    assert (torch.cat(halves) < in_batch_softmax(score, nothing_hidden())).all()


def test_accidental_hits_by_definition():
    candidate = torch.tensor([4, 9, 4, 7, 5, 4, 8])  # four targets, three drawn
    target, user = candidate[:4], torch.tensor([1, 2, 3, 1])
    history = torch.tensor([[5, 8], [0, 7], [0, 0], [3, 8]])
    mask = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]]).bool()
    found = accidental_hits(candidate, history, mask, user)
    for t in range(4):
        own = {int(i) for i, there in zip(history[t], mask[t], strict=True) if there}
        own |= {int(target[s]) for s in range(4) if user[s] == user[t]}
        assert found[t].tolist() == [int(i) in own for i in candidate]
    strangers = accidental_hits(candidate, history, mask & False, torch.full((4,), -1))
    assert torch.equal(strangers, target[:, None] == candidate)


def test_a_second_copy_of_the_positive_is_no_negative():
    score, target = draw(T, T), torch.tensor([3, 1, 3, 2, 5, 3])
    none = torch.zeros(T, 0, dtype=torch.int64)
    hidden = accidental_hits(target, none, none.bool(), torch.arange(T))
    raised = score.clone()
    raised[0, 2] = raised[0, 5] = 50.0
    torch.testing.assert_close(in_batch_softmax(raised, hidden)[0], in_batch_softmax(score, hidden)[0])


# -- what it learns ----------------------------------------------------------------------------------------


def correlations(corrected: bool) -> tuple[float, float]:
    """A table of free scores learns a small world: its correlation with log P(i|u) and with PMI.

    The batch holds each pair as often as the world does, so that its optimum is the world's.
    """
    rng, users, items = np.random.default_rng(0), 8, 16
    counts = 1 + rng.poisson(12 / np.arange(1, items + 1) * np.exp(rng.normal(size=(users, items))))
    user, item = (torch.from_numpy(np.repeat(at.ravel(), counts.ravel())) for at in np.indices(counts.shape))
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    log_pmi = log_p - np.log(counts.sum(axis=0) / counts.sum())
    hidden, log_count = nothing_hidden(len(item)), None
    if corrected:
        estimator = FrequencyEstimator(rate=0.002)
        for _ in range(60):
            estimator.update(item[torch.from_numpy(rng.permutation(len(item)))])
        hidden, log_count = item[:, None] == item, ((len(item) - 1) * estimator.probability(item)).log()
    table = torch.zeros(users, items, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = in_batch_softmax(table[user][:, item], hidden, log_count).mean()
        value.backward()
        return value

    optimizer.step(loss)

    def correlation(truth):
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (table.detach().numpy(), truth))
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    return correlation(log_p), correlation(log_pmi)


def test_plain_it_learns_pmi_and_corrected_the_probability():
    log_p, pmi = correlations(corrected=False)
    assert pmi > 0.999 > 0.9 > log_p
    log_p, pmi = correlations(corrected=True)
    assert log_p > 0.99 > 0.9 > pmi


# -- drawn -------------------------------------------------------------------------------------------------


def test_a_sampled_softmax_estimates_the_whole_one():
    user, vectors = draw(T, D), draw(N, D, seed=1)
    target = torch.arange(T)
    torch.manual_seed(0)
    drawn = UnigramSampler(np.arange(N) ** 2, 200_000).draw()
    found = sampled_softmax(user, vectors[target], vectors[drawn.item], target, drawn)
    torch.testing.assert_close(found, catalogue_softmax(user, vectors, target), atol=0.02, rtol=0)


def test_with_every_item_once_it_is_the_whole_one():
    user, vectors, target = draw(T, D), draw(N, D, seed=1), torch.arange(T)
    every = Negatives(torch.arange(N), torch.zeros(N))
    torch.testing.assert_close(
        sampled_softmax(user, vectors[target], vectors, target, every),
        F.cross_entropy(user @ vectors.T, target, reduction="none"),
    )


def what_they_had():
    """Rows whose target is new, and old; that had an item twice; and nothing."""
    item = torch.tensor([[7, 9, 7], [1, 8, 3], [2, 2, 2], [0, 0, 0], [5, 4, 0], [19, 5, 11]])
    first = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    return Had(item, draw(T, 3, seed=5), first)


def test_what_was_had_before_is_offset_once():
    user, vectors, target, had = draw(T, D), draw(N, D, seed=1), torch.arange(T), what_they_had()
    logits = user @ vectors.T
    for t in range(T):
        for item, offset, first in zip(had.item[t], had.offset[t], had.there[t], strict=True):
            logits[t, item] += offset * first
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(catalogue_softmax(user, vectors, target, had), expected)
    every = Negatives(torch.arange(N), torch.zeros(N))
    known = torch.einsum("td,tmd->tm", user, vectors[had.item])
    found = sampled_softmax(user, vectors[target], vectors, target, every, had, known)
    torch.testing.assert_close(found, expected)


def test_what_was_had_is_not_estimated():
    """Draws of it change nothing."""
    user, vectors, target, had = draw(T, D), draw(N, D, seed=1), torch.arange(T), what_they_had()
    row = slice(5, 6)
    some = Had(*(x[row] for x in had))
    given = user[row], vectors[target[row]]
    found = [
        sampled_softmax(
            *given,
            vectors[drawn],
            target[row],
            Negatives(drawn, torch.zeros(len(drawn))),
            some,
            torch.einsum("td,tmd->tm", user[row], vectors[some.item]),
        )
        for drawn in (torch.tensor([1, 2]), torch.tensor([1, 19, 2, 11, 11]))
    ]
    torch.testing.assert_close(*found)


def test_nothing_but_the_target_drawn_is_no_loss():
    user, vectors = draw(1, D), draw(N, D, seed=1)
    only = Negatives(torch.tensor([3, 3]), torch.zeros(2))
    assert sampled_softmax(user, vectors[[3]], vectors[[3, 3]], torch.tensor([3]), only).item() == 0


def test_the_sampler_draws_as_it_says():
    torch.manual_seed(0)
    sampler = UnigramSampler(np.arange(N), 100_000)
    drawn = sampler.draw()
    counts = np.bincount(drawn.item.numpy(), minlength=N)
    np.testing.assert_allclose(counts, sampler.log_count.exp().numpy(), rtol=0.15)
    assert torch.equal(drawn.log_count, sampler.log_count[drawn.item])
    with pytest.raises(ConfigError, match="0 negatives"):
        UnigramSampler(np.arange(N), 0)
