"""Row-wise arithmetic whose result for a row does not depend on the batch that it stands in.

A matrix product may add up a row in another order when the batch has another size, and a code that hangs
on the last bit then flips. These kernels sum in one fixed order, so that an item encodes alone to the
codes that it had in the catalogue. They run at a few GFLOP/s: enough to encode, not to train.
"""

from __future__ import annotations

import numba
import numpy as np


def nearest(points: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """(N,) int32: which row of (V, D) is nearest to each of (N, D); the lowest of equals."""
    return _nearest(_floats(points), _floats(codebook.T))


def affine(points: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(N, H) float32: points (N, D) · weight (H, D)ᵀ + bias (H,)."""
    return _affine(_floats(points), _floats(weight.T), _floats(bias))


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


# The inner loops run over outputs, which lie side by side: vectors of them are added without changing
# the order in which any single one is summed.
@numba.njit(cache=True)
def _nearest(points: np.ndarray, codebook_DV: np.ndarray) -> np.ndarray:
    code = np.empty(len(points), np.int32)
    distance = np.empty(codebook_DV.shape[1], np.float32)
    for n in range(len(points)):
        distance[:] = 0
        for d in range(points.shape[1]):
            x = points[n, d]
            for v in range(len(distance)):
                step = x - codebook_DV[d, v]
                distance[v] += step * step
        code[n] = np.argmin(distance)
    return code


@numba.njit(cache=True)
def _affine(points: np.ndarray, weight_DH: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = np.empty((len(points), len(bias)), np.float32)
    for n in range(len(points)):
        total = out[n]
        total[:] = bias
        for d in range(points.shape[1]):
            x = points[n, d]
            for h in range(len(bias)):
                total[h] += x * weight_DH[d, h]
    return out
