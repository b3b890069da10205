"""TIGER as a retriever: answers, new and removed items, files, and a world where content decides."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.split import leave_last_out
from tiglon.data.synthetic import synthetic
from tiglon.errors import BundleDamagedError, BundleVersionError, CapacityError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.retrieval.neighbours import Popularity
from tiglon.retrieval.tiger import Tiger, TigerConfig
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.tiger_paper import PaperConfig
from tiglon.retrieval.windows import WindowBatches, collate, histories_moments, moments
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Candidates, Histories, Interactions, Targets, Vocabulary

torch.set_num_threads(1)

N = 40
SIZES = (5, 4)
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
CODES = np.random.default_rng(0).integers(0, SIZES, (N, 2)).astype(np.int32)
NETWORKS = {
    "causal": CausalConfig(
        width=16, heads=2, head_width=8, hidden=32, encoder_layers=1, decoder_layers=1, distances=8
    ),
    "paper": PaperConfig(width=16, heads=2, head_width=8, hidden=32, encoder_layers=1, decoder_layers=1),
}
FAST = TrainConfig(epochs=2, lr=5e-3, evaluations=2, average=0.9, bfloat16=False)
HISTORIES = Histories.of([[3, 8, 3, 21], [], [N - 1], list(range(30)), [5, 6]])


def ids():
    return SemanticIds.assign(CODES, SIZES, ITEMS)


def config(network="causal", **changes):
    return replace(
        TigerConfig(NETWORKS[network], FAST, window=10, batch_targets=64, beams=N, validation_users=50),
        **changes,
    )


def log(users=30, seed=0):
    """Lives with baskets, and one user without any event."""
    rng = np.random.default_rng(seed)
    return Interactions(
        user=np.repeat(np.arange(users), 9).astype(np.int32),
        item=rng.integers(0, N, 9 * users).astype(np.int32),
        time=np.tile([1, 2, 2, 3, 5, 5, 5, 8, 9], users),
        users=Vocabulary([f"user {u}" for u in range(users + 1)]),
        items=ITEMS,
    )


@pytest.fixture(params=NETWORKS)
def tiger(request):
    """With random weights: what it must promise does not depend on what it learned."""
    return random(Tiger(ids(), ITEMS, config(request.param)))


def random(tiger):
    """At 0, where the weights of what one had begin, a wrong one would not show."""
    if hasattr(tiger.network, "repetition"):
        tiger.network.repetition.weight.data = torch.tensor([0.2, -0.1, 0.1, -0.2, 0.0, 0.3])
    return tiger


@pytest.fixture(scope="module", params=NETWORKS)
def fitted(request):
    split = leave_last_out(log())
    return Tiger(ids(), ITEMS, config(request.param)).fit(split.train, split.validation)


def same(a, b):
    np.testing.assert_array_equal(a.item, b.item)
    np.testing.assert_allclose(a.score, b.score, rtol=1e-5, atol=1e-5)


# -- answers -----------------------------------------------------------------------------------------


def test_probabilities_of_the_whole_catalogue_sum_to_one(tiger):
    found = tiger.retrieve(HISTORIES, N, exclude_seen=False)
    np.testing.assert_array_equal(np.sort(found.item), np.tile(np.arange(N), (len(HISTORIES), 1)))
    np.testing.assert_allclose(np.exp(found.score).sum(axis=1), 1, atol=1e-4)
    masked = random(Tiger(ids(), ITEMS, replace(tiger.config, renormalise=False)))
    total = np.exp(masked.retrieve(HISTORIES, N, exclude_seen=False).score).sum(axis=1)
    assert (total < 0.999).all()


@pytest.mark.parametrize("renormalise", [True, False])
def test_scores_are_the_losses_it_trains_on(tiger, renormalise):
    tiger.config = replace(tiger.config, renormalise=renormalise)
    life = Interactions(
        user=np.zeros(5, np.int32),
        item=np.array([3, 8, 21, 3, 0], np.int32),
        time=np.array([1, 2, 2, 4, 9]),
        users=Vocabulary(["a"]),
        items=ITEMS,
    )
    history = Histories(np.array([0, 4]), life.item[:4].astype(np.int64), life.time[:4])
    found = tiger.retrieve(history, N, exclude_seen=False)
    for item, score in zip(found.item[0], found.score[0], strict=True):
        life.item[4] = item
        with torch.no_grad():
            events = life.item, moments(life), np.ones(5, bool), np.zeros(5, np.int64)
            loss = tiger.loss(collate(*events, np.array([[0, 5, 4]]), 5))
        assert -loss.sum().item() == pytest.approx(score, abs=1e-4)


def test_user_tokens_reach_the_network_in_training_and_in_answers():
    with_users = replace(NETWORKS["paper"], user_tokens=7)
    tiger = Tiger(ids(), ITEMS, replace(config(), model=with_users))
    names = np.array([5, 6, -1, 5])  # two users, a stranger, the first again; all with one history
    histories = replace(Histories.of([[3, 8]] * 4), user=names)
    scores = tiger.retrieve(histories, N, exclude_seen=False).score
    np.testing.assert_allclose(scores[0], scores[3])
    assert np.abs(scores[:1] - scores[1:3]).max(axis=1).min() > 1e-4
    np.testing.assert_allclose(
        tiger.retrieve(Histories.of([[3, 8]]), N, exclude_seen=False).score[0], scores[2], rtol=1e-5
    )

    before = tiger.network.token.weight[-8:-1].detach().clone()
    trained = tiger.fit(leave_last_out(log()).train).network.token.weight[-8:-1]
    assert ((trained - before).abs().amax(dim=1) > 1e-3).all()  # weight decay alone moves less


def test_a_user_alone_is_that_user_in_a_batch(tiger):
    together = tiger.retrieve(HISTORIES, 9)
    for user in range(len(HISTORIES)):
        one = slice(user, user + 1)
        alone = tiger.retrieve(HISTORIES.take(one), 9)
        same(alone, Candidates(together.item[one], together.score[one], "tiger"))


def test_more_users_than_a_batch_come_back_in_their_order(tiger):
    rng = np.random.default_rng(3)
    many = Histories.of([rng.integers(0, N, rng.integers(0, 14)) for _ in range(150)])
    found = tiger.retrieve(many, 5)
    for user in range(0, 150, 17):
        one = slice(user, user + 1)
        same(tiger.retrieve(many.take(one), 5), Candidates(found.item[one], found.score[one], "tiger"))


def test_seen_items_are_left_out_and_the_others_keep_their_scores(tiger):
    every = tiger.retrieve(HISTORIES, N, exclude_seen=False)
    fresh = tiger.retrieve(HISTORIES, N)
    for user, seen in enumerate(HISTORIES):
        kept, there = ~np.isin(every.item[user], seen), fresh.item[user] != MISSING
        np.testing.assert_array_equal(fresh.item[user][there], every.item[user][kept])
        np.testing.assert_allclose(fresh.score[user][there], every.score[user][kept], atol=1e-5)
        assert there.sum() == N - len(set(seen))


def test_only_the_window_is_read(tiger):
    """Older items are known as such, by their odds alone."""
    long = Histories.of([[1, 2, 3, *range(10, 20)]])
    if hasattr(tiger.network, "repetition"):
        assert (
            tiger.retrieve(long, N, exclude_seen=False).score
            != tiger.retrieve(long.last(10), N, exclude_seen=False).score
        ).any()
        tiger.network.repetition.weight.data.zero_()
    same(tiger.retrieve(long, 9, exclude_seen=False), tiger.retrieve(long.last(10), 9, exclude_seen=False))


def test_fewer_items_than_k(tiger):
    found = tiger.retrieve(HISTORIES, 10 * N)
    assert found.item.shape == (len(HISTORIES), N)
    assert ((found.item != MISSING).sum(axis=1) == [N - len(set(h)) for h in HISTORIES]).all()


def test_sampling_follows_the_seed_and_draws_true_items(tiger):
    draw = [tiger.retrieve(HISTORIES, 6, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0].item, draw[1].item)
    assert (draw[0].item != draw[2].item).any()
    for seen, drawn in zip(HISTORIES, draw[2].item, strict=True):
        assert len(set(drawn)) == 6
        assert not np.isin(drawn, seen).any()
    sharp, flat = (tiger.retrieve(HISTORIES, N, exclude_seen=False, temperature=t) for t in (0.2, 5.0))
    assert (sharp.score[:, 0] > flat.score[:, 0]).all()


def test_bad_input_is_told():
    with pytest.raises(DataError, match="39 semantic IDs for 40 items"):
        Tiger(SemanticIds.assign(CODES[:-1], SIZES, ITEMS.raw[:-1].to_pylist()), ITEMS)
    with pytest.raises(ConfigError, match=r"window=0\. window is at least 1"):
        TigerConfig(window=0)


# -- learning ----------------------------------------------------------------------------------------


def test_the_log_must_number_items_as_the_ids_do(tiger):
    other = replace(log(), items=Vocabulary([f"other {i}" for i in range(N)]))
    with pytest.raises(DataError, match=r"a log whose items are not those of this retriever\. Call .*align"):
        tiger.fit(other)


def test_nothing_to_learn_from_is_told(tiger):
    with pytest.raises(DataError, match="a log without any event to predict"):
        tiger.fit(log().take(np.arange(0)))


def test_users_with_one_event_can_be_learned_from():
    one_each = log().take(np.arange(0, 270, 9))
    assert len(Tiger(ids(), ITEMS, config()).fit(one_each).recommend(["user 3"], k=4)[0]) == 4
    with pytest.raises(DataError, match="without any event to predict"):
        Tiger(ids(), ITEMS, config("paper")).fit(one_each)


def test_a_fitted_one_knows_its_users(fitted):
    answer = fitted.recommend(["user 4", "user 30"], k=5)
    assert [len(row) for row in answer] == [5, 5]
    assert all(score <= 0 for row in answer for _, score in row)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    split = leave_last_out(log())
    often = config(train=replace(FAST, checkpoint_minutes=0.0))
    whole = Tiger(ids(), ITEMS, often).fit(split.train, split.validation)
    first, count = Tiger(ids(), ITEMS, often), iter(range(100))

    def loss(batch):
        if next(count) == 5:
            raise KeyboardInterrupt
        return Tiger.loss(first, batch)

    monkeypatch.setattr(first, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        first.fit(split.train, split.validation, directory=tmp_path)
    again = Tiger(ids(), ITEMS, often).fit(split.train, split.validation, directory=tmp_path)
    for (name, a), b in zip(
        whole.network.state_dict().items(), again.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    changed = replace(often, window=7)
    with pytest.raises(ConfigError, match=r"a checkpoint of another training \(window differ"):
        Tiger(ids(), ITEMS, changed).fit(split.train, split.validation, directory=tmp_path)
    with pytest.raises(ConfigError, match=r"a checkpoint of another training \(events differ"):
        Tiger(ids(), ITEMS, often).fit(log(seed=1), split.validation, directory=tmp_path)


def test_events_of_removed_items_are_read_but_not_predicted():
    """An item that left the catalogue still stands in lives; its probability is nobody's to learn."""
    for network in NETWORKS:
        gone = ids().remove([3, 7, *range(20, 26)])
        learned = Tiger(gone, ITEMS, config(network)).fit(log())
        assert np.isfinite([line["loss"] for line in learned.history["history"]]).all()
        found = learned.retrieve(Histories.of([[3, 7, 8]]), N)
        assert not np.isin(found.item, [3, 7]).any()


