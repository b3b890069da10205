"""Two towers: the in-batch loss by a loop, estimates in training alone, edges, learning, cold items."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiglon.data.split import leave_last_out
from tiglon.errors import ConfigError
from tiglon.evaluation.protocol import evaluate
from tiglon.nn.transformer import PADDING
from tiglon.retrieval.towers import Past
from tiglon.retrieval.two_tower import TwoTower, TwoTowerConfig
from tiglon.retrieval.windows import Batch
from tiglon.train.loop import TrainConfig
from tiglon.types import Histories, Interactions, Vocabulary

torch.set_num_threads(1)

N = 20
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
VECTORS = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
FAST = TrainConfig(epochs=15, lr=2e-2, evaluations=2, average=0.9, bfloat16=False)
TINY = TwoTowerConfig(
    width=16, hidden=32, dropout=0.0, window=10, batch_targets=128, uniform=16, users=7, train=FAST
)
ROWS = [([3, 1, 4], 5), ([9], 2), ([], 7), ([5, 5, 5], 3), ([2, 9], 2)]


def make(vectors=VECTORS, **changes):
    return TwoTower(ITEMS, TwoTowerConfig(**{**TINY.__dict__, **changes}), vectors)


def batch(rows=ROWS, users=None):
    width = max(len(past) for past, _ in rows) + 1
    item, moment = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), PADDING)
    target = torch.zeros(len(rows), width, dtype=torch.bool)
    for r, (past, next_item) in enumerate(rows):
        life = torch.tensor([*past, next_item])
        item[r, : len(life)], moment[r, : len(life)] = life, torch.arange(len(life))
        target[r, len(past)] = True
    return Batch(item, moment, target, torch.arange(len(rows)) if users is None else users)


@pytest.mark.parametrize("uniform", [0, 16])
@pytest.mark.parametrize("logq", [False, True])
@torch.no_grad()
def test_the_loss_is_its_definition(logq, uniform):
    """Row 4's target is row 1's too; rows 0 and 3 know each other's targets."""
    made = make(uniform=uniform, logq=logq)
    made.network.frequency.update(torch.arange(10).repeat(5))
    drawn = torch.randint(N, (uniform,), generator=torch.manual_seed(0)).tolist()
    torch.manual_seed(0)
    losses = made.network.loss(batch())
    vectors = torch.from_numpy(made.vectors())
    target = [item for _, item in ROWS]
    p = made.network.frequency.probability(torch.tensor(target + drawn)).tolist()
    for r, (past, item) in enumerate(ROWS):
        history = Histories(np.array([0, len(past)]), np.array(past, np.int64), np.arange(len(past)),
                            user=np.array([r]))  # fmt: skip
        user = torch.from_numpy(made.users(history)[0])[0, 0]
        total = own = math.exp(user @ vectors[item] / 0.05)
        for c, other in enumerate(target + drawn):
            if other != item and other not in past:
                weight = 1 / ((len(ROWS) - 1) * p[c] + uniform / N) if logq else 1.0
                total += math.exp(user @ vectors[other] / 0.05) * weight
        assert losses[r].item() == pytest.approx(-math.log(own / total), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("logq", [False, True])
def test_targets_of_earlier_batches_are_negatives_too(logq):
    made = make(uniform=0, bank=3, logq=logq)
    network = made.network.train()
    alone = make(uniform=0, logq=logq).network.train()
    first, second = batch(ROWS), batch([([2], 11), ([12], 13)])
    losses = []
    for one in (network, alone):
        torch.manual_seed(0)  # for who is taken for a stranger
        losses.append(one.loss(first))
    torch.testing.assert_close(*losses)  # nothing came before
    kept = [item for _, item in ROWS][-3:]
    assert network.bank.tolist() == kept
    found = network.eval().loss(second)  # looks at them, and takes in none
    assert network.bank.tolist() == kept
    user = network.users(Past.of(second))[0][:, 0]
    vectors, candidates = network.vectors(), [11, 13, *kept]
    p = network.frequency.probability(torch.tensor(candidates))
    for r, (past, item) in enumerate([(2, 11), (12, 13)]):
        logit = user[r] @ vectors[candidates].T / 0.05 - (torch.log(4 * p) if logq else 0)
        logit[r] = user[r] @ vectors[item] / 0.05
        there = torch.tensor([c not in (past, item) or n == r for n, c in enumerate(candidates)])
        assert found[r].item() == pytest.approx(
            (logit[there].logsumexp(0) - logit[r]).item(), rel=1e-4, abs=1e-5
        )


def test_a_batch_of_one_has_no_loss():
    network = make(uniform=0).network.train()
    loss = network.loss(batch(ROWS[:1])).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter():
    network, order = make(uniform=0).network, [3, 0, 4, 2, 1]
    mixed = network.loss(batch([ROWS[r] for r in order], torch.tensor(order)))
    torch.testing.assert_close(mixed, network.loss(batch())[order])


@torch.no_grad()
def test_one_users_other_targets_are_no_negatives():
    network = make(uniform=0).network
    rows = [([3], 5), ([4], 6)]
    assert (network.loss(batch(rows, torch.tensor([8, 8]))) == 0).all()
    assert (network.loss(batch(rows, torch.tensor([8, 9]))) > 0).all()
    assert (network.loss(batch(rows, torch.tensor([-1, -1]))) > 0).all()  # two strangers


def test_frequencies_are_learned_in_training_and_change_no_answer():
    made, histories = make(), Histories.of([[3, 1], []])
    before = made.score(histories)
    made.network.eval().loss(batch())
    assert made.network.frequency.now.item() == 0
    made.network.train().loss(batch())
    assert made.network.frequency.now.item() == len(ROWS)
    np.testing.assert_array_equal(made.network.eval() and made.score(histories), before)


@torch.no_grad()
def test_users_and_items_have_length_one_whatever_the_history():
    made = make(np.concatenate([np.zeros((1, 6), np.float32), VECTORS[1:]]))
    users = made.users(Histories.of([[], [0], [4] * 30, list(range(N))]))[0]
    np.testing.assert_allclose(np.linalg.norm(users, axis=-1), 1, rtol=1e-5)
    assert made.vectors().shape == (N, 16)
    np.testing.assert_allclose(np.linalg.norm(made.vectors(), axis=1), 1, rtol=1e-5)


def test_it_learns_what_follows_what_from_the_batch_alone():
    lives = (np.random.default_rng(0).integers(0, N, (80, 1)) + np.arange(8)) % N
    log = Interactions(
        user=np.repeat(np.arange(80), 8).astype(np.int32),
        item=lives.ravel().astype(np.int32),
        time=np.tile(np.arange(8), 80),
        users=Vocabulary([f"u{i}" for i in range(80)]),
        items=ITEMS,
    )
    split = leave_last_out(log)
    learned = make(None, uniform=0).fit(split.train, split.validation)
    assert evaluate(learned, split.test, ks=(1,)).metrics["recall@1"] > 0.9


@pytest.mark.parametrize("again", [0.0, 0.5])
def test_it_learns_last_whether_people_come_back(again):
    rng = np.random.default_rng(0)
    lives = np.array([rng.permutation(N)[:8] for _ in range(200)])
    for at in range(1, 8):
        repeat = rng.random(200) < again
        lives[repeat, at] = lives[repeat, at - 1]
    users = Vocabulary([f"u{i}" for i in range(200)])
    who, when = np.repeat(np.arange(200), 8).astype(np.int32), np.tile(np.arange(8), 200)
    split = leave_last_out(Interactions(who, lives.ravel().astype(np.int32), when, users, ITEMS))
    learned = make(None).fit(split.train, split.validation)
    p = torch.from_numpy(learned.score(split.test.histories) / learned.config.temperature).softmax(dim=1)
    last = p[torch.arange(200), torch.from_numpy(lives[:, 6])].mean().item()
    assert last == pytest.approx(again, abs=0.1)
    selected = evaluate(learned, split.validation, ks=(10,), exclude_seen=False).metrics["ndcg@10"]
    assert learned.history["best"] == pytest.approx(selected)  # the score that selects knows it, too


def test_untrained_and_with_content_it_finds_what_is_alike_new_items_too():
    made = make(users=0)
    with torch.no_grad():
        made.network.items.own.weight.zero_()
        made.network.wo.weight.zero_()
    made.add_items(Vocabulary([*ITEMS.raw.to_pylist(), "twin of 7"]), VECTORS[[7]])
    found = made.retrieve(Histories.of([[7]]), N, exclude_seen=True).item[0]
    cosine = F.normalize(made.network.items.content, dim=1)
    cosine = (cosine[7] @ cosine.T).numpy()
    assert found[0] == N
    np.testing.assert_array_equal(found, [i for i in np.argsort(-cosine, kind="stable") if i != 7])


def test_attributes_are_columns_of_content():
    """Four colours, and users who stay with one: a new item is for those who like its colour, and for nobody else."""
    random = np.random.default_rng(0)
    colour = np.arange(N) % 4
    lives = (random.integers(0, 4, (200, 1)) + 4 * random.integers(0, N // 4, (200, 8))).astype(np.int32)
    who, when = np.repeat(np.arange(200), 8).astype(np.int32), np.tile(np.arange(8), 200)
    log = Interactions(who, lives.ravel(), when, Vocabulary([f"u{i}" for i in range(200)]), ITEMS)
    learned = make(np.eye(4, dtype=np.float32)[colour]).fit(log)
    learned.add_items(Vocabulary([*ITEMS.raw.to_pylist(), "new, of colour 2"]), np.eye(4)[[2]])
    found = learned.retrieve(Histories.of([[i, i + 4] for i in range(4)]), 5).item
    assert [N in row for row in found] == [False, False, True, False]


def test_bad_settings_are_named():
    for wrong in (
        {"temperature": 0.0},
        {"uniform": -1},
        {"bank": -1},
        {"users": -1},
        {"ages": 0},
        {"hidden": 0},
        {"rate": 0.0},
        {"temperature": float("nan")},
        {"temperature": math.inf},
    ):
        with pytest.raises(ConfigError, match="The temperature is above 0"):
            make(**wrong)
