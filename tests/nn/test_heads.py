"""The streaming search against its definition: score everything, sort, traverse the heads' lists in turn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError
from tiglon.nn import heads
from tiglon.nn.heads import Keys, merge, ranked, search
from tiglon.types import MISSING, Behaviours

torch.set_num_threads(1)
HIDDEN = float("-inf")


class Case:
    """A search with small whole numbers: every sum is exact, so ties are ties, and there are many."""

    def __init__(self, B=2, K=3, A=2, d=3, L=40, N=9, J=2, sizes=False, seed=0, whole=True):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            if whole:
                return torch.randint(-2, 3, shape, generator=g).float()
            return torch.randn(shape, generator=g)

        self.query, self.key = draw(B, K, A, d), draw(N + 1, A, d)
        self.table, self.first = draw(4 * J, A), torch.arange(J) * 4
        lengths = torch.randint(0, L + 1, (B,), generator=g)
        lengths[0] = L
        self.past = Behaviours(
            torch.randint(-1, N, (B, L), generator=g),
            torch.randint(0, 4, (B, L, J), generator=g),
            torch.ones(B, L),
            torch.arange(L) < lengths[:, None],
            2.0 ** torch.randint(0, 3, (B, L), generator=g) if sizes else None,
        )

    def find(self, n, keys=None):
        keys = Keys.of(self.key) if keys is None else keys
        return search(self.query, keys, self.past.item, self.past, self.table, self.first, n)

    def alpha(self, key=None):
        """(B, K, A, L), from the formula."""
        key = self.key if key is None else key
        alpha = torch.einsum("bkad,blad->bkal", self.query, key[self.past.item])
        alpha = alpha + self.table[self.past.cross + self.first].sum(2).transpose(1, 2)[:, None]
        if self.past.size is not None:
            alpha = alpha + self.past.size.log()[:, None, None]
        return alpha.masked_fill(~self.past.mask[:, None, None], HIDDEN)


def by_sorting(alpha, n):
    """(score, position) of the n best of one list: Python's own sort on (score, newness)."""
    order = sorted((s, at) for at, s in enumerate(alpha) if s > HIDDEN)[::-1][:n]
    pad = min(n, len(alpha)) - len(order)
    return [s for s, _ in order] + [HIDDEN] * pad, [at for _, at in order] + [MISSING] * pad


def traversed(lists, n):
    """One candidate: the heads' lists in turn, duplicates dropped, until n are found."""
    found = []
    for turn in zip(*lists, strict=True):
        for at in turn:
            if at != MISSING and at not in found and len(found) < n:
                found.append(at)
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    K=st.integers(1, 5),
    A=st.integers(1, 4),
    d=st.integers(1, 9),
    L=st.integers(1, 60),
    J=st.integers(0, 3),
    n=st.integers(1, 70),
    sizes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_finds_what_sorting_finds(K, A, d, L, J, n, sizes, seed):
    case = Case(2, K, A, d, L, 7, J, sizes, seed)
    score, position = case.find(n)
    for b in range(2):
        for k in range(K):
            for a in range(A):
                wanted_score, wanted = by_sorting(case.alpha()[b, k, a].tolist(), n)
                if sizes:  # a logarithm is not exact: the scores agree, and the positions have them
                    np.testing.assert_allclose(score[b, k, a], wanted_score, atol=1e-5)
                else:
                    assert score[b, k, a].tolist() == wanted_score
                    assert position[b, k, a].tolist() == wanted
    torch.testing.assert_close(ranked(case.alpha(), n), position) if not sizes else None


@pytest.mark.parametrize("L", [511, 512, 513, 8191, 8192, 8193, 20000])
@pytest.mark.parametrize("n", [1, 100, 600])
def test_chunks_leave_no_seam(L, n):
    case = Case(1, 3, 2, 5, L, 500, 1, seed=L)
    score, position = case.find(n)
    alpha = case.alpha()
    torch.testing.assert_close(ranked(alpha, n), position)
    torch.testing.assert_close(alpha.gather(-1, position), score)


def test_equal_behaviours_score_equal_to_the_bit():
    """Wherever they stand in a tile, in a chunk, among however many candidates; the newest come first."""
    case = Case(1, 5, 3, 7, 9000, 4, 0, whole=False)
    case.past = case.past._replace(item=torch.full((1, 9000), 2))
    score, position = case.find(700)
    assert (score == score[..., :1]).all()
    assert (position == torch.arange(8999, 8299, -1)).all()
    for k in range(5):
        case_alone = Case(1, 5, 3, 7, 9000, 4, 0, whole=False)
        case_alone.past, case_alone.query = case.past, case.query[:, k : k + 1]
        assert torch.equal(case_alone.find(700)[0], score[:, k : k + 1])


