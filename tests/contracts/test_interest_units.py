"""What every interest unit promises. A new one joins with a line: in SELECTORS if it attends to a chosen few
behaviours (embed, k → unit), else in UNITS (embed → unit)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.bst import BST
from tiglon.ranking.can import CAN
from tiglon.ranking.dare import Dare
from tiglon.ranking.dien import DIEN
from tiglon.ranking.din import DIN
from tiglon.ranking.eta import Eta
from tiglon.ranking.mimn import MIMN
from tiglon.ranking.pooling import ChunkPooling, FullAttention, MeanPooling, MostRecent
from tiglon.ranking.ranker import Interest, InterestUnit, Ranker, RankerConfig
from tiglon.ranking.sdim import Sdim
from tiglon.ranking.sim import SimHard, SimSoft
from tiglon.ranking.twin import Twin
from tiglon.ranking.twin_v2 import TwinV2
from tiglon.ranking.units import UNITS as NAMED
from tiglon.ranking.units import UnitConfig
from tiglon.types import MISSING, Behaviours, RankingBatch

SELECTORS: dict[str, Callable[[FeatureEmbedding, int], InterestUnit]] = {
    "most recent": lambda embed, k: MostRecent(embed, k=k),
    "SIM hard": lambda embed, k: SimHard(embed, category=1, k=k),
    "SIM soft": lambda embed, k: SimSoft(embed, k=k),
    "ETA": lambda embed, k: Eta(embed, k=k),
    "DARE": lambda embed, k: Dare(embed, k=k),
    "TWIN": lambda embed, k: Twin(embed, k=k),
    "TWIN V2": lambda embed, k: TwinV2(embed, k=k),
}

UNITS: dict[str, Callable[[FeatureEmbedding], InterestUnit]] = {
    "mean pooling": MeanPooling,
    "full attention": FullAttention,
    "chunk pooling": lambda embed: ChunkPooling(embed, chunk=4),
    "SDIM": Sdim,
    "DIN": DIN,
    "DIEN": DIEN,
    "BST": BST,
    "CAN": CAN,
    "MIMN": MIMN,
    **{name: lambda embed, make=make: make(embed, 3) for name, make in SELECTORS.items()},
}

# Item 12 with category 4 and the last code of each cross feature stand in padding only.
N, JUNK_ITEM, CATEGORIES = 13, 12, 5
CROSS_SIZES = (5, 7)


def embedding(crosses: tuple[int, ...] = CROSS_SIZES) -> FeatureEmbedding:
    torch.manual_seed(7)
    item = np.arange(N)
    codes = np.stack([item + 1, np.where(item == JUNK_ITEM, CATEGORIES - 1, 1 + item % 3)], axis=1)
    codes = np.concatenate([codes, [[0, 0]]])
    return FeatureEmbedding(codes, (N + 1, CATEGORIES), (12, 4), crosses, (3,), std=0.5)


class Row(NamedTuple):
    """One user's life, oldest first: items (L,), cross codes (L, J), gaps (L,)."""

    item: np.ndarray
    cross: np.ndarray
    gap: np.ndarray


def row(items: list[int], seed: int = 0, crosses: tuple[int, ...] = CROSS_SIZES) -> Row:
    rng = np.random.default_rng(seed)
    cross = np.stack([rng.integers(0, size - 1, len(items)) for size in crosses], 1) if crosses else None
    gap = np.sort(rng.uniform(1, 1000, len(items)))[::-1].astype(np.float32)
    return Row(
        np.array(items, np.int64), np.zeros((len(items), 0), np.int64) if cross is None else cross, gap
    )


def past(rows: list[Row], length: int | None = None, junk: int = 0) -> Behaviours:
    """Padded to `length`; `junk` seeds what stands in the padding."""
    rng = np.random.default_rng(junk)
    J = rows[0].cross.shape[1]
    shape = (len(rows), max(len(r.item) for r in rows) if length is None else length)
    item = rng.choice([JUNK_ITEM, MISSING] if junk else [JUNK_ITEM], shape)
    cross = (
        np.stack([np.full(shape, size - 1) for size in CROSS_SIZES[:J]], -1) if J else np.zeros((*shape, 0))
    )
    gap = rng.uniform(0.5, 5000, shape)
    mask = np.zeros(shape, bool)
    for b, r in enumerate(rows):
        n = len(r.item)
        item[b, :n], cross[b, :n], gap[b, :n], mask[b, :n] = r.item, r.cross, r.gap, True
    return Behaviours(
        torch.tensor(item),
        torch.tensor(cross, dtype=torch.int64),
        torch.tensor(gap).float(),
        torch.tensor(mask),
    )


