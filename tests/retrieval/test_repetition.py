"""What one had: weights by hand, in training as in answers; codes as the mean of the items below them."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.retrieval import windows
from tiglon.retrieval.repetition import LEAST, STEP, Had, Repetition, Returns, padded, shares
from tiglon.retrieval.windows import Earlier, collate, earlier_in_rows, earlier_of, moments
from tiglon.semantic_ids.trie import Trie
from tiglon.types import Histories, Interactions, Vocabulary

torch.set_num_threads(1)

WEIGHT = torch.tensor([-0.3, 0.5, 0.1, -0.2, 0.4, 0.0])
LIFE = [(4, 0), (4, 1), (9, 1), (4, 2), (2, 3), (9, 3), (5, 4)]  # item, moment; the next moment is 5
AT_5 = {
    4: [2, 2, 1],
    9: [2, 1],
    2: [1],
    5: [0],
}  # item: the bucket of each time, 5, 4, 3; 4, 2; 2; 1 moments ago


def repetition():
    made = Repetition()
    made.weight.data.copy_(WEIGHT)
    return made


def log_k(buckets):
    return math.log(sum(math.exp(STEP * WEIGHT[b].item()) for b in buckets))


def test_what_one_had_is_weighed_by_when():
    items, times = (np.array(x) for x in zip(*LIFE, (8, 0), (8, 0), strict=True))
    histories = Histories(np.array([0, 7, 7, 9]), items, times)
    owner, item, offset = repetition().of(histories)
    found = dict(zip(zip(owner.tolist(), item.tolist(), strict=True), offset.tolist(), strict=True))
    by_hand = {(0, i): log_k(buckets) for i, buckets in AT_5.items()} | {(2, 8): log_k([0, 0])}
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_ages_begin_where_they_say():
    bucket = {1: 0, 2: 1, 3: 1, 4: 2, 7: 2, 8: 3, 15: 3, 16: 4, 31: 4, 32: 5, 1000: 5}
    found = repetition().log_weight(torch.tensor(list(bucket))) / STEP
    torch.testing.assert_close(found, WEIGHT[list(bucket.values())])


def test_training_sees_what_an_answer_would():
    """Of each target what came before its moment, not its own basket, nothing later."""
    items, times = zip(*LIFE, strict=True)
    log = Interactions(np.zeros(7, np.int32), np.array(items, np.int32), np.array(times), Vocabulary(["u"]),
                       Vocabulary(list(range(10))))  # fmt: skip
    rows = log.item, moments(log), np.ones(7, bool), np.zeros(7, np.int64)
    had = repetition().before(collate(*rows, np.array([[0, 7, 0]]), 9))
    for t, (_, moment) in enumerate(LIFE):
        past = [(i, m) for i, m in LIFE if m < moment]
        if past:
            history = Histories.of([[i for i, _ in past]])
            history = Histories(history.offsets, history.item, np.array([m for _, m in past]))
            # an answer is asked for right after the last moment, and so is a target: no moment lies between
            _, item, offset = repetition().of(history)
            expected = dict(zip(item.tolist(), offset.tolist(), strict=True))
        else:
            expected = {}
        there = had.there[t]
        found = zip(had.item[t][there].tolist(), had.offset[t][there].tolist(), strict=True)
        assert dict(found) == pytest.approx(expected, rel=1e-5)


def test_training_looks_beyond_its_window():
    """At the whole life, as an answer does, and both no farther back than REMEMBERED."""
    items, times = zip(*LIFE, strict=True)
    log = Interactions(np.repeat(np.arange(3, dtype=np.int32), 7), np.array(3 * items, np.int32), np.array(3 * times),
                       Vocabulary(["a", "b", "c"]), Vocabulary(list(range(10))))  # fmt: skip
    rows = log.item, moments(log), np.ones(21, bool), log.user.astype(np.int64)
    whole = collate(*rows, np.array([[7, 14, 7]]), 7)
    end = collate(*rows, np.array([[12, 14, 13]]), 2)
    for part in zip(whole.earlier, end.earlier, strict=True):
        torch.testing.assert_close(part[0][6:], part[1])
    for part in zip(whole.earlier, earlier_in_rows(whole), strict=True):
        torch.testing.assert_close(*part)
    assert sorted(end.earlier.item[0].tolist()) == [2, 4, 9]
    assert earlier_in_rows(end).item.tolist() == [[9]]


def test_neither_looks_farther_back_than_is_remembered(monkeypatch):
    monkeypatch.setattr(windows, "REMEMBERED", 3)
    monkeypatch.setattr("tiglon.retrieval.repetition.REMEMBERED", 3)
    items, times = zip(*LIFE, strict=True)
    life = Histories(np.array([0, 0, 7]), np.array(items), np.array(times))
    before = earlier_of(life)
    assert before.item.tolist()[1] == [5, 9, 2]
    assert not before.times[0].any()
    owner, item, offset = repetition().of(life)
    had = repetition()(before)
    expected = dict(zip(before.item[1].tolist(), had.offset[1].tolist(), strict=True))
    assert dict(zip(item.tolist(), offset.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
    assert owner.tolist() == [1, 1, 1]


def test_alone_it_learns_how_likely_it_is():
    """Users who had one item, of ten alike: of those who had it a moment ago 60% take it again, of the others 1%."""
    made, users = Repetition(), 1000
    age = torch.where(torch.arange(users) < 500, 1, 5)[:, None]
    again = torch.cat([torch.arange(500) < 300, torch.arange(500) < 5])
    item = torch.where(again, 3, 4)
    everyone = torch.arange(users)
    had = Earlier(torch.full((users, 1), 3), F.one_hot((age > 1) * 2, 6).float())
    made.learn_alone(
        had, torch.zeros(users, 1), torch.full((users,), 9.0).log(), (everyone, item, torch.zeros(users))
    )
    k = made.log_weight(torch.tensor([1, 5])).exp()
    torch.testing.assert_close(k / (k + 9), torch.tensor([0.6, 0.01]), rtol=1e-2, atol=1e-3)


def test_what_never_happens_leaves_every_weight_finite():
    """However likely the network holds it: logits of 60 are those of a sharp temperature."""
    users, random = 50, torch.Generator().manual_seed(0)
    times = F.one_hot(torch.randint(6, (users, 4), generator=random), 6).float()
    had, score = Earlier(torch.arange(4).expand(users, 4), times), 60 * torch.rand(users, 4, generator=random)
    made, everyone = Repetition(), torch.arange(users)
    made.learn_alone(had, score, torch.zeros(users), (everyone, torch.full((users,), 9), torch.zeros(users)))
    assert made.weight.isfinite().all()
    assert (score + made(had).offset).logsumexp(dim=1).sigmoid().mean() < 1e-3


def test_rows_are_filled_up():
    owner, value = np.array([0, 0, 2, 2, 2]), np.array([5, 1, 9, 8, 7])
    assert padded(owner, 4, value, -1).tolist() == [[5, 1, -1], [-1, -1, -1], [9, 8, 7], [-1, -1, -1]]
    assert padded(owner[:0], 2, value[:0], 0).shape == (2, 0)


# -- code by code ------------------------------------------------------------------------------------------

SIZES = (3, 2, 4)
CODES = (
    np.random.default_rng(0).permutation(list(itertools.product(*map(range, SIZES))))[:17].astype(np.int32)
)


def test_an_items_share_is_one_over_those_who_share_its_codes():
    found = shares(Trie.build(CODES, SIZES), CODES)
    for i, s in np.ndindex(*CODES.shape):
        together = (CODES[:, : s + 1] == CODES[i, : s + 1]).all(axis=1).sum()
        assert found[i, s] == pytest.approx(1 / together)


def test_a_removed_item_has_no_share_and_the_others_share_without_it():
    kept = np.delete(np.arange(len(CODES)), 4)
    found = shares(Trie.build(CODES, SIZES).remove(np.array([4])), CODES)
    assert not found[4].any()
    torch.testing.assert_close(found[kept], shares(Trie.build(CODES[kept], SIZES), CODES[kept]))


def test_a_codes_factor_is_the_mean_over_the_items_below_it():
    codes = torch.from_numpy(CODES.astype(np.int64))
    weight = shares(Trie.build(CODES, SIZES), CODES)
    item = torch.tensor([[3, 8, 3, 11, 0], [0, 0, 0, 0, 0]])
    first = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    offset = torch.tensor([[0.7, -4.0, 9.0, -60.0, 9.0], [9.0] * 5])
    returns = Returns.before(Had(item, offset, first), codes, weight)
    factor = {3: math.exp(0.7), 8: math.exp(-4.0), 11: 0.0}
    for s, size in enumerate(SIZES):
        for before in itertools.product(*map(range, SIZES[:s])):
            found = returns.log_factor(torch.tensor([before, before]).view(2, s), size)
            for code in range(size):
                below = np.flatnonzero((CODES[:, : s + 1] == (*before, code)).all(axis=1))
                mean = np.mean([factor.get(i, 1.0) for i in below]) if len(below) else 1.0
                assert found[0, code].item() == pytest.approx(math.log(max(mean, LEAST)), abs=0.02)
    assert (found[1] == 0).all()


def test_beams_read_what_their_user_had():
    codes = torch.from_numpy(CODES.astype(np.int64))
    trie = Trie.build(CODES, SIZES)
    histories = Histories.of([[3, 8, 3], [], [11]])
    returns = Returns.of(repetition(), histories, codes, trie)
    before = torch.randint(0, 2, (3, 6, 2), generator=torch.Generator().manual_seed(0))
    found = returns.log_factor(before, SIZES[2])
    assert found.shape == (3, 6, SIZES[2])
    for b in range(3):
        alone = Returns.of(repetition(), histories.take(slice(b, b + 1)), codes, trie)
        for w in range(6):
            one = alone.log_factor(before[b : b + 1, w : w + 1], SIZES[2])[0, 0]
            torch.testing.assert_close(found[b, w], one)
    assert found[0].any()
    assert not found[1].any()
    share = shares(trie, CODES)
    for item, gain in zip((3, 8), returns.gain[0, 0], strict=False):
        assert (gain / share[item]).std() < 1e-6  # (K − 1) / n at every position
    nobody = Returns.of(repetition(), Histories.of([[], []]), codes, trie)
    assert not nobody.log_factor(torch.zeros(2, 1, 0, dtype=torch.int64), SIZES[0]).any()
