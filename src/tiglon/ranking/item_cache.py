"""What a lifelong ranker keeps of every item so that its search only looks up: K_h W^h, with a version.

A cache belongs to one catalogue (which items there are, with which features) and to the weights it was made
from. With other weights it is merely stale, which TWIN allows and whose price can be measured; with another
catalogue its rows are other items, and it is refused. On disk it is one safetensors file.

Letters: N items, A heads, d width of a head.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiglon.errors import BundleDamagedError, BundleVersionError, DataError, StorageError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import Keys
from tiglon.semantic_ids import storage as files

FORMAT = 1
_ROWS = 1 << 16  # items projected at once


@dataclass(frozen=True, eq=False)
class ItemCache:
    """keys of N + 1 items, the unknown one last.   catalogue: `catalogue_version`.
    version: hash of the keys themselves, so that it names both the weights and the storage."""

    keys: Keys
    catalogue: str
    version: str

    @classmethod
    def build(
        cls, embed: FeatureEmbedding, keys_of: Callable[[Tensor], Tensor], storage: str = "float32"
    ) -> ItemCache:
        """embed: of the catalogue.   keys_of: items (n,) → (n, A, d).
        storage: "float32", "bfloat16" or "int8"; ConfigError otherwise."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            parts = [
                Keys.of(keys_of(rows), storage) for rows in torch.arange(len(embed.item_codes)).split(_ROWS)
            ]
        keys = Keys(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return cls(keys, catalogue_version(embed), _hash(keys.number, keys.scale))

    def require(self, embed: FeatureEmbedding, heads: int, head_width: int) -> None:
        """Raises DataError where this cache is of another catalogue or another architecture."""
        A = self.keys.scale.shape[1]
        d = self.keys.number.shape[1] // A
        if (A, d) != (heads, head_width):
            raise DataError(
                f"an item cache of {A} heads of width {d}",
                rule=f"This unit has {heads} of width {head_width}",
                fix="Build the cache from this unit: unit.refresh(embed)",
            )
        catalogue = catalogue_version(embed)
        if self.catalogue != catalogue:
            raise DataError(
                f"an item cache of {len(self.keys) - 1} items, catalogue {self.catalogue[:12]}",
                rule=f"A cache serves the catalogue it was built for; this ranker's has "
                f"{len(embed.item_codes) - 1} items, version {catalogue[:12]}",
                fix="Build it anew: unit.refresh(embed)",
            )

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all. Raises StorageError."""
        aside = path.with_name(f".{path.name}.part")
        about = {
            "format": FORMAT,
            "storage": self.keys.storage,
            "catalogue": self.catalogue,
            "version": self.version,
        }
        files.write(aside, self.keys._asdict(), about)
        try:
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise StorageError(f"{path} could not be written: {error}", fix="Choose another place") from error

    @classmethod
    def load(cls, path: Path) -> ItemCache:
        """Raises BundleDamagedError, BundleVersionError."""
        arrays, about = files.read(path)
        if about.get("format", 0) > FORMAT:
            raise BundleVersionError(
                f"an item cache of format {about['format']} in {path}",
                rule=f"This Tiglon reads formats up to {FORMAT}",
                fix="Update Tiglon",
            )
        try:
            keys = Keys(arrays["number"], arrays["scale"])
            cache = cls(keys, about["catalogue"], about["version"])
        except KeyError as error:
            raise BundleDamagedError(f"{path} has no {error}", fix="Build the cache anew") from error
        if _hash(keys.number, keys.scale) != cache.version:
            raise BundleDamagedError(
                f"{path} does not hold what its version says", fix="Copy it again, or build the cache anew"
            )
        return cache


def live_keys(item_BL: Tensor, count: int, keys_of: Callable[[Tensor], Tensor]) -> tuple[Keys, Tensor]:
    """Keys of today's weights and which of them each behaviour has (B, L): of all `count` items, the unknown
    one last, or only of those that occur where that is less to project."""
    if item_BL.numel() >= count:
        return Keys.of(keys_of(torch.arange(count))), item_BL
    item, row_BL = item_BL.unique(return_inverse=True)
    return Keys.of(keys_of(item)), row_BL


def catalogue_version(embed: FeatureEmbedding) -> str:
    """A hash of which items there are and with which features."""
    return _hash(embed.item_codes.numpy(), np.frombuffer(embed.catalogue_name.encode(), np.uint8))


def _hash(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
