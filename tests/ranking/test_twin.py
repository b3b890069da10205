"""TWIN: both stages score alike, cross features move their own behaviour alone, and caches tell whose they are."""

import numpy as np
import pytest
import torch

from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError, StorageError
from tiglon.nn import search
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import Keys, merge, ranked
from tiglon.ranking.consistency import consistency, true_top
from tiglon.ranking.item_cache import ItemCache, catalogue_version
from tiglon.ranking.pooling import FullAttention
from tiglon.ranking.ranker import Ranker
from tiglon.ranking.twin import Twin
from tiglon.semantic_ids import storage as files
from tiglon.types import MISSING, Behaviours, RankingBatch

torch.set_num_threads(1)
N = 60


def embedding(items=N, seed=0):
    torch.manual_seed(seed)
    item = np.arange(items)
    codes = np.concatenate([np.stack([item + 1, item % 7], axis=1), [[0, 0]]])
    return FeatureEmbedding(codes, (items + 1, 7), (12, 4), (5, 6), std=1.0)


def life(B=2, L=300, seed=1, items=N):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.tensor([L, L // 2, 0])[:B, None]
    return Behaviours(
        torch.randint(-1, items, (B, L), generator=g),
        torch.stack([torch.randint(0, size, (B, L), generator=g) for size in (5, 6)], -1),
        torch.ones(B, L),
        mask,
    )


def twin(embed, seed=2, **settings):
    torch.manual_seed(seed)
    return Twin(embed, **{"heads": 3, "head_width": 5, "width": 8, "k": 20} | settings).eval()


def learn(unit, embed, steps=1):
    """Move all weights as a training step would, without a search of its own."""
    torch.manual_seed(9)
    with torch.no_grad():
        for p in [*unit.parameters(), *embed.parameters()]:
            p += 0.3 * steps * torch.randn_like(p)


ITEM = torch.tensor([[3, 5, 11, MISSING], [7, 8, 10, 20]])


# -- one scorer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_both_stages_score_alike(cached):
    """What the search calls α is, for every head, the logit that the exact stage would give."""
    embed, past = embedding(), life()
    unit = twin(embed, k=300)
    if cached:
        unit.refresh(embed)
    score, position = unit.search_heads(embed, ITEM, past)
    alpha = unit.logits(embed, ITEM, past)
    assert (position[0] >= 0).all()
    real = position >= 0
    torch.testing.assert_close(alpha.gather(-1, position.clamp(min=0))[real], score[real])
    assert (alpha == float("-inf")).sum() == (~real).sum()


def test_alpha_is_the_papers_formula():
    """(K_h W^h)(qᵀ W^q)ᵀ / √d + (K_c W^c) β, head by head, with loops; the scale is the product's alone."""
    embed, past = embedding(), life(1, 9)
    unit = twin(embed)
    alpha, attention = unit.logits(embed, ITEM[:1], past), unit.attention
    inherent, cross = embed.behaviours(past)
    for a in range(3):
        rows = slice(5 * a, 5 * a + 5)
        W_h, W_q = attention.key.weight[rows].T, attention.query.weight[rows].T
        for c, item in enumerate(ITEM[0]):
            q = embed.inherent(item) @ W_q
            for at in range(9):
                bias = sum(cross[0, at, j] @ attention.cross[j] * attention.beta[a, j] for j in range(2))
                wanted = (inherent[0, at] @ W_h) @ q / 5**0.5 + bias
                torch.testing.assert_close(alpha[0, c, a, at], wanted)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_fresh_search_is_consistent_and_a_stale_one_is_not(heads):
    embed, past = embedding(), life(1, 500)
    unit = twin(embed, heads=heads)
    unit.refresh(embed)
    assert consistency(unit.search(embed, ITEM[:1], past), true_top(unit, embed, ITEM[:1], past)) == 1
    learn(unit, embed)
    stale = consistency(unit.search(embed, ITEM[:1], past), true_top(unit, embed, ITEM[:1], past))
    assert 0.05 < stale < 0.95
    unit.refresh(embed)
    assert consistency(unit.search(embed, ITEM[:1], past), true_top(unit, embed, ITEM[:1], past)) == 1


@pytest.mark.parametrize("feature", [0, 1])
def test_a_cross_feature_moves_its_own_behaviour_alone(feature):
    embed, past = embedding(), life(1, 30)
    unit = twin(embed)
    code = past.cross.clone()
    before, after = code[0, 13, feature].item(), (code[0, 13, feature].item() + 1) % 5
    code[0, 13, feature] = after
    moved = unit.logits(embed, ITEM[:1], past._replace(cross=code)) - unit.logits(embed, ITEM[:1], past)
    table = embed.crosses[feature].weight
    change = (table[after] - table[before]) @ unit.attention.cross[feature]
    wanted = torch.zeros_like(moved)
    wanted[..., 13] = change * unit.attention.beta[:, feature]
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)
    assert change.abs() > 1e-3


def test_cross_features_decide_among_the_same_items():
    """A bias a position: where all items are the same, the search ranks by it."""
    embed, past = embedding(), life(1, 400)
    past = past._replace(item=torch.full_like(past.item, 4))
    unit = twin(embed, heads=1, k=30)
    bias = unit.attention.bias(embed.cross(past.cross))[0, 0]
    chosen = unit.search(embed, ITEM[:1], past)[0]
    assert (bias[chosen].min(dim=-1).values >= bias.sort().values[-30]).all()
    assert bias[chosen[0]].min() > bias.median()


def test_the_heads_lists_are_merged_into_one_set():
    embed, past = embedding(), life()
    unit = twin(embed)
    chosen = unit.search(embed, ITEM, past)
    alpha = unit.logits(embed, ITEM, past)
    assert chosen.shape == (2, 4, 20)
    torch.testing.assert_close(chosen.sort().values, merge(ranked(alpha, 20), 20).sort().values)
    found = unit(embed, ITEM, past)
    torch.testing.assert_close(found.chosen, chosen)
    torch.testing.assert_close(found.weight.sum(-1), torch.ones(2, 4))


# -- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("k", [300, 1000])
def test_with_room_for_all_it_is_full_attention(k, cached):
    embed, past = embedding(), life()
    full = FullAttention(embed, heads=3, head_width=5, width=8)
    unit = twin(embed, k=k)
    unit.attention.load_state_dict(full.attention.state_dict())
    if cached:
        unit.refresh(embed)
    torch.testing.assert_close(unit(embed, ITEM, past).vector, full(embed, ITEM, past).vector)


@pytest.mark.parametrize("items", [N, 5000], ids=["all keys", "keys of what occurs"])
def test_cached_is_uncached(items):
    embed = embedding(items)
    unit, past = twin(embed), life(items=items)
    live = unit(embed, ITEM, past)
    unit.refresh(embed)
    cached = unit(embed, ITEM, past)
    assert torch.equal(cached.chosen, live.chosen)
    assert torch.equal(cached.vector, live.vector)


def test_reading_the_found_is_the_same_masked_and_gathered(monkeypatch):
    embed, past = embedding(), life()
    unit = twin(embed)
    found = unit(embed, ITEM, past)
    assert 20 * search._ALL_ROWS < 300  # gathered
    monkeypatch.setattr(search, "_ALL_ROWS", 100)
    torch.testing.assert_close(unit(embed, ITEM, past).vector, found.vector)


def test_in_training_the_cache_is_not_read():
    embed, past = embedding(), life()
    unit = twin(embed)
    unit.refresh(embed)
    learn(unit, embed)
    stale = unit.search(embed, ITEM, past)
    unit.train()
    live = unit.search(embed, ITEM, past)
    unit.eval().use(None, embed)
    assert torch.equal(live, unit.search(embed, ITEM, past))
    assert not torch.equal(live, stale)


def test_gradients_come_through_the_chosen_rows_alone():
    embed, past = embedding(4000), life(1, 1000, items=4000)
    unit = twin(embed).train()
    found = unit(embed, ITEM[:1, :1], past)
    found.vector.square().sum().backward()
    touched = embed.items[0].weight.grad.abs().sum(dim=1) > 0
    wanted = torch.zeros_like(touched)
    wanted[embed.item_codes[past.item[0, found.chosen[0, 0]], 0]] = True
    wanted[embed.item_codes[ITEM[0, 0], 0]] = True
    assert torch.equal(touched, wanted)
    for name in ("query.weight", "key.weight", "cross", "beta"):
        assert unit.attention.get_parameter(name).grad.abs().sum() > 0, name


def test_the_search_multiplies_no_history_with_the_width_of_an_item(monkeypatch):
    """Request-time work: with a cache, only candidates pass through a projection before the exact stage."""
    embed, past = embedding(), life(1, 300)
    unit = twin(embed)
    unit.refresh(embed)
    monkeypatch.setattr(unit.attention, "keys", lambda *_: pytest.fail("the search projected behaviours"))
    rows = []
    unit.attention.query.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1].numel()))
    unit.search(embed, ITEM[:1], past)
    assert rows == [4]


