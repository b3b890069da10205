"""Beam search against exhaustive enumeration, on models that are plain tables."""

import itertools

import numpy as np
import pytest

from tiglon.errors import ConfigError
from tiglon.retrieval.beam import beam_search
from tiglon.semantic_ids.trie import Trie
from tiglon.types import MISSING, Histories

SIZES = (4, 3, 5)


def table_model(users, seed=0):
    """A step whose logits are a random function of (user, prefix), and that function."""
    tables = [
        np.random.default_rng([seed, depth]).normal(size=(users, *SIZES[: depth + 1])).astype(np.float32) * 2
        for depth in range(3)
    ]

    def start():
        prefixes = [[()] for _ in range(users)]

        def step(depth, beam, code):
            if beam is not None:
                for b in range(users):
                    prefixes[b] = [prefixes[b][w] + (c,) for w, c in zip(beam[b], code[b], strict=True)]
            return np.stack([[tables[depth][(b, *p)] for p in prefixes[b]] for b in range(users)])

        return step

    return start, tables


def catalogue(n, seed=0):
    every = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
    return np.random.default_rng(seed).permutation(every)[:n]


def exhaustive(tables, codes, user, renormalise):
    """log p of every item, from the definition."""
    scores = []
    for row in codes:
        total = 0.0
        for depth, code in enumerate(row):
            logits = tables[depth][(user, *row[:depth])].astype(np.float64)
            if renormalise:
                same = (codes[:, :depth] == row[:depth]).all(axis=1)
                logits = logits[np.unique(codes[same, depth])]
                total += tables[depth][(user, *row[: depth + 1])]
            else:
                total += logits[code]
            total -= np.log(np.exp(logits).sum())
        scores.append(total)
    return np.array(scores)


@pytest.mark.parametrize("renormalise", [True, False])
def test_wide_beam_is_exhaustive(renormalise):
    codes = catalogue(40)
    start, tables = table_model(3)
    found = beam_search(start(), Trie.build(codes, SIZES), 3, 40, width=40, renormalise=renormalise)
    for user in range(3):
        truth = exhaustive(tables, codes, user, renormalise)
        np.testing.assert_array_equal(found.item[user], np.argsort(-truth, kind="stable"))
        np.testing.assert_allclose(found.score[user], np.sort(truth)[::-1], atol=1e-5)
        total = np.exp(truth).sum()
        assert total == pytest.approx(1) if renormalise else total < 1


def test_conventions_rank_differently():
    codes = catalogue(12)
    trie = Trie.build(codes, SIZES)
    lists = [
        beam_search(table_model(1)[0](), trie, 1, 12, width=12, renormalise=r).item.tolist()
        for r in (True, False)
    ]
    assert lists[0] != lists[1]


def test_fewer_items_than_k_leaves_missing_ones():
    codes = catalogue(3)
    found = beam_search(table_model(2)[0](), Trie.build(codes, SIZES), 2, 8, width=10)
    assert (found.item[:, 3:] == MISSING).all()
    assert sorted(found.item[0, :3]) == [0, 1, 2]


def test_seen_items_are_left_out_and_cost_no_beam():
    codes = catalogue(30)
    start, tables = table_model(2)
    truth = exhaustive(tables, codes, 1, True)
    best = np.argsort(-truth, kind="stable")
    seen = Histories.of([[], [best[0], best[1], best[1], best[3]]])
    found = beam_search(start(), Trie.build(codes, SIZES), 2, 26, width=27, seen=seen, codes=codes)
    expected = [i for i in best if i not in (best[0], best[1], best[3])][:26]
    np.testing.assert_array_equal(found.item[1], expected)
    # A beam of one under a prefix whose only item was seen must go elsewhere rather than die.
    lonely = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], np.int32)
    tables[0][:, 0] = 50.0
    found = beam_search(
        start(), Trie.build(lonely, SIZES), 2, 1, width=1, seen=Histories.of([[0], []]), codes=lonely
    )
    assert found.item[0, 0] in (1, 2)
    assert found.item[1, 0] == 0


def test_removed_and_added_items():
    codes = catalogue(30)
    trie = Trie.build(codes[:20], SIZES).add(codes[20:], np.arange(20, 30)).remove(np.arange(5))
    start, tables = table_model(1)
    found = beam_search(start(), trie, 1, 30, width=30, renormalise=False)
    truth = exhaustive(tables, codes, 0, False)
    truth[:5] = -np.inf
    np.testing.assert_array_equal(found.item[0, :25], np.argsort(-truth, kind="stable")[:25])


