import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiglon.errors import ConfigError, DataError
from tiglon.retrieval.topk import each_once, tie_order, top_items
from tiglon.types import MISSING, Histories

SCORES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.sampled_from([-np.inf, -1, 0, 0.5, 1, 2]),  # many ties
)


def by_definition(scores, k, seed):
    """(score falling, hash rising), one user at a time."""
    order = tie_order(scores.shape[1], seed)
    lists = []
    for row in scores:
        items = sorted(range(len(row)), key=lambda i: (-row[i], order[i]))
        items = [i for i in items if row[i] > -np.inf][:k]
        lists.append(items + [MISSING] * (min(k, len(row)) - len(items)))
    return lists


@settings(deadline=None)
@given(SCORES, st.integers(1, 40), st.integers(0, 3))
def test_equals_its_definition(scores, k, seed):
    best = top_items(scores, k, seed=seed)
    assert best.item.tolist() == by_definition(scores, k, seed)
    for row, items, score in zip(scores, best.item, best.score, strict=True):
        assert score[items != MISSING].tolist() == row[items[items != MISSING]].tolist()


@settings(deadline=None)
@given(SCORES)
def test_a_user_alone_is_that_user_in_a_batch(scores):
    together = top_items(scores, 5).item
    assert [top_items(row[None], 5).item[0].tolist() for row in scores] == together.tolist()


def test_banned_items_are_left_out_and_the_scores_left_alone():
    scores = np.array([[5.0, 4, 3], [5, 4, 3]])
    best = top_items(scores, 3, Histories.of([[0, 0], [1, 2]]))
    assert best.item.tolist() == [[1, 2, MISSING], [0, MISSING, MISSING]]
    assert scores[0, 0] == 5


def test_ties_favour_no_order_of_ids():
    n, k, seeds = 20, 5, 2000
    chosen = np.zeros(n)
    for seed in range(seeds):
        chosen[top_items(np.zeros((1, n)), k, seed=seed).item[0]] += 1
    share = chosen / seeds
    assert abs(share - k / n).max() < 5 * np.sqrt(k / n * (1 - k / n) / seeds)


def test_new_items_never_reorder_old_ones():
    assert tie_order(1000)[:10].tolist() == tie_order(10).tolist()
    assert len(np.unique(tie_order(100_000))) == 100_000


@pytest.mark.parametrize("k", [0, -1, 2.5, "3"])
def test_a_bad_k_is_told(k):
    with pytest.raises(ConfigError, match="k is a whole number of at least 1"):
        top_items(np.zeros((1, 3)), k)


def test_bad_scores_and_banned_items_are_told():
    with pytest.raises(DataError, match="1 scores that are NaN"):
        top_items(np.array([[0, np.nan]]), 1)
    with pytest.raises(DataError, match="banned items of 2 users for scores of 1"):
        top_items(np.zeros((1, 3)), 1, Histories.of([[], []]))
    with pytest.raises(DataError, match="a dense item outside 0 … 2"):
        top_items(np.zeros((1, 3)), 1, Histories.of([[3]]))


def test_an_item_of_two_lists_stands_once_by_its_best_score():
    item = np.array([[4, 2, MISSING, 9, 4, MISSING]])
    score = np.array([[-1.0, -2.0, -np.inf, -0.5, -0.7, -np.inf]])
    items, scores = each_once(item, score)
    kept = items[0] != MISSING
    assert dict(zip(items[0][kept].tolist(), scores[0][kept].tolist(), strict=True)) == {
        2: -2.0,
        4: -0.7,
        9: -0.5,
    }
    assert (scores[0][~kept] == -np.inf).all()
