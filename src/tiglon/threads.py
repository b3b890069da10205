"""Compiled loops on several threads: those that torch has already.

divide(len(rows), 4, lambda low, high, part: kernel(rows[low:high], out[low:high]))
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch


def spread(n: int, job: Callable[[int], None]) -> None:
    """job(i) for i in range(n), on as many threads as torch has; what is compiled with `nogil` runs at the same time.

    The threads are torch's own where its OpenMP is GNU's: after an operation of torch they wait in a loop for the
    next one, some milliseconds long, and would hold the cores that other threads ask for. What a job raises is
    raised here. Modes of torch such as `no_grad` are the caller's alone.
    """
    threads = min(torch.get_num_threads(), n)
    if threads <= 1 or sys.is_finalizing():
        for i in range(n):
            job(i)
        return
    caller, numbers = threading.get_ident(), itertools.count()
    errors, finished = list[BaseException](), False

    def work(_: Any = None) -> None:
        nonlocal finished
        try:
            while not errors and (i := next(numbers)) < n:
                job(i)
            if threading.get_ident() == caller:
                finished = True
        except BaseException as error:  # nothing may pass through OpenMP
            errors.append(error)

    if _OPENMP is not None:
        _OPENMP.GOMP_parallel(_Task(work), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(work)
            work()
    try:
        if errors:
            raise errors[0]
        if not finished:  # a signal came between OpenMP and `try`, where ctypes says so and drops it
            raise KeyboardInterrupt
    finally:
        errors.clear()


def divide(n: int, parts: int, job: Callable[[int, int, int], None]) -> None:
    """job(low, high, number of the part) for `parts` of range(n), at most one a thread."""
    parts = max(1, min(torch.get_num_threads(), n, parts))
    cuts = np.linspace(0, n, parts + 1).astype(int).tolist()
    spread(parts, lambda part: job(cuts[part], cuts[part + 1], part))


_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP that comes with torch and is loaded, or None."""
    folder = str(Path(torch.__file__).resolve().parent)
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            paths = {line.split(maxsplit=5)[-1].strip() for line in file if "libgomp" in line}
        path, *others = (path for path in paths if path.startswith((f"{folder}/", f"{folder}.libs/")))
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = [_Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    except (OSError, ValueError, AttributeError):  # no such system, no such file, no such function
        return None
    library.GOMP_parallel.restype = None
    return None if others else library


def _forked() -> None:
    """OpenMP's threads are the parent's."""
    global _OPENMP
    _OPENMP = None


_OPENMP = _openmp()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
