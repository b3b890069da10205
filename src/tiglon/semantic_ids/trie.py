"""Array trie over semantic IDs: which codes may follow a prefix, exactly, for a batch of prefixes.

The nodes of each depth lie in one array, sorted by their path, so that the children of a node are one
slice of the next depth's array: a start a node and a code a node, and at the leaves the item. That is
10 bytes an item for a million items with random 3 × 256 codes, and a step costs what it returns.

A trie is immutable. `add` and `remove` return a new one that shares the big arrays: additions lie in a
second, small set of arrays, removals in a mask; `children` merges the three. `merge` folds them into one.

A node handle is opaque and belongs to the trie that gave it. (It packs two positions, each counted from
1 with 0 for "not there": the base's in the low 32 bits, the addition's in the high ones.)

Letters: N items, S positions of an ID, M nodes asked about, C children found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from tiglon.errors import ConfigError, DataError

LOW = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class _Levels:
    """Sorted IDs as arrays; depth d has n_d nodes, n_0 = 1 and n_S = the number of leaves.

    start[d]: (n_d + 1,) uint32; node i's children are nodes start[d][i]:start[d][i+1] of depth d + 1.
    code[d]: (n_{d+1},) the code that leads to a node of depth d + 1.
    item: (n_S,) int32 dense items.
    """

    start: tuple[np.ndarray, ...]
    code: tuple[np.ndarray, ...]
    item: np.ndarray

    @classmethod
    def build(cls, codes: np.ndarray, items: np.ndarray, sizes: Sequence[int]) -> _Levels:
        order = _lexicographic(codes, sizes)
        opens = np.zeros(len(codes), bool)  # does a new node of this depth begin at leaf i?
        opens[:1] = True
        starts, labels = [], []
        above = np.zeros(1, np.int64)  # the first leaf under each node of the depth above
        for position, size in enumerate(sizes):
            column = codes[order, position]
            opens[1:] |= column[1:] != column[:-1]
            leaves = np.flatnonzero(opens)
            starts.append(np.append(np.searchsorted(leaves, above), len(leaves)).astype(np.uint32))
            labels.append(column[leaves].astype(np.min_scalar_type(size - 1)))
            above = leaves
        if len(above) < len(codes):
            raise DataError(
                f"{len(codes) - len(above)} IDs that another item has", rule="Semantic IDs are unique"
            )
        return cls(tuple(starts), tuple(labels), items[order].astype(np.int32))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.start, *self.code, self.item))

    def codes(self) -> np.ndarray:
        """(n_S, S) int32: every leaf's ID, in order."""
        node = np.arange(len(self.item))
        columns = []
        for start, code in zip(reversed(self.start), reversed(self.code), strict=True):
            columns.append(code[node].astype(np.int32))
            node = np.searchsorted(start, node, side="right") - 1
        return np.column_stack(columns[::-1])

    def leaves(self, node: int, depth: int) -> slice:
        """The leaves below one node."""
        low, high = node, node + 1
        for start in self.start[depth:]:
            low, high = int(start[low]), int(start[high])
        return slice(low, high)


