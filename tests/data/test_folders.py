"""Folders take each other's place; whoever reads one finds the old or the new."""

import os
import sys
import threading

import pytest

from tiglon.data import folders
from tiglon.data.folders import written_aside


def put(directory, content):
    with written_aside(directory, "mark") as aside:
        (aside / "mark").write_text(content)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two renames")
def test_a_reader_finds_a_folder_at_every_moment(tmp_path):
    place, found, done = tmp_path / "x", [], threading.Event()
    put(place, "0")

    def look():
        while not done.is_set():
            found.append((place / "mark").is_file())

    looking = threading.Thread(target=look)
    looking.start()
    for turn in range(300):
        put(place, str(turn))
    done.set()
    looking.join()
    assert (place / "mark").read_text() == "299"
    assert all(found)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_where_folders_cannot_be_exchanged_the_old_one_comes_back(tmp_path, monkeypatch, stop):
    place, real, turns = tmp_path / "x", os.replace, []
    put(place, "old")
    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)

    def replace(source, target):
        turns.append(target)
        if len(turns) == 2:
            raise stop
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(stop):
        put(place, "new")
    monkeypatch.setattr(os, "replace", real)
    assert (place / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
    put(place, "new")
    assert (place / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_makes_room_and_what_it_points_to_stays(tmp_path):
    put(tmp_path / "kept", "old")
    (tmp_path / "x").symlink_to(tmp_path / "kept")
    put(tmp_path / "x", "new")
    assert (tmp_path / "x" / "mark").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "kept" / "mark").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["kept", "x"]
