import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.item_cache import ItemCache
from tiglon.ranking.ranker import Ranker
from tiglon.ranking.sim import CategoryIndex, SimHard, SimSoft, TimeInterval
from tiglon.types import MISSING, Behaviours, RankingBatch

N = 30


def embedding(categories=5):
    torch.manual_seed(0)
    item = np.arange(N)
    codes = np.stack([item + 1, item % categories], axis=1)  # category 0 is unknown
    return FeatureEmbedding(np.concatenate([codes, [[0, 0]]]), (N + 1, categories), (6, 2), (4,), std=1.0)


@pytest.fixture
def embed():
    return embedding()


@pytest.fixture
def past():
    torch.manual_seed(1)
    L = 25
    gap = 0.5 + 1000 * torch.rand(3, L).sort(dim=1, descending=True).values
    mask = torch.arange(L) < torch.tensor([[25], [12], [0]])
    return Behaviours(torch.randint(-1, N, (3, L)), torch.randint(0, 4, (3, L, 1)), gap, mask)


ITEM = torch.tensor([[3, 5, MISSING], [7, 8, 10], [1, 2, 3]])


def attention_over_all(unit, embed, item, past):
    """The exact search unit without a search."""
    features = unit.esu.features(embed, past)
    return unit.esu.attention.mix(unit.logits(embed, item, past), *features)[0]


# -- hard ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=15), st.integers(0, 6), st.integers(1, 20)
)
def test_hard_search_is_the_filter(row, wanted, k):
    category = torch.tensor([c for c, _ in row], dtype=torch.int64).view(1, -1)
    mask = torch.tensor([m for _, m in row], dtype=torch.bool).view(1, -1)
    found = CategoryIndex.build(category, mask).search(torch.tensor([[wanted]]), k)
    exact = [at for at, (c, real) in reversed(list(enumerate(row))) if real and c == wanted and c != 0][:k]
    assert found[0, 0].tolist() == exact + [-1] * (min(k, len(row)) - len(exact))


def test_hard_search_by_the_items_category(embed, past):
    found = SimHard(embed, category=1, k=3).search(embed, ITEM, past)
    for b in range(3):
        real = past.item[b, past.mask[b]].tolist()
        for q in range(3):
            item = ITEM[b, q].item()
            same = [
                at for at, i in enumerate(real) if i != MISSING and item != MISSING and i % 5 == item % 5 != 0
            ]
            assert [at for at in found[b, q].tolist() if at >= 0] == same[::-1][:3]


def test_no_behaviour_of_the_category_gives_zeros(embed, past):
    unit = SimHard(embed, category=1)
    past = past._replace(item=torch.full_like(past.item, 1))
    found = unit(embed, torch.tensor([[2, 1, 5, MISSING]] * 3), past)
    assert (found.vector[:, 0] == 0).all()
    assert (found.vector[:2, 1] != 0).all()
    assert (found.vector[:, 2:] == 0).all()  # an unknown category matches nothing
    assert (found.chosen[:, [0, 2, 3]] == -1).all()


def test_hard_search_in_one_category_is_full_attention():
    torch.manual_seed(0)
    codes = np.stack([np.arange(1, N + 2), np.ones(N + 1)], axis=1).astype(int)
    embed = FeatureEmbedding(codes, (N + 2, 2), (6, 2), (4,), std=1.0)
    past = Behaviours(
        torch.randint(0, N, (3, 9)),
        torch.ones(3, 9, 1, dtype=torch.int64),
        1 + torch.rand(3, 9),
        torch.ones(3, 9) > 0,
    )
    unit = SimHard(embed, category=1, k=9)
    torch.testing.assert_close(unit(embed, ITEM, past).vector, attention_over_all(unit, embed, ITEM, past))


