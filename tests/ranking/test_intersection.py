"""Counts and recencies of the candidate's values, against a definition by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.intersection import intersect
from tiglon.types import Behaviours

N, SIZES = 30, (31, 5)


@pytest.fixture
def embed() -> FeatureEmbedding:
    """30 items: an id each, one of four categories; items 28 and 29 have none, the unknown item neither."""
    category = np.random.default_rng(0).integers(1, 5, N)
    category[28:] = 0
    codes = np.zeros((N + 1, 2), np.int64)
    codes[:N] = np.stack([np.arange(1, N + 1), category], axis=1)
    return FeatureEmbedding(codes, SIZES, (4, 4))


def past_of(lives: list[list[int]], size: list[list[float]] | None = None) -> Behaviours:
    L = max(len(life) for life in lives)
    item, mask = torch.full((len(lives), L), -1), torch.zeros(len(lives), L, dtype=torch.bool)
    counts = torch.ones(len(lives), L)
    for b, life in enumerate(lives):
        item[b, : len(life)] = torch.tensor(life, dtype=torch.int64)
        mask[b, : len(life)] = True
        if size is not None:
            counts[b, : len(life)] = torch.tensor(size[b])
    cross, gap = torch.zeros(len(lives), L, 0, dtype=torch.int64), torch.ones(len(lives), L)
    return Behaviours(item, cross, gap, mask, counts if size is not None else None)


def expected(embed: FeatureEmbedding, candidate: int, life: list[int], f: int) -> tuple[float, float]:
    """By its definition, over (value, age) pairs."""
    codes = embed.item_codes.numpy()[:, f]
    ages = [len(life) - 1 - j for j, item in enumerate(life) if codes[item] == codes[candidate] != 0]
    if not ages:
        return 0.0, 0.0
    return math.log(1 + len(ages)), math.log((1 + len(life)) / (1 + min(ages)))


def test_equals_its_definition(embed: FeatureEmbedding) -> None:
    draw = np.random.default_rng(1)
    lives = [draw.integers(-1, N, n).tolist() for n in (40, 7, 1, 0, 200)]
    candidates = draw.integers(-1, N, (len(lives), 9))
    found = intersect(embed, torch.from_numpy(candidates), past_of(lives))
    assert found.shape == (5, 9, 4)
    for b, life in enumerate(lives):
        for k, candidate in enumerate(candidates[b].tolist()):
            for f in range(2):
                count, recency = expected(embed, candidate, life, f)
                assert found[b, k, f].item() == pytest.approx(count)
                assert found[b, k, 2 + f].item() == pytest.approx(recency)


def test_which_candidates_occur_is_set_arithmetic(embed: FeatureEmbedding) -> None:
    life = [3, 9, 3, 27, 1]
    found = intersect(embed, torch.arange(28)[None], past_of([life]))[0, :, 0]
    assert set(torch.nonzero(found)[:, 0].tolist()) == set(life)


def test_newer_and_more_often_is_more(embed: FeatureEmbedding) -> None:
    count, recency = intersect(embed, torch.tensor([[0, 1]]), past_of([[0, 2, 2, 1, 1]]))[0, :, [0, 2]].T
    assert count[1] > count[0] > 0
    assert recency[1] > recency[0] > 0


def test_a_cluster_counts_as_its_size(embed: FeatureEmbedding) -> None:
    item = torch.tensor([[5, 6, 7]])
    clustered = intersect(embed, item, past_of([[5, 6]], [[3.0, 2.0]]))
    behaviours = intersect(embed, item, past_of([[5, 5, 5, 6, 6]]))
    torch.testing.assert_close(clustered, behaviours)


def test_padding_and_company_change_nothing(embed: FeatureEmbedding) -> None:
    item = torch.tensor([[5, 6]])
    alone = intersect(embed, item, past_of([[5, 1, 6]]))
    beside = intersect(embed, item.expand(2, 2), past_of([[5, 1, 6], [2] * 50]))
    assert torch.equal(alone[0], beside[0])
