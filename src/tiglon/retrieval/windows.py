"""What sequence models train on and answer from: windows of lives, their moments, padded batches.

Letters: E events, B rows, L events of a row, T targets, M items that came before one, A steps of age.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tiglon.data.split import moment_starts
from tiglon.nn.transformer import PADDING
from tiglon.types import Histories, Interactions

AGES = (2, 4, 8, 16, 32)  # moments ago at which the next step of age begins
REMEMBERED = 1_000  # most recent events in which one looks for what was had


class Earlier(NamedTuple):
    """What came before each of T targets, whatever a window holds: every item once.

    item: (T, M) int64.   times: (T, M, A) float32, how often it was had so long ago; 0 where there is no item.
    """

    item: Tensor
    times: Tensor

    @property
    def there(self) -> Tensor:
        """(T, M) bool: where there is an item."""
        return self.times.any(dim=2)


class Batch(NamedTuple):
    """Rows of events, oldest first, padded at the end.

    item, moment: (B, L) int64, moment PADDING where there is no event.   target: (B, L) bool.
    user: (B,) int64, as `Histories.user` has it.
    earlier: of the targets, row by row; None where it is what the rows themselves hold.
    """

    item: Tensor
    moment: Tensor
    target: Tensor
    user: Tensor
    earlier: Earlier | None = None

    def before(self) -> Earlier:
        """What came before each target."""
        return earlier_in_rows(self) if self.earlier is None else self.earlier


def overlapping_windows(offsets: np.ndarray, moment: np.ndarray, window: int) -> np.ndarray:
    """Rows (start, stop, first target) of a log: whole lives, or overlapping halves of long ones.

    Every event is a target once, the first of a life too (from the start state alone); in a life
    longer than `window` it has at least half a window before its moment.
    """
    half = max(window // 2, 1)
    length = np.diff(offsets)
    pieces = np.where(length > 2 * half, -(-length // half) - 1, (length > 0).astype(np.int64))
    life = np.repeat(np.arange(len(length)), pieces)
    number = np.arange(len(life)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = offsets[life] + np.where(number > 0, number + 1, 0) * half
    stop = np.minimum(offsets[life] + (number + 2) * half, offsets[life + 1])
    start = _before(offsets, moment, half)[first] if len(first) else first
    return np.stack([start, stop, first], axis=1)


def windows_of_events(offsets: np.ndarray, moment: np.ndarray, window: int) -> np.ndarray:
    """(E, 3) a row for each event of a log, its only target: (start, stop, target), `window` events before its moment."""
    event = np.arange(offsets[-1])
    return np.stack([_before(offsets, moment, window), event + 1, event], axis=1)


def windows_wanted(windows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Those rows with a target among the wanted events (E,) bool."""
    before = np.concatenate([[0], np.cumsum(wanted)])  # (E+1,)
    return windows[before[windows[:, 1]] > before[windows[:, 2]]]


def _before(offsets: np.ndarray, moment: np.ndarray, many: int) -> np.ndarray:
    """(E,) where the `many` events begin that are before each event's moment, or its life."""
    life = np.repeat(offsets[:-1], np.diff(offsets))
    event = np.arange(len(moment))
    first = np.where((event == life) | (moment != np.roll(moment, 1)), event, 0)
    return np.maximum(life, np.maximum.accumulate(first) - many)


def moments(log: Interactions) -> np.ndarray:
    """(E,) which moment of its user's life each event belongs to, from 0; a basket is one moment."""
    starts = moment_starts(log)
    number = np.zeros(len(log), np.int64)
    number[starts] = 1
    number = np.cumsum(number) - 1
    first = np.searchsorted(log.user, np.arange(len(log.users)))
    return number - number[np.minimum(first, len(log) - 1)][log.user] if len(log) else number


def checksum(*arrays: np.ndarray) -> int:
    """What tells the arrays that a training depends on from others."""
    found = 0
    for array in arrays:
        found = zlib.crc32(array.tobytes(), found)
    return found


def histories_moments(histories: Histories) -> np.ndarray:
    """(T,) the same for histories: 0 is the oldest moment that is there."""
    owner, time = histories.owner, histories.time
    new = np.ones(len(owner), np.int64)
    new[1:] = (owner[1:] != owner[:-1]) | (time[1:] != time[:-1])
    number = np.cumsum(new)
    return (
        number - number[histories.offsets[:-1].clip(max=max(len(number) - 1, 0))][owner]
        if len(number)
        else number
    )


def padded_histories(histories: Histories) -> tuple[Tensor, Tensor, Tensor]:
    """Items and moments (B, L) of histories, padding last, and the present moment (B,) of each user."""
    lengths = histories.lengths
    width = int(lengths.max(initial=0))
    at = histories.offsets[:-1, None] + np.arange(width)
    real = np.arange(width) < lengths[:, None]
    at = np.where(real, at, 0)
    item = np.where(real, histories.item[at], 0) if width else np.zeros(at.shape, np.int64)
    moment = np.where(real, histories_moments(histories)[at], PADDING) if width else item
    now = np.where(real, moment, -1).max(axis=1, initial=-1) + 1
    return torch.from_numpy(item), torch.from_numpy(moment), torch.from_numpy(now)


