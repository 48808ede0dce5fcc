"""The gradient of grouped matmul's weights on NVIDIA Hopper, for JAX: `grouped_matmul_grad` by the copy engine.

The engine copies rows from a multiple of eight on, whatever group they belong to. Of each group the first eight and the
last 64 may hold others' rows, so these come from copies of them made beforehand, with zeros for those rows: unless all
groups begin and end at multiples of 64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import hopper
from kernels_pallas.hopper import BLOCK, LOADER
from kernels_pallas.launch import remembered

LINE = 8  # what a copy begins at a multiple of: the engine's tile is so many rows of 128 bytes


@dataclass(frozen=True)
class Config:
    left: int  # columns of a in one tile
    right: int  # columns of b
    together: int  # tiles of a that go through b's side by side, and so share b in the L2 cache
    num_stages: int  # blocks of rows that are loaded ahead
    stores: int = 2  # pieces of a result, 64 x 64, that a warpgroup has on their way


WIDE, HIGH = Config(128, 256, 8, num_stages=4), Config(256, 128, 4, num_stages=4)  # measured on an H200


@remembered
def config_for(
    num_rows: int, num_experts: int, left: int, right: int, dtype: Any, expected: int | None = None
) -> Config | None:
    """Which tile to use for these shapes; None where there is none, or too few rows (128 an expert).

    expected: how many rows hold tokens, about, where that is not nearly all.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or num_rows % LINE or (expected or num_rows) < 128 * num_experts:
        return None
    return next((c for c in (WIDE, HIGH) if left % c.left == 0 and right % c.right == 0), None)


