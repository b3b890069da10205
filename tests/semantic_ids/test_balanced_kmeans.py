"""Balanced k-means: the sizes are exact, the dealing is nearly the best there is, and a path is an item's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tiglon.errors import CapacityError, ConfigError, DataError
from tiglon.semantic_ids.balanced_kmeans import ClusterTree, assign, balanced_codes, balanced_kmeans
from tiglon.types import Vocabulary


def blobs(n, width=6, seed=0):
    random = np.random.default_rng(seed)
    centres = 3 * random.normal(size=(9, width))
    return (centres[random.integers(0, 9, n)] + 0.3 * random.normal(size=(n, width))).astype(np.float32)


def names(n):
    return Vocabulary([f"item {i}" for i in range(n)])


def balanced(code, size):
    return set(np.bincount(code, minlength=size)) <= {len(code) // size, -(-len(code) // size)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.sampled_from(["blobs", "zeros", "copies"]))
def test_every_cluster_has_its_share_exactly(n, size, kind):
    points = {"blobs": blobs(n), "zeros": np.zeros((n, 6), np.float32), "copies": blobs(n) // 4}[kind]
    code = balanced_kmeans(points, size, np.random.default_rng(0))
    assert code.shape == (n,)
    assert 0 <= code.min() <= code.max() < size
    assert balanced(code, size)


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n, size", [(60, 4), (61, 7), (40, 39)])
def test_the_total_is_near_that_of_the_best_assignment(n, size, tolerance):
    cost = np.random.default_rng(n).random((n, size)).astype(np.float32)
    code = assign(cost, tolerance)
    seats = np.repeat(np.arange(size), np.bincount(code, minlength=size))
    rows, columns = linear_sum_assignment(cost[:, seats])
    best = cost[rows, seats[columns]].sum()
    assert best - 1e-3 <= cost[np.arange(n), code].sum() <= best + tolerance * cost.min(axis=1).sum() + 1e-3


@pytest.mark.parametrize("kind", ["few texts", "nearly one", "tight groups"])
def test_copies_are_dealt_out_in_good_time(kind):
    """Centres lie on the copies then, so that the nearest is next to nothing, but most have to go elsewhere."""
    random = np.random.default_rng(0)
    points = random.normal(size=(600, 8)).astype(np.float32)
    if kind == "few texts":
        often = 1 / np.arange(1, 31)
        points = points[random.choice(30, 600, p=often / often.sum())]
    elif kind == "nearly one":
        points[:570] = points[0]
    else:
        points = points[random.integers(20, size=600)] + 1e-4 * points
    code = balanced_kmeans(points, 64, np.random.default_rng(0))
    assert balanced(code, 64)


def test_a_power_of_two_changes_nothing():
    points, keys = blobs(200), Vocabulary(list(range(200)))
    codes = balanced_codes(points, keys, 8)
    for power in (-70, 70):  # whose squares float32 cannot hold
        np.testing.assert_array_equal(balanced_codes(np.ldexp(points, power), keys, 8), codes)


def test_what_all_vectors_have_in_common_changes_nothing():
    points = np.round(16 * blobs(200))
    expected = balanced_codes(points, names(200), 4, levels=3)
    assert np.array_equal(balanced_codes(points + np.float32(2**14), names(200), 4, levels=3), expected)


def test_the_larger_clusters_are_those_that_more_want():
    cost = np.ones((8, 3), np.float32)
    cost[:5, 2], cost[5:, 1] = 0, 0
    assert np.bincount(assign(cost)).tolist() == [2, 3, 3]


def test_clusters_of_the_right_size_are_found():
    centres = 10 * np.random.default_rng(0).normal(size=(12, 5))
    truth = np.random.default_rng(1).permutation(np.repeat(np.arange(12), 20))
    points = (centres[truth] + 0.1 * np.random.default_rng(2).normal(size=(240, 5))).astype(np.float32)
    code = balanced_kmeans(points, 12, np.random.default_rng(0))
    assert len(np.unique(np.stack([truth, code]), axis=1).T) == 12


@pytest.mark.parametrize("n, branches, levels", [(1, 4, 2), (3, 8, 2), (16, 4, 2), (17, 4, 3), (100, 7, 3)])
def test_a_path_is_one_items_own_and_balanced_at_every_level(n, branches, levels):
    codes = balanced_codes(blobs(n), names(n), branches)
    assert codes.dtype == np.int32
    assert codes.shape == (n, levels)
    assert len(np.unique(codes, axis=0)) == n
    assert codes.max() < branches
    for level in range(levels):
        for prefix in np.unique(codes[:, :level], axis=0):
            below = (codes[:, :level] == prefix).all(axis=1)
            assert balanced(codes[below, level], branches)


def test_a_catalogue_smaller_than_the_number_of_codes_has_a_cluster_an_item():
    codes = balanced_codes(blobs(5), names(5), 256)
    assert np.sort(codes[:, 0]).tolist() == [0, 1, 2, 3, 4]
    assert (codes[:, 1] == 0).all()


def test_the_same_items_in_another_order_have_the_same_codes():
    vectors, raw = blobs(120), [f"item {i}" for i in range(120)]
    vectors[40:60] = vectors[3]  # copies, which only their names tell apart
    vectors[60:80] = 0
    codes = balanced_codes(vectors, Vocabulary(raw), 8)
    order = np.random.default_rng(5).permutation(120)
    again = balanced_codes(vectors[order], Vocabulary([raw[i] for i in order]), 8)
    np.testing.assert_array_equal(again, codes[order])


def test_items_that_are_alike_share_their_first_code():
    vectors = blobs(400)
    codes = balanced_codes(vectors, names(400), 20)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    together = codes[:, :1] == codes[:, 0]
    assert distance[together].mean() < 0.25 * distance[~together].mean()


@pytest.mark.parametrize("n, branches", [(1, 4), (5, 8), (60, 8), (300, 7)])
def test_new_items_go_down_to_the_nearest_means(n, branches):
    vectors = blobs(n)
    codes = balanced_codes(vectors, names(n), branches)
    seats = int(codes[:, -1].max()) + 1
    new = blobs(30, seed=1)
    given = ClusterTree(codes, vectors).place(new, codes, seats + 30)  # no cluster can fill up
    for row, vector in zip(given, new, strict=True):
        below = np.ones(n, bool)
        for level in range(codes.shape[1] - 1):
            choices = np.unique(codes[below, level])
            means = [vectors[below & (codes[:, level] == c)].mean(axis=0) for c in choices]
            assert row[level] == choices[np.linalg.norm(np.array(means) - vector, axis=1).argmin()]
            below &= codes[:, level] == row[level]
    for prefix in np.unique(given[:, :-1], axis=0):
        here = given[(given[:, :-1] == prefix).all(axis=1), -1]
        np.testing.assert_array_equal(here, seats + np.arange(len(here)))  # after all that training has


def test_a_full_cluster_passes_new_items_on_and_all_have_codes_of_their_own():
    vectors = blobs(60)
    codes = balanced_codes(vectors, names(60), 6)
    tree, seats = ClusterTree(codes, vectors), int(codes[:, -1].max()) + 1
    clusters = len(np.unique(codes[:, :-1], axis=0))
    alike = np.repeat(vectors[:1], 2 * clusters, axis=0)
    given = tree.place(alike, codes, seats + 2)
    assert len(np.unique(np.concatenate([codes, given]), axis=0)) == 60 + len(given)
    distance = np.linalg.norm(vectors - vectors[0], axis=1)
    near, far = (
        np.mean([distance[(codes[:, :-1] == row[:-1]).all(axis=1)].mean() for row in rows])
        for rows in (given[:6], given[-6:])
    )
    assert near < far
    for one in range(0, len(alike), 5):  # one after the other is all at once
        taken = np.concatenate([codes, given[:one]])
        np.testing.assert_array_equal(
            tree.place(alike[one : one + 5], taken, seats + 2), given[one : one + 5]
        )
    with pytest.raises(CapacityError, match=r"1 new items, and room for 0 .*Make the codes anew"):
        tree.place(alike[:1], np.concatenate([codes, given]), seats + 2)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"branches=1, levels=2\. Both are at least 2"):
        balanced_codes(blobs(5), names(5), 1)
    with pytest.raises(DataError, match="5 vectors for 4 items"):
        balanced_codes(blobs(5), names(4))
    vectors = blobs(5)
    vectors[2, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        balanced_codes(vectors, names(5))
