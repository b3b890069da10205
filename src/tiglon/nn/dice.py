"""Dice: an activation that turns where the batch's values are, each channel apart.

Paper: Zhou et al., KDD 2018 (see `ranking/din.py`), §5.2, eq. 9:

    f(s) = p s + (1 − p) α s,   p = σ(x̂),   x̂ = (s − E[s]) / √(Var[s] + ε)

One pass over s for its moments and one for f; back, one for the gradients of s and α and the sums that mean and
variance ask for, and one that adds what those give. Computed in float32, kept as s is given: float32 or bfloat16.
Sums are taken by blocks of rows, in their order, so that no result depends on how many threads there are.

Letters: R rows, F channels, b blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tiglon.nn.loops import ONE, bits_of_float, float_of_bits, logistic
from tiglon.threads import divide

_CELLS = 1 << 15  # numbers of a block: it and what is made of it stay in a core's second-level cache
_SHARD = 1 << 18  # numbers of one thread: below, starting a second costs more than it saves


class Dice(nn.Module):
    """Trained with the mean and variance of the batch's real rows, read with their running means.   width: F."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, momentum: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps  # ε: paper 1e-8
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, s: Tensor, real: Tensor) -> Tensor:
        """s: (…, F), two dimensions or more.   real: bool, broadcasts to (…); what is False there is left out of the statistics."""
        s_RF, real_R, n = s.flatten(0, -2), None, 0
        if s.dtype != torch.bfloat16:
            s_RF = s_RF.float()
        mean, variance = self.mean.clone(), self.variance  # a later step moves the buffer
        if self.training:
            real_R = real.expand(s.shape[:-1]).flatten()
            n = int(real_R.sum())
        if n:
            assert real_R is not None
            mean, variance = _moments(s_RF.detach(), real_R)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        scale = (variance + self.eps).rsqrt()
        return _Dice.apply(s_RF, self.alpha, mean, scale, real_R if n else None).view(s.shape).to(s.dtype)


