"""The search over behaviours: each head's ranked list, and the heads' lists merged into one set.

For one request the search streams over the L behaviours once, newest first, in chunks that stay in the
processor's caches: gather the stored keys of a chunk, score them for every candidate and head, and keep what
beats the n-th best so far. Nothing of size L × K is ever written and nothing is sorted but the n winners of a
list, so time is linear in L and memory is K · A · n entries. The scores are α of `tiglon.nn.target_attention`, in float32:

    α = Σ_i q_i k_i + Σ_j table[code_j] + ln size

Every behaviour is scored by the same sequence of operations wherever it stands, so equal behaviours score
equal to the bit, and of equal scores the newest comes first.

Letters: B requests, K candidates, A heads, d width of a head, L behaviours, J cross features, n chosen,
N stored items.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tiglon.errors import ConfigError
from tiglon.threads import spread
from tiglon.types import MISSING, Behaviours

_TILE = 512  # behaviours scored at once: 512 × 16 keys of a head are 32 KiB, the first-level cache
_CHUNK = 16 * _TILE  # behaviours whose keys are gathered at once: 512 KiB a head, the second-level cache
_STRIDE = _TILE + 16  # a power of two between dimensions would put them all into the same cache sets
_BLOCK = 64  # behaviours whose keys are on their way from memory at once
_ROOM = 2  # times n entries a list, so that it is seldom cut back to n
_STEP = 8  # dimensions a pass; d is filled up with zeros to a multiple
_SHARD = 1 << 22  # products of one thread: below, starting a second costs more than it saves
_FEW = 8  # candidates a thread: below, they share what it costs to gather the keys
_EMPTY = np.iinfo(np.int64).min


class Keys(NamedTuple):
    """What the search reads of every item: K_h W^h in one of three storages.

    number: (N, A · d) uint32, the bits of float32; or uint16, those of bfloat16; or int8.
    scale: (N, A) float32, what an int8 of this item and head is worth; (0, A) for the other two.
    """

    number: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, key_NAd: Tensor, storage: str = "float32") -> Keys:
        """Store keys as "float32", "bfloat16" or "int8" (rounded to 1/127 of the largest of item and head)."""
        heads = key_NAd.shape[1]
        key_NAd, none = key_NAd.detach().float().contiguous(), np.empty((0, heads), np.float32)
        if storage == "float32":
            return cls(key_NAd.flatten(1).numpy().view(np.uint32), none)
        if storage == "bfloat16":
            return cls(key_NAd.flatten(1).bfloat16().view(torch.uint16).numpy(), none)
        if storage == "int8":
            scale = key_NAd.abs().amax(dim=-1).clamp(min=1e-30) / 127
            return cls((key_NAd / scale[..., None]).round().to(torch.int8).flatten(1).numpy(), scale.numpy())
        raise ConfigError(
            f"storage '{storage}'", rule="Keys are stored as 'float32', 'bfloat16' or 'int8'", fix="Pick one"
        )

    def __len__(self) -> int:
        return len(self.number)

    @property
    def storage(self) -> str:
        return {4: "float32", 2: "bfloat16", 1: "int8"}[self.number.itemsize]

    @property
    def nbytes(self) -> int:
        return self.number.nbytes + self.scale.nbytes

    def decode(self) -> Tensor:
        """(N, A, d) float32: the numbers that the search computes with."""
        heads = self.scale.shape[1]
        if len(self.scale):
            number = torch.from_numpy(self.number.astype(np.float32)).unflatten(1, (heads, -1))
            return number * torch.from_numpy(self.scale)[..., None]
        bits = self.number.astype(np.uint32) << (16 if self.number.itemsize == 2 else 0)
        return torch.from_numpy(bits.view(np.float32)).unflatten(1, (heads, -1))


def search(
    query_BKAd: Tensor,
    keys: Keys,
    row_BL: Tensor,
    past: Behaviours,
    table_VA: Tensor,
    first_J: Tensor,
    n: int,
) -> tuple[Tensor, Tensor]:
    """Each head's n best behaviours, best first: α (B, K, A, n) float32 and positions (B, K, A, n) int64.

    Where a history holds fewer than n, −inf and −1 stand behind. n is at most L.
    query_BKAd: already divided by √d.   row_BL: which of `keys` a behaviour has; negative counts from the end.
    table_VA: what every code of every cross feature adds to a head's score, one feature after the other.
    first_J: where each feature's codes begin in the table.
    Threads: as many as torch has; the result does not depend on their number.
    """
    B, K, A, d = query_BKAd.shape
    L = past.mask.shape[1]
    n = min(n, L)
    query = torch.nn.functional.pad(query_BKAd.detach().float(), (0, -d % _STEP)).contiguous().numpy()
    table, first = table_VA.detach().float().contiguous().numpy(), first_J.numpy()
    row, code, mask = (x.contiguous().numpy() for x in (row_BL, past.cross, past.mask))
    log_size = np.empty((B, 0), np.float32)
    if past.size is not None:
        log_size = past.size.float().clamp(min=1).log().contiguous().numpy()
    threads = torch.get_num_threads()
    # Several requests keep the threads busy whole. A single one is cut along its candidates, each of whose lists costs
    # much whatever the length; one of few along its history.
    parts = 1 if B > 1 else max(1, min(threads, K * A * d * L // _SHARD))
    shards = 1 if _FEW * parts <= K else parts
    # One kernel for the three storages: the two that are not meant are empty.
    wide, half, small = (
        keys.number if keys.number.dtype == dtype else np.empty((0, A * d), dtype)
        for dtype in (np.uint32, np.uint16, np.int8)
    )
    small = small.reshape(len(small), A, d)
    cuts = np.linspace(0, L, shards + 1).astype(np.int64)
    sides = np.linspace(0, K, parts // shards + 1).astype(np.int64)
    best = np.full((B, shards, K * A, _ROOM * n), _EMPTY)

    def scan(job: int) -> None:
        b, part = divmod(job, parts)
        s, side = (part, 0) if shards == parts else (0, part)
        low, high = sides[side], sides[side + 1]
        _scan(
            query[b, low:high], wide, half, small, keys.scale, row[b], code[b], mask[b], log_size[b], table, first,
            cuts[s], cuts[s + 1], n, best[b, s, low * A : high * A],
        )  # fmt: skip

    spread(B * parts if n and K else 0, scan)
    entry = best.transpose(0, 2, 1, 3).reshape(B, K, A, -1)
    entry.sort(axis=-1)
    entry = entry[..., ::-1][..., :n]
    return torch.from_numpy(_score_of(entry)), torch.from_numpy(_position_of(entry))


def ranked(alpha_BKAL: Tensor, n: int) -> Tensor:
    """Positions (B, K, A, n) of the n best of scores that are already there, by sorting: the definition that
    `search` is held to. −1 where a score is −inf. Of equal scores the newest comes first."""
    newest_first = alpha_BKAL.flip(-1)
    value, index = newest_first.sort(dim=-1, descending=True, stable=True)
    position = alpha_BKAL.shape[-1] - 1 - index
    return position.masked_fill(value == float("-inf"), MISSING)[..., :n]


def merge(position_BKAn: Tensor, n: int) -> Tensor:
    """The heads' ranked lists traversed in turn, duplicates dropped, until n behaviours are found (TWIN §4.3).

    Positions (B, K, min(n, …)) int64 in the order they were found, −1 behind where there are fewer.
    """
    B, K, A, depth = position_BKAn.shape
    width = min(n, A * depth)
    chosen = np.full((B * K, width), MISSING, np.int64)
    if chosen.size:
        lists = position_BKAn.contiguous().numpy().reshape(B * K, A, depth)
        _merge(lists, np.zeros(int(lists.max()) + 1, np.int64), chosen)
    return torch.from_numpy(chosen).view(B, K, width)


@njit(nogil=True, cache=True)
def _merge(lists: np.ndarray, seen: np.ndarray, chosen: np.ndarray) -> None:
    """lists: (R, A, n).   seen: a zero for every position.   chosen: (R, width), filled with −1."""
    rows, heads, depth = lists.shape
    width = chosen.shape[1]
    for r in range(rows):
        found = 0
        for turn in range(depth):
            for a in range(heads):
                at = lists[r, a, turn]
                if at >= 0 and found < width and seen[at] != r + 1:
                    seen[at] = r + 1
                    chosen[r, found] = at
                    found += 1
            if found == width:
                break


# -- the kernel ----------------------------------------------------------------------------------------------
# An entry is a score and a position in one integer: the float's bits, made to grow with it, above the position.
# Entries are unique, and greater means a higher score, or the same and newer.

_NOTHING = int(np.float32(-np.inf).view(np.int32)) ^ 0x7FFFFFFF  # the score −inf


def _score_of(entry: np.ndarray) -> np.ndarray:
    bits = (entry >> 32).astype(np.int32)
    score = np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).astype(np.int32).view(np.float32)
    return np.where(entry == _EMPTY, np.float32(-np.inf), score)


def _position_of(entry: np.ndarray) -> np.ndarray:
    return np.where(entry == _EMPTY, MISSING, entry & 0xFFFFFFFF)


@njit(nogil=True, cache=True)
def _scan(
    query: np.ndarray,
    wide: np.ndarray,
    half: np.ndarray,
    small: np.ndarray,
    scale: np.ndarray,
    row: np.ndarray,
    code: np.ndarray,
    mask: np.ndarray,
    log_size: np.ndarray,
    table: np.ndarray,
    first: np.ndarray,
    begin: int,
    end: int,
    n: int,
    best: np.ndarray,
) -> None:
    """One request: the n greatest entries of each list among positions begin … end, and perhaps more, into
    `best` (K · A, room for more than n)."""
    K, A, d = query.shape
    count = np.zeros(K * A, np.int64)
    least = np.full(K * A, _NOTHING, np.int32)
    block_bits = np.empty((_BLOCK, wide.shape[1]), np.uint32)
    block = block_bits.view(np.float32).reshape(_BLOCK, A, wide.shape[1] // A)
    key = np.zeros((_CHUNK // _TILE, A, d, _STRIDE), np.float32)
    steps = key.reshape(_CHUNK // _TILE, A, d // _STEP, _STEP, _STRIDE)
    bias = np.empty((A, _CHUNK // _TILE, _TILE), np.float32)
    alpha = np.empty((2, _CHUNK // _TILE, _TILE), np.float32)
    bits = alpha.view(np.int32)
    entry = np.empty(best.shape[1] + _CHUNK, np.int64)

    for stop in range(end, begin, -_CHUNK):
        start = max(stop - _CHUNK, begin)
        while stop > start and not mask[stop - 1]:
            stop -= 1
        tiles = (stop - start + _TILE - 1) // _TILE  # none of a chunk of padding
        _load(wide, half, small, scale, row, start, stop, block_bits, block, key)
        _add_bias(code, mask, log_size, table, first, start, stop, bias)
        for a in range(A):
            for k in range(0, K, 2):
                other = min(k + 1, K - 1)
                for tile in range(tiles):
                    _dot(
                        query[k, a],
                        query[other, a],
                        steps[tile, a],
                        bias[a, tile],
                        alpha[0, tile],
                        alpha[1, tile],
                    )
                for c in range(k, other + 1 if tiles else k):
                    at = c * A + a
                    count[at], least[at] = _join(
                        bits[c - k, :tiles], start, least[at], n, best[at], count[at], entry
                    )


@njit(nogil=True, cache=True)
def _join(
    bits: np.ndarray, start: int, least: int, n: int, best: np.ndarray, held: int, entry: np.ndarray
) -> tuple[int, int]:
    """Add to best[:held] a chunk's scores above `least`, of which n are kept; how many are held now, and
    a score that n of them are above.

    bits: (tiles, tile) int32, those of the scores. Every lane of the tiles has a maximum, and the n-th greatest
    of these maxima is a score that n behaviours reach: few others do, and only they are looked at. What is held
    is cut to the n greatest when it outgrows its row.
    """
    greatest, lane = np.full(_TILE, _NOTHING, np.int32), np.empty(_TILE + 1, np.int64)
    for tile in range(len(bits)):
        row = bits[tile]
        for i in range(_TILE):
            row[i] ^= (row[i] >> 31) & 0x7FFFFFFF
            greatest[i] = max(greatest[i], row[i])
    least = _bar(greatest, n, least)
    for i in range(held):
        entry[i] = best[i]
    lanes = 0
    for i in range(_TILE):
        lane[lanes] = i
        lanes += greatest[i] > least
    for tile in range(len(bits)):
        row = bits[tile]
        for i in lane[:lanes]:
            entry[held] = (np.int64(row[i]) << 32) | (start + tile * _TILE + i)
            held += row[i] > least
    if held > len(best):
        _greatest_first(entry, held, n)
        held, least = n, entry[n - 1] >> 32
        best[n:] = _EMPTY
    for i in range(held):
        best[i] = entry[i]
    return held, least


@njit(nogil=True, cache=True)
def _bar(greatest: np.ndarray, n: int, least: int) -> int:
    """The highest number that n of the greatest are above, or one that few more are; at least `least`.

    Halving the range costs a comparison of all a turn, which a processor makes in a few vectors, and has no
    branches that it could not foresee.
    """
    if _above(greatest, np.int32(least)) <= n:
        return least
    low, high = int(least), int(greatest.max())
    while low + 1 < high:
        middle = (low + high) >> 1
        above = _above(greatest, np.int32(middle))
        if above < n:
            high = middle
        else:
            low = middle
            if above <= n + n // 8:
                break
    return low


@njit(nogil=True, cache=True)
def _above(number: np.ndarray, bar: np.int32) -> int:
    found = 0
    for i in range(_TILE):
        found += number[i] > bar
    return found


@njit(nogil=True, cache=True)
def _load(
    wide: np.ndarray,
    half: np.ndarray,
    small: np.ndarray,
    scale: np.ndarray,
    row: np.ndarray,
    start: int,
    stop: int,
    block_bits: np.ndarray,
    block: np.ndarray,
    key: np.ndarray,
) -> None:
    """Gather the chunk's keys as float32, dimension by dimension; dimensions beyond the stored ones stay 0.

    Keys lie all over a table of items, so what takes time is waiting for memory. A block is first copied as it
    lies, short work, so that the processor has many keys under way; then it is turned.
    """
    _, heads, width = block.shape
    count = len(wide) + len(half) + len(small)
    for begin in range(start, stop, _BLOCK):
        size = min(_BLOCK, stop - begin)
        for i in range(size):
            item = row[begin + i]
            item = item if item >= 0 else count + item
            if len(wide):
                for j in range(heads * width):
                    block_bits[i, j] = wide[item, j]
            elif len(half):
                for j in range(heads * width):
                    block_bits[i, j] = np.uint32(half[item, j]) << np.uint32(16)
            else:
                for a in range(heads):
                    for j in range(width):
                        block[i, a, j] = np.float32(small[item, a, j]) * scale[item, a]
        tile, lane = divmod(begin - start, _TILE)
        for a in range(heads):
            for j in range(width):
                into = key[tile, a, j]
                for i in range(size):
                    into[lane + i] = block[i, a, j]


@njit(nogil=True, cache=True)
def _add_bias(
    code: np.ndarray,
    mask: np.ndarray,
    log_size: np.ndarray,
    table: np.ndarray,
    first: np.ndarray,
    start: int,
    stop: int,
    bias: np.ndarray,
) -> None:
    """What the chunk's cross features and sizes add to α, (A, tiles, tile); −inf on padding and past the end."""
    bias[:] = -np.inf
    for i in range(start, stop):
        if not mask[i]:
            continue
        tile, lane = divmod(i - start, _TILE)
        size = log_size[i] if len(log_size) else np.float32(0)
        for a in range(len(bias)):
            bias[a, tile, lane] = size
        for j in range(len(first)):
            added = table[first[j] + code[i, j]]
            for a in range(len(bias)):
                bias[a, tile, lane] += added[a]


