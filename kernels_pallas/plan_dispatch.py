"""The dispatch plan: a stable counting sort of (token, slot) pairs by expert, in one launch or two.

No program waits for another, and a pair's row is a number of other pairs: the plan depends on the ids alone. Few pairs
take one launch (plan_owned.py).

Many pairs take two. They are cut into blocks, and runs of blocks make up chunks, of which there are few. The first
launch counts each chunk's experts, block after block. In the second every block adds up the chunks' counts, which tells
it the first free row of each expert; a pair's row lies behind it by as many as chose the expert before in the block. So
the work grows linearly with the number of pairs.

What is planned does not depend on how many rows there are. Where there are fewer than the pairs may take (`max_rows`),
each program leaves out what lies behind the last row.

The results come in one of two forms: the plan, or (align_blocks.py) the order of pairs with each block's expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import plan_forms as forms
from kernels_pallas.counting import BITS, LOW, STRIP, histogram, places, tally
from kernels_pallas.launch import cdiv, iota, launch, load, next_power_of_2, remembered, store
from kernels_pallas.plan_owned import plan_kernel

NAMES = ("plan_dispatch", "plan_count", "plan_place")  # of the kernels: the one launch, or the two
AT_ONCE = 4096  # pairs that one launch takes


@dataclass(frozen=True)
class Config:
    num_warps: int
    # With one launch:
    owned: int = 0  # experts of a program, a power of two
    words: int = 0  # of a bit a pair, a power of two: so many that every pair has a bit
    # With two:
    block: int = 0  # pairs that a program gives their rows
    chunks: int = 0  # at most
    together: int = 0  # blocks of a chunk, a power of two, that are counted at once; 0: one after another

    @property
    def at_once(self) -> bool:
        """Whether there is one launch."""
        return self.words > 0


@remembered
def config_for(num_items: int, num_experts: int, target: str) -> Config:
    """Which way and tile to use for these shapes on this target ("cuda" or "rocm")."""
    experts = next_power_of_2(num_experts)
    wide = 2 if target == "rocm" else 1  # a warp has as many threads as two
    if num_items <= (AT_ONCE if experts <= 512 else AT_ONCE // 2):
        words = next(words for words in (2, 16, 32, 64, 128) if num_items <= words * BITS)
        owned = min(max(1, experts // 128), 512 // words)
        return Config((4 if words <= 32 else 8) // wide, owned=owned, words=words)
    if target == "rocm":  # where a block's pairs are compared with one another
        block = 128 if num_items <= 16384 else 256 if num_items <= 65536 else 512
        return Config(4 // wide, block=block, chunks=32 if num_items <= 65536 else 64)
    block = 512
    most = 4096 // max(width(num_experts), block)  # of them together: more would take too many registers
    for chunks in (16, 32, 64, 128):
        steps = pl.cdiv(num_items, chunks * block)
        if steps <= most:
            return Config(4, block=block, chunks=chunks, together=max(2, next_power_of_2(steps)))
    return Config(4, block=block, chunks=64 if num_experts <= 256 else 32)


def width(num_experts: int) -> int:
    """How many numbers stand for the experts of a block, where several blocks are counted together."""
    return max(next_power_of_2(num_experts), 64)


def num_rows(num_items: int, num_experts: int, align: int, max_rows: int | None = None) -> int:
    """M: rows that hold every pair wherever the pairs fall, or max_rows where these are fewer."""
    # Plain arithmetic: torch.compile passes symbols, though no `max_rows`.
    rows = num_items if align == 1 else (num_items + num_experts * (align - 1) + align - 1) // align * align
    return rows if max_rows is None else min(rows, max_rows)


def sizes_for(num_items: int, rows: int, config: Config) -> dict[str, int]:
    """The sizes of every launch. With two: `blocks` there are, `steps` of them in a chunk."""
    sizes = {"num_items": num_items, "rows": rows}
    if config.at_once:
        return sizes
    blocks = pl.cdiv(num_items, config.block)
    steps = pl.cdiv(blocks, config.chunks)
    assert not config.together or steps <= config.together, f"{num_items} pairs do not fit {config}"
    return {**sizes, "blocks": blocks, "steps": steps}


def grids_for(num_experts: int, sizes: dict[str, int], config: Config) -> list[int]:
    """The programs of each launch: those that own experts; or one a block, and in the first launch those of chunks."""
    if config.at_once:
        return [pl.cdiv(num_experts, config.owned)]
    blocks = sizes["blocks"]
    return [pl.cdiv(blocks, sizes["steps"]) * num_ranges(num_experts, config), blocks]


def num_ranges(num_experts: int, config: Config) -> int:
    """Into how many ranges experts are cut to be counted, a program each."""
    return 1 if config.together else pl.cdiv(num_experts, LOW * LOW)


def num_counts(sizes: dict[str, int]) -> int:
    """How many times each expert's pairs are counted: in each chunk before every block and behind the last."""
    return pl.cdiv(sizes["blocks"], sizes["steps"]) * (sizes["steps"] + 1)


