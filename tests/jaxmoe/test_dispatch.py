"""Dispatch and combine, on the reference and on the interpreted kernels."""

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
from tests.check_dispatch import check_combine, check_dispatch, rounding
from tests.check_plan import PLAN_CASES, PLAN_IDS, PlanCase

I32 = jnp.int32
EXPERTS = jnp.array([[2, 0], [0, -1], [1, 2], [2, 1], [0, 1]], I32)
PLAN = jaxmoe.plan_dispatch(EXPERTS, 3, align=4)


@pytest.mark.parametrize("case", PLAN_CASES, ids=PLAN_IDS)
def test_dispatch_and_combine(case: PlanCase, implementation: str, tokens: int | None) -> None:
    experts, expert_map = case.inputs(tokens)
    plan = jaxmoe.plan_dispatch(
        experts,
        case.num_experts,
        align=case.align,
        expert_map=expert_map,
        max_rows=case.max_rows,
        implementation="xla",
    )
    count, slots = plan.rows.shape
    x, weights = normal(0, count, 40, dtype=BF16), normal(1, count, slots)
    check_dispatch(jaxmoe.dispatch(x, plan, implementation=implementation), x, plan)
    rows = normal(2, plan.slots.shape[0], 40, dtype=BF16)
    check_combine(jaxmoe.combine(rows, plan, weights, implementation=implementation), rows, plan, weights)


@pytest.mark.parametrize("width", [1, 7, 64, 1025])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_widths_and_dtypes(dtype: Any, width: int, implementation: str) -> None:
    x, rows = normal(0, 5, width, dtype=dtype), normal(1, PLAN.slots.shape[0], width, dtype=dtype)
    check_dispatch(jaxmoe.dispatch(x, PLAN, implementation=implementation), x, PLAN)
    for weight_dtype in (BF16, F16, F32):
        weights = normal(2, 5, 2, dtype=weight_dtype)
        check_combine(jaxmoe.combine(rows, PLAN, weights, implementation=implementation), rows, PLAN, weights)


def test_there_and_back(implementation: str) -> None:
    """With weights that sum to one over the slots that are kept, combine undoes dispatch."""
    x = normal(0, 5, 33)
    weights = jnp.array([[0.25, 0.75], [1.0, 9.0], [0.5, 0.5], [2.0, -1.0], [0.0, 1.0]])
    rows = jaxmoe.dispatch(x, PLAN, implementation=implementation)
    oracle.same(jaxmoe.combine(rows, PLAN, weights, implementation=implementation), np.asarray(x), rtol=1e-6, atol=1e-6)


def test_nan_stays_where_it_belongs(implementation: str) -> None:
    """A NaN token spoils its own rows; the weight of a dropped pair and rows that hold no token spoil nothing."""
    x = normal(0, 5, 8).at[2].set(jnp.nan)
    rows = jaxmoe.dispatch(x, PLAN, implementation=implementation)
    check_dispatch(rows, x, PLAN)
    weights = normal(1, 5, 2).at[1, 1].set(jnp.nan)
    rows = jnp.where((PLAN.slots < 0)[:, None], jnp.nan, rows)
    y = jaxmoe.combine(rows, PLAN, weights, implementation=implementation)
    assert np.isnan(np.asarray(y)).any(axis=1).tolist() == [False, False, True, False, False]


def test_strided_rows(implementation: str) -> None:
    wide = normal(0, 5, 50).at[:, :9].set(jnp.nan).at[:, 41:].set(jnp.nan)
    check_dispatch(
        jaxmoe.dispatch(jaxmoe.Columns(wide, 9, 32), PLAN, implementation=implementation), wide[:, 9:41], PLAN
    )
    tall = normal(1, PLAN.slots.shape[0], 50).at[:, :9].set(jnp.nan).at[:, 41:].set(jnp.nan)
    weights = normal(2, 5, 2)
    y = jaxmoe.combine(jaxmoe.Columns(tall, 9, 32), PLAN, weights, implementation=implementation)
    check_combine(y, tall[:, 9:41], PLAN, weights)


