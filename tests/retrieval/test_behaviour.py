"""Behaviour beside text: known answers in a world where the two disagree."""

import numpy as np
import pytest

from tiglon.errors import BundleDamagedError, ConfigError, DataError
from tiglon.retrieval.behaviour import BehaviourVectors, co_occurrence_vectors, unit
from tiglon.types import Interactions, Vocabulary

N = 24  # items; two kinds by text (i < 12), two by behaviour (i odd)


def log(items=N - 2):
    """Users who stay with odd or with even items; the last two items have no event."""
    rng = np.random.default_rng(0)
    lives = [rng.permutation(np.arange(user % 2, items, 2))[:6] for user in range(80)]
    return Interactions(
        np.repeat(np.arange(80, dtype=np.int32), 6),
        np.concatenate(lives).astype(np.int32),
        np.tile(np.arange(6), 80),
        Vocabulary(list(range(80))),
        Vocabulary(list(range(N))),
    )


def text():
    """Two kinds of text, and a hint of the behaviour in two more dimensions."""
    kind, odd = np.arange(N) >= 12, np.arange(N) % 2
    rng = np.random.default_rng(1)
    columns = np.stack([kind, ~kind, 0.3 * odd, 0.3 * (1 - odd)], axis=1)
    return (columns + 0.01 * rng.normal(size=columns.shape)).astype(np.float32)


def test_items_used_together_come_near_though_their_texts_differ():
    vectors = unit(BehaviourVectors(1.0, 4).fit_encode(log(), text()))
    same_text_only, same_behaviour_only = vectors[0] @ vectors[3], vectors[0] @ vectors[14]
    assert vectors[0] @ vectors[2] > max(same_text_only, same_behaviour_only)
    only_text = unit(BehaviourVectors(0.0, 4).fit_encode(log(), text()))
    np.testing.assert_allclose(only_text[:, :4], unit(text()), atol=1e-6)


def test_co_occurrence_has_a_direction_a_group_and_none_for_what_nobody_used():
    vectors = co_occurrence_vectors(log(), 2)
    used, cosine = vectors[: N - 2], vectors @ vectors.T
    np.testing.assert_allclose(np.linalg.norm(used, axis=1), 1.0, rtol=1e-5)
    assert not vectors[N - 2 :].any()
    same = (np.arange(N - 2)[:, None] - np.arange(N - 2)) % 2 == 0
    assert cosine[: N - 2, : N - 2][same].min() > 0.5 > cosine[: N - 2, : N - 2][~same].max()


def test_a_new_item_gets_the_behaviour_its_text_predicts():
    encoder = BehaviourVectors(1.0, 4, ridge=0.1)
    vectors = encoder.fit_encode(log(), text())
    new = encoder.encode(text()[[N - 2, N - 1]])
    np.testing.assert_allclose(new, vectors[N - 2 :], atol=1e-5)  # those had no event either
    behaviour = unit(vectors[:, 4:])
    for row, odd in zip(unit(new[:, 4:]), (0, 1), strict=True):
        assert (behaviour[odd : N - 2 : 2] @ row).mean() > (behaviour[1 - odd : N - 2 : 2] @ row).mean() + 0.5


def test_the_same_twice_and_after_loading(tmp_path):
    encoder = BehaviourVectors(0.5, 4)
    first = encoder.fit_encode(log(), text())
    np.testing.assert_array_equal(first, BehaviourVectors(0.5, 4).fit_encode(log(), text()))
    encoder.save(tmp_path)
    np.testing.assert_array_equal(BehaviourVectors.load(tmp_path).encode(text()), encoder.encode(text()))
    path = tmp_path / "behaviour.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BundleDamagedError, match="cannot read"):
        BehaviourVectors.load(tmp_path)
    path.unlink()
    with pytest.raises(BundleDamagedError, match="cannot read"):
        BehaviourVectors.load(tmp_path)


def test_one_item_and_bad_input():
    one = Interactions(
        np.zeros(2, np.int32), np.zeros(2, np.int32), np.arange(2), Vocabulary([1]), Vocabulary(["a"])
    )
    assert np.isfinite(BehaviourVectors().fit_encode(one, np.ones((1, 3), np.float32))).all()
    with pytest.raises(ConfigError, match="A weight is at least 0"):
        BehaviourVectors(-1)
    for bad in (np.ones((3, 3), np.float32), np.full((24, 4), np.nan)):
        with pytest.raises(DataError, match=r"text vectors .* each of 24 items"):
            BehaviourVectors().fit_encode(log(), bad)
    encoder = BehaviourVectors(1.0, 4)
    encoder.fit_encode(log(), text())
    for bad in (np.ones((1, 9), np.float32), np.full((1, 4), np.inf)):
        with pytest.raises(DataError, match=r"text vectors .* 4 wide, from the encoder of the old ones"):
            encoder.encode(bad)
