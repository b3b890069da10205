"""The streaming estimator: exact on regular streams, a stated memory, collisions on the safe side."""

import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError
from tiglon.retrieval.frequency import FrequencyEstimator

torch.set_num_threads(1)


def every(k, times, item=7, other=1000):
    """A stream in which `item` comes each k-th time."""
    stream = torch.full((k * times,), other)
    stream[k - 1 :: k] = item
    return stream


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_an_item_every_k_examples_has_probability_one_kth(k):
    estimator = FrequencyEstimator()
    estimator.update(every(k, 30))
    assert estimator.probability(torch.tensor([7])).item() == pytest.approx(1 / k)


def test_batches_make_no_difference():
    stream = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 1000))
    whole, parts = FrequencyEstimator(buckets=64), FrequencyEstimator(buckets=64)
    whole.update(stream)
    for part in stream.split(37):
        parts.update(part)
    assert torch.equal(whole.gap, parts.gap)
    assert torch.equal(whole.last, parts.last)


def test_after_a_change_of_rate_it_tracks_with_time_constant_one_over_alpha():
    estimator = FrequencyEstimator(rate=0.1)
    estimator.update(every(20, 50))
    for n in (1, 10, 30):
        changed = FrequencyEstimator(rate=0.1)
        changed.load_state_dict(estimator.state_dict())
        changed.update(every(5, n))
        expected = 5 + (20 - 5) * 0.9**n
        assert 1 / changed.probability(torch.tensor([7])).item() == pytest.approx(expected, rel=1e-5)


def test_it_learns_the_distribution_of_a_random_stream():
    p = 1 / np.arange(1, 101)
    p /= p.sum()
    estimator = FrequencyEstimator(rate=0.01)
    estimator.update(torch.from_numpy(np.random.default_rng(0).choice(100, 200_000, p=p)))
    found = estimator.probability(torch.arange(100)).numpy()
    np.testing.assert_allclose(np.log(found), np.log(p), atol=0.35)
    assert abs(np.log(found / p).mean()) < 0.03


def test_collisions_shorten_gaps_and_the_longest_of_several_hashes_is_nearest():
    stream = torch.from_numpy(np.random.default_rng(0).integers(0, 300, 60_000))
    exact = FrequencyEstimator(buckets=1 << 20, hashes=1)
    exact.update(stream)
    truth = exact.probability(torch.arange(300))
    too_often = []
    for hashes in (1, 2, 5):
        crowded = FrequencyEstimator(buckets=400, hashes=hashes)
        crowded.update(stream)
        found = crowded.probability(torch.arange(300))
        too_often.append((found > 1.5 * truth).float().mean().item())
        assert (1 / found).max() < 2 * (1 / truth).max()
    assert too_often[0] > too_often[1] > too_often[2]


@pytest.mark.parametrize("buckets, hashes", [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_collisions_never_lengthen_a_gap(buckets, hashes):
    """Items that come every 2, 4 and 8 examples, some or all of them in one bucket."""
    estimator = FrequencyEstimator(buckets=buckets, hashes=hashes, rate=0.1)
    estimator.update(torch.tensor([0, 1, 0, 2, 0, 1, 0, 3] * 100))
    gap = 1 / estimator.probability(torch.arange(4))
    assert (gap <= torch.tensor([2.0, 4.0, 8.0, 8.0]) * 1.001).all()


def test_what_never_came_and_what_is_rare_have_bounded_probabilities():
    estimator = FrequencyEstimator(floor=0.01)
    estimator.update(every(2, 25))
    assert estimator.probability(torch.tensor([99])).item() == pytest.approx(1 / 51)
    estimator.update(every(2, 500))
    assert estimator.probability(torch.tensor([99])).item() == pytest.approx(0.01)
    assert FrequencyEstimator().probability(torch.tensor([[3, 4]])).tolist() == [[1.0, 1.0]]


def test_bad_settings_are_named():
    for wrong in ({"rate": 0.0}, {"buckets": 0}, {"hashes": 0}, {"floor": 2.0}):
        with pytest.raises(ConfigError, match="at least one bucket"):
            FrequencyEstimator(**wrong)
