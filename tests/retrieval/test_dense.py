"""What dense retrievers share: rows of one target, answers by the index, later items, drawn negatives, files.

Shown on ComiRec (SA), which has every shared part; the contract test asks all of them.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tiglon.data.split import leave_last_out
from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.retrieval.comirec import ComiRec, ComiRecConfig
from tiglon.retrieval.index import FaissIndex
from tiglon.retrieval.mind import Mind, MindConfig
from tiglon.retrieval.towers import HashedUsers, ItemTower, Past
from tiglon.retrieval.two_tower import TwoTower
from tiglon.retrieval.windows import collate
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Histories, Interactions, Vocabulary

torch.set_num_threads(1)

N, C = 20, 6
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
VECTORS = np.random.default_rng(0).normal(size=(N, C)).astype(np.float32)
FAST = TrainConfig(epochs=12, lr=2e-2, evaluations=2, average=0.9, bfloat16=False)
TINY = ComiRecConfig(width=16, dropout=0.0, interests=2, window=10, batch_targets=128, train=FAST)
HISTORIES = Histories.of([[3, 8], [], list(range(15)), [4]])


def make(vectors=VECTORS, **changes):
    return ComiRec(ITEMS, ComiRecConfig(**{**TINY.__dict__, **changes}), vectors)


def circle(users=80, length=8):
    """Users who walk round the catalogue: the next item follows from the last one."""
    lives = (np.random.default_rng(0).integers(0, N, (users, 1)) + np.arange(length)) % N
    return Interactions(
        user=np.repeat(np.arange(users), length).astype(np.int32),
        item=lives.ravel().astype(np.int32),
        time=np.tile(np.arange(length), users),
        users=Vocabulary([f"u{i}" for i in range(users)]),
        items=ITEMS,
    )


def test_the_past_of_a_row_ends_before_its_target():
    """The second event of the target's own basket is not past."""
    item, moment = np.array([5, 6, 7, 8]), np.array([0, 1, 2, 2])
    batch = collate(item, moment, np.ones(4, bool), np.zeros(4, np.int64), np.array([[0, 4, 3]]), 6)
    past = Past.of(batch)
    assert past.mask.tolist() == [[True, True, False, False, False, False]]
    assert past.age[past.mask].tolist() == [2, 1]


def test_scores_are_the_best_product_of_the_interests_there_are():
    made = make()
    interests, _ = made.users(HISTORIES)
    scores = made.score(HISTORIES)
    np.testing.assert_allclose(scores[0], (interests[0] @ made.vectors().T).max(axis=0), rtol=1e-5)
    stranger = made.network.stranger.detach() * made.network.log_scale.exp()
    np.testing.assert_allclose(scores[1], made.vectors() @ stranger.detach().numpy(), rtol=1e-4, atol=1e-5)
    best = made.retrieve(HISTORIES, N, exclude_seen=False)
    np.testing.assert_allclose(best.score, -np.sort(-scores, axis=1), rtol=1e-4, atol=1e-5)


AGAIN = Histories(np.array([0, 7, 7, 9]), np.array([4, 4, 9, 4, 2, 9, 5, 8, 8]), np.arange(9))


def repeating():
    made = make()
    made.network.repetition.weight.data.normal_(std=0.3)
    return made


def test_answers_know_what_one_had():
    made = repeating()
    interests, _ = made.users(AGAIN)
    expected = (interests @ made.vectors().T).max(axis=1)
    owner, item, offset = made.network.repetition.of(AGAIN)
    expected[owner, item] += offset
    np.testing.assert_allclose(made.score(AGAIN), expected, rtol=1e-4, atol=1e-4)
    found = made.retrieve(AGAIN, 6, exclude_seen=False)
    np.testing.assert_array_equal(found.item, np.argsort(-expected, axis=1)[:, :6])
    np.testing.assert_allclose(found.score, -np.sort(-expected, axis=1)[:, :6], rtol=1e-4, atol=1e-4)
    deny = np.isin(np.arange(N), [4, 9])
    assert not np.isin(made.retrieve(AGAIN, N, exclude_seen=False, deny=deny).item, [4, 9]).any()


