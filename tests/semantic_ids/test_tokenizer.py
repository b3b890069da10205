"""The promises that every tokenizer keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tiglon.errors import BundleDamagedError, ConfigError, DataError
from tiglon.semantic_ids import tokenizer as tokenizers
from tiglon.semantic_ids.kmeans import ResidualKMeans
from tiglon.semantic_ids.lsh import LSH
from tiglon.semantic_ids.random_ids import RandomIds
from tiglon.semantic_ids.rqvae import RQVAEConfig, RQVAETokenizer
from tiglon.semantic_ids.tokenizer import Tokenizer

torch.set_num_threads(1)


def small_rqvae(seed: int = 0) -> RQVAETokenizer:
    return RQVAETokenizer(RQVAEConfig(codes=16, width=4, hidden=(16,), epochs=3, batch=64, seed=seed))


KINDS: dict[str, Callable[[int], Tokenizer]] = {
    "residual k-means": lambda seed: ResidualKMeans(3, 16, seed=seed),
    "residual k-means, standardised": lambda seed: ResidualKMeans(3, 16, seed=seed, standardise=True),
    "RQ-VAE": small_rqvae,
    "LSH": lambda seed: LSH(3, 16, seed=seed),
    "random": lambda seed: RandomIds(3, 16, seed=seed),
}
PARAMS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """(300, 24), with copies, a zero row and a negative zero."""
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 24)).astype(np.float32)
    x[10:20] = x[0]
    x[20] = 0
    x[21] = -0.0
    return x


@PARAMS
def test_codes_have_their_shape_and_range(kind: str, vectors: np.ndarray) -> None:
    tokenizer = KINDS[kind](0).fit(vectors)
    codes = tokenizer.encode(vectors)
    assert tokenizer.sizes == (16, 16, 16)
    assert codes.shape == (300, 3)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert (codes.max(axis=0) < 16).all()
    assert (codes[10:20] == codes[0]).all(), "equal vectors have equal codes"
    assert (codes[20] == codes[21]).all(), "−0 is 0"
    assert tokenizer.encode(vectors[:0]).shape == (0, 3)


@PARAMS
def test_a_seed_decides_and_another_seed_decides_otherwise(kind: str, vectors: np.ndarray) -> None:
    codes = [KINDS[kind](seed).fit(vectors).encode(vectors) for seed in (0, 0, 1)]
    assert (codes[0] == codes[1]).all()
    assert (codes[0] != codes[2]).any()


@PARAMS
def test_fitting_ignores_the_order_and_the_repeats_of_rows(kind: str, vectors: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(len(vectors))
    shuffled = np.concatenate([vectors[order], vectors[:40]])
    a, b = KINDS[kind](0).fit(vectors), KINDS[kind](0).fit(shuffled)
    assert (a.encode(vectors) == b.encode(vectors)).all()


@PARAMS
def test_a_row_alone_has_the_codes_that_it_has_in_a_batch(kind: str, vectors: np.ndarray) -> None:
    tokenizer = KINDS[kind](0).fit(vectors)
    codes = tokenizer.encode(vectors)
    alone = np.concatenate([tokenizer.encode(vectors[i : i + 1]) for i in range(len(vectors))])
    assert (codes == alone).all()


@PARAMS
def test_what_is_saved_encodes_alike_after_loading(kind: str, vectors: np.ndarray, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](3).fit(vectors)
    tokenizer.save(tmp_path / "new" / "folder")
    back = tokenizers.load(tmp_path / "new" / "folder")
    assert type(back) is type(tokenizer)
    assert back.sizes == tokenizer.sizes
    codes = tokenizer.encode(vectors)
    assert (back.encode(vectors) == codes).all()
    decoded = tokenizer.decode(codes)
    assert (decoded is None) == (kind in ("LSH", "random"))
    if decoded is not None:
        assert decoded.shape == vectors.shape
        np.testing.assert_array_equal(back.decode(codes), decoded)


@PARAMS
def test_bad_vectors_are_refused(kind: str, vectors: np.ndarray) -> None:
    tokenizer = KINDS[kind](0).fit(vectors)
    spoilt = vectors.copy()
    spoilt[3, 3] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        tokenizer.encode(spoilt)
    with pytest.raises(DataError, match=r"vectors of shape \(24,\)"):
        tokenizer.encode(vectors[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_what_must_be_fitted_says_so(kind: str, vectors: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"Call fit\(vectors\) first"):
        KINDS[kind](0).encode(vectors)
    with pytest.raises(ConfigError, match="at least one vector"):
        KINDS[kind](0).fit(vectors[:0])
    with pytest.raises(DataError, match="width 23 for a tokenizer fitted on width 24"):
        KINDS[kind](0).fit(vectors).encode(vectors[:, :23])


@pytest.mark.parametrize("make", [ResidualKMeans, LSH, RandomIds])
def test_levels_and_codes_have_limits(make: Callable[..., Tokenizer]) -> None:
    assert make().sizes == (256, 256, 256)
    with pytest.raises(ConfigError, match="0 levels of 256 codes"):
        make(0, 256)
    with pytest.raises(ConfigError, match="3 levels of 1 codes"):
        make(3, 1)


def test_a_damaged_or_unknown_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        tokenizers.load(tmp_path)
    tokenizers.path_in(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        tokenizers.load(tmp_path)
    for kind in ("residual_kmeans", "rqvae", "lsh", "random"):
        tokenizers.storage.write(tokenizers.path_in(tmp_path), {}, {"kind": kind})
        with pytest.raises(BundleDamagedError, match=r"cannot be read: (KeyError|TypeError)"):
            tokenizers.load(tmp_path)
    tokenizers.storage.write(tokenizers.path_in(tmp_path), {}, {"kind": "of tomorrow"})
    with pytest.raises(BundleDamagedError, match=r"'of tomorrow'.*newer Tiglon"):
        tokenizers.load(tmp_path)
