"""A small world, and one bundle trained on it, for all tests of the product's face."""

from dataclasses import replace

import pytest
import torch

from tiglon.data.sources import save_tables
from tiglon.data.synthetic import synthetic
from tiglon.recipes import train

TINY = {
    "ids.codes": "8",
    "text.dim": "16",
    "model.width": "16",
    "model.heads": "1",
    "model.head_width": "16",
    "model.hidden": "32",
    "model.encoder_layers": "1",
    "model.decoder_layers": "1",
    "train.epochs": "2",
    "train.evaluations": "1",
    "beams": "10",
    "sasrec.width": "8",
    "sasrec.heads": "1",
    "sasrec.hidden": "16",
    "sasrec.layers": "1",
    "sasrec.train.epochs": "1",
    "sasrec.train.evaluations": "1",
    "two_tower.width": "8",
    "two_tower.hidden": "16",
    "two_tower.uniform": "8",
    "two_tower.train.epochs": "1",
    "two_tower.train.evaluations": "1",
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """Settings of a training that takes a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def world_tables(tmp_path_factory):
    """A folder with interactions.parquet and items.parquet: 60 users, 40 items, no repeats."""
    folder = tmp_path_factory.mktemp("world") / "tables"
    source = synthetic(60, 40, 10, seed=3, clusters=5, repeat=0.0, zipf=0.3).source()
    once = source.interactions.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    save_tables(replace(source, interactions=once), folder)
    return folder


@pytest.fixture(scope="session")
def bundle_path(world_tables, tmp_path_factory):
    """A bundle on the disk. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("bundles") / "world"
    train(world_tables / "interactions.parquet", world_tables / "items.parquet", out, changes=TINY)
    return out
