import itertools
import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, Success, nDCG

from tiglon.errors import ConfigError, DataError
from tiglon.evaluation import metrics
from tiglon.evaluation.metrics import (
    USER_METRICS,
    average_precision,
    bootstrap,
    bootstrap_difference,
    category_diversity,
    category_entropy,
    coverage,
    exposure,
    gini,
    hit_rate,
    judge,
    ndcg,
    pooled_recall,
    popularity_bins,
    precision,
    recall,
    recall_by_popularity,
    recall_capped,
    reciprocal_rank,
)
from tiglon.types import MISSING, Histories


def measured(metric, ranked, truth, k):
    """One user's value."""
    return metric(*judge(np.array([ranked]), Histories.of([truth])), k)[0]


# -- by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, value",
    [
        (recall, 1 / 3),
        (recall_capped, 1 / 3),
        (precision, 1 / 5),
        (hit_rate, 1),
        (ndcg, 0.5 / (1 + 1 / math.log2(3) + 0.5)),  # an ideal sum over the hits alone would give .5
        (reciprocal_rank, 1 / 3),
        (average_precision, (1 / 3) / 3),
    ],
)
def test_one_hit_of_three_relevant_at_rank_3(metric, value):
    assert measured(metric, [10, 11, 2, 12, 13], [0, 1, 2], 5) == pytest.approx(value)


def test_ndcg_of_one_hit_of_three_at_rank_3_is_2346():
    assert round(measured(ndcg, [10, 11, 2, 12, 13], [0, 1, 2], 5), 4) == 0.2346


@pytest.mark.parametrize(
    "metric, value",
    [
        (recall, 2 / 2),
        (precision, 2 / 4),
        (ndcg, (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))),
        (reciprocal_rank, 1),
        (average_precision, (1 + 2 / 4) / 2),
    ],
)
def test_hits_at_ranks_1_and_4(metric, value):
    assert measured(metric, [5, 8, 9, 6], [6, 5], 4) == pytest.approx(value)


def test_ranks_after_k_do_not_count():
    for metric in USER_METRICS.values():
        assert measured(metric, [8, 9, 5], [5], 2) == 0


def test_a_short_list_has_no_hits_after_its_end():
    for metric in USER_METRICS.values():
        assert measured(metric, [5, -1, -1], [5, 6], 3) == measured(metric, [5], [5, 6], 3)
    assert measured(precision, [5], [5, 6], 3) == pytest.approx(1 / 3)


def test_a_missing_candidate_never_hits():
    hit, relevant = judge(np.array([[-1, -1], [-1, -1]]), Histories.of([[0, 1, 2], [2]]))
    assert not hit.any()
    assert relevant.tolist() == [3, 1]


def test_a_true_item_that_stands_twice_counts_once():
    assert measured(recall, [5, 7], [5, 5, 6], 2) == 1 / 2


def test_an_item_hits_only_its_own_user():
    hit, _ = judge(np.array([[1, 2], [1, 2]]), Histories.of([[1], [2]]))
    assert hit.tolist() == [[True, False], [False, True]]


def test_without_truth_a_metric_is_undefined():
    hit, relevant = judge(np.array([[1, 2], [1, 2]]), Histories.of([[1], []]))
    for metric in USER_METRICS.values():
        assert np.isnan(metric(hit, relevant, 2)).tolist() == [False, True]


def test_pooled_recall_is_a_ratio_of_sums_and_hit_rate_a_share_of_users():
    ranked = np.array([[0, 9], [8, 9]])
    hit, relevant = judge(ranked, Histories.of([[0], [1, 2, 3]]))
    assert pooled_recall(hit, relevant, 2) == 1 / 4
    assert recall(hit, relevant, 2).mean() == hit_rate(hit, relevant, 2).mean() == 1 / 2


# -- laws --------------------------------------------------------------------------------------------------

LISTS = st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True)