def edges(x: jax.Array, starts: jax.Array, ends: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    """[E, rows, width]: of each group that many rows from `first` on, zeros for those of others."""
    at = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    inside = (at >= starts[:, None]) & (at < ends[:, None])
    return jnp.where(inside[..., None], x[jnp.clip(at, 0, x.shape[0] - 1)], jnp.zeros((), x.dtype))


def blocks(start: Any, end: Any) -> tuple[Any, Any]:
    """(the row at which the first block of a group begins, how many blocks it has)."""
    first = jax.lax.div(start, np.int32(LINE)) * LINE
    return first, jnp.where(end > start, jax.lax.div(end - first + (BLOCK - 1), np.int32(BLOCK)), 0)


def tile(number: Any, tiles_a: int, tiles_b: int, together: int) -> tuple[Any, Any, Any]:
    """(expert, tile of a's columns, of b's) of this number, of tiles_a * tiles_b for each expert."""
    div, rem = (lambda x, y, op=op: op(x, np.int32(y)) for op in (jax.lax.div, jax.lax.rem))
    within = rem(number, tiles_a * tiles_b)
    above, within = div(within, together * tiles_b) * together, rem(within, together * tiles_b)
    here = jnp.minimum(tiles_a - above, together)
    return div(number, tiles_a * tiles_b), above + jax.lax.rem(within, here), jax.lax.div(within, here)


def _kernel(*refs: Any, config: Config, num_experts: int, left: int, right: int, programs: int, aligned: bool) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    starts_ref, ends_ref, out_ref, a_smem, b_smem, out_smem, full, empty = refs[-8:]
    whole, head, tail = refs[0:2], refs[2:4], refs[4:6]  # of a and of b
    m, n, stages = config.left, config.right, config.num_stages
    tiles_a, tiles_b = left // m, right // n
    warpgroup, program = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("program")
    tiles = num_experts * tiles_a * tiles_b
    mine = jax.lax.div(tiles - program + (programs - 1), np.int32(programs))

    def place(i: Any) -> tuple[Any, ...]:
        """(expert, first columns of a and of b, first row and that behind the last) of my tile i."""
        expert, tile_a, tile_b = tile(program + i * programs, tiles_a, tiles_b, config.together)
        return expert, tile_a * m, tile_b * n, starts_ref[expert], ends_ref[expert]

    @pl.when(warpgroup == LOADER)
    def load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i: Any, done: Any) -> Any:
            expert, column_a, column_b, start, end = place(i)
            first, steps = blocks(start, end)

            def step(j: Any, done: Any) -> Any:
                at = hopper.stage(done, stages)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(empty.at[at]))

                def copy(refs: tuple[Any, Any], row: Any, rows: int, to: int = 0) -> None:
                    for ref, smem, column, width in zip(
                        refs, (a_smem, b_smem), (column_a, column_b), (m, n), strict=True
                    ):
                        part = ref.at[pl.ds(row, rows), pl.ds(column, width)]
                        plgpu.copy_gmem_to_smem(part, smem.at[at, pl.ds(to, rows)], full.at[at])

                def copy_alone(refs: tuple[Any, Any], row: Any) -> None:
                    copy(refs, row, BLOCK)
                    for _ in range(2):  # for the copies that a block in two parts has more
                        plgpu.barrier_arrive(full.at[at])

                row = pl.multiple_of(first + j * BLOCK, BLOCK if aligned else LINE)
                if aligned:
                    copy(whole, row, BLOCK)
                    return done + 1
                is_tail = (row + BLOCK > end) | ((row < start) & (steps == 1))
                is_head = (row < start) & (steps > 1)

                @pl.when(is_head)
                def _() -> None:
                    copy(head, expert * LINE, LINE)
                    copy(whole, row + LINE, BLOCK - LINE, to=LINE)

                pl.when(is_tail)(lambda: copy_alone(tail, expert * BLOCK))
                pl.when(jnp.logical_not(is_head | is_tail))(lambda: copy_alone(whole, row))
                return done + 1

            return jax.lax.fori_loop(0, steps, step, done)

        done = jax.lax.fori_loop(0, mine, load_tile, jnp.int32(0))
        hopper.wait_for_all(empty, done, stages)

    @pl.when(warpgroup != LOADER)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        half = pl.ds(warpgroup * (m // 2), m // 2)

        def corner(expert: Any, row: Any, column: Any, y: int, x: int) -> Any:
            return out_ref.at[expert, pl.ds(row + y, BLOCK), pl.ds(column + x, BLOCK)]

        writer = hopper.Writer(out_smem.at[warpgroup], corner)

        def compute_tile(i: Any, carry: tuple[Any, hopper.Pending]) -> tuple[Any, hopper.Pending]:
            done, pending = carry
            expert, column_a, column_b, start, end = place(i)
            _, steps = blocks(start, end)
            operands = lambda at: (a_smem.at[at, :, half].transpose((1, 0)), b_smem.at[at])
            total = hopper.multiply(operands, steps, done, full, empty, stages, pending, writer)
            where = expert, column_a + warpgroup * (m // 2), column_b
            return done + steps, hopper.Pending(total.astype(out_ref.dtype), where, jnp.bool_(True))

        carry = jnp.int32(0), hopper.nothing((m // 2, n), out_ref.dtype, places=3)
        _, pending = jax.lax.fori_loop(0, mine, compute_tile, carry)
        writer.put_all(pending)
        plgpu.wait_smem_to_gmem(0)


def grouped_outer(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    programs: int,
    aligned: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[E, A, B]: what `grouped_matmul_grad.grouped_outer` returns, of shapes for which `config_for` has a tile.

    Sizes are held to what there is: none negative, none past the rows.

    programs: how many run at a time, one a multiprocessor. aligned: all sizes are multiples of BLOCK. interpret: this
    backend's `InterpretGPUParams`.
    """
    (num_rows, left), right, num_experts = a.shape, b.shape[1], group_sizes.shape[0]
    config = config or config_for(num_rows, num_experts, left, right, a.dtype)
    assert config is not None, f"no tile for {a.dtype} [{num_rows}, {left}], [{num_rows}, {right}]"
    assert left % config.left == right % config.right == num_rows % LINE == 0, f"{config} for {a.shape}, {b.shape}"
    assert config.num_stages > 1, "a stage is free when the next has begun"
    assert 4 % config.stores == 0, "the four pieces of a result take turns"
    assert not aligned or num_rows % BLOCK == 0, f"blocks of {BLOCK} of {num_rows} rows"
    sizes = jnp.clip(group_sizes, 0, num_rows)  # whatever they say
    total = jnp.cumsum(sizes, dtype=jnp.int32)
    starts, ends = jnp.clip(total - sizes, 0, num_rows), jnp.clip(total, 0, num_rows)
    apart: list[jax.Array] = []  # heads, then tails
    if not aligned:
        first, steps = blocks(starts, ends)
        last = first + jnp.maximum(steps - 1, 0) * BLOCK
        for begin, rows in (first, LINE), (last, BLOCK):
            apart += [edges(x, starts, ends, begin, rows).reshape(-1, x.shape[1]) for x in (a, b)]

    sides = {"num_experts": num_experts, "left": left, "right": right}
    return hopper.launch(
        functools.partial(_kernel, config=config, programs=programs, aligned=aligned, **sides),
        *(a, b, *apart, starts, ends),
        name="grouped_outer",
        out_shape=jax.ShapeDtypeStruct((num_experts, left, right), a.dtype),
        stages=[(BLOCK, config.left), (BLOCK, config.right)],
        num_stages=config.num_stages,
        arrivals=2 if aligned else 4,  # of a block, which may be in two parts
        stores=config.stores,
        programs=programs,
        interpret=interpret,
    )
