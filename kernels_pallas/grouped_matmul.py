"""Grouped matmul: each group of rows times the weight of its expert, plain or with a gated activation, in one launch.

The groups lie one behind the other and may begin anywhere: nothing is padded to tiles. A program finds its expert and
its rows by itself: it adds up how many tiles of rows each expert takes. There are as many programs as there can be
tiles; those past the last tile end at once. Rows behind the last group are a group without an expert: their product has
no terms, so they come out as zeros, unless nobody reads them (`clear`).

A tile loads whole blocks, rows of the next group included: what comes of those is not stored. A group's last tile is
half as high where that is enough, so that little of such work is done.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.activation import ACTIVATIONS
from kernels_pallas.launch import (
    HOPPER,
    bounded,
    iota,
    launch,
    load,
    load_masked,
    next_power_of_2,
    remembered,
    room,
    store,
    within,
)

FEW_PROGRAMS = 66  # which leave half of a Hopper's multiprocessors idle


@dataclass(frozen=True)
class Config:
    rows: int  # of one tile
    columns: int  # of the result
    depth: int  # of one step along K
    together: int  # at most: tiles of an expert's rows that go through the columns side by side
    num_warps: int
    num_stages: int
    last_rows: int = 0  # of a group's last tile, where that is enough; 0: all tiles are of one size

    def stage_bytes(self, itemsize: int, parts: int = 1) -> int:
        """What a step along K takes; the gate and up are two parts."""
        return (self.rows + parts * self.columns) * self.depth * itemsize


@remembered
def config_for(
    num_rows: int,
    num_experts: int,
    depth: int,
    width: int,
    dtype: Any,
    target: str,
    *,
    gated: bool = False,
    room: int = HOPPER,
) -> Config:
    """Which tile to use for these shapes on this target ("cuda" or "rocm"); `width` is that of the result.

    room: bytes of shared memory that a program can have.
    """
    # Twice an expert's rows on average: most experts then take one tile, and their weights are read once.
    rows = min(128, max(16, next_power_of_2(2 * pl.cdiv(num_rows, num_experts))))
    if dtype == jnp.float32:  # without tensor cores
        config = Config(min(rows, 64), 64, 16, 8, num_warps=4, num_stages=2)
    elif (depth | width) % 8:  # lines that do not begin at 16 bytes are loaded element by element
        config = Config(min(rows, 64), 64, 32, 8, num_warps=4, num_stages=2)
    elif target == "rocm":
        config = Config(rows, 128, 64, 8, num_warps=8 if rows == 128 else 4, num_stages=2)
    elif rows == 128 and room >= HOPPER:  # measured on an H100, low last tiles on H200s
        together = 16 if depth <= 4096 else 8  # tiles whose rows leave the weights their room in the cache
        config = Config(rows, 256, 64, together, num_warps=8, num_stages=4, last_rows=64)
    elif rows == 128:  # smaller, without Hopper's instructions, which take operands from memory: not measured
        config = Config(rows, 128, 64, 8, num_warps=8, num_stages=3)
    else:  # bound by reading the weights: long lines, in either layout, many bytes on their way. Measured on an H200
        stages = {16: 5 if depth > 2048 else 4, 32: 3, 64: 4}.get(rows, 3)
        config = Config(rows, 128, 128, 8, num_warps=4, num_stages=stages)
        groups, width_of_all = min(num_experts, num_rows), width * (2 if gated else 1)
        while rows == 16 and config.columns > 32 and groups * pl.cdiv(width_of_all, config.columns) < FEW_PROGRAMS:
            config = dataclasses.replace(config, columns=config.columns // 2, num_stages=6)
    columns = config.columns // 2 if gated else config.columns
    return dataclasses.replace(
        config,
        columns=min(columns, max(16, next_power_of_2(width))),
        depth=min(config.depth, max(16, next_power_of_2(depth))),
    )


@remembered
def grid_for(num_rows: int, num_experts: int, width: int, config: Config) -> tuple[int]:
    """The programs of the launch: the most tiles of rows that there can be, times the tiles of columns."""
    groups = min(num_experts + 1, num_rows)  # that are not empty; rows behind the last group are one
    tiles = groups + (num_rows - groups) // config.rows  # n rows take at most 1 + (n - 1) / config.rows
    return (tiles * pl.cdiv(width, config.columns),)


def taking_turns(program: Any, tiles: Any, columns: int, together: int) -> tuple[Any, Any]:
    """(tile of rows, tile of columns) of an expert's program, for `tiles` by `columns` of them.

    Up to `together` tiles of rows go through the columns side by side, so that what lies in the L2 cache at one time is
    those rows and one or two columns of weights, each read once. More tiles do so in parts, as even as can be: a last
    part of one tile would read all the weights for itself. Programs that are too many get tiles past the last row or
    column of them.
    """
    parts = jax.lax.div(tiles + (together - 1), np.int32(together))  # not //, which minds signs
    height = jax.lax.div(tiles + (parts - 1), parts)
    above = jax.lax.div(program, height * columns) * height
    here = jnp.clip(tiles - above, 1, height)
    within_part = program - above * columns
    column = jax.lax.div(within_part, here)
    return above + within_part - column * here, column


def dot_add(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """total + a @ b, in float32; of float32 operands every bit counts."""
    # Said for all, or jax_default_matmul_precision would decide, and sums be float16 at its most careless.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return total + jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _kernel(
    rows_ref: Any,
    weight_ref: Any,
    sizes_ref: Any,
    *refs: Any,
    config: Config,
    num_experts: int,
    depth: int,
    width: int,
    transposed: bool,
    activation: str | None,
    num_slots: int,
    clear: bool,
    num_rows: Any,
) -> None:
    slots_ref, (out_ref, *kept_ref) = (refs[0], refs[1:]) if num_slots else (None, refs)
    m, n, k = config.rows, config.columns, config.depth
    parts = 1 if activation is None else 2  # gate and up
    columns, program = pl.cdiv(width, n), pl.program_id(0)

    expert = iota((next_power_of_2(num_experts),), 0)
    # No more than there are, and none negative: whatever the sizes say, nothing is read or written elsewhere.
    sizes = bounded(load(sizes_ref.at[expert], mask=expert < num_experts, other=0), num_rows)
    tiles = (sizes + (m - 1)) // m
    count = functools.partial(jnp.sum, axis=0, dtype=jnp.int32)
    before = jnp.cumsum(tiles, axis=0, dtype=jnp.int32) <= jax.lax.div(program, np.int32(columns))
    mine = count(before.astype(jnp.int32))
    has_expert = mine < num_experts
    first = count(jnp.where(expert < mine, sizes, 0))
    behind = num_rows if clear else first  # where what lies behind the last group ends
    end = jnp.where(has_expert, first + count(jnp.where(expert == mine, sizes, 0)), behind)
    end = jnp.minimum(end, num_rows)  # whatever the sizes say

    mine_tiles = (end - first + (m - 1)) // m
    within_expert = program - count(jnp.where(expert < mine, tiles, 0)) * columns
    tile, column = taking_turns(within_expert, jnp.maximum(mine_tiles, 1), columns, config.together)
    row = jnp.where(column < columns, first + tile * m, end)  # none for a program that is too many
    column = bounded(column, columns - 1) * n

    weight_at = bounded(mine, num_experts - 1) * (width * parts if transposed else depth)  # its first line

    def compute(m: int) -> None:
        """The tile's first m rows; it has no others."""
        if slots_ref is None:
            a_row, held = bounded(row + iota((m, k), 0), num_rows - 1), None
        else:
            at = row + iota((m, 1), 0)
            slot = load(slots_ref.at[at], mask=at < end, other=-1)
            token = jnp.maximum(slot, 0) // num_slots
            if isinstance(num_rows, int):  # else how many tokens there are is not known either
                token = bounded(token, rows_ref.shape[0] - 1)
            a_row = jnp.broadcast_to(token, (m, k))
            held = jnp.broadcast_to(slot >= 0, (m, k))
        # Gate and up are one tile of weights, side by side, so that a tensor core reads the rows once for both. Another
        # way to write this (//, where) may hide from triton that columns lie side by side: 13 times as slow.
        wide = n * parts
        b_column = b_line = column + iota((k, wide), 1)
        if parts == 2:
            is_up = jax.lax.div(iota((k, wide), 1), jnp.full((k, wide), n, jnp.int32))
            b_column, b_line = b_column - is_up * n, b_line + is_up * (width - n)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            a_depth, b_depth = i * k + iota((m, k), 1), i * k + iota((k, wide), 0)
            a_mask = within((a_depth, depth, k))
            a_mask = held if a_mask is None else a_mask if held is None else a_mask & held
            a = load_masked(rows_ref.at[a_row, a_depth], a_mask)
            mask = within((b_depth, depth, k), (b_column, width, n))
            where = (weight_at + b_line, b_depth) if transposed else (weight_at + b_depth, b_line)
            return dot_add(a, load_masked(weight_ref.at[where], mask), total)

        steps = has_expert.astype(jnp.int32) * pl.cdiv(depth, k)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((m, wide), jnp.float32))
        totals = [total] if parts == 1 else jnp.split(total, 2, axis=1)

        out_row, out_column = row + iota((m, n), 0), column + iota((m, n), 1)
        inside = within((out_column, width, n))
        mask = out_row < end if inside is None else (out_row < end) & inside
        for part, total in enumerate(totals if kept_ref else ()):
            store(kept_ref[0].at[out_row, part * width + out_column], total.astype(out_ref.dtype), mask=mask)
        result = totals[0] if activation is None else ACTIVATIONS[activation](totals[0]) * totals[1]
        store(out_ref.at[out_row, out_column], result.astype(out_ref.dtype), mask=mask)

    few = config.last_rows

    @pl.when(row + few < end)
    def _() -> None:
        compute(m)

    if few:

        @pl.when((row < end) & (row + few >= end))
        def _() -> None:
            compute(few)


