import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.ranking.clusters import (
    ClusterConfig,
    Groups,
    Leaves,
    cluster_life,
    completion_ratio,
    divide,
    join,
    mean_times,
    mean_values,
    representatives,
)


def blobs(
    n: int, centres: int, width: int = 8, seed: int = 0, noise: float = 0.02
) -> tuple[np.ndarray, np.ndarray]:
    """(n, width) points far from all but those of their blob, and (n,) the blob of each."""
    rng = np.random.default_rng(seed)
    of = rng.integers(centres, size=n)
    points = 10 * rng.normal(size=(centres, width))[of] + noise * rng.normal(size=(n, width))
    return points.astype(np.float32), of


# -- what leaves promise -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 300),
    distinct=st.integers(1, 40),
    largest=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_leaves_partition_a_life_and_are_small_and_pure(n, distinct, largest, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(distinct, 4)).astype(np.float32)[rng.integers(distinct, size=n)]
    completion = rng.choice([np.nan, 0.0, 0.1, 0.5, 0.99, 1.0, 3.0, -1.0, np.inf], size=n)
    leaf = cluster_life(vectors, completion, config=ClusterConfig(largest=largest))
    sizes = np.bincount(leaf, minlength=1)
    assert sizes.sum() == n
    assert n == 0 or (leaf.min() == 0 and sizes.min() > 0)
    assert sizes.max() <= largest
    group = Groups.by_completion().of(completion)
    assert len(np.unique(leaf)) == len(np.unique(np.stack([leaf, group]), axis=1).T)


def test_no_behaviours_and_one():
    assert cluster_life(np.empty((0, 4))).shape == (0,)
    assert cluster_life(np.ones((1, 4)), np.array([np.nan])).tolist() == [0]


@pytest.mark.parametrize("largest", [1, 2, 20])
def test_copies_are_cut_into_chunks_by_time(largest):
    vectors = np.tile(np.float32([0.1, 0.3, -7.7]), (10 * largest, 1))
    leaf = cluster_life(vectors, config=ClusterConfig(largest=largest))
    np.testing.assert_array_equal(leaf, np.repeat(np.arange(10), largest))


def test_a_rare_point_among_copies_is_found():
    vectors = np.zeros((5000, 3), np.float32)
    vectors[1234] = 1e-3  # no sample need hold it
    leaf = cluster_life(vectors)
    assert (leaf == leaf[1234]).sum() == 1


def test_copies_share_leaves_wherever_they_stand():
    """60 items of 20 behaviours each, shuffled: k-means finds all 60, or leaves hold what differs."""
    rng = np.random.default_rng(0)
    item = rng.permutation(np.repeat(np.arange(60), 20))
    leaf = cluster_life((100 * np.eye(60, dtype=np.float32))[item])
    assert len(np.unique(leaf)) == 60
    assert len(np.unique(np.stack([leaf, item]), axis=1).T) == 60


def test_one_behaviour_a_leaf_is_the_life_itself():
    vectors, _ = blobs(200, 5)
    leaf = cluster_life(vectors, config=ClusterConfig(largest=1))
    np.testing.assert_array_equal(leaf, np.arange(200))


def test_a_set_has_at_least_two_children():
    """3^0.3 is 1.4: one child would never end."""
    leaf = cluster_life(np.eye(3, dtype=np.float32), config=ClusterConfig(largest=2))
    assert sorted(np.bincount(leaf)) == [1, 2]


def test_k_means_finds_blobs():
    """Two blobs of 15 do not fit into a leaf of 20, and one does. A border may cut through one now and then."""
    of = np.random.default_rng(1).permutation(np.repeat(np.arange(150), 15))
    centre, noise = np.random.default_rng(0).normal(size=(2, 2250, 8))
    leaf = cluster_life(10 * centre[of] + 0.02 * noise)
    assert 150 <= leaf.max() + 1 <= 153
    assert len(np.unique(np.stack([leaf, of]), axis=1).T) <= 153


