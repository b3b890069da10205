"""What the probe says of networks whose answer to a flag is known."""

import numpy as np
import polars as pl
import pytest
import torch

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.features import Feature, FeatureSchema, fit
from tiglon.data.ranking import BasketConfig, next_basket
from tiglon.errors import ConfigError, DataError
from tiglon.ranking.gates import submergence
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.ranking.probe import MOST, probe, stored_requests
from tiglon.ranking.ranker import RankerConfig

FLAG, HOUR, USER, ALWAYS = "newcomer", "hour", "user_id", "always"
SCHEMA = FeatureSchema(
    [
        Feature("item_id", "inherent", width=4),
        Feature(USER, "user"),
        Feature(FLAG, "context"),
        Feature(HOUR, "context", "number"),
        Feature(ALWAYS, "context"),
    ]
)


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(10), 8),
            "item_id": rng.integers(6, size=80),
            "timestamp": np.tile(np.arange(8), 10),
            FLAG: np.where(np.tile(np.arange(8), 10) < 2, "yes", "no"),
            HOUR: rng.integers(24, size=80),
            ALWAYS: "so",
        }
    )
    log, items, _ = align(read_interactions(log), read_items(pl.DataFrame({"item_id": range(6)})))
    features = fit(SCHEMA, items, log, pl.DataFrame({"user_id": range(10)}))
    return next_basket(log, features, np.bincount(log.item, minlength=6), config=BasketConfig(first=1))


def ranker_of(task, **settings):
    network = RankerConfig(hidden=(8, 4), **settings)
    return LifelongRanker.of(task, LifelongConfig(long="none", short="none", network=network))


def test_of_a_flag_it_is_the_submergence_of_the_last_layer(task):
    ranker = ranker_of(task)
    (found,) = probe(ranker, task, [FLAG])
    batch = task.select(np.arange(32)).batches(32)[0]
    layers = submergence(lambda p: ranker.network.hidden(batch._replace(profile=p)), batch.profile, 1, (1, 2))
    assert (found.feature, found.values) == (FLAG, 2)
    assert found.hidden == pytest.approx(layers[-1], rel=1e-6)
    assert found.hidden > 0


def test_answers_move_by_the_log_odds(task):
    """A network that is the sum of its input: vectors of 1s and 3s, eight wide, move it by 16."""
    ranker = ranker_of(task)
    network = ranker.network
    with torch.no_grad():
        network.trunk, width = torch.nn.Sequential(), network.trunk[0].in_features
        network.heads = torch.nn.Linear(width, 1)
        network.heads.weight.fill_(1.0)
        network.embed.profiles[1].weight[1], network.embed.profiles[1].weight[2] = 1.0, 3.0
    (found,) = probe(ranker, task, [FLAG])
    assert found.logit == pytest.approx(16, rel=1e-5)
    assert np.isnan(found.hidden)  # there is no hidden layer


def test_a_feature_that_is_not_listened_to_moves_nothing(task):
    ranker = ranker_of(task)
    with torch.no_grad():
        for table in ranker.network.embed.profiles:
            table.weight.copy_(table.weight[:1].expand_as(table.weight))
    assert all((moved.hidden, moved.logit) == (0.0, 0.0) for moved in probe(ranker, task))


def test_all_features_of_who_asks_and_their_values(task):
    found = {moved.feature: moved.values for moved in probe(ranker_of(task), task)}
    assert found[USER] == 10
    assert found[FLAG] == 2
    assert found[ALWAYS] == 1  # told apart from the unknown value
    assert found[HOUR] > MOST


def test_the_mean_is_over_pairs_of_values_spread_over_all(task):
    ranker = ranker_of(task)
    with torch.no_grad():
        ranker.network.trunk, width = torch.nn.Sequential(), ranker.network.trunk[0].in_features
        ranker.network.heads = torch.nn.Linear(width, 1)
        ranker.network.heads.weight.fill_(1.0)
        table = ranker.network.embed.profiles[0].weight
        table.zero_()
        table[:, 0] = torch.arange(len(table))  # codes 1, 4, 7 and 10 of ten users
    (found,) = probe(ranker, task, [USER])
    assert found.logit == pytest.approx(np.mean([3, 6, 9, 3, 6, 3]), rel=1e-5)


def test_requests_are_made_of_what_is_stored(task):
    ranker = ranker_of(task)
    asked = stored_requests(ranker, users=4, candidates=3)
    assert asked.user.tolist() == [0, 3, 6, 9]
    assert (asked.time == 8).all()
    often = np.argsort(-np.bincount(ranker.histories.item), kind="stable")[:3]
    assert asked.item.tolist() == often.tolist() * 4
    assert all(moved.hidden > 0 for moved in probe(ranker, asked))


def test_what_cannot_be_probed(task):
    with pytest.raises(ConfigError, match=r"no feature 'newcommer' of who asks\. Did you mean 'newcomer'\?"):
        probe(ranker_of(task), task, ["newcommer"])
    with pytest.raises(DataError, match="a probe with a task of no requests"):
        probe(ranker_of(task), task.select(np.arange(0)))