def test_padding_is_never_found_though_it_scores_higher():
    case = Case(2, 2, 2, 4, 30, 5, 1, seed=3)
    case.table -= 50
    _, position = case.find(30)
    real = case.past.mask[1].sum()
    assert (position[1] < real).all()
    assert ((position[1] >= 0).sum(-1) == real).all()


def test_holes_are_never_found():
    case = Case(1, 2, 2, 4, 700, 50, 1, seed=3)
    case.past = case.past._replace(mask=torch.arange(700)[None] % 3 == 1)
    _, position = case.find(300)
    torch.testing.assert_close(ranked(case.alpha(), 300), position)
    assert ((position >= 0).sum(-1) == 233).all()


def test_an_empty_history_finds_nothing():
    case = Case(1, 2, 2, 4, 6)
    case.past = case.past._replace(mask=torch.zeros(1, 6, dtype=torch.bool))
    score, position = case.find(4)
    assert (position == MISSING).all()
    assert (score == HIDDEN).all()
    nothing = Case(1, 2, 2, 4, 0)
    assert nothing.find(4)[1].shape == (1, 2, 2, 0)
    assert merge(nothing.find(4)[1], 4).shape == (1, 2, 0)


@pytest.mark.parametrize("B, K", [(1, 3), (1, 29), (3, 3)])  # cut along the life, the candidates, not at all
def test_threads_change_nothing(B, K, monkeypatch):
    case = Case(B, K, 2, 4, 3000, 40, 1, seed=5)
    alone = case.find(50)
    monkeypatch.setattr(heads, "_SHARD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = case.find(50)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize(
    "storage, bytes_a_number, worst", [("float32", 4, 0.0), ("bfloat16", 2, 2**-8), ("int8", 1, 0.5 / 127)]
)
def test_storage(storage, bytes_a_number, worst):
    """The search reads what `decode` says, to the bit of the sum; rounding is as small as the storage allows."""
    case = Case(1, 4, 2, 8, 900, 300, 0, whole=False)
    keys = Keys.of(case.key, storage)
    assert keys.storage == storage
    assert keys.number.nbytes == case.key.numel() * bytes_a_number
    largest = case.key.abs().amax(-1, keepdim=True) if storage == "int8" else case.key.abs()
    assert ((keys.decode() - case.key).abs() <= worst * largest + 1e-9).all()
    score, position = case.find(50, keys)
    torch.testing.assert_close(case.alpha(keys.decode()).gather(-1, position), score)
    found = merge(position, 50)
    exact = merge(case.find(50)[1], 50)
    assert (found[..., None] == exact[..., None, :]).any(-1).float().mean() >= (1 if worst == 0 else 0.95)


def test_unknown_storage():
    with pytest.raises(ConfigError, match=r"storage 'int4'.*'float32', 'bfloat16' or 'int8'.*Pick one"):
        Keys.of(torch.zeros(2, 1, 4), "int4")


# -- merging -----------------------------------------------------------------------------------------------


def test_merging_by_hand():
    lists = torch.tensor([[[[5, 3, 1, 0], [3, 4, 5, 2]]]])
    assert merge(lists, 4).tolist() == [[[5, 3, 4, 1]]]
    assert merge(lists, 3).tolist() == [[[5, 3, 4]]]
    assert merge(lists, 1).tolist() == [[[5]]]
    assert merge(lists, 6).tolist() == [[[5, 3, 4, 1, 0, 2]]]
    assert merge(lists, 8).tolist() == [[[5, 3, 4, 1, 0, 2, -1, -1]]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(A=st.integers(1, 5), depth=st.integers(1, 12), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_merging_is_the_traversal(A, depth, n, seed):
    rng = np.random.default_rng(seed)
    lists = np.stack([[rng.permutation(15)[:depth] for _ in range(A)] for _ in range(3)])[None]
    lists[0, 2, :, depth // 2 :] = MISSING
    merged = merge(torch.from_numpy(lists), n)
    for k in range(3):
        found = traversed(lists[0, k].tolist(), n)
        assert merged[0, k].tolist() == found + [MISSING] * (min(n, A * depth) - len(found))


def test_one_head_is_its_list():
    _, position = Case(2, 3, 1, 4, 50, 9).find(10)
    assert torch.equal(merge(position, 10), position[:, :, 0])