def test_moments_number_baskets():
    assert moments(log(users=2)).tolist() == [0, 1, 1, 2, 3, 3, 3, 4, 5] * 2
    histories = Histories(np.array([0, 3, 3, 5]), np.arange(5), np.array([4, 4, 9, 9, 9]))
    assert histories_moments(histories).tolist() == [0, 0, 1, 0, 0]
    assert histories_moments(Histories.of([[], []])).tolist() == []


@pytest.mark.parametrize("network", NETWORKS)
def test_every_wanted_event_is_a_target_once_an_epoch(network):
    events, tiger = log(), Tiger(ids(), ITEMS, config(network))
    moment = moments(events)
    offsets = np.array([*range(0, 271, 9), 270])
    windows = tiger.network.windows(offsets, moment, 4)
    epochs = [
        [
            sorted(batch.item[batch.target].tolist())
            for batch in WindowBatches(
                events.item, moment, events.item != 7, events.user, windows, 32, [0, epoch]
            )
        ]
        for epoch in (0, 1, 0)
    ]
    predicted = events.item if network == "causal" else events.item[moment > 0]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == sorted(predicted[predicted != 7].tolist())
        assert max(map(len, epoch)) <= 32 + 4
    assert epochs[0] == epochs[2] != epochs[1]


# -- items that arrive later -------------------------------------------------------------------------