@pytest.mark.parametrize("seed", range(20))
def test_removed_items_that_were_seen_hide_no_others(seed):
    codes = catalogue(40, seed)
    rng = np.random.default_rng(seed)
    gone, had = (rng.permutation(40)[: rng.integers(1, 30)] for _ in range(2))
    trie = Trie.build(codes[:30], SIZES).add(codes[30:], np.arange(30, 40)).remove(gone)
    start, tables = table_model(1, seed)
    seen, left = Histories.of([had]), np.setdiff1d(np.arange(40), np.union1d(gone, had))
    truth = exhaustive(tables, codes, 0, False)
    best = left[np.argsort(-truth[left], kind="stable")]
    found = beam_search(start(), trie, 1, 40, width=40, seen=seen, codes=codes, renormalise=False)
    assert found.item[0, found.item[0] != MISSING].tolist() == best.tolist()
    narrow = beam_search(start(), trie, 1, 1, width=1, seen=seen, codes=codes, renormalise=False)
    assert (narrow.item[0, 0] in left) == (len(left) > 0)


@pytest.mark.parametrize("seed", range(20))
def test_seen_and_denied_items_together_close_what_they_fill(seed):
    """A narrow beam never ends on a prefix whose items were partly seen and partly denied."""
    codes, rng = catalogue(40, seed), np.random.default_rng(seed)
    deny, had = rng.random(40) < rng.random(), rng.permutation(40)[: rng.integers(1, 30)]
    trie = Trie.build(codes[:30], SIZES).add(codes[30:], np.arange(30, 40)).remove(np.array([4, 33]))
    start, tables = table_model(1, seed)
    left = np.setdiff1d(np.flatnonzero(~deny), [*had, 4, 33])
    truth = exhaustive(tables, codes, 0, False)
    best = left[np.argsort(-truth[left], kind="stable")]
    given = {"codes": codes, "seen": Histories.of([had]), "deny": deny, "renormalise": False}
    wide = beam_search(start(), trie, 1, 40, width=40, **given)
    assert wide.item[0, wide.item[0] != MISSING].tolist() == best.tolist()
    np.testing.assert_allclose(wide.score[0, : len(best)], truth[best], atol=1e-5)
    narrow = beam_search(start(), trie, 1, 1, width=1, **given)
    assert (narrow.item[0, 0] in left) == (len(left) > 0)


def test_seen_or_denied_items_need_codes():
    trie = Trie.build(catalogue(5), SIZES)
    for given in ({"seen": Histories.of([[0]])}, {"deny": np.zeros(5, bool)}):
        with pytest.raises(ConfigError, match=r"without codes\. Pass the codes"):
            beam_search(table_model(1)[0](), trie, 1, 5, width=5, **given)


def test_nothing_is_found_where_nothing_is_left():
    trie = Trie.build(catalogue(3), SIZES).remove(np.arange(3))
    found = beam_search(table_model(2)[0](), trie, 2, 4, width=5)
    assert found.item.tolist() == [[MISSING] * 4] * 2


def test_sampling_draws_without_replacement_from_the_model():
    codes = catalogue(6, seed=3)
    _, tables = table_model(1, seed=3)
    p = np.exp(exhaustive(tables, codes, 0, True))
    trie = Trie.build(codes, SIZES)
    users = 20_000
    prefix = np.zeros((users, 1, 0), np.int64)

    def step(depth, beam, code):  # every user has the same logits
        nonlocal prefix
        if beam is not None:
            before = np.take_along_axis(prefix, beam[..., None], axis=1)
            prefix = np.concatenate([before, code[..., None]], axis=2)
        row = np.zeros(prefix.shape[:2], np.int64)
        return tables[depth][(row, *np.moveaxis(prefix, 2, 0))]

    draws = beam_search(step, trie, users, 2, width=2, seed=0).item
    share = np.bincount(draws.ravel(), minlength=6) / users
    # P(i among two draws without replacement) = p_i + Σ_j p_j · p_i / (1 − p_j)
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
    np.testing.assert_allclose(share, expected, atol=0.01)
    assert (draws[:, 0] != draws[:, 1]).all()


def test_temperature_flattens():
    codes = catalogue(40)
    trie = Trie.build(codes, SIZES)
    sharp, flat = (
        beam_search(table_model(1)[0](), trie, 1, 40, width=40, temperature=t).score[0] for t in (0.5, 5.0)
    )
    assert np.ptp(sharp) > np.ptp(flat)


def test_bad_width_and_temperature():
    trie = Trie.build(catalogue(5), SIZES)
    with pytest.raises(ConfigError, match=r"a beam of 3 for 5 items\. The beam is at least k wide"):
        beam_search(table_model(1)[0](), trie, 1, 5, width=3)
    for temperature in (0, -1, 1e-50, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="A temperature is finite and above 0"):
            beam_search(table_model(1)[0](), trie, 1, 5, width=5, temperature=temperature)
