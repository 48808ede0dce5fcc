"""Grouped matmul and its gradients, on the reference and on the interpreted kernels, against numpy in float64."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from kernels_pallas import grouped_matmul as kernels
from kernels_pallas import grouped_matmul_grad as grad_kernels
from kernels_pallas.launch import runtime_sizes
from tests import oracle
from tests.cases import BF16, F16, F32, normal

I32 = jnp.int32


@dataclass(frozen=True)
class Case:
    """Groups of rows; `rows` of them, so some may lie behind the last group. Alike shapes are compiled once."""

    why: str
    sizes: tuple[int, ...]
    rows: int = 25
    depth: int = 20
    width: int = 12

    def inputs(self, dtype: Any, transposed: bool, tokens: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """With `tokens`, which the GPU gives, groups and weights are that much larger."""
        more, wider = (1, 1) if tokens is None else (tokens // 37, 16)
        depth, width = self.depth * wider, self.width * wider
        shape = (len(self.sizes), width, depth) if transposed else (len(self.sizes), depth, width)
        rows, weight = (
            normal(0, self.rows * more, depth, dtype=dtype),
            normal(1, *shape, dtype=dtype, scale=depth**-0.5),
        )
        return rows, weight, jnp.array(self.sizes, I32) * more


UNEVEN = Case("uneven groups", (3, 17, 4, 1))
BEHIND = Case("rows behind the last group", (5, 2, 0, 9))
CASES = [
    UNEVEN,
    BEHIND,
    Case("empty groups first and last", (0, 12, 13, 0)),
    Case("one huge group", (0, 0, 25, 0)),
    Case("no group has a row", (0, 0, 0, 0)),
    Case("no rows", (0, 0, 0), 0),
    Case("one row", (0, 1, 0), 1),
    Case("fewer rows than experts, odd E", (0, 1, 0, 0, 2, 0, 0, 0, 1), 4),
    Case("sides that are no multiple of anything", (7, 0, 30), 41, 33, 19),
    Case("one expert, a tile exactly", (16,), 16, 16, 16),
    Case("one of everything", (1,), 1, 1, 1),
]
IDS = [case.why for case in CASES]


def product(rows: Any, weight: Any, sizes: Any, transposed: bool = False) -> np.ndarray:
    rows, weight = np.asarray(rows, np.float64), np.asarray(weight, np.float64)
    if transposed:
        weight = np.swapaxes(weight, 1, 2)
    out, first = np.zeros((len(rows), weight.shape[2])), 0
    for e, size in enumerate(np.asarray(sizes)):
        out[first : first + size] = rows[first : first + size] @ weight[e]
        first += size
    return out


def outer(a: Any, b: Any, sizes: Any) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    ends = np.cumsum(np.asarray(sizes))
    return np.stack([a[end - size : end].T @ b[end - size : end] for end, size in zip(ends, sizes, strict=True)])


def close(got: Any, want: np.ndarray, dtype: Any) -> None:
    """Float32 sums, rounded once: entries are of the order of 1, or of the root of the rows that were summed."""
    assert got.dtype == dtype
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    oracle.same(got, want, rtol=max(1e-5, float(jnp.finfo(dtype).eps)), atol=3e-6 * scale)


@functools.partial(jax.jit, static_argnames=("transposed", "implementation"))
def with_gradients(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, up: jax.Array, transposed: bool, implementation: str
) -> tuple[jax.Array, ...]:
    call = functools.partial(jaxmoe.grouped_matmul, transposed=transposed, implementation=implementation)
    out, pull = jax.vjp(call, rows, weight, sizes)
    return out, *pull(up)[:2]


def check(case: Case, dtype: Any, transposed: bool, implementation: str, tokens: int | None) -> None:
    """The product, and both gradients, which are grouped products too: experts without rows get zeros."""
    rows, weight, sizes = case.inputs(dtype, transposed, tokens)
    up = normal(2, rows.shape[0], weight.shape[1 if transposed else 2], dtype=dtype)
    out, drows, dweight = with_gradients(rows, weight, sizes, up, transposed, implementation)
    close(out, product(rows, weight, sizes, transposed), dtype)
    close(drows, product(up, weight, sizes, not transposed), dtype)
    close(dweight, outer(up, rows, sizes) if transposed else outer(rows, up, sizes), dtype)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_grouped_matmul(case: Case, transposed: bool, implementation: str, tokens: int | None) -> None:
    check(case, F32, transposed, implementation, tokens)


@pytest.mark.parametrize(("dtype", "transposed"), [(BF16, False), (BF16, True), (F16, False)])
@pytest.mark.parametrize("case", [UNEVEN, BEHIND], ids=lambda case: case.why)
def test_half_precision(case: Case, dtype: Any, transposed: bool, implementation: str, tokens: int | None) -> None:
    check(case, dtype, transposed, implementation, tokens)


def test_align_may_be_numpys() -> None:
    """What it changes is in tests/kernels_pallas/test_chosen_on_hopper.py."""
    rows, weight, sizes = normal(0, 128, 6), normal(1, 2, 6, 5), jnp.array([64, 64], I32)
    got = jaxmoe.grouped_matmul(rows, weight, sizes, align=np.int64(64))
    np.testing.assert_array_equal(got, jaxmoe.grouped_matmul(rows, weight, sizes))
    stack = normal(2, 2, 6, 8), normal(3, 2, 4, 6)
    got = jaxmoe.experts(rows, *stack, sizes, align=np.int32(64))
    np.testing.assert_array_equal(got, jaxmoe.experts(rows, *stack, sizes))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_check_is_one(dtype: Any) -> None:
    """Zeros, the next expert's weights and the rows of a neighbour do not pass it."""
    rows, weight, sizes = UNEVEN.inputs(dtype, False)
    got, want = jaxmoe.grouped_matmul(rows, weight, sizes), product(rows, weight, sizes)
    close(got, want, dtype)
    swapped = jaxmoe.grouped_matmul(rows, jnp.roll(weight, 1, axis=0), sizes)
    for wrong in (jnp.zeros_like(got), swapped, jnp.roll(got, 1, axis=0)):
        with pytest.raises(AssertionError):
            close(wrong, want, dtype)


