"""The paper's network against Hugging Face's T5 with the same weights, and what it must not see."""

import itertools

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tiglon.nn.transformer import PADDING
from tiglon.retrieval.beam import beam_search
from tiglon.retrieval.tiger_paper import PaperConfig, PaperTiger
from tiglon.semantic_ids.trie import Trie

torch.set_num_threads(1)

SIZES = (6, 5, 7, 3)
OFFSETS = (1, 7, 12, 19)
SEPARATOR = 22
N = 40
CODES = torch.from_numpy(
    np.random.default_rng(0).permutation(list(itertools.product(*map(range, SIZES))))[:N].astype(np.int64)
)
HISTORIES = [[3, 1, 4, 1, 5, 9, 2, 6], [11], [8, 30, 7], list(range(25))]


def tokens_of(item):
    return [offset + int(code) for offset, code in zip(OFFSETS, CODES[item], strict=True)]


def networks(seed=0, **changes):
    """Ours, and a T5 with its weights; biases are large enough to show."""
    config = PaperConfig(
        width=16, heads=3, head_width=4, hidden=24, encoder_layers=2, decoder_layers=2, **changes
    )
    torch.manual_seed(seed)
    ours = PaperTiger(SIZES, config).eval()
    with torch.no_grad():
        ours.bias_encoder.weight.normal_()
        ours.bias_decoder.weight.normal_()
    return ours, t5_with_weights_of(ours)


def t5_with_weights_of(ours):
    c = ours.config
    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(ours.token.weight),
            d_model=c.width,
            d_kv=c.head_width,
            d_ff=c.hidden,
            num_layers=c.encoder_layers,
            num_decoder_layers=c.decoder_layers,
            num_heads=c.heads,
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=SEPARATOR,  # never allowed
        )
    ).eval()
    weights = {"shared.weight": ours.token.weight}
    for side, layers, norm, bias in (
        ("encoder", ours.encoder, ours.norm_encoder, ours.bias_encoder),
        ("decoder", ours.decoder, ours.norm_decoder, ours.bias_decoder),
    ):
        weights[f"{side}.final_layer_norm.weight"] = norm.weight
        weights[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias.weight
        for number, layer in enumerate(layers):
            parts = (
                [("SelfAttention", layer.norm_attention, layer.attention)]
                if side == "encoder"
                else [
                    ("SelfAttention", layer.norm_self, layer.self_attention),
                    ("EncDecAttention", layer.norm_cross, layer.cross_attention),
                ]
            )
            block = f"{side}.block.{number}.layer"
            for at, (name, before, attention) in enumerate(parts):
                key, value = attention.kv.weight.T.chunk(2)
                both = {"q": attention.q.weight.T, "k": key, "v": value, "o": attention.o.weight.T}
                weights |= {f"{block}.{at}.{name}.{part}.weight": w for part, w in both.items()}
                weights[f"{block}.{at}.layer_norm.weight"] = before.weight
            last = f"{block}.{len(parts)}"
            weights[f"{last}.layer_norm.weight"] = layer.norm_ff.weight
            weights[f"{last}.DenseReluDense.wi.weight"] = layer.ff.wi.weight.T
            weights[f"{last}.DenseReluDense.wo.weight"] = layer.ff.wo.weight.T
    absent, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown
    assert set(absent) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    return theirs


def batch(histories):
    """Codes (B, L, S), moments (B, L), one event a moment, padded at the end with item 0."""
    width = max(map(len, histories))
    item = torch.zeros(len(histories), width, dtype=torch.int64)
    moment = torch.full((len(histories), width), PADDING)
    for row, items in enumerate(histories):
        item[row, : len(items)] = torch.tensor(items, dtype=torch.int64)
        moment[row, : len(items)] = torch.arange(len(items))
    return CODES[item], moment


def padded(histories):
    """The same as T5 reads it: tokens (B, K), mask (B, K)."""
    rows = [[token for item in items for token in tokens_of(item)] for items in histories]
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), mask


TARGETS = CODES[[2, 7, 30, 12]]
LABELS = torch.tensor([tokens_of(i) for i in (2, 7, 30, 12)])


