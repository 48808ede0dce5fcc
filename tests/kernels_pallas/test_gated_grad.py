"""The gradient of the gated activation, against float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import reference
from kernels_pallas.activation import ACTIVATIONS, SLOPES
from kernels_pallas.gated_grad import Config, gated_grad
from tests import oracle
from tests.cases import BF16, F16, F32, normal
from tests.jaxmoe.test_moe import ACTIVATIONS as EXACT

STEP = 1e-5  # of the central differences in float64


def slope(activation: str, x: np.ndarray) -> np.ndarray:
    return (EXACT[activation](x + STEP) - EXACT[activation](x - STEP)) / (2 * STEP)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes(activation: str) -> None:
    """Everywhere, also far out, where they are 0 and 1."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [-80.0, -30.0, 0.0, 30.0, 80.0]]).astype(np.float32)
    want = slope(activation, x.astype(np.float64))
    oracle.same(SLOPES[activation](jnp.asarray(x)), want, rtol=1e-5, atol=2e-6)
    assert jnp.isnan(SLOPES[activation](jnp.float32(jnp.nan)))
    with pytest.raises(AssertionError):
        oracle.same(ACTIVATIONS[activation](jnp.asarray(x)), want, rtol=1e-5, atol=2e-6)


def by_formula(kept: Any, grad: Any, scale: Any, activation: str) -> tuple[np.ndarray, ...]:
    gate, up = np.split(np.asarray(kept, np.float64), 2, axis=1)
    dy, activated = np.asarray(grad, np.float64), EXACT[activation](gate)
    dots = (activated * up * dy).sum(axis=1)
    s = 1.0 if scale is None else np.asarray(scale, np.float64)[:, None]
    dkept = np.concatenate([s * dy * up * slope(activation, gate), s * dy * activated], axis=1)
    return dkept, s * activated * up, *([] if scale is None else [dots])


CASES = {
    "one tile": (9, 16, F32, None),
    "several tiles, the last one ragged": (5, 37, F32, Config(columns=16, num_warps=1)),
    "one row of one column": (1, 1, F32, None),
    "bfloat16": (6, 24, BF16, None),
    "float16": (6, 24, F16, None),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_gated_grad(name: str, activation: str, scaled: bool) -> None:
    """The kernel and the reference: both gradients, hidden, and with a scale its gradient."""
    rows, width, dtype, config = CASES[name]
    kept, grad = normal(0, rows, 2 * width, dtype=dtype), normal(1, rows, width, dtype=dtype)
    scale = normal(2, rows) if scaled else None
    if scaled and rows > 1:
        scale = scale.at[0].set(0.0)  # a row that holds no token
    kernel = functools.partial(gated_grad, activation=activation, config=config, interpret=True)
    want = by_formula(kept, grad, scale, activation)
    rtol, atol = (1e-5, 1e-5) if dtype == F32 else (0.01, 0.01)
    for got in (jax.jit(kernel)(kept, grad, scale), reference.gated_grad(kept, grad, scale, activation=activation)):
        assert [g.dtype for g in got] == [dtype, dtype, F32][: len(want)]
        for g, w in zip(got, want, strict=True):
            oracle.same(g, w, rtol=rtol, atol=atol)
        with pytest.raises(AssertionError):  # gate and up swapped
            oracle.same(jnp.roll(got[0], width, axis=1), want[0], rtol=rtol, atol=atol)
        with pytest.raises(AssertionError):
            oracle.same(jnp.zeros_like(got[1]), want[1], rtol=rtol, atol=atol)
