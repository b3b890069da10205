"""MIND: capsules by a loop, why the first logits are random, K' by its formula, order that does not matter."""

import math

import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError
from tiglon.nn.interests import disagreement, label_aware, squash
from tiglon.retrieval.mind import Mind, MindConfig, first_logits, number_of_interests
from tiglon.retrieval.towers import Past
from tiglon.train.loop import TrainConfig
from tiglon.types import Histories, Interactions, Vocabulary

torch.set_num_threads(1)

N, K = 30, 4
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
FAST = TrainConfig(epochs=1, evaluations=1, bfloat16=False)
TINY = MindConfig(width=16, hidden=32, interests=K, train=FAST)


def mind(**changes):
    return Mind(ITEMS, MindConfig(**{**TINY.__dict__, **changes}))


def past(items, users=1):
    item = torch.tensor([items] * users)
    return Past(item, torch.arange(len(items)).expand(users, -1), torch.full((users,), len(items)),
                torch.full((users,), -1))  # fmt: skip


def capsules(made, items):
    """(K, D) and their presence, without the network above them."""
    with torch.no_grad():
        made.network.wo.weight.zero_()
        seen = past(items)
        interests, present = made.network.extract(made.network.items(seen.item), seen)
    return interests[0], present[0]


def test_the_number_of_interests_is_the_papers():
    n = torch.tensor([0, 1, 2, 3, 4, 15, 16, 17, 1000])
    assert number_of_interests(n, 10).tolist() == [1, 1, 1, 1, 2, 3, 4, 4, 9]
    assert number_of_interests(torch.tensor([1, 2, 3, 17]), 4).tolist() == [1, 1, 1, 4]
    assert number_of_interests(n, 1).tolist() == [1] * 9
    assert number_of_interests(n, 100).tolist() == [1, 1, 1, 1, 2, 3, 4, 4, 9]
    for count in range(1, 200):
        expected = max(1, min(5, int(math.log2(count))))
        assert number_of_interests(torch.tensor([count]), 5).item() == expected


def test_first_logits_are_normal_and_belong_to_item_and_interest():
    logits = first_logits(torch.arange(2000)[None], 5)[0]
    assert logits.shape == (5, 2000)
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    assert (torch.corrcoef(logits) - torch.eye(5)).abs().max() < 0.1
    mixed = first_logits(torch.tensor([[7, 3], [3, 3]]), 5)
    assert torch.equal(mixed[0, :, 1], mixed[1, :, 0])
    assert torch.equal(mixed[0, :, 0], logits[:, 7])


@pytest.mark.parametrize("iterations, power", [(3, 1.0), (2, 0.5)])
def test_capsules_are_their_definition(iterations, power):
    """Equations 5 to 7 with loops, and a map that is not the identity."""
    made, items = mind(iterations=iterations, squash=power), list(range(3, 21))
    torch.nn.init.normal_(made.network.bilinear.weight, std=0.3)
    e = made.network.items.own.weight.detach()[items] @ made.network.bilinear.weight.detach()
    b = first_logits(torch.tensor([items]), K)[0].T.clone()  # (L, K)
    for _ in range(iterations):
        w = b.softmax(dim=1)
        v = torch.stack([squash(sum(w[j, k] * e[j] for j in range(len(items))), power) for k in range(K)])
        b += e @ v.T
    found, present = capsules(made, items)
    assert present.tolist() == [True] * K
    torch.testing.assert_close(found, v, rtol=1e-4, atol=1e-5)
    assert (found.norm(dim=1) < 1).all()


def test_the_power_of_attention_is_the_settings():
    interests, present, target = torch.randn(3, K, 16), torch.ones(3, K, dtype=torch.bool), torch.randn(3, 16)
    for power in (0.0, 1.0, math.inf):
        found = mind(power=power).network.read_out(interests, present, target)
        torch.testing.assert_close(found, label_aware(interests, present, target, power))


def test_with_zero_logits_all_capsules_are_one():
    """One map for all: only the first logits tell the capsules apart."""
    items = list(range(20))
    same, _ = capsules(mind(sigma=0.0), items)
    apart, _ = capsules(mind(), items)
    assert same.std(dim=0).max() < 1e-6
    assert apart.std(dim=0).max() > 1e-2