def test_the_time_since_matters(embed, past):
    for unit in (SimHard(embed, category=1), SimSoft(embed, k=5).eval()):
        longer = past._replace(gap=torch.where(torch.arange(25) % 2 == 0, past.gap * 300, past.gap))
        assert not torch.allclose(unit(embed, ITEM, longer).vector[0], unit(embed, ITEM, past).vector[0])


def test_intervals_are_cut_at_powers_of_two():
    interval = TimeInterval(3)
    gap = torch.tensor([1.0, 1.99, 2.0, 3.9, 4.0, 1e-9, 1e-8, 1e30, 1e33])
    rows = interval(gap)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert torch.equal(rows[5], interval.table.weight[0])
    assert torch.equal(rows[7], interval.table.weight[-1])
    assert len(rows.unique(dim=0)) == 5


@pytest.mark.parametrize("category", [2, -1])
def test_a_category_that_is_no_feature_is_told(embed, category):
    with pytest.raises(ConfigError, match=f"category={category}. Items have inherent features 0 … 1. Pass"):
        SimHard(embed, category=category)


# -- soft ------------------------------------------------------------------------------------------------------


def relevance(unit, embed, item, past):
    """r (B, K, L), in loops."""
    r = torch.full((*item.shape, past.item.shape[1]), -torch.inf)
    for b in range(len(item)):
        for q in range(item.shape[1]):
            for at in range(int(past.lengths[b])):
                a, e = embed.inherent(item[b, q]), embed.inherent(past.item[b, at])
                r[b, q, at] = (unit.key.weight @ e) @ (unit.query.weight @ a)
    return r.detach()


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_soft_search_finds_the_highest(embed, past, indexed, training):
    unit = SimSoft(embed, k=4).train(training)
    if indexed:
        unit.refresh(embed)
    found = unit.search(embed, ITEM, past)
    best = relevance(unit, embed, ITEM, past).topk(4).indices
    for b in range(2):
        for q in range(3):
            items = past.item[b]
            assert items[found[b, q]].tolist() == items[best[b, q]].tolist()
    assert (found[2] == -1).all()


def test_the_soft_search_begins_as_likeness(embed, past):
    """Whatever the seed, r_i of an item with itself is positive and is e·e where the projection holds all of e."""
    for seed in range(5):
        torch.manual_seed(seed)
        unit = SimSoft(embed, search_width=embed.inherent_width)
        e = embed.inherent(torch.arange(N))
        torch.testing.assert_close((unit.query(e) * unit.key(e)).sum(-1), e.square().sum(-1))


