"""The gradient of grouped matmul's weights: each expert's rows, transposed, times the gradients of its rows."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.grouped_matmul import dot_add
from kernels_pallas.launch import bounded, iota, launch, load, load_masked, next_power_of_2, remembered, store, within


@dataclass(frozen=True)
class Config:
    left: int  # columns of a in one tile
    right: int  # columns of b
    rows: int  # of one step
    together: int  # tiles of a that go through b's side by side, and so share b in the L2 cache
    num_warps: int
    num_stages: int


@remembered
def config_for(num_rows: int, num_experts: int, left: int, right: int, dtype: Any, target: str) -> Config:
    """Which tile to use for these shapes on this target ("cuda" or "rocm")."""
    if dtype == jnp.float32:  # without tensor cores
        config = Config(64, 64, 16, 8, num_warps=4, num_stages=2)
    elif (left | right) % 8:  # lines that do not begin at 16 bytes are loaded element by element
        config = Config(64, 64, 32, 8, num_warps=4, num_stages=2)
    elif target == "rocm":
        config = Config(128, 128, 64, 8, num_warps=8, num_stages=2)
    elif num_rows <= 256 * num_experts:
        # Few steps a tile: finding the rows, the first loads and the store take as long. So programs are small enough
        # for three on a multiprocessor, where one waits while another multiplies. Measured on an H200.
        config = Config(128, 128, 32, 4, num_warps=4, num_stages=3)
    else:
        config = Config(128, 256, 64, 8, num_warps=8, num_stages=3)
    return dataclasses.replace(
        config,
        left=min(config.left, max(16, next_power_of_2(left))),
        right=min(config.right, max(16, next_power_of_2(right))),
    )


@remembered
def grid_for(num_experts: int, left: int, right: int, config: Config) -> tuple[int]:
    """The programs of the launch: one for each tile of each expert's result, those of an expert in a run."""
    left_tiles = pl.cdiv(pl.cdiv(left, config.left), config.together) * config.together
    return (num_experts * left_tiles * pl.cdiv(right, config.right),)


def _kernel(
    a_ref: Any,
    b_ref: Any,
    sizes_ref: Any,
    out_ref: Any,
    *,
    config: Config,
    num_experts: int,
    left: int,
    right: int,
    num_rows: Any,
) -> None:
    m, n, k = config.left, config.right, config.rows
    (programs,) = grid_for(1, left, right, config)
    mine, program = pl.program_id(0) // programs, pl.program_id(0) % programs
    turn = config.together * pl.cdiv(right, n)
    column_a = (program // turn * config.together + program % config.together) * m
    column_b = program % turn // config.together * n

    expert = iota((next_power_of_2(num_experts),), 0)
    sizes = load(sizes_ref.at[expert], mask=expert < num_experts, other=0)
    first = bounded(jnp.sum(jnp.where(expert < mine, sizes, 0), axis=0, dtype=jnp.int32), num_rows)
    count = bounded(sizes_ref[mine], num_rows - first)  # whatever the sizes say

    @pl.when(column_a < left)
    def _() -> None:
        # Added up in another order, XLA's LLVM does not move addresses (`bounded`).
        first_a, first_b = first + iota((m, k), 1), first + iota((k, n), 0)
        at_a, at_b = column_a + iota((m, k), 0), column_b + iota((k, n), 1)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            in_a, in_b = i * k + iota((m, k), 1), i * k + iota((k, n), 0)
            row_a, row_b = first_a + i * k, first_b + i * k
            inside_a, inside_b = within((at_a, left, m)), within((at_b, right, n))
            mask_a, mask_b = in_a < count, in_b < count
            a = load_masked(a_ref.at[row_a, at_a], mask_a if inside_a is None else mask_a & inside_a)
            b = load_masked(b_ref.at[row_b, at_b], mask_b if inside_b is None else mask_b & inside_b)
            return dot_add(a, b, total)

        steps = jax.lax.div(count + (k - 1), np.int32(k))
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((m, n), jnp.float32))
        out_a, out_b = column_a + iota((m, n), 0), column_b + iota((m, n), 1)
        where = out_ref.at[mine, out_a, out_b]
        store(where, total.astype(out_ref.dtype), mask=within((out_a, left, m), (out_b, right, n)))


def grouped_outer(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    expected: int | None = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """[E, A, B]: of each expert a.T @ b over its group of rows, in float32, then in a's dtype.

    a [M, A], b [M, B] of one dtype; group_sizes int32 [E], none negative, of a sum up to M. An expert without rows gets
    zeros. `expected`: as for `grouped_matmul`. Sides of at least one.
    """
    num_rows, left = a.shape
    right, num_experts = b.shape[1], group_sizes.shape[0]
    config = config or config_for(expected or num_rows, num_experts, left, right, a.dtype, target)
    return launch(
        functools.partial(_kernel, config=config, num_experts=num_experts, left=left, right=right),
        a,
        b,
        group_sizes,
        name="grouped_outer",
        grid=grid_for(num_experts, left, right, config),
        sizes={"num_rows": num_rows},
        out_shape=[jax.ShapeDtypeStruct((num_experts, left, right), a.dtype)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.rows * (config.left + config.right) * a.dtype.itemsize,
        interpret=interpret,
    )[0]