def test_leaves_are_nearer_than_chunks_of_time():
    vectors = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    leaf = cluster_life(vectors)

    def spread(label):
        sums = np.zeros((label.max() + 1, 8))
        np.add.at(sums, label, vectors)
        return ((vectors - (sums / np.bincount(label)[:, None])[label]) ** 2).sum(1).mean()

    assert spread(leaf) < 0.4 * spread(np.arange(3000) // 11)
    assert 0.06 < (leaf.max() + 1) / 3000 < 0.15


def test_beyond_the_cap_nothing_is_clustered():
    vectors, _ = blobs(100, 5)
    leaf = cluster_life(vectors, config=ClusterConfig(cap=30))
    assert (leaf[:70] == -1).all()
    np.testing.assert_array_equal(leaf[70:], cluster_life(vectors[70:]))
    assert (cluster_life(vectors, config=ClusterConfig(cap=None)) >= 0).all()


def test_leaves_are_numbered_by_time():
    vectors, _ = blobs(500, 20)
    time = np.sort(np.random.default_rng(1).integers(0, 50, 500))  # many at equal times
    leaf = cluster_life(vectors, time=time)
    means = np.bincount(leaf, time) / np.bincount(leaf)
    assert (np.diff(np.floor(means)) >= 0).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    vectors, _ = blobs(4000, 100)
    rng = np.random.default_rng(0)
    key = np.sort(rng.integers(0, 40, 4000))
    rows = np.arange(4000)
    one, many = (divide(rows, rows, key, vectors, ClusterConfig(), threads=t) for t in (1, threads))
    np.testing.assert_array_equal(one.member, many.member)
    np.testing.assert_array_equal(one.offsets, many.offsets)


def test_a_set_is_divided_the_same_whatever_stands_beside_it():
    vectors, _ = blobs(400, 30)
    rows, key = np.arange(400), np.repeat([3, 7], 200)
    both = divide(rows, rows, key, vectors, ClusterConfig())
    alone = divide(rows[200:], rows[200:], key[200:], vectors, ClusterConfig())
    np.testing.assert_array_equal(both.member[200:], alone.member)


def test_taking_leaves():
    leaves = Leaves(np.array([5, 6, 1, 9]), np.array([0, 2, 3, 4]))
    some = leaves.take(np.array([2, 0]))
    assert some.member.tolist() == [9, 5, 6]
    assert some.offsets.tolist() == [0, 1, 3]
    assert leaves.first.tolist() == [5, 1, 9]


# -- groups --------------------------------------------------------------------------------------------------


def test_completion_groups_by_hand():
    group = Groups.by_completion().of([0.0, 0.19, 0.2, 0.5, 0.8, 1.0, 7.0, np.nan, np.inf, -0.1])
    assert group.tolist() == [0, 0, 1, 2, 4, 4, 4, 5, 5, 5]


def test_completion_of_odd_lines():
    ratio = completion_ratio([5, 5, 20, np.nan, -1, 0, 3], [10, 0, 10, 10, 10, 10, np.nan])
    np.testing.assert_array_equal(ratio, [0.5, np.nan, 1.0, np.nan, np.nan, 0.0, np.nan])
    with pytest.raises(
        DataError, match=r"\(2,\) play times for \(1,\) durations\. One duration a behaviour\."
    ):
        completion_ratio([1, 2], [3])


def test_a_stand_in_is_grouped_by_its_quantiles():
    price = np.arange(1, 101)
    groups = Groups.by_quantile("price", price, 4)
    assert np.bincount(groups.of(price)).tolist() == [25, 25, 25, 25]
    assert groups.of([np.nan, -5.0, 1e9]).tolist() == [4, 0, 3]
    assert len(Groups.by_quantile("quantity", np.ones(50)).boundaries) == 0  # nothing to divide by
    with pytest.raises(DataError, match="no finite value in 'price'"):
        Groups.by_quantile("price", np.array([np.nan]))


def test_one_group_needs_no_column():
    assert Groups().of(np.array([1.0, 2.0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Groups("x", (0.5, 0.5)),
            r"group boundaries \(0.5, 0.5\)\. Boundaries are finite and rise\.",
        ),
        (lambda: Groups("x", tuple(range(126))), "127 groups. There are at most 126 groups."),
        (lambda: Groups.by_completion(groups=0), "groups=0. There is at least one group."),
        (lambda: ClusterConfig(largest=0), r"largest=0, .* Pass cap=None for whole lives\."),
        (lambda: ClusterConfig(cap=0), "cap=0"),
        (lambda: ClusterConfig(power=1.0), r"power=1.0, reach=2.0\. 0 < power < 1 and reach ≥ 0\."),
        (lambda: ClusterConfig(reach=float("nan")), "reach=nan"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones(3),), r"vectors of shape \(3,\)\. One finite vector a behaviour, \(L, D\)\."),
        ((np.full((3, 2), np.nan),), "vectors of shape"),
        ((np.ones((3, 2)), np.ones(2)), r"times \(3,\) and completions \(2,\) for 3 behaviours\."),
        ((np.ones((3, 2)), None, np.array([1, 0, 2])), r"times that fall\. A life comes oldest first\."),
    ],
)
def test_bad_lives(arguments, message):
    with pytest.raises(DataError, match=message):
        cluster_life(*arguments)


