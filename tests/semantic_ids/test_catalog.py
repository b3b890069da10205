"""Laws of semantic IDs: unique, never changed, never given twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import BundleDamagedError, CapacityError, DataError
from tiglon.semantic_ids.catalog import SemanticIds, churn
from tiglon.types import Vocabulary, hash_ids

SIZES = (2, 3)


def codes_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.column_stack([random.integers(0, size, count) for size in SIZES]).astype(np.int32)


def test_group_sizes_are_the_collision_histogram_and_digits_count_up_from_0() -> None:
    codes = codes_of(50)
    ids = SemanticIds.assign(codes, SIZES, np.arange(50).tolist())
    assert (ids.codes[:, :2] == codes).all()
    assert ids.sizes == (2, 3, 256)
    for group in np.unique(codes, axis=0):
        digits = ids.codes[(codes == group).all(axis=1), 2]
        assert sorted(digits) == list(range(len(digits)))


def test_digits_follow_a_hash_of_the_raw_id_and_not_its_order_or_the_rows() -> None:
    keys = [f"é{i:04d}" for i in range(200)]
    codes = np.zeros((200, 2), np.int32)
    ids = SemanticIds.assign(codes, SIZES, keys)
    order = np.random.default_rng(0).permutation(200)
    shuffled = SemanticIds.assign(codes, SIZES, [keys[i] for i in order])
    assert (shuffled.codes == ids.codes[order]).all()
    assert abs(np.corrcoef(np.arange(200), ids.codes[:, 2])[0, 1]) < 0.2
    numbers = SemanticIds.assign(codes, SIZES, list(range(200)))
    assert abs(np.corrcoef(np.arange(200), numbers.codes[:, 2])[0, 1]) < 0.2


def test_the_hash_is_the_same_on_every_machine_and_for_every_storage() -> None:
    assert hash_ids(Vocabulary(["a", "bc", ""])).tolist() == [
        9413272369427828315,
        hash_ids(Vocabulary(["bc"]))[0],
        hash_ids(Vocabulary([""]))[0],
    ]
    assert (
        hash_ids(Vocabulary(Vocabulary(["x", "a", "bc"]).raw.slice(1))) == hash_ids(Vocabulary(["a", "bc"]))
    ).all()
    numbers = np.arange(-50_000, 50_000)
    assert len(np.unique(hash_ids(Vocabulary(numbers.tolist())))) == 100_000
    assert len(hash_ids(Vocabulary([]))) == 0


steps = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "restore"]), st.integers(0, 2**32 - 1)), max_size=10
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_edit_changes_an_id_or_gives_it_to_another(script: list[tuple[str, int]]) -> None:
    ids = SemanticIds.assign(codes_of(5), SIZES, list(range(5)))
    alive = set(range(5))
    for step, seed in script:
        before = ids
        some = np.random.default_rng(seed).integers(0, len(ids), 3)
        if step == "add":
            codes = codes_of(4, seed)
            ids = before.add(codes, list(range(len(before), len(before) + 4)))
            assert (ids.codes[len(before) :, :2] == codes).all()
            alive |= set(range(len(before), len(before) + 4))
        elif step == "remove":
            ids = before.remove(some)
            alive -= set(some.tolist())
        else:
            ids = before.restore(some)
            alive |= set(some.tolist())
        assert (ids.codes[: len(before)] == before.codes).all()
        assert len(np.unique(ids.codes, axis=0)) == len(ids)  # removed ones included
        assert set(np.flatnonzero(ids.alive).tolist()) == alive
        assert ids.parent == before.version


def test_a_removed_item_keeps_its_id_from_the_next() -> None:
    ids = SemanticIds.assign(np.zeros((2, 2), np.int32), SIZES, ["a", "b"])
    later = ids.remove([0, 1]).add(np.zeros((1, 2), np.int32), ["c"])
    assert later.codes[2].tolist() == [0, 0, 2]


def test_257_items_with_the_same_codes_raise_or_grow_and_never_wrap() -> None:
    codes = np.zeros((257, 2), np.int32)
    keys = list(range(257))
    with pytest.raises(CapacityError, match=r"257 items with the same 2 codes.*tells 256 apart.*grow=True"):
        SemanticIds.assign(codes, SIZES, keys, digit_size=256)
    full = SemanticIds.assign(codes[:256], SIZES, keys[:256], digit_size=256)
    with pytest.raises(CapacityError):
        full.add(codes[:1], [256])
    grown = full.add(codes[:1], [256], grow=True)
    assert grown.sizes == (2, 3, 512)
    assert grown.codes[256].tolist() == [0, 0, 256]
    assert (grown.offsets == full.offsets).all(), "tokens that exist keep their numbers"
    assert (grown.tokens[:256] == full.tokens).all()
    assert SemanticIds.assign(codes, SIZES, keys).sizes == (2, 3, 1024), "twice the group, to a power of two"


def test_version_is_the_content_and_nothing_else() -> None:
    codes, keys = codes_of(20), list(range(20))
    at_once = SemanticIds.assign(codes, SIZES, keys)
    assert SemanticIds.assign(codes, SIZES, keys).version == at_once.version
    gone = at_once.remove([3])
    assert gone.version != at_once.version
    assert gone.restore([3]).version == at_once.version
    assert gone.restore([3]).parent == gone.version
    assert at_once.parent is None


def test_tokens_of_different_positions_never_meet() -> None:
    ids = SemanticIds.assign(codes_of(30), SIZES, list(range(30)), digit_size=64)
    assert ids.offsets.tolist() == [0, 2, 5]
    assert (ids.tokens - ids.codes == ids.offsets).all()


def test_saved_ids_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    ids = SemanticIds.assign(codes_of(20), SIZES, list(range(20))).remove([1])
    ids.save(tmp_path)
    back = SemanticIds.load(tmp_path)
    assert (back.version, back.parent, back.sizes) == (ids.version, ids.parent, ids.sizes)
    assert (back.codes == ids.codes).all()
    file = tmp_path / "ids.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleDamagedError, match=r"ids.safetensors cannot be read"):
        SemanticIds.load(tmp_path)
    ids.save(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # one bit of one item's mask or code
    file.write_bytes(damaged)
    with pytest.raises(BundleDamagedError):
        SemanticIds.load(tmp_path)
    file.unlink()
    with pytest.raises(BundleDamagedError):
        SemanticIds.load(tmp_path)


def test_ids_cannot_be_written_to() -> None:
    ids = SemanticIds.assign(codes_of(3), SIZES, [1, 2, 3])
    with pytest.raises(ValueError, match=r"read-only"):
        ids.codes[0, 0] = 1


def test_churn_counts_items_whose_prefix_changed() -> None:
    old = SemanticIds.assign(np.array([(0, 0), (0, 1), (1, 0), (1, 2)], np.int32), SIZES, [1, 2, 3, 4])
    new = SemanticIds.assign(np.array([(0, 0), (0, 2), (0, 0), (1, 2)], np.int32), SIZES, [1, 2, 3, 4])
    assert churn(old, old).tolist() == [0, 0, 0]
    assert churn(old, new)[:2].tolist() == [0.25, 0.5]
    assert (np.diff(churn(old, new)) >= 0).all()
    assert churn(old.remove([1, 2]), new)[:2].tolist() == [0, 0]


def test_errors_say_what_is_wrong() -> None:
    ids = SemanticIds.assign(codes_of(3), SIZES, [1, 2, 3])
    with pytest.raises(DataError, match=r"codes 0 … 9 at position 1. Position 1 has the codes 0 … 2"):
        SemanticIds.assign(np.array([(0, 0), (0, 9)], np.int32), SIZES, [1, 2])
    with pytest.raises(DataError, match=r"codes of shape \(3, 2\) for 2 items. Each new item has 2 codes"):
        SemanticIds.assign(codes_of(3), SIZES, [1, 2])
    with pytest.raises(DataError, match=r"dense item outside 0 … 2"):
        ids.remove([3])
    with pytest.raises(DataError, match=r"two items with one ID. Semantic IDs are unique"):
        SemanticIds(np.zeros((2, 3), np.int32), (2, 3, 256), np.ones(2, bool))
    with pytest.raises(DataError, match=r"alive mask"):
        SemanticIds(np.zeros((1, 3), np.int32), (2, 3, 256), np.ones(2, bool))
