"""What was added to the catalogue and taken from it while serving: a file that every worker follows.

    changes.jsonl      one ItemsRequest a line, flushed to the disk before it is answered

A bundle never changes. A server that starts, or takes up a new bundle, applies these lines to it, so a new item
stays and a removed one stays away; applying a line twice changes nothing. A line that a crash cut short was
never answered; it is not read, and the next one takes its place.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from tiglon.errors import StorageError
from tiglon.serving.messages import ItemsRequest


class Changes:
    """A place in it is a number of bytes. Raises StorageError where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "changes.jsonl"
        with _refused(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            _flush(folder)

    def since(self, place: int) -> tuple[list[ItemsRequest], int]:
        """The changes after `place`, and the place after them."""
        with _refused(self.path), self.path.open("rb") as file:
            file.seek(place)
            whole, newline, _ = file.read().rpartition(b"\n")
        found = []
        for line in whole.splitlines():
            try:
                found.append(ItemsRequest.model_validate_json(line))
            except ValidationError as error:
                raise StorageError(
                    f"a line of {self.path} after byte {place} that is no change of items: {line[:80]!r}",
                    rule="Only a server writes to it",
                    fix="Put that line right, or delete it",
                ) from error
        return found, place + len(whole) + len(newline)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process appends meanwhile."""
        with _refused(self.path):
            file = self.path.open("rb")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, change: ItemsRequest, place: int) -> int:
        """Write a change at `place`, the end of the whole lines; the place after it. Call it `alone`."""
        line = change.model_dump_json().encode() + b"\n"
        with _refused(self.path), self.path.open("r+b") as file:
            try:
                file.truncate(place)
                file.seek(place)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), place)
                raise
        return place + len(line)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What the disk says, as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} cannot be used: {error.strerror}",
            rule="Nothing was changed there",
            fix="Free some space, or let the server write to it",
        ) from error


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