# -- virtual items -------------------------------------------------------------------------------------------


def test_the_member_nearest_the_centroid_stands_for_a_leaf():
    table = np.float32([[0, 0], [1, 0], [2.5, 0], [9, 9]])
    item = np.array([0, 2, 1, 3, 1, 0, 1])
    # centroids (1.17, 0), itself, and between copies: the newest of equals
    assert representatives(item, np.array([0, 3, 4, 7]), table).tolist() == [2, 3, 6]


def test_means_by_hand():
    offsets = np.array([0, 3, 4, 6])
    values = np.array([1.0, np.nan, 4.0, np.inf, -2.0, 3.0])
    np.testing.assert_array_equal(mean_values(values, offsets), [2.5, np.nan, 0.5])
    late = 1_700_000_000_000_000_000  # nanoseconds: no float64 holds them all
    assert mean_times(late + np.array([0, 1, 2, 5, 7, 8]), offsets).tolist() == [late + 1, late + 5, late + 7]


# -- join ----------------------------------------------------------------------------------------------------


def joined(vectors, leaf, group=None, **changes):
    c = ClusterConfig(**changes)
    leaf = np.array(leaf)
    group = np.zeros(len(leaf), np.int8) if group is None else np.array(group, np.int8)
    join(
        np.arange(len(leaf)),
        group,
        leaf,
        np.float32(vectors),
        c.largest,
        c.power,
        c.iterations,
        c.sample,
        c.reach,
    )
    return leaf.tolist()


LINE = [[0.0], [1.0], [10.0], [11.0]]


def test_a_behaviour_joins_the_nearest_leaf():
    assert joined([*LINE, [10.4], [0.6]], [0, 0, 1, 1, -1, -1]) == [0, 0, 1, 1, 1, 0]


def test_a_behaviour_far_from_all_is_a_leaf_of_its_own():
    # The typical radius is .5; reach 2 is a distance of 1 from a centroid.
    assert joined([*LINE, [1.49], [1.6], [1.7]], [0, 0, 1, 1, -1, -1, -1]) == [0, 0, 1, 1, 0, 0, 0]
    assert joined([*LINE, [5.0], [5.1]], [0, 0, 1, 1, -1, -1]) == [0, 0, 1, 1, 2, 2]
    assert joined([*LINE, [1.49]], [0, 0, 1, 1, -1], reach=1.0) == [0, 0, 1, 1, 2]


def test_a_behaviour_joins_its_own_group_only():
    assert joined([*LINE, [0.4], [0.4]], [0, 0, 1, 1, -1, -1], [0, 0, 1, 1, 1, 2]) == [0, 0, 1, 1, 2, 3]


def test_a_full_leaf_is_divided_alone():
    vectors = [[0.0], [0.1], [1.0], [10.0], [11.0], [1.1]]
    assert joined(vectors, [0, 0, 0, 1, 1, -1], largest=3) == [0, 0, 2, 1, 1, 2]


def test_copies_fill_the_leaf_with_room():
    n = 65
    leaf = joined(np.full((n, 2), 0.1), [*np.repeat(np.arange(2), 20), *[-1] * (n - 40)])
    assert leaf[:40] == np.repeat(np.arange(2), 20).tolist()
    assert np.bincount(leaf).tolist() == [20, 20, 20, 5]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(old=st.integers(1, 120), new=st.integers(1, 60), largest=st.integers(1, 9), seed=st.integers(0, 5))
def test_joined_lives_keep_the_promises_of_leaves(old, new, largest, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(15, 3)).astype(np.float32)[rng.integers(15, size=old + new)]
    group = rng.integers(0, 3, old + new)
    config = ClusterConfig(largest=largest)
    leaf = np.full(old + new, -1)
    leaf[:old] = cluster_life(vectors[:old], group[:old], groups=Groups("g", (1, 2)), config=config)
    leaf = np.array(joined(vectors, leaf, group, largest=largest))
    sizes = np.bincount(leaf)
    assert leaf.min() == 0
    assert (sizes > 0).all()
    assert sizes.max() <= largest
    assert len(np.unique(leaf)) == len(np.unique(np.stack([leaf, group]), axis=1).T)