NEW = Vocabulary([*ITEMS.raw.to_pylist(), "new a", "new b", "new c"])
NEW_CODES = np.array([CODES[8], CODES[8], [4, 3]], np.int32)


def test_a_new_item_can_be_recommended_at_once(tiger):
    before, old = tiger.retrieve(HISTORIES, N, exclude_seen=False), tiger.ids.codes.copy()
    tiger.add_items(NEW, NEW_CODES)
    after = tiger.retrieve(HISTORIES, N + 3, exclude_seen=False)
    np.testing.assert_array_equal(np.sort(after.item), np.tile(np.arange(N + 3), (len(HISTORIES), 1)))
    np.testing.assert_allclose(np.exp(after.score).sum(axis=1), 1, atol=1e-4)
    np.testing.assert_array_equal(tiger.ids.codes[:N], old)
    np.testing.assert_array_equal(tiger.ids.codes[N:, :2], NEW_CODES)
    assert tiger.trained.tolist() == [True] * N + [False] * 3
    (row,) = tiger.recommend(history=[["new b", "item 3"]], k=N + 3)
    assert "new a" in [item for item, _ in row]
    assert "new b" not in [item for item, _ in row]
    assert before.item.shape == (len(HISTORIES), N)


def test_a_removed_item_is_never_recommended_and_its_id_stays_its_own(tiger):
    tiger.remove_items(np.array([8, 3]))
    found = tiger.retrieve(HISTORIES, N, exclude_seen=False)
    assert not np.isin(found.item, [3, 8]).any()
    assert ((found.item != MISSING).sum(axis=1) == N - 2).all()
    tiger.add_items(NEW, NEW_CODES)
    assert len({tuple(row) for row in tiger.ids.codes.tolist()}) == N + 3
    found = tiger.retrieve(HISTORIES, N + 3, exclude_seen=False)
    assert not np.isin(found.item, [3, 8]).any()
    assert ((found.item != MISSING).sum(axis=1) == N + 1).all()