def grouped_matmul(
    rows: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    clear: bool = True,
    expected: int | None = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """[M, N]: each group of rows [M, K] times its expert's weight, in float32, then in rows' dtype.

    weight [E, K, N], or [E, N, K] where `transposed`; group_sizes int32 [E], none negative, of a sum up to M. Rows
    behind the last group come out as zeros or, without `clear`, as whatever was there. `expected`: how many rows groups
    have together, about, where that is not nearly all: it decides about the tile. Sides of at least one.
    """
    num_rows, depth = rows.shape
    num_experts, width = weight.shape[0], weight.shape[1 if transposed else 2]
    rows_likely = expected or num_rows
    config = config or config_for(rows_likely, num_experts, depth, width, rows.dtype, target, room=room())
    kernel = functools.partial(
        _kernel,
        config=config,
        num_experts=num_experts,
        depth=depth,
        width=width,
        transposed=transposed,
        activation=None,
        num_slots=0,
        clear=clear,
    )
    return launch(
        kernel,
        rows,
        weight.reshape(-1, weight.shape[2]),
        group_sizes,
        name="grouped_matmul",
        grid=grid_for(num_rows, num_experts, width, config),
        sizes={"num_rows": num_rows},
        out_shape=[jax.ShapeDtypeStruct((num_rows, width), rows.dtype)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.stage_bytes(rows.dtype.itemsize),
        interpret=interpret,
    )[0]


def gated_matmul(
    rows: jax.Array,
    gate_up: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str,
    transposed: bool = False,
    keep: bool = False,
    slots: jax.Array | None = None,
    num_slots: int = 0,
    clear: bool = True,
    expected: int | None = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """([M, I],): activation(gate) * up with gate, up the halves of each group's rows @ gate_up, all in float32.

    gate_up [E, H, 2 * I], or [E, 2 * I, H] where `transposed`; the rest as in `grouped_matmul`. With `keep` there is a
    second result, gate and up themselves [M, 2 * I] in rows' dtype, as a gradient needs them.

    With slots int32 [M], a plan's, and its num_slots (S) the rows are gathered as they are read: `rows` are the tokens,
    [T, at least H], and row i is that of token slots[i] // S, or zeros where slots[i] is -1.
    """
    num_rows, depth = rows.shape[0] if slots is None else slots.shape[0], gate_up.shape[2 if transposed else 1]
    num_experts, width = gate_up.shape[0], gate_up.shape[1 if transposed else 2] // 2
    rows_likely = expected or num_rows
    config = config or config_for(rows_likely, num_experts, depth, width, rows.dtype, target, gated=True, room=room())
    kernel = functools.partial(
        _kernel,
        config=config,
        num_experts=num_experts,
        depth=depth,
        width=width,
        transposed=transposed,
        activation=activation,
        num_slots=0 if slots is None else num_slots,
        clear=clear,
    )
    return launch(
        kernel,
        rows,
        gate_up.reshape(-1, gate_up.shape[2]),
        group_sizes,
        *([] if slots is None else [slots]),
        name="gated_matmul",
        grid=grid_for(num_rows, num_experts, width, config),
        sizes={"num_rows": num_rows},
        out_shape=[jax.ShapeDtypeStruct((num_rows, w), rows.dtype) for w in (width, *([2 * width] if keep else []))],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.stage_bytes(rows.dtype.itemsize, 2),
        interpret=interpret,
    )
