"""Grouped matmul on NVIDIA Hopper, for JAX, of groups that begin and end at multiples of 64 rows: by the copy engine.

Each of the two warpgroups that multiply has 64 rows of a tile, so no row of another group is ever loaded. A group's
last tile may be half a tile, for one of them. Two of these, of neighbouring columns, are done by one program, one after
the other: so all that is shared out among programs takes about as long, if experts have many rows.
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

DEPTH = 64  # of one step along K
CACHE = 50 << 20  # bytes, of an H100 or H200


@dataclass(frozen=True)
class Config:
    columns: int  # of a tile of the result
    together: int  # at most: tiles of an expert's rows that go through the columns side by side
    num_stages: int  # steps that are loaded ahead
    stores: int = 2  # pieces of a result, 64 x 64, that a warpgroup has on their way


TILE = Config(256, 8, num_stages=4)  # measured on an H200


@remembered
def config_for(
    num_rows: int, num_experts: int, depth: int, width: int, dtype: Any, expected: int | None = None
) -> Config | None:
    """Which tile to use for these shapes; None where there is none, or where Triton's kernel is as fast or faster.

    expected: how many rows hold tokens, about, where that is not nearly all.

    That is so with fewer rows, since two halves of a tile do not read their weights when others do, and programs are
    more unevenly busy at the end; with narrow results up to more rows, as these have fewer parts to share out.
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or num_rows % BLOCK or depth % DEPTH or width % (2 * TILE.columns):
        return None
    least = 512 if width >= 4096 else 1024  # of an expert, with what can be filled up: measured on an H200
    return TILE if (expected or num_rows) >= least * num_experts else None


def takes_large_first(depth: int, width: int, dtype: Any) -> bool:
    """Whether large experts come first: where an expert's weights do not fit into the cache.

    Programs go through an expert's tiles side by side, so that what one reads is in the cache for others, as long as
    all tiles take as long. Two halves of one do not quite, and behind them programs are apart: then such weights are
    read from memory more than once. Large experts first leave less behind half tiles.
    """
    return depth * width * jnp.dtype(dtype).itemsize > CACHE


