"""The experts and their gradients, on the reference and on the interpreted kernels, against float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.experts import gated
from kernels_pallas.activation import ACTIVATIONS
from kernels_pallas.grouped_matmul import Config, gated_matmul
from kernels_pallas.launch import runtime_sizes
from tests import oracle
from tests.cases import BF16, F16, F32, normal
from tests.check_plan import PLAN_CASES, PlanCase

I32 = jnp.int32
EXACT: dict[str, Any] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * np.vectorize(math.erfc, otypes=[float])(-x / np.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
SIZES = [(3, 0, 4, 1), (0, 0, 0, 0), (0, 0, 9, 0), (0, 0, 0, 1)]  # of nine rows; the second to last has them all


def inputs(
    sizes: tuple[int, ...], dtype: Any = F32, transposed: bool = False, tokens: int | None = None, rows: int = 9
) -> list[jax.Array]:
    """rows, gate_up, down, group_sizes; with `tokens`, which the GPU gives, that much larger."""
    more, width, inner = (1, 10, 6) if tokens is None else (tokens // 9, 80, 144)
    scale, num = width**-0.5, len(sizes)
    gate_up, down = normal(1, num, width, 2 * inner, scale=scale), normal(2, num, inner, width, scale=scale)
    if transposed:
        gate_up, down = jnp.swapaxes(gate_up, 1, 2), jnp.swapaxes(down, 1, 2)
    floats = [a.astype(dtype) for a in (normal(0, rows * more, width), gate_up, down)]
    return [*floats, jnp.array(sizes, I32) * more]


def exact(rows: Any, gate_up: Any, down: Any, sizes: Any, activation: str, transposed: bool = False) -> np.ndarray:
    rows, gate_up, down = (np.asarray(a, np.float64) for a in (rows, gate_up, down))
    if transposed:
        gate_up, down = np.swapaxes(gate_up, 1, 2), np.swapaxes(down, 1, 2)
    out, first = np.zeros((len(rows), down.shape[2])), 0
    for e, size in enumerate(np.asarray(sizes)):
        gate, up = np.split(rows[first : first + size] @ gate_up[e], 2, axis=1)
        out[first : first + size] = (EXACT[activation](gate) * up) @ down[e]
        first += size
    return out


def rounding(dtype: Any) -> dict[str, float]:
    """In half precision the hidden rows are rounded too; entries are of the order of 1."""
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 0.02, "atol": 6 * float(jnp.finfo(dtype).eps)}


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts(
    sizes: tuple[int, ...], activation: str, transposed: bool, implementation: str, tokens: int | None
) -> None:
    """Uneven groups, no group at all, one that has everything, fewer rows than experts, rows behind the last group."""
    args = inputs(sizes, F32, transposed, tokens)
    got = jaxmoe.experts(*args, activation=activation, transposed=transposed, implementation=implementation)
    oracle.same(got, exact(*args, activation, transposed), **rounding(F32))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision(dtype: Any, implementation: str, tokens: int | None) -> None:
    """And the check is one: zeros, the next expert and a neighbour's rows do not pass it."""
    args = inputs(SIZES[0], dtype, tokens=tokens)
    got = jaxmoe.experts(*args, implementation=implementation)
    want = exact(*args, "silu")
    assert got.dtype == dtype
    oracle.same(got, want, **rounding(dtype))
    swapped = jaxmoe.experts(args[0], jnp.roll(args[1], 1, axis=0), *args[2:], implementation=implementation)
    for wrong in (jnp.zeros_like(got), jnp.roll(got, 1, axis=0), swapped):
        with pytest.raises(AssertionError):
            oracle.same(wrong, want, **rounding(dtype))


@functools.partial(jax.jit, static_argnames=("activation", "transposed", "implementation", "remat"))
def with_gradients(args: Any, up: jax.Array, remat: bool = False, **options: Any) -> tuple[jax.Array, ...]:
    call = lambda *floats: jaxmoe.experts(*floats, args[3], **options)
    out, pull = jax.vjp(jax.checkpoint(call) if remat else call, *args[:3])
    return out, *pull(up)


