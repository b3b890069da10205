"""Random IDs are even, and know nothing but the id."""

from __future__ import annotations

import numpy as np

from tiglon.semantic_ids.random_ids import RandomIds


def test_codes_are_even_and_levels_independent() -> None:
    codes = RandomIds(2, 16).encode_keys(list(range(50_000)))
    counts = np.bincount(codes[:, 0] * 16 + codes[:, 1], minlength=256)
    expected = 50_000 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 160 < chi_square < 380  # 255 degrees of freedom: six deviations either way


def test_an_id_keeps_its_codes_in_any_company() -> None:
    keys = [f"item {i}" for i in range(100)]
    codes = RandomIds(seed=4).encode_keys(keys)
    assert (RandomIds(seed=4).encode_keys(keys[50:]) == codes[50:]).all()
    assert (RandomIds(seed=5).encode_keys(keys) != codes).any()


def test_nothing_of_the_content_is_left_but_equality() -> None:
    x = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    near = x + np.float32(1e-4)
    codes, moved = RandomIds(1, 16).encode(x), RandomIds(1, 16).encode(near)
    assert abs((codes == moved).mean() - 1 / 16) < 0.02