@settings(deadline=None)
@given(LISTS, LISTS, st.integers(1, 15))
def test_all_metrics_lie_between_0_and_1(ranked, truth, k):
    for metric in USER_METRICS.values():
        assert 0 <= measured(metric, ranked, truth, k) <= 1


@settings(deadline=None)
@given(LISTS, st.integers(0, 30), st.integers(1, 15))
def test_with_one_true_item_recall_is_the_hit_rate(ranked, true, k):
    assert measured(recall, ranked, [true], k) == measured(hit_rate, ranked, [true], k)


@settings(deadline=None)
@given(LISTS, st.integers(1, 12))
def test_a_perfect_list_scores_1_unless_more_is_relevant_than_fits(truth, k):
    for metric in (ndcg, recall_capped, hit_rate, reciprocal_rank):
        assert measured(metric, truth, truth, k) == pytest.approx(1)
    assert (measured(recall, truth, truth, k) == 1) == (k >= len(truth))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=5), st.integers(1, 12))
def test_agrees_with_an_independent_evaluator(users, k):
    width = max(len(ranked) for ranked, _ in users)
    lists = np.array([ranked + [-1] * (width - len(ranked)) for ranked, _ in users])
    judged = judge(lists, Histories.of([truth for _, truth in users]))
    qrels = {str(u): {str(i): 1 for i in truth} for u, (_, truth) in enumerate(users)}
    run = {str(u): {str(i): -float(r) for r, i in enumerate(ranked)} for u, (ranked, _) in enumerate(users)}
    theirs = {
        recall: R @ k,
        ndcg: nDCG @ k,
        precision: P @ k,
        hit_rate: Success @ k,
        reciprocal_rank: RR @ k,
        average_precision: AP @ k,
    }
    found = {
        (m.measure, int(m.query_id)): m.value for m in ir_measures.iter_calc(theirs.values(), qrels, run)
    }
    for metric, measure in theirs.items():
        expected = [found[measure, u] for u in range(len(users))]
        np.testing.assert_allclose(metric(*judged, k), expected, atol=1e-9)


def test_random_lists_recall_k_of_n():
    rng = np.random.default_rng(0)
    n, k, users = 40, 10, 4000
    ranked = rng.permuted(np.tile(np.arange(n), (users, 1)), axis=1)
    truth = Histories.of(list(rng.permuted(np.tile(np.arange(n), (users, 1)), axis=1)[:, :3]))
    values = recall(*judge(ranked, truth), k)
    assert values.mean() == pytest.approx(k / n, abs=4 * values.std() / math.sqrt(users))


# -- of all lists ------------------------------------------------------------------------------------------


def test_exposure_and_coverage_count_only_the_first_k():
    ranked = np.array([[0, 1, 2], [0, 3, -1]])
    assert exposure(ranked, 5, 2).tolist() == [2, 1, 0, 1, 0]
    assert coverage(ranked, 5, 2) == 3 / 5


@pytest.mark.parametrize(
    "ranked, value",
    [
        ([[0], [1], [2], [3]], 0),  # all alike
        ([[0], [0], [0], [0]], 3 / 4),  # one item has everything
        ([[0], [0], [0], [1]], (2 * 3 - 5 + 3 * (2 * 4 - 5)) / (4 * 4)),
    ],
)
def test_gini_by_hand(ranked, value):
    assert gini(np.array(ranked), 4, 1) == pytest.approx(value)


def test_gini_is_half_the_mean_difference_over_the_mean():
    ranked = np.random.default_rng(1).integers(0, 20, (50, 1))
    shown = exposure(ranked, 25, 1)
    expected = np.abs(shown[:, None] - shown).mean() / shown.mean() / 2
    assert gini(ranked, 25, 1) == pytest.approx(expected)


