"""Combine: every token's rows are gathered and summed, weighted, slot after slot; and the gradient of the weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import PAST_CACHE, iota, launch, load, next_power_of_2, remembered, store


@dataclass(frozen=True)
class Config:
    columns: int  # of one program
    num_warps: int
    by_token: bool = False  # a token's columns one after another: better where rows come from memory, not the cache
    once: bool = False  # rows that have been read, and sums, leave the cache first, and rows still to be read stay
    pieces: int = 1  # the columns are done in so many, where every slot of a token has a row
    apart: bool = False  # where some have none, one row after another is read: those that are there


@remembered
def config_for(num_tokens: int, num_slots: int, width: int, dtype: Any, target: str) -> Config:
    """Which tile to use for these shapes on this target ("cuda" or "rocm")."""
    itemsize = jnp.dtype(dtype).itemsize
    # One warp, 16 bytes a lane, twice or four times 16 (these in two pieces): as fast where every slot has a row. Where
    # few do, experts being elsewhere, a GPU is busy with beginning programs, of which there are fewer then. Measured on
    # H100s and H200s.
    many = num_tokens > 512
    size = 512 if num_tokens <= 64 else 1024 if num_tokens <= 1024 else 2048  # of a program's columns, in bytes
    columns = min(next_power_of_2(width), size // itemsize)
    pieces = max(columns * itemsize // 1024, 1)
    once = target == "cuda" and num_tokens * num_slots * width * itemsize <= PAST_CACHE
    return Config(columns=columns, num_warps=1, by_token=many, once=once, pieces=pieces, apart=many)


@remembered
def grid_for(num_tokens: int, width: int, config: Config) -> tuple[int, int]:
    """The programs of the launch."""
    tiles = pl.cdiv(width, config.columns)
    return (num_tokens * tiles, 1) if config.by_token else (num_tokens, tiles)


def _combine_kernel(
    *refs: Any, config: Config, num_slots: int, width: int, column: int, has_weights: bool, has_end: bool
) -> None:
    x_ref, rows_ref, *rest = refs
    weights_ref = rest[0] if has_weights else None
    end = rest[int(has_weights)][0] if has_end else None
    out_ref = rest[-1]
    token, tile = pl.program_id(0), pl.program_id(1)
    if config.by_token:
        tiles = pl.cdiv(width, config.columns)
        token, tile = token // tiles, token % tiles
    policy = "evict_first" if config.once else None
    rows = [rows_ref[token, slot] for slot in range(num_slots)]
    if end is not None:
        rows = [jnp.where(row < end, row, -1) for row in rows]

    def add(total: jax.Array, slot: int, col: jax.Array, mask: Any) -> jax.Array:
        at = x_ref.at[jnp.maximum(rows[slot], 0), column + col]
        x = load(at, mask=mask, other=0.0, eviction_policy=policy).astype(jnp.float32)
        if weights_ref is not None:  # a dropped pair adds nothing, whatever its weight
            x = x * jnp.where(rows[slot] >= 0, weights_ref[token, slot].astype(jnp.float32), 0.0)
        return total + x

    def at_once(first: Any, columns: int) -> None:
        """The rows of all slots are on their way together."""
        col, total = first + iota((columns,), 0), jnp.zeros((columns,), jnp.float32)
        for slot in range(num_slots):
            total = add(total, slot, col, (col < width) & (rows[slot] >= 0))
        store(out_ref.at[token, col], total.astype(out_ref.dtype), mask=col < width, eviction_policy=policy)

    def apart() -> None:
        """A row is read if it is there: fewer registers, so that more programs, or columns, are on their way."""
        col, total = tile * config.columns + iota((config.columns,), 0), jnp.zeros((config.columns,), jnp.float32)
        for slot in range(num_slots):
            more = functools.partial(add, total, slot, col, col < width)
            total = jax.lax.cond(rows[slot] >= 0, more, lambda total=total: total)
        store(out_ref.at[token, col], total.astype(out_ref.dtype), mask=col < width, eviction_policy=policy)

    def in_pieces() -> None:
        columns = config.columns // config.pieces
        for piece in range(config.pieces):
            at_once(tile * config.columns + piece * columns, columns)

    if not config.apart:
        in_pieces()
        return
    least = functools.reduce(jnp.minimum, rows)
    jax.lax.cond(least >= 0, in_pieces, apart)


def combine(
    x: jax.Array,
    rows: jax.Array,
    weights: jax.Array | None,
    *,
    end: jax.Array | None = None,
    column: int = 0,
    width: int | None = None,
    out: jax.Array | None = None,
    dtype: Any = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """[T, width]: the sum over slots j = 0, 1, ... of weights[t, j] * x[rows[t, j]], in float32, then in x's dtype.

    x [M, at least column + width], of which the columns from `column` on are read; rows int32 [T, S], -1 = dropped;
    weights [T, S] of any float dtype, None = ones. `end` int32 [n]: rows at or past its first number are dropped too.
    `out` [T, width]: the result takes over its buffer.
    """
    num_tokens, num_slots = rows.shape
    width = x.shape[1] - column if width is None else width
    dtype = dtype or x.dtype
    config = config or config_for(num_tokens, num_slots, width, x.dtype, target)
    args = [x, rows, *([] if weights is None else [weights]), *([] if end is None else [end])]
    kernel = functools.partial(
        _combine_kernel,
        config=config,
        num_slots=num_slots,
        width=width,
        column=column,
        has_weights=weights is not None,
        has_end=end is not None,
    )
    return launch(
        kernel,
        *args,
        *([] if out is None else [out]),
        name="combine",
        grid=grid_for(num_tokens, width, config),
        out_shape=[jax.ShapeDtypeStruct((num_tokens, width), dtype)],
        num_warps=config.num_warps,
        aliases={} if out is None else {len(args): 0},
        interpret=interpret,
    )[0]


def _dot_kernel(
    x_ref: Any, dy_ref: Any, rows_ref: Any, out_ref: Any, *, config: Config, num_slots: int, width: int, column: int
) -> None:
    token = pl.program_id(0)

    for slot in range(num_slots):
        row = rows_ref[token, slot]

        def step(i: jax.Array, total: jax.Array, row: jax.Array = row) -> jax.Array:
            col = i * config.columns + iota((config.columns,), 0)
            mask = (col < width) & (row >= 0)
            x = load(x_ref.at[jnp.maximum(row, 0), column + col], mask=mask, other=0.0).astype(jnp.float32)
            dy = load(dy_ref.at[token, col], mask=mask, other=0.0).astype(jnp.float32)
            return total + x * dy

        total = jax.lax.fori_loop(0, pl.cdiv(width, config.columns), step, jnp.zeros((config.columns,), jnp.float32))
        out_ref[token, slot] = jnp.sum(total, axis=0).astype(out_ref.dtype)


def combine_weight_grad(
    x: jax.Array,
    dy: jax.Array,
    rows: jax.Array,
    *,
    column: int = 0,
    dtype: Any = jnp.float32,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """dtype [T, S]: x[rows[t, j]] . dy[t], zero for a dropped pair: what one unit of weights[t, j] adds to y . dy."""
    num_tokens, num_slots = rows.shape
    width = dy.shape[1]
    config = config or config_for(1, num_slots, width, x.dtype, target)  # its tile, whatever the number of tokens
    return launch(
        functools.partial(_dot_kernel, config=config, num_slots=num_slots, width=width, column=column),
        x,
        dy,
        rows,
        name="combine_weight_grad",
        grid=(num_tokens,),
        out_shape=[jax.ShapeDtypeStruct((num_tokens, num_slots), dtype)],
        num_warps=config.num_warps,
        interpret=interpret,
    )[0]
