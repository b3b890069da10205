import math

import numpy as np
import pytest
import torch
from torch import nn

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.pooling import FullAttention, MeanPooling
from tiglon.ranking.ranker import Interest, Ranker, RankerConfig
from tiglon.types import Behaviours, RankingBatch

NAN = float("nan")


@pytest.fixture
def embed():
    torch.manual_seed(0)
    codes = np.concatenate([np.arange(1, 10), [0]])[:, None]
    return FeatureEmbedding(codes, (10,), (6,), (4,), (3,), std=0.5)


def batch(label, L=8):
    torch.manual_seed(1)
    label = torch.tensor(label, dtype=torch.float32)
    label = label[..., None] if label.dim() == 2 else label
    B, K, _ = label.shape
    mask = torch.arange(L) < torch.tensor([L, 3])[:B, None]
    past = Behaviours(torch.randint(0, 9, (B, L)), torch.randint(0, 4, (B, L, 1)), torch.ones(B, L), mask)
    return RankingBatch(torch.randint(0, 9, (B, K)), past, torch.tensor([[1], [2]])[:B], label)


def entropy(logit, label):
    chance = 1 / (1 + math.exp(-logit))
    return -math.log(chance if label else 1 - chance)


class Hinting(nn.Module):
    """A unit with auxiliary tasks and nothing else."""

    width = 1

    def __init__(self, logit=None, weight=1.0, loss=None):
        super().__init__()
        self.logit, self.weight, self.auxiliary = logit, weight, loss

    def forward(self, embed, item_BK, past):
        return Interest(
            torch.zeros(*item_BK.shape, 1), self.auxiliary, logit=self.logit, logit_weight=self.weight
        )


def test_a_logit_a_candidate_and_task(embed):
    model = Ranker(embed, FullAttention(embed), MeanPooling(embed), tasks=("click", "like"))
    requests = batch([[1, 0, 0], [0, 1, NAN]])
    logits, (short, long) = model.score(requests)
    assert logits.shape == (2, 3, 2)
    assert torch.equal(model(requests), logits)
    assert short.vector.shape == (2, 3, model.short.width)
    assert long.vector.shape == (2, 3, model.long.width)


def test_units_may_be_left_out(embed):
    assert Ranker(embed, None).eval()(batch([[1, 0], [0, 1]])).shape == (2, 2, 1)


def test_the_short_unit_reads_the_most_recent_only(embed):
    model = Ranker(embed, None, MeanPooling(embed), config=RankerConfig(recent=2)).eval()
    requests = batch([[1, 0], [0, 1]])
    older = requests.past._replace(
        item=torch.where(torch.arange(8) < torch.tensor([[6], [1]]), 0, requests.past.item)
    )
    assert torch.equal(model(requests._replace(past=older)), model(requests))
    newer = requests.past._replace(item=(requests.past.item + 1) % 9)
    assert not torch.allclose(model(requests._replace(past=newer)), model(requests))


def test_the_long_unit_reads_all(embed):
    model = Ranker(embed, MeanPooling(embed), config=RankerConfig(recent=2)).eval()
    requests = batch([[1, 0], [0, 1]])
    item = requests.past.item.clone()
    item[:, 0] = (item[:, 0] + 1) % 9
    changed = model(requests._replace(past=requests.past._replace(item=item)))
    assert (changed != model(requests)).all()


def test_who_asks_matters(embed):
    model = Ranker(embed, None).eval()
    requests = batch([[1, 0], [0, 1]])
    assert (model(requests._replace(profile=torch.zeros(2, 1, dtype=torch.int64))) != model(requests)).all()


def test_the_loss_is_cross_entropy_of_the_labels_there_are(embed):
    model = Ranker(embed, MeanPooling(embed), tasks=("click", "like")).eval()
    label = [[[1, NAN], [0, 1]], [[NAN, NAN], [NAN, 0]]]
    requests = batch(label)
    logits = model(requests).tolist()
    expected = [
        entropy(logits[b][k][t], label[b][k][t])
        for b in range(2)
        for k in range(2)
        for t in range(2)
        if not math.isnan(label[b][k][t])
    ]
    np.testing.assert_allclose(model.loss(requests).tolist(), expected, rtol=1e-5)


def test_a_units_loss_is_added_to_each(embed):
    requests = batch([[1, 0], [NAN, 1]])
    plain = Ranker(embed, Hinting())
    hinted = Ranker(embed, Hinting(loss=torch.tensor(0.25)))
    hinted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(hinted.loss(requests), plain.loss(requests) + 0.25)


def test_a_units_logit_learns_the_first_task(embed):
    label = [[[1, 0], [0, 1]], [[NAN, 1], [1, NAN]]]
    requests, logit = batch(label), torch.tensor([[0.5, -2.0], [7.0, 1.5]])
    plain = Ranker(embed, Hinting(), tasks=("click", "like"))
    hinted = Ranker(embed, Hinting(logit, 0.3), tasks=("click", "like"))
    hinted.load_state_dict(plain.state_dict())
    mean = (entropy(0.5, 1) + entropy(-2.0, 0) + entropy(1.5, 1)) / 3
    torch.testing.assert_close(hinted.loss(requests), plain.loss(requests) + 0.3 * mean)


def test_a_units_logit_without_labels_is_no_loss(embed):
    requests = batch([[[NAN, 1], [NAN, 0]]])
    losses = Ranker(embed, Hinting(torch.zeros(1, 2)), tasks=("click", "like")).loss(requests)
    assert losses.shape == (2,)
    assert losses.isfinite().all()


def test_logits_are_float32_whatever_the_precision_of_training(embed):
    with torch.autocast("cpu", torch.bfloat16):
        assert Ranker(embed, FullAttention(embed))(batch([[1, 0], [0, 1]])).dtype == torch.float32


def test_dropout_is_of_training_alone(embed):
    model = Ranker(embed, MeanPooling(embed), config=RankerConfig(dropout=0.5))
    requests = batch([[1, 0], [0, 1]])
    assert not torch.equal(model.train()(requests), model(requests))
    assert torch.equal(model.eval()(requests), model(requests))


def test_it_learns_what_a_user_repeats(embed):
    """Candidates that the user had before are the positives; nothing but the past tells."""
    torch.manual_seed(3)
    model = Ranker(embed, FullAttention(embed, heads=2), config=RankerConfig(hidden=(16,)))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    B, L, K = 64, 4, 6
    for step in range(151):
        item = torch.randint(0, 9, (B, L))
        candidate = torch.randint(0, 9, (B, K))
        label = (candidate[:, :, None] == item[:, None]).any(-1).float()[..., None]
        past = Behaviours(
            item,
            torch.zeros(B, L, 1, dtype=torch.int64),
            torch.ones(B, L),
            torch.ones(B, L, dtype=torch.bool),
        )
        loss = model.loss(RankingBatch(candidate, past, torch.ones(B, 1, dtype=torch.int64), label)).mean()
        if step == 0:
            first = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 < first
