"""The dispatch plan: a stable counting sort of (token, slot) pairs by expert, in two launches.

The pairs, in the order of their flat index t * S + j, are cut into chunks. The first launch counts each chunk's
experts. In the second, a chunk adds up the counts of the chunks before it, which tells it the first free row of every
expert, and places its pairs one block after another. No atomics: a row depends on the pairs before it and on nothing
else. The number of chunks is bounded, so the work grows linearly with the number of pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, next_power_of_2, store

STRIP = 8  # chunks whose counts are added up at once


@dataclass(frozen=True)
class Config:
    block: int  # pairs that are ranked at once
    chunks: int  # at most
    num_warps: int


def config_for(num_items: int, num_experts: int, target: str) -> Config:
    """Which tile to use for these shapes on this target ("cuda" or "rocm")."""
    del target
    # Measured on an H100 with 256 experts. Few pairs want short chains of blocks, many want few counts to add up.
    block = 16 if num_items <= 128 else 32 if num_items <= 1024 else 64
    block = min(block, max(16, 16384 // next_power_of_2(num_experts)))
    many = num_items > 8192
    return Config(block=block, chunks=128 if many else 256, num_warps=8 if many else 4)


def num_rows(num_items: int, num_experts: int, align: int) -> int:
    """M: rows that hold every pair wherever the pairs fall."""
    if align == 1:
        return num_items
    # Plain arithmetic: torch.compile passes symbols.
    return (num_items + num_experts * (align - 1) + align - 1) // align * align


def _local(ids_ref: Any, map_ref: Any, item: jax.Array, num_items: int, num_experts: int, map_size: int) -> jax.Array:
    """The expert each item goes to, -1 if it goes nowhere."""
    ids = load(ids_ref.at[item], mask=item < num_items, other=-1)
    if map_ref is not None:
        ids = load(map_ref.at[jnp.maximum(ids, 0)], mask=(ids >= 0) & (ids < map_size), other=-1)
    return jnp.where((ids >= 0) & (ids < num_experts), ids, -1)


def sizes_for(num_items: int, num_experts: int, align: int, config: Config) -> dict[str, int]:
    """The sizes of both launches; each runs one program a chunk."""
    steps = pl.cdiv(pl.cdiv(num_items, config.block), config.chunks)
    rows = num_rows(num_items, num_experts, align)
    return {"num_items": num_items, "rows": rows, "chunks": pl.cdiv(num_items, steps * config.block), "steps": steps}


def _count_kernel(
    *refs: Any, map_size: int, num_experts: int, block: int, num_items: Any, rows: Any, chunks: Any, steps: Any
) -> None:
    ids_ref, *map_ref, counts_ref, slots_ref = refs
    experts = next_power_of_2(num_experts)
    chunk, start = pl.program_id(0), pl.program_id(0) * (steps * block)

    def step(i: jax.Array, counts: jax.Array) -> jax.Array:
        item = start + i * block + iota((block, experts), 0)
        ids = _local(ids_ref, map_ref[0] if map_ref else None, item, num_items, num_experts, map_size)
        return counts + (ids == iota((block, experts), 1)).astype(jnp.int32)

    counts = jax.lax.fori_loop(0, steps, step, jnp.zeros((block, experts), jnp.int32))
    expert = iota((experts,), 0)
    store(counts_ref.at[chunk, expert], jnp.sum(counts, axis=0, dtype=jnp.int32), mask=expert < num_experts)

    # Rows that no pair will claim keep this -1.
    share = 1024
    first = chunk * share

    def clear(i: jax.Array, _: None) -> None:
        row = first + i * (share * chunks) + iota((share,), 0)
        store(slots_ref.at[row], jnp.full((share,), -1, jnp.int32), mask=row < rows)

    jax.lax.fori_loop(0, pl.cdiv(rows, share * chunks), clear, None)


def _place_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    block: int,
    align: int,
    num_items: Any,
    rows: Any,
    chunks: Any,
    steps: Any,
) -> None:
    ids_ref, *map_ref, counts_ref, _, rows_ref, slots_ref, sizes_ref = refs
    expert_map = map_ref[0] if map_ref else None
    experts = next_power_of_2(num_experts)
    chunk, start = pl.program_id(0), pl.program_id(0) * (steps * block)

    # Two sums over the chunks at once: all of them, and those before this one.
    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, expert = i * STRIP + iota((STRIP, experts), 0), iota((STRIP, experts), 1)
        counts = load(counts_ref.at[at, expert], mask=(at < chunks) & (expert < num_experts), other=0)
        return sums[0] + counts, sums[1] + jnp.where(at < chunk, counts, 0)

    zeros = jnp.zeros((STRIP, experts), jnp.int32)
    total, before = jax.lax.fori_loop(0, pl.cdiv(chunks, STRIP), add, (zeros, zeros))
    size = jnp.sum(total, axis=0, dtype=jnp.int32)
    size = (size + (align - 1)) // align * align
    base = jnp.cumsum(size, axis=0, dtype=jnp.int32) - size + jnp.sum(before, axis=0, dtype=jnp.int32)

    expert = iota((experts,), 0)
    store(sizes_ref.at[expert], size, mask=(expert < num_experts) & (chunk == 0))

    def step(i: jax.Array, base: jax.Array) -> jax.Array:
        at = start + i * block
        local = functools.partial(
            _local, ids_ref, expert_map, num_items=num_items, num_experts=num_experts, map_size=map_size
        )
        mine = local(at + iota((block, experts), 0)) == iota((block, experts), 1)
        place = jnp.sum(jnp.where(mine, base[None, :], 0), axis=1, dtype=jnp.int32)
        pair = (block, block)
        same = local(at + iota(pair, 0)) == local(at + iota(pair, 1))
        place = place + jnp.sum((same & (iota(pair, 1) < iota(pair, 0))).astype(jnp.int32), axis=1, dtype=jnp.int32)

        item = at + iota((block,), 0)
        goes = local(item) >= 0
        store(rows_ref.at[item], jnp.where(goes, place, -1), mask=item < num_items)
        # Masked lanes point past the end, each elsewhere: the interpreter writes old values back where the mask is off.
        store(slots_ref.at[jnp.where(goes, place, rows + item)], item, mask=goes)
        return base + jnp.sum(mine.astype(jnp.int32), axis=0, dtype=jnp.int32)

    jax.lax.fori_loop(0, steps, step, base)


def plan_dispatch(
    experts: jax.Array,
    expert_map: jax.Array | None,
    *,
    num_experts: int,
    align: int = 1,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows int32 [T, S], slots int32 [M], group_sizes int32 [num_experts]) of experts int32 [T, S], both over 0."""
    num_items = experts.size
    config = config or config_for(num_items, num_experts, target)
    sizes = sizes_for(num_items, num_experts, align, config)
    rows, chunks = sizes["rows"], sizes["chunks"]
    ids = [experts.reshape(-1), *([] if expert_map is None else [expert_map])]
    common = {
        "map_size": 0 if expert_map is None else expert_map.size,
        "num_experts": num_experts,
        "block": config.block,
    }
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.int32)
    counts, cleared = launch(
        functools.partial(_count_kernel, **common),
        *ids,
        name="plan_count",
        grid=(chunks,),
        out_shape=[shape(chunks, num_experts), shape(rows)],
        sizes=sizes,
        num_warps=config.num_warps,
        interpret=interpret,
    )
    flat_rows, slots, group_sizes = launch(
        functools.partial(_place_kernel, **common, align=align),
        *ids,
        counts,
        cleared,
        name="plan_place",
        grid=(chunks,),
        out_shape=[shape(num_items), shape(rows), shape(num_experts)],
        sizes=sizes,
        num_warps=config.num_warps,
        aliases={len(ids) + 1: 1},
        interpret=interpret,
    )
    return flat_rows.reshape(experts.shape), slots, group_sizes