def test_rows_of_no_group_change_nothing(implementation: str) -> None:
    """What lies behind the last group may be anything, and so may its gradient. (XLA adds 0 times it: finite there.)"""
    rows, weight, sizes = BEHIND.inputs(F32, False)
    up = normal(2, rows.shape[0], BEHIND.width)
    used = jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes)
    other = 1e30 if implementation == "xla" else jnp.nan
    spoiled, spoiled_up = jnp.where(used, rows, other), jnp.where(used, up, other)
    out, drows, dweight = with_gradients(spoiled, weight, sizes, spoiled_up, False, implementation)
    close(out, product(rows, weight, sizes), F32)
    close(drows, product(up, weight, sizes, True), F32)
    close(dweight, outer(rows, up, sizes), F32)


@pytest.mark.parametrize("weights_differ", [True, False])
def test_vmap(weights_differ: bool, implementation: str) -> None:
    rows, weight, _ = UNEVEN.inputs(F32, False)
    rows, weights = jnp.stack([rows, 2 * rows[::-1]]), jnp.stack([weight, 3 * weight])
    sizes = jnp.array([[3, 17, 4, 1], [0, 2, 20, 0]], I32)
    call = lambda *args: jaxmoe.grouped_matmul(*args, implementation=implementation)
    weights = weights if weights_differ else weights[:1]
    got = jax.vmap(call, in_axes=(0, 0 if weights_differ else None, 0))(
        rows, weights if weights_differ else weights[0], sizes
    )
    for i in range(2):
        close(got[i], product(rows[i], weights[i % len(weights)], sizes[i]), F32)


def test_under_jit_and_x64(implementation: str) -> None:
    """64-bit mode must widen neither an index nor the sum."""
    with jax.enable_x64(True):
        rows, weight, sizes = UNEVEN.inputs(F32, True)
        call = jax.jit(
            lambda *args: jaxmoe.grouped_matmul(*args, sizes, transposed=True, implementation=implementation)
        )
        got, pull = jax.vjp(call, rows, weight)
        close(got, product(rows, weight, sizes, True), F32)
        assert [g.dtype for g in pull(got)] == [F32, F32]


SMALL = kernels.Config(rows=16, columns=16, depth=16, together=4, num_warps=4, num_stages=1)


SMALL_OUTER = grad_kernels.Config(left=16, right=16, rows=16, together=4, num_warps=4, num_stages=1)


@functools.partial(jax.jit, static_argnames=("at_run_time",))
def tiled(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, up: jax.Array, at_run_time: bool
) -> tuple[jax.Array, jax.Array]:
    with runtime_sizes() if at_run_time else contextlib.nullcontext() as launched:
        out = kernels.grouped_matmul(rows, weight, sizes, config=SMALL, interpret=True)
        dweight = grad_kernels.grouped_outer(rows, up, sizes, config=SMALL_OUTER, interpret=True)
    assert not at_run_time or [names for _, names in launched] == [("num_rows",), ("num_rows",)]
    return out, dweight


@pytest.mark.parametrize("at_run_time", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case.rows > 1], ids=lambda case: case.why)
def test_many_tiles(case: Case, at_run_time: bool) -> None:
    """The kernels with tiles far smaller than the arrays, the number of rows built in or passed."""
    rows, weight, sizes = case.inputs(F32, False)
    up = normal(2, rows.shape[0], case.width)
    out, dweight = tiled(rows, weight, sizes, up, at_run_time)
    close(out, product(rows, weight, sizes), F32)
    close(dweight, outer(rows, up, sizes), F32)


