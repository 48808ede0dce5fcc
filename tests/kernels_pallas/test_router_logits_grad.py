"""Every tile and every cut of the tokens of the router's gradients, interpreted; and which of them is taken when."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.router_logits import MOST_SLICES, _parts
from kernels_pallas.router_logits_grad import (
    Config,
    config_for,
    grid_for,
    router_logits_grad_weight,
    router_logits_grad_x,
    slices_for,
    steps_for,
)
from tests import oracle
from tests.cases import BF16, F16, F32, normal

TILE = Config(16, 32, 16, 4, 1)
SHAPES = [(1, 1, 17), (37, 20, 70), (64, 16, 64)]  # tokens, experts, width: one, ragged, tiles exactly


def float64(*arrays: Any) -> list[np.ndarray]:
    return [np.asarray(a, np.float64) for a in arrays]


def close(got: jax.Array, want: np.ndarray, dtype: Any) -> None:
    """A float32 sum of terms of the order of 1, rounded once."""
    assert got.dtype == dtype
    oracle.same(got, want, rtol=max(1e-5, float(jnp.finfo(dtype).eps)), atol=1e-5)


@pytest.mark.parametrize("other", [BF16, F16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("tokens", "experts", "width"), SHAPES)
def test_gradient_of_x(tokens: int, experts: int, width: int, dtype: Any, other: Any) -> None:
    grad, weight = normal(0, tokens, experts), normal(1, experts, width, dtype=other)
    g, w = float64(grad, weight)
    for config in (TILE, None):
        got = router_logits_grad_x(grad, weight, dtype=dtype, config=config, interpret=True)
        close(got, g @ w, dtype)
    if tokens > 1:
        for wrong in (jnp.zeros_like(got), jnp.roll(got, 1, axis=0)):
            with pytest.raises(AssertionError):
                close(wrong, g @ w, dtype)


@pytest.mark.in_ci(slices=lambda slices: slices is not None, dtype=lambda dtype: dtype is BF16)
@pytest.mark.in_ci(slices=3, other=lambda other: other is F16)
@pytest.mark.in_ci(slices=1, other=lambda other: other is F32)
@pytest.mark.parametrize("slices", [1, 3, None])
@pytest.mark.parametrize("other", [BF16, F16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("tokens", "experts", "width"), SHAPES)
def test_gradient_of_weight(tokens: int, experts: int, width: int, dtype: Any, other: Any, slices: int | None) -> None:
    """Rows of x lie in a wider array, of NaN elsewhere; of three slices one may have no tokens."""
    grad, x = normal(0, tokens, experts), normal(1, tokens, width, dtype=other)
    wide = jnp.full((tokens, width + 20), jnp.nan, x.dtype).at[:, 8 : 8 + width].set(x)
    g, x64 = float64(grad, x)
    options = {"column": 8, "width": width, "slices": slices, "interpret": True}
    for config in (TILE, None):
        got = router_logits_grad_weight(grad, wide, dtype=dtype, config=config, **options)
        close(got, g.T @ x64, dtype)
    if experts > 1:
        for wrong in (jnp.zeros_like(got), jnp.roll(got, 1, axis=0)):
            with pytest.raises(AssertionError):
                close(wrong, g.T @ x64, dtype)


def test_parts_are_as_good_as_float32() -> None:
    """Gradients of very different sizes, next to bfloat16, against float64: two parts of them would not do."""
    grad = normal(0, 512, 16) * jnp.exp(3 * normal(1, 512, 1))
    x, weight = normal(2, 512, 64, dtype=BF16), normal(3, 16, 64, dtype=BF16)
    config = Config(16, 64, 64, 4, 1)
    run = lambda x, weight: (
        router_logits_grad_x(grad, weight, dtype=F32, config=config, interpret=True),
        router_logits_grad_weight(grad, x, dtype=F32, config=config, slices=4, interpret=True),
    )
    g, x64, w64 = float64(grad, x, weight)
    two = sum(float64(*_parts(grad)[:2]))
    wants = (g @ w64, two @ w64), (g.T @ x64, two.T @ x64)
    for got, plain, (want, less) in zip(run(x, weight), run(x.astype(F32), weight.astype(F32)), wants, strict=True):
        error, error_of_plain, error_of_two = (np.linalg.norm(a - want) for a in (*float64(got, plain), less))
        assert error < 2 * error_of_plain
        assert error_of_two > 4 * error


@pytest.mark.parametrize("target", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("experts", "width"), [(32, 7168), (256, 7168), (8, 4096), (2048, 64), (1, 1)])
def test_plans(experts: int, width: int, dtype: Any, target: str) -> None:
    """One compilation each, whatever the tokens; slices that hold them all, and sums that 32-bit offsets reach."""
    config = config_for(experts, width, dtype, target, by_token=False)
    for tokens in (1, 2, 31, 32, 33, 63, 64, 65, 100, 512, 1000, 4096, 5000, 40960, 200_000):
        slices = slices_for(tokens, experts, width, config)
        assert 1 <= slices <= MOST_SLICES
        steps, per = -(-tokens // config.depth), steps_for(tokens, slices, config)
        assert (slices - 1) * per < steps <= slices * per, "none is empty"
        x, y = grid_for(experts, width, slices, config)
        assert y == slices
        assert x * config.rows * config.columns >= experts * width
        assert slices == 1 or x * y <= config.programs
        assert slices * experts * width * 4 < 2**31


@pytest.mark.parametrize(
    ("experts", "dtype", "by_token", "tile"),
    [
        (32, BF16, True, (64, 128, 32)),
        (256, BF16, True, (64, 128, 32)),
        (8, BF16, True, (64, 128, 16)),
        (32, BF16, False, (32, 128, 64)),
        (8, BF16, False, (16, 128, 64)),
        (33, BF16, False, (64, 128, 32)),
        (256, BF16, False, (64, 128, 32)),
        (256, F16, True, (32, 64, 32)),
        (256, F32, False, (32, 64, 32)),
    ],
)
def test_tiles(experts: int, dtype: Any, by_token: bool, tile: tuple[int, ...]) -> None:
    """As measured on an H200; without tensor cores smaller ones."""
    config = config_for(experts, 7168, dtype, "cuda", by_token=by_token)
    assert (config.rows, config.columns, config.depth) == tile
    odd = config_for(experts, 7167, dtype, "cuda", by_token=by_token)
    assert odd.columns == 64, "lines that begin anywhere are loaded element by element"