class WindowBatches(Sequence[Batch]):
    """The batches of one epoch: rows of one width together, in an order drawn by the seed.

    Widths come in steps, and the batches of a width have the same number of rows (or one more): torch
    compiles and keeps a kernel for every shape that it meets, so few shapes are fast and small.
    """

    def __init__(
        self,
        item: np.ndarray,
        moment: np.ndarray,
        wanted: np.ndarray,
        user: np.ndarray,
        windows: np.ndarray,
        targets: int,
        seed: list[int],
    ) -> None:
        self.item, self.moment, self.wanted, self.user = item, moment, wanted, user
        self.windows = windows
        random = np.random.default_rng(seed)
        length = windows[:, 1] - windows[:, 0]
        step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(length, 1))).astype(np.int64) - 3, 0)
        self.width = -(-length // step) * step  # exact up to 8, then to multiples of 2, 4, 8, …
        predicted = windows[:, 1] - windows[:, 2]
        groups: list[np.ndarray] = []
        for width in np.unique(self.width):
            rows = random.permutation(np.flatnonzero(self.width == width))
            groups += np.array_split(rows, -(-int(predicted[rows].sum()) // targets))
        self.groups = [groups[i] for i in random.permutation(len(groups)) if len(groups[i])]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return (self[i] for i in range(*index.indices(len(self))))
        rows = self.groups[index]
        log = (self.item, self.moment, self.wanted, self.user)
        return collate(*log, self.windows[rows], int(self.width[rows[0]]))


def collate(
    item: np.ndarray,
    moment: np.ndarray,
    wanted: np.ndarray,
    user: np.ndarray,
    windows: np.ndarray,
    width: int,
) -> Batch:
    """Rows start, stop, first target (B, 3) of a log's items and moments (E,) → Batch `width` wide.

    wanted: (E,) bool, the events that may be targets.   user: (E,) whose they are.
    """
    start, stop, first = windows.T
    at = start[:, None] + np.arange(width)
    real = at < stop[:, None]
    at = np.where(real, at, start[:, None])
    row_moment = np.where(real, moment[at] - moment[start][:, None], PADDING)
    target = real & (at >= first[:, None]) & wanted[at]
    columns = item[at].astype(np.int64), row_moment.astype(np.int64), target, user[start]
    asked = at[target]
    item_BL, moment_BL, target_BL, user_B = map(torch.from_numpy, columns)
    return Batch(item_BL, moment_BL, target_BL, user_B, earlier(item, moment, user, asked, moment[asked]))


# -- what came before --------------------------------------------------------------------------------------


def earlier(
    item: np.ndarray, moment: np.ndarray, owner: np.ndarray, stop: np.ndarray, now: np.ndarray
) -> Earlier:
    """Of T targets: the events (E,) before number stop[t] that are of the same owner as the one before it or at it,
    and of earlier moments than now[t]; the REMEMBERED most recent of them.

    item, moment, owner: (E,), those of an owner together, oldest first.
    """
    found = _earlier(item, moment, owner, stop, now, np.array(AGES), REMEMBERED)
    return Earlier(*map(torch.from_numpy, found))


def earlier_in_rows(batch: Batch) -> Earlier:
    """The same of a batch's targets, as far as its rows go."""
    row, place = (x.numpy() for x in batch.target.nonzero(as_tuple=True))
    B, L = batch.item.shape
    owner = np.repeat(np.arange(B), L)
    now = batch.moment.numpy()[row, place]
    return earlier(batch.item.numpy().ravel(), batch.moment.numpy().ravel(), owner, row * L + place, now)


def earlier_of(histories: Histories) -> Earlier:
    """The same of B users, asked after all that they did."""
    item, _, now = padded_histories(histories)
    L = item.shape[1] + 1  # with a place for what is asked
    places = np.arange(len(histories)) * L
    at = np.arange(len(histories.item)) + np.repeat(places - histories.offsets[:-1], histories.lengths)
    owner = np.repeat(np.arange(len(histories)), L)
    rows, moment = np.zeros(len(owner), np.int64), np.full(len(owner), PADDING)
    rows[at], moment[at] = histories.item, histories_moments(histories)
    return earlier(rows, moment, owner, places + histories.lengths, now.numpy())


@njit(cache=True)
def _earlier(
    item: np.ndarray,
    moment: np.ndarray,
    owner: np.ndarray,
    stop: np.ndarray,
    now: np.ndarray,
    ages: np.ndarray,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """item (T, M) and times (T, M, A), the newest items first."""
    T = len(stop)
    start, distinct, largest = np.empty(T, np.int64), np.zeros(T, np.int64), 0
    for t in range(T):
        j, left = stop[t] - 1, most
        while j >= 0 and left and owner[j] == owner[stop[t]]:
            if moment[j] < now[t]:
                left -= 1
                largest = max(largest, item[j])
            j -= 1
        start[t] = j + 1
    seen, slot = np.full(largest + 1, -1, np.int64), np.empty(largest + 1, np.int64)
    for t in range(T):
        for j in range(start[t], stop[t]):
            if moment[j] < now[t] and seen[item[j]] != t:
                seen[item[j]] = t
                distinct[t] += 1
    width = distinct.max() if T else 0
    had, times = np.zeros((T, width), np.int64), np.zeros((T, width, len(ages) + 1), np.float32)
    seen[:] = -1
    for t in range(T):
        n = 0
        for j in range(stop[t] - 1, start[t] - 1, -1):
            if moment[j] >= now[t]:
                continue
            i = item[j]
            if seen[i] != t:
                seen[i], slot[i], had[t, n] = t, n, i
                n += 1
            age = 0
            while age < len(ages) and now[t] - moment[j] >= ages[age]:
                age += 1
            times[t, slot[i], age] += 1
    return had, times