def test_added_and_removed_items_survive_saving(tiger, tmp_path):
    tiger.add_items(NEW, NEW_CODES)
    tiger.remove_items(np.array([N, 4]))
    tiger.save(tmp_path / "kept")
    again = Tiger.load(tmp_path / "kept")
    same(again.retrieve(HISTORIES, N + 3), tiger.retrieve(HISTORIES, N + 3))
    np.testing.assert_array_equal(again.trained, tiger.trained)


def test_a_bad_new_vocabulary_or_code_is_told(tiger):
    with pytest.raises(DataError, match=r"a vocabulary that renumbers old items\. New items come after"):
        tiger.add_items(Vocabulary(["new", *ITEMS.raw.to_pylist()]), NEW_CODES[:1])
    with pytest.raises(DataError, match="at position 0"):
        tiger.add_items(NEW, np.array([[5, 0]] * 3))
    small = Tiger(SemanticIds.assign(CODES, SIZES, ITEMS, 8), ITEMS, config())
    many = Vocabulary([*ITEMS.raw.to_pylist(), *(f"more {i}" for i in range(9))])
    with pytest.raises(CapacityError):
        small.add_items(many, np.repeat(NEW_CODES[:1], 9, axis=0))
    assert len(small.items) == len(small.ids) == N  # nothing half-done


