import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from tiglon.errors import ConfigError, DataError
from tiglon.evaluation.ranking import (
    SHOWN,
    auc,
    auc_by_group,
    bootstrap_mean,
    calibration_error,
    difference,
    gauc,
    log_loss,
    measure,
    ndcg,
    table,
    to_json,
    weighted_mean,
)

NAN = math.nan

# Scores of few levels, so that many tie.
ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), min_size=1, max_size=40)


def columns(rows):
    group, score, label = (np.array(column) for column in zip(*rows, strict=True))
    return score.astype(float), label.astype(float), group


def world(seed=0, users=30, requests=4, candidates=11):
    """Scores that know something about the labels, and ties."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(users * requests), candidates)
    label = (rng.random(len(request)) < 0.2).astype(float)
    score = np.clip(np.round(0.2 + 0.15 * label + 0.1 * rng.normal(size=len(request)), 2), 0.01, 0.99)
    return score, label, request // requests, request


# -- order ---------------------------------------------------------------------------------------------------


def test_auc_by_hand():
    # positives .8 and .4, negatives .6, .4, .2: pairs won 3 + (0 + ½ + 1) of 6
    assert auc(np.array([0.8, 0.4, 0.6, 0.4, 0.2]), np.array([1, 1, 0, 0, 0])) == pytest.approx(4.5 / 6)


def test_constant_scores_are_worth_one_half_whatever_the_order():
    assert auc(np.zeros(5), np.array([1, 0, 0, 1, 0])) == 0.5
    assert auc(np.zeros(5), np.array([0, 0, 0, 1, 1])) == 0.5


def test_auc_of_one_class_is_undefined():
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1, 1])))
    assert math.isnan(auc(np.array([]), np.array([])))


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_auc_is_that_of_sklearn_group_by_group(rows):
    score, label, group = columns(rows)
    groups, value, size = auc_by_group(score, label, group)
    np.testing.assert_array_equal(groups, np.unique(group))
    for g, a, n in zip(groups, value, size, strict=True):
        mine = group == g
        assert n == mine.sum()
        if len(set(label[mine])) < 2:
            assert math.isnan(a)
        else:
            assert a == pytest.approx(roc_auc_score(label[mine], score[mine]), abs=1e-12)


def test_gauc_by_hand():
    """User 0: 4 impressions, AUC 1; user 1: 2 impressions, AUC 0; user 2 only positives: left out."""
    score = np.array([0.9, 0.1, 0.2, 0.3, 0.2, 0.7, 0.5, 0.5])
    label = np.array([1, 0, 0, 0, 1, 0, 1, 1])
    user = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    assert gauc(score, label, user) == pytest.approx((4 * 1 + 2 * 0) / 6)
    found = measure("hand", score, label, user=user, request=user)
    assert found.metrics["gauc"] == pytest.approx(4 / 6)
    assert found.dropped == 1
    assert found.groups.tolist() == [0, 1]
    assert found.impressions.tolist() == [4, 2]


@given(ROWS, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_ndcg_is_that_of_sklearn_with_ties(rows, k):
    score, label, request = columns(rows)
    found = ndcg(score, label, request, k)
    for r, value in zip(np.unique(request), found, strict=True):
        mine = request == r
        if not label[mine].any():
            assert math.isnan(value)
        elif mine.sum() == 1:
            assert value == 1.0
        else:
            assert value == pytest.approx(ndcg_score(label[mine][None], score[mine][None], k=k), abs=1e-9)


def test_the_ideal_of_ndcg_runs_over_all_positives():
    """One hit of three positives, at rank 3 of the first three: .2346, not .50."""
    score, label = np.arange(8)[::-1].astype(float), np.array([0, 0, 1, 0, 0, 1, 0, 1])
    assert ndcg(score, label, np.zeros(8), 3)[0] == pytest.approx(0.2346, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_never_matters(seed):
    score, label, user, request = world(seed)
    mixed = np.random.default_rng(seed).permutation(len(score))
    a = measure("a", score, label, user=user, request=request)
    b = measure("b", score[mixed], label[mixed], user=user[mixed], request=request[mixed])
    for name, value in a.metrics.items():
        assert b.metrics[name] == pytest.approx(value, abs=1e-12), name


# -- probability ---------------------------------------------------------------------------------------------


def test_log_loss_is_that_of_sklearn_and_finite_at_the_ends():
    score, label, *_ = world()
    assert log_loss(score, label) == pytest.approx(sk_log_loss(label, score))
    assert log_loss(np.array([0.5, 0.5]), np.array([0, 1])) == pytest.approx(math.log(2))
    assert math.isfinite(log_loss(np.array([0.0, 1.0]), np.array([1, 0])))


def test_calibration_error_by_hand():
    # two bins: predictions .2 (labels 0, 1: off by .3), predictions .8 (labels 1, 1: off by .2)
    p, label = np.array([0.2, 0.8, 0.2, 0.8]), np.array([0, 1, 1, 1])
    assert calibration_error(p, label, bins=2) == pytest.approx(0.25)
    assert calibration_error(np.full(4, 0.75), label) == pytest.approx(0.0)


def test_calibration_error_agrees_with_sklearns_curve():
    p = np.random.default_rng(1).random(1000)
    label = (np.random.default_rng(2).random(1000) < p**2).astype(float)
    true, predicted = calibration_curve(label, p, n_bins=10, strategy="quantile")
    assert calibration_error(p, label, bins=10) == pytest.approx(np.abs(true - predicted).mean(), abs=2e-3)


def test_calibration_is_predicted_over_true():
    found = measure("a", np.full(4, 0.5), np.array([1, 0, 0, 0]), user=np.zeros(4), request=np.zeros(4))
    assert found.metrics["calibration"] == pytest.approx(2.0)
    assert found.metrics["log_loss"] == pytest.approx(math.log(2))


def test_scores_of_another_kind_have_no_probability_metrics():
    found = measure(
        "counts", np.array([3, 0, 7]), np.array([0, 0, 1]), user=np.zeros(3), request=np.zeros(3),
        probability=False,
    )  # fmt: skip
    assert found.metrics["auc"] == 1.0
    assert not {"log_loss", "calibration", "calibration_error"} & set(found.metrics)


# -- all of it -----------------------------------------------------------------------------------------------


def test_segments_by_history_length():
    score, label, user, request = world()
    length = np.array([0, 50, 51, 5000])[user % 4]
    found = measure("a", score, label, user=user, request=request, length=length).metrics
    for title, rows in {"0–50": user % 4 < 2, "51–200": user % 4 == 2, "1001+": user % 4 == 3}.items():
        assert found[f"gauc[{title}]"] == pytest.approx(gauc(score[rows], label[rows], user[rows]))
    assert math.isnan(found["gauc[201–1000]"])


def test_candidates_without_a_label_are_left_out_and_counted():
    score, label, user, request = world()
    holes = label.copy()
    holes[::3] = NAN
    kept = ~np.isnan(holes)
    found = measure("a", score, holes, user=user, request=request)
    expected = measure("a", score[kept], label[kept], user=user[kept], request=request[kept])
    assert found.metrics == pytest.approx(expected.metrics)
    assert (found.unlabelled, found.rows) == (len(label) - kept.sum(), kept.sum())


def test_when_every_group_is_dropped_gauc_is_undefined():
    found = measure(
        "a", np.array([0.1, 0.2]), np.array([1, 0]), user=np.array([0, 1]), request=np.array([0, 1])
    )
    assert math.isnan(found.metrics["gauc"])
    assert found.dropped == 2
    assert found.metrics["auc"] == 0.0
    assert to_json([found], "test")["rows"][0]["gauc"] is None


def test_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(100):
        values, weights = rng.normal(0.7, 0.1, 80), rng.integers(1, 50, 80)
        low, high = bootstrap_mean(values, weights, n=200, seed=seed)
        assert low < weighted_mean(values, weights) < high
        inside += low <= 0.7 <= high
    assert 85 <= inside <= 100


def test_a_group_of_the_bootstrap_brings_its_weight_along():
    low, high = bootstrap_mean(np.array([0.0, 1.0]), np.array([1, 999]))
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_mean(np.full(5, 0.6), np.arange(1, 6)) == pytest.approx((0.6, 0.6))


def test_paired_difference():
    score, label, user, request = world()
    better = np.clip(score + 0.1 * label, 0, 1)
    a = measure("a", better, label, user=user, request=request)
    b = measure("b", score, label, user=user, request=request)
    delta, low, high = difference(a, b)
    assert delta == pytest.approx(a.metrics["gauc"] - b.metrics["gauc"])
    assert 0 < low < delta < high
    c = measure("c", score[11:], label[11:], user=user[11:], request=request[11:])
    with pytest.raises(DataError, match="measured different users or candidates"):
        difference(a, c)
    with pytest.raises(DataError, match="'a' and 'c' measured different"):
        table([a, c])


def test_table_and_json():
    score, label, user, request = world()
    label[user == 3] = 0
    found = measure("twin", score, label, user=user, request=request, task="bought")
    console = Console(record=True, width=160)
    console.print(table([found], title="Test"))
    text = console.export_text()
    assert "twin" in text
    assert "1 more with labels of one class left out of GAUC" in text
    assert f"{found.metrics['gauc']:.4f}".removeprefix("0") in text
    other = measure("twin", score, 1 - label, user=user, request=request + (user == 4) * 1000, task="liked")
    (row, _) = to_json([found, other], "test")["rows"]
    assert (row["task"], row["users"], row["dropped"]) == ("bought", 29, 1)
    one_class = sum(len(set(label[request == r])) == 1 for r in set(request))
    assert row["dropped_requests"] == one_class > 0
    console.print(table([found, other]))
    both = console.export_text()
    assert "bought: " in both
    assert "liked: " in both
    with pytest.raises(ConfigError, match=r"no metric 'gacu'\. Did you mean 'gauc'\?"):
        table([found], ["gacu"])
    with pytest.raises(DataError, match="no evaluations"):
        table([])


def test_a_table_is_whole_in_eighty_columns():
    score, label, user, request = world()
    options = {"user": user, "request": request}
    found = [
        measure("full_attention", score, label, task="within_30_days", **options),
        measure("full_attention", score, 1 - label, task="[/bought]", **options),
    ]
    console = Console(record=True, width=80)
    console.print(table(found, title="Test, runs/[a]"))
    text = console.export_text()
    assert "…" not in text
    assert text.startswith("Test, runs/[a]\n")
    lines = [line.split() for line in text.splitlines()]
    assert ["full_attention", "full_attention"] in lines
    assert ["within_30_days", "[/bought]"] in lines
    for name in SHOWN:
        assert [name, *(f"{e.metrics[name]:.4f}".removeprefix("0") for e in found)] in lines
    ends = ["–".join(f"{bound:.4f}".removeprefix("0") for bound in e.interval) for e in found]
    assert ["95%", "interval", *ends] in lines
    few = Console(record=True, width=50)
    few.print(table([found[0]] * 4))
    assert few.export_text().count(".") > 4 * len(SHOWN)  # folded rather than cut
    assert "…" not in few.export_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": np.array([0.1, NAN])}, "1 scores that are NaN. Every candidate has a score."),
        (
            {"score": np.array([0.1, 1.5])},
            "scores between 0.1 and 1.5. A probability lies in 0 … 1. Pass prob",
        ),
        ({"label": np.array([0.0, 2.0])}, "labels from 0 to 2. A label is 0, 1 or NaN."),
        ({"label": np.array([NAN, NAN])}, "no candidate with a label."),
        ({"user": np.zeros(3)}, "user of shape (3,) for 2 scores. One value a candidate."),
        ({"length": np.zeros(1)}, "length of shape (1,) for 2 scores."),
        ({"ks": (0,)}, "k of 0. NDCG looks at the first k ≥ 1 ranks."),
    ],
)
def test_bad_input(change, message):
    given = {"score": np.array([0.1, 0.5]), "label": np.array([0.0, 1.0])}
    given |= {"user": np.zeros(2), "request": np.zeros(2)} | change
    with pytest.raises((DataError, ConfigError)) as error:
        measure("a", **given)
    assert str(error.value).startswith(message)
