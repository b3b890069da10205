"""The trie against a set of tuples, which is what it means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError
from tiglon.semantic_ids.trie import Trie

SIZES = (3, 2, 4)
IDS = [(a, b, c) for a in range(3) for b in range(2) for c in range(4)]


def walk(trie: Trie) -> dict[tuple[int, ...], int]:
    """ID → item of everything that can be reached from the root, level by level."""
    prefixes, nodes = [()], np.array([trie.root])
    for depth in range(trie.depth):
        offsets, code, child = trie.children(nodes, depth)
        assert len(offsets) == len(nodes) + 1
        assert code.dtype == np.int32
        assert child.dtype == np.int64
        grown = []
        for m, prefix in enumerate(prefixes):
            mine = code[offsets[m] : offsets[m + 1]]
            assert (np.diff(mine) > 0).all(), "codes ascend within a node"
            assert len(mine) or not prefix, "a dead end"
            grown += [(*prefix, int(c)) for c in mine]
        prefixes, nodes = grown, child
    return dict(zip(prefixes, trie.item(nodes).tolist(), strict=True))


def check(trie: Trie, known: dict[tuple[int, ...], int]) -> None:
    assert walk(trie) == known
    assert len(trie) == len(known)
    for depth in range(trie.depth + 1):
        prefixes = sorted({ids[:depth] for ids in IDS})
        nodes = trie.find(np.array(prefixes, np.int32).reshape(len(prefixes), depth))
        for prefix, node in zip(prefixes, nodes, strict=True):
            below = sorted(item for ids, item in known.items() if ids[:depth] == prefix)
            assert (node != -1) == bool(below) or depth == 0
            if node != -1:
                assert trie.below(node, depth).tolist() == below


@st.composite
def edits(draw: st.DrawFn) -> tuple[list, list]:
    """A first catalogue, and a list of ("add", IDs) | ("remove", how many) | ("merge",)."""
    order = draw(st.permutations(IDS))
    first = draw(st.integers(0, 12))
    steps = st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 23), max_size=6)),
        st.tuples(st.just("merge"), st.none()),
    )
    return [order, first], draw(st.lists(steps, max_size=8))


@settings(max_examples=80, deadline=None)
@given(edits())
def test_any_edits_give_what_a_set_would(script: tuple[list, list]) -> None:
    (order, first), steps = script
    known = {ids: item for item, ids in enumerate(order[:first])}
    trie = Trie.build(np.array(order[:first], np.int32).reshape(-1, 3), SIZES)
    number = 100
    check(trie, known)
    for step, argument in steps:
        if step == "add":
            new = [ids for ids in order if ids not in known][:argument]
            items = np.arange(number, number + len(new))
            number += len(new)
            trie = trie.add(np.array(new, np.int32).reshape(-1, 3), items)
            known |= dict(zip(new, items.tolist(), strict=True))
        elif step == "remove":
            gone = [item for i, item in enumerate(known.values()) if i in argument]
            trie = trie.remove(np.array([*gone, 999]))
            known = {ids: item for ids, item in known.items() if item not in gone}
        else:
            trie = trie.merge()
        check(trie, known)


def test_an_edit_leaves_the_old_trie_alone() -> None:
    codes = np.array(IDS[:5], np.int32)
    trie = Trie.build(codes, SIZES)
    before = walk(trie)
    trie.add(np.array(IDS[5:7], np.int32), np.array([5, 6])).remove(np.array([0, 6]))
    assert walk(trie) == before


def test_only_the_living_are_built_and_keep_their_numbers() -> None:
    alive = np.array([True, False, True])
    trie = Trie.build(np.array(IDS[:3], np.int32), SIZES, alive)
    assert walk(trie) == {IDS[0]: 0, IDS[2]: 2}


def test_an_empty_catalogue_has_no_first_code() -> None:
    trie = Trie.build(np.empty((0, 3), np.int32), SIZES)
    assert trie.children(np.array([trie.root]), 0)[0].tolist() == [0, 0]
    assert walk(trie.add(np.array([(2, 1, 3)]), np.array([0]))) == {(2, 1, 3): 0}


def test_positions_of_more_codes_than_a_byte_holds_and_of_more_ids_than_an_integer() -> None:
    sizes = (70_000, 300) + (256,) * 7
    random = np.random.default_rng(0)
    codes = np.column_stack([random.integers(0, size, 500) for size in sizes]).astype(np.int32)
    codes[250:, :8] = codes[:250, :8]  # long prefixes in common
    codes[250:, 8] = (codes[:250, 8] + 1) % 256
    trie = Trie.build(codes, sizes)
    assert trie.item(trie.find(codes)).tolist() == list(range(500))
    assert walk(trie) == {tuple(row): item for item, row in enumerate(codes.tolist())}


def test_a_digit_that_has_grown_can_be_added() -> None:
    trie = Trie.build(np.array([(0, 0, 255)]), (4, 4, 256))
    grown = trie.add(np.array([(0, 0, 300)]), np.array([1]), sizes=(4, 4, 512))
    assert walk(grown) == walk(grown.merge()) == {(0, 0, 255): 0, (0, 0, 300): 1}


def test_a_million_random_items_take_at_most_16_bytes_each() -> None:
    random = np.random.default_rng(0)
    key = np.unique(random.integers(0, 256**3, 1_030_000))[: 10**6]  # sorted; the digit is 0
    codes = np.stack([key >> 16, key >> 8 & 255, key & 255, np.zeros_like(key)], axis=1).astype(np.int32)
    trie = Trie.build(codes, (256,) * 4)
    assert trie.nbytes <= 16 * len(codes)


def test_errors_say_what_is_wrong() -> None:
    codes = np.array(IDS[:3], np.int32)
    trie = Trie.build(codes, SIZES)
    with pytest.raises(DataError, match=r"1 IDs that another item has. Semantic IDs are unique"):
        Trie.build(codes[[0, 1, 1]], SIZES)
    with pytest.raises(DataError, match=r"codes 0 … 3 at position 2. Position 2 has the codes 0 … 2"):
        Trie.build(np.array(IDS[:4], np.int32), (3, 2, 3))
    with pytest.raises(DataError, match=r"codes -1"):
        Trie.build(codes - 1, SIZES)
    with pytest.raises(DataError, match=r"An ID has 3 codes"):
        Trie.build(codes[:, :2], SIZES)
    with pytest.raises(DataError, match=r"1 IDs that the trie already holds"):
        trie.add(codes[:1], np.array([7]))
    with pytest.raises(DataError, match=r"1 IDs that another item has"):
        trie.add(np.array([(2, 1, 1), (2, 1, 1)]), np.array([7, 8]))
    with pytest.raises(ConfigError, match=r"children at depth 3. Nodes lie at 0 … 2"):
        trie.children(np.array([trie.root]), 3)
    with pytest.raises(DataError, match=r"An ID has 3 codes"):
        trie.find(np.zeros((1, 4), np.int32))