def test_out_is_donated_and_filled(implementation: str) -> None:
    x, rows, weights = normal(0, 5, 40), normal(1, PLAN.slots.shape[0], 40), normal(2, 5, 2)
    out = jnp.full((PLAN.slots.shape[0], 40), jnp.nan, F32)
    address = out.unsafe_buffer_pointer()
    got = jaxmoe.dispatch(x, PLAN, out=out, implementation=implementation)
    check_dispatch(got, x, PLAN)
    assert out.is_deleted()
    with pytest.raises(ValueError, match="out: expected a buffer to write to, got an array that has been donated"):
        jaxmoe.dispatch(x, PLAN, out=out, implementation=implementation)
    assert got.unsafe_buffer_pointer() == address

    out = jnp.full((5, 40), jnp.nan, F32)
    address = out.unsafe_buffer_pointer()
    got = jaxmoe.combine(rows, PLAN, weights, out=out, implementation=implementation)
    check_combine(got, rows, PLAN, weights)
    assert out.is_deleted()
    assert got.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients(dtype: Any, implementation: str) -> None:
    """Against the plan written as a matrix of zeros and ones, differentiated by hand."""
    x, rows = normal(0, 5, 40, dtype=dtype), normal(1, PLAN.slots.shape[0], 40, dtype=dtype)
    weights = normal(2, 5, 2)
    moves = np.zeros((PLAN.slots.shape[0], 5, 2))  # row, token, slot
    for t, j in np.argwhere(np.asarray(PLAN.rows) >= 0):
        moves[PLAN.rows[t, j], t, j] = 1

    up = normal(3, PLAN.slots.shape[0], 40, dtype=dtype)
    _, pull = jax.vjp(lambda x: jaxmoe.dispatch(x, PLAN, implementation=implementation), x)
    (dx,) = pull(up)
    want = np.einsum("rtj,rh->th", moves, np.asarray(up, np.float64))
    assert dx.dtype == dtype
    oracle.same(dx, want, **rounding(dtype))
    with pytest.raises(AssertionError):
        oracle.same(jnp.zeros_like(dx), want, **rounding(dtype))

    up = normal(4, 5, 40, dtype=dtype)
    _, pull = jax.vjp(lambda r, w: jaxmoe.combine(r, PLAN, w, implementation=implementation), rows, weights)
    drows, dweights = pull(up)
    assert (drows.dtype, dweights.dtype) == (dtype, weights.dtype)
    exact = np.asarray(up, np.float64)
    oracle.same(drows, np.einsum("rtj,tj,th->rh", moves, np.asarray(weights, np.float64), exact), **rounding(dtype))
    oracle.same(dweights, np.einsum("rtj,rh,th->tj", moves, np.asarray(rows, np.float64), exact), rtol=1e-5, atol=1e-5)


