"""SASRec: one pass is every prefix alone; answers are products; content reaches items without events."""

import json
import shutil

import numpy as np
import pytest
import torch

from tiglon.data.split import leave_last_out
from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.nn.transformer import PADDING
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.retrieval.softmax import Negatives
from tiglon.retrieval.windows import Batch
from tiglon.train.loop import TrainConfig
from tiglon.types import Histories, Interactions, Vocabulary

torch.set_num_threads(1)

N = 20
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
VECTORS = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
FAST = TrainConfig(epochs=2, lr=5e-3, evaluations=2, average=0.9, bfloat16=False)
TINY = SasRecConfig(width=16, heads=2, hidden=32, layers=2, dropout=0.1, distances=8, window=10, train=FAST)
LIVES = [
    [(3, 0), (1, 1), (4, 2), (1, 3), (5, 4)],
    [(9, 0), (2, 0), (6, 1), (5, 2), (3, 2), (9, 3)],
    [(7, 0)],
]


def sasrec(vectors=VECTORS, **changes):
    made = SasRec(ITEMS, SasRecConfig(**{**TINY.__dict__, **changes}), vectors)
    for at_zero in (
        made.network.bias.weight,
        made.network.repetition.weight,
    ):  # where a wrong one would not show
        torch.nn.init.normal_(at_zero.data, std=0.3)
    return made


def batch(lives, width=None):
    width = width or max(map(len, lives))
    item, moment = torch.zeros(len(lives), width, dtype=torch.int64), torch.full((len(lives), width), PADDING)
    for row, life in enumerate(lives):
        for at, (i, m) in enumerate(life):
            item[row, at], moment[row, at] = i, m
    return Batch(item, moment, moment < PADDING, torch.zeros(len(lives), dtype=torch.int64))


@pytest.mark.parametrize("vectors", [None, VECTORS])
@torch.no_grad()
def test_each_targets_loss_is_that_of_its_prefix_alone(vectors):
    network = sasrec(vectors).network
    together = network.loss(batch(LIVES, width=9)).split([len(life) for life in LIVES])
    for life, found in zip(LIVES, together, strict=True):
        for at, (item, moment) in enumerate(life):
            alone = batch([[event for event in life if event[1] < moment] + [(item, moment)]])
            alone.target[0, :-1] = False
            torch.testing.assert_close(found[at], network.loss(alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times", [1, 3])
@torch.no_grad()
def test_with_every_item_drawn_as_often_the_loss_is_that_of_the_whole_catalogue(times):
    network = sasrec().network
    drawn = Negatives(torch.arange(N).repeat(times), torch.full((N * times,), float(times)).log())
    torch.testing.assert_close(network.loss(batch(LIVES), drawn), network.loss(batch(LIVES)))


@torch.no_grad()
def test_scores_are_the_logits_it_trains_on():
    made = sasrec()
    items, times = zip(*LIVES[1], strict=True)
    history = Histories(np.array([0, 6]), np.array(items), np.array(times))
    log_p = torch.from_numpy(made.score(history)[0]).log_softmax(dim=0)
    for item in range(N):
        life = batch([[*LIVES[1], (item, 4)]])
        life.target[0, :-1] = False
        assert made.network.loss(life).item() == pytest.approx(-log_p[item].item(), abs=1e-5)


def test_untrained_and_with_content_it_recommends_what_is_alike():
    """Its state begins near the latest item's vector; without content that says nothing."""
    made = SasRec(ITEMS, SasRecConfig(**{**TINY.__dict__, "layers": 1, "dropout": 0.0}), VECTORS)
    with torch.no_grad():
        made.network.items.own.weight.zero_()
        for layer in made.network.layers:
            layer.attention.o.weight.zero_()
            layer.ff.wo.weight.zero_()
    centred = VECTORS - VECTORS.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = centred @ centred.T
    for item in range(N):
        found = made.retrieve(Histories.of([[0, item]]), N, exclude_seen=False).item[0]
        np.testing.assert_array_equal(found, np.argsort(-cosine[item]))


def test_it_learns_what_follows_what():
    rng = np.random.default_rng(0)
    lives = (rng.integers(0, N, (120, 1)) + np.arange(8)) % N
    log = Interactions(
        user=np.repeat(np.arange(120), 8).astype(np.int32),
        item=lives.ravel().astype(np.int32),
        time=np.tile(np.arange(8), 120),
        users=Vocabulary([f"u{i}" for i in range(120)]),
        items=ITEMS,
    )
    split = leave_last_out(log)
    learned = sasrec(None, train=TrainConfig(epochs=40, lr=1e-2, evaluations=2, average=0.9, bfloat16=False))
    learned.fit(split.train, split.validation)
    assert evaluate(learned, split.test, ks=(1,), exclude_seen=False).metrics["recall@1"] > 0.95


def test_similar_items_are_those_of_alike_vectors_and_not_itself():
    made = sasrec()
    vectors = made.network.vectors().detach().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = made.alike(np.array([4, 7]), 5)
    for row, item in zip(found.item, (4, 7), strict=True):
        order = [i for i in np.argsort(-(vectors @ vectors[item])) if i != item]
        assert row.tolist() == order[:5]


@pytest.mark.parametrize("vectors", [None, VECTORS])
def test_saved_and_loaded_it_answers_the_same(vectors, tmp_path):
    made = sasrec(vectors)
    made.save(tmp_path / "kept")
    again = SasRec.load(tmp_path / "kept")
    histories = Histories.of([[3, 8], [], list(range(15))])
    np.testing.assert_array_equal(again.score(histories), made.score(histories))
    assert again.config == made.config


def test_damaged_or_newer_folders_are_refused(tmp_path):
    sasrec().save(tmp_path / "kept")
    for name in ("retriever.json", "items.parquet", "network.safetensors"):
        shutil.copytree(tmp_path / "kept", tmp_path / name)
        (tmp_path / name / name).write_bytes(b"{")
        with pytest.raises(BundleDamagedError, match="cannot be read"):
            SasRec.load(tmp_path / name)
    about = json.loads((tmp_path / "kept" / "retriever.json").read_text())
    (tmp_path / "kept" / "retriever.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BundleVersionError, match="format 99"):
        SasRec.load(tmp_path / "kept")


def test_bad_settings_and_logs_are_named():
    for wrong in (
        [[1.0], [2.0, 3.0]],
        np.array([["a"]] * N),
        np.full((N, 2), np.nan),
        VECTORS[:-1],
        VECTORS[0],
    ):
        with pytest.raises(DataError, match=f"one finite vector for each of {N} items"):
            SasRec(ITEMS, TINY, wrong)
    SasRec(ITEMS, TINY, VECTORS.tolist())
    with pytest.raises(ConfigError, match="heads share the width"):
        SasRecConfig(width=10, heads=4)
    with pytest.raises(ConfigError, match="layers is at least 1"):
        SasRecConfig(layers=0)
    with pytest.raises(DataError, match=r"item vectors of shape \(3, 6\)"):
        SasRec(ITEMS, TINY, VECTORS[:3])
    empty = np.empty(0, np.int32)
    with pytest.raises(DataError, match="without any event"):
        sasrec().fit(Interactions(empty, empty, empty.astype(np.int64), Vocabulary(["u"]), ITEMS))
    other = Interactions(empty, empty, empty.astype(np.int64), Vocabulary(["u"]), Vocabulary(["x"]))
    with pytest.raises(DataError, match="not those of this retriever"):
        sasrec().fit(other)
