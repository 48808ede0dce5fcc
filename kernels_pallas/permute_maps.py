"""vLLM's maps of a permutation, made of a plan: where experts begin, the row of each pair and the pair of each row.

They differ from a plan in what stands for nothing (moe_permute_unpermute.py of vLLM 0.33), and the first is int64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, next_power_of_2, remembered, store

BLOCK = 1024  # pairs of a program


@remembered
def grid_for(num_items: int) -> tuple[int]:
    """One program for each block of pairs; the first also adds up the experts' sizes."""
    return (pl.cdiv(num_items, BLOCK),)


def _kernel(
    rows_ref: Any,
    slots_ref: Any,
    sizes_ref: Any,
    offsets_ref: Any,
    inverse_ref: Any,
    index_ref: Any,
    *,
    num_local: int,
    num_items: Any,
) -> None:
    program = pl.program_id(0)
    at = program * BLOCK + iota((BLOCK,), 0)
    inside = at < num_items
    row, slot = (load(ref.at[at], mask=inside, other=0) for ref in (rows_ref, slots_ref))
    store(inverse_ref.at[at], jnp.where(row < 0, num_items - 1, row), mask=inside)
    store(index_ref.at[at], jnp.where(slot < 0, num_items, slot), mask=inside)

    @pl.when(program == 0)
    def _() -> None:
        expert = iota((next_power_of_2(num_local),), 0)
        size = load(sizes_ref.at[expert], mask=expert < num_local, other=0)
        end = jnp.cumsum(size, axis=0, dtype=jnp.int32)
        nothing = jnp.zeros_like(end)
        # Numbers of 64 bits, none negative, as pairs of 32: GPUs are little-endian, and without x64 jax has no int64.
        for behind, (low, mask) in enumerate(((end - size, expert == 0), (end, expert < num_local))):
            word = 2 * (expert + behind)
            store(offsets_ref.at[word], low, mask=mask)
            store(offsets_ref.at[word + 1], nothing, mask=mask)


def permute_maps(
    rows: jax.Array, slots: jax.Array, group_sizes: jax.Array, *, num_local: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(offsets int32 [2 * (num_local + 1)], inverse int32 [P], index int32 [P]) of an unaligned plan of P > 0 pairs.

    offsets, two words a number: the first row of each of the first `num_local` experts, and where the last one ends.
    inverse: `rows`, P - 1 instead of -1; index: `slots`, P instead of -1.
    """
    num_items = slots.size
    shape = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    offsets, inverse, index = launch(
        functools.partial(_kernel, num_local=num_local),
        rows.reshape(-1),
        slots,
        group_sizes,
        name="permute_maps",
        grid=grid_for(num_items),
        sizes={"num_items": num_items},
        out_shape=[shape(2 * (num_local + 1)), shape(num_items), shape(num_items)],
        num_warps=4,
        interpret=interpret,
    )
    return offsets, inverse, index
