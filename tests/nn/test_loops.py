"""Curves of compiled loops are the true ones."""

import numpy as np
import torch

from tiglon.nn import loops


def test_the_curves_are_within_rounding():
    x = np.append(np.linspace(-30, 30, 100_001), [0, 1e-30, -1e-6, 1e4, -1e4, np.inf, -np.inf]).astype(
        np.float32
    )
    exact = torch.from_numpy(x).double()
    of_tanh, of_sigmoid, of_exp = x.copy(), x.copy(), -np.abs(x)
    loops.tanh(of_tanh)
    loops.sigmoid(of_sigmoid)
    loops.exp_of_negative(of_exp)
    assert np.abs(of_tanh - exact.tanh().numpy()).max() < 3e-7
    assert np.abs(of_sigmoid - exact.sigmoid().numpy()).max() < 3e-7
    np.testing.assert_allclose(of_exp, (-exact.abs()).clamp(min=-87).exp().numpy(), rtol=3e-7)
    missing = np.full(3, np.nan, np.float32)
    for curve in (loops.sigmoid, loops.tanh, loops.exp_of_negative):
        found = missing.copy()
        curve(found)
        assert np.isnan(found).all()
