"""How many items each expert got: routing's load counts, and the step that the dispatch plan shares."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import add_at, iota, launch, load, next_power_of_2


def count_ids(
    ids_ref: Any, start: Any, steps: Any, block: int, num_items: int, first_id: Any, num_ids: int
) -> jax.Array:
    """int32 [num_ids]: how often first_id + i is in ids_ref[start : start + steps * block], clipped to num_items."""

    def step(i: jax.Array, counts: jax.Array) -> jax.Array:
        item = start + i * block + iota((block, num_ids), 0)
        ids = load(ids_ref.at[item], mask=item < num_items, other=-1)
        return counts + (ids == first_id + iota((block, num_ids), 1)).astype(jnp.int32)

    counts = jax.lax.fori_loop(0, steps, step, jnp.zeros((block, num_ids), jnp.int32))
    return jnp.sum(counts, axis=0, dtype=jnp.int32)


def _load_kernel(
    experts_ref: Any, _: Any, load_ref: Any, *, num_items: int, num_ids: int, steps: int, block: int, tile: int
) -> None:
    first = pl.program_id(1) * tile
    counts = count_ids(experts_ref, pl.program_id(0) * (steps * block), steps, block, num_items, first, tile)
    index = first + iota((tile,), 0)
    add_at(load_ref, jnp.minimum(index, num_ids - 1), jnp.where(index < num_ids, counts, 0))


def count_load(
    experts: jax.Array, cleared: jax.Array, *, programs: int = 264, block: int = 16, interpret: bool = False
) -> jax.Array:
    """load int32 [num_ids], written over `cleared` (zeros): how often each id stands in experts int32 [T, S]."""
    num_items, num_ids = experts.size, cleared.size
    tile = min(256, next_power_of_2(num_ids))
    steps = pl.cdiv(pl.cdiv(num_items, block), programs)
    kernel = functools.partial(_load_kernel, num_items=num_items, num_ids=num_ids, steps=steps, block=block, tile=tile)
    return launch(
        kernel,
        experts.reshape(-1),
        cleared,
        name="count_load",
        grid=(pl.cdiv(num_items, steps * block), pl.cdiv(num_ids, tile)),
        out_shape=[jax.ShapeDtypeStruct((num_ids,), jnp.int32)],
        num_warps=4,
        aliases={1: 0},
        interpret=interpret,
    )[0]