def _count_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    form: str,
    config: Config,
    assembly: bool,
    num_items: Any,
    rows: Any,
    blocks: Any,
    steps: Any,
) -> None:
    ids_ref, *given, counts_ref, slots_ref = refs
    map_ref = forms.maps(given, form)[0]
    block, program, ranges = config.block, pl.program_id(0), num_ranges(num_experts, config)

    def local(item: jax.Array) -> jax.Array:
        return forms.local(ids_ref, map_ref, item, num_items, num_experts, map_size)

    chunk = program // ranges

    def put(i: Any, column: jax.Array, total: jax.Array) -> None:
        mask = (i <= steps) & (column < num_experts)
        store(counts_ref.at[chunk * (steps + 1) + i, column], total, mask=mask)

    if config.together:
        wide = width(num_experts)

        def number(index: jax.Array) -> jax.Array:
            expert, i = local(chunk * steps * block + index), index // block
            return jnp.where((expert >= 0) & (i < steps), expert + i * wide, -1)  # the next chunk's would be in vain

        # Up to 512 experts as many numbers as bins are read at once, which eight blocks are slower with (on an H200).
        parts = max(block // wide, 1) if config.together <= 4 else 1
        counts = histogram(
            number, block * config.together, config.together * wide, config.num_warps, assembly, parts=parts
        )
        tile = (counts.shape[0] // wide, wide)
        total = jnp.cumsum(counts.reshape(tile), axis=0, dtype=jnp.int32)
        put(iota(tile, 0) + 1, iota(tile, 1), total)
        put(iota((wide,), 0) * 0, iota((wide,), 0), jnp.zeros((wide,), jnp.int32))
    else:
        tile = (LOW, LOW)
        first = (program - chunk * ranges) * LOW * LOW
        column = first + iota(tile, 0) * LOW + iota(tile, 1)

        def strips(i: Any) -> list[jax.Array]:
            start = (chunk * steps + i) * block
            return [local(start + j * STRIP + iota((STRIP,), 0)) - first for j in range(block // STRIP)]

        def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            experts, total = carry
            following = strips(i + 1)
            put(i, column, total)
            return following, functools.reduce(tally, experts, total)

        _, total = jax.lax.fori_loop(0, steps, step, (strips(0), jnp.zeros(tile, jnp.int32)))
        put(steps, column, total)

    empty = -1 if form == forms.PLAN else num_items
    forms.fill(slots_ref, empty, 0, rows, program, cdiv(blocks, steps) * ranges)


def _place_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    align: int,
    form: str,
    config: Config,
    assembly: bool,
    num_items: Any,
    rows: Any,
    blocks: Any,
    steps: Any,
) -> None:
    ids_ref, *given, counts_ref, _, first_ref, second_ref, third_ref = refs
    out = forms.results([first_ref, second_ref, third_ref], form, num_items)
    map_ref, names_ref = forms.maps(given, form)
    block, experts, program = config.block, max(next_power_of_2(num_experts), config.block), pl.program_id(0)
    start, chunk, expert = program * block, program // steps, iota((experts,), 0)
    inside = expert < num_experts

    def local(index: jax.Array) -> jax.Array:
        found = forms.local(ids_ref, map_ref, start + index, num_items, num_experts, map_size)
        return found if index.shape[0] <= block else jnp.where(index < block, found, -1)

    def give(index: jax.Array, row: jax.Array) -> None:
        """Row -1 for none; past the block there is none, nor past the last row."""
        row = jnp.where(row < rows, row, -1)
        item, goes = start + index, row >= 0
        if out.rows is not None:
            store(out.rows.at[item], row, mask=(index < block) & (item < num_items))
        # Masked lanes point past the end, each elsewhere: the interpreter writes old values where the mask is off.
        store(out.slots.at[jnp.where(goes, row, rows + index)], item, mask=goes)

    before = load(counts_ref.at[program + chunk, expert], mask=inside, other=0)
    tile = (min(config.chunks, max(8192 // experts, 1)), experts)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of all chunks, and of those before this block's."""
        other, column = i * tile[0] + iota(tile, 0), iota(tile, 1)
        mask = (column < num_experts) & (other < cdiv(blocks, steps))
        total = load(counts_ref.at[other * (steps + 1) + steps, column], mask=mask, other=0)
        earlier = jnp.where(other < chunk, total, 0)
        return sums[0] + jnp.sum(total, axis=0, dtype=jnp.int32), sums[1] + jnp.sum(earlier, axis=0, dtype=jnp.int32)

    zeros = jnp.zeros((experts,), jnp.int32)
    size, before = jax.lax.fori_loop(0, pl.cdiv(config.chunks, tile[0]), add, (zeros, before))
    size = size + forms.padding(size, align)
    end = jnp.cumsum(size, axis=0, dtype=jnp.int32)
    if out.sizes is not None:
        store(out.sizes.at[expert], forms.held(end - size, size, rows), mask=inside & (program == 0))
    first = end - size + before

    if assembly:
        give(expert, places(local(expert), first, block, num_experts, config.num_warps))
    else:
        strip = min(block, max(8192 // experts, 1))

        def step(i: jax.Array, _: None) -> None:
            index, other = i * strip + iota((strip,), 0), iota((block,), 0)
            number = local(index)
            same = (local(other)[None, :] == number[:, None]) & (other[None, :] < index[:, None])
            row = jnp.sum(same.astype(jnp.int32), axis=1, dtype=jnp.int32)
            begins = jnp.where(expert[None, :] == number[:, None], first[None, :], 0)
            give(index, jnp.where(number < 0, -1, row + jnp.sum(begins, axis=1, dtype=jnp.int32)))

        jax.lax.fori_loop(0, block // strip, step, None)
    if out.sizes is None:  # last: before the pairs it takes registers from what comes after (2 spills, triton 3.7.1)
        forms.name_blocks(out, names_ref, end, align, num_experts, rows, program, blocks)


def planned(
    experts: jax.Array,
    given_map: jax.Array | None,
    form: str,
    out_shape: list[jax.ShapeDtypeStruct],
    names: tuple[str, str, str],
    *,
    num_experts: int,
    align: int,
    rows: int,
    config: Config,
    assembly: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The results of one launch, called names[0], or of two."""
    sizes = sizes_for(experts.size, rows, config)
    grids = [(programs,) for programs in grids_for(num_experts, sizes, config)]
    ids = [experts.reshape(-1), *([] if given_map is None else [given_map])]
    common: dict[str, Any] = {"num_experts": num_experts, "form": form}
    common["map_size"] = 0 if given_map is None else given_map.size
    run = functools.partial(launch, sizes=sizes, num_warps=config.num_warps, interpret=interpret)
    if config.at_once:
        kernel = functools.partial(
            plan_kernel,
            **common,
            align=align,
            assembly=assembly,
            owned=config.owned,
            words=config.words,
            num_warps=config.num_warps,
        )
        return run(kernel, *ids, name=names[0], grid=grids[0], out_shape=out_shape)
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.int32)
    kernel = functools.partial(_count_kernel, **common, config=config, assembly=assembly)
    shapes = [shape(num_counts(sizes), num_experts), shape(rows)]
    found = run(kernel, *ids, name=names[1], grid=grids[0], out_shape=shapes)
    kernel = functools.partial(_place_kernel, **common, config=config, align=align, assembly=assembly)
    cleared = {len(ids) + 1: 1 if form == forms.PLAN else 0}  # the slots
    return run(kernel, *ids, *found, name=names[2], grid=grids[1], out_shape=out_shape, aliases=cleared)


def plan_dispatch(
    experts: jax.Array,
    expert_map: jax.Array | None,
    *,
    num_experts: int,
    align: int = 1,
    max_rows: int | None = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows int32 [T, S], slots int32 [M], group_sizes int32 [num_experts]) of experts int32 [T, S], both over 0.

    M is at most `max_rows`, a multiple of align: pairs whose row would lie behind are dropped, groups end there.
    """
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.int32)
    length = num_rows(experts.size, num_experts, align, max_rows)
    rows, slots, group_sizes = planned(
        experts,
        expert_map,
        forms.PLAN,
        [shape(experts.size), shape(length), shape(num_experts)],
        NAMES,
        num_experts=num_experts,
        align=align,
        rows=length,
        config=config or config_for(experts.size, num_experts, target),
        assembly=target == "cuda" and not interpret,
        interpret=interpret,
    )
    return rows.reshape(experts.shape), slots, group_sizes