# -- the same numbers as T5 --------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_t5():
    ours, theirs = networks()
    tokens, mask = padded(HISTORIES)
    expected = theirs(input_ids=tokens, attention_mask=mask, labels=LABELS).logits
    found = ours(ours.encode(*batch(HISTORIES)), TARGETS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_t5s_tokens():
    ours, theirs = networks()
    tokens, mask = padded(HISTORIES)
    expected = theirs(input_ids=tokens, attention_mask=mask, labels=LABELS).loss
    codes, moment = batch([[*items, goal] for items, goal in zip(HISTORIES, (2, 7, 30, 12), strict=True)])
    target = moment == torch.tensor([len(items) for items in HISTORIES])[:, None]
    found = ours.loss(codes, moment, target, None)
    assert found.shape == (4, len(SIZES))
    torch.testing.assert_close(found.mean(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_t5():
    ours, theirs = networks()
    tokens, mask = padded(HISTORIES)
    theirs(input_ids=tokens, attention_mask=mask, labels=LABELS).loss.backward()
    codes, moment = batch([[*items, goal] for items, goal in zip(HISTORIES, (2, 7, 30, 12), strict=True)])
    ours.loss(codes, moment, moment == torch.tensor([[8], [1], [3], [25]]), None).mean().backward()
    for mine, its in (
        (ours.token.weight, theirs.shared.weight.grad),
        (
            ours.bias_encoder.weight,
            theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad,
        ),
        (ours.encoder[1].ff.wi.weight, theirs.encoder.block[1].layer[1].DenseReluDense.wi.weight.grad.T),
    ):
        torch.testing.assert_close(mine.grad, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 5, 12])
@torch.no_grad()
def test_beams_are_those_of_generate(beams):
    ours, theirs = networks()
    tokens, mask = padded(HISTORIES)
    children = {}
    for item in range(N):
        row = tokens_of(item)
        for depth in range(len(SIZES)):
            children.setdefault(tuple(row[:depth]), set()).add(row[depth])
    theirs_out = theirs.generate(
        input_ids=tokens,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=len(SIZES),
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, row: sorted(children[tuple(row[1:].tolist())]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    item_of = {tuple(tokens_of(item)): item for item in range(N)}
    expected = np.array([item_of[tuple(row[1:].tolist())] for row in theirs_out.sequences]).reshape(4, beams)

    step = ours.decoder_for(ours.encode(*batch(HISTORIES)), torch.zeros(4, dtype=torch.int64))
    trie = Trie.build(CODES.numpy().astype(np.int32), SIZES)
    found = beam_search(step, trie, 4, beams, width=beams, renormalise=False)
    np.testing.assert_array_equal(found.item, expected)
    scores = theirs_out.sequences_scores.numpy().reshape(4, beams) if beams > 1 else found.score
    np.testing.assert_allclose(found.score, scores, rtol=1e-4, atol=1e-4)


# -- the network's own laws --------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
@torch.no_grad()
def test_a_beam_as_wide_as_the_catalogue_is_exhaustive(renormalise):
    ours, _ = networks()
    histories = HISTORIES[:3]
    step = ours.decoder_for(ours.encode(*batch(histories)), torch.zeros(3, dtype=torch.int64))
    trie = Trie.build(CODES.numpy().astype(np.int32), SIZES)
    found = beam_search(step, trie, 3, N, width=N, renormalise=renormalise)
    allowed = None
    if renormalise:
        allowed = [torch.zeros(N, size, dtype=torch.bool) for size in SIZES]
        for depth, item in itertools.product(range(len(SIZES)), range(N)):
            same = (CODES[:, :depth] == CODES[item, :depth]).all(dim=1)
            allowed[depth][item, CODES[same, depth]] = True
    for user, items in enumerate(histories):
        codes, moment = batch([[*items, goal] for goal in range(N)])
        target = moment == len(items)
        truth = -ours.loss(codes, moment, target, allowed).sum(dim=1).double().numpy()
        np.testing.assert_array_equal(found.item[user], np.argsort(-truth))
        np.testing.assert_allclose(found.score[user], np.sort(truth)[::-1], atol=1e-5)
        total = np.exp(truth).sum()
        assert total == pytest.approx(1, abs=1e-5) if renormalise else total < 0.999


@torch.no_grad()
def test_events_of_the_targets_moment_and_later_are_hidden():
    ours, _ = networks()
    moment = torch.tensor([[0, 1, 1, 2, 2, 3]])
    item = torch.tensor([[4, 5, 6, 7, 8, 9]])
    target = torch.tensor([[False, False, False, True, False, False]])
    before = ours.loss(CODES[item], moment, target, None)
    torch.testing.assert_close(ours.loss(CODES[item[:, :4]], moment[:, :4], target[:, :4], None), before)
    for at in (4, 5):
        changed = item.clone()
        changed[0, at] = 20
        torch.testing.assert_close(ours.loss(CODES[changed], moment, target, None), before)
    for at in (0, 1, 2):
        changed = item.clone()
        changed[0, at] = 20
        assert (ours.loss(CODES[changed], moment, target, None) - before).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"separators": True}, {"user_tokens": 3}])
@torch.no_grad()
def test_a_row_alone_is_that_row_in_a_batch(changes):
    ours, _ = networks(**changes)
    histories = [*HISTORIES, []]
    goals = CODES[[2, 7, 30, 12, 5]]
    together = ours(ours.encode(*batch(histories)), goals)
    for row, items in enumerate(histories):
        alone = ours(ours.encode(*batch([items])), goals[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_order_of_the_history_matters():
    ours, _ = networks()
    there, back = (ours(ours.encode(*batch([items])), TARGETS[:1]) for items in ([3, 1, 4], [4, 1, 3]))
    assert (there - back).abs().max() > 1e-3


def test_each_position_has_tokens_of_its_own():
    ours, _ = networks()
    assert ours.offsets.tolist() == list(OFFSETS)
    same = torch.full((1, 1, 4), 2)
    token, real = ours.tokens(same, torch.tensor([[True]]), None)
    assert token.tolist() == [[3, 9, 14, 21]]
    assert real.all()


def test_separators_follow_each_item_and_users_come_first():
    ours, _ = networks(separators=True, user_tokens=3)
    codes, moment = batch([[3, 1], [4]])
    users = torch.tensor([10**9, -1])
    token, real = ours.tokens(codes, moment < PADDING, users)
    expected = [*tokens_of(3), SEPARATOR, *tokens_of(1), SEPARATOR]
    assert token[0, 1:].tolist() == expected
    assert real[0].all()
    assert token[1, 1:6].tolist() == [*tokens_of(4), SEPARATOR]
    assert real[1].tolist() == [True] * 6 + [False] * 5
    first, unknown = SEPARATOR + 1, SEPARATOR + 1 + 3
    assert first <= token[0, 0] < unknown
    assert token[1, 0] == unknown
    assert token.max() < len(ours.token.weight)
    everyone = torch.arange(3000)
    many, _ = ours.tokens(codes[:1].expand(3000, -1, -1), torch.ones(3000, 2, dtype=torch.bool), everyone)
    assert torch.bincount(many[:, 0] - first, minlength=3).min() > 800  # spread evenly


@torch.no_grad()
def test_a_user_token_speaks_for_the_user():
    ours, _ = networks(user_tokens=50)
    codes, moment = batch([[3, 1]])
    a, b, unknown, nobody = (
        ours(ours.encode(codes, moment, user), TARGETS[:1])
        for user in (torch.tensor([4]), torch.tensor([5]), torch.tensor([-1]), None)
    )
    assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(unknown, nobody)


def test_every_event_with_a_past_is_the_target_of_one_row():
    offsets = np.array([0, 5, 5, 6, 15])
    moment = np.array([0, 1, 1, 2, 3, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    rows = PaperTiger.windows(offsets, moment, window=3)
    assert rows[:, 2].tolist() == [1, 2, 3, 4, 10, 11, 12, 13, 14]
    for start, stop, target in rows:
        life = offsets[np.searchsorted(offsets, target, side="right") - 1]
        assert stop == target + 1
        assert life <= start
        seen, past = (np.count_nonzero(moment[first:target] < moment[target]) for first in (start, life))
        assert seen == min(3, past) > 0


def test_gradients_are_finite():
    for changes in ({}, {"separators": True, "user_tokens": 3}):
        ours, _ = networks(dropout=0.3, **changes)
        ours.train()
        codes, moment = batch(HISTORIES)
        target = moment == torch.tensor([[7], [0], [1], [24]])
        moment[1, 1] = 1
        target[1] = moment[1] == 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours.loss(codes, moment, target, None)
        loss.mean().backward()
        for name, p in ours.named_parameters():
            assert torch.isfinite(p.grad).all(), name
