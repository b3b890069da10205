import numpy as np
import pytest

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.histories import HistoryStore
from tiglon.data.synthetic import synthetic
from tiglon.errors import ConfigError
from tiglon.types import Histories


def test_the_same_seed_makes_the_same_world():
    a, b, c = (synthetic(50, 40, 10, seed).source() for seed in (1, 1, 2))
    assert a.interactions.equals(b.interactions)
    assert a.items.equals(b.items)
    assert not a.interactions.equals(c.interactions)


def test_sizes_and_order():
    world = synthetic(5000, 200, 8, seed=3, clusters=10)  # more users than one block
    source = world.source()
    log = read_interactions(source.interactions)
    assert len(log) == source.interactions.height == world.lengths.sum()  # no duplicates
    np.testing.assert_array_equal(np.bincount(log.user), world.lengths)
    assert world.lengths.mean() == pytest.approx(8, rel=0.05)
    np.testing.assert_array_equal(log.users.raw, np.arange(5000))
    assert len(read_items(source.items)) == 200


def test_popularity_is_zipf_inside_each_cluster():
    world = synthetic(10, 100, 5, clusters=4, zipf=1.0)
    harmonic = 1 / np.arange(1, 26)
    for cluster in range(4):
        share = np.sort(world.popularity[world.cluster == cluster])[::-1]
        np.testing.assert_allclose(share, harmonic / harmonic.sum())


def test_events_follow_the_stated_interest_and_popularity():
    world = synthetic(20_000, 30, 12, seed=5, clusters=3, repeat=0.0)
    log = read_interactions(world.source().interactions, items=read_items(world.items).vocabulary)
    position = np.arange(len(log)) - np.repeat(np.cumsum(world.lengths) - world.lengths, world.lengths)
    expected = (world.interest(log.user, position)[:, world.cluster] * world.popularity).sum(axis=0)
    observed = np.bincount(log.item, minlength=30)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected)).all()


def test_interest_drifts_from_origin_to_destination():
    world = synthetic(100, 40, 20, seed=1, clusters=20)
    users = np.flatnonzero(world.origin != world.destination)
    young, old = world.interest(users, np.zeros(len(users))), world.interest(users, world.lengths[users] - 1)
    np.testing.assert_array_equal(young.argmax(axis=1), world.origin[users])
    np.testing.assert_array_equal(old.argmax(axis=1), world.destination[users])
    np.testing.assert_allclose(young.sum(axis=1), 1)


def test_repeats():
    everything = synthetic(200, 5000, 10, seed=1, clusters=1, focus=1.0, repeat=1.0).source().interactions
    assert everything.group_by("user_id").n_unique()["item_id"].max() == 1


def test_the_oracle_is_a_distribution_and_nothing_beats_it():
    world = synthetic(3000, 60, 15, seed=7, clusters=6)
    log = align(read_interactions(world.source().interactions), read_items(world.items)).interactions
    users = np.arange(3000)
    last = np.cumsum(world.lengths) - 1
    past = HistoryStore.build(log).before(users, time=log.time[last])
    truth = log.item[last]
    p_BN = world.oracle(users, past)
    np.testing.assert_allclose(p_BN.sum(axis=1), 1)

    def likelihood(p_BN):
        return np.log(p_BN[users, truth]).mean()

    assert likelihood(p_BN) == pytest.approx((p_BN * np.log(p_BN)).sum(axis=1).mean(), abs=0.1)  # calibrated
    popular = np.bincount(past.item, minlength=60) + 1.0
    assert likelihood(p_BN) > likelihood(np.tile(popular / popular.sum(), (3000, 1))) + 0.5
    no_past = world.oracle(users[:1], Histories.of([[]]))
    np.testing.assert_allclose(no_past.sum(), 1)


def test_text_tells_the_cluster():
    world = synthetic(10, 300, 5, clusters=5)
    words = [set(title.split()[:4]) for title in world.items["title"]]
    for a in range(0, 300, 7):
        for b in range(a + 1, 300, 11):
            if world.cluster[a] != world.cluster[b]:
                assert not words[a] & words[b]


def test_impossible_worlds():
    with pytest.raises(ConfigError, match=r"1 users, 3 items, 4 clusters.*an item a cluster"):
        synthetic(1, 3, 5, clusters=4)
    with pytest.raises(ConfigError, match=r"repeat=1\.5. Both lie in 0 … 1"):
        synthetic(1, 3, 5, clusters=1, repeat=1.5)
