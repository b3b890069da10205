"""Shared bottom and MMoE: by their definitions, and who shares what."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.features import Feature, FeatureSchema, fit
from tiglon.data.ranking import BasketConfig, next_basket
from tiglon.errors import DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.model import LifelongConfig, LifelongRanker
from tiglon.ranking.pooling import MeanPooling
from tiglon.ranking.ranker import Ranker, RankerConfig
from tiglon.ranking.tasks import MMoE, Towers, mlp
from tiglon.train.loop import TrainConfig
from tiglon.train.multitask import PCGrad, Uncertainty
from tiglon.types import Behaviours, RankingBatch

TASKS = ("click", "like", "buy")
NAN = float("nan")
SHAPES = {
    "linear": RankerConfig(hidden=(8, 6)),
    "towers": RankerConfig(hidden=(8, 6), tower=(4,)),
    "mmoe": RankerConfig(hidden=(8, 6), experts=3, tower=(4,)),
    "mmoe, linear": RankerConfig(hidden=(8, 6), experts=2),
}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(5, 7)


@pytest.fixture
def requests():
    torch.manual_seed(1)
    past = Behaviours(
        torch.randint(0, 9, (2, 4)),
        torch.randint(0, 4, (2, 4, 1)),
        torch.ones(2, 4),
        torch.ones(2, 4, dtype=torch.bool),
    )
    label = torch.tensor([[[1, 0, NAN], [0, 1, NAN]], [[1, NAN, NAN], [0, 0, NAN]]])
    return RankingBatch(torch.randint(0, 9, (2, 2)), past, torch.tensor([[1], [2]]), label)


def ranker(config):
    torch.manual_seed(3)
    codes = np.concatenate([np.arange(1, 10), [0]])[:, None]
    embed = FeatureEmbedding(codes, (10,), (6,), (4,), (3,), std=0.5)
    return Ranker(embed, MeanPooling(embed), tasks=TASKS, config=config)


def test_mmoe_by_its_definition(x):
    layer = MMoE(7, tasks=2, experts=3, hidden=(6, 4))
    found = layer(x)
    assert found.shape == (5, 2, 4)
    for n in range(5):
        for t in range(2):
            powers = [torch.exp(layer.gates[t].weight[e] @ x[n]).item() for e in range(3)]
            expected = sum(
                power / sum(powers) * layer.experts[e](x[n : n + 1])[0] for e, power in enumerate(powers)
            )
            torch.testing.assert_close(found[n, t], expected, rtol=1e-4, atol=1e-6)


def test_one_expert_is_a_shared_bottom(x):
    layer, bottom = MMoE(7, tasks=2, experts=1, hidden=(6, 4)), mlp(7, (6, 4))
    bottom.load_state_dict(layer.experts[0].state_dict())
    towers = Towers(4, 2, (3,))
    torch.testing.assert_close(towers(layer(x)), towers(bottom(x)))


def test_a_gate_that_has_decided_reaches_one_expert(x):
    layer = MMoE(7, tasks=2, experts=3, hidden=(4,))
    with torch.no_grad():
        for gate, chosen in zip(layer.gates, (0, 2), strict=True):
            gate.weight.zero_()
            gate.weight[chosen] = 1e4 * x[0]
    said = layer(x[:1])
    torch.testing.assert_close(said[:, 0], layer.experts[0](x[:1]))
    torch.testing.assert_close(said[:, 1], layer.experts[2](x[:1]))
    said[:, 0].sum().backward()
    assert layer.experts[0][0].weight.grad.abs().sum() > 0
    assert not layer.experts[2][0].weight.grad.any()


def test_towers_without_hidden_layers_are_linear(x):
    towers = Towers(7, 2)
    expected = [x @ tower[-1].weight[0] + tower[-1].bias for tower in towers.towers]
    torch.testing.assert_close(towers(x), torch.stack(expected, dim=1))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_each_shape_in_the_shell(config, requests):
    model = ranker(config)
    assert model(requests).shape == (2, 2, 3)
    losses = model.losses(requests)
    assert {name: len(loss) for name, loss in losses.items()} == {"click": 4, "like": 3, "buy": 0}
    together = torch.cat(list(losses.values())).sort().values
    torch.testing.assert_close(together, model.loss(requests).sort().values)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_what_is_own_reads_one_task(config, requests):
    """Every parameter is in one of the two lists, and no gradient of a task reaches another's own."""
    model = ranker(config)
    shared, own = model.shared_and_own()
    assert {id(p) for p in [*shared, *own]} == {id(p) for p in model.parameters()}
    assert len(shared) + len(own) == len(list(model.parameters()))
    click, like = (
        torch.autograd.grad(loss.sum(), own, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in list(model.losses(requests).values())[:2]
    )
    for a, b in zip(click, like, strict=True):
        assert not ((a != 0) & (b != 0)).any()
    assert any(a.any() for a in click)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_task_without_labels_teaches_nothing(config, requests):
    model, method = ranker(config), PCGrad(TASKS)
    loss = method(model.losses(requests), *model.shared_and_own())
    loss.backward()
    assert loss.isfinite()
    assert method.weight["buy"] == 0
    assert method.passes == 2
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_plain_shell_begins_as_it_always_did(requests):
    """Saved rankers keep their names: a linear head is one layer for all tasks."""
    names = {name for name, _ in ranker(SHAPES["linear"]).named_parameters()}
    assert {"trunk.0.weight", "trunk.1.weight", "trunk.3.bias", "heads.weight", "heads.bias"} <= names


# -- in a ranker --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    """Each user keeps to one of two groups of five items, of which odd ones are bought in twos."""
    rng = np.random.default_rng(0)
    rows = [
        (user, int(5 * (user % 2) + (item := rng.integers(5))), 10 * n, 1 + int(item) % 2)
        for user in range(30)
        for n in range(12)
    ]
    log = read_interactions(pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "quantity"], orient="row"))
    log, items, _ = align(log, read_items(pl.DataFrame({"item_id": range(10)})))
    features = fit(FeatureSchema([Feature("item_id", "inherent", width=8)]), items, log)
    counts = np.bincount(log.item, minlength=10)
    config = BasketConfig(first=2, negatives=3)
    return next_basket(log, features, counts, config=config, tasks=("next_basket", "quantity_2"))


