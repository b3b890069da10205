"""LSH against the law of random hyperplanes."""

from __future__ import annotations

import numpy as np
import pytest

from tiglon.errors import ConfigError
from tiglon.semantic_ids.lsh import LSH


def bits_of(codes: np.ndarray, width: int) -> np.ndarray:
    """(N, L·h) bool."""
    return (codes[:, :, None] >> np.arange(width)[::-1] & 1).reshape(len(codes), -1).astype(bool)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0, 3.0])
def test_two_vectors_agree_in_a_bit_with_probability_1_minus_their_angle_over_pi(angle: float) -> None:
    pair = np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32)
    tokenizer = LSH(5000, 256, centre=False).fit(pair)  # 40,000 planes
    one, other = bits_of(tokenizer.encode(pair), 8)
    assert (one == other).mean() == pytest.approx(1 - angle / np.pi, abs=4 * 0.5 / np.sqrt(40_000))


def test_scaling_changes_nothing_and_the_opposite_flips_every_bit() -> None:
    x = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    tokenizer = LSH(3, 256, centre=False).fit(x)
    codes = tokenizer.encode(x)
    assert (tokenizer.encode(x * np.float32(8)) == codes).all()
    assert (tokenizer.encode(x * np.float32(0.125)) == codes).all()
    assert (tokenizer.encode(-x) == 255 - codes).all()


def test_centring_rescues_the_bits_of_a_narrow_cone() -> None:
    random = np.random.default_rng(0)
    cone = (5 * np.ones(32) + 0.1 * random.normal(size=(1000, 32))).astype(np.float32)
    centred, plain = LSH().fit(cone), LSH(centre=False).fit(cone)
    assert plain.bit_entropy.shape == centred.bit_entropy.shape == (3, 8)
    assert plain.bit_entropy.mean() < 0.1
    assert centred.bit_entropy.min() > 0.95
    share = bits_of(plain.encode(cone), 8).mean(axis=0)
    inner = (share > 0) & (share < 1)
    expected = np.zeros(24)
    p = share[inner]
    expected[inner] = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    np.testing.assert_allclose(plain.bit_entropy.ravel(), expected, atol=1e-12)


def test_codes_are_a_power_of_two() -> None:
    assert LSH(4, 256).bits == 8
    with pytest.raises(ConfigError, match=r"100 codes a level\. Bits make a power of two"):
        LSH(3, 100)
