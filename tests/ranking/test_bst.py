"""BST: the candidate is a member of the sequence, and time, not rank, is a behaviour's position."""

import numpy as np
import pytest
import torch
from torch import nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.bst import BST, Block, time_bucket
from tiglon.types import Behaviours

torch.set_num_threads(1)
N, J = 12, 2


def embedding() -> FeatureEmbedding:
    codes = np.append(np.arange(1, N + 1), 0)[:, None]
    torch.manual_seed(0)
    return FeatureEmbedding(codes, (N + 1,), (6,), (5,) * J, std=0.5, cross_width=3)


def past(B: int, L: int, seed: int = 0) -> Behaviours:
    g = torch.Generator().manual_seed(seed)
    return Behaviours(
        torch.randint(N, (B, L), generator=g),
        torch.randint(5, (B, L, J), generator=g),
        torch.sort(torch.rand(B, L, generator=g) * 100 + 1, descending=True).values,
        torch.ones(B, L, dtype=torch.bool),
    )


def bst(embed: FeatureEmbedding, **settings) -> BST:
    torch.manual_seed(1)
    return BST(embed, **{"width": 16, "hidden": 32, "recent": 4} | settings).eval()


ITEM = torch.tensor([[0, 5, 7], [3, 4, 11]])


def test_stretched_gaps_change_the_result():
    embed, behaviours = embedding(), past(2, 4)
    unit = bst(embed)
    stretched = behaviours._replace(gap=behaviours.gap * 4)
    found = unit(embed, ITEM, behaviours).vector
    assert (unit(embed, ITEM, stretched).vector - found).abs().max() > 1e-4
    assert torch.equal(unit(embed, ITEM, behaviours).vector, found)


def test_padding_alone_changes_nothing():
    embed, behaviours = embedding(), past(2, 3)
    padded = past(2, 9, seed=4)
    padded.item[:, :3], padded.cross[:, :3], padded.gap[:, :3] = behaviours[:3]
    padded.mask[:, 3:] = False
    unit = bst(embed)
    torch.testing.assert_close(unit(embed, ITEM, padded).vector, unit(embed, ITEM, behaviours).vector)


def test_candidate_and_behaviours_read_each_other():
    embed = embedding()
    unit = bst(embed)
    x, mask = unit.sequence(embed, ITEM, past(2, 4))
    x = x.detach().requires_grad_()

    def reads(position: int) -> list[bool]:
        """Which positions the output at one position depends on."""
        probe = unit.block(x, mask)[0, position].square().sum()
        return (torch.autograd.grad(probe, x)[0][0].abs().sum(dim=-1) > 1e-9).tolist()

    assert all(reads(0))
    assert all(reads(2))


def test_padding_is_not_read():
    embed, behaviours = embedding(), past(2, 4)
    behaviours.mask[:, 2:] = False
    x, mask = bst(embed).sequence(embed, ITEM, behaviours)
    assert mask.tolist() == [[True, True, True, False, False]] * 6
    x = x.detach().requires_grad_()
    grad = torch.autograd.grad(bst(embed).block(x, mask)[:, :3].square().sum(), x)[0]
    assert (grad[:, 3:] == 0).all()


def test_the_sequence_is_the_candidate_then_the_newest_first():
    embed, behaviours = embedding(), past(2, 6)
    behaviours.mask[1, 2:] = False
    unit = bst(embed)
    x, mask = unit.sequence(embed, ITEM, behaviours)
    x, mask = x.view(2, 3, 5, -1), mask.view(2, 3, 5)
    assert mask[1, 0].tolist() == [True, True, True, False, False]
    for b, k, s, at in [(0, 1, 1, 5), (0, 2, 4, 2), (1, 0, 1, 1), (1, 2, 2, 0)]:
        parts = [
            embed.inherent(behaviours.item[b, at]),
            embed.cross(behaviours.cross[b, at]).flatten(),
            unit.position(time_bucket(behaviours.gap[b, at], 48)),
        ]
        torch.testing.assert_close(x[b, k, s], unit.enter(torch.cat(parts)))
    parts = [embed.inherent(ITEM[0, 1]), torch.zeros(J * 3), unit.position.weight[0]]
    torch.testing.assert_close(x[0, 1, 0], unit.enter(torch.cat(parts)))


def test_the_block_is_a_post_norm_transformer_layer():
    torch.manual_seed(0)
    block = Block(16, 4, 32, 0.0).eval()
    theirs = nn.TransformerEncoderLayer(
        16, 4, 32, 0.0, nn.functional.leaky_relu, batch_first=True, norm_first=False
    ).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.qkv.weight)
        theirs.self_attn.out_proj.weight.copy_(block.out.weight)
    for bias in (theirs.self_attn.in_proj_bias, theirs.self_attn.out_proj.bias):
        nn.init.zeros_(bias)
    theirs.linear1, theirs.linear2 = block.feed[0], block.feed[2]
    theirs.norm1, theirs.norm2 = block.norms
    x, mask = torch.randn(3, 5, 16), torch.rand(3, 5) < 0.7
    mask[:, 0] = True
    torch.testing.assert_close(block(x, mask), theirs(x, src_key_padding_mask=~mask))


@pytest.mark.parametrize("L", [0, 1, 4])
def test_no_past_leaves_the_candidate_alone(L):
    embed, empty = embedding(), past(2, L)
    empty.mask[:] = False
    found = bst(embed)(embed, ITEM, empty).vector
    assert found.shape == (2, 3, 16)
    assert found.isfinite().all()
    torch.testing.assert_close(found, bst(embed)(embed, ITEM, past(2, 0)).vector)


def test_a_bucket_for_each_doubling_of_time():
    gap = torch.tensor([1e-6, 0.5, 1.0, 3.0, 7.0, 1e30])
    assert time_bucket(gap, 48).tolist() == [1, 1, 2, 3, 4, 47]


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"width=60, heads=8.*The heads divide the width"):
        BST(embedding(), width=60)
    with pytest.raises(ConfigError, match=r"recent=0.*recent ≥ 1"):
        BST(embedding(), recent=0)