def test_the_order_of_the_history_does_not_matter():
    made, items = mind(), list(range(17))
    shuffled = np.random.default_rng(0).permutation(17).tolist()
    np.testing.assert_allclose(
        made.score(Histories.of([items])), made.score(Histories.of([shuffled])), rtol=1e-4, atol=1e-5
    )


def test_short_histories_have_few_interests_and_answers():
    made = mind()
    _, present = made.users(Histories.of([[], [4], [4, 4, 4], list(range(5)), list(range(17))]))
    assert present.sum(axis=1).tolist() == [1, 1, 1, 2, 4]
    assert np.isfinite(made.score(Histories.of([[], [4], [4, 4, 4]]))).all()


def test_interests_that_are_absent_find_nothing():
    """Those of a known user hold something, too: what the network above makes of the profile."""
    made = mind(users=8)
    made.network.wo.weight.data.normal_(std=3.0)
    made.network.repetition.weight.data.normal_(std=0.3)
    lives = Histories.of([[4], [4, 9, 4], list(range(5)), list(range(17))])
    lives = Histories(lives.offsets, lives.item, lives.time, user=np.arange(4))
    interests, present = made.users(lives)
    product = interests @ made.vectors().T
    expected = np.where(present[..., None], product, -np.inf).max(axis=1)
    assert (product.max(axis=1) > expected).any(axis=1)[:3].all()
    owner, item, offset = made.network.repetition.of(lives)
    hidden = expected.copy()
    hidden[owner, item] = -np.inf
    expected[owner, item] += offset
    for wanted, k, exclude_seen in ((expected, N, False), (hidden, N - 17, True)):
        found = made.retrieve(lives, k, exclude_seen=exclude_seen)
        np.testing.assert_array_equal(found.item, np.argsort(-wanted, axis=1)[:, :k])


def test_a_profile_changes_the_interests_above_the_capsules():
    made = mind(users=8)
    torch.nn.init.normal_(made.network.wo.weight)
    twice = Histories.of([[3, 5]] * 2)
    known = Histories(twice.offsets, twice.item, twice.time, user=np.array([1, 2]))
    scores = made.score(known)
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_the_regulariser_is_subtracted():
    """D ≤ 0, so the loss grows by −λ·D ≥ 0, most where interests agree."""
    log = Interactions(
        user=np.zeros(20, np.int32),
        item=np.arange(20, dtype=np.int32),
        time=np.arange(20),
        users=Vocabulary(["u"]),
        items=ITEMS,
    )
    plain, apart = mind(dropout=0.0), mind(dropout=0.0, disagreement=0.5)
    losses = []
    for made in (plain, apart):
        batches = []
        original = made.network.loss
        made.network.loss = lambda batch, negatives, b=batches, f=original: b.append(batch) or f(batch)
        made.fit(log)
        made.network.loss = original
        made.network.load_state_dict(mind(dropout=0.0).network.state_dict())
        with torch.no_grad():
            losses.append(original(batches[-1]))
            interests, present = made.network.users(Past.of(batches[-1]))
    torch.testing.assert_close(losses[1], losses[0] - 0.5 * disagreement(interests, present))


def test_bad_settings_are_named():
    for power in (-1.0, 0.5, 99.0):
        with pytest.raises(ConfigError, match=r"The power is 0, 1 … 16 or math.inf"):
            mind(power=power)
    for wrong in ({"interests": 0}, {"iterations": 0}, {"users": -1}, {"hidden": 0}):
        with pytest.raises(ConfigError, match="at least one interest"):
            mind(**wrong)
    for wrong in (
        {"squash": -0.1},
        {"sigma": -1.0},
        {"disagreement": -1.0},
        {"sigma": math.nan},
        {"sigma": math.inf},
    ):
        with pytest.raises(ConfigError, match="is at least 0 and finite"):
            mind(**wrong)
    with pytest.raises(ConfigError, match="squash lies in 0 … 1"):
        mind(squash=5.0)
