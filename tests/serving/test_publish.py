"""CURRENT names a whole bundle at every moment, whoever publishes, dies or prunes meanwhile."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from filelock import FileLock

from tiglon.errors import BundleDamagedError, BundleError, ConfigError, StorageError
from tiglon.serving import publish as publishing
from tiglon.serving.bundle import Bundle
from tiglon.serving.publish import current, prune, publish, rollback, versions

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def bundles(bundle_path, tmp_path_factory):
    """Three bundles on the disk, each with one item more than the one before."""
    places, folder = [bundle_path], tmp_path_factory.mktemp("versions")
    for item in (500, 501):
        bundle = Bundle.load(places[-1])
        title = bundle.items.table["title"][0]
        bundle.add_items(pl.DataFrame({"item_id": [item], "title": [title]})).save(folder / str(item))
        places.append(folder / str(item))
    return places


@pytest.fixture(scope="module")
def names(bundles):
    return [Bundle.load(place).version for place in bundles]


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def folders(home):
    """What stands in bundles/, leftovers too."""
    return sorted(path.name for path in (home / "bundles").iterdir())


def test_what_is_published_answers_as_it_did(bundles, names, home):
    place = publish(bundles[0], home)
    assert place == current(home) == home / "bundles" / names[0]
    assert Bundle.load(place).recommend([1], 5) == Bundle.load(bundles[0]).recommend([1], 5)
    assert (home / "CURRENT").read_text() == f"{names[0]}\n"
    assert folders(home) == [names[0]]


def test_a_bundle_in_memory_is_published_as_the_one_on_the_disk_is(bundles, names, home):
    assert publish(Bundle.load(bundles[1]), home) == home / "bundles" / names[1]
    assert Bundle.load(current(home)).version == names[1]


def test_a_rollback_goes_to_the_one_before_and_forward_again_by_publishing(bundles, names, home):
    for bundle in bundles:
        publish(bundle, home)
    assert versions(home) == names[::-1]
    assert rollback(home) == current(home) == home / "bundles" / names[1]
    rollback(home)
    assert versions(home) == [names[0]]
    with pytest.raises(ConfigError, match=rf"a rollback of {names[0]}, before which nothing is published\."):
        rollback(home)
    publish(home / "bundles" / names[2], home)
    assert versions(home) == [names[2], names[0]]
    publish(bundles[0], home)
    assert versions(home) == [names[0], names[2]]


def test_a_home_is_published_as_its_current_bundle_is(bundles, names, home, tmp_path):
    for bundle in bundles[:2]:
        publish(bundle, home)
    assert publish(home, tmp_path / "other") == tmp_path / "other" / "bundles" / names[1]
    assert publish(home, home) == current(home)
    assert versions(home) == [names[1], names[0]]


def test_a_bundle_or_a_ranker_is_no_home(bundles, tmp_path):
    copy, ranker = shutil.copytree(bundles[1], tmp_path / "copy"), tmp_path / "ranker"
    ranker.mkdir()
    (ranker / "ranker.json").touch()
    for place, what in ((copy, "bundle"), (ranker, "ranker")):
        before = sorted(place.rglob("*"))
        for call in (lambda at: publish(bundles[0], at), rollback, prune):
            with pytest.raises(ConfigError) as error:
                call(place)
            assert str(error.value) == (
                f"{place}, which is a {what}. A home is a folder of its own, into which bundles are copied. "
                "Name another folder; it is made if it is missing."
            )
        assert sorted(place.rglob("*")) == before
    with pytest.raises(BundleDamagedError, match=f"{ranker} is a ranker"):
        publish(ranker, tmp_path / "home")


def test_publishing_twice_changes_nothing(bundles, home):
    publish(bundles[0], home)
    before = os.stat(home / "CURRENT"), os.stat(current(home))
    publish(bundles[0], home)
    assert (os.stat(home / "CURRENT").st_ino, os.stat(current(home)).st_ino) == tuple(
        stat.st_ino for stat in before
    )


def test_pruning_keeps_the_current_and_those_before(bundles, names, home):
    for bundle in bundles:
        publish(bundle, home)
    rollback(home)
    (home / "bundles" / ".aside-killed").mkdir()
    assert prune(home) == [names[2]]  # rolled back, so nothing leads to it
    assert folders(home) == sorted(names[:2])
    assert prune(home, keep=1) == [names[0]]
    assert versions(home) == [names[1]] == folders(home)
    assert prune(home, keep=1) == []
    with pytest.raises(ConfigError, match=r"keep=0\. The bundle that answers is kept"):
        prune(home, keep=0)


def test_a_pruned_bundle_answers_to_its_end_where_it_was_opened(bundles, home):
    publish(bundles[0], home)
    opened = Bundle.load(current(home))
    publish(bundles[1], home)
    prune(home, keep=1)
    assert not opened.path.exists()
    assert opened.recommend([1, 2], 5) == Bundle.load(bundles[0]).recommend([1, 2], 5)


def test_a_damaged_bundle_is_never_pointed_at(bundles, names, home, tmp_path):
    publish(bundles[0], home)
    damaged = shutil.copytree(bundles[1], tmp_path / "damaged")
    with (damaged / "vectors.npy").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"wibb")
    with pytest.raises(BundleDamagedError, match=r"vectors\.npy in .*damaged is damaged"):
        publish(damaged, home)
    with pytest.raises(BundleError, match="no bundle at"):
        publish(tmp_path / "nowhere", home)
    assert versions(home) == folders(home) == [names[0]]

    publish(bundles[1], home)
    (home / "bundles" / names[0] / "vectors.npy").unlink()
    with pytest.raises(BundleDamagedError, match=r"vectors\.npy is missing"):
        rollback(home)
    assert versions(home)[0] == names[1]
    publish(bundles[0], home)  # what is damaged is replaced
    assert Bundle.load(current(home)).version == names[0]


def test_a_home_in_disorder_is_one_clear_error(bundles, names, home):
    with pytest.raises(BundleError, match=r"no bundle is published in .*home\. A home has a file CURRENT"):
        current(home)
    publish(bundles[0], home)
    (home / "CURRENT").write_text("../../etc/passwd\n")
    with pytest.raises(BundleDamagedError, match=r"CURRENT holds '\.\./\.\./etc/passwd'\. Its lines are"):
        current(home)
    (home / "CURRENT").write_text(f"{names[1]}\n{names[0]}\n")
    with pytest.raises(BundleDamagedError, match=rf"names {names[1]}, which is not in .*tiglon rollback "):
        current(home)
    assert rollback(home) == home / "bundles" / names[0]


def test_a_full_disk_leaves_the_pointer(bundles, names, home):
    publish(bundles[0], home)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        for bundle in (bundles[1], Bundle.load(bundles[1])):
            with pytest.raises(StorageError, match="could not be"):
                publish(bundle, home)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert versions(home) == folders(home) == [names[0]]
    assert publish(bundles[1], home) == current(home)


def test_publishers_take_turns(bundles, home, monkeypatch):
    publish(bundles[0], home)
    monkeypatch.setattr(publishing, "PATIENCE", 0.05)
    with (
        FileLock(home / ".lock"),
        pytest.raises(StorageError, match=r"locked by another process .*Wait for it, or end it"),
    ):
        publish(bundles[1], home)
    publish(bundles[1], home)


def test_everything_is_on_the_disk_before_the_pointer_moves(bundles, names, home, monkeypatch):
    """What a loss of power would find: no rename is flushed before what it names."""
    done = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(old, new):
        done.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    place = publish(bundles[0], home)
    moved = done.index(("rename", str(place)))
    flushed = {Path(path).name for what, path in done[:moved] if what == "flush"}
    assert {path.name for path in place.rglob("*")} <= flushed
    after = [(what, Path(path).relative_to(home)) for what, path in done[moved + 1 :]]
    assert after == [
        ("flush", Path("bundles")),
        ("flush", Path(".CURRENT")),
        ("rename", Path("CURRENT")),
        ("flush", Path()),
    ]


def test_kill_9_breaks_nothing(bundle_path):
    """The whole script is benchmarks/faults.py; here a few kills of each kind."""
    command = [sys.executable, str(FAULTS), "--kills", "2", "--bundle", str(bundle_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("  0 broken   0 lost   0 mixed") == 5