def small(epochs=6):
    return LifelongConfig(
        long="mean_pooling",
        short="none",
        network=RankerConfig(hidden=(16,), experts=2, tower=(8,)),
        train=TrainConfig(epochs=epochs, lr=0.03, bfloat16=False, evaluations=1, average=0.9),
    )


def test_a_ranker_learns_all_its_tasks(task, tmp_path):
    ranker = LifelongRanker.of(task, small()).fit(task, task, method=Uncertainty(task.tasks))
    found = {e.task: e.metrics["auc"] for e in ranker.evaluate(task)}
    assert found["next_basket"] > 0.7
    assert found["quantity_2"] > 0.9
    ranker.save(tmp_path / "ranker")
    np.testing.assert_array_equal(LifelongRanker.load(tmp_path / "ranker").score(task), ranker.score(task))


def test_a_task_without_positives_is_named(task):
    label = task.label.copy()
    label[:, 1] = 0
    with pytest.raises(DataError) as error:
        LifelongRanker.of(task, small(1)).fit(dataclasses.replace(task, label=label))
    assert str(error.value) == (
        "the label 'quantity_2' is always 0 in the 300 requests to learn from. "
        "A task has positives and negatives. Leave the task out, or give it requests of a longer time."
    )
    label[:, 1] = NAN
    with pytest.raises(DataError, match="'quantity_2' is never given"):
        LifelongRanker.of(task, small(1)).fit(dataclasses.replace(task, label=label))
