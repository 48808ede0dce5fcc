"""What the kernels of plan_dispatch.py fill: a plan, or the order of pairs with the expert of each block."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.launch import cdiv, iota, load, store

SHARE = 1024  # places that are filled at once
PLAN, BLOCKS, NAMED_BLOCKS = "plan", "blocks", "named blocks"  # of the last the map names the blocks, not the ids


class Results(NamedTuple):
    """What a kernel fills, and what stands in `slots` where a row holds no pair."""

    slots: Any
    empty: Any
    rows: Any = None
    sizes: Any = None
    block_experts: Any = None
    used: Any = None


def results(refs: list[Any], form: str, num_items: Any) -> Results:
    """The refs by what they hold in this form."""
    if form == PLAN:
        return Results(refs[1], -1, rows=refs[0], sizes=refs[2])
    return Results(refs[0], num_items, block_experts=refs[1], used=refs[2])


def maps(refs: list[Any], form: str) -> tuple[Any, Any]:
    """The map of ids and that of names, where there are any."""
    if not refs:
        return None, None
    return (None, refs[0]) if form == NAMED_BLOCKS else (refs[0], None)


def name(names_ref: Any, expert: jax.Array, num_experts: int) -> jax.Array:
    """What a block of this expert is called."""
    return expert if names_ref is None else load(names_ref.at[expert], mask=expert < num_experts, other=-1)


def local(ids_ref: Any, map_ref: Any, item: jax.Array, num_items: Any, num_experts: int, map_size: int) -> jax.Array:
    """The expert each item goes to, -1 if it goes nowhere."""
    ids = load(ids_ref.at[item], mask=item < num_items, other=-1)
    if map_ref is not None:
        ids = load(map_ref.at[jnp.maximum(ids, 0)], mask=(ids >= 0) & (ids < map_size), other=-1)
    return jnp.where((ids >= 0) & (ids < num_experts), ids, -1)


def padding(count: jax.Array, align: int) -> jax.Array:
    """Rows that an expert of so many pairs has besides."""
    return -count % align


def held(first: jax.Array, count: jax.Array, rows: Any) -> jax.Array:
    """How many of count[i] rows from first[i] on there are: a plan may be cut to fewer rows than its pairs take."""
    return jnp.minimum(first + count, rows) - jnp.minimum(first, rows)


def fill(ref: Any, value: Any, first: Any, end: Any, share: Any, num_shares: Any) -> None:
    """Writes the value to one of `num_shares` shares of what lies from `first` to `end`."""

    def step(i: jax.Array, _: None) -> None:
        at = first + (i * num_shares + share) * SHARE + iota((SHARE,), 0)
        store(ref.at[at], jnp.full((SHARE,), value, jnp.int32), mask=at < end)

    jax.lax.fori_loop(0, cdiv(end - first, SHARE * num_shares), step, None)


def fill_runs(ref: Any, value: jax.Array, first: jax.Array, count: jax.Array, end: Any) -> None:
    """Writes value[i] to `count[i]` places from first[i] on, but to none from `end` on."""
    tile = (first.shape[0], 64)

    def step(i: jax.Array, _: None) -> None:
        index = i * tile[1] + iota(tile, 1)
        at = first[:, None] + index
        inside = (index < count[:, None]) & (at < end)
        at = jnp.where(inside, at, end + iota(tile, 0) * tile[1] + iota(tile, 1))
        store(ref.at[at], jnp.broadcast_to(value[:, None], tile), mask=inside)

    jax.lax.fori_loop(0, cdiv(jnp.max(count), tile[1]), step, None)


def tell(ref: Any, number: jax.Array, here: Any) -> None:
    """Writes one number, if this is the program that does."""
    store(ref.at[iota((1,), 0)], jnp.full((1,), number, jnp.int32), mask=jnp.full((1,), here))


def name_blocks(
    out: Results, names_ref: Any, end: jax.Array, align: int, num_experts: int, rows: Any, share: Any, shares: Any
) -> None:
    """Its share of the blocks: an expert has those that begin before its end; behind the last end they are -1."""
    tile, whole, used = (8, end.shape[0]), cdiv(rows, align), jnp.max(end)
    tell(out.used, used, share == 0)

    def step(i: jax.Array, _: None) -> None:
        block = (i * tile[0] + iota(tile[:1], 0)) * shares + share
        expert = jnp.sum((end[None, :] <= block[:, None] * align).astype(jnp.int32), axis=1, dtype=jnp.int32)
        called = jnp.where(block * align < used, name(names_ref, expert, num_experts), -1)
        store(out.block_experts.at[block], called, mask=block < whole)

    jax.lax.fori_loop(0, cdiv(whole, tile[0] * shares), step, None)
