import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import merge, ranked
from tiglon.nn.search import attend
from tiglon.ranking.clusters import ClusterConfig, Groups, cluster_life
from tiglon.ranking.pooling import FullAttention
from tiglon.ranking.twin import Twin
from tiglon.ranking.twin_v2 import TwinV2
from tiglon.types import Behaviours

N, L, CROSS_SIZES = 12, 300, (5, 7)
CANDIDATES = torch.tensor([[0, 3, 7, 11, -1]])


@pytest.fixture
def embed() -> FeatureEmbedding:
    torch.manual_seed(0)
    codes = np.stack([np.arange(N + 1), np.arange(N + 1) % 3], axis=1)
    return FeatureEmbedding(codes, (N + 1, 3), (12, 4), CROSS_SIZES, std=0.7)


def made(embed: FeatureEmbedding, k: int = 100, seed: int = 1) -> TwinV2:
    torch.manual_seed(seed)
    return TwinV2(embed, k=k, heads=3, head_width=8, width=16).eval()


def full(embed: FeatureEmbedding, unit: TwinV2) -> FullAttention:
    """Attention over everything, with the same weights."""
    same = FullAttention(embed, heads=3, head_width=8, width=16)
    same.attention.load_state_dict(unit.attention.state_dict())
    return same.to(next(unit.parameters()).dtype)


def life(n: int = L, seed: int = 0) -> Behaviours:
    """Items of every kind, each with cross features of its own."""
    rng = np.random.default_rng(seed)
    item = rng.integers(N, size=n)
    cross = np.stack([item % size for size in CROSS_SIZES], axis=1)
    return Behaviours(
        torch.tensor(item)[None],
        torch.tensor(cross)[None],
        torch.arange(n, 0, -1.0)[None],
        torch.ones(1, n, dtype=torch.bool),
    )


def clustered(past: Behaviours, leaf: np.ndarray) -> Behaviours:
    """One entry a leaf: the oldest member, with the size."""
    _, first, size = np.unique(leaf, return_index=True, return_counts=True)
    return past.take(torch.from_numpy(first)[None])._replace(size=torch.from_numpy(size)[None].float())


# -- clusters of like behaviours are the behaviours ------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 7, 20])
def test_clusters_of_like_behaviours_are_the_raw_life(embed, largest):
    past = life()
    item = past.item[0].numpy()
    leaf = cluster_life(
        (100 * np.eye(N))[item],
        item,
        groups=Groups("item", tuple(range(1, N))),
        config=ClusterConfig(largest=largest),
    )
    virtual = clustered(past, leaf)
    virtual = virtual._replace(size=virtual.size.double())
    assert virtual.size.sum() == L
    assert virtual.item.shape[1] == sum(-(-c // largest) for c in np.bincount(item))
    embed, unit = embed.double(), made(embed, k=L).double()
    expected = full(embed, unit)(embed, CANDIDATES, past).vector
    found = unit(embed, CANDIDATES, virtual).vector
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-13)
    if largest > 1:  # what ln n is for
        without = unit(embed, CANDIDATES, virtual._replace(size=None)).vector
        assert (without - expected).abs().max() > 0.01


def test_size_counts_in_the_search_too(embed):
    """Two clusters of one item: the larger is chosen, though the other is newer."""
    past = life(2)._replace(item=torch.tensor([[4, 4]]), cross=torch.zeros(1, 2, 2, dtype=torch.int64))
    unit = made(embed, k=1)
    assert unit.search(embed, CANDIDATES, past)[..., 0].tolist() == [[1] * 5]
    for size, chosen in [([3.0, 2.0], 0), ([2.0, 3.0], 1), ([2.0, 2.0], 1)]:
        found = unit.search(embed, CANDIDATES, past._replace(size=torch.tensor([size])))
        assert found[..., 0].tolist() == [[chosen] * 5]


def test_both_stages_score_alike(embed):
    """The search finds the top of the logits that the attention has: its consistency is 1."""
    past = life()._replace(size=torch.from_numpy(np.random.default_rng(1).integers(1, 21, (1, L))).float())
    unit = made(embed, k=40)
    expected = merge(ranked(unit.logits(embed, CANDIDATES, past), 40), 40)
    found = unit.search(embed, CANDIDATES, past)
    for a, b in zip(found[0].tolist(), expected[0].tolist(), strict=True):
        assert len(set(a) & set(b)) >= 39  # sums in another order may swap the last
    vector, _ = attend(unit.attention, embed.inherent(CANDIDATES), past, expected, embed.behaviours)
    torch.testing.assert_close(unit(embed, CANDIDATES, past).vector, vector, atol=1e-4, rtol=1e-3)


def test_enough_clusters_are_full_attention(embed):
    past = life(30)._replace(size=torch.full((1, 30), 3.0))
    unit = made(embed, k=30)
    torch.testing.assert_close(
        unit(embed, CANDIDATES, past).vector, full(embed, unit)(embed, CANDIDATES, past).vector
    )


def test_one_behaviour_a_cluster_is_twin(embed):
    past, unit = life(), made(embed, k=20)
    twin = Twin(embed, k=20, heads=3, head_width=8, width=16).eval()
    twin.load_state_dict(unit.state_dict())
    leaf = cluster_life(np.eye(N)[past.item[0].numpy()], config=ClusterConfig(largest=1))
    for single in (past, clustered(past, leaf)):
        found, expected = unit(embed, CANDIDATES, single), twin(embed, CANDIDATES, past)
        assert torch.equal(found.chosen, expected.chosen)
        torch.testing.assert_close(found.vector, expected.vector)


# -- the cache -------------------------------------------------------------------------------------------------


def test_the_cache_is_the_keys_of_its_time(embed):
    past, unit = life(), made(embed, k=20)
    afresh = unit(embed, CANDIDATES, past)
    unit.refresh(embed)
    cached = unit(embed, CANDIDATES, past)
    assert torch.equal(cached.chosen, afresh.chosen)
    with torch.no_grad():
        unit.attention.key.weight.neg_()
    assert torch.equal(unit.search(embed, CANDIDATES, past), cached.chosen)  # old keys, until
    version = unit.cache.version
    unit.refresh(embed)
    assert not torch.equal(unit.search(embed, CANDIDATES, past), cached.chosen)
    assert unit.cache.version != version
    unit.train()  # learns from what is, not from what was
    unit.cache = None
    torch.testing.assert_close(
        unit(embed, CANDIDATES, past).vector, unit.eval()(embed, CANDIDATES, past).vector
    )


def test_an_unknown_item_is_found_in_the_cache(embed):
    past, unit = life(), made(embed, k=20)
    past = past._replace(item=past.item.masked_fill(past.item == 3, -1))
    afresh = unit.search(embed, CANDIDATES, past)
    unit.refresh(embed)
    assert torch.equal(unit.search(embed, CANDIDATES, past), afresh)


def test_a_cache_of_another_catalogue_is_refused(embed):
    unit = made(embed)
    unit.refresh(embed)
    other = FeatureEmbedding(np.zeros((N + 1, 2), np.int64), (N + 1, 3), (12, 4), CROSS_SIZES)
    with pytest.raises(DataError, match=r"an item cache of 12 items, .*unit\.refresh\(embed\)\."):
        unit.use(unit.cache, other)


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_bad_k(embed, k):
    with pytest.raises(ConfigError, match="k="):
        TwinV2(embed, k=k)
