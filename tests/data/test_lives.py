import numpy as np
import polars as pl
import pytest
import torch

from tiglon.data.lives import lives, planted
from tiglon.data.ranking import kuairand_task
from tiglon.errors import ConfigError
from tiglon.evaluation.ranking import auc
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.pooling import FullAttention
from tiglon.ranking.ranker import Ranker, RankerConfig

L, K = 600, 8


@pytest.fixture(scope="module")
def world():
    return planted(L, 120, K, seed=1)


def matches(task, last=None):
    """(C,) how many behaviours of a candidate's topic there are, and how many of them were watched to the end."""
    topic = task.features.item_codes[:, 1]
    whole = task.features.coders["completion"].of(np.array([0.9]))[0]
    past = task.store.before(task.user, task.time, last)
    same, both = [], []
    for r in range(len(task)):
        rows = slice(past.offsets[r], past.offsets[r + 1])
        of = topic[past.item[rows]]
        seen = past.features["completion"][rows] >= whole
        for item in task.item[task.offsets[r] : task.offsets[r + 1]]:
            same.append((of == topic[item]).sum())
            both.append(((of == topic[item]) & seen).sum())
    return np.array(same), np.array(both)


# -- planted truth -----------------------------------------------------------------------------------------


def test_the_planted_behaviours_are_of_the_candidates_topic(world):
    task, positions = world
    assert positions.shape == (len(task.item), K)
    topic = task.features.item_codes[:, 1]
    decided = positions[:, 0] >= 0
    assert decided.mean() == 0.5
    assert (positions[~decided] == -1).all()
    assert (np.diff(positions[decided], axis=1) > 0).all()
    assert positions.max() < L - 50
    at = task.store.offsets[task.user[task.owner]][:, None] + positions
    np.testing.assert_array_equal(
        topic[task.store.item[at[decided]]], np.repeat(topic[task.item[decided]][:, None], K, axis=1)
    )


def test_only_topic_and_completion_together_tell(world):
    label = world.task.label[:, 0]
    same, both = matches(world.task)
    assert (same == K + L // 100).all()  # so the topic alone tells nothing
    assert auc(both, label) > 0.95
    np.testing.assert_array_equal(both >= K, world.positions[:, 0] >= 0)
    recent, _ = matches(world.task, last=50)
    assert not recent.any()
    assert abs(auc(recent, label) - 0.5) < 1e-9


def test_popularity_and_place_tell_nothing(world):
    label = world.task.label[:, 0]
    bought = np.bincount(world.task.store.item, minlength=2000)
    assert abs(auc(bought[world.task.item], label) - 0.5) < 0.1
    place = np.arange(len(label)) - world.task.offsets[world.task.owner]
    assert abs(auc(place, label) - 0.5) < 0.1


def test_a_world_is_a_function_of_its_seed(world):
    again, other = planted(L, 120, K, seed=1), planted(L, 120, K, seed=2)
    np.testing.assert_array_equal(again.positions, world.positions)
    np.testing.assert_array_equal(again.task.store.item, world.task.store.item)
    assert not np.array_equal(other.task.store.item, world.task.store.item)


def test_what_was_learned_at_one_length_can_be_asked_at_another(world):
    longer = planted(3000, 3, K, seed=5, features=world.task.features)
    assert longer.task.features is world.task.features
    batch = longer.task.batches()[0]
    assert batch.past.mask.sum(dim=1).tolist() == [3000] * 3
    sizes = torch.tensor(world.task.features.cross_sizes)
    assert (batch.past.cross < sizes).all()
    assert (longer.task.features.item_codes[:-1] > 0).all()  # every item had a training line


def test_attention_over_everything_learns_it():
    """In 140 steps, where embeddings begin wide enough for attention to tell topics apart."""
    train = planted(100, 140 * 32, 6, seed=0).task
    test = planted(100, 150, 6, seed=1, features=train.features).task
    torch.manual_seed(0)
    embed = FeatureEmbedding(**train.features.embedding(), std=0.3)
    model = Ranker(embed, FullAttention(embed), config=RankerConfig(hidden=(32,)))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for batch in train.batches(32, seed=0):
        optimizer.zero_grad()
        model.loss(batch).mean().backward()
        optimizer.step()
    with torch.no_grad():
        score = torch.cat([model(batch).flatten() for batch in test.batches()])
    assert auc(score.numpy(), test.label[:, 0]) > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 5, 20), r"4 candidates × \(20 behaviours \+ 1 decoys\) in a life of 100.*Lengthen the life"),
        ((1000, 5, 0), r"k=0"),
        ((1000, 0, 5), r"requests=0"),
    ],
)
def test_a_life_too_short_for_its_truth_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        planted(*arguments)


# -- lives -------------------------------------------------------------------------------------------------


def test_lives_have_the_stated_shape():
    source = lives(400, 2000, events_per_user=300, longest=4000, seed=0)
    log = source.interactions
    lengths = log.group_by("user_id").len()["len"].to_numpy()
    assert len(lengths) == 400
    assert lengths.min() >= 1
    assert lengths.max() <= 4000
    assert 0.7 < lengths.mean() / 300 < 1.3
    assert lengths.max() > 6 * lengths.mean()
    assert 0.3 < np.median(lengths) / lengths.mean() < 0.6
    assert (log["duration_ms"] == 0).any()
    assert (log["play_time_ms"] > log["duration_ms"]).mean() > 0.02
    ordered = log.sort("user_id", "timestamp", maintain_order=True)
    assert ordered["timestamp"].equals(log["timestamp"])


def test_interests_drift():
    """A user's favourite topic of the first tenth is seldom that of the last."""
    source = lives(50, 1000, events_per_user=1000, seed=3)
    topic = source.items["tag"].to_numpy()
    log = source.interactions.with_columns(topic=pl.Series(topic[source.interactions["item_id"].to_numpy()]))
    same, users = 0, 0
    for (_,), life in log.group_by("user_id"):
        if len(life) >= 300:
            tenth = len(life) // 10
            old, new = (
                set(part["topic"].value_counts(sort=True)["topic"][:5])
                for part in (life[:tenth], life[-tenth:])
            )
            same, users = same + len(old & new), users + 1
    assert users > 20
    assert same / users < 1.5


def test_lives_are_read_as_kuairand():
    source = lives(15, 500, events_per_user=100, seed=0)
    assert source.interactions.equals(lives(15, 500, events_per_user=100, seed=0).interactions)
    tasks = kuairand_task(source, validation_days=3, test_days=3)
    batch = tasks.test.batches(4)[0]
    assert batch.past.cross.shape[2] == 4
    assert batch.label.shape[2] == 3


def test_impossible_lives_are_refused():
    with pytest.raises(ConfigError, match=r"3 topics.*10 … items topics"):
        lives(3, topics=3)
