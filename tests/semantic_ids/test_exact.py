"""Rows alone and in a batch, at the worst place: half-way between two codes."""

from __future__ import annotations

import numpy as np

from tiglon.semantic_ids.exact import affine, nearest


def test_a_point_between_two_codes_picks_the_same_one_in_any_batch() -> None:
    random = np.random.default_rng(0)
    codebook = random.normal(size=(64, 256)).astype(np.float32)
    pairs = random.integers(0, 64, (400, 2))
    points = codebook[pairs].mean(axis=1, dtype=np.float32)
    together = nearest(points, codebook)
    alone = np.concatenate([nearest(points[i : i + 1], codebook) for i in range(len(points))])
    assert (together == alone).all()
    assert (together[:, None] == pairs).any(axis=1).all()


def test_the_lowest_of_equal_codes_is_taken() -> None:
    assert nearest(np.zeros((1, 2)), np.array([[3, 0], [0, 1], [1, 0], [-1, 0]])).tolist() == [1]


def test_affine_is_a_matrix_product() -> None:
    random = np.random.default_rng(0)
    x, weight, bias = random.normal(size=(50, 30)), random.normal(size=(7, 30)), random.normal(size=7)
    np.testing.assert_allclose(affine(x, weight, bias), x @ weight.T + bias, atol=1e-4)
    alone = np.concatenate([affine(x[i : i + 1], weight, bias) for i in range(50)])
    assert np.array_equal(affine(x, weight, bias), alone)
