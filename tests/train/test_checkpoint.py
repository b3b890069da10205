"""Checkpoints come back bit for bit, or the error says why; a failed write leaves the old one."""

import contextlib
import os
import resource

import pytest
import torch

from tiglon.errors import BundleDamagedError, StorageError
from tiglon.train import checkpoint

TENSORS = {
    "now/a": torch.randn(7, 5),
    "adam/step/a": torch.tensor(3.0),
    "half": torch.randn(4).bfloat16(),
    "transposed": torch.randn(4, 6).T,
    "generator": torch.get_rng_state(),
    "empty": torch.empty(0, 3),
}
HEAD = {"step": 12, "loss": 0.1 + 0.2, "best_score": None, "history": [{"score": 1e-17}], "done": False}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "checkpoint.safetensors"


@contextlib.contextmanager
def small_disk():
    """No file may grow past 4 KiB: writes fail as they do on a full disk. (Nothing may be printed inside.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_saved_comes_back(path):
    checkpoint.save(path, TENSORS, HEAD)
    tensors, head = checkpoint.load(path)
    assert head == HEAD
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert os.listdir(path.parent) == [path.name]


def test_a_later_one_replaces_it_past_a_half_written_one(path):
    checkpoint.save(path, TENSORS, HEAD)
    path.with_name(path.name + ".part").write_bytes(b"killed while writing")
    checkpoint.save(path, TENSORS, HEAD | {"step": 13})
    assert checkpoint.load(path)[1]["step"] == 13
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_told_and_the_old_one_stays(path):
    checkpoint.save(path, TENSORS, HEAD)
    with (
        small_disk(),
        pytest.raises(StorageError, match=r"cannot write .*checkpoint.*\. Free some disk space and run"),
    ):
        checkpoint.save(path, TENSORS | {"large": torch.zeros(5000)}, HEAD | {"step": 13})
    with small_disk(), pytest.raises(StorageError, match=r"cannot write .*metrics"):
        checkpoint.write_text(path.with_name("metrics.jsonl"), "x" * 5000)
    assert checkpoint.load(path)[1] == HEAD
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", TENSORS, HEAD)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_cut_file_is_told(path, kept):
    checkpoint.save(path, TENSORS, HEAD)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(BundleDamagedError, match=r"cannot read .*\. Delete it to start anew\."):
        checkpoint.load(path)


def test_a_missing_or_foreign_file_is_told(path, tmp_path):
    with pytest.raises(BundleDamagedError, match="cannot read"):
        checkpoint.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BundleDamagedError, match="cannot read"):
        checkpoint.load(tmp_path / "other.safetensors")
