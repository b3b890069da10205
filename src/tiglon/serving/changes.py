"""What was added to the catalogue and taken from it while serving: a file that every worker follows.

    changes.jsonl      one ItemsRequest a line, flushed to the disk before it is answered
    changes.lock       held by who writes to it

A bundle never changes. A server that starts, or takes up a new bundle, applies these lines to it, so a new item
stays and a removed one stays away. A line that a crash cut short was never answered; it is not read, and the
next one takes its place.

Compaction. Prices and stocks change all day, so the file would grow for ever. `compact` leaves out what later
lines undo, and every bundle still becomes what the whole file would have made of it:

- of an item's rows with the same columns and kinds of values the first and the last stay. The last says what
  holds; with the first the item got its semantic ID, which is its own even when it was removed since;
- of an item's removals the last stays: what came between them is gone with it.

The new file is written aside, flushed, and renamed. Its first line has its generation and how many bytes of the
one before it stands for. Who had read just those goes on behind the compacted part; who had not is told to begin
anew, because the lines that it lacks are no longer told apart from those that it has.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tiglon.errors import StorageError
from tiglon.serving.messages import ItemsRequest

_M = TypeVar("_M", bound=BaseModel)


class Place(NamedTuple):
    """How far somebody has read: so many bytes of the file of one generation."""

    generation: int
    byte: int


START = Place(0, 0)


class News(NamedTuple):
    """anew: these are all changes, from the first; they are for a bundle that was given none of them."""

    changes: list[ItemsRequest]
    place: Place
    anew: bool


class _Head(BaseModel):
    """The first line of a compacted file. replaced: bytes of the generation before.   kept: bytes after this line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int
    replaced: int
    kept: int


class Changes:
    """The file of one folder. Raises StorageError where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / "changes.jsonl", folder / "changes.lock"
        with _refused(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._lock.touch()
            _flush(folder)

    def since(self, place: Place) -> News:
        """The changes after `place`, and the place after them."""
        with _refused(self.path), self.path.open("rb") as file:
            first = file.readline()
            head = self._head(first)
            begin = 0 if head is None else len(first)
            generation = 0 if head is None else head.generation
            anew = False
            if place.generation == generation:
                at = place.byte
            elif head is not None and place == (generation - 1, head.replaced):
                at = begin + head.kept
            else:
                at, anew = begin, True
            file.seek(at)
            whole, newline, _ = file.read().rpartition(b"\n")
        found = [self._parsed(line, ItemsRequest) for line in whole.splitlines()]
        return News(found, Place(generation, at + len(whole) + len(newline)), anew)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process writes meanwhile. The lock is a file of its own: a renamed one would be two."""
        with _refused(self._lock):
            file = self._lock.open("rb")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, change: ItemsRequest, place: Place) -> Place:
        """Write a change at `place`, the end of the whole lines; the place after it. Call it `alone`."""
        line = _line(change)
        with _refused(self.path), self.path.open("r+b") as file:
            try:
                file.truncate(place.byte)
                file.seek(place.byte)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), place.byte)
                raise
        return place._replace(byte=place.byte + len(line))

    def compact(self) -> bool:
        """Leave out what later lines undo, where that is at least half of the file. Not to be called `alone`."""
        with self.alone():
            changes, place, _ = self.since(START)
            whole, kept = (b"".join(map(_line, some)) for some in (changes, without_undone(changes)))
            if not whole or 2 * len(kept) > len(whole):
                return False
            head = _Head(generation=place.generation + 1, replaced=place.byte, kept=len(kept))
            aside = self.path.with_suffix(".new")  # what a killed process left there is overwritten
            with _refused(self.path):
                try:
                    with aside.open("wb") as file:
                        file.write(_line(head) + kept)
                        file.flush()
                        os.fsync(file.fileno())
                except OSError:
                    aside.unlink(missing_ok=True)
                    raise
                aside.replace(self.path)
                _flush(self.path.parent)
            return True

    def _head(self, line: bytes) -> _Head | None:
        """None in a file that was never compacted."""
        return self._parsed(line, _Head) if line.startswith(b'{"generation":') else None

    def _parsed(self, line: bytes, kind: type[_M]) -> _M:
        try:
            return kind.model_validate_json(line)
        except ValidationError as error:
            raise StorageError(
                f"a line of {self.path} that is no change of items: {line[:80]!r}",
                rule="Only a server writes to it",
                fix="Put that line right, or delete it",
            ) from error


def without_undone(changes: Sequence[ItemsRequest]) -> list[ItemsRequest]:
    """The same changes, as a bundle is after all of them, without rows and removals that make no difference."""
    first: dict[Any, int] = {}
    last: dict[Any, int] = {}
    removed: dict[Any, int] = {}
    for n, change in enumerate(changes):
        for row in change.add:
            first.setdefault(_shape(row), n)
            last[_shape(row)] = n
        removed.update(dict.fromkeys(change.remove, n))
    kept = []
    for n, change in enumerate(changes):
        add = [row for row in change.add if n in (first[_shape(row)], last[_shape(row)])]
        remove = [item for item in change.remove if removed[item] == n]
        if add or remove:
            kept.append(change.model_copy(update={"add": add, "remove": remove}))
    return kept


def _shape(row: Mapping[str, Any]) -> tuple[Any, frozenset[Any]]:
    """Whose row it is, its columns and kinds of values: rows of one shape fit a bundle all or none."""
    kinds = {(c, type(v), frozenset(map(type, v)) if isinstance(v, list) else None) for c, v in row.items()}
    return row["item_id"], frozenset(kinds)


def _line(message: BaseModel) -> bytes:
    return message.model_dump_json().encode() + b"\n"


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
