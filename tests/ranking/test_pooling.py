import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.pooling import ChunkPooling, FullAttention, MeanPooling, MostRecent
from tiglon.types import Behaviours

LENGTHS = torch.tensor([[11], [6], [0]])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    codes = np.concatenate([np.arange(1, 21), [0]])[:, None]
    return FeatureEmbedding(codes, (21,), (6,), (4, 5), std=1.0)


@pytest.fixture
def past():
    torch.manual_seed(1)
    cross = torch.stack([torch.randint(0, 4, (3, 11)), torch.randint(0, 5, (3, 11))], -1)
    return Behaviours(torch.randint(0, 20, (3, 11)), cross, torch.ones(3, 11), torch.arange(11) < LENGTHS)


ITEM = torch.tensor([[3, 4], [5, 6], [7, 8]])


def like(unit, other):
    """`unit` with the weights of `other`."""
    unit.load_state_dict(other.state_dict())
    return unit


def test_mean_pooling_is_the_mean_whatever_the_candidate(embed, past):
    found = MeanPooling(embed)(embed, ITEM, past).vector
    features = torch.cat([embed.inherent(past.item), embed.cross(past.cross).flatten(-2)], -1)
    for k in range(2):
        torch.testing.assert_close(found[0, k], features[0].mean(0))
        torch.testing.assert_close(found[1, k], features[1, :6].mean(0))
    assert (found[2] == 0).all()


def test_mean_pooling_counts_a_cluster_as_its_members(embed, past):
    size = torch.tensor([1.0, 3, 1, 1, 2, 1, 1, 1, 1, 1, 4])
    repeated = size.long()
    raw = Behaviours(*(None if part is None else part[:1].repeat_interleave(repeated, 1) for part in past))
    one = past._replace(size=size.expand(3, -1))
    torch.testing.assert_close(
        MeanPooling(embed)(embed, ITEM, one).vector[0], MeanPooling(embed)(embed, ITEM[:1], raw).vector[0]
    )


def test_full_attention_says_what_it_attended_to(embed, past):
    found = FullAttention(embed)(embed, ITEM, past)
    assert found.chosen[:, 0].tolist() == [[*range(11)], [*range(6), *[-1] * 5], [-1] * 11]
    torch.testing.assert_close(found.weight.sum(-1), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))


def test_the_most_recent_are_attended_to_as_if_they_were_all(embed, past):
    full = FullAttention(embed)
    recent = like(MostRecent(embed, k=4), full)(embed, ITEM, past)
    torch.testing.assert_close(recent.vector, full(embed, ITEM, past.last(4)).vector)
    assert recent.chosen[:, 0].tolist() == [[10, 9, 8, 7], [5, 4, 3, 2], [-1] * 4]
    everything = like(MostRecent(embed, k=50), full)(embed, ITEM, past)
    torch.testing.assert_close(everything.vector, full(embed, ITEM, past).vector)


def test_weights_stand_with_the_behaviours_they_weigh(embed, past):
    full = FullAttention(embed)
    weight = full(embed, ITEM, past).weight[:2]
    everything = like(MostRecent(embed, k=11), full)(embed, ITEM, past)
    chosen = everything.chosen[:2].expand(-1, 2, -1)
    expected = weight.gather(2, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
    torch.testing.assert_close(everything.weight[:2], expected)


@pytest.mark.parametrize("sizes", [False, True])
def test_chunks_of_one_are_behaviours(embed, past, sizes):
    full = FullAttention(embed)
    past = past._replace(size=1 + 5 * torch.rand(3, 11)) if sizes else past
    chunks = like(ChunkPooling(embed, chunk=1), full)
    torch.testing.assert_close(chunks(embed, ITEM, past).vector, full(embed, ITEM, past).vector)


def test_chunks_of_equal_behaviours_are_exact(embed):
    """Each chunk counts as its n behaviours, the last and shorter one, too."""
    item = torch.tensor([[4, 4, 4, 9, 9, 9, 2]])
    past = Behaviours(item, torch.ones(1, 7, 2, dtype=torch.int64), torch.ones(1, 7), torch.ones(1, 7) > 0)
    full = FullAttention(embed)
    chunks = like(ChunkPooling(embed, chunk=3), full)
    torch.testing.assert_close(chunks(embed, ITEM[:1], past).vector, full(embed, ITEM[:1], past).vector)


def test_a_chunk_is_its_mean(embed, past):
    unit = ChunkPooling(embed, chunk=4)
    inherent, cross = embed.behaviours(past)
    parts = [slice(0, 4), slice(4, 6)]
    means = [torch.stack([x[1, part].mean(0) for part in parts])[None] for x in (inherent, cross)]
    two = Behaviours(
        torch.zeros(1, 2),
        torch.zeros(1, 2, 2),
        torch.ones(1, 2),
        torch.ones(1, 2) > 0,
        torch.tensor([[4.0, 2.0]]),
    )
    alpha = unit.attention.logits(embed.inherent(ITEM[1:2]), two, *means)
    torch.testing.assert_close(unit(embed, ITEM, past).vector[1:2], unit.attention.mix(alpha, *means)[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda embed: MostRecent(embed, k=0), "k=0. k, the behaviours that are kept, is a whole number"),
        (lambda embed: ChunkPooling(embed, chunk=0), "chunk=0. A chunk holds at least one behaviour"),
    ],
)
def test_bad_settings_are_told(embed, make, message):
    with pytest.raises(ConfigError, match=message):
        make(embed)
