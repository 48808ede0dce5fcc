"""The router's matrix product, on the reference and on the interpreted kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from tests import oracle
from tests.cases import BF16, F16, F32, normal


@pytest.mark.parametrize("weight_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_every_pair_of_dtypes(dtype: Any, weight_dtype: Any, implementation: str) -> None:
    x, weight = normal(0, 5, 70, dtype=dtype), normal(1, 13, 70, dtype=weight_dtype)
    got = jaxmoe.router_logits(x, weight, implementation=implementation)
    assert got.dtype == F32
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    oracle.same(got, want, rtol=1e-5, atol=1e-5)  # float32 sums of 70 products; bfloat16 sums would be off by 1e-2
    for wrong in (jnp.zeros_like(got), got[:, ::-1], got.astype(BF16)):
        with pytest.raises(AssertionError):
            oracle.same(wrong, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "experts", "width"), [(0, 4, 8), (1, 1, 1), (1, 160, 16), (70, 3, 257), (17, 72, 40)]
)
def test_shapes(count: int, experts: int, width: int, implementation: str) -> None:
    """No tokens, one of each, sides that are no multiple of a tile."""
    x, weight = normal(0, count, width), normal(1, experts, width)
    got = jaxmoe.router_logits(x, weight, implementation=implementation)
    oracle.same(got, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, rtol=1e-5, atol=1e-4)


def test_strided_rows(implementation: str) -> None:
    wide, weight = normal(0, 5, 50).at[:, :9].set(jnp.nan).at[:, 41:].set(jnp.nan), normal(1, 4, 32)
    got = jaxmoe.router_logits(jaxmoe.Columns(wide, 9, 32), weight, implementation=implementation)
    oracle.same(got, np.asarray(wide[:, 9:41], np.float64) @ np.asarray(weight, np.float64).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F32, BF16)])
def test_gradients(dtype: Any, weight_dtype: Any, implementation: str) -> None:
    x, weight, up = normal(0, 5, 30, dtype=dtype), normal(1, 6, 30, dtype=weight_dtype), normal(2, 5, 6)
    _, pull = jax.vjp(lambda x, w: jaxmoe.router_logits(x, w, implementation=implementation), x, weight)
    dx, dweight = pull(up)
    assert (dx.dtype, dweight.dtype) == (dtype, weight_dtype)
    exact = [np.asarray(a, np.float64) for a in (x, weight, up)]
    tolerance = lambda d: {"rtol": 1e-5 if d == F32 else 4e-3, "atol": 1e-5}
    oracle.same(dx, exact[2] @ exact[1], **tolerance(dtype))
    oracle.same(dweight, exact[2].T @ exact[0], **tolerance(weight_dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("count", "experts", "width"), [(0, 4, 8), (1, 1, 1), (150, 40, 136), (333, 33, 257)], ids=str)
def test_shapes_of_gradients(count: int, experts: int, width: int, dtype: Any, implementation: str) -> None:
    """No tokens, one of each, more than a tile of everything, in slices; x may be a view of columns."""
    wide, weight = normal(0, count, width + 9, dtype=dtype), normal(1, experts, width, dtype=dtype)
    up = normal(2, count, experts)
    call = lambda wide, w: jaxmoe.router_logits(jaxmoe.Columns(wide, 4, width), w, implementation=implementation)
    dwide, dweight = jax.jit(lambda *args: jax.vjp(call, *args[:2])[1](args[2]))(wide, weight, up)
    x64, w64, up64 = (np.asarray(a, np.float64) for a in (wide[:, 4 : 4 + width], weight, up))
    assert (dwide.dtype, dweight.dtype) == (dtype, dtype)
    rtol = 1e-5 if dtype == F32 else 4e-3
    oracle.same(dwide, np.pad(up64 @ w64, ((0, 0), (4, 5))), rtol=rtol, atol=1e-4)
    oracle.same(dweight, up64.T @ x64, rtol=rtol, atol=1e-4)
    if count > 1:
        for wrong in (jnp.zeros_like(dweight), jnp.roll(dweight, 1, axis=0)):
            with pytest.raises(AssertionError):
                oracle.same(wrong, up64.T @ x64, rtol=rtol, atol=1e-4)


def test_second_derivatives(implementation: str) -> None:
    """Of what is linear in the logits, by all of the gradients' own arguments; x a view of columns."""
    arrays = normal(0, 5, 12), normal(1, 4, 8), normal(2, 5, 4)

    def squares(call: Any, wide: Any, weight: Any, up: Any) -> Any:
        view = lambda wide: jaxmoe.Columns(wide, 3, 8)
        dwide, dweight = jax.grad(lambda wide, w: jnp.sum(call(view(wide), w) * up), (0, 1))(wide, weight)
        return jnp.sum(dwide**2) + jnp.sum(dweight**3)

    ours = functools.partial(jaxmoe.router_logits, implementation=implementation)
    plain = lambda x, w: x.array[:, 3:11] @ w.T
    got = jax.grad(functools.partial(squares, ours), (0, 1, 2))(*arrays)
    want = jax.grad(functools.partial(squares, plain), (0, 1, 2))(*arrays)
    for a, b in zip(got, want, strict=True):
        assert jnp.any(b)
        oracle.same(a, np.asarray(b, np.float64), rtol=1e-4, atol=1e-3)


def test_under_x64(implementation: str) -> None:
    """64-bit mode must widen neither an index nor the sum."""
    with jax.enable_x64(True):
        x, weight = normal(0, 5, 30, dtype=BF16), normal(1, 6, 30)
        got, pull = jax.vjp(lambda x, w: jaxmoe.router_logits(x, w, implementation=implementation), x, weight)
        assert got.dtype == F32
        oracle.same(got, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, rtol=1e-5, atol=1e-5)
        assert [g.dtype for g in pull(got)] == [BF16, F32]


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (normal(0, 3, 8), jaxmoe.Columns(normal(1, 4, 9), 0, 8), r"weight: expected an array .*, got Columns"),
        (jaxmoe.Columns(normal(0, 8), 0, 8), normal(1, 4, 8), r"x: expected .*\[T, stride\], got float32\[8\]"),
        (jaxmoe.Columns(normal(0, 3, 9), 0.0, 8), normal(1, 4, 8), r"x: expected columns .* as ints, got first=0.0"),
        (jax.random.split(jax.random.key(0), (3, 8)), normal(1, 4, 8), r"x: expected .*, got key<fry>\[3, 8\]"),
        (normal(0, 8), normal(1, 4, 8), r"x: expected .*\[T, H\], got float32\[8\]"),
        (normal(0, 3, 8), normal(1, 4, 9), r"weight: expected .*\[E, 8\], got float32\[4, 9\]"),
        (normal(0, 3, 8), normal(1, 0, 8), r"weight: expected at least one element along axis 0"),
        (normal(0, 3, 8).astype(jnp.int32), normal(1, 4, 8), r"x: expected bfloat16 or float16 or float32"),
    ],
)
def test_wrong_input(x: jax.Array, weight: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.router_logits(x, weight)