def test_vectors_that_do_not_fit_new_items_change_nothing():
    knows = Tiger(ids(), ITEMS, config(), vectors=np.random.default_rng(0).normal(size=(N, 9)))
    before, vectors = knows.retrieve(HISTORIES, N, exclude_seen=False), np.ones((3, 9), np.float32)
    for bad in (vectors[:, :4], vectors[:2], vectors * np.nan, np.full((3, 9), 1e300)):
        with pytest.raises(DataError, match=r"vectors of new items .*each of 3 items, 9 wide"):
            knows.add_items(NEW, NEW_CODES, bad)
    assert len(knows.items) == len(knows.ids) == len(knows.trie) == N
    same(knows.retrieve(HISTORIES, N, exclude_seen=False), before)
    knows.add_items(NEW, NEW_CODES, vectors)
    assert (knows.retrieve(HISTORIES, N + 3, exclude_seen=False).item != MISSING).all()


def test_items_of_another_catalogue_are_told(tiger):
    for strange in ([N], [-1]):
        with pytest.raises(DataError, match=r"a dense item outside 0 … 39"):
            tiger.retrieve(Histories.of([strange]), 5)


# -- the paper's rule for new items ------------------------------------------------------------------


def unseen_truth(rng):
    """An old list for 12 users, a world with six new items, and truths among old and new ones."""
    tiger = Tiger(ids(), ITEMS, config())
    histories = Histories.of([rng.integers(0, N, 5) for _ in range(12)])
    found = tiger.retrieve(histories, 10)
    everything = Vocabulary([*ITEMS.raw.to_pylist(), *(f"new {i}" for i in range(6))])
    tiger.add_items(everything, CODES[rng.integers(0, N, 6)])
    return tiger, found, rng.integers(0, N + 6, 12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_new_items_join_after_the_item_whose_codes_they_share(seed):
    tiger, found, truth = unseen_truth(np.random.default_rng(seed))
    same(tiger.with_unseen(found, 0.0), found)
    hits = []
    for share in (0.0, 0.1, 0.2, 0.5, 1.0):
        joined = tiger.with_unseen(found, share)
        new = joined.item >= N
        assert (new.sum(axis=1) <= np.floor(share * 10 + 1e-9)).all()
        hits.append(((joined.item == truth[:, None]) & new).any(axis=1).sum())
        for row, old_row in zip(joined.item, found.item, strict=True):
            old = row[row < N]
            np.testing.assert_array_equal(old, old_row[: len(old)])  # the others keep their order
            for at in np.flatnonzero(row >= N):
                host = row[:at][row[:at] < N][-1]
                np.testing.assert_array_equal(tiger.ids.codes[row[at], :-1], tiger.ids.codes[host, :-1])
    assert hits[0] == 0
    assert hits == sorted(hits)


def test_removed_new_items_do_not_join_and_late_ones_are_dropped():
    tiger, found, _ = unseen_truth(np.random.default_rng(0))
    assert (tiger.with_unseen(found, 1.0).item >= N).any()
    tiger.remove_items(np.arange(N, N + 6))
    same(tiger.with_unseen(found, 1.0), found)
    tiger, _, _ = unseen_truth(np.random.default_rng(0))
    updated = tiger.retrieve(HISTORIES, N + 6, exclude_seen=False)
    assert (tiger.with_unseen(updated, 0.0).item < N).all()


def test_new_items_that_a_user_had_do_not_join():
    tiger, found, _ = unseen_truth(np.random.default_rng(0))
    joined = tiger.with_unseen(found, 1.0).item
    user, place = np.argwhere(joined >= N)[0]
    gone = int(joined[user, place])
    had = Histories.of([np.array([0, gone] if b == user else [0]) for b in range(len(joined))])
    without = tiger.with_unseen(found, 1.0, had).item
    assert gone not in without[user]
    assert set(joined[user][joined[user] >= N]) - {gone} <= set(without[user])
    np.testing.assert_array_equal(np.delete(without, user, 0), np.delete(joined, user, 0))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_bad_share_is_told(tiger, share):
    with pytest.raises(ConfigError, match=rf"a share of {share}\. A share lies in 0 … 1"):
        tiger.with_unseen(tiger.retrieve(HISTORIES, 3), share)


# -- files -------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_answers_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "kept")
    again = Tiger.load(tmp_path / "kept")
    assert again.config == fitted.config
    before, after = fitted.retrieve(HISTORIES, 9), again.retrieve(HISTORIES, 9)
    np.testing.assert_array_equal(after.item, before.item)
    np.testing.assert_array_equal(after.score, before.score)


@pytest.mark.parametrize(
    "name", ["retriever.json", "items.parquet", "ids.safetensors", "network.safetensors"]
)
def test_a_damaged_or_missing_file_is_told(tmp_path, name):
    Tiger(ids(), ITEMS, config()).save(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "cut")
    (tmp_path / "kept" / name).unlink()
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes()[:-9])
    for folder in ("kept", "cut"):
        with pytest.raises(BundleDamagedError):
            Tiger.load(tmp_path / folder)