def test_category_diversity_is_the_share_of_pairs_that_differ():
    ranked = np.array([[0, 1, 2, 3], [4, 0, 5, MISSING], [0, MISSING, MISSING, MISSING], [MISSING] * 4])
    categories = np.array(["a", "a", "a", "b", "c", "c"])
    for k in (1, 2, 3, 4):
        by_hand = []
        for row in ranked:
            labels = [categories[i] for i in row[:k] if i != MISSING]
            pairs = list(itertools.combinations(labels, 2))
            by_hand.append(np.mean([a != b for a, b in pairs]) if pairs else 0)
        np.testing.assert_allclose(category_diversity(ranked, categories, k), by_hand)


def test_category_entropy_in_bits():
    categories = np.array(["a", "a", "b", "c", "d"])
    ranked = np.array([[0, 1, -1, -1], [0, 2, 3, 4], [0, 1, 2, -1], [-1, -1, -1, -1]])
    third = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    np.testing.assert_allclose(category_entropy(ranked, categories, 4), [0, 2, third, 0], atol=1e-12)
    np.testing.assert_allclose(category_entropy(ranked, categories, 1), 0)


def test_popularity_bins_hold_a_third_of_the_events_each():
    #                             head  head  middle ×3  tail ×6             new
    counts = np.array([6, 6, *[4, 4, 4], *[2, 2, 2, 2, 2, 2], 0])
    assert popularity_bins(counts).tolist() == [3, 3, *[2] * 3, *[1] * 6, 0]
    assert popularity_bins(np.array([5, 5, 5])).tolist() == [3, 3, 3]
    assert popularity_bins(np.zeros(2, int)).tolist() == [0, 0]


def test_recall_by_popularity_counts_true_items_of_each_bin():
    counts = np.array([6, 6, 4, 4, 4, 2, 2, 2, 2, 2, 2, 0])
    ranked = np.array([[0, 5, 11], [1, 2, 3]])
    found = recall_by_popularity(ranked, Histories.of([[0, 6, 11], [0, 2]]), counts, 3)
    assert found == {"head": (1 / 2, 2), "middle": (1, 1), "tail": (0, 1), "new": (1, 1)}
    one = recall_by_popularity(ranked, Histories.of([[0], [1]]), counts, 3)
    assert one["head"] == (1, 2)
    assert math.isnan(one["tail"][0])
    assert one["tail"][1] == 0


# -- how sure ----------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_normal_interval_and_with_itself():
    values = np.random.default_rng(0).random(2000)
    low, high = bootstrap(values, n=2000)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=error / 8)
    assert high == pytest.approx(values.mean() + error, abs=error / 8)
    assert bootstrap(values, n=50) == bootstrap(values, n=50)
    assert bootstrap(values, n=50) != bootstrap(values, n=50, seed=1)


def test_metrics_bootstrapped_together_equal_those_alone():
    values = np.random.default_rng(0).random((300, 3))
    low, high = bootstrap(values, n=70)
    for column in range(3):
        np.testing.assert_allclose(bootstrap(values[:, column], n=70), (low[column], high[column]))


def test_a_paired_difference_is_far_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    a = rng.random(500)
    low, high = bootstrap_difference(a + 0.01 + 0.01 * rng.random(500), a)
    assert 0.01 < low < high < 0.02
    assert bootstrap_difference(a, a) == (0, 0)


@pytest.mark.parametrize("values", [[], [0.5, np.nan]])
def test_bootstrap_asks_for_a_value_of_every_user(values):
    with pytest.raises(DataError, match="at least one user, and a value of each"):
        bootstrap(np.array(values))


def test_differences_ask_for_the_same_users():
    with pytest.raises(DataError, match="needs the same users"):
        bootstrap_difference(np.zeros(3), np.zeros(4))


def test_bad_arguments_are_told():
    hit, relevant = judge(np.array([[1]]), Histories.of([[1]]))
    for metric in (*USER_METRICS.values(), metrics.pooled_recall):
        with pytest.raises(ConfigError, match="k of 0"):
            metric(hit, relevant, 0)
    with pytest.raises(DataError, match="One ranked list a user"):
        judge(np.array([[1]]), Histories.of([[1], [2]]))
    with pytest.raises(ConfigError, match="n=0"):
        bootstrap(np.zeros(2), n=0)
