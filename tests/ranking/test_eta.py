import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.eta import Eta, fingerprints, hamming, nearest
from tiglon.types import MISSING, Behaviours

N = 40
ITEM = torch.tensor([[3, 5, MISSING], [7, 8, 10]])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    codes = np.concatenate([np.arange(1, N + 1), [0]])[:, None]
    return FeatureEmbedding(codes, (N + 1,), (8,), (4,), std=1.0)


@pytest.fixture
def past():
    torch.manual_seed(1)
    L = 25
    mask = torch.arange(L) < torch.tensor([[25], [12]])
    return Behaviours(torch.randint(-1, N, (2, L)), torch.randint(0, 4, (2, L, 1)), torch.ones(2, L), mask)


@pytest.mark.parametrize("bits", [1, 32, 63, 64, 65, 200])
def test_packed_distances_count_the_signs_that_differ(bits):
    torch.manual_seed(2)
    H, query, key = torch.randn(bits, 8), torch.randn(2, 3, 8), torch.randn(2, 9, 8)
    mask = torch.rand(2, 9) < 0.8
    packed = fingerprints(query, H), fingerprints(key, H)
    assert packed[0].dtype == torch.int64
    assert packed[0].shape == (2, 3, -(-bits // 64))
    differ = ((query @ H.T > 0)[:, :, None] != (key @ H.T > 0)[:, None]).sum(-1)
    expected = differ.masked_fill(~mask[:, None], bits + 1)
    assert hamming(*packed, mask, bits).tolist() == expected.tolist()


def test_bits_stand_where_they_are_said_to():
    H = torch.tensor([[1.0], [-1.0], [1.0], [0.0]])
    assert fingerprints(torch.tensor([[2.0], [-2.0], [0.0]]), H).tolist() == [[0b0101], [0b0010], [0]]


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0, 3.0])
def test_the_expected_distance_is_the_angle(angle):
    torch.manual_seed(3)
    bits = 20_000
    H = torch.randn(bits, 2)
    one, other = (
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[[np.cos(angle), np.sin(angle)]]], dtype=torch.float32),
    )
    distance = hamming(fingerprints(one, H), fingerprints(other, H), torch.ones(1, 1) > 0, bits).item()
    chance = angle / np.pi
    assert abs(distance / bits - chance) < 4 * np.sqrt(chance * (1 - chance) / bits)


def test_of_equal_distances_the_newest():
    torch.manual_seed(4)
    bits, H = 3, torch.randn(3, 4)
    query, key, mask = torch.randn(2, 5, 4), torch.randn(2, 60, 4), torch.rand(2, 60) < 0.7
    packed = fingerprints(query, H), fingerprints(key, H)
    distance = hamming(*packed, mask, bits)
    for k in (1, 7, 59, 60, 90):
        found = nearest(*packed, mask, bits, k)
        for b in range(2):
            for q in range(5):
                real = [at for at in range(60) if mask[b, at]]
                best = sorted(real, key=lambda at, d=distance[b, q]: (d[at].item(), -at))[:k]
                assert found[b, q].tolist() == best + [-1] * (min(k, 60) - len(best))


def test_more_bits_find_what_the_cosine_finds():
    torch.manual_seed(5)
    query, key, mask = torch.randn(1, 8, 16), torch.randn(1, 400, 16), torch.ones(1, 400) > 0
    cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(1, 2)
    truth = cosine.topk(40).indices
    overlaps = []
    for bits in (32, 512, 60_000):
        H = torch.randn(bits, 16)
        found = nearest(fingerprints(query, H), fingerprints(key, H), mask, bits, 40)
        overlaps.append((found[..., None] == truth[..., None, :]).any(-1).float().mean().item())
    assert overlaps[0] < overlaps[1] < overlaps[2]
    assert overlaps[2] > 0.96


def test_no_gradient_passes_the_hash(embed, past):
    unit = Eta(embed, k=1)
    assert "hyperplanes" not in dict(unit.named_parameters())
    found = unit(embed, ITEM[:, :1], past)
    found.vector.sum().backward()
    used = {past.item[b, at].item() for b, at in enumerate(found.chosen[:, 0, 0].tolist())} | {3, 7}
    reached = embed.items[0].weight.grad.abs().sum(-1).nonzero()[:, 0] - 1
    assert set(reached.tolist()) <= used


def test_reloaded_it_finds_the_same(embed, past):
    torch.manual_seed(6)
    unit = Eta(embed, k=5)
    again = Eta(embed, k=5)
    assert not torch.equal(again.search(embed, ITEM, past), unit.search(embed, ITEM, past))
    again.load_state_dict(unit.state_dict())
    assert torch.equal(again.search(embed, ITEM, past), unit.search(embed, ITEM, past))


def test_everything_found_is_full_attention(embed, past):
    unit = Eta(embed, k=25)
    full = unit.attention.mix(unit.logits(embed, ITEM, past), *embed.behaviours(past))[0]
    torch.testing.assert_close(unit(embed, ITEM, past).vector, full)


def test_stored_fingerprints_are_those_of_their_weights(embed, past):
    unit = Eta(embed, k=5).eval()
    live = unit.search(embed, ITEM, past)
    unit.refresh(embed)
    assert torch.equal(unit.search(embed, ITEM, past), live)
    with torch.no_grad():
        embed.items[0].weight.copy_(torch.randn(N + 1, 8))
    stale = unit.search(embed, ITEM, past)
    moved = unit.train().search(embed, ITEM, past)  # training never reads them
    assert not torch.equal(stale, moved)
    unit.eval().refresh(embed)
    assert torch.equal(unit.search(embed, ITEM, past), moved)


@pytest.mark.parametrize("bits", [0, 70_000])
def test_bad_bits_are_told(embed, bits):
    with pytest.raises(ConfigError, match=f"bits={bits}. A fingerprint has 1 … 65534 bits"):
        Eta(embed, bits=bits)
