import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.data.events import read_interactions
from tiglon.data.split import by_time, check, check_id_order, check_numeric_features, leave_last_out
from tiglon.errors import ConfigError, DataError, LeakageError, SchemaError
from tiglon.types import Interactions, Targets


def random_rows(n: int, seed: int) -> list[tuple[int, int, int]]:
    """n lines of at most 5 users, 6 items and 7 moments: enough for baskets and for short lives."""
    return [tuple(row) for row in np.random.default_rng(seed).integers(0, (5, 6, 7), (n, 3)).tolist()]


ROWS = st.builds(random_rows, st.integers(1, 60), st.integers(0, 10**6))


def log_of(rows, **extra) -> Interactions:
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    return read_interactions(frame.with_columns(**extra))


def asked(targets: Targets) -> dict[int, tuple[list[int], list[int]]]:
    """user → (history, truth) in dense items."""
    return {
        int(user): (history.tolist(), truth.tolist())
        for user, history, truth in zip(targets.user, targets.histories, targets.truth, strict=True)
    }


def lives(log: Interactions) -> dict[int, list[tuple[int, int]]]:
    """user → [(item, time)] in order."""
    rows = list(zip(log.user.tolist(), log.item.tolist(), log.time.tolist(), strict=True))
    return {user: [(i, t) for u, i, t in rows if u == user] for user in range(len(log.users))}


def test_a_log_by_hand():
    rows = [(0, 10, 1), (0, 11, 2), (0, 12, 2), (0, 13, 3), (0, 14, 4), (0, 15, 4), (1, 10, 1), (1, 11, 9)]
    split = leave_last_out(log_of(rows))
    assert asked(split.validation) == {0: ([0, 1, 2], [3])}
    assert asked(split.test) == {0: ([0, 1, 2, 3], [4, 5])}
    assert lives(split.train) == {0: [(0, 1), (1, 2), (2, 2)], 1: [(0, 1), (1, 9)]}
    assert split.skipped == 1
    check(split)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ROWS)
def test_leave_last_out_against_its_definition(rows):
    log = log_of(rows)
    split = leave_last_out(log)
    train, validation, test, skipped = lives(split.train), asked(split.validation), asked(split.test), 0
    for user, life in lives(log).items():
        moments = sorted({time for _, time in life})
        if len(moments) < 3:
            skipped += 1
            assert train[user] == life
            assert user not in validation
            assert user not in test
            continue
        *_, before, last = moments
        assert train[user] == [event for event in life if event[1] < before]
        assert validation[user] == ([i for i, t in life if t < before], [i for i, t in life if t == before])
        assert test[user] == ([i for i, t in life if t < last], [i for i, t in life if t == last])
    assert split.skipped == skipped
    check(split)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ROWS, st.integers(1, 5), st.integers(1, 3))
def test_by_time_against_its_definition(rows, start, window):
    log, stop = log_of(rows), start + window

    def expected(begin, end):
        found = {}
        for user, life in lives(log).items():
            past = [i for i, t in life if t < begin]
            inside = [(i, t) for i, t in life if begin <= t < end]
            if past and inside:
                found[user] = (past, [i for i, t in inside if t == inside[0][1]])
        return found

    validation, test = expected(start, stop), expected(stop, 99)
    if not (validation and test):
        with pytest.raises(DataError, match=r"no (training event|validation user|test user)"):
            by_time(log, start, stop)
        return
    split = by_time(log, start, stop)
    assert asked(split.validation) == validation
    assert asked(split.test) == test
    assert split.skipped == len(log.users) - len(test)
    assert lives(split.train) == {u: [e for e in life if e[1] < start] for u, life in lives(log).items()}
    check(split)