def exact_gradients(args: Any, up: Any, activation: str, transposed: bool = False) -> list[np.ndarray]:
    """By the chain rule, in float64, the activation's slope by finite differences."""
    rows, gate_up, down, up = (np.asarray(a, np.float64) for a in (*args[:3], up))
    if transposed:
        gate_up, down = np.swapaxes(gate_up, 1, 2), np.swapaxes(down, 1, 2)
    drows, dgate_up, ddown, first = np.zeros_like(rows), np.zeros_like(gate_up), np.zeros_like(down), 0
    act, step = EXACT[activation], 1e-5
    for e, size in enumerate(np.asarray(args[3])):
        mine = slice(first, first + size)
        gate, go_up = np.split(rows[mine] @ gate_up[e], 2, axis=1)
        dhidden = up[mine] @ down[e].T
        slope = (act(gate + step) - act(gate - step)) / (2 * step)
        dboth = np.concatenate([dhidden * go_up * slope, dhidden * act(gate)], axis=1)
        drows[mine], dgate_up[e] = dboth @ gate_up[e].T, rows[mine].T @ dboth
        ddown[e] = (act(gate) * go_up).T @ up[mine]
        first += size
    if transposed:
        dgate_up, ddown = np.swapaxes(dgate_up, 1, 2), np.swapaxes(ddown, 1, 2)
    return [drows, dgate_up, ddown]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_gradients_are_those_of_finite_differences(activation: str) -> None:
    args = inputs(SIZES[0])
    up, step = np.asarray(normal(3, 9, 10), np.float64), 1e-6
    for i, grad in enumerate(exact_gradients(args, up, activation)):
        floats = [np.asarray(a, np.float64) for a in args[:3]]
        numeric = np.zeros_like(grad)
        for at in np.ndindex(*grad.shape):
            ends = []
            for sign in (1, -1):
                moved = floats[i].copy()
                moved[at] += sign * step
                ends.append(np.sum(up * exact(*floats[:i], moved, *floats[i + 1 :], args[3], activation)))
            numeric[at] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("activation", "transposed", "dtype"),
    [("silu", False, F32), ("gelu", True, F32), ("gelu_tanh", False, F32), ("silu", True, BF16)],
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients(
    sizes: tuple[int, ...], activation: str, transposed: bool, dtype: Any, implementation: str, tokens: int | None
) -> None:
    """To rows and both weights, each element; and the result is the one that comes without gradients."""
    args = inputs(sizes, dtype, transposed, tokens)
    up = normal(3, *args[0].shape, dtype=dtype)
    options = {"activation": activation, "transposed": transposed, "implementation": implementation}
    out, *grads = with_gradients(args, up, **options)
    np.testing.assert_array_equal(out, jaxmoe.experts(*args, **options))
    for got, like, want in zip(grads, args, exact_gradients(args, up, activation, transposed), strict=False):
        assert got.dtype == like.dtype
        scale = max(1.0, float(np.abs(want).max()))
        oracle.same(got, want, rtol=rounding(dtype)["rtol"], atol=rounding(dtype)["atol"] * scale)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_under_x64(transposed: bool, implementation: str) -> None:
    """64-bit mode widens neither an index nor a sum, the gradients' included."""
    with jax.enable_x64(True):
        args = inputs(SIZES[0], F32, transposed)
        up = normal(3, *args[0].shape)
        options = {"activation": "silu", "transposed": transposed, "implementation": implementation}
        out, *got = with_gradients(args, up, **options)
    assert {a.dtype for a in (out, *got)} == {jnp.dtype(F32)}
    oracle.same(out, exact(*args, "silu", transposed), **rounding(F32))
    for a, b in zip(got, exact_gradients(args, up, "silu", transposed), strict=True):
        oracle.same(a, b, **rounding(F32))


def test_checkpoint(implementation: str) -> None:
    args, up = inputs(SIZES[0]), normal(3, 9, 10)
    options = {"activation": "silu", "transposed": False, "implementation": implementation}
    for kept, again in zip(with_gradients(args, up, **options), with_gradients(args, up, True, **options), strict=True):
        oracle.same(again, np.asarray(kept, np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 10, 6), (9, 10, 0)], ids=["no rows", "no inner width"])
def test_nothing_to_do(shape: tuple[int, int, int], implementation: str) -> None:
    rows, width, inner = shape
    args = [normal(0, rows, width), normal(1, 2, width, 2 * inner), normal(2, 2, inner, width), jnp.zeros(2, I32)]
    options = {"activation": "silu", "transposed": False, "implementation": implementation}
    out, *grads = with_gradients(args, jnp.ones((rows, width)), **options)
    assert out.shape == (rows, width)
    for got, like in zip((out, *grads), (args[0], *args), strict=False):
        assert got.shape == like.shape
        assert not got.any()


def test_vmap(implementation: str) -> None:
    """Two batches of rows on the same experts."""
    rows, gate_up, down, _ = inputs(SIZES[0])
    rows, sizes = jnp.stack([rows, 2 * rows[::-1]]), jnp.array([SIZES[0], SIZES[2]], I32)
    call = lambda rows, sizes: jaxmoe.experts(rows, gate_up, down, sizes, implementation=implementation)
    for got, r, s in zip(jax.vmap(call)(rows, sizes), rows, sizes, strict=True):
        oracle.same(got, exact(r, gate_up, down, s, "silu"), **rounding(F32))


