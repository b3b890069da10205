"""What every tokenizer is: item vectors in, L codes an item out.

Letters: N items, D width of a vector, L levels, V codes a level.

All tokenizers here keep three promises. The same seed gives the same codes. The order of the rows at
`fit`, and how often a row is repeated, change nothing. A row encodes to the same codes alone as inside
any batch, bit for bit: an item that arrives tomorrow joins those that look like it today.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from tiglon.errors import BundleDamagedError, ConfigError, DataError
from tiglon.semantic_ids import storage


class Tokenizer(Protocol):
    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each of the L levels has."""
        ...

    def fit(self, vectors: np.ndarray) -> Tokenizer:
        """Learn from vectors (N, D) float32."""
        ...

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (N, L) int32 of vectors (N, D); code l lies in [0, sizes[l])."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray | None:
        """The vectors (N, D) that codes (N, l), l ≤ L, stand for; None where codes stand for none."""
        ...

    def save(self, directory: Path) -> None: ...

    @classmethod
    def load(cls, directory: Path) -> Tokenizer: ...


def load(directory: Path) -> Tokenizer:
    """The tokenizer saved in a folder, whatever its kind. Raises BundleDamagedError."""
    from tiglon.semantic_ids import kmeans, lsh, random_ids, rqvae

    path = path_in(directory)
    kind = storage.read(path)[1].get("kind")
    if kind == "residual_kmeans":
        return kmeans.ResidualKMeans.load(directory)
    if kind == "rqvae":
        return rqvae.RQVAETokenizer.load(directory)
    if kind == "lsh":
        return lsh.LSH.load(directory)
    if kind == "random":
        return random_ids.RandomIds.load(directory)
    raise BundleDamagedError(f"{path} holds a tokenizer of kind {kind!r}", fix="Install a newer Tiglon")


def path_in(directory: Path) -> Path:
    """The file of a tokenizer in its folder."""
    return Path(directory) / "tokenizer.safetensors"


def require_vectors(vectors: np.ndarray, width: int | None = None) -> np.ndarray:
    """`vectors` as (N, D) float32, without negative zeros. Raises DataError unless finite and D fits."""
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise DataError(f"vectors of shape {vectors.shape}", rule="A tokenizer takes a matrix (items, width)")
    if width is not None and vectors.shape[1] != width:
        raise DataError(
            f"vectors of width {vectors.shape[1]} for a tokenizer fitted on width {width}",
            fix="Encode items with the text encoder that the tokenizer was fitted with",
        )
    if not np.isfinite(vectors).all():
        raise DataError("vectors with NaN or infinite values", rule="Vectors are finite")
    return np.ascontiguousarray(vectors, dtype=np.float32) + np.float32(0)


def require_sizes(levels: int, codes: int) -> tuple[int, ...]:
    """(codes,) * levels. Raises ConfigError unless there is a level, with two codes or more."""
    if levels < 1 or not 2 <= codes <= 2**16:
        raise ConfigError(
            f"{levels} levels of {codes} codes",
            rule="At least 1 level, of 2 to 65,536 codes",
            fix="Try 3 × 256",
        )
    return (codes,) * levels


def distinct_rows(vectors: np.ndarray) -> np.ndarray:
    """The rows of (N, D) float32, each once, in an order that depends on their content alone."""
    rows = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.shape[1] * 4))).ravel()
    return np.unique(rows).view(np.float32).reshape(-1, vectors.shape[1])