def test_both_projections_begin_as_one_with_orthonormal_columns():
    attention = twin(embedding(), heads=3).attention
    assert torch.equal(attention.query.weight, attention.key.weight)
    gram = attention.key.weight @ attention.key.weight.T
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(15), atol=1e-5, rtol=0)
    apart = twin(embedding(), heads=3, identity=False).attention
    assert not torch.equal(apart.query.weight, apart.key.weight)


def test_it_finds_what_was_planted():
    """The label is what the user did with the candidate itself, one of 300 behaviours: no mean of them knows."""
    torch.manual_seed(0)
    items, L, K = 600, 300, 8
    embed = FeatureEmbedding(np.r_[1 : items + 1, 0][:, None], (items + 1,), (16,), (3,))
    unit = Twin(embed, k=20, heads=2, head_width=8, width=16)
    model = Ranker(embed, unit)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def draw(B):
        met = torch.rand(B, items).topk(L).indices
        liked = torch.randint(1, 3, (B, L, 1))
        past = Behaviours(met, liked, torch.ones(B, L), torch.ones(B, L).bool())
        return RankingBatch(met[:, :K], past, torch.zeros(B, 0).long(), liked[:, :K].float() - 1)

    for _ in range(60):
        optimizer.zero_grad()
        model.loss(draw(16)).mean().backward()
        optimizer.step()
    batch = draw(50)
    score, label = model(batch)[..., 0].flatten(), batch.label.flatten() > 0
    assert (score[label][:, None] > score[~label]).float().mean() > 0.9
    planted = torch.arange(K)[:, None]
    assert (unit.search(embed, batch.item, batch.past) == planted).any(-1).float().mean() > 0.95