ROWS = [
    row([0, 4, 1, 1, 7, 2, 5, 9, 3, 0, 6], 1),  # more than a unit may choose
    row([], 2),
    row([3], 3),
    row([2, 2, 2, 2, 2, 2, 2], 4),
    row([MISSING, 5, MISSING, 8], 5),
    row([MISSING], 6),
]
ITEMS = torch.tensor(
    [[0, 4, 2, 10], [1, 2, 3, 4], [3, 4, 8, 5], [2, 5, 1, 11], [5, 8, MISSING, 0], [1, 2, 3, 9]]
)


@pytest.fixture
def embed() -> FeatureEmbedding:
    return embedding()


@pytest.fixture(params=UNITS)
def make(request: pytest.FixtureRequest) -> Callable[[FeatureEmbedding], InterestUnit]:
    def made(embed: FeatureEmbedding, seed: int = 11) -> InterestUnit:
        torch.manual_seed(seed)
        return UNITS[request.param](embed).eval()

    return made


@pytest.fixture
def unit(make, embed) -> InterestUnit:
    return make(embed)


def same(found: Interest, expected: Interest) -> None:
    torch.testing.assert_close(found.vector, expected.vector, atol=2e-6, rtol=2e-5)


def test_a_vector_a_candidate(unit, embed):
    found = unit(embed, ITEMS, past(ROWS))
    assert found.vector.shape == (*ITEMS.shape, unit.width)
    assert found.vector.isfinite().all()


@pytest.mark.parametrize("length", [11, 12, 16, 40])
def test_padding_never_matters(unit, embed, length):
    found = unit(embed, ITEMS, past(ROWS, length, junk=length))
    same(found, unit(embed, ITEMS, past(ROWS)))


def test_padding_teaches_nothing(unit, embed):
    """The vector, and what a unit learns by beside it, with other things in the padding."""
    unit.train()
    found = []
    for junk in (1, 2):
        torch.manual_seed(3)  # of drawn negatives
        found.append(unit(embed, ITEMS, past(ROWS, 16, junk=junk)))
    same(*found)
    for extra in ("loss", "logit"):
        one, other = (getattr(interest, extra) for interest in found)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


def test_a_row_alone_is_the_row_in_a_batch(unit, embed):
    together = unit(embed, ITEMS, past(ROWS)).vector
    for b, one in enumerate(ROWS):
        alone = unit(embed, ITEMS[b : b + 1], past([one]))
        same(alone, Interest(together[b : b + 1]))


def test_a_candidate_alone_is_the_candidate_among_others(unit, embed):
    together = unit(embed, ITEMS, past(ROWS)).vector
    for k in range(ITEMS.shape[1]):
        same(unit(embed, ITEMS[:, k : k + 1], past(ROWS)), Interest(together[:, k : k + 1]))


@pytest.mark.parametrize("items", [[], [4], [4] * 9, [MISSING], [MISSING] * 5], ids=str)
@pytest.mark.parametrize("length", [None, 9])
def test_odd_histories_are_finite(unit, embed, items, length):
    found = unit(embed, torch.tensor([[4, 0, MISSING]]), past([row(items)], length, junk=3))
    assert found.vector.isfinite().all()
    assert found.loss is None or found.loss.isfinite()


def test_an_empty_history_is_empty_however_long(unit, embed):
    same(
        unit(embed, ITEMS, past([row([])] * len(ITEMS), 6, junk=1)),
        unit(embed, ITEMS, past([row([])] * len(ITEMS))),
    )


def test_what_was_done_matters(unit, embed):
    one, other = (unit(embed, ITEMS[:1], past([row(items)])) for items in ([0, 4, 1], [8, 10, 3]))
    assert not torch.allclose(one.vector, other.vector)


def test_entries_of_size_one_are_plain_behaviours(unit, embed):
    plain = past(ROWS, 14)
    same(unit(embed, ITEMS, plain._replace(size=torch.ones(plain.gap.shape))), unit(embed, ITEMS, plain))


def test_every_named_unit_is_here():
    made = {type(make(embedding())) for make in UNITS.values()}
    config = UnitConfig()
    assert {type(make(embedding(), config, 1)) for make in NAMED.values()} == made


@pytest.mark.parametrize("train", [False, True], ids=["answering", "learning"])
def test_gradients_reach_real_behaviours_only(unit, embed, train):
    candidates = ITEMS.clamp(max=JUNK_ITEM - 1)
    found = unit.train(train)(embed, candidates, past(ROWS, 16))
    score = found.vector.square().sum()
    for extra in (found.loss, found.logit):
        score = score if extra is None else score + extra.sum()
    score.backward()
    tables = [*embed.items, *(part for part in unit.modules() if isinstance(part, torch.nn.Embedding))]
    learnt = [table.weight.grad for table in tables if table.weight.grad is not None]
    ids = [grad for grad in learnt if len(grad) == N + 1]
    assert all((grad[JUNK_ITEM + 1] == 0).all() for grad in ids)
    assert all((grad[CATEGORIES - 1] == 0).all() for grad in learnt if len(grad) == CATEGORIES)
    assert any(grad[1:].abs().sum() > 0 for grad in ids)
    for table in embed.crosses:
        assert table.weight.grad is None or (table.weight.grad[-1] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*embed.parameters(), *unit.parameters()])


