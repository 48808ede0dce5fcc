"""Routing's load: how many (token, slot) pairs chose each expert id."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import add_at, iota, launch, load, next_power_of_2

BLOCK, TILE = 64, 64  # pairs of one step, ids of one program
PROGRAMS = 128  # along the pairs, at most


def _kernel(experts_ref: Any, _: Any, load_ref: Any, *, num_ids: int, tile: int, num_items: Any, steps: Any) -> None:
    start, first = pl.program_id(0) * (steps * BLOCK), pl.program_id(1) * tile
    ids = first + iota((BLOCK, tile), 1)

    def step(i: jax.Array, counts: jax.Array) -> jax.Array:
        item = start + i * BLOCK + iota((BLOCK, tile), 0)
        return counts + (load(experts_ref.at[item], mask=item < num_items, other=-1) == ids).astype(jnp.int32)

    counts = jax.lax.fori_loop(0, steps, step, jnp.zeros((BLOCK, tile), jnp.int32))
    total, index = jnp.sum(counts, axis=0, dtype=jnp.int32), first + iota((tile,), 0)
    add_at(load_ref, jnp.minimum(index, num_ids - 1), jnp.where(index < num_ids, total, 0))


def shape_for(num_items: int, num_ids: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(the grid, the sizes) of the launch."""
    steps = pl.cdiv(pl.cdiv(num_items, BLOCK), PROGRAMS)
    grid = (pl.cdiv(num_items, steps * BLOCK), pl.cdiv(num_ids, min(TILE, next_power_of_2(num_ids))))
    return grid, {"num_items": num_items, "steps": steps}


def count_load(experts: jax.Array, cleared: jax.Array, *, interpret: bool = False) -> jax.Array:
    """load int32 [num_ids], written over `cleared` (zeros): how often each id stands in experts int32 [T, S]."""
    num_ids = cleared.size
    grid, sizes = shape_for(experts.size, num_ids)
    return launch(
        functools.partial(_kernel, num_ids=num_ids, tile=min(TILE, next_power_of_2(num_ids))),
        experts.reshape(-1),
        cleared,
        name="count_load",
        grid=grid,
        sizes=sizes,
        out_shape=[jax.ShapeDtypeStruct((num_ids,), jnp.int32)],
        num_warps=4,
        aliases={1: 0},
        interpret=interpret,
    )[0]
