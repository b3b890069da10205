"""A home: where bundles are published, one answers, and the ones before it wait.

    home/
      CURRENT               versions, newest first, a line each; the first one answers
      bundles/<version>/    never changed once it stands there

    publish("runs/today", "home")    current("home")    rollback("home")    prune("home", keep=3)

A version is written aside, flushed, verified by its checksums and by loading it, and renamed; only then does
CURRENT change, by a rename as well. Whoever reads CURRENT thus finds a whole bundle under its name at every
moment, be it that a publisher was killed or the power failed. Publishers, rollbacks and prunings take turns
through a lock that dies with its process; readers need none.

A reader that opened a bundle keeps it: pruning unlinks files, and on Linux and macOS a mapped file lives on
until the last process lets go of it. Who has read CURRENT and not yet opened what it names needs keep ≥ 2.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tiglon.errors import BundleDamagedError, BundleError, ConfigError, StorageError
from tiglon.ranking.model import is_ranker
from tiglon.serving.bundle import Bundle, is_bundle, is_home, require_version

PATIENCE = 600.0  # seconds until another publisher counts as stuck
_VERSION = re.compile(r"[0-9a-f]{16}")
_ASIDE = ".aside-"


def publish(bundle: Bundle | str | Path, home: str | Path, *, instead_of: str | None = None) -> Path:
    """Let this bundle answer; its folder in the home. What is published already only moves the pointer.

    bundle: in memory, or the folder of one, which is copied, or another home, whose current one is.
    instead_of: the version that must answer until then, of which this one was made.
    Raises BundleChangedError, BundleError where it cannot be read, ConfigError for a home that is a bundle, StorageError; CURRENT is
    as before then.
    """
    home = Path(home)
    if not isinstance(bundle, Bundle):
        bundle = bundle_folder(Path(bundle))
        Bundle.load(bundle)  # what is wrong with it is said of the folder that was given
    with _alone(home), _aside(home) as aside:
        if instead_of is not None:
            require_version(current(home), instead_of)
        if isinstance(bundle, Bundle):
            bundle.save(aside / "bundle")
        else:
            shutil.copytree(bundle, aside / "bundle")
            _flush_all(aside / "bundle")
        version = Bundle.load(aside / "bundle").version
        place = _folder(home, version)
        if not _whole(place):
            if place.exists():
                os.replace(place, aside / "damaged")
            os.replace(aside / "bundle", place)
            _flush(place.parent)
        _point(home, [version, *(other for other in _listed(home) if other != version)])
    return place


def current(home: str | Path) -> Path:
    """The folder of the bundle that answers. Raises BundleError where there is none."""
    home = Path(home)
    listed = versions(home)
    place = _folder(home, listed[0])
    if not place.is_dir():
        raise BundleDamagedError(
            f"{home / 'CURRENT'} names {listed[0]}, which is not in {home / 'bundles'}",
            fix=f"Publish it again, or go back to the one before: tiglon rollback {home}",
        )
    return place


def bundle_folder(source: Path) -> Path:
    """The bundle that a path means: itself, or what CURRENT names."""
    return current(source) if is_home(source) else source


def versions(home: str | Path) -> list[str]:
    """What CURRENT lists, newest first; the first one answers. Raises BundleError where nothing does."""
    home = Path(home)
    found = _listed(home)
    if not found:
        raise BundleError(
            f"no bundle is published in {home}",
            rule="A home has a file CURRENT and a folder bundles/",
            fix=f"Publish one: tiglon publish BUNDLE {home}",
        )
    return found


def rollback(home: str | Path) -> Path:
    """Let the bundle before the current one answer again; its folder. The newer one stays until it is pruned.

    Raises ConfigError where there is none before, BundleError where it is damaged; CURRENT is as before then.
    """
    home = Path(home)
    with _alone(home):
        newest, *older = versions(home)
        if not older:
            raise ConfigError(
                f"a rollback of {newest}, before which nothing is published",
                rule="A rollback goes to the bundle before",
                fix="Publish the one that you want",
            )
        place = _folder(home, older[0])
        Bundle.load(place)
        _point(home, older)
    return place


def prune(home: str | Path, keep: int = 3) -> list[str]:
    """Delete all but the current bundle and the keep − 1 before it; the versions that are gone.

    What CURRENT does not list goes, too: versions that were rolled back, leftovers of killed publishers.
    Raises ConfigError, StorageError.
    """
    if keep < 1:
        raise ConfigError(f"keep={keep}", rule="The bundle that answers is kept, so keep is at least 1")
    home = Path(home)
    with _alone(home), _aside(home) as aside:
        kept = versions(home)[:keep]
        _point(home, kept)  # first, so that no rollback can find a folder that is being deleted
        found = sorted(place.name for place in (home / "bundles").iterdir())
        gone = [name for name in found if _VERSION.fullmatch(name) and name not in kept]
        for name in gone:
            os.replace(home / "bundles" / name, aside / name)
    return gone


def _folder(home: Path, version: str) -> Path:
    return home / "bundles" / version


def _whole(place: Path) -> bool:
    """Whether a bundle stands there and can be read."""
    try:
        Bundle.load(place)
    except BundleError:
        return False
    return True


def _listed(home: Path) -> list[str]:
    """The lines of CURRENT; none where there is no such file."""
    try:
        lines = (home / "CURRENT").read_text(encoding="utf-8").split()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise BundleDamagedError(f"{home / 'CURRENT'} cannot be read: {error}") from error
    for line in lines:
        if not _VERSION.fullmatch(line):
            raise BundleDamagedError(
                f"{home / 'CURRENT'} holds {line[:40]!r}",
                rule="Its lines are versions, 16 hexadecimal digits each",
                fix="Write the version that shall answer into it; bundles/ has a folder for each",
            )
    return lines


def _point(home: Path, listed: list[str]) -> None:
    """Replace CURRENT, whole and on the disk."""
    if listed == _listed(home):
        return
    new = home / ".CURRENT"
    new.write_text("".join(f"{version}\n" for version in listed), encoding="utf-8")
    _flush(new)
    os.replace(new, home / "CURRENT")
    _flush(home)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One change of a home at a time. What the disk refuses becomes a StorageError; ConfigError for no home."""
    if is_bundle(home) or is_ranker(home):
        raise ConfigError(
            f"{home}, which is a {'bundle' if is_bundle(home) else 'ranker'}",
            rule="A home is a folder of its own, into which bundles are copied",
            fix="Name another folder; it is made if it is missing",
        )
    try:
        (home / "bundles").mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock", timeout=PATIENCE):
            yield
    except Timeout as error:
        raise StorageError(
            f"{home} has been locked by another process for {PATIENCE:.0f} s",
            rule="One process publishes, rolls back or prunes at a time",
            fix="Wait for it, or end it: its lock dies with it",
        ) from error
    except StorageError:
        raise
    except (OSError, shutil.Error) as error:
        raise StorageError(
            f"{home} could not be changed: {error}",
            rule="CURRENT names the bundle that it named before, or the whole new one",
            fix="Free some space or choose another place",
        ) from error


@contextmanager
def _aside(home: Path) -> Iterator[Path]:
    """A folder for what is not, or no longer, to be seen; it vanishes. Only under the lock: whatever an earlier
    process left aside is deleted, for that process must be dead."""
    bundles = home / "bundles"
    for left in bundles.glob(f"{_ASIDE}*"):
        shutil.rmtree(left)
    aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=bundles))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