def _moments(s_RF: Tensor, real_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (F,) over the real rows, from those of every block (Chan et al.)."""
    s, real = _array(s_RF), real_R.numpy()
    rows = _rows(s)
    n_b1 = np.zeros((-(-len(s) // rows), 1))
    mean_bF, square_bF = np.zeros((2, len(n_b1), s.shape[1]), np.float32)
    _by_blocks(s, lambda low, high: _block_moments(s, real, rows, low, high, n_b1, mean_bF, square_bF))
    mean = (n_b1 * mean_bF).sum(axis=0) / n_b1.sum()
    variance = (square_bF + n_b1 * (mean_bF - mean) ** 2).sum(axis=0) / n_b1.sum()
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(variance.astype(np.float32))


class _Dice(torch.autograd.Function):
    """real_R: the rows that mean and scale = 1/√(Var + ε) were taken of, through which the gradient then flows;
    None where they are constants."""

    @staticmethod
    def forward(
        ctx: Any, s_RF: Tensor, alpha: Tensor, mean: Tensor, scale: Tensor, real_R: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(s_RF, alpha, mean, scale, real_R)
        out_RF = torch.empty_like(s_RF, memory_format=torch.contiguous_format)
        s, out = _array(s_RF), _array(out_RF)
        alphas, scales, shifts = _tiled(alpha), _tiled(scale), _tiled(-mean * scale)
        _by_blocks(s, lambda low, high: _forward(s, alphas, scales, shifts, _rows(s), low, high, out))
        return out_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        """With g_x̂ = ∂/∂x̂ of p alone and sums over all rows, each real row's s takes, as in batch normalisation,
        −scale/n · (Σ g_x̂ + x̂ Σ g_x̂ x̂) through mean and scale."""
        s_RF, alpha, mean, scale, real_R = ctx.saved_tensors
        of_s_RF = torch.empty_like(s_RF, memory_format=torch.contiguous_format)
        g, s, of_s = _array(given[0]), _array(s_RF), _array(of_s_RF)
        rows = _rows(s)
        sums_b3F = np.zeros((-(-len(s) // rows), 3, s.shape[1]), np.float32)
        alphas, scales, shifts = _tiled(alpha), _tiled(scale), _tiled(-mean * scale)
        _by_blocks(
            s, lambda low, high: _backward(g, s, alphas, scales, shifts, rows, low, high, of_s, sums_b3F)
        )
        of_alpha, of_x, of_xx = torch.from_numpy(sums_b3F.sum(axis=0, dtype=np.float64)).float()
        if real_R is not None:
            n = int(real_R.sum())
            slope = -(scale**2) * of_xx / n
            level = -scale * of_x / n - slope * mean
            line, real = (slope.numpy(), level.numpy()), real_R.numpy()
            _by_blocks(s, lambda low, high: _add_line(s, real, *line, rows, low, high, of_s))
        return of_s_RF, of_alpha, None, None, None


def _array(x: Tensor) -> np.ndarray:
    """Its numbers, bfloat16 as the int16 of its bits; what is written there is written to a contiguous x."""
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _tile(F: int) -> int:
    """Rows whose numbers fill whole vectors of a processor, so that no loop has a rest."""
    return 64 // math.gcd(F, 64)


def _tiled(x_F: Tensor) -> np.ndarray:
    """What each channel has for each number of a tile."""
    return np.tile(x_F.detach().float().numpy(), _tile(len(x_F)))


def _rows(s_RF: np.ndarray) -> int:
    """Of a block: whole tiles."""
    F = s_RF.shape[1]
    return max(1, _CELLS // (F * _tile(F))) * _tile(F)


def _by_blocks(s_RF: np.ndarray, job: Callable[[int, int], None]) -> None:
    """job(low, high) for runs of blocks."""
    blocks = -(-len(s_RF) // _rows(s_RF))
    divide(blocks, s_RF.size // _SHARD, lambda low, high, _: job(low, high))


# -- compiled --------------------------------------------------------------------------------------------


def _get(x: np.ndarray, i: int) -> np.float32:
    raise NotImplementedError  # compiled only


def _put(x: np.ndarray, i: int, value: np.float32) -> None:
    raise NotImplementedError


@overload(_get, inline="always", strict=False)
def _get_of(x: Any, i: Any) -> Any:
    if x.dtype == types.int16:
        return lambda x, i: float_of_bits(np.int32(x[i]) << np.int32(16))
    return lambda x, i: x[i]


@overload(_put, inline="always", strict=False)
def _put_to(x: Any, i: Any, value: Any) -> Any:
    if x.dtype == types.int16:

        def rounded(x: Any, i: Any, value: Any) -> None:
            """To the nearest, of two as near to the even one; what is no number stays none."""
            bits = bits_of_float(value)
            nearest = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            x[i] = np.int16(nearest if value == value else np.int32(0x7FC0))

        return rounded

    def kept(x: Any, i: Any, value: Any) -> None:
        x[i] = value

    return kept


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _block_moments(
    s_RF: np.ndarray,
    real_R: np.ndarray,
    rows: int,
    low: int,
    high: int,
    n_b1: np.ndarray,
    mean_bF: np.ndarray,
    square_bF: np.ndarray,
) -> None:
    """Of the blocks low:high: real rows, their mean, and the sum of squares about it."""
    F = s_RF.shape[1]
    for b in range(low, high):
        start, stop = b * rows, min((b + 1) * rows, len(s_RF))
        mean, square = mean_bF[b], square_bF[b]
        n = 0
        for r in range(start, stop):
            if real_R[r]:
                n += 1
                s = s_RF[r]
                for f in range(F):
                    mean[f] += _get(s, f)
        n_b1[b, 0] = n
        if n:
            for f in range(F):
                mean[f] /= np.float32(n)
        for r in range(start, stop):
            if real_R[r]:
                s = s_RF[r]
                for f in range(F):
                    away = _get(s, f) - mean[f]
                    square[f] += away * away


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _forward(
    s_RF: np.ndarray,
    alpha: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    rows: int,
    low: int,
    high: int,
    out_RF: np.ndarray,
) -> None:
    """f of the blocks low:high; alpha, scale and shift are tiled, x̂ = scale s + shift."""
    s, out = s_RF.reshape(-1), out_RF.reshape(-1)
    F, size = s_RF.shape[1], len(alpha)
    for start in range(low * rows * F, min(high * rows * F, len(s)), size):
        here, there = s[start : start + size], out[start : start + size]
        for i in range(len(here)):
            x = _get(here, i)
            p = logistic(scale[i] * x + shift[i])
            _put(there, i, (alpha[i] + (ONE - alpha[i]) * p) * x)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _backward(
    g_RF: np.ndarray,
    s_RF: np.ndarray,
    alpha: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    rows: int,
    low: int,
    high: int,
    of_s_RF: np.ndarray,
    sums_b3F: np.ndarray,
) -> None:
    """As if mean and scale were constants; sums of what α takes, of g_x̂, and of g_x̂ x̂, of each block."""
    g, s, of_s = g_RF.reshape(-1), s_RF.reshape(-1), of_s_RF.reshape(-1)
    F, size = s_RF.shape[1], len(alpha)
    sums = np.empty((3, size), np.float32)
    of_alpha, of_x, of_xx = sums[0], sums[1], sums[2]
    for b in range(low, high):
        sums[:] = 0
        for start in range(b * rows * F, min((b + 1) * rows * F, len(s)), size):
            given, here, there = g[start : start + size], s[start : start + size], of_s[start : start + size]
            for i in range(len(here)):
                value, gradient = _get(here, i), _get(given, i)
                x = scale[i] * value + shift[i]
                p = logistic(x)
                rest = ONE - p
                of_alpha[i] += gradient * value * rest
                of_p = gradient * value * (ONE - alpha[i]) * p * rest
                of_x[i] += of_p
                of_xx[i] += of_p * x
                _put(there, i, (alpha[i] + (ONE - alpha[i]) * p) * gradient + of_p * scale[i])
        for i in range(size):
            for j in range(3):
                sums_b3F[b, j, i % F] += sums[j, i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add_line(
    s_RF: np.ndarray,
    real_R: np.ndarray,
    slope: np.ndarray,
    level: np.ndarray,
    rows: int,
    low: int,
    high: int,
    of_s_RF: np.ndarray,
) -> None:
    """of_s += level + slope s in the real rows of the blocks low:high."""
    for r in range(low * rows, min(high * rows, len(s_RF))):
        if real_R[r]:
            s, of_s = s_RF[r], of_s_RF[r]
            for f in range(len(slope)):
                _put(of_s, f, _get(of_s, f) + level[f] + slope[f] * _get(s, f))
