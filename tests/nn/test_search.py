import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.search import attend, gather, require_k, top_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.types import Behaviours


def best(scores, mask, k):
    """The definition: sort by score, then newest first."""
    real = [
        at for at, (score, there) in enumerate(zip(scores, mask, strict=True)) if there and score > -np.inf
    ]
    chosen = sorted(real, key=lambda at: (-scores[at], -at))[:k]
    return chosen + [-1] * (min(k, len(scores)) - len(chosen))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3) | st.just(-np.inf), st.booleans()), max_size=20), st.integers(1, 25)
)
def test_the_best_come_first_and_of_equal_ones_the_newest(row, k):
    scores, mask = [float(score) for score, _ in row], [there for _, there in row]
    found = top_k(torch.tensor(scores).view(1, 1, -1), torch.tensor(mask, dtype=torch.bool).view(1, -1), k)
    assert found[0, 0].tolist() == best(scores, mask, k)


def test_each_candidate_has_its_own():
    torch.manual_seed(0)
    scores, mask = torch.randn(3, 4, 300).round(decimals=1), torch.rand(3, 300) < 0.7
    found = top_k(scores, mask, 50)
    for b in range(3):
        for k in range(4):
            assert found[b, k].tolist() == best(scores[b, k].tolist(), mask[b].tolist(), 50)


def test_padding_does_not_outrank_negative_scores():
    scores = torch.tensor([[[-3.0, -1.0, -2.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, True, False, False]])
    assert top_k(scores, mask, 2).tolist() == [[[1, 2]]]
    assert top_k(scores, mask, 5).tolist() == [[[1, 2, 0, -1, -1]]]


def test_what_is_not_a_number_is_not_found():
    scores = torch.tensor([[[float("nan"), 1.0, float("nan")]]])
    assert top_k(scores, torch.ones(1, 3, dtype=torch.bool), 2).tolist() == [[[1, -1]]]


def test_low_precision_and_gradients_are_no_matter():
    scores = torch.randn(1, 1, 9, dtype=torch.bfloat16, requires_grad=True)
    found = top_k(scores, torch.ones(1, 9, dtype=torch.bool), 3)
    assert found[0, 0].tolist() == best(scores[0, 0].tolist(), [True] * 9, 3)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_a_bad_k_is_told(k):
    with pytest.raises(ConfigError, match="k, the behaviours that are kept, is a whole number of at least 1"):
        require_k(k)


# -- attention to the chosen -----------------------------------------------------------------------------------


def world(L, sizes=False):
    torch.manual_seed(5)
    codes = np.concatenate([np.arange(1, 21), [0]])[:, None]
    embed = FeatureEmbedding(codes, (21,), (6,), (4, 5), std=1.0)
    item = torch.randint(0, 20, (2, L))
    cross = torch.stack([torch.randint(0, 4, (2, L)), torch.randint(0, 5, (2, L))], -1)
    mask = torch.arange(L) < torch.tensor([[L], [L // 2]])
    past = Behaviours(item, cross, torch.ones(2, L), mask, 1 + torch.rand(2, L) * 9 if sizes else None)
    return embed, TargetAttention(6, 2, 8, heads=2, head_width=4, width=5), past


def test_gathered_behaviours_are_those_chosen():
    _, _, past = world(8, sizes=True)
    own = gather(past, torch.tensor([[[7, 0, -1], [2, 2, 1]], [[0, 7, 3], [-1, -1, -1]]]))
    assert own.item[0, 0, :2].tolist() == past.item[0, [7, 0]].tolist()
    assert own.cross[1, 0, 2].tolist() == past.cross[1, 3].tolist()
    assert own.mask.tolist() == [
        [[True, True, False], [True, True, True]],
        [[True, False, True], [False, False, False]],  # 7 is padding
    ]
    assert torch.equal(own.size[0, 1], past.size[0, [2, 2, 1]])


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("L", [9, 40])  # all rows are projected; only the chosen ones
def test_it_is_attention_to_the_chosen_alone(L, sizes):
    embed, attention, past = world(L, sizes)
    item = embed.inherent(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    chosen = torch.tensor(
        [[[8, 0, 3, -1], [1, -1, -1, -1], [-1] * 4], [[3, 2, 1, 0], [0, 3, -1, -1], [2] + [-1] * 3]]
    )
    vector, weight = attend(attention, item, past, chosen, embed.behaviours)
    with torch.no_grad():  # answers take another way
        torch.testing.assert_close(attend(attention, item, past, chosen, embed.behaviours)[0], vector)
    for b in range(2):
        for k in range(3):
            at = chosen[b, k][chosen[b, k] >= 0]
            one = Behaviours(*(None if part is None else part[b, at][None] for part in past))
            features = embed.behaviours(one)
            alone, share = attention.mix(attention.logits(item[b, k][None, None], one, *features), *features)
            torch.testing.assert_close(vector[b, k], alone[0, 0])
            torch.testing.assert_close(weight[b, k, : len(at)], share[0, 0].mean(0))
            assert (weight[b, k, len(at) :] == 0).all()


def test_gradients_of_both_ways_agree():
    """Written out behind 40 rows of padding, the same behaviours are gathered instead of masked."""
    grads = []
    for extra in (0, 40):
        embed, attention, past = world(9)
        past = Behaviours(
            *(
                None if part is None else torch.cat([part, part.new_zeros(2, extra, *part.shape[2:])], dim=1)
                for part in past
            )
        )
        item = embed.inherent(torch.tensor([[3, 4], [6, 7]]))
        chosen = torch.tensor([[[8, 0, 3], [1, -1, -1]], [[3, 2, 1], [0, 3, -1]]])
        vector, _ = attend(attention, item, past, chosen, embed.behaviours)
        vector.square().sum().backward()
        grads.append([p.grad for p in (*embed.items.parameters(), *attention.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