def experts_of_blocks(group_sizes: jax.Array, num_rows: int, *, large_first: bool) -> jax.Array:
    """int32 [4 * num_rows / 64], of the blocks of rows in the order in which they are multiplied.

    Four lists, one behind the other: a block's expert, that one's first row and the row behind its last, and the place
    in this order of that one's first block. The rows behind the last group are an expert, too, the last.

    large_first: experts with many tiles come first, and of those with as many the ones without half a tile; else they
    keep their order.
    """
    sizes, expert = group_sizes.astype(jnp.int32), jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    sooner = expert < expert[:, None]
    if large_first:
        key = sizes ^ BLOCK  # half a tile less where there is half a tile, else half a tile more
        sooner = (key > key[:, None]) | ((key == key[:, None]) & sooner)
    above = jnp.sum(jnp.where(sooner, sizes, 0), axis=1, dtype=jnp.int32)  # rows of those that come before each
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    row = jnp.arange(0, num_rows, BLOCK, dtype=jnp.int32)[:, None]
    mine = (above <= row) & (row < above + sizes)
    used = jnp.sum(sizes, dtype=jnp.int32)

    def of_blocks(values: jax.Array, behind: Any) -> jax.Array:
        found = jnp.sum(jnp.where(mine, values, 0), axis=1, dtype=jnp.int32)
        return jnp.where(row[:, 0] < used, found, behind)

    lists = (expert, len(expert)), (ends - sizes, used), (ends, num_rows), (above // BLOCK, used // BLOCK)
    return jnp.concatenate([of_blocks(*of) for of in lists])


def part_of(number: Any, tiles: Any, half: Any, columns: int, together: int) -> tuple[Any, Any, Any]:
    """(tile of rows, first tile of columns, how many of these) of an expert's part of this number.

    The expert has so many whole tiles of rows and, if half is 1, one of half as many rows. Up to `together` tiles of
    rows go through the columns side by side, as in `grouped_matmul.taking_turns`, and the half one with the last.
    """
    div = lambda x, y: jax.lax.div(x, jnp.asarray(y, jnp.int32))
    turns = jnp.maximum(div(tiles + (together - 1), together), 1)
    height = div(tiles + (turns - 1), turns)
    turn = jnp.minimum(div(number, jnp.maximum(height * columns, 1)), turns - 1)
    above = turn * height
    here, last = jnp.minimum(tiles - above, height), jnp.where(turn == turns - 1, half, 0)
    within = number - above * columns
    pair = div(within, 2 * here + last)
    within = within - pair * (2 * here + last)
    halves = within == 2 * here
    second = jnp.where((within >= here) & jnp.logical_not(halves), 1, 0)
    row = jnp.where(halves, tiles, above + within - second * here)
    return row, 2 * pair + second, jnp.where(halves, 2, 1)


def _kernel(
    rows_ref: Any,
    weight_ref: Any,
    blocks_ref: Any,
    out_ref: Any,
    a_smem: Any,
    b_smem: Any,
    out_smem: Any,
    full: Any,
    empty: Any,
    *,
    config: Config,
    transposed: bool,
    clear: bool,
    programs: int,
) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (num_rows, depth), (num_experts, *sides) = rows_ref.shape, weight_ref.shape
    n, stages, blocks = config.columns, config.num_stages, num_rows // BLOCK
    columns = sides[0 if transposed else 1] // n
    warpgroup, program = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("program")
    mine = jax.lax.div(blocks * (columns // 2) - program + (programs - 1), np.int32(programs))

    def place(i: Any) -> tuple[Any, ...]:
        """(expert, first row, first tile of columns, how many of these, steps of one, if it is whole) of part i."""
        number = program + i * programs
        at = jax.lax.div(number, np.int32(columns // 2))
        expert, start, end, above = (blocks_ref[of * blocks + at] for of in range(4))
        has = jax.lax.div(end - start, np.int32(BLOCK))
        tiles, number = jax.lax.div(has, np.int32(2)), number - above * (columns // 2)
        row, column, count = part_of(number, tiles, has - 2 * tiles, columns, config.together)
        row = pl.multiple_of(start + row * (2 * BLOCK), BLOCK)
        steps, whole = jnp.where(expert < num_experts, np.int32(depth // DEPTH), 0), count == 1
        if not clear:  # no tile, so nothing is stored
            count = jnp.where(expert < num_experts, count, 0)
        return expert, row, column, count, steps, whole

    @pl.when(warpgroup == LOADER)
    def load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load_part(i: Any, done: Any) -> Any:
            expert, row, column, count, steps, whole = place(i)

            def step(j: Any, done: Any) -> Any:
                at, tile = hopper.stage(done, stages), jax.lax.div(j, np.int32(depth // DEPTH))
                k = pl.ds((j - tile * (depth // DEPTH)) * DEPTH, DEPTH)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(empty.at[at]))
                line = pl.ds((column + tile) * n, n)
                weight = weight_ref.at[expert, *((line, k) if transposed else (k, line))]
                plgpu.copy_gmem_to_smem(weight, b_smem.at[at], full.at[at])

                def copy(half: int) -> None:
                    to = a_smem.at[at, pl.ds(half * BLOCK, BLOCK)]
                    plgpu.copy_gmem_to_smem(rows_ref.at[pl.ds(row + half * BLOCK, BLOCK), k], to, full.at[at])

                copy(0)
                pl.when(whole)(lambda: copy(1))
                pl.when(jnp.logical_not(whole))(lambda: plgpu.barrier_arrive(full.at[at]))
                return done + 1

            return jax.lax.fori_loop(0, count * steps, step, done)

        done = jax.lax.fori_loop(0, mine, load_part, jnp.int32(0))
        hopper.wait_for_all(empty, done, stages)

    @pl.when(warpgroup != LOADER)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        half = pl.ds(warpgroup * BLOCK, BLOCK)

        def corner(row: Any, column: Any, y: int, x: int) -> Any:
            return out_ref.at[pl.ds(row + y, BLOCK), pl.ds(column + x, BLOCK)]

        writer = hopper.Writer(out_smem.at[warpgroup], corner)

        def compute_part(i: Any, carry: tuple[Any, hopper.Pending]) -> tuple[Any, hopper.Pending]:
            _, row, column, count, steps, whole = place(i)
            works = (warpgroup == 0) | whole

            def compute_tile(tile: Any, carry: tuple[Any, hopper.Pending]) -> tuple[Any, hopper.Pending]:
                done, pending = carry
                worked = jnp.where(works, steps, 0)

                def operands(at: Any) -> tuple[Any, Any]:
                    return a_smem.at[at, half], b_smem.at[at].transpose((1, 0)) if transposed else b_smem.at[at]

                total = hopper.multiply(operands, worked, done, full, empty, stages, pending, writer)

                def leave(j: Any, _: None) -> None:
                    at = hopper.stage(done + j, stages)
                    plgpu.barrier_wait(full.at[at])
                    plgpu.barrier_arrive(empty.at[at])

                jax.lax.fori_loop(worked, steps, leave, None)
                where = row + warpgroup * BLOCK, (column + tile) * n
                return done + steps, hopper.Pending(total.astype(out_ref.dtype), where, works)

            return jax.lax.fori_loop(0, count, compute_tile, carry)

        carry = jnp.int32(0), hopper.nothing((BLOCK, n), out_ref.dtype, places=2)
        _, pending = jax.lax.fori_loop(0, mine, compute_part, carry)
        writer.put_all(pending)
        plgpu.wait_smem_to_gmem(0)


def grouped_matmul(
    rows: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    clear: bool = True,
    programs: int,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[M, N]: what `grouped_matmul.grouped_matmul` returns, of shapes for which `config_for` has a tile.

    group_sizes: multiples of BLOCK, as a plan has them. programs: how many run at a time, one a multiprocessor.
    interpret: this backend's `InterpretGPUParams`.
    """
    (num_rows, depth), num_experts, width = rows.shape, weight.shape[0], weight.shape[1 if transposed else 2]
    config = config or config_for(num_rows, num_experts, depth, width, rows.dtype)
    assert config is not None, f"no tile for {rows.dtype} {rows.shape}, {weight.shape}"
    assert num_rows % BLOCK == depth % DEPTH == width % (2 * config.columns) == 0, f"{config} for {rows.shape}, {width}"
    assert config.num_stages > 1, "a stage is free when the next has begun"
    assert config.columns // BLOCK % config.stores == 0, "the pieces of a result take turns"
    large_first = takes_large_first(depth, width, weight.dtype)
    blocks = experts_of_blocks(group_sizes, num_rows, large_first=large_first)
    return hopper.launch(
        functools.partial(_kernel, config=config, transposed=transposed, clear=clear, programs=programs),
        *(rows, weight, blocks),
        name="grouped_matmul",
        out_shape=jax.ShapeDtypeStruct((num_rows, width), rows.dtype),
        stages=[(2 * BLOCK, DEPTH), (config.columns, DEPTH) if transposed else (DEPTH, config.columns)],
        num_stages=config.num_stages,
        arrivals=3,
        stores=config.stores,
        programs=programs,
        interpret=interpret,
    )
