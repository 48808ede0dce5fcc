"""Rows behind the last group that nobody reads: kernels that are told so leave them as they are.

The interpreter makes what nobody wrote NaN, and an array whose buffer is taken over keeps what it held.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch as moves
from kernels_pallas import grouped_matmul as products
from kernels_pallas.dispatch import dispatch
from kernels_pallas.gated_grad import gated_grad
from kernels_pallas.grouped_matmul import gated_matmul, grouped_matmul
from kernels_pallas.plan_dispatch import plan_dispatch
from tests.cases import normal

I32 = jnp.int32
SIZES = [((0, 5, 2), 7), ((3, 0, 0), 3), ((0, 0, 0), 0), ((40, 1, 9), 50)]  # and where the last group ends
ROWS, DEPTH, WIDTH = 50, 24, 20


def whole_and_cut(function: Any, *args: Any, **changed: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each result: with everything written, and with `changed`."""
    found = (jax.jit(functools.partial(function, **how))(*args) for how in ({}, changed))
    whole, cut = (result if isinstance(result, tuple) else (result,) for result in found)
    return [(np.asarray(a), np.asarray(b)) for a, b in zip(whole, cut, strict=True)]


@pytest.mark.parametrize(("transposed", "last_rows"), [(False, 8), (True, 0)])
@pytest.mark.parametrize(("sizes", "end"), SIZES, ids=str)
def test_grouped_matmul(sizes: tuple[int, ...], end: int, transposed: bool, last_rows: int) -> None:
    weight = normal(1, 3, *((WIDTH, DEPTH) if transposed else (DEPTH, WIDTH)))
    config = products.Config(16, 16, 16, 2, num_warps=4, num_stages=2, last_rows=last_rows)
    run = functools.partial(grouped_matmul, transposed=transposed, config=config, interpret=True)
    ((whole, cut),) = whole_and_cut(run, normal(0, ROWS, DEPTH), weight, jnp.array(sizes, I32), clear=False)
    np.testing.assert_array_equal(cut[:end], whole[:end])
    assert end == 0 or whole[:end].all()
    assert not whole[end:].any()
    assert np.isnan(cut[end:]).all()


@pytest.mark.parametrize(("sizes", "end"), SIZES, ids=str)
def test_gated_matmul(sizes: tuple[int, ...], end: int) -> None:
    """Both results; tokens are gathered, and the slots behind the last group are -1."""
    config = products.Config(16, 8, 16, 2, num_warps=4, num_stages=2, last_rows=8)
    slots = jnp.where(jnp.arange(ROWS) < end, jnp.arange(ROWS, dtype=I32), -1)
    how: dict[str, Any] = {"activation": "silu", "keep": True, "slots": slots, "num_slots": 2, "config": config}
    run = functools.partial(gated_matmul, interpret=True, **how)
    args = normal(0, ROWS // 2, DEPTH), normal(1, 3, DEPTH, 2 * WIDTH), jnp.array(sizes, I32)
    for whole, cut in whole_and_cut(run, *args, clear=False):
        np.testing.assert_array_equal(cut[:end], whole[:end])
        assert not whole[end:].any()
        assert np.isnan(cut[end:]).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("end", [0, 1, 7, 9])
def test_gated_grad(end: int, scaled: bool) -> None:
    """Gate and up keep what they held, whose buffer takes the gradients."""
    kept, grad = normal(0, 9, 2 * WIDTH).at[end:].set(7.0), normal(1, 9, WIDTH).at[end:].set(jnp.nan)
    scale = normal(2, 9) if scaled else None
    run = functools.partial(gated_grad, activation="silu", interpret=True)
    results = whole_and_cut(run, kept, grad, scale, end=jnp.array([end], I32))
    assert len(results) == 2 + scaled
    for i, (whole, cut) in enumerate(results):
        np.testing.assert_array_equal(cut[:end], whole[:end])
        assert (cut[end:] == 7).all() if i == 0 else np.isnan(cut[end:]).all()


@pytest.mark.parametrize(("align", "clear_rows"), [(1, 4), (4, 8), (16, 4), (16, 32)])
def test_dispatch(align: int, clear_rows: int) -> None:
    """Rows that fill groups up are cleared; nothing is written behind the last group."""
    ids = np.random.default_rng(0).integers(-2, 3, (21, 2)).astype(np.int32)
    rows, slots, sizes = plan_dispatch(jnp.asarray(ids), None, num_experts=3, align=align, interpret=True)
    end = int(sizes.sum())
    assert end < len(slots)
    config = moves.Config(columns=16, clear_rows=clear_rows, num_warps=1)
    run = functools.partial(dispatch, config=config, interpret=True)
    ((whole, cut),) = whole_and_cut(run, normal(0, 21, WIDTH), rows, slots, end=jnp.array([end], I32))
    np.testing.assert_array_equal(cut[:end], whole[:end])
    assert (whole[:end] == 0).all(axis=1).sum() == (np.asarray(slots[:end]) < 0).sum()
    assert not whole[end:].any()
    assert np.isnan(cut[end:]).all()
