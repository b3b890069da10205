"""DARE: two sets of embeddings, of which one decides and the other describes."""

import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import ranked
from tiglon.ranking.consistency import consistency, true_top
from tiglon.ranking.dare import Dare
from tiglon.types import MISSING, Behaviours

torch.set_num_threads(1)
N, L = 40, 120
ITEM = torch.tensor([[3, 5, MISSING]])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    item = np.arange(N)
    codes = np.concatenate([np.stack([item + 1, item % 7], axis=1), [[0, 0]]])
    return FeatureEmbedding(codes, (N + 1, 7), (6, 2), (5,), std=1.0)


@pytest.fixture
def unit(embed):
    torch.manual_seed(1)
    unit = Dare(embed, k=10, search_width=4).eval()
    torch.nn.init.normal_(unit.crosses[0].weight)
    return unit


@pytest.fixture
def past():
    g = torch.Generator().manual_seed(2)
    item, cross = torch.randint(-1, N, (1, L), generator=g), torch.randint(0, 5, (1, L, 1), generator=g)
    return Behaviours(item, cross, torch.ones(1, L), torch.arange(L)[None] < 100)


def test_the_search_scores_as_the_attention_does(unit, embed, past):
    chosen = unit.search(embed, ITEM, past)
    torch.testing.assert_close(chosen, ranked(unit.logits(embed, ITEM, past), 10)[:, :, 0])
    assert consistency(chosen, true_top(unit, embed, ITEM, past)) == 1


def test_alpha_by_hand(unit, embed, past):
    alpha = unit.logits(embed, ITEM, past)
    codes = embed.item_codes

    def vector(item):
        return torch.cat([unit.items[f].weight[codes[item, f]] for f in range(2)])

    for c, at in ((0, 0), (1, 17), (2, 99)):
        bias = unit.crosses[0].weight[past.cross[0, at, 0], 0]
        wanted = vector(ITEM[0, c]) @ vector(past.item[0, at]) / 8**0.5 + bias
        torch.testing.assert_close(alpha[0, c, 0, at], wanted)


def test_the_interest_by_hand(unit, embed, past):
    found = unit(embed, ITEM, past)
    for c in range(3):
        at = found.chosen[0, c]
        weight = unit.logits(embed, ITEM, past)[0, c, 0, at].softmax(-1)
        torch.testing.assert_close(found.weight[0, c], weight)
        inherent, cross = embed.inherent(past.item[0, at]), embed.cross(past.cross[0, at])[:, 0]
        mean = weight @ inherent
        wanted = torch.cat([mean * embed.inherent(ITEM[0, c]), mean, weight @ cross])
        torch.testing.assert_close(found.vector[0, c], wanted)


def test_one_set_decides_and_the_other_describes(unit, embed, past):
    """What the shell's embeddings are changes no weight, and attention's learn through the weights alone."""
    before = unit(embed, ITEM, past)
    with torch.no_grad():
        for table in [*embed.items, *embed.crosses]:
            table.weight.mul_(-3)
    after = unit(embed, ITEM, past)
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.weight, after.weight)
    assert not torch.allclose(before.vector, after.vector)
    after.vector.square().sum().backward()
    assert all(table.weight.grad.abs().sum() > 0 for table in [*unit.items, *unit.crosses, *embed.items])


def test_a_cache_ages_with_its_own_embeddings_alone(unit, embed, past):
    unit.refresh(embed)
    cached, version = unit(embed, ITEM, past), unit.cache.version
    unit.use(None, embed)
    assert torch.equal(unit(embed, ITEM, past).vector, cached.vector)
    with torch.no_grad():
        embed.items[0].weight.add_(1)
    unit.refresh(embed)
    assert unit.cache.version == version
    with torch.no_grad():
        unit.items[0].weight.add_(torch.randn_like(unit.items[0].weight))
    assert consistency(unit.search(embed, ITEM, past), true_top(unit, embed, ITEM, past)) < 1
    unit.refresh(embed)
    assert unit.cache.version != version


def test_a_cache_of_another_catalogue_is_refused(unit, embed):
    unit.refresh(embed)
    other = FeatureEmbedding(embed.item_codes.numpy()[1:], (N + 1, 7), (6, 2), (5,))
    with pytest.raises(DataError, match=r"40 items.*39 items"):
        unit.use(unit.cache, other)


def test_a_width_of_nothing(embed):
    with pytest.raises(ConfigError, match=r"search_width=0.*at least 1"):
        Dare(embed, search_width=0)
