"""Folders that are written whole or not at all, and read with one clear error where something is wrong."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polars.exceptions import PolarsError
from safetensors import SafetensorError

from tiglon.errors import BundleDamagedError, BundleError, BundleVersionError, ConfigError, StorageError


@contextlib.contextmanager
def written_aside(directory: Path, mark: str) -> Iterator[Path]:
    """A new empty folder that takes the place of `directory` when the block ends well, and vanishes otherwise.

    mark: a file that every folder of this kind holds; one without it is not replaced unless it is empty.
    Raises ConfigError for what must not be replaced, StorageError where the disk refuses.
    """
    directory = Path(os.path.abspath(directory))  # "." has no name
    try:
        _require_replaceable(directory, mark)
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise _refused(directory, error) from error
    try:
        yield aside
        aside.chmod(0o755)
        if not directory.exists():
            os.replace(aside, directory)
        elif not _exchanged(aside, directory):
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            os.replace(directory, old / "old")
            try:
                os.replace(aside, directory)
            except BaseException:
                os.replace(old / "old", directory)
                old.rmdir()
                raise
            shutil.rmtree(old)
    except OSError as error:
        raise _refused(directory, error) from error
    finally:
        if aside.is_symlink():  # it stood at `directory`; what it points to is not ours
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders took each other's place, at one moment; not every system can. Raises OSError."""
    rename = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    )
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _require_replaceable(directory: Path, mark: str) -> None:
    if directory.is_dir():
        if (directory / mark).is_file() or not any(directory.iterdir()):
            return
        what = f"the folder {directory}, which holds files but no {mark}"
    elif directory.exists():
        what = f"{directory}, which is a file"
    else:
        return
    raise ConfigError(
        what, rule="Only an empty folder or one of the same kind is replaced", fix="Choose another path"
    )


def _refused(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{directory} could not be written: {error}",
        rule="Nothing was changed there",
        fix="Free some space or choose another place",
    )


@contextlib.contextmanager
def reading(
    directory: Path, file: str, known: int, *, what: str, rule: str, fix: str, oldest: int = 1
) -> Iterator[dict[str, Any]]:
    """What the JSON `file` says of a folder, for a block that reads the rest of it.

    known, oldest: the newest format that can be read, and the first.   what: the folder's content, with its article.   rule, fix: of the error.
    Raises BundleVersionError for another format, and BundleDamagedError for whatever goes wrong inside the block.
    """
    try:
        about = json.loads((directory / file).read_text(encoding="utf-8"))
        if about["format"] > known:
            raise BundleVersionError(
                f"{what} of format {about['format']} in {directory}",
                rule=f"This Tiglon reads formats up to {known}",
                fix="Update Tiglon",
            )
        if about["format"] < oldest:
            raise BundleVersionError(
                f"{what} of format {about['format']} in {directory}",
                rule=f"This Tiglon reads formats from {oldest}; networks have learned more since",
                fix="Train it anew",
            )
        yield about
    except BundleError:
        raise
    except (OSError, SafetensorError, PolarsError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BundleDamagedError(
            f"{what} in {directory} cannot be read: {error}", rule=rule, fix=fix
        ) from error
