import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.can import CAN
from tiglon.types import Behaviours

ITEMS = 9


@pytest.fixture
def embed():
    torch.manual_seed(0)
    item = np.arange(ITEMS)
    codes = np.concatenate([np.stack([item + 1, 1 + item % 3], axis=1), [[0, 0]]])
    return FeatureEmbedding(codes, (ITEMS + 1, 4), (6, 2))


def past(items, size=None):
    item = torch.tensor(items)
    size = None if size is None else torch.tensor(size)
    nothing = torch.zeros(*item.shape, 0, dtype=torch.int64)
    return Behaviours(item, nothing, torch.ones(item.shape), torch.ones(item.shape, dtype=torch.bool), size)


def pair(unit, candidate, behaviour, orders=3):
    """The micro-MLP of one candidate's code on one behaviour's, written out."""
    weight = unit.micro.weight[candidate]
    first, second = weight[:128].view(16, 8), weight[128:].view(8, 4)
    total = torch.zeros(12)
    for order in range(1, orders + 1):
        inner = torch.tanh(unit.inputs.weight[behaviour] ** order @ first)
        total = total + torch.cat([inner, inner @ second])
    return total


def test_the_papers_sizes(embed):
    unit = CAN(embed)
    assert unit.micro.weight.shape == (ITEMS + 1, 160)
    assert unit.inputs.weight.shape == (ITEMS + 1, 16)
    assert unit.width == 12


def test_it_is_the_loop_over_all_pairs(embed):
    unit = CAN(embed)
    candidates, lives = torch.tensor([[0, 4], [7, 7]]), [[1, 2, 2], [8, 0, 5]]
    found = unit(embed, candidates, past(lives)).vector
    for b, k in np.ndindex(2, 2):
        loop = sum(pair(unit, candidates[b, k] + 1, item + 1) for item in lives[b])
        torch.testing.assert_close(found[b, k], loop)


def test_a_behaviour_may_stand_for_several(embed):
    unit, candidate = CAN(embed), torch.tensor([[3]])
    clustered = unit(embed, candidate, past([[1, 2]], [[3.0, 1.0]])).vector
    torch.testing.assert_close(clustered, unit(embed, candidate, past([[1, 1, 1, 2]])).vector)


def test_an_empty_past_and_padding_add_nothing(embed):
    unit, candidate = CAN(embed), torch.tensor([[3, 4]])
    empty = past([[1]])._replace(mask=torch.tensor([[False]]))
    assert not unit(embed, candidate, empty).vector.any()


def test_its_tables_are_its_own(embed):
    """Nothing flows to the vectors that the rest of the ranker reads."""
    unit = CAN(embed)
    unit(embed, torch.tensor([[3]]), past([[1, 2]])).vector.sum().backward()
    assert all(table.weight.grad is None for table in embed.items)
    assert unit.micro.weight.grad.any()
    assert unit.inputs.weight.grad.any()


def test_a_candidate_teaches_no_other(embed):
    unit = CAN(embed)
    before = unit.micro.weight.clone()
    unit(embed, torch.tensor([[3]]), past([[1, 2]])).vector.sum().backward()
    torch.optim.SGD(unit.parameters(), 0.1).step()
    moved = (unit.micro.weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [4]


def test_the_roles_are_not_alike(embed):
    unit = CAN(embed)
    one, other = (unit(embed, torch.tensor([[a]]), past([[b]])).vector for a, b in ((1, 2), (2, 1)))
    assert not torch.allclose(one, other)


def test_another_feature_may_be_crossed(embed):
    unit = CAN(embed, feature=1)
    found = [unit(embed, torch.tensor([[item]]), past([[1]])).vector for item in (0, 3, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_unknown_items_are_read_as_code_0(embed):
    unit = CAN(embed)
    found = unit(embed, torch.tensor([[-1]]), past([[-1]])).vector[0, 0]
    torch.testing.assert_close(found, pair(unit, 0, 0))


@pytest.mark.parametrize("wrong", [{"widths": (16,)}, {"widths": (16, 0)}, {"orders": 0}])
def test_a_micro_mlp_has_layers(embed, wrong):
    with pytest.raises(ConfigError, match="A micro-MLP has an input and a layer"):
        CAN(embed, **wrong)
