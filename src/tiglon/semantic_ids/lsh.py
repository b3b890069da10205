"""LSH: random hyperplanes; the side of each on which a vector lies is one bit of its codes.

Charikar 2002 (SimHash); TIGER §4.2 ("LSH-based semantic IDs") as the baseline of its ablation, with
h = 8 hyperplanes a code. bit = 1[R (x − μ) > 0], R Gaussian; h bits make one code of 2^h. Two vectors at
the angle θ agree in a bit with probability 1 − θ/π.

Letters: N vectors, D width, L levels, h bits a level.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiglon.errors import ConfigError
from tiglon.semantic_ids import storage
from tiglon.semantic_ids.exact import affine
from tiglon.semantic_ids.tokenizer import distinct_rows, path_in, require_sizes, require_vectors


class LSH:
    """L codes of log2(codes) random bits each.

    centre: subtract the mean vector first. On by default: text vectors sit in a narrow cone, and a plane
        through the origin then has nearly all of them on one side. `bit_entropy` tells: (L, h) bits, of
        the distinct vectors seen at `fit`; 1 is a plane that halves them, 0 one that says nothing.
    """

    def __init__(self, levels: int = 3, codes: int = 256, *, seed: int = 0, centre: bool = True) -> None:
        self.sizes = require_sizes(levels, codes)
        if codes & (codes - 1):
            raise ConfigError(
                f"{codes} codes a level", rule="Bits make a power of two of codes", fix="Try 256"
            )
        self.seed, self.centre = seed, centre
        self.planes = np.empty((0, 0), np.float32)  # (L·h, D)
        self.mean = np.empty(0, np.float32)  # (D,)
        self.bit_entropy: np.ndarray = np.empty((0, 0))  # (L, h)

    @property
    def bits(self) -> int:
        """h."""
        return self.sizes[0].bit_length() - 1

    def fit(self, vectors: np.ndarray) -> LSH:
        """Draw the planes; learn the mean of the distinct vectors (N, D), and how even the bits are."""
        points = distinct_rows(require_vectors(vectors))
        if len(points) == 0:
            raise ConfigError("no vectors to fit on", rule="A tokenizer learns from at least one vector")
        width, count = points.shape[1], len(self.sizes) * self.bits
        self.planes = np.random.default_rng(self.seed).standard_normal((count, width), dtype=np.float32)
        self.mean = np.zeros(width, np.float32)
        if self.centre:
            self.mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
        share = self._bits(points).mean(axis=0)
        self.bit_entropy = _binary_entropy(share).reshape(len(self.sizes), self.bits)
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (N, L) int32; the first plane of a level is its highest bit."""
        if not len(self.planes):
            raise ConfigError("a tokenizer without planes", fix="Call fit(vectors) first")
        bits = self._bits(require_vectors(vectors, len(self.mean)))
        worth = 1 << np.arange(self.bits)[::-1]
        return (bits.reshape(-1, len(self.sizes), self.bits) @ worth).astype(np.int32)

    def decode(self, codes: np.ndarray) -> None:
        """None: a half-space has no middle."""
        return None

    def save(self, directory: Path) -> None:
        """Write the planes and the settings to `directory`."""
        arrays: dict[str, np.ndarray] = {
            "planes": self.planes,
            "mean": self.mean,
            "bit_entropy": self.bit_entropy,
        }
        settings = {
            "levels": len(self.sizes),
            "codes": self.sizes[0],
            "seed": self.seed,
            "centre": self.centre,
        }
        storage.write(path_in(directory), arrays, {"kind": "lsh", **settings})

    @classmethod
    def load(cls, directory: Path) -> LSH:
        """What `save` wrote. Raises BundleDamagedError."""
        arrays, settings = storage.read(path_in(directory))
        with storage.reading(path_in(directory)):
            levels, codes = settings["levels"], settings["codes"]
            self = cls(levels, codes, seed=settings["seed"], centre=settings["centre"])
            self.planes, self.mean, self.bit_entropy = arrays["planes"], arrays["mean"], arrays["bit_entropy"]
        return self

    def _bits(self, points: np.ndarray) -> np.ndarray:
        return affine(points - self.mean, self.planes, np.zeros(len(self.planes))) > 0


def _binary_entropy(share: np.ndarray) -> np.ndarray:
    """−p log2 p − (1 − p) log2 (1 − p)."""
    both = np.stack([share, 1 - share])
    return -(both * np.log2(np.where(both > 0, both, 1))).sum(axis=0)
