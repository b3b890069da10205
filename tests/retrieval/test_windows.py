"""Windows of lives: every event is a target once, and what it reads is what an answer would read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiglon.retrieval.windows import overlapping_windows, windows_of_events

# Lives of baskets of so many events each.
LIVES = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=4)


def log_of(lives):
    """Offsets (B+1,) and moments (E,)."""
    moment = [np.repeat(np.arange(len(baskets)), baskets) for baskets in lives]
    return np.cumsum([0, *map(len, moment)]), np.concatenate([np.empty(0, np.int64), *moment])


def past(row, event, moment):
    """The events of a row that a target reads."""
    start, stop, _ = row
    return [e for e in range(start, stop) if moment[e] < moment[event]]


def test_a_row_for_each_event():
    windows = windows_of_events(np.array([0, 3, 3, 6]), np.array([0, 1, 2, 0, 1, 1]), 2)
    assert windows.tolist() == [[0, 1, 0], [0, 2, 1], [0, 3, 2], [3, 4, 3], [3, 5, 4], [3, 6, 5]]


@given(LIVES, st.integers(1, 7))
def test_an_event_reads_what_an_answer_before_its_moment_would(lives, window):
    offsets, moment = log_of(lives)
    windows = windows_of_events(offsets, moment, window)
    assert windows[:, 2].tolist() == list(range(len(moment)))
    for event, row in enumerate(windows.tolist()):
        life = offsets[np.searchsorted(offsets, event, "right") - 1]
        everything = [e for e in range(life, event) if moment[e] < moment[event]]
        assert past(row, event, moment) == everything[-window:]


@given(LIVES, st.integers(1, 9))
def test_overlapping_windows_hold_each_target_once_with_half_a_window_before_it(lives, window):
    offsets, moment = log_of(lives)
    targets = []
    for row in overlapping_windows(offsets, moment, window).tolist():
        start, stop, first = row
        life = offsets[np.searchsorted(offsets, start, "right") - 1]
        assert stop <= offsets[np.searchsorted(offsets, start, "right")]
        for event in range(first, stop):
            before = sum(moment[e] < moment[event] for e in range(life, event))
            assert len(past(row, event, moment)) >= min(before, max(window // 2, 1))
            targets.append(event)
    assert sorted(targets) == list(range(len(moment)))


@pytest.mark.parametrize("window", [1, 4])
def test_no_event_has_no_row(window):
    nothing = np.zeros(3, np.int64), np.empty(0, np.int64)
    assert overlapping_windows(*nothing, window).shape == windows_of_events(*nothing, window).shape == (0, 3)