class Trie:
    """Make one with `Trie.build`; ask `root`, `children`, `item`, `find`, `below`."""

    def __init__(
        self,
        base: _Levels,
        added: _Levels,
        gone: tuple[np.ndarray, ...],
        sizes: tuple[int, ...],
    ) -> None:
        self._base, self._added, self.sizes = base, added, sizes
        self._gone = gone  # S masks (n_{d+1},): is nothing left below this node of the base? Or empty.
        self.root = np.int64(1 | (1 << 32)) if len(added.item) else np.int64(1)

    @classmethod
    def build(cls, codes: np.ndarray, sizes: Sequence[int], alive: np.ndarray | None = None) -> Trie:
        """The trie of codes (N, S), row i being dense item i, of the rows that are `alive` (N,).

        Raises DataError where two rows are equal or a code is out of its range.
        """
        sizes = tuple(int(size) for size in sizes)
        codes = _require_codes(codes, sizes)
        items = np.arange(len(codes)) if alive is None else np.flatnonzero(alive)
        codes = codes if alive is None else codes[alive]
        return cls(_Levels.build(codes, items, sizes), _empty(sizes), (), sizes)

    def __len__(self) -> int:
        gone = int(self._gone[-1].sum()) if self._gone else 0
        return len(self._base.item) - gone + len(self._added.item)

    @property
    def depth(self) -> int:
        """S, the length of an ID."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + self._added.nbytes + sum(mask.nbytes for mask in self._gone)

    def children(self, nodes: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The codes that may follow, for nodes (M,) int64 that all lie at `depth`, root = 0.

        Returns (offsets (M+1,) int64, code (C,) int32, child (C,) int64): node m owns
        offsets[m]:offsets[m+1], its codes ascending.
        """
        if not 0 <= depth < self.depth:
            raise ConfigError(f"children at depth {depth}", rule=f"Nodes lie at 0 … {self.depth - 1}")
        nodes = np.ascontiguousarray(nodes, np.int64)
        start, code = self._base.start[depth], self._base.code[depth]
        if not self._gone and not len(self._added.item):
            return _children(nodes, start, code)
        gone = self._gone[depth] if self._gone else np.zeros(0, bool)
        return _merged(nodes, start, code, gone, self._added.start[depth], self._added.code[depth])

    def item(self, leaves: np.ndarray) -> np.ndarray:
        """(M,) int64 dense items of nodes at depth S."""
        leaves = np.asarray(leaves, np.int64)
        return _items(leaves, self._base.item, self._added.item)

    def find(self, prefixes: np.ndarray) -> np.ndarray:
        """(M,) int64: the node of each prefix (M, d), d ≤ S; −1 where no item has that prefix."""
        prefixes = np.asarray(prefixes)
        if prefixes.ndim != 2 or prefixes.shape[1] > self.depth:
            raise DataError(f"prefixes of shape {prefixes.shape}", rule=f"An ID has {self.depth} codes")
        base, added = np.zeros(len(prefixes), np.int64), np.zeros(len(prefixes), np.int64)
        base_here = np.ones(len(prefixes), bool)
        added_here = np.full(len(prefixes), len(self._added.item) > 0)
        for d, code in enumerate(prefixes.T.astype(np.int64)):
            _descend(base, base_here, code, self._base.start[d], self._base.code[d])
            _descend(added, added_here, code, self._added.start[d], self._added.code[d])
            if self._gone:
                base_here &= ~self._gone[d][np.where(base_here, base, 0)] if len(self._gone[d]) else False
        node = np.where(base_here, base + 1, 0) | np.where(added_here, added + 1, 0) << 32
        return np.where(node == 0, -1, node)

    def below(self, node: int, depth: int) -> np.ndarray:
        """Ascending dense items (n,) int64 whose ID goes through a node of `depth`."""
        base, added = (int(node) & LOW) - 1, (int(node) >> 32) - 1
        parts = []
        if base >= 0:
            leaves = self._base.leaves(base, depth)
            items = self._base.item[leaves]
            parts.append(items[~self._gone[-1][leaves]] if self._gone else items)
        if added >= 0:
            parts.append(self._added.item[self._added.leaves(added, depth)])
        return np.sort(np.concatenate(parts)).astype(np.int64)

    def count(self, nodes: np.ndarray, depth: int) -> np.ndarray:
        """(M,) int64: how many items lie below each of nodes (M,) at `depth`."""
        nodes = np.asarray(nodes, np.int64)
        counts = np.zeros(len(nodes), np.int64)
        for levels, at in ((self._base, (nodes & LOW) - 1), (self._added, (nodes >> 32) - 1)):
            there = at >= 0
            low, high = at[there], at[there] + 1
            for start in levels.start[depth:]:
                low, high = start[low].astype(np.int64), start[high].astype(np.int64)
            counts[there] += high - low
            if levels is self._base and self._gone:
                removed = np.concatenate([[0], np.cumsum(self._gone[-1])])
                counts[there] -= removed[high] - removed[low]
        return counts

    def add(self, codes: np.ndarray, items: np.ndarray, sizes: Sequence[int] | None = None) -> Trie:
        """With dense items (M,) under codes (M, S); `sizes` where they have grown since.

        Costs a sort of what was added since the last `merge`. Raises DataError where an ID is taken.
        """
        sizes = self.sizes if sizes is None else tuple(int(size) for size in sizes)
        codes = _require_codes(codes, sizes)
        taken = int((self.find(codes) != -1).sum())
        if taken:
            raise DataError(f"{taken} IDs that the trie already holds", rule="Semantic IDs are unique")
        codes = np.concatenate([self._added.codes(), codes])
        items = np.concatenate([self._added.item, np.asarray(items)])
        return Trie(self._base, _Levels.build(codes, items, sizes), self._gone, sizes)

    def remove(self, items: np.ndarray) -> Trie:
        """Without these dense items; a prefix that nothing is left below is allowed no more.

        Costs one pass over the items' array. Items that are not there are passed over.
        """
        stays = ~np.isin(self._added.item, items)
        added = self._added
        if not stays.all():
            added = _Levels.build(added.codes()[stays], added.item[stays], self.sizes)
        gone = [mask.copy() for mask in self._gone] or [np.zeros(len(c), bool) for c in self._base.code]
        nodes = np.flatnonzero(np.isin(self._base.item, items))
        gone[-1][nodes] = True
        for depth in range(self.depth - 1, 0, -1):
            start = self._base.start[depth]
            nodes = np.unique(np.searchsorted(start, nodes, side="right") - 1)
            gone[depth - 1][nodes] = _all_gone(nodes, start, gone[depth])
        return Trie(self._base, added, tuple(gone), self.sizes)

    def merge(self) -> Trie:
        """The same items in one set of arrays: as small and as fast as one built anew."""
        stays = ~self._gone[-1] if self._gone else np.ones(len(self._base.item), bool)
        codes = np.concatenate([self._base.codes()[stays], self._added.codes()])
        items = np.concatenate([self._base.item[stays], self._added.item])
        return Trie(_Levels.build(codes, items, self.sizes), _empty(self.sizes), (), self.sizes)


