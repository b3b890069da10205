"""What compiled loops over numbers share: threads, eˣ, tanh and σ of vectors, and bits.

eˣ is a polynomial times a power of two, which a processor computes for many numbers at once, and tanh and σ are
quotients of it: all three are within 3e-7 of the true value, tanh and σ in absolute terms.

numba's cache of a compiled loop asks whether the loop's own file has changed, not this one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ZERO, HALF, ONE = (np.float32(x) for x in (0, 0.5, 1))
# eˣ = 2ⁿ eᵛ with v = x − n ln 2; ln 2 in two parts, so that nothing is lost when its multiples are taken away.
_LEAST, _LOG2_E = np.float32(-87), np.float32(1 / np.log(2))
_LN2_HIGH = np.float32(np.round(np.log(2) * 1024) / 1024)
_LN2_LOW = np.float32(np.log(2) - np.float64(_LN2_HIGH))
_TAYLOR = tuple(np.float32(1 / math.factorial(k)) for k in range(2, 8))  # of eᵛ: |v| ≤ ½ ln 2 leaves 6e-9


def spread(n: int, job: Callable[[int], None]) -> None:
    """job(i) for i in range(n), on as many threads as torch has; what is compiled with `nogil` runs at the same time.

    The threads are torch's own where its OpenMP is GNU's: after an operation of torch they wait in a loop for the
    next one, some milliseconds long, and would hold the cores that other threads ask for.
    """
    threads = min(torch.get_num_threads(), n)
    if threads <= 1:
        for i in range(n):
            job(i)
        return
    numbers, errors = itertools.count(), list[BaseException]()

    def work(_: Any = None) -> None:
        try:
            while not errors and (i := next(numbers)) < n:
                job(i)
        except BaseException as error:  # nothing may pass through OpenMP; raised below
            errors.append(error)

    if _OPENMP is not None:
        _OPENMP.GOMP_parallel(_Task(work), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(work)
            work()
    if errors:
        raise errors[0]


def divide(n: int, parts: int, job: Callable[[int, int, int], None]) -> None:
    """job(low, high, number of the part) for `parts` of range(n), at most one a thread."""
    parts = max(1, min(torch.get_num_threads(), n, parts))
    cuts = np.linspace(0, n, parts + 1).astype(int).tolist()
    spread(parts, lambda part: job(cuts[part], cuts[part + 1], part))


_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP that torch has loaded; None where it cannot be told, or is another's."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in file if "libgomp" in line}
    except OSError:
        return None
    folder = str(Path(torch.__file__).parent)
    of_torch = [path for path in loaded if path.startswith(folder)]  # …/torch/lib or …/torch.libs
    if len(found := of_torch or list(loaded)) != 1:
        return None
    library = ctypes.CDLL(found[0])
    if not hasattr(library, "GOMP_parallel"):
        return None
    library.GOMP_parallel.argtypes = [_Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


_OPENMP = _openmp()


def _bitcast(of: Any, to: Any, llvm: ir.Type) -> Callable[[Any], Any]:
    """The same bits as another type."""

    def same_bits(context: Any, x: Any) -> Any:
        return to(of), lambda context, builder, signature, given: builder.bitcast(given[0], llvm)

    return cast(Callable[[Any], Any], intrinsic(same_bits))


float_of_bits = _bitcast(types.int32, types.float32, ir.FloatType())
bits_of_float = _bitcast(types.float32, types.int32, ir.IntType(32))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def power(x: np.float32) -> np.float32:
    """eˣ for x ≤ 0, without a branch, so that loops over it run on whole vectors."""
    v = _LEAST if x < _LEAST else x
    n = np.floor(v * _LOG2_E + HALF)
    v = v - n * _LN2_HIGH - n * _LN2_LOW
    p = _TAYLOR[2] + v * (_TAYLOR[3] + v * (_TAYLOR[4] + v * _TAYLOR[5]))
    p = ONE + v * (ONE + v * (_TAYLOR[0] + v * (_TAYLOR[1] + v * p)))
    return p * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def exp(x: np.ndarray) -> None:
    """x ← eˣ for x ≤ 0."""
    for i in range(len(x)):
        x[i] = power(x[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def tanh(x: np.ndarray) -> None:
    """x ← tanh(x) = ± (1 − e^−2|x|) / (1 + e^−2|x|)."""
    for i in range(len(x)):
        e = power(np.float32(-2) * abs(x[i]))
        x[i] = np.copysign((ONE - e) / (ONE + e), x[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def logistic(x: np.float32) -> np.float32:
    """σ(x): 1 / (1 + e^−|x|), or what is left of one for x < 0."""
    e = power(-abs(x))
    return (ONE if x >= ZERO else e) / (ONE + e)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def sigmoid(x: np.ndarray) -> None:
    """x ← σ(x)."""
    for i in range(len(x)):
        x[i] = logistic(x[i])