def test_what_was_had_too_long_ago_to_be_remembered_is_found_all_the_same(monkeypatch):
    for module in ("repetition", "dense", "comirec"):
        monkeypatch.setattr(f"tiglon.retrieval.{module}.REMEMBERED", 3)
    made, lives = repeating(), Histories.of([list(range(15)), [4], []])
    found, expected = made.retrieve(lives, N, exclude_seen=False), made.score(lives)
    np.testing.assert_array_equal(found.item, np.argsort(-expected, axis=1))
    np.testing.assert_allclose(found.score, -np.sort(-expected, axis=1), rtol=1e-4, atol=1e-4)
    plain = made.retrieve_diverse(lives, N, np.zeros(N), 0.0, exclude_seen=False)
    np.testing.assert_array_equal(plain.item, found.item)
    assert (made.retrieve(lives, N).item[0] != MISSING).sum() == N - 15  # hidden however long ago it was


@pytest.mark.parametrize("drawn", [{}, {"whole": 0, "negatives": 64}], ids=["whole", "drawn"])
def test_it_learns_whether_people_come_back(drawn):
    """Of two worlds, whose items say nothing: what is had is never had again; every second event is the last one's item."""
    rng = np.random.default_rng(0)
    for again in (0.0, 0.5):
        lives = np.array([rng.permutation(N)[:8] for _ in range(300)])
        for at in range(1, 8):
            repeat = rng.random(300) < again
            lives[repeat, at] = lives[repeat, at - 1]
        log = dataclasses.replace(circle(300), item=lives.ravel().astype(np.int32))
        learned = make(None, **drawn).fit(log)
        p = torch.from_numpy(learned.score(Histories.of(lives.tolist()))).softmax(dim=1).numpy()
        last = p[np.arange(300), lives[:, -1]].mean()
        assert last < 0.02 if again == 0 else last == pytest.approx(0.5, abs=0.1)


def test_denied_items_are_left_out():
    deny = np.arange(N) < N - 3
    found = make().retrieve(Histories.of([[N - 1]]), 10, deny=deny).item[0]
    assert sorted(found[found != MISSING]) == [N - 3, N - 2]


def test_faiss_may_take_the_place_of_the_index():
    made, other = make(), make(index="Flat")
    assert isinstance(other._ready()[2], FaissIndex)
    np.testing.assert_array_equal(made.retrieve(HISTORIES, 5).item, other.retrieve(HISTORIES, 5).item)


def test_the_index_is_saved_with_it(tmp_path):
    made = make(index="HNSW8")
    made.save(tmp_path / "dense")
    loaded = type(made).load(tmp_path / "dense")
    assert isinstance(loaded._ready()[2], FaissIndex)
    np.testing.assert_array_equal(made.retrieve(HISTORIES, 5).item, loaded.retrieve(HISTORIES, 5).item)


def test_an_index_that_faiss_does_not_know():
    for index in ("HNSW-32", "HNSW1", "HNSW32 nprobe=4", "IVF4,Flat nprobe=0", "HNSW8 efSearch=many"):
        with pytest.raises(ConfigError, match=rf"'{index}'.*index_factory.*HNSW32"):
            ComiRecConfig(index=index)
    with pytest.raises(ConfigError, match=r"'IVF64,Flat' of 20 items"):
        make(index="IVF64,Flat").retrieve(HISTORIES, 5)


@pytest.mark.parametrize("drawn", [{}, {"whole": 0, "negatives": 64}], ids=["whole", "drawn"])
def test_it_learns_what_follows_what(drawn):
    split = leave_last_out(circle())
    learned = make(None, **drawn).fit(split.train, split.validation)
    assert evaluate(learned, split.test, ks=(5,)).metrics["recall@5"] > 0.9