def test_windows_by_hand():
    rows = [(0, 10, 1), (0, 11, 5), (0, 12, 5), (0, 13, 6), (0, 14, 9), (0, 15, 10)]  # in every window
    rows += [(1, 10, 5), (1, 11, 9)]  # no history before the validation
    rows += [(2, 10, 1), (2, 11, 4)]  # training only
    split = by_time(log_of(rows), 5, 9)
    assert asked(split.validation) == {0: ([0], [1, 2])}
    assert asked(split.test) == {0: ([0, 1, 2, 3], [4]), 1: ([0], [1])}
    assert lives(split.train) == {0: [(0, 1)], 1: [], 2: [(0, 1), (1, 4)]}
    assert split.skipped == 1


def test_windows_in_the_wrong_order():
    with pytest.raises(ConfigError, match=r"The test starts after the validation does"):
        by_time(log_of([(0, 0, 0)]), 5, 5)


def test_windows_outside_the_log():
    rows = [(0, item, item) for item in range(6)]
    with pytest.raises(DataError, match=r"no validation user .*The log runs from 0 to 5.*same unit"):
        by_time(log_of(rows), 1_000, 2_000)


# -- leaks -------------------------------------------------------------------------------------------------


def test_a_target_in_training():
    log = log_of([(0, item, item) for item in range(5)])
    split = leave_last_out(log)
    with pytest.raises(
        LeakageError, match=r"2 training events at or after .* validation target, 1 of them the target"
    ):
        check(dataclasses.replace(split, train=log))
    with pytest.raises(
        LeakageError, match=r"1 training events at or after .* test target, 1 of them the target"
    ):
        check(
            dataclasses.replace(
                split, train=log.take(log.time == 4), validation=split.validation.take(slice(0))
            )
        )


def test_a_target_in_its_own_history():
    split = leave_last_out(log_of([(0, item, item) for item in range(5)]))
    split.test.histories.time[-1] = 4  # the moment of the target
    with pytest.raises(LeakageError, match=r"1 users whose history reaches the time of their target"):
        check(split)


def arrivals(ids: np.ndarray) -> list[tuple[int, int, int]]:
    """Item ids[n] first appears at time n and once more later."""
    return [(0, int(item), time) for time, item in enumerate(ids)] + [
        (1, int(item), len(ids) + time) for time, item in enumerate(ids)
    ]


def test_ids_in_order_of_appearance():
    ids = np.arange(50)
    with pytest.raises(
        LeakageError, match=r"column 'item_id' follows the order .* \+1\.000.*renumber it at random"
    ):
        check_id_order(log_of(arrivals(ids)))
    with pytest.raises(LeakageError, match=r"-1\.000"):
        check_id_order(log_of(arrivals(-ids)))
    ids[[3, 20, 31, 44]] = ids[[20, 3, 44, 31]]  # almost
    with pytest.raises(LeakageError):
        check_id_order(log_of(arrivals(ids)))
    check_id_order(log_of(arrivals(np.random.default_rng(0).permutation(50))))
    check_id_order(log_of(arrivals(np.arange(9))))  # too few to tell from chance


def test_numeric_features():
    rows = arrivals(np.random.default_rng(0).permutation(50))
    first = {item: time for _, item, time in reversed(rows)}
    log = log_of(
        rows,
        shelf=pl.Series([first[item] // 2 for _, item, _ in rows]),  # a coarse number given on arrival
        week=pl.Series([time // 7 for _, _, time in rows]),  # changes from event to event: no leak
        price=pl.Series([item * 1.5 for _, item, _ in rows]),
        brand=pl.Series([str(item) for _, item, _ in rows]),
    )
    check_numeric_features(log, ["item_id", "week", "price"])
    with pytest.raises(LeakageError, match=r"column 'shelf'"):
        check_numeric_features(log, ["price", "shelf"])
    with pytest.raises(SchemaError, match=r"no column 'prize'. Did you mean 'price'"):
        check_numeric_features(log, ["prize"])
    with pytest.raises(SchemaError, match=r"column 'brand' of type String"):
        check_numeric_features(log, ["brand"])


def test_string_ids_are_no_numbers():
    with pytest.raises(SchemaError, match=r"item ids that are strings"):
        check_id_order(log_of([(0, "a", 0)]))