def test_soft_search_of_low_precision_training_is_that_of_serving(embed, past):
    unit = SimSoft(embed, k=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = unit.search(embed, ITEM, past)
    assert torch.equal(found, unit.eval().search(embed, ITEM, past))


def test_padding_does_not_outrank_negative_relevance(embed, past):
    unit = SimSoft(embed, k=25)
    with torch.no_grad():  # what is liked is far from everything
        unit.query.weight.copy_(-unit.key.weight)
    found = unit.search(embed, past.item[:, :3], past)
    assert sorted(found[1, 0].tolist()) == [-1] * 13 + [*range(12)]


def test_soft_search_of_everything_is_full_attention(embed, past):
    unit = SimSoft(embed, k=25).eval()
    torch.testing.assert_close(unit(embed, ITEM, past).vector, attention_over_all(unit, embed, ITEM, past))


def requests(past):
    label = torch.tensor([[1.0, 0.0, 0.0]] * 3)[..., None]
    return RankingBatch(ITEM, past, torch.zeros(3, 0, dtype=torch.int64), label)


def test_the_search_learns_by_the_auxiliary_task_alone(embed, past):
    for alpha in (0.0, 1.0):
        embed.zero_grad()
        unit = SimSoft(embed, k=4, alpha=alpha)
        Ranker(embed, unit).train().loss(requests(past)).mean().backward()
        for part in (unit.query, unit.key):
            assert (part.weight.grad == 0).all() == (alpha == 0)
        assert (unit.esu.attention.query.weight.grad != 0).any()


def test_the_auxiliary_logit_is_that_of_the_weighted_sum(embed, past):
    unit = SimSoft(embed, k=4)
    logit = unit.auxiliary_logit(embed, ITEM, past)
    r = relevance(unit, embed, ITEM, past)
    for b in range(3):
        n = int(past.lengths[b])
        for q in range(3):
            U = sum(
                (r[b, q, at] * embed.inherent(past.item[b, at]) for at in range(n)), torch.zeros(8)
            ) / max(n, 1)
            expected = unit.auxiliary(torch.cat([U, embed.inherent(ITEM[b, q])]))
            torch.testing.assert_close(logit[b, q], expected[0], atol=1e-5, rtol=1e-4)


def test_padding_has_no_part_in_the_auxiliary_task(embed, past):
    """The contract's padding laws, in training."""
    unit = SimSoft(embed, k=4).train()
    junk = past._replace(item=torch.where(past.mask, past.item, 17))
    torch.testing.assert_close(unit(embed, ITEM, junk).logit, unit(embed, ITEM, past).logit)
    embed.zero_grad()
    other = past._replace(item=torch.where(past.mask, past.item.clamp(max=16), 17))
    unit(embed, ITEM, other).logit.sum().backward()
    assert (embed.items[0].weight.grad[17 + 1] == 0).all()


def test_answers_come_without_the_auxiliary_task(embed, past):
    unit = SimSoft(embed)
    assert unit.train()(embed, ITEM, past).logit is not None
    assert unit.eval()(embed, ITEM, past).logit is None


# -- the index of the soft search ------------------------------------------------------------------------------


def test_an_index_is_as_old_as_its_weights(embed, past):
    unit = SimSoft(embed, k=4).eval()
    unit.refresh(embed)
    fresh = unit.search(embed, ITEM, past)
    with torch.no_grad():
        unit.key.weight.normal_()
    assert torch.equal(unit.search(embed, ITEM, past), fresh)
    assert not torch.equal(unit.train().search(embed, ITEM, past), fresh)
    unit.eval().use(None, embed)
    live = unit.search(embed, ITEM, past)
    assert not torch.equal(live, fresh)
    unit.refresh(embed)
    assert torch.equal(unit.search(embed, ITEM, past), live)


def test_attention_is_live_though_the_index_is_old(embed, past):
    unit = SimSoft(embed, k=4).eval()
    unit.refresh(embed)
    before = unit(embed, ITEM, past)
    with torch.no_grad():
        unit.esu.attention.value.weight.mul_(2)
    after = unit(embed, ITEM, past)
    assert torch.equal(after.chosen, before.chosen)
    torch.testing.assert_close(after.vector, 2 * before.vector)


def test_an_index_may_be_made_elsewhere(embed, past, tmp_path):
    unit = SimSoft(embed, k=4).eval()
    live = unit.search(embed, ITEM, past)
    unit.refresh(embed)
    unit.index.save(tmp_path / "index.safetensors")
    unit.use(ItemCache.load(tmp_path / "index.safetensors"), embed)
    assert torch.equal(unit.search(embed, ITEM, past), live)


def test_an_index_of_other_items_is_refused(embed):
    unit, others = SimSoft(embed), embedding(categories=4)
    stranger = SimSoft(others)
    stranger.refresh(others)
    with pytest.raises(DataError, match=r"an item cache of 30 items, catalogue \w+\. .*unit\.refresh"):
        unit.use(stranger.index, embed)


def test_an_index_of_another_width_is_refused(embed):
    unit = SimSoft(embed, search_width=16)
    unit.refresh(embed)
    with pytest.raises(DataError, match=r"1 heads of width 16\. This unit has 1 of width 32"):
        SimSoft(embed).use(unit.index, embed)


def test_a_negative_weight_is_told(embed):
    with pytest.raises(ConfigError, match=r"alpha=-1\. The weight of the auxiliary task is at least 0"):
        SimSoft(embed, alpha=-1)