def test_asked_twice_it_answers_the_same(unit, embed):
    first, again = (unit(embed, ITEMS, past(ROWS)) for _ in range(2))
    assert torch.equal(first.vector, again.vector)


def test_without_cross_features(make):
    embed = embedding(crosses=())
    rows = [row([0, 4, 1], 1, crosses=()), row([], 2, crosses=())]
    found = make(embed)(embed, ITEMS[:2], past(rows, 5))
    assert found.vector.isfinite().all()
    same(found, make(embed)(embed, ITEMS[:2], past(rows)))


def test_its_weights_are_all_there_is(make, embed):
    """Another unit with the same state_dict answers the same."""
    unit = make(embed)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(0.1)
    again = make(embed, seed=12)  # what is drawn at random and never trained is in it, too
    again.load_state_dict(unit.state_dict())
    assert torch.equal(again(embed, ITEMS, past(ROWS)).vector, unit(embed, ITEMS, past(ROWS)).vector)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_inside_the_shell_it_learns(make, embed, low):
    unit = make(embed)
    model = Ranker(embed, long=unit, config=RankerConfig(hidden=(8,))).train()
    label = torch.tensor([1.0, 0.0, 0.0, float("nan")]).expand(len(ITEMS), -1)[..., None]
    batch = RankingBatch(ITEMS, past(ROWS, 13), torch.ones(len(ITEMS), 1, dtype=torch.int64), label)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        losses = model.loss(batch)
    assert losses.shape == (3 * len(ITEMS),)
    assert losses.isfinite().all()
    losses.mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


# -- units that choose -----------------------------------------------------------------------------------------


@pytest.fixture(params=SELECTORS)
def choose(request: pytest.FixtureRequest) -> Callable[[FeatureEmbedding, int], InterestUnit]:
    def made(embed: FeatureEmbedding, k: int) -> InterestUnit:
        torch.manual_seed(11)
        return SELECTORS[request.param](embed, k).eval()

    return made


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [2, 5, 17, 64])
@pytest.mark.parametrize("padding", [0, 7])
def test_of_equal_behaviours_the_newest_are_chosen(choose, embed, k, n, padding):
    one = row([4], 1)
    equal = Row(*(np.repeat(part, n, axis=0) for part in one))
    found = choose(embed, k)(embed, torch.tensor([[4, 10]]), past([equal], n + padding, junk=1))
    expected = list(range(max(n - k, 0), n))
    for chosen in found.chosen.reshape(-1, found.chosen.shape[-1]).tolist():
        assert sorted(at for at in chosen if at >= 0) == expected


def test_the_chosen_are_real_and_distinct(choose, embed):
    behaviours = past(ROWS, 16, junk=2)
    found = choose(embed, 3)(embed, ITEMS, behaviours)
    assert found.chosen.shape[0] == len(ROWS)
    assert found.chosen.shape[1] in (1, ITEMS.shape[1])
    for b, of_row in enumerate(found.chosen.tolist()):
        for chosen in of_row:
            real = [at for at in chosen if at >= 0]
            assert len(real) == len(set(real)) <= 3
            assert all(at < len(ROWS[b].item) for at in real)
            assert -1 not in chosen[: len(real)]


def test_the_chosen_come_with_their_weight(choose, embed):
    found = choose(embed, 3)(embed, ITEMS, past(ROWS, 16, junk=2))
    chosen = found.chosen.expand(*ITEMS.shape, -1)
    assert found.weight.shape == chosen.shape
    assert (found.weight >= 0).all()
    assert (found.weight[chosen < 0] == 0).all()
    total = found.weight.sum(-1)
    torch.testing.assert_close(total, (chosen >= 0).any(-1).float())


def test_what_was_not_chosen_does_not_matter(choose, embed):
    """Take the chosen alone and the answer stays."""
    unit, behaviours = choose(embed, 3), past(ROWS[:1], 13)
    found = unit(embed, ITEMS[:1, :1], behaviours)
    chosen = found.chosen[:, 0].sort(dim=-1).values
    alone = unit(embed, ITEMS[:1, :1], behaviours.take(chosen[chosen >= 0][None]))
    same(alone, found)