def test_vmap_and_jit(implementation: str) -> None:
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 6, 2)), I32)
    x, weights = normal(0, 3, 6, 16), normal(1, 3, 6, 2)
    plan = functools.partial(jaxmoe.plan_dispatch, num_experts=4, implementation=implementation)

    @jax.jit
    @jax.vmap
    def there_and_back(experts: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
        p = plan(experts)
        return jaxmoe.combine(
            jaxmoe.dispatch(x, p, implementation=implementation), p, weights, implementation=implementation
        )

    want = np.asarray(weights, np.float64).sum(axis=2)[:, :, None] * np.asarray(x, np.float64)
    oracle.same(there_and_back(experts, x, weights), want, rtol=1e-5, atol=1e-5)


def test_under_x64(implementation: str) -> None:
    """64-bit mode must not widen an index, nor a sum."""
    with jax.enable_x64(True):
        x, rows, weights = normal(0, 5, 40), normal(1, PLAN.slots.shape[0], 40), normal(2, 5, 2)
        check_dispatch(jaxmoe.dispatch(x, PLAN, implementation=implementation), x, PLAN)
        combine = functools.partial(jaxmoe.combine, plan=PLAN, implementation=implementation)
        y, pull = jax.vjp(lambda r, w: combine(r, weights=w), rows, weights)
        check_combine(y, rows, PLAN, weights)
        assert [g.dtype for g in pull(y)] == [F32, F32]


def test_checks_reject_wrong_results() -> None:
    x, rows, weights = normal(0, 5, 40), normal(1, PLAN.slots.shape[0], 40), normal(2, 5, 2)
    good, y = jaxmoe.dispatch(x, PLAN), jaxmoe.combine(rows, PLAN, weights)
    swapped = PLAN._replace(rows=PLAN.rows[:, ::-1])
    for wrong in (jnp.zeros_like(good), good[::-1], good.at[0, 0].add(1e-3)):
        with pytest.raises(AssertionError):
            check_dispatch(wrong, x, PLAN)
    for wrong in (jnp.zeros_like(y), y[::-1], y * 1.001, jaxmoe.combine(rows, swapped, weights)):
        with pytest.raises(AssertionError):
            check_combine(wrong, rows, PLAN, weights)


X, ROWS, WEIGHTS = normal(0, 5, 8), normal(1, PLAN.slots.shape[0], 8), normal(2, 5, 2)
VIEW = jaxmoe.Columns(X, 0, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxmoe.dispatch(X[0], PLAN), r"x: expected .*\[5, H\], got float32\[8\]"),
        (lambda: jaxmoe.dispatch(X[:4], PLAN), r"x: expected .*\[5, H\], got float32\[4, 8\]"),
        (lambda: jaxmoe.dispatch(X.astype(I32), PLAN), r"x: expected bfloat16 or float16 or float32"),
        (lambda: jaxmoe.dispatch(X, PLAN.rows), r"plan: expected a DispatchPlan, got"),
        (lambda: jaxmoe.dispatch(X, tuple(PLAN)), r"plan: expected a DispatchPlan, got tuple"),
        (lambda: jaxmoe.combine(ROWS, tuple(PLAN), WEIGHTS), r"plan: expected a DispatchPlan, got tuple"),
        (lambda: jaxmoe.dispatch(X, PLAN._replace(slots=VIEW)), r"plan.slots: expected an array .*, got Columns"),
        (
            lambda: jaxmoe.dispatch(X, PLAN._replace(group_sizes=X)),
            r"plan.group_sizes: expected int32 \[num_experts\], got float32\[5, 8\]",
        ),
        (lambda: jaxmoe.dispatch(jaxmoe.Columns(X[0], 0, 4), PLAN), r"x: expected .*\[T, stride\], got float32\[8\]"),
        (
            lambda: jaxmoe.dispatch(X, PLAN, out=np.zeros(ROWS.shape, np.float32)),
            r"out: expected a jax.Array to write to, got ndarray",
        ),
        (
            lambda: jaxmoe.dispatch(X, PLAN, out=jaxmoe.Columns(ROWS, 0, 8)),
            r"out: expected an array float32 \[\d+, 8\], got Columns",
        ),
        (
            lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS, out=np.zeros(X.shape, np.float32)),
            r"out: expected a jax.Array to write to, got ndarray",
        ),
        (
            lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS, out=VIEW),
            r"out: expected an array float32 \[5, 8\], got Columns",
        ),
        (lambda: jaxmoe.combine(ROWS, PLAN, jaxmoe.Columns(X, 0, 2)), r"weights: expected an array .*, got Columns"),
        (lambda: jaxmoe.dispatch(X, PLAN._replace(rows=X)), r"plan.rows: expected int32 \[T, S\], got float32"),
        (lambda: jaxmoe.dispatch(X, PLAN, out=ROWS.astype(BF16)), r"out: expected float32 .*, got bfloat16"),
        (lambda: jaxmoe.dispatch(X, PLAN, out=ROWS[1:]), r"out: expected float32 \[\d+, 8\], got float32"),
        (lambda: jaxmoe.combine(ROWS[1:], PLAN, WEIGHTS), r"rows: expected .*, got float32"),
        (lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS[:, :1]), r"weights: expected .*\[5, 2\], got float32\[5, 1\]"),
        (lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS.astype(I32)), r"weights: expected .*, got int32\[5, 2\]"),
        (
            lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS, out=X[:, :4]),
            r"out: expected float32 \[5, 8\], got float32\[5, 4\]",
        ),
        (lambda: jaxmoe.combine(ROWS, PLAN, WEIGHTS, implementation="no"), r"implementation: expected None or one of"),
    ],
)
def test_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
