"""EAGER: two streams that share an encoder; tasks that teach and never answer; answers merged by confidence."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiglon.data.split import leave_last_out
from tiglon.errors import BundleDamagedError, BundleVersionError, CapacityError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.nn.transformer import PADDING
from tiglon.retrieval.eager import ALIKE, Eager, EagerConfig, behaviour_vectors, eager_ids
from tiglon.retrieval.eager_network import Transfer, info_nce, replaced, smooth_l1
from tiglon.retrieval.sasrec import SasRecConfig
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.windows import Batch
from tiglon.train.loop import TrainConfig
from tiglon.types import MISSING, Histories, Interactions, Vocabulary

torch.set_num_threads(1)

N = 24
BOTH = ("behaviour", "semantic")
ITEMS = Vocabulary([f"item {i}" for i in range(N)])
VECTORS = {
    "behaviour": np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32),
    "semantic": np.random.default_rng(1).normal(size=(N, 9)).astype(np.float32),
}
MODEL = CausalConfig(
    width=16, heads=2, head_width=8, hidden=32, encoder_layers=1, decoder_layers=2, distances=8, pairs=0
)
FAST = TrainConfig(epochs=2, lr=5e-3, evaluations=2, average=0.9, bfloat16=False)
TINY = EagerConfig(MODEL, FAST, branches=6, window=10, batch_targets=64, beams=N, task_share=1.0)
LIVES = [
    [(3, 0), (1, 1), (4, 2), (1, 3), (5, 4)],
    [(9, 0), (2, 0), (6, 1), (5, 2), (3, 2), (8, 3)],
    [(7, 0)],
]
HISTORIES = Histories.of([[3, 8, 3, 21], [], [N - 1], list(range(18)), [5, 6]])
SWITCHES = {
    "whole": {},
    "pairs": {"model": replace(MODEL, pairs=10_000)},
    "info-nce": {"contrast_loss": "info-nce"},
    "without contrast": {"contrast": 0.0},
    "without transfer": {"transfer": 0.0},
    "without tasks": {"contrast": 0.0, "transfer": 0.0},
    "behaviour alone": {"streams": ("behaviour",)},
    "semantic alone": {"streams": ("semantic",)},
}


def eager(items=ITEMS, vectors=VECTORS, **changes):
    """With random biases: at 0, where they begin, a wrong one would not show."""
    config = replace(TINY, **changes)
    made = Eager(eager_ids(vectors, items, config), items, config, vectors)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in made.network.named_parameters():
            if "bias" in name:
                p.normal_()
        for stream in made.network.streams.values():
            stream.prefixes.own.weight[1:].normal_(std=0.5)
            stream.prefixes.forget()
    return made


def batch(lives, width=None):
    width = width or max(map(len, lives))
    item, moment = torch.zeros(len(lives), width, dtype=torch.int64), torch.full((len(lives), width), PADDING)
    for row, life in enumerate(lives):
        for at, (i, m) in enumerate(life):
            item[row, at], moment[row, at] = i, m
    return Batch(item, moment, moment < PADDING, torch.zeros(len(lives), dtype=torch.int64))


def log(users=30):
    rng = np.random.default_rng(0)
    return Interactions(
        user=np.repeat(np.arange(users), 9).astype(np.int32),
        item=rng.integers(0, N, 9 * users).astype(np.int32),
        time=np.tile([1, 2, 2, 3, 5, 5, 5, 8, 9], users),
        users=Vocabulary([f"user {u}" for u in range(users)]),
        items=ITEMS,
    )


def gradients(made, loss):
    made.network.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}


# -- codes -------------------------------------------------------------------------------------------


def test_every_item_decodes_back_from_both_codes_and_the_codes_differ():
    made = eager()
    for system in made.systems.values():
        leaves = system.trie.find(system.ids.codes)
        np.testing.assert_array_equal(system.trie.item(leaves), np.arange(N))
    first, second = (system.ids.codes for system in made.systems.values())
    assert (first != second).any()


def test_allowed_codes_are_those_of_items_with_the_same_prefix():
    system = eager().systems["semantic"]
    codes, items = system.ids.codes, np.array([3, 17, 3])
    for depth, mask in enumerate(system.allowed(torch.from_numpy(items))):
        for row, item in enumerate(items):
            same = (codes[:, :depth] == codes[item, :depth]).all(axis=1)
            np.testing.assert_array_equal(np.flatnonzero(mask[row]), np.unique(codes[same, depth]))


# -- one pass, two streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["whole", "pairs", "behaviour alone"])
@torch.no_grad()
def test_each_targets_loss_is_that_of_its_prefix_alone(switch):
    made = eager(**{"transfer": 0.0} | SWITCHES[switch])  # the transfer draws what it hides
    together = made.losses(batch(LIVES, width=9))
    for name, losses in together.items():
        for life, found in zip(LIVES, losses.split([len(life) for life in LIVES]), strict=True):
            for at, (item, moment) in enumerate(life):
                alone = batch([[event for event in life if event[1] < moment] + [(item, moment)]])
                alone.target[0, :-1] = False
                torch.testing.assert_close(found[at], made.losses(alone)[name][0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tasks_of_some_rows_have_the_mean_of_all():
    """The codes' losses stay; a task's are those of the drawn rows, and their mean is that of the drawn."""
    whole, some, lives = eager(), eager(task_share=0.5), batch(LIVES)
    owner = lives.target.nonzero()[:, 0]
    every = whole.losses(lives)
    T, drawn_often = len(owner), set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = some.losses(lives)
        for name in BOTH:
            assert torch.equal(found[name], every[name])
        there = found["contrast"] != 0
        drawn = owner[there].unique().tolist()
        drawn_often.update(drawn)
        assert len(drawn) == round(len(LIVES) / 2)
        assert torch.equal(there, torch.isin(owner, torch.tensor(drawn)))
        torch.testing.assert_close(
            found["contrast"][there], every["contrast"][there] * (T / int(there.sum()))
        )
        assert torch.equal(found["transfer"] != 0, there)
    assert drawn_often == set(range(len(LIVES)))
    with pytest.raises(ConfigError, match=r"task_share=0\. It lies in 0 … 1"):
        EagerConfig(task_share=0)


@torch.no_grad()
def test_the_summary_token_does_not_move_a_bit_of_the_codes():
    made, lives = eager(), batch(LIVES)
    given = made.losses(lives)
    made.network.tasks = None
    without = made.losses(lives)
    assert without.keys() == set(BOTH)
    for name in BOTH:
        assert torch.equal(given[name], without[name])
    torch.testing.assert_close(made.loss(lives), without["behaviour"] + without["semantic"])


@torch.no_grad()
def test_the_summary_reads_history_and_every_code():
    made = eager()

    def summary(life, codes_of_target):
        rows = batch([life])
        name = "semantic"
        codes = {n: s.codes[rows.item].clone() for n, s in made.systems.items()}
        codes[name][0, -1] = codes_of_target
        embedded = {n: made.network.streams[n].embed(rows) for n, rows in codes.items()}
        memory = made.network.encode(embedded, rows.moment)[name]
        stream, said = made.network.streams[name], embedded[name]
        _, past = stream.states(memory, said[:, :, :-1], rows.moment)
        return made.network.tasks.summaries[name](stream, memory, past, said, rows.moment)[0, -1]

    codes = made.systems["semantic"].codes[5]
    first = summary(LIVES[0], codes)
    for s in range(len(codes)):
        other = codes.clone()
        other[s] = (other[s] + 1) % made.systems["semantic"].ids.sizes[s]
        assert (summary(LIVES[0], other) - first).abs().max() > 1e-3
    assert (summary([(8, 0), *LIVES[0][1:]], codes) - first).abs().max() > 1e-3


def test_the_encoder_learns_from_both_streams():
    made = eager(contrast=0.0, transfer=0.0)
    lives = batch(LIVES)
    parts = [gradients(made, made.losses(lives)[name].sum()) for name in BOTH]
    whole = gradients(made, made.loss(lives).sum())
    shared = [name for name in whole if not name.startswith("streams.")]
    assert shared
    for name in shared:
        torch.testing.assert_close(whole[name], parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-5)
        assert min(part[name].abs().max() for part in parts) > 0
    own = "streams.semantic.decoder.0.self_attention.q.weight"
    assert own in whole
    assert own not in parts[0]


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_are_finite_and_reach_every_parameter(switch, bfloat16):
    made = eager(**SWITCHES[switch])
    made.network.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = made.loss(batch(LIVES * 3, width=8))
    assert loss.shape == (3 * sum(map(len, LIVES)),)
    found = gradients(made, loss.mean())
    unread = ["tasks.summaries."] if switch == "without contrast" else []  # they only guide
    if switch == "pairs":  # one input sees itself alone
        unread += [f"streams.{name}.bias_self" for name in BOTH]
    for name, p in made.network.named_parameters():
        if not any(part in name for part in unread):
            assert name in found, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.abs().max() > 0, name


# -- tasks -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_total_weighs_each_task():
    lives, weights = batch(LIVES), {"contrast": 0.5, "transfer": 3.0}
    plain, weighted = eager(), eager(**weights)
    torch.manual_seed(0)  # what is hidden is drawn
    parts = plain.losses(lives)
    torch.manual_seed(0)
    total = weighted.loss(lives)
    expected = sum(weights.get(name, 1.0) * part for name, part in parts.items())
    assert parts.keys() == {*BOTH, *weights}
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("contrast_loss", ["smooth-l1", "info-nce"])
@torch.no_grad()
def test_summaries_are_pulled_towards_the_next_item(contrast_loss):
    """To its centred vector, of length √C; InfoNCE sets it against drawn items, without those that are itself."""
    made, guesses = eager(contrast_loss=contrast_loss), {}
    targets = [item for life in LIVES for item, _ in life]
    for name, summary in made.network.tasks.summaries.items():
        summary.project.register_forward_hook(
            lambda _, given, guess, name=name: guesses.update({name: guess.numpy()})
        )
    torch.manual_seed(0)
    drawn = torch.randint(N, (256,)).tolist()
    torch.manual_seed(0)
    found = made.losses(batch(LIVES))["contrast"]
    expected = np.zeros(len(found))
    for name, rows in VECTORS.items():
        rows = rows - rows.mean(axis=0)
        rows *= rows.shape[1] ** 0.5 / np.linalg.norm(rows, axis=1, keepdims=True)
        for at, item in enumerate(targets):
            guess = guesses[name][at]
            if contrast_loss == "smooth-l1":
                gap = np.abs(guess - rows[item])
                expected[at] += np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            else:
                cosine = rows @ guess / np.linalg.norm(rows, axis=1) / np.linalg.norm(guess)
                e = np.exp(cosine / 0.3)
                expected[at] -= np.log(e[item] / (e[item] + sum(e[i] for i in drawn if i != item)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@torch.no_grad()
def test_the_transfer_rebuilds_hidden_codes_and_tells_true_ones_from_replaced():
    """The decoder reads codes with some hidden, then true and replaced ones; the loss is that of what it reads."""
    made, read = eager(), []
    stream, transfer = made.network.streams["behaviour"], made.network.tasks.transfer
    codes = made.systems["behaviour"].codes.repeat(3, 1)
    T, S = codes.shape
    torch.manual_seed(0)
    guide = torch.randn(T, MODEL.width)
    hook = transfer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    found = transfer.loss(stream, codes, guide)
    hook.remove()
    covered, shown = read
    tables = [stream.code_vectors(s) for s in range(S)]
    true = torch.stack([tables[s][codes[:, s]] * MODEL.width**0.5 for s in range(S)], dim=1)

    hidden = (covered == transfer.hidden).all(dim=2)
    assert abs(hidden.float().mean() - 0.5) < 0.15
    assert torch.equal(covered[~hidden], true[~hidden])
    assert torch.equal(shown[:T], true)
    assert (shown[T:] != true).flatten(1).any(dim=1).all()
    states = transfer(covered, guide)[:, 1:]
    is_true = transfer.recognise(transfer(shown, guide.repeat(2, 1))[:, 0])[:, 0].sigmoid()
    for t in range(T):
        expected = -is_true[t].log() - (1 - is_true[T + t]).log()
        for s in range(S):
            if hidden[t, s]:
                expected -= (tables[s] @ states[t, s]).softmax(dim=0)[codes[t, s]].log()
        torch.testing.assert_close(found[t], expected, rtol=1e-4, atol=1e-5)


def test_the_transfer_teaches_behaviour_and_leaves_semantics_alone():
    made = eager()
    found = gradients(made, made.losses(batch(LIVES))["transfer"].sum())
    reached = {name for name, grad in found.items() if grad.abs().max() > 0}
    assert all(name.startswith(("streams.behaviour.prefixes.", "tasks.transfer.")) for name in reached)
    assert "streams.behaviour.prefixes.own.weight" in reached


def test_the_transfers_decoder_looks_both_ways():
    torch.manual_seed(0)
    stream = eager().network.streams["behaviour"]
    transfer = Transfer(stream)
    x, guide = torch.randn(3, 2, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    for position in range(3):
        (x_grad, guide_grad) = torch.autograd.grad(transfer(x, guide)[:, position].sum(), (x, guide))
        assert (x_grad.abs().amax(dim=2) > 0).all()
        assert (guide_grad.abs().amax(dim=1) > 0).all()


def test_some_code_is_always_replaced_and_by_another():
    torch.manual_seed(0)
    sizes = (5, 1, 2)
    codes = torch.stack([torch.randint(size, (4000,)) for size in sizes], dim=1)
    other = replaced(codes, sizes)
    changed = other != codes
    assert changed.any(dim=1).all()
    assert not changed[:, 1].any()
    assert ((other >= 0) & (other < torch.tensor(sizes))).all()
    share = changed.float().mean(dim=0)
    assert (share[[0, 2]] - 0.625).abs().max() < 0.03  # a half, and a quarter of the quarter where none was
    steps = (other - codes)[changed[:, 0], 0] % 5
    assert torch.bincount(steps, minlength=5)[1:].min() > 0.2 * len(steps)
    assert torch.equal(replaced(codes[:, [1]], (1,)), codes[:, [1]])  # nothing else to put there


def test_the_distances_are_their_definitions():
    rng = np.random.default_rng(0)
    guess, wanted = (rng.normal(size=(4, 3)) * 2 for _ in range(2))
    gap = np.abs(guess - wanted)
    expected = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(axis=1)
    found = smooth_l1(torch.from_numpy(guess), torch.from_numpy(wanted))
    np.testing.assert_allclose(found, expected)

    drawn, same = rng.normal(size=(5, 3)), rng.random((4, 5)) < 0.3
    same[3] = True
    found = info_nce(*map(torch.from_numpy, (guess, wanted, drawn, same)))
    for row in range(4):

        def e(other, row=row):
            return np.exp(guess[row] @ other / np.linalg.norm(guess[row]) / np.linalg.norm(other) / 0.3)

        others = sum(e(other) for other, hit in zip(drawn, same[row], strict=True) if not hit)
        expected = -np.log(e(wanted[row]) / (e(wanted[row]) + others))
        assert found[row].item() == pytest.approx(expected, abs=1e-9)
    assert found[3].item() == pytest.approx(0)  # nothing but the target was drawn


# -- answers -----------------------------------------------------------------------------------------


def log_p(made, life, items=range(N)):
    """By stream (N,) log p of each item as the next event, by teacher forcing."""
    made.network.tasks = None
    past = [(item, moment) for moment, item in enumerate(life)]
    rows = batch([[*past, (item, len(life))] for item in items])
    rows.target[:, :-1] = False
    with torch.no_grad():
        return {name: -loss.numpy() for name, loss in made.losses(rows).items()}


@pytest.mark.parametrize("switch", ["whole", "pairs", "behaviour alone"])
@pytest.mark.parametrize("ranking", ["own", "both"])
def test_scores_are_confidences_as_documented(ranking, switch):
    made = eager(ranking=ranking, **SWITCHES[switch])
    found = made.retrieve(HISTORIES, N, exclude_seen=False)
    for row, life in enumerate(HISTORIES):
        parts = np.stack(list(log_p(made, life[-10:].tolist()).values()))
        np.testing.assert_allclose(np.exp(parts).sum(axis=1), 1, atol=1e-4)
        expected = parts.max(axis=0) if ranking == "own" else parts.sum(axis=0)
        np.testing.assert_array_equal(np.sort(found.item[row]), np.arange(N))
        np.testing.assert_allclose(found.score[row], expected[found.item[row]], atol=1e-4)


@pytest.mark.parametrize("ranking", ["own", "both"])
def test_narrow_beams_rank_what_either_of_them_found(ranking):
    """By scores of all items: a beam of 6 keeps all 6 clusters, and then the 6 best of the unseen items."""
    made = eager(ranking=ranking, beams=6)
    found = made.retrieve(HISTORIES, 6)
    times = set()  # in how many beams an answer is
    for row, life in enumerate(HISTORIES):
        parts = list(log_p(made, life[-10:].tolist()).values())
        unseen = sorted(set(range(N)) - set(life.tolist()))
        beams = [sorted(unseen, key=lambda item, part=part: -part[item])[:6] for part in parts]
        score = {}
        for item in {*beams[0], *beams[1]}:
            if ranking == "own":
                score[item] = max(part[item] for part, beam in zip(parts, beams, strict=True) if item in beam)
            else:
                score[item] = parts[0][item] + parts[1][item]
        best = sorted(score, key=lambda item: -score[item])[:6]
        assert found.item[row].tolist() == best
        np.testing.assert_allclose(found.score[row], [score[item] for item in best], atol=1e-4)
        times.update(sum(item in beam for beam in beams) for item in best)
    assert times == {1, 2}


def test_three_levels_of_codes_decode_as_they_are_trained():
    made = eager(branches=3, contrast=0.0)
    assert len(made.systems["semantic"].ids.sizes) == 3
    found = made.retrieve(HISTORIES.take([0]), N, exclude_seen=False)
    expected = sum(log_p(made, [3, 8, 3, 21]).values())
    np.testing.assert_allclose(found.score[0], expected[found.item[0]], atol=1e-4)


@torch.no_grad()
def test_without_the_tasks_the_answers_are_the_same():
    made = eager()
    before = made.retrieve(HISTORIES, 9)
    made.network.tasks = None
    after = made.retrieve(HISTORIES, 9)
    np.testing.assert_array_equal(after.item, before.item)
    np.testing.assert_array_equal(after.score, before.score)


def test_similar_items_are_alike_and_not_itself():
    vectors = {name: rows.copy() for name, rows in VECTORS.items()}
    for rows in vectors.values():
        rows[7] = rows[4] + 0.01
    config = replace(TINY)
    made = Eager(eager_ids(vectors, ITEMS, config), ITEMS, config, vectors)  # untrained, but content speaks
    found = made.alike(np.array([4, 7]), 5)
    assert found.item.shape == (2, 5)
    assert found.item[:, 0].tolist() == [7, 4]
    assert 4 not in found.item[0]


# -- learning ----------------------------------------------------------------------------------------


def cycles(users=120, seed=0):
    """Lives that count upwards: what follows what is certain."""
    lives = (np.random.default_rng(seed).integers(0, N, (users, 1)) + np.arange(8)) % N
    return Interactions(
        user=np.repeat(np.arange(users), 8).astype(np.int32),
        item=lives.ravel().astype(np.int32),
        time=np.tile(np.arange(8), users),
        users=Vocabulary([f"u{i}" for i in range(users)]),
        items=ITEMS,
    )


def test_it_learns_what_follows_what():
    split = leave_last_out(cycles())
    made = eager(
        train=TrainConfig(epochs=16, lr=2e-2, evaluations=1, average=0.9, bfloat16=False),
        model=replace(MODEL, decoder_layers=1, dropout=0.1),
        batch_targets=240,
        beams=6,
    )
    lives = batch([[(i, i) for i in range(9)]] * 10)  # what is hidden is drawn
    before = made.losses(lives)
    made.fit(split.train, split.validation)
    for ranking in ("own", "both"):
        made.config = replace(made.config, ranking=ranking)
        assert evaluate(made, split.test, ks=(1,), exclude_seen=False).metrics["recall@1"] > 0.95
    after = made.losses(lives)
    for name in ("contrast", "transfer"):
        assert after[name].mean() < 0.8 * before[name].mean()


def test_a_killed_run_goes_on_to_the_same_answers(tmp_path):
    split = leave_last_out(log())
    whole = eager().fit(split.train, split.validation)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.epoch == 1:
            raise Killed

    often = replace(FAST, checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        eager(train=often).fit(split.train, split.validation, directory=tmp_path, report=kill)
    again = eager(train=often).fit(split.train, split.validation, directory=tmp_path)
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, msg=name)


def test_behaviour_vectors_say_who_is_used_together():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, 80)
    lives = groups[:, None] + 4 * rng.integers(0, N // 4, (80, 8))
    events = replace(cycles(80), item=lives.ravel().astype(np.int32))
    config = SasRecConfig(
        width=16,
        heads=2,
        hidden=32,
        layers=1,
        train=TrainConfig(epochs=15, lr=1e-2, evaluations=1, average=0.9, bfloat16=False),
    )
    vectors = behaviour_vectors(events, config)
    assert vectors.shape == (N, 16)
    unused = events.item < 4
    some = replace(events.take(~unused), users=events.users)
    text = np.random.default_rng(1).normal(size=(N, 6)).astype(np.float32)
    found = behaviour_vectors(some, config, text=text)
    known = text[4:] - text[4:].mean(axis=0)
    for item in range(4):
        own = text[item] - text[4:].mean(axis=0)
        alike = np.argsort(-known @ own / np.linalg.norm(known, axis=1))[:ALIKE]
        np.testing.assert_allclose(found[item], found[4 + alike].mean(axis=0), rtol=1e-4, atol=1e-5)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    together = (np.arange(N)[:, None] - np.arange(N)) % 4 == 0
    np.fill_diagonal(together, False)
    cosine = vectors @ vectors.T
    assert cosine[together].mean() > 0.15 + cosine[~together & ~np.eye(N, dtype=bool)].mean()


def steps(users=160, per_kind=8, kinds=10, seed=0):
    """Items of ten kinds; a life goes on from kind to kind, to whatever item. And vectors that know the kinds."""
    rng = np.random.default_rng(seed)
    lives = (rng.integers(0, kinds, (users, 1)) + np.arange(6)) % kinds
    lives = lives + kinds * rng.integers(0, per_kind, lives.shape)
    n = per_kind * kinds
    items = Vocabulary([f"item {i}" for i in range(n)])
    events = Interactions(
        user=np.repeat(np.arange(users), 6).astype(np.int32),
        item=lives.ravel().astype(np.int32),
        time=np.tile(np.arange(6), users),
        users=Vocabulary([f"u{i}" for i in range(users)]),
        items=items,
    )
    kind = 3 * rng.normal(size=(2, kinds, 8))[:, np.arange(n) % kinds]
    informed = (kind + rng.normal(size=kind.shape)).astype(np.float32)
    return events, dict(zip(BOTH, informed, strict=True))


def test_noise_as_semantics_hurts_the_semantic_stream_alone():
    """By each stream's own −log p of the test's items, where log 8 = 2.1 is the best there is."""
    events, vectors = steps()
    split = leave_last_out(events)
    noise = np.random.default_rng(9).normal(size=vectors["semantic"].shape).astype(np.float32)
    config = replace(
        TINY,
        model=replace(MODEL, decoder_layers=1, dropout=0.1),
        train=replace(FAST, epochs=12, lr=2e-2, evaluations=1),
        branches=10,
        batch_targets=240,
    )

    def missed(given):
        made = Eager(eager_ids(given, events.items, config), events.items, config, given).fit(split.train)
        made.network.tasks = None
        past, truth = split.test.histories, split.test.truth.item
        rows = batch(
            [[*zip(life, range(9), strict=False), (i, 9)] for life, i in zip(past, truth, strict=True)]
        )
        rows.target[:, :-1] = False
        with torch.no_grad():
            return {name: loss.mean().item() for name, loss in made.losses(rows).items()}

    told, mistold = missed(vectors), missed(vectors | {"semantic": noise})
    assert mistold["semantic"] > told["semantic"] + 0.5
    assert abs(mistold["behaviour"] - told["behaviour"]) < 0.15


# -- items that arrive later -----------------------------------------------------------------------------

NEW = Vocabulary([*ITEMS.raw.to_pylist(), "twin of 7", "other", "twin of 7 again"])
NEW_VECTORS = VECTORS["semantic"][[7, 2, 7]] * [[1], [-1], [1]]


@pytest.mark.parametrize("switch", ["whole", "pairs", "semantic alone", "three levels"])
def test_new_items_are_recommended_at_once_and_no_code_moves(switch):
    made = eager(**SWITCHES.get(switch, {"branches": 3}))
    before, codes = log_p(made, [3, 8]), {n: s.ids.codes for n, s in made.systems.items()}
    made.add_items(NEW, NEW_VECTORS)
    for name, system in made.systems.items():
        np.testing.assert_array_equal(system.ids.codes[:N], codes[name])
        for row in system.ids.codes[N:]:
            assert (codes[name][:, :-1] == row[:-1]).all(axis=1).any()  # in a cluster that was there
    found = made.retrieve(HISTORIES, N + 3, exclude_seen=False)
    np.testing.assert_array_equal(np.sort(found.item), np.tile(np.arange(N + 3), (len(HISTORIES), 1)))
    assert np.isfinite(found.score).all()
    after = log_p(made, [3, 8], range(N + 3))
    for name in before:
        assert np.exp(after[name]).sum() == pytest.approx(1, abs=1e-4)
        assert (after[name][:N] <= before[name] + 1e-4).all()  # they give some of theirs to the new
    (row,) = made.recommend(history=[["item 3", "twin of 7"]], k=N + 3)
    assert "other" in [item for item, _ in row]
    assert "twin of 7" not in [item for item, _ in row]


@pytest.mark.parametrize("ranking", ["both", "own"])
def test_removed_items_are_never_recommended_and_their_codes_stay_theirs(ranking, tmp_path):
    made = eager(ranking=ranking)
    gone = [3, 8, N - 1]
    made.remove_items(np.array(gone))
    made.add_items(NEW, NEW_VECTORS)
    assert made.alive.tolist() == [i not in gone for i in range(N + 3)]
    for system in made.systems.values():
        assert len({tuple(row) for row in system.ids.codes.tolist()}) == N + 3
    for hide in (True, False):
        found = made.retrieve(HISTORIES, N + 3, exclude_seen=hide)
        for row, life in zip(
            found.item, (HISTORIES.take(slice(b, b + 1)) for b in range(len(HISTORIES))), strict=True
        ):
            left = set(range(N + 3)) - set(gone) - (set(life.item.tolist()) if hide else set())
            assert sorted(row[row != MISSING]) == sorted(left)
    assert not np.isin(made.alike(np.array([4]), N).item, gone).any()
    made.save(tmp_path / "kept")
    np.testing.assert_array_equal(
        Eager.load(tmp_path / "kept").retrieve(HISTORIES, N).item, made.retrieve(HISTORIES, N).item
    )


def test_what_was_removed_before_is_read_but_not_predicted(tmp_path):
    ids = eager_ids(VECTORS, ITEMS, TINY)
    gone = {name: system.remove([3, *range(20, 24)]) for name, system in ids.items()}
    learned = Eager(gone, ITEMS, TINY, VECTORS).fit(log(), directory=tmp_path)
    assert np.isfinite([line["loss"] for line in learned.history["history"]]).all()
    assert not np.isin(learned.retrieve(HISTORIES, N, exclude_seen=False).item, [3, 20]).any()
    with pytest.raises(ConfigError, match=r"a checkpoint of another training \(.*events"):
        Eager(ids, ITEMS, TINY, VECTORS).fit(log(), directory=tmp_path)
    with pytest.raises(DataError, match="disagree on which items were removed"):
        Eager(ids | {"semantic": gone["semantic"]}, ITEMS, TINY, VECTORS)


def test_codes_are_scored_as_tiger_scores_them():
    """The look-up by distinct prefix is only a faster one, before new items and after."""
    made = eager(branches=3)
    x = torch.randn(N + 3, MODEL.width)
    for new in (0, 3):
        if new:
            made.add_items(NEW, NEW_VECTORS)
        for name, stream in made.network.streams.items():
            system = made.systems[name]
            for s, allowed in enumerate(system.allowed(torch.arange(N + new))):
                before = system.codes[:, :s]
                found, plain = (
                    stream.logits(x[: N + new], before),
                    stream.prefixes.logits(x[: N + new], before),
                )
                torch.testing.assert_close(found[allowed].detach(), plain[allowed].detach())


def test_a_new_item_is_like_those_of_its_text():
    vectors = {name: rows.copy() for name, rows in VECTORS.items()}
    made = Eager(eager_ids(vectors, ITEMS, TINY), ITEMS, TINY, vectors)
    made.add_items(NEW, NEW_VECTORS)
    alike = made.alike(np.array([N, 7]), 3).item
    assert alike[0, 0] == N + 2
    assert {N, N + 2} & set(alike[1].tolist())


def test_a_new_item_behaves_as_those_of_its_text_do():
    """Ten kinds by text, which are used alike: an item of a kind joins it in the behaviour stream, too."""
    events, vectors = steps()
    config = replace(TINY, branches=10)
    made = Eager(eager_ids(vectors, events.items, config), events.items, config, vectors)
    more = Vocabulary([*events.items.raw.to_pylist(), *(f"new {i}" for i in range(10))])
    made.add_items(more, vectors["semantic"][:10] + 0.1)
    for system in made.systems.values():
        first = system.ids.codes[:, 0]
        near = [np.mean(first[kind:80:10] == first[80 + kind]) for kind in range(10)]
        assert np.mean(near) > 0.8


@pytest.mark.parametrize("ranking", ["both", "own"])
def test_of_a_catalogue_without_any_item_left_nothing_is_found(ranking):
    made = eager(ranking=ranking)
    made.remove_items(np.arange(N))
    assert made.retrieve(HISTORIES, 5).item.shape == (len(HISTORIES), 0)


def test_all_at_once_or_one_after_the_other_is_the_same(tmp_path):
    made, step = eager(), eager()
    made.add_items(NEW, NEW_VECTORS)
    for end in (1, 2, 3):
        step.add_items(Vocabulary(NEW.raw.slice(0, N + end)), NEW_VECTORS[end - 1 : end])
        step.save(tmp_path / str(end))
        step = Eager.load(tmp_path / str(end))
    first, second = made.retrieve(HISTORIES, N + 3), step.retrieve(HISTORIES, N + 3)
    np.testing.assert_array_equal(second.item, first.item)
    np.testing.assert_allclose(second.score, first.score, atol=1e-5)


def test_new_items_that_do_not_fit_are_told():
    def behaviour_alone():
        return eager(streams=("behaviour",))

    for ignorant in (behaviour_alone(), Eager(eager_ids(VECTORS, ITEMS, TINY), ITEMS, TINY)):
        with pytest.raises(ConfigError, match=r"nothing of their text\..*column of text"):
            ignorant.add_items(NEW, NEW_VECTORS)
    made = eager()
    with pytest.raises(DataError, match="renumbers old items"):
        made.add_items(Vocabulary(["new", *ITEMS.raw.to_pylist()]), NEW_VECTORS[:1])
    for bad in (NEW_VECTORS[:2], NEW_VECTORS[:, :4], NEW_VECTORS * np.nan):
        with pytest.raises(DataError, match=r"vectors of new items .*each of 3 items, 9 wide"):
            made.add_items(NEW, bad)
    many = Vocabulary([*ITEMS.raw.to_pylist(), *(f"more {i}" for i in range(99))])
    with pytest.raises(CapacityError, match=r"99 new items, and room for \d+"):
        made.add_items(many, np.zeros((99, 9)))
    assert len(made.items) == len(made.systems["behaviour"].ids) == N  # nothing half-done
    made.add_items(NEW, NEW_VECTORS)
    with pytest.raises(ConfigError, match="no item vectors to learn from"):
        made.fit(replace(log(), items=NEW))


# -- files and bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["whole", "pairs", "semantic alone", "without tasks"])
def test_saved_and_loaded_it_answers_the_same(switch, tmp_path):
    made = eager(**SWITCHES[switch])
    made.save(tmp_path / "kept")
    again = Eager.load(tmp_path / "kept")
    assert again.config == made.config
    assert again.network.tasks is None
    first, second = made.retrieve(HISTORIES, 9), again.retrieve(HISTORIES, 9)
    np.testing.assert_array_equal(second.item, first.item)
    np.testing.assert_array_equal(second.score, first.score)
    alike = [one.alike(np.array([1, 2]), 4).item for one in (made, again)]
    np.testing.assert_array_equal(*alike)
    with pytest.raises(ConfigError, match="no item vectors to learn from"):
        again.fit(log())


def test_damaged_or_newer_folders_are_refused(tmp_path):
    eager().save(tmp_path / "kept")
    for name in (
        "retriever.json",
        "items.parquet",
        "network.safetensors",
        "vectors.safetensors",
        "semantic/ids.safetensors",
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(tmp_path / "kept", copy)
        (copy / name).write_bytes(b"{")
        with pytest.raises(BundleDamagedError, match="cannot be read"):
            Eager.load(copy)
    about = json.loads((tmp_path / "kept" / "retriever.json").read_text())
    (tmp_path / "kept" / "retriever.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BundleVersionError, match="format 99"):
        Eager.load(tmp_path / "kept")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_catalogue_smaller_than_the_number_of_codes(n):
    items = Vocabulary([f"item {i}" for i in range(n)])
    vectors = {name: rows[:n] for name, rows in VECTORS.items()}
    made = eager(items, vectors, branches=256)
    assert torch.isfinite(made.loss(batch([[(0, 0), (n - 1, 1)]]))).all()
    found = made.retrieve(Histories.of([[], [0]]), 10, exclude_seen=False)
    np.testing.assert_array_equal(np.sort(found.item), np.tile(np.arange(n), (2, 1)))
    assert np.isfinite(found.score).all()


@pytest.mark.parametrize("kind", ["zeros", "copies"])
def test_zero_and_duplicate_vectors(kind):
    rows = np.zeros((N, 4), np.float32) if kind == "zeros" else np.ones((N, 4), np.float32)
    rows[:3] = np.eye(4, dtype=np.float32)[:3] if kind == "copies" else 0
    made = eager(vectors=dict.fromkeys(BOTH, rows))
    assert torch.isfinite(made.loss(batch(LIVES))).all()
    found = made.retrieve(HISTORIES, N, exclude_seen=False)
    np.testing.assert_array_equal(np.sort(found.item), np.tile(np.arange(N), (len(HISTORIES), 1)))


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_batch_of_one_and_histories_of_one(switch):
    made = eager(**SWITCHES[switch])
    made.network.train()
    assert torch.isfinite(made.loss(batch([[(7, 0)]]))).all()
    made.network.eval()
    assert (made.retrieve(Histories.of([[7]]), 5).item != 7).all()


def test_bad_settings_and_input_are_named():
    with pytest.raises(ConfigError, match="beams is at least 1"):
        EagerConfig(beams=0)
    with pytest.raises(ConfigError, match=r"streams=\('text',\)"):
        EagerConfig(streams=("text",))
    with pytest.raises(ConfigError, match="is at least 0 and finite"):
        EagerConfig(transfer=-1.0)
    with pytest.raises(ConfigError, match=r"ranking='best'\. ranking is one of"):
        EagerConfig(ranking="best")
    with pytest.raises(ConfigError, match="is at least 0 and finite"):
        EagerConfig(contrast=float("nan"))
    with pytest.raises(ConfigError, match="A level has at least 2 clusters"):
        EagerConfig(branches=1)
    with pytest.raises(ConfigError, match="contrast_loss='mse'"):
        EagerConfig(contrast_loss="mse")
    with pytest.raises(DataError, match=r'vectors of semantic\..*Add vectors\["behaviour"\]'):
        eager_ids({"semantic": VECTORS["semantic"]}, ITEMS)
    with pytest.raises(DataError, match=r"codes of .*The streams are"):
        Eager(eager_ids(VECTORS, ITEMS), ITEMS, EagerConfig(streams=("semantic",)))
    short = VECTORS | {"semantic": VECTORS["semantic"][:5]}
    with pytest.raises(DataError, match=r"vectors of semantic of shape \(5, "):
        Eager(eager_ids(VECTORS, ITEMS), ITEMS, vectors=short)
    holes = VECTORS | {"semantic": np.where(np.arange(24)[:, None] == 3, np.nan, VECTORS["semantic"])}
    ids = eager_ids(VECTORS, ITEMS)
    for make in (
        lambda vectors: eager_ids(vectors, ITEMS),
        lambda vectors: Eager(ids, ITEMS, vectors=vectors),
    ):
        with pytest.raises(
            DataError, match=r"that are not finite\. There is one finite vector for each of 24"
        ):
            make(holes)
        with pytest.raises(DataError, match=r'vectors of behaviour\. .*Add vectors\["semantic"\]'):
            make({"behaviour": VECTORS["behaviour"]})
    with pytest.raises(DataError, match="24 semantic IDs of behaviour for 1 items"):
        Eager(eager_ids(VECTORS, ITEMS), Vocabulary(["x"]))
    empty = np.empty(0, np.int32)
    with pytest.raises(DataError, match="without any event"):
        eager().fit(Interactions(empty, empty, empty.astype(np.int64), Vocabulary(["u"]), ITEMS))
    other = Interactions(empty, empty, empty.astype(np.int64), Vocabulary(["u"]), Vocabulary(["x"]))
    with pytest.raises(DataError, match="not those of this retriever"):
        eager().fit(other)
    with pytest.raises(DataError, match="a dense item outside 0 … 23"):
        eager().retrieve(Histories.of([[N]]), 3)