# "contract" allows fused multiply-add and nothing else: it never reorders the sum.
@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _dot(
    query: np.ndarray,
    other: np.ndarray,
    steps: np.ndarray,
    bias: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
) -> None:
    """α (tile,) of two candidates for one head; always a whole tile, so that every lane runs the same code."""
    for i in range(_TILE):
        one[i] = two[i] = bias[i]
    for step in range(len(steps)):
        j = step * _STEP
        q0, q1, q2, q3 = query[j], query[j + 1], query[j + 2], query[j + 3]
        q4, q5, q6, q7 = query[j + 4], query[j + 5], query[j + 6], query[j + 7]
        p0, p1, p2, p3 = other[j], other[j + 1], other[j + 2], other[j + 3]
        p4, p5, p6, p7 = other[j + 4], other[j + 5], other[j + 6], other[j + 7]
        key = steps[step]
        for i in range(_TILE):
            x, y = one[i], two[i]
            x += q0 * key[0, i]
            y += p0 * key[0, i]
            x += q1 * key[1, i]
            y += p1 * key[1, i]
            x += q2 * key[2, i]
            y += p2 * key[2, i]
            x += q3 * key[3, i]
            y += p3 * key[3, i]
            x += q4 * key[4, i]
            y += p4 * key[4, i]
            x += q5 * key[5, i]
            y += p5 * key[5, i]
            x += q6 * key[6, i]
            y += p6 * key[6, i]
            x += q7 * key[7, i]
            y += p7 * key[7, i]
            one[i], two[i] = x, y


@njit(nogil=True, cache=True)
def _greatest_first(entry: np.ndarray, held: int, n: int) -> None:
    """Quickselect: the n greatest of entry[:held] come first, the least of them at n − 1."""
    low, high = 0, held - 1
    while low < high:
        x, y, z = entry[low], entry[(low + high) // 2], entry[high]
        pivot = max(min(x, y), min(max(x, y), z))
        i, j = low, high
        while i <= j:
            while entry[i] > pivot:
                i += 1
            while entry[j] < pivot:
                j -= 1
            if i <= j:
                entry[i], entry[j] = entry[j], entry[i]
                i += 1
                j -= 1
        if n - 1 <= j:
            high = j
        elif n - 1 >= i:
            low = i
        else:
            return
