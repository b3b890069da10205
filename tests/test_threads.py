"""Every job runs once, on as many threads as torch has, and what it raises arrives."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tiglon import threads


@pytest.fixture(params=["torch's threads", "a pool"])
def two_threads(request, monkeypatch):
    if request.param == "a pool":
        monkeypatch.setattr(threads, "_OPENMP", None)
    elif threads._OPENMP is None:
        pytest.skip("torch's OpenMP is not GNU's")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_jobs_run_at_the_same_time(two_threads):
    both = threading.Barrier(2, timeout=60)
    threads.spread(2, lambda i: both.wait() and None)


def test_every_job_runs_once_whoever_asks(two_threads):
    def ask(caller):
        done = []
        threads.spread(50, done.append)
        return sorted(done)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [list(range(50))] * 8


def test_what_a_job_raises_reaches_who_asked(two_threads):
    def job(i):
        if i == 3:
            raise KeyError("the third")

    with pytest.raises(KeyError, match="the third"):
        threads.spread(9, job)
    done = []
    threads.spread(2, done.append)
    assert sorted(done) == [0, 1]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("two_threads", ["torch's threads"], indirect=True)  # a pool's locks cannot stand it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_reaches_who_asked(two_threads):
    """Whenever it comes: even before the first job, where ctypes drops what is raised."""
    random, rounds = np.random.default_rng(0), 200
    raised = reached = 0

    def interrupt(*_):
        nonlocal raised
        raised += 1
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while raised < rounds:
            try:
                now = raised
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-4))
                while raised == now:
                    threads.spread(4, lambda i: None)
            except KeyboardInterrupt:
                reached += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert reached > 0.95 * rounds


def test_every_row_is_in_one_part():
    before = torch.get_num_threads()
    try:
        for most in (1, 2):
            torch.set_num_threads(most)
            for n, parts in ((0, 4), (1, 4), (7, 0), (7, 2), (100, 9)):
                done = []
                threads.divide(n, parts, lambda low, high, part, done=done: done.append((part, low, high)))
                assert [i for _, low, high in sorted(done) for i in range(low, high)] == list(range(n))
                assert len(done) <= most
    finally:
        torch.set_num_threads(before)