def test_a_tile_writes_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later tiles would hide it here, but not on a GPU. What one program leaves alone is NaN in the interpreter."""
    rows, weight, sizes = UNEVEN.inputs(F32, False)
    monkeypatch.setattr(kernels, "grid_for", lambda *_: (1,))
    got = np.asarray(kernels.grouped_matmul(rows, weight, sizes, config=SMALL, interpret=True))
    close(got[:3], product(rows, weight, sizes)[:3], F32)
    assert np.isnan(got[3:]).all()


@pytest.mark.parametrize("sizes", [(9, 3), (0, 40), (40, 0), (2**30, 0), (2**31 - 1, 1)], ids=str)
def test_sizes_past_the_rows_reach_no_other_memory(sizes: tuple[int, ...]) -> None:
    """No promise of what comes out of the rows that are too many: only that those there are right.

    With 32 tiles of columns, by which 2**26 tiles of rows would make a number that wraps.
    """
    rows, weight, _ = Case("", (5, 0), 5, width=512).inputs(F32, False)
    group_sizes = jnp.array(sizes, I32)
    got = kernels.grouped_matmul(rows, weight, group_sizes, config=SMALL, interpret=True)
    close(got, product(rows, weight, [min(5, sizes[0]), 5 - min(5, sizes[0])]), F32)


@pytest.mark.parametrize(("num_rows", "num_experts"), [(1, 1), (1, 7), (5, 3), (64, 3), (65, 3), (300, 1), (97, 40)])
def test_grid_holds_every_tile(num_rows: int, num_experts: int) -> None:
    """However the rows fall into groups, those behind the last one too; and no more programs than that can take."""
    tiles = lambda sizes: int(np.sum(-(-np.asarray(sizes) // SMALL.rows)))
    (programs,) = kernels.grid_for(num_rows, num_experts, SMALL.columns, SMALL)
    rng = np.random.default_rng(0)
    for _ in range(100):
        ends = np.sort(rng.integers(0, num_rows + 1, num_experts))
        assert tiles(np.diff(ends, prepend=0, append=num_rows)) <= programs
    groups = min(num_experts + 1, num_rows)
    assert tiles([num_rows - groups + 1] + [1] * (groups - 1)) == programs
    assert kernels.grid_for(num_rows, num_experts, SMALL.columns + 1, SMALL) == (2 * programs,)


@pytest.mark.parametrize(
    ("tiles", "together", "heights"), [(1, 8, [1]), (8, 8, [8]), (9, 8, [5, 4]), (25, 8, [7, 7, 7, 4])]
)
def test_taking_turns(tiles: int, together: int, heights: list[int]) -> None:
    """Each tile once, as many tiles of rows side by side as said; programs that are too many are past all of them."""
    columns = 3
    order = [
        (row, column)
        for part in np.split(np.arange(tiles), np.cumsum(heights)[:-1])
        for column in range(columns)
        for row in part
    ]
    got = [
        kernels.taking_turns(np.int32(program), np.int32(tiles), columns, together)
        for program in range(tiles * columns + 50)
    ]
    assert [(int(row), int(column)) for row, column in got[: tiles * columns]] == order
    assert all(row >= tiles or column >= columns for row, column in got[tiles * columns :])


X, W, SIZES = normal(0, 5, 4), normal(1, 2, 4, 3), jnp.array([2, 3], I32)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], W, SIZES), {}, r"rows: expected .*\[M, K\], got float32\[4\]"),
        ((X, W[0], SIZES), {}, r"weight: expected float32 \[E, 4, N\], got float32\[4, 3\]"),
        ((X, W, SIZES), {"transposed": True}, r"weight: expected float32 \[E, N, 4\], got float32\[2, 4, 3\]"),
        ((X, W.astype(BF16), SIZES), {}, r"weight: expected float32 .*, got bfloat16"),
        ((X, W[:0], SIZES[:0]), {}, r"weight: expected at least one element along axis 0"),
        ((X, W, SIZES[:1]), {}, r"group_sizes: expected int32 \[2\], got int32\[1\]"),
        ((X, W, SIZES.astype(F32)), {}, r"group_sizes: expected int32 \[2\], got float32\[2\]"),
        ((X, W, SIZES), {"transposed": 1}, r"transposed: expected a bool, got 1"),
        ((X, W, SIZES), {"align": 0}, r"align: expected an int from 1 to 1048576, got 0"),
        ((X, W, SIZES), {"align": True}, r"align: expected an int from 1 to 1048576, got True"),
        ((X, W, SIZES), {"implementation": "no"}, r"implementation: expected None or one of"),
    ],
)
def test_wrong_input(args: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.grouped_matmul(*args, **options)
