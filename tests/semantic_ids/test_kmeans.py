"""Residual k-means against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from tiglon.semantic_ids.kmeans import ResidualKMeans, kmeans


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """(400, 8): 16 clusters."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(16, 8))
    return (centres[random.integers(0, 16, 400)] + 0.2 * random.normal(size=(400, 8))).astype(np.float32)


def test_codes_are_the_nearest_of_each_levels_residual(vectors: np.ndarray) -> None:
    tokenizer = ResidualKMeans(3, 8).fit(vectors)
    codes = tokenizer.encode(vectors)
    residual = vectors.astype(np.float64)
    for level, codebook in enumerate(tokenizer.codebooks):
        distance = np.square(residual[:, None] - codebook[None]).sum(axis=2)
        assert (codes[:, level] == distance.argmin(axis=1)).all()
        residual = residual - codebook[codes[:, level]]
    np.testing.assert_allclose(tokenizer.decode(codes), vectors - residual, atol=1e-5)


def test_what_is_left_shrinks_with_every_level(vectors: np.ndarray) -> None:
    tokenizer = ResidualKMeans(4, 16).fit(vectors)
    codes = tokenizer.encode(vectors)
    left = [np.square(vectors - tokenizer.decode(codes[:, :length])).sum() for length in range(1, 5)]
    assert (np.diff([np.square(vectors).sum(), *left]) < 0).all()


def test_kmeans_is_a_fixed_point_of_lloyd(vectors: np.ndarray) -> None:
    centres = kmeans(vectors, 16, np.random.default_rng(0), iterations=100)
    code = np.square(vectors[:, None] - centres).sum(axis=2).argmin(axis=1)
    means = np.stack([vectors[code == k].mean(axis=0) for k in range(16)])
    np.testing.assert_allclose(centres, means, atol=1e-5)


def test_kmeans_comes_close_to_another_implementation(vectors: np.ndarray) -> None:
    from sklearn.cluster import KMeans

    centres = kmeans(vectors, 16, np.random.default_rng(0))
    inertia = np.square(vectors[:, None] - centres).sum(axis=2).min(axis=1).sum()
    other = KMeans(16, n_init=5, random_state=0).fit(vectors).inertia_
    assert inertia < 1.15 * other


def test_no_cluster_stays_empty() -> None:
    random = np.random.default_rng(0)
    far = np.concatenate([random.normal(size=(300, 2)) * 1e-3, [[50, 50], [-50, 50]]]).astype(np.float32)
    for seed in range(10):
        centres = kmeans(far, 64, np.random.default_rng(seed))
        code = np.square(far[:, None] - centres).sum(axis=2).argmin(axis=1)
        assert len(np.unique(code)) == 64


def test_fewer_vectors_than_codes_are_told_apart_by_the_first_level() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    tokenizer = ResidualKMeans(3, 8).fit(vectors[[0, 1, 2, 3, 4, 4, 4]])
    codes = tokenizer.encode(vectors)
    assert len(np.unique(codes[:, 0])) == 5
    np.testing.assert_allclose(tokenizer.decode(codes), vectors, atol=1e-6)


def test_one_vector_is_enough() -> None:
    tokenizer = ResidualKMeans(2, 4).fit(np.ones((1, 3), np.float32))
    assert tokenizer.encode(np.ones((2, 3), np.float32)).tolist() == [[0, 0], [0, 0]]


def test_standardising_makes_units_of_measure_irrelevant(vectors: np.ndarray) -> None:
    units = np.array([1, 4, 0.25, 1, 64, 1, 1, 2], np.float32)  # powers of 2: no rounding
    shift = np.zeros(8, np.float32)
    plain = ResidualKMeans(2, 8, standardise=True).fit(vectors)
    scaled = ResidualKMeans(2, 8, standardise=True).fit(vectors * units + shift)
    same = (plain.encode(vectors) == scaled.encode(vectors * units + shift)).all(axis=1)
    a, b = plain.encode(vectors), scaled.encode(vectors * units)
    assert same.mean() > 0.99 or len(np.unique(np.column_stack([a, b]), axis=0)) == len(np.unique(a, axis=0))
    np.testing.assert_allclose(scaled.decode(b) / units, plain.decode(a), atol=1.0)
    unscaled = ResidualKMeans(2, 8).fit(vectors * units)
    assert (unscaled.mean == 0).all()
    assert (unscaled.scale == 1).all()


def test_a_sample_is_enough_to_learn_from(vectors: np.ndarray) -> None:
    tokenizer = ResidualKMeans(2, 8, max_points=100).fit(vectors)
    codes = tokenizer.encode(vectors)
    assert np.square(vectors - tokenizer.decode(codes)).sum() < 0.5 * np.square(vectors).sum()
