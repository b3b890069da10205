"""Arrays and the settings that explain them, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiglon.errors import BundleDamagedError, BundleError, StorageError


def write(path: Path, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    """Write `arrays` with `settings` (plain JSON values) in the file's header."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, path, metadata={"settings": json.dumps(settings, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error}", fix="Free some space or choose another folder") from error


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, settings) of a file that `write` made. Raises BundleDamagedError."""
    with reading(path), safe_open(path, "numpy") as file:
        settings = json.loads((file.metadata() or {})["settings"])
        return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside, from a missing array to a wrong shape: BundleDamagedError about `path`."""
    try:
        yield
    except BundleError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BundleDamagedError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            fix="Copy the folder again, or make it anew",
        ) from error