@pytest.mark.parametrize("k", [0, -1, 2.0])
def test_how_many_are_chosen(k):
    with pytest.raises(ConfigError, match="k"):
        Twin(embedding(), k=k)


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage, least", [("float32", 1.0), ("bfloat16", 0.97), ("int8", 0.95)])
def test_a_small_cache_finds_nearly_the_same(storage, least):
    embed, past = embedding(2000), life(1, 3000, items=2000)
    unit = twin(embed, k=100, head_width=16, heads=1)
    exact = unit.search(embed, ITEM[:1], past)
    unit.refresh(embed, storage)
    assert unit.cache.keys.storage == storage
    assert consistency(unit.search(embed, ITEM[:1], past), exact) >= least


def test_a_cache_has_a_version():
    embed = embedding()
    unit = twin(embed)
    unit.refresh(embed)
    first = unit.cache
    unit.refresh(embed)
    assert (unit.cache.version, unit.cache.catalogue) == (first.version, first.catalogue)
    learn(unit, embed)
    unit.refresh(embed)
    assert unit.cache.version != first.version
    assert unit.cache.catalogue == first.catalogue == catalogue_version(embed)


def test_a_cache_of_another_catalogue_is_refused():
    embed, other = embedding(), embedding(N + 1)
    unit, stranger = twin(embed), twin(other)
    stranger.refresh(other)
    with pytest.raises(DataError, match=r"cache of 61 items.*60 items.*unit\.refresh") as caught:
        unit.use(stranger.cache, embed)
    assert stranger.cache.catalogue[:12] in str(caught.value)
    assert unit.cache is None
    changed = embedding()
    changed.item_codes[5, 1] = 6  # the same number of items, one in another category
    unit.refresh(embed)
    with pytest.raises(DataError, match=r"catalogue"):
        twin(changed).use(unit.cache, changed)
    renamed = embedding()
    renamed.catalogue_name = "other ids"  # the same features of other items
    with pytest.raises(DataError, match=r"catalogue"):
        twin(renamed).use(unit.cache, renamed)


def test_a_cache_of_another_architecture_is_refused():
    embed = embedding()
    narrow = twin(embed, head_width=4)
    narrow.refresh(embed)
    with pytest.raises(DataError, match=r"3 heads of width 4.*3 of width 5"):
        twin(embed).use(narrow.cache, embed)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_cache_is_kept_on_disk(storage, tmp_path):
    embed, past = embedding(), life()
    unit = twin(embed)
    unit.refresh(embed, storage)
    before = unit(embed, ITEM, past).vector
    unit.cache.save(tmp_path / "items.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["items.safetensors"]
    loaded = ItemCache.load(tmp_path / "items.safetensors")
    assert (loaded.version, loaded.catalogue) == (unit.cache.version, unit.cache.catalogue)
    unit.use(loaded, embed)
    assert torch.equal(unit(embed, ITEM, past).vector, before)


def test_a_damaged_or_newer_cache_is_not_read(tmp_path):
    path = tmp_path / "items.safetensors"
    cache = ItemCache.build(embedding(), lambda item: torch.ones(len(item), 1, 4))
    cache.save(path)
    arrays, about = files.read(path)
    arrays["number"][0] += 1
    files.write(path, arrays, about)
    with pytest.raises(
        BundleDamagedError, match=r"does not hold what its version says.*build the cache anew"
    ):
        ItemCache.load(path)
    files.write(path, arrays, about | {"format": 99})
    with pytest.raises(BundleVersionError, match=r"format 99.*formats up to 1.*Update Tiglon"):
        ItemCache.load(path)
    files.write(path, {"number": arrays["number"]}, about)
    with pytest.raises(BundleDamagedError, match="has no 'scale'"):
        ItemCache.load(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        ItemCache.load(path)


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path):
    cache = ItemCache(Keys.of(torch.ones(2, 1, 4)), "", "")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "by this").touch()
    with pytest.raises(StorageError, match=r"could not be written.*Choose another place"):
        cache.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
