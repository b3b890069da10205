"""Random IDs: the control. Codes that say nothing about content, over the same space as the others.

TIGER §4.2 has them as "Random ID". What a generator learns with these it owes to sequences alone.

Letters: N items, L levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiglon.semantic_ids import storage
from tiglon.semantic_ids.tokenizer import path_in, require_sizes, require_vectors
from tiglon.types import Vocabulary, hash_ids


class RandomIds:
    """L codes by a hash, so that nothing is stored and an item always gets the same ones.

    `encode_keys` hashes raw ids: the strict control. `encode` hashes vectors, as every tokenizer can be
    asked to: equal vectors share their codes, and nothing else about the content is left.
    """

    def __init__(self, levels: int = 3, codes: int = 256, *, seed: int = 0) -> None:
        self.sizes = require_sizes(levels, codes)
        self.seed = seed

    def fit(self, vectors: np.ndarray) -> RandomIds:
        """There is nothing to learn."""
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (N, L) int32 by a hash of each vector (N, D)."""
        rows = require_vectors(vectors)
        digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
        return self._codes(np.frombuffer(digests, "<u8"))

    def encode_keys(self, keys: Vocabulary | Sequence[Any]) -> np.ndarray:
        """Codes (N, L) int32 by a hash of each raw id."""
        return self._codes(hash_ids(keys if isinstance(keys, Vocabulary) else Vocabulary(keys)))

    def decode(self, codes: np.ndarray) -> None:
        """None: the codes stand for nothing."""
        return None

    def save(self, directory: Path) -> None:
        """Write the settings to `directory`."""
        settings = {"levels": len(self.sizes), "codes": self.sizes[0], "seed": self.seed}
        storage.write(path_in(directory), {}, {"kind": "random", **settings})

    @classmethod
    def load(cls, directory: Path) -> RandomIds:
        """What `save` wrote. Raises BundleDamagedError."""
        _, settings = storage.read(path_in(directory))
        with storage.reading(path_in(directory)):
            return cls(settings["levels"], settings["codes"], seed=settings["seed"])

    def _codes(self, hashes: np.ndarray) -> np.ndarray:
        """(N, L): each level mixes the hash with its own constant (the finaliser of SplitMix64)."""
        salt = np.random.default_rng(self.seed).integers(0, 2**64, len(self.sizes), dtype=np.uint64)
        mixed = hashes.astype(np.uint64)[:, None] ^ salt
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        return (mixed % np.array(self.sizes, np.uint64)).astype(np.int32)
