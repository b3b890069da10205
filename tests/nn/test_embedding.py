import numpy as np
import pytest
import torch

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.types import MISSING, Behaviours

CODES = np.array([[1, 2], [2, 1], [3, 2], [0, 0]])  # three items and the unknown one


@pytest.fixture
def embed():
    torch.manual_seed(0)
    return FeatureEmbedding(CODES, (4, 3), (5, 2), (6, 4), (3,), cross_width=3, profile_width=2)


def test_an_item_is_its_features_side_by_side(embed):
    by_hand = torch.cat([embed.items[0].weight[3], embed.items[1].weight[2]])
    assert torch.equal(embed.inherent(torch.tensor([[2]]))[0, 0], by_hand)
    assert embed.inherent_width == 7


def test_the_unknown_item_has_the_unknown_features(embed):
    by_hand = torch.cat([table.weight[0] for table in embed.items])
    assert torch.equal(embed.inherent(torch.tensor(MISSING)), by_hand)
    assert torch.equal(embed.catalogue()[MISSING], by_hand)


def test_the_catalogue_is_every_item(embed):
    assert torch.equal(embed.catalogue()[:3], embed.inherent(torch.arange(3)))
    assert len(embed.catalogue()) == 4


def test_cross_features_stay_apart(embed):
    code = torch.tensor([[[5, 0], [1, 3]]])
    cross = embed.cross(code)
    assert cross.shape == (1, 2, 2, 3)
    assert torch.equal(cross[0, 1, 1], embed.crosses[1].weight[3])
    assert torch.equal(cross[0, 0, 1], embed.crosses[1].weight[0])


def test_behaviours_of_any_shape(embed):
    item, cross = torch.zeros(2, 3, 4, dtype=torch.int64), torch.ones(2, 3, 4, 2, dtype=torch.int64)
    past = Behaviours(item, cross, torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool))
    inherent, crosses = embed.behaviours(past)
    assert inherent.shape == (2, 3, 4, 7)
    assert crosses.shape == (2, 3, 4, 2, 3)


def test_the_profile_is_its_features_side_by_side(embed):
    assert torch.equal(embed.profile(torch.tensor([[2]])), embed.profiles[0].weight[[2]])
    assert embed.profile_width == 2


def test_features_that_are_not_there():
    embed = FeatureEmbedding(CODES[:, :1], (4,), (5,))
    assert embed.cross(torch.zeros(2, 3, 0, dtype=torch.int64)).shape == (2, 3, 0, 8)
    assert embed.profile(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_what_items_are_is_saved_with_the_weights(embed):
    other = FeatureEmbedding(
        np.zeros_like(CODES), (4, 3), (5, 2), (6, 4), (3,), cross_width=3, profile_width=2
    )
    other.load_state_dict(embed.state_dict())
    assert torch.equal(other.catalogue(), embed.catalogue())


def test_a_width_for_every_feature():
    with pytest.raises(ValueError, match="zip"):
        FeatureEmbedding(CODES, (4, 3), (5,))


def test_holding_items_changes_neither_values_nor_gradients(embed):
    past, wanted = torch.tensor([[2, MISSING, 0], [2, 2, 1]]), torch.tensor([[1, 2]])

    def look(held):
        embed.zero_grad()
        with embed.holding(*held):
            (embed.inherent(past).sum(dim=(0, 1)) * embed.inherent(wanted)).square().sum().backward()
        return [table.weight.grad.clone() for table in embed.items]

    plain = look([past[:0]])  # what is not held is looked up as ever
    for a, b in zip(plain, look([past, wanted]), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad(), embed.holding(past):
        embed.items[0].weight.add_(1)
    first = embed.inherent(past)
    with embed.holding(past):
        assert torch.equal(embed.inherent(past), first)  # nothing is kept from one block to the next