def test_a_stopped_run_leaves_a_retriever_that_answers_the_same_twice(tmp_path, monkeypatch):
    split, made, steps = leave_last_out(circle(40)), make(dropout=0.5), iter(range(99))
    learn = made.network.loss

    def loss(*batch):
        if next(steps) == 15:
            raise KeyboardInterrupt
        return learn(*batch)

    monkeypatch.setattr(made.network, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        made.fit(split.train, split.validation)
    once, again = (made.retrieve(HISTORIES, 5) for _ in range(2))
    np.testing.assert_array_equal(once.score, again.score)
    fresh = ComiRec(ITEMS, made.config, VECTORS)
    fresh.network.load_state_dict(made.network.state_dict())
    np.testing.assert_array_equal(fresh.retrieve(HISTORIES, 5).score, once.score)


def test_a_checkpoint_of_other_events_or_vectors_is_refused(tmp_path):
    log = circle(10)
    make().fit(log, directory=tmp_path)
    baskets = dataclasses.replace(log, time=log.time // 2)
    others = dataclasses.replace(log, users=Vocabulary([f"another {user}" for user in log.users.raw]))
    cases = ((make(), baskets, "events"), (make(), others, "events"), (make(-VECTORS), log, "vectors"))
    for made, other, what in cases:
        with pytest.raises(ConfigError, match=rf"a checkpoint of another training \({what} differ"):
            made.fit(other, directory=tmp_path)


@pytest.mark.parametrize(
    "kind, config",
    [
        (Mind, MindConfig(power=2.0)),
        (Mind, MindConfig(power=3.0)),
        (ComiRec, ComiRecConfig(extractor="sa")),
        (ComiRec, ComiRecConfig(extractor="dr")),
    ],
)
def test_a_target_teaches_the_interests_that_fit_it(kind, config):
    """MIND eq. 8, its interests mixed by softmax(sign(s)·|s|^p); ComiRec eq. 6, the best interest alone."""
    once = dataclasses.replace(FAST, epochs=1, lr=1e-4, evaluations=1)
    config = dataclasses.replace(config, width=16, interests=3, dropout=0.0, window=10, train=once)
    made, batches = kind(ITEMS, config, VECTORS), []
    original = made.network.loss
    made.network.loss = lambda batch, *more: batches.append(batch) or original(batch, *more)
    made.fit(circle(6))
    batch = max(batches, key=lambda batch: batch.item.shape[1])
    with torch.no_grad():
        for weights in made.network.repetition.parameters():
            weights.zero_()
        table = made.network.items.table()
        found = original(batch)
        interests, present = made.network.users(Past.of(batch), table)
    power, signs = getattr(config, "power", None), set()
    for t, target in enumerate(batch.item[batch.target].tolist()):
        rows = interests[t, present[t]].double()
        fits = rows @ table[target].double()
        signs |= set(fits.sign().tolist())
        mixed = (
            rows[fits.argmax()] if power is None else (fits.sign() * fits.abs() ** power).softmax(0) @ rows
        )
        expected = -(table.double() @ mixed).log_softmax(0)[target]
        torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-4)
    assert signs == {-1.0, 1.0}


def test_loading_content_leaves_the_random_numbers_of_others_alone(tmp_path):
    make().save(tmp_path / "kept")
    before = torch.get_rng_state()
    ComiRec.load(tmp_path / "kept")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_weights():
    once, again = (make().fit(circle(20)).network.state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_new_items_are_known_by_their_content():
    made = make()
    made.network.items.own.weight.data.zero_()
    before = made.retrieve(HISTORIES, 5).item
    more = Vocabulary([*ITEMS.raw.to_pylist(), "twin of 7", "new"])
    made.add_items(more, np.stack([VECTORS[7], -VECTORS[7]]))
    vectors = made.vectors()
    np.testing.assert_allclose(vectors[N], vectors[7], rtol=1e-5, atol=1e-6)
    assert N in made.alike(np.array([7]), 1).item
    with_new = made.retrieve(HISTORIES, 8).item
    for old, now in zip(before, with_new, strict=True):
        assert [i for i in now if i < N][:3] == [i for i in old if i != MISSING][:3]
    assert len(made.recommend(history=[["new"]], k=3)[0]) == 3


def test_new_items_that_do_not_fit_are_refused():
    more = Vocabulary([*ITEMS.raw.to_pylist(), "new"])
    with pytest.raises(ConfigError, match="knows items by their ids alone"):
        make(None).add_items(more, VECTORS[:1])
    made = make()
    before = made.retrieve(HISTORIES, N)
    for bad in (VECTORS[:2], VECTORS[:1, :4], VECTORS[:1] * np.nan, np.full((1, C), 1e300), "text"):
        with pytest.raises(DataError, match=r"vectors of new items .*each of 1 items, 6 wide"):
            made.add_items(more, bad)
    with pytest.raises(DataError, match="renumbers old items"):
        made.add_items(Vocabulary(["new", *ITEMS.raw.to_pylist()]), VECTORS[:1])
    np.testing.assert_array_equal(made.retrieve(HISTORIES, N).item, before.item)  # nothing half-done
    made.add_items(more, VECTORS[:1].tolist())
    assert len(made.items) == len(made.vectors()) == N + 1


def test_rows_of_an_item_tower_are_its_table():
    for content in (None, VECTORS):
        tower = ItemTower(N, 4, content)
        at = torch.tensor([[3, 3], [0, 19]])
        user = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(tower.products(user, at), torch.einsum("td,tmd->tm", user, tower(at)))
        assert tower.products(user, at[:, :0]).shape == (2, 0)
        torch.testing.assert_close(tower(at), tower.table()[at])
        torch.testing.assert_close(tower(at, tower.table()), tower.table()[at])


def test_what_a_new_item_has_of_its_own_is_the_mean():
    tower = ItemTower(N, 4, VECTORS)
    mean = tower.own.weight.mean(dim=0)
    for new in VECTORS[:3]:
        tower.add(new[None])
    torch.testing.assert_close(tower.own.weight[N:], mean.expand(3, -1))
    assert (tower.own.weight[N:] == tower.own.weight[N]).all()


def test_hashed_users_share_buckets_and_strangers_have_their_own():
    who = HashedUsers(3, 4).eval()
    found = who(torch.tensor([1, 4, -1, 2]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])
    assert HashedUsers(0, 4)(torch.tensor([1, 2])).shape == (2, 0)


@pytest.mark.parametrize("kind", [TwoTower, Mind])
def test_what_a_stranger_is_to_the_network_is_learned(kind):
    undecayed = dataclasses.replace(FAST, weight_decay=0.0)  # decay moves what learns nothing, too
    made = kind(ITEMS, kind.Config(width=8, users=4, train=undecayed))
    before = made.network.who.vector.weight[4].clone()
    made.fit(circle(40))
    assert not torch.allclose(made.network.who.vector.weight[4], before, atol=1e-3)


def test_saved_with_later_items_and_loaded_it_answers_the_same(tmp_path):
    made = make()
    made.add_items(Vocabulary([*ITEMS.raw.to_pylist(), "new"]), VECTORS[:1])
    made.save(tmp_path / "kept")
    again = ComiRec.load(tmp_path / "kept")
    np.testing.assert_array_equal(again.score(HISTORIES), made.score(HISTORIES))
    assert (again.config, again.items) == (made.config, made.items)


def test_damaged_newer_and_other_folders_are_refused(tmp_path):
    make().save(tmp_path / "kept")
    for name in ("retriever.json", "items.parquet", "network.safetensors"):
        shutil.copytree(tmp_path / "kept", tmp_path / name)
        (tmp_path / name / name).write_bytes(b"{")
        with pytest.raises(BundleDamagedError, match="cannot be read"):
            ComiRec.load(tmp_path / name)
    with pytest.raises(BundleDamagedError, match=r"holds a ComiRec. Mind.load reads its own kind"):
        Mind.load(tmp_path / "kept")
    about = json.loads((tmp_path / "kept" / "retriever.json").read_text())
    (tmp_path / "kept" / "retriever.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BundleVersionError, match="format 99"):
        ComiRec.load(tmp_path / "kept")


def test_bad_settings_and_vectors_are_named():
    for name in ("width", "window", "batch_targets", "negatives"):
        with pytest.raises(ConfigError, match=f"{name} is at least 1"):
            make(**{name: 0})
    with pytest.raises(ConfigError, match="dropout lies in"):
        make(dropout=1.0)
    with pytest.raises(DataError, match=r"item vectors of shape \(3, "):
        make(VECTORS[:3])
    with pytest.raises(DataError, match=f"one finite vector for each of {N} items"):
        make(VECTORS[:, 0])
    with pytest.raises(DataError, match=f"one finite vector for each of {N} items"):
        make(VECTORS * np.inf)


def test_zero_and_duplicate_content_are_no_trouble():
    content = np.repeat(VECTORS[:2], N // 2, axis=0)
    content[0] = 0
    made = make(content).fit(circle(20))
    assert np.isfinite(made.score(HISTORIES)).all()
