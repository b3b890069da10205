"""Checkpoints: named tensors and a JSON head in one safetensors file, replaced atomically.

A run that is killed at any moment, even while it writes, goes on from the last whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiglon.errors import BundleDamagedError, StorageError


def save(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Write beside `path`, flush to the disk, rename. Raises StorageError; the old file then stays."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    _replace(path, lambda aside: save_file(whole, aside, {"head": json.dumps(head)}))


def write_text(path: Path, text: str) -> None:
    """The same for a text file."""
    _replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise StorageError(
            f"cannot write {path}: {error}", fix="Free some disk space and run the same command again"
        ) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote. Raises BundleDamagedError where the file is missing or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["head"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleDamagedError(f"cannot read {path}: {error}", fix="Delete it to start anew") from error