@pytest.mark.parametrize("last_rows", [0, 8])
@pytest.mark.parametrize("at_run_time", [False, True])
def test_many_tiles(at_run_time: bool, last_rows: int) -> None:
    """The gated kernel with tiles far smaller than the arrays, the number of rows built in or passed."""
    sizes, width, inner = (20, 0, 29), 20, 18  # the last tiles have 4 rows and 13
    rows, gate_up = normal(0, 57, width), normal(1, 3, width, 2 * inner, scale=width**-0.5)
    config = Config(16, columns=16, depth=16, together=4, num_warps=4, num_stages=1, last_rows=last_rows)

    def call() -> Any:
        return gated_matmul(
            rows, gate_up, jnp.array(sizes, I32), activation="silu", keep=True, config=config, interpret=True
        )

    if at_run_time:
        with runtime_sizes() as launched:
            hidden, kept = call()
        assert [names for _, names in launched] == [("num_rows",)]
    else:
        hidden, kept = call()
    ones = np.tile(np.eye(inner), (3, 1, 1))
    oracle.same(hidden, exact(rows, gate_up, ones, sizes, "silu"), **rounding(F32))
    x, w = np.asarray(rows), np.asarray(gate_up)  # not jax's product, which a GPU takes in TF32
    both = np.concatenate([x[:20] @ w[0], x[20:49] @ w[2]])
    oracle.same(kept, np.concatenate([both, np.zeros((8, 2 * inner))]), **rounding(F32))


GATHERED = [
    case
    for case in PLAN_CASES
    if case.why.startswith(
        ("no tokens, al", "one token", "more experts", "negative", "all dropped, al", "aligned to 4")
    )
]


@pytest.mark.parametrize("case", GATHERED, ids=lambda case: case.why)
def test_gathered(case: PlanCase, implementation: str, tokens: int | None) -> None:
    """What the layer does first: the product that gathers tokens is that of dispatched rows, to the bit."""
    ids, _ = case.inputs(tokens)
    plan = jaxmoe.plan_dispatch(ids, case.num_experts, align=case.align, implementation=implementation)
    x, gate_up = normal(0, ids.shape[0], 40, dtype=BF16), normal(1, case.num_experts, 40, 48, dtype=BF16)
    rows, transposed = jaxmoe.dispatch(x, plan, implementation=implementation), case.align > 1
    gate_up = jnp.swapaxes(gate_up, 1, 2) if transposed else gate_up
    static = implementation, "silu", transposed
    for keep in (True, False) if case is GATHERED[-1] else (True,):
        want = gated(static, rows, gate_up, plan.group_sizes, keep=keep)
        got = gated(static, x, gate_up, plan.group_sizes, (plan.rows, plan.slots), keep=keep)
        assert len(got) == len(want) == 1 + keep
        for a, b in zip(got, want, strict=True):
            assert a.dtype == BF16
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_kernel(activation: str) -> None:
    """To float32's precision everywhere; a NaN stays one."""
    x = jnp.concatenate([jnp.linspace(-30, 30, 20001), jnp.array([0.0, -1e-30, 1e-30, -1e4, 1e4])])
    with np.errstate(over="ignore"):
        want = EXACT[activation](np.asarray(x, np.float64))
    oracle.same(ACTIVATIONS[activation](x), want, rtol=4e-7, atol=4e-7)
    assert jnp.isnan(ACTIVATIONS[activation](jnp.float32(jnp.nan)))


ARGS = inputs((4, 5))


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({0: ARGS[0][0]}, {}, r"rows: expected .*\[M, H\], got float32\[10\]"),
        ({1: ARGS[1][:, :9]}, {}, r"gate_up: expected float32 \[E, 10, 2 \* I\], got float32\[2, 9, 12\]"),
        ({}, {"transposed": True}, r"gate_up: expected float32 \[E, 2 \* I, 10\], got float32\[2, 10, 12\]"),
        ({1: ARGS[1][:, :, 1:]}, {}, r"gate_up: expected an even last axis, .* got 11"),
        ({1: ARGS[1][:0]}, {}, r"gate_up: expected at least one element along axis 0"),
        ({2: ARGS[2][:, 1:]}, {}, r"down: expected float32 \[2, 6, 10\], got float32\[2, 5, 10\]"),
        ({2: ARGS[2].astype(BF16)}, {}, r"down: expected float32 .*, got bfloat16"),
        ({3: ARGS[3][1:]}, {}, r"group_sizes: expected int32 \[2\], got int32\[1\]"),
        ({}, {"activation": "relu"}, r"activation: expected one of .*, got 'relu'"),
        ({}, {"activation": ["silu"]}, r"activation: expected one of .*, got \['silu'\]"),
        ({}, {"transposed": 0}, r"transposed: expected a bool, got 0"),
        ({}, {"transposed": (True, 0)}, r"transposed: expected a bool for gate_up and one for down, got \(True, 0\)"),
        ({}, {"transposed": (True,)}, r"transposed: expected a bool for gate_up and one for down, got \(True,\)"),
        ({}, {"transposed": (False, True)}, r"down: expected float32 \[2, 10, 6\], got float32\[2, 6, 10\]"),
        ({}, {"align": 2**20 + 1}, r"align: expected an int from 1 to 1048576, got 1048577"),
        ({}, {"implementation": "no"}, r"implementation: expected None or one of"),
    ],
)
def test_wrong_input(changed: Any, options: Any, message: str) -> None:
    args = [changed.get(i, value) for i, value in enumerate(ARGS)]
    with pytest.raises(ValueError, match=message):
        jaxmoe.experts(*args, **options)
