"""What compiled loops over numbers share: eˣ, tanh and σ of vectors, and bits.

eˣ is a polynomial times a power of two, which a processor computes for many numbers at once, and tanh and σ are
quotients of it: all three are within 3e-7 of the true value, tanh and σ in absolute terms, eˣ from e^−87 on.

numba's cache of a compiled loop asks whether the loop's own file has changed, not this one: who edits it deletes
`src/**/__pycache__`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ZERO, HALF, ONE = (np.float32(x) for x in (0, 0.5, 1))
# eˣ = 2ⁿ eᵛ with v = x − n ln 2; ln 2 in two parts, so that nothing is lost when its multiples are taken away.
_LEAST, _LOG2_E = np.float32(-87), np.float32(1 / np.log(2))
_LN2_HIGH = np.float32(np.round(np.log(2) * 1024) / 1024)
_LN2_LOW = np.float32(np.log(2) - np.float64(_LN2_HIGH))
_TAYLOR = tuple(np.float32(1 / math.factorial(k)) for k in range(2, 8))  # of eᵛ: |v| ≤ ½ ln 2 leaves 6e-9


def _bitcast(of: Any, to: Any, llvm: ir.Type) -> Callable[[Any], Any]:
    """The same bits as another type."""

    def same_bits(context: Any, x: Any) -> Any:
        return to(of), lambda context, builder, signature, given: builder.bitcast(given[0], llvm)

    return cast(Callable[[Any], Any], intrinsic(same_bits))


float_of_bits = _bitcast(types.int32, types.float32, ir.FloatType())
bits_of_float = _bitcast(types.float32, types.int32, ir.IntType(32))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def decay(x: np.float32) -> np.float32:
    """eˣ for x ≤ 0, without a branch, so that loops over it run on whole vectors."""
    v = _LEAST if x < _LEAST else x
    n = np.floor(v * _LOG2_E + HALF)
    v = v - n * _LN2_HIGH - n * _LN2_LOW
    p = _TAYLOR[2] + v * (_TAYLOR[3] + v * (_TAYLOR[4] + v * _TAYLOR[5]))
    p = ONE + v * (ONE + v * (_TAYLOR[0] + v * (_TAYLOR[1] + v * p)))
    return p * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def exp_of_negative(x: np.ndarray) -> None:
    """x ← eˣ for x ≤ 0."""
    for i in range(len(x)):
        x[i] = decay(x[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def tanh(x: np.ndarray) -> None:
    """x ← tanh(x) = ± (1 − e^−2|x|) / (1 + e^−2|x|)."""
    for i in range(len(x)):
        e = decay(np.float32(-2) * abs(x[i]))
        x[i] = np.copysign((ONE - e) / (ONE + e), x[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def logistic(x: np.float32) -> np.float32:
    """σ(x): 1 / (1 + e^−|x|), or what is left of one for x < 0."""
    e = decay(-abs(x))
    return (ONE if x >= ZERO else e) / (ONE + e)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def sigmoid(x: np.ndarray) -> None:
    """x ← σ(x)."""
    for i in range(len(x)):
        x[i] = logistic(x[i])
