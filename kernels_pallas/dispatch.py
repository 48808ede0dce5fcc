"""Dispatch: every token's row is read once and written to each of its places in expert order.

Going by token reads x once from memory; going by row would read each token again for every expert it goes to. The rows
that hold no token are cleared by further programs of the same launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import CACHED, PAST_CACHE, cdiv, iota, launch, load, next_power_of_2, remembered, store

AT_ONCE = 8  # rows that a clearing program clears at a time


@dataclass(frozen=True)
class Config:
    columns: int  # of one program
    clear_rows: int  # of one clearing program, a power of two; 0: rows that hold no token stay as they are
    num_warps: int


@remembered
def config_for(num_rows: int, num_pairs: int, width: int, dtype: Any, target: str, *, clear: bool = True) -> Config:
    """Which tile to use for these shapes on this target ("cuda" or "rocm"); num_pairs: of a token and a slot."""
    itemsize = jnp.dtype(dtype).itemsize
    columns = min(next_power_of_2(width), 2048 // itemsize)
    one_warp = target == "cuda" and CACHED < num_rows * width * itemsize <= PAST_CACHE
    # Rows may all be empty where experts are elsewhere, so few of them for each program while there are few programs;
    # and where groups are filled up, many surely are. Measured on an H200.
    clear_rows = 4 if num_rows <= 1024 else 8 if num_rows <= 4096 or num_rows != num_pairs else 32
    num_warps = 1 if one_warp else max(1, min(4, columns // 256))
    return Config(columns=columns, clear_rows=clear_rows if clear else 0, num_warps=num_warps)


@remembered
def grid_for(num_tokens: int, num_rows: int, width: int, config: Config) -> tuple[int]:
    """The programs of the launch: those that clear, then one for each token's columns after another."""
    clearing = pl.cdiv(num_rows, config.clear_rows) if config.clear_rows else 0
    return (clearing + num_tokens * pl.cdiv(width, config.columns),)


def _dispatch_kernel(
    *refs: Any,
    config: Config,
    num_slots: int,
    width: int,
    column: int,
    has_scale: bool,
    has_end: bool,
    num_tokens: Any,
    num_rows: Any,
) -> None:
    x_ref, rows_ref, slots_ref, *rest = refs
    scale_ref = rest[0] if has_scale else None
    end_ref = rest[int(has_scale)] if has_end else None
    out_ref = rest[-1]
    tiles = pl.cdiv(width, config.columns)
    # Clearing comes first: where all of its rows are empty, a program has much to write, and would be the last to end.
    clearing = cdiv(num_rows, config.clear_rows) if config.clear_rows else 0
    program = pl.program_id(0) - clearing

    @pl.when(program >= 0)
    def _() -> None:
        token = program // tiles
        col = (program - token * tiles) * config.columns + iota((config.columns,), 0)
        # All loads come first: none is moved over a store.
        x = load(x_ref.at[token, column + col], mask=col < width)
        rows = [rows_ref[token, slot] for slot in range(num_slots)]
        scales = [] if scale_ref is None else [scale_ref[token, slot].astype(jnp.float32) for slot in range(num_slots)]
        for slot, row in enumerate(rows):
            value = x.astype(jnp.float32) * scales[slot] if scales else x
            mask = (col < width) & (row >= 0)
            store(out_ref.at[jnp.maximum(row, 0), col], value.astype(out_ref.dtype), mask=mask)

    if config.clear_rows:
        first = (program + clearing) * config.clear_rows
        end = num_rows if end_ref is None else jnp.minimum(num_rows, end_ref[0])
        pl.when(program < 0)(lambda: _clear(slots_ref, out_ref, first, config, end))


def _clear(slots_ref: Any, out_ref: Any, first: jax.Array, config: Config, end: Any) -> None:
    """Zeros where no token is, in the rows of one program before `end`."""
    at_once, width = min(config.clear_rows, AT_ONCE), out_ref.shape[1]

    def find(start: Any, number: int) -> tuple[jax.Array, jax.Array]:
        row = first + start + iota((number,), 0)
        return row, load(slots_ref.at[row], mask=row < end, other=0) < 0

    def clear(i: jax.Array, _: None) -> None:
        row, empty = find(i * at_once, at_once)

        def piece(i: jax.Array, _: None) -> None:
            col = i * config.columns + iota((config.columns,), 0)
            zeros = jnp.zeros((at_once, config.columns), out_ref.dtype)
            store(out_ref.at[row[:, None], col[None, :]], zeros, mask=empty[:, None] & (col < width)[None, :])

        jax.lax.fori_loop(0, pl.cdiv(width, config.columns), piece, None)

    empty = find(0, config.clear_rows)[1]

    @pl.when(jnp.sum(empty.astype(jnp.int32), axis=0, dtype=jnp.int32) > 0)
    def _() -> None:
        jax.lax.fori_loop(0, config.clear_rows // at_once, clear, None)


def dispatch(
    x: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    *,
    scale: jax.Array | None = None,
    end: jax.Array | None = None,
    column: int = 0,
    width: int | None = None,
    out: jax.Array | None = None,
    dtype: Any = None,
    clear: bool = True,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """[M, width]: row rows[t, j] is x[t] (times scale[t, j]); rows that hold no token are zero, if `clear`.

    x [T, at least column + width], of which the columns from `column` on are read; rows int32 [T, S]; slots int32 [M].
    `end` int32 [n]: rows at or past its first number hold no token, and are not cleared.
    `out` [M, width]: the result takes over its buffer.
    """
    num_tokens, num_slots = rows.shape
    width = x.shape[1] - column if width is None else width
    dtype = dtype or x.dtype
    num_rows = slots.shape[0]
    config = config or config_for(num_rows, rows.size, width, dtype, target, clear=clear)
    args = [x, rows, slots, *([] if scale is None else [scale]), *([] if end is None else [end])]
    kernel = functools.partial(
        _dispatch_kernel,
        config=config,
        num_slots=num_slots,
        width=width,
        column=column,
        has_scale=scale is not None,
        has_end=end is not None,
    )
    return launch(
        kernel,
        *args,
        *([] if out is None else [out]),
        name="dispatch",
        grid=grid_for(num_tokens, num_rows, width, config),
        sizes={"num_tokens": num_tokens, "num_rows": num_rows},
        out_shape=[jax.ShapeDtypeStruct((num_rows, width), dtype)],
        num_warps=config.num_warps,
        aliases={} if out is None else {len(args): 0},
        interpret=interpret,
    )[0]
