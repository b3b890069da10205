import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking import sdim
from tiglon.ranking.sdim import Sdim, bucket_table, look_up, signatures
from tiglon.types import Behaviours

N = 40
ITEM = torch.tensor([[3, 5, 6], [7, 8, 10], [1, 2, 3]])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    codes = np.concatenate([np.arange(1, N + 1), [0]])[:, None]
    return FeatureEmbedding(codes, (N + 1,), (8,), (4,), std=1.0)


@pytest.fixture
def past():
    torch.manual_seed(1)
    L = 25
    mask = torch.arange(L) < torch.tensor([[25], [12], [0]])
    return Behaviours(torch.randint(-1, N, (3, L)), torch.randint(0, 4, (3, L, 1)), torch.ones(3, L), mask)


def direct(unit, embed, item, past):
    """The definition, a candidate, a signature and a behaviour at a time."""
    m, tau = len(unit.hyperplanes), unit.group
    values = torch.cat([embed.inherent(past.item), embed.cross(past.cross).flatten(-2)], -1)
    out = torch.zeros(*item.shape, values.shape[-1])
    for b in range(len(item)):
        for k in range(item.shape[1]):
            target = unit.hyperplanes @ embed.inherent(item[b, k]) > 0
            for start in range(0, m, tau):
                group, total = slice(start, start + tau), torch.zeros(values.shape[-1])
                for at in range(int(past.lengths[b])):
                    behaviour = unit.hyperplanes @ embed.inherent(past.item[b, at]) > 0
                    if (behaviour[group] == target[group]).all():
                        total = total + values[b, at] * (1 if past.size is None else past.size[b, at])
                if total.norm() > 0:
                    out[b, k] += total / total.norm() * tau / m
    return out


@pytest.mark.parametrize("sizes", [False, True])
def test_the_table_gives_what_comparing_gives(embed, past, sizes):
    unit = Sdim(embed, hashes=12, group=3)
    past = past._replace(size=torch.randint(1, 9, past.item.shape).float()) if sizes else past
    torch.testing.assert_close(unit(embed, ITEM, past).vector, direct(unit, embed, ITEM, past))


def test_reading_a_stored_table_is_the_forward_pass_to_the_bit(embed, past):
    unit = Sdim(embed)
    table = unit.table(embed, past).detach().clone()
    assert table.shape == (3, 16, 8, 16)
    assert torch.equal(unit.read(embed, ITEM, table), unit(embed, ITEM, past).vector)


def test_a_candidate_costs_the_same_whatever_the_past(embed):
    """What answers a candidate never sees the behaviours."""
    assert list(inspect.signature(Sdim.read).parameters) == ["self", "embed", "item_BK", "table_BGSD"]


@pytest.mark.parametrize("group", [1, 2, 3])
def test_without_the_norm_it_is_attention_by_angle(group):
    torch.manual_seed(2)
    H, hashes = 5, 30_000
    target, behaviours = torch.randn(1, 1, H), torch.randn(1, 3, H)
    plane = torch.randn(hashes, H)
    weight = torch.eye(3)[None]  # of each behaviour
    table = bucket_table(signatures(behaviours, plane, group), weight, 2**group)
    found = look_up(table, signatures(target, plane, group)).mean(2)[0, 0]
    angle = torch.arccos(F.cosine_similarity(target[0], behaviours[0], dim=-1))
    torch.testing.assert_close(found, (1 - angle / torch.pi) ** group, atol=0.025, rtol=0)


def test_a_behaviour_equal_to_the_candidate_weighs_one(embed):
    plane = torch.randn(48, 8)
    one = signatures(embed.inherent(ITEM[:, :1]), plane, 3)
    assert (look_up(bucket_table(one, torch.ones(3, 1, 1), 8), one).mean(2) == 1).all()


def test_an_empty_bucket_is_zero(embed, past):
    unit = Sdim(embed)
    vector = unit(embed, ITEM, past).vector
    assert (vector[2] == 0).all()
    vector.sum().backward()
    assert embed.items[0].weight.grad.isfinite().all()


def test_tables_of_parts_add_up(embed, past):
    unit = Sdim(embed)
    parts = [past.take(torch.arange(start, stop).expand(3, -1)) for start, stop in ((0, 9), (9, 25))]
    torch.testing.assert_close(sum(unit.table(embed, part) for part in parts), unit.table(embed, past))


def test_long_lives_are_summed_in_parts(embed, past, monkeypatch):
    unit = Sdim(embed)
    whole = unit.table(embed, past)
    monkeypatch.setattr(sdim, "_AT_ONCE", 7)
    torch.testing.assert_close(unit.table(embed, past), whole)


def test_signatures_are_signs_as_numbers():
    plane = torch.tensor([[1.0], [-1.0], [1.0], [1.0], [-1.0], [-1.0]])
    assert signatures(torch.tensor([[2.0], [-2.0], [0.0]]), plane, 3).tolist() == [
        [0b101, 0b001],
        [0b010, 0b110],
        [0, 0],
    ]


def test_the_hash_is_never_trained(embed, past):
    unit = Sdim(embed)
    assert not list(unit.parameters())
    assert set(unit.state_dict()) == {"hyperplanes"}
    unit(embed, ITEM, past).vector.sum().backward()
    candidate_only = [i for i in ITEM[0].tolist() if not (past.item[:2] == i).any()]
    assert candidate_only
    assert (embed.items[0].weight.grad[[i + 1 for i in candidate_only]] == 0).all()


@pytest.mark.parametrize("hashes, group", [(48, 5), (2, 3), (48, 0)])
def test_hashes_that_do_not_divide_are_told(embed, hashes, group):
    with pytest.raises(ConfigError, match=f"hashes={hashes}, group={group}. hashes is a multiple of group"):
        Sdim(embed, hashes=hashes, group=group)