def test_a_newer_format_is_told(tmp_path):
    Tiger(ids(), ITEMS, config()).save(tmp_path / "kept")
    path = tmp_path / "kept" / "retriever.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(BundleVersionError, match=r"a retriever of format 3 .* reads formats up to 2"):
        Tiger.load(tmp_path / "kept")


# -- worlds whose answers are known ------------------------------------------------------------------


@pytest.mark.parametrize("again", [0.0, 0.5])
def test_it_learns_whether_people_come_back(again):
    """Items say nothing; what was had is never had again, or every second event is the last one's item."""
    rng = np.random.default_rng(0)
    lives = np.array([rng.permutation(N)[:8] for _ in range(200)])
    for at in range(1, 8):
        repeat = rng.random(200) < again
        lives[repeat, at] = lives[repeat, at - 1]
    users = Vocabulary([f"user {u}" for u in range(200)])
    events = (
        np.repeat(np.arange(200), 8).astype(np.int32),
        lives.ravel().astype(np.int32),
        np.tile(np.arange(8), 200),
    )
    quick = TrainConfig(epochs=10, lr=1e-2, average=0.9, bfloat16=False)
    learned = Tiger(ids(), ITEMS, config(train=quick)).fit(Interactions(*events, users, ITEMS))
    asked = Histories.of(lives[:100].tolist())
    found = learned.retrieve(asked, N, exclude_seen=False)
    last = np.exp(found.score[found.item == lives[:100, -1:]]).mean()
    had = [np.exp(found.score[u][np.isin(found.item[u], lives[u])]).sum() for u in range(100)]
    if again:
        assert last == pytest.approx(0.5, abs=0.1)
    else:
        assert np.mean(had) < 0.05  # of .2 that chance gives them


def recall(split, items, codes):
    settings = TigerConfig(
        CausalConfig(
            width=32,
            heads=2,
            head_width=16,
            hidden=64,
            encoder_layers=1,
            decoder_layers=1,
            dropout=0.1,
            distances=8,
        ),
        TrainConfig(epochs=8, lr=5e-3, evaluations=2, average=0.9, bfloat16=False),
        window=20,
        batch_targets=256,
        beams=10,
    )
    tiger = Tiger(SemanticIds.assign(codes, (12, 10), items), items, settings)
    tiger.fit(split.train, split.validation)
    return measured(tiger, split.test)


def measured(retriever, test: Targets):
    return evaluate(retriever, test, ks=(10,), exclude_seen=False).metrics["recall@10"]


def test_content_helps_where_it_matters_and_shuffled_content_does_not():
    """Users stay with clusters; the first code is the cluster, so one click tells of 9 other items.

    The last line is a detector of leaks: IDs from the contents of other items must be worth no more
    than random ones.
    """
    world = synthetic(250, 120, 8, seed=0, clusters=12, repeat=0.0, zipf=0.3)
    source = world.source()
    events, items, _ = align(read_interactions(source.interactions), read_items(source.items))
    split = leave_last_out(events)
    rng = np.random.default_rng(0)
    second = rng.integers(0, 10, 120)
    content = recall(split, items.vocabulary, np.stack([world.cluster, second], axis=1))
    random = recall(split, items.vocabulary, np.stack([rng.integers(0, 12, 120), second], axis=1))
    shuffled = recall(split, items.vocabulary, np.stack([rng.permutation(world.cluster), second], axis=1))
    popular = measured(Popularity().fit(split.train, items), split.test)
    assert content > 1.5 * random
    assert content > 1.5 * popular
    assert content > 1.5 * shuffled
    assert shuffled < 1.5 * random