def _empty(sizes: tuple[int, ...]) -> _Levels:
    return _Levels.build(np.empty((0, len(sizes)), np.int32), np.empty(0, np.int32), sizes)


def _require_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        raise DataError(f"codes of shape {codes.shape}", rule=f"An ID has {len(sizes)} codes")
    for position, size in enumerate(sizes):
        column = codes[:, position]
        if column.size and (column.min() < 0 or column.max() >= size):
            raise DataError(
                f"codes {column.min()} … {column.max()} at position {position}",
                rule=f"Position {position} has the codes 0 … {size - 1}",
            )
    return codes


def _lexicographic(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(N,) the order that sorts the rows; one sort of packed integers where they fit in 63 bits."""
    if np.prod([float(size) for size in sizes]) >= 2**62:
        return np.lexsort(codes.T[::-1])
    key = np.zeros(len(codes), np.int64)
    for position, size in enumerate(sizes):
        key *= size
        key += codes[:, position]
    return np.argsort(key)


@numba.njit(cache=True)
def _descend(node, here, code, start, codes):  # type: ignore[no-untyped-def]
    """Move each node (M,) that is `here` to its child by `code`, in place; not here where it has none."""
    for m in range(len(node)):
        if here[m]:
            low, high = np.int64(start[node[m]]), np.int64(start[node[m] + 1])
            end = high
            while low < high:
                middle = (low + high) // 2
                if np.int64(codes[middle]) < code[m]:
                    low = middle + 1
                else:
                    high = middle
            here[m] = low < end and np.int64(codes[low]) == code[m]
            node[m] = low if here[m] else 0


@numba.njit(cache=True)
def _children(nodes, start, code):  # type: ignore[no-untyped-def]
    offsets = np.zeros(len(nodes) + 1, np.int64)
    for m in range(len(nodes)):
        i = nodes[m] - 1
        offsets[m + 1] = offsets[m] + np.int64(start[i + 1]) - np.int64(start[i])
    out_code, out_child = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.int64)
    for m in range(len(nodes)):
        low = np.int64(start[nodes[m] - 1])
        for j in range(offsets[m + 1] - offsets[m]):
            out_code[offsets[m] + j] = code[low + j]
            out_child[offsets[m] + j] = low + j + 1
    return offsets, out_code, out_child


@numba.njit(cache=True)
def _merged(nodes, start, code, gone, added_start, added_code):  # type: ignore[no-untyped-def]
    masked, most = len(gone) > 0, np.int64(0)
    for m in range(len(nodes)):
        i, j = (nodes[m] & 0xFFFFFFFF) - 1, (nodes[m] >> 32) - 1
        if i >= 0:
            most += np.int64(start[i + 1]) - np.int64(start[i])
        if j >= 0:
            most += np.int64(added_start[j + 1]) - np.int64(added_start[j])
    offsets = np.zeros(len(nodes) + 1, np.int64)
    out_code, out_child = np.empty(most, np.int32), np.empty(most, np.int64)
    count = 0
    for m in range(len(nodes)):
        i, j = (nodes[m] & 0xFFFFFFFF) - 1, (nodes[m] >> 32) - 1
        a = a_end = b = b_end = np.int64(0)
        if i >= 0:
            a, a_end = np.int64(start[i]), np.int64(start[i + 1])
        if j >= 0:
            b, b_end = np.int64(added_start[j]), np.int64(added_start[j + 1])
        while True:  # the base's children up to the next added one, then that one
            until = np.int64(added_code[b]) if b < b_end else np.int64(1) << 40
            while a < a_end and np.int64(code[a]) < until:
                out_code[count] = code[a]
                out_child[count] = a + 1
                count += 0 if masked and gone[a] else 1
                a += 1
            if b == b_end:
                break
            b += 1
            child = b << 32
            if a < a_end and np.int64(code[a]) == until:
                a += 1
                child |= 0 if masked and gone[a - 1] else a
            out_code[count] = until
            out_child[count] = child
            count += 1
        offsets[m + 1] = count
    return offsets, out_code[:count], out_child[:count]


@numba.njit(cache=True)
def _items(leaves, base, added):  # type: ignore[no-untyped-def]
    item = np.empty(len(leaves), np.int64)
    for m in range(len(leaves)):
        low = leaves[m] & 0xFFFFFFFF
        item[m] = base[low - 1] if low else added[(leaves[m] >> 32) - 1]
    return item


@numba.njit(cache=True)
def _all_gone(nodes, start, gone):  # type: ignore[no-untyped-def]
    dead = np.ones(len(nodes), np.bool_)
    for m in range(len(nodes)):
        for child in range(start[nodes[m]], start[nodes[m] + 1]):
            if not gone[child]:
                dead[m] = False
                break
    return dead
