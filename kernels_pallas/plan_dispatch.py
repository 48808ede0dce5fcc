"""The dispatch plan: a stable counting sort of (token, slot) pairs by expert, in one launch or two.

No program waits for another and nothing is added up atomically: the plan depends on the ids alone. A pair's key is its
expert with its own index behind it, so no two are the same.

Few pairs take one launch. A pair's row is the number of keys below its own, so every program compares its pairs with
all pairs. Alignment adds the padding of the experts before, for which every program counts all of them.

Many pairs take two. They are cut into blocks, and runs of blocks make up chunks, of which there are few. The first
launch puts each block in order, by comparing its keys with one another, and counts each chunk's experts, block after
block. In the second every block adds up the chunks' counts, which tells it the first free row of each expert, and gives
its pairs, which lie in order now, to these rows. So the work grows linearly with the number of pairs.

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
from kernels_pallas.launch import iota, launch, load, next_power_of_2, store

NAMES = ("plan_dispatch", "plan_count", "plan_place")  # of the kernels: the one launch, or the two
INDEX_BITS = 16  # of a key, below the expert's; the sign stays free
NOWHERE = 2**31 - 1  # the key of a pair that is dropped: above all others
STRIP = 128  # pairs that are loaded at once, one a thread
TOGETHER = 4  # strips on their way while as many are looked at
LOW = 16  # the base in which experts have two digits, or one and a high one


@dataclass(frozen=True)
class Config:
    block: int  # pairs that a program gives their rows; with one launch others give half as many experts their sizes
    chunks: int  # at most; 0: one launch
    num_warps: int
    counted: int = 128  # pairs at once, where one launch aligns


def config_for(num_items: int, num_experts: int, align: int, target: str) -> Config:
    """Which way and tile to use for these shapes on this target ("cuda" or "rocm")."""
    del num_experts
    num_warps = 2 if target == "rocm" else 4  # 128 threads, as many as a strip has pairs
    if align == 1 and num_items <= 3072:
        return Config(block=8, chunks=0, num_warps=num_warps)
    if num_items <= 64:
        return Config(block=4, chunks=0, num_warps=num_warps, counted=32)
    if num_items <= 512:  # with padding every program counts all pairs
        return Config(block=8, chunks=0, num_warps=num_warps, counted=256)
    if num_items <= 32768:
        return Config(block=128 if num_items <= 16384 else 256, chunks=32, num_warps=num_warps)
    return Config(block=512, chunks=64, num_warps=num_warps)


def num_rows(num_items: int, num_experts: int, align: int) -> int:
    """M: rows that hold every pair wherever the pairs fall."""
    if align == 1:
        return num_items
    # Plain arithmetic: torch.compile passes symbols.
    return (num_items + num_experts * (align - 1) + align - 1) // align * align


def sizes_for(num_items: int, rows: int, config: Config) -> dict[str, int]:
    """The sizes of every launch: `blocks` there are, `steps` of them in a chunk."""
    blocks = pl.cdiv(num_items, config.block)
    sizes = {"num_items": num_items, "rows": rows, "blocks": blocks}
    return {**sizes, "steps": pl.cdiv(blocks, config.chunks)} if config.chunks else sizes


def grids_for(num_experts: int, sizes: dict[str, int], config: Config) -> list[int]:
    """The programs of each launch: one for each block, in the first also some for the experts."""
    blocks = sizes["blocks"]
    if not config.chunks:
        return [blocks + pl.cdiv(num_experts, config.block // 2)]
    return [blocks + pl.cdiv(blocks, sizes["steps"]) * pl.cdiv(num_experts, LOW * LOW), blocks]


def num_counts(sizes: dict[str, int]) -> int:
    """How many times each expert's pairs are counted: in each chunk before every block and behind the last."""
    return pl.cdiv(sizes["blocks"], sizes["steps"]) * (sizes["steps"] + 1)


def _local(ids_ref: Any, map_ref: Any, item: jax.Array, num_items: Any, num_experts: int, map_size: int) -> jax.Array:
    """The expert each item goes to, -1 if it goes nowhere."""
    ids = load(ids_ref.at[item], mask=item < num_items, other=-1)
    if map_ref is not None:
        ids = load(map_ref.at[jnp.maximum(ids, 0)], mask=(ids >= 0) & (ids < map_size), other=-1)
    return jnp.where((ids >= 0) & (ids < num_experts), ids, -1)


def _key(expert: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.where(expert >= 0, (expert << INDEX_BITS) | index, NOWHERE)


def _minus_less(a: jax.Array, b: jax.Array) -> jax.Array:
    """-1 where a < b, else 0: the sign, which takes fewer instructions than a comparison."""
    return (a - b) >> 31


def _tally(total: jax.Array, expert: jax.Array) -> jax.Array:
    """Adds pairs to the counts of experts: total [n, LOW], that of expert i * LOW + j at (i, j).

    One product of matrices of 0 and 1, the pairs' high digits by their low ones: tensor cores count.
    """
    high = (expert // LOW)[None, :] == iota((total.shape[0], expert.shape[0]), 0)
    low = (expert & (LOW - 1))[None, :] == iota((LOW, expert.shape[0]), 0)
    return total + jax.lax.dot_general(
        high.astype(jnp.int8), low.astype(jnp.int8), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )


def _padding(count: jax.Array, align: int) -> jax.Array:
    return -count % align


def _plan_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    align: int,
    form: str,
    config: Config,
    num_items: Any,
    rows: Any,
    blocks: Any,
) -> None:
    ids_ref, *given, first_ref, second_ref, third_ref = refs
    out = forms.results([first_ref, second_ref, third_ref], form, num_items)
    map_ref, names_ref = forms.maps(given, form)
    program, half = pl.program_id(0), config.block // 2
    index = iota((half,), 0)

    def local(item: jax.Array) -> jax.Array:
        return _local(ids_ref, map_ref, item, num_items, num_experts, map_size)

    def strips(i: Any) -> list[jax.Array]:
        items = [(i * TOGETHER + j) * STRIP + iota((STRIP,), 0) for j in range(TOGETHER)]
        return [_key(local(item), item) for item in items]

    def below(*bounds: jax.Array) -> list[jax.Array]:
        """How many keys are below each bound; the bounds come in arrays [n]."""

        def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            keys, counts = carry
            following = strips(i + 1)
            for key in keys:
                less = [_minus_less(key[None, :], bound[:, None]) for bound in bounds]
                counts = [a + b for a, b in zip(counts, less, strict=True)]
            return following, counts

        zeros = [jnp.zeros((bound.shape[0], STRIP), jnp.int32) for bound in bounds]
        _, counts = jax.lax.fori_loop(0, pl.cdiv(num_items, STRIP * TOGETHER), step, (first_strips, zeros))
        return [-jnp.sum(count, axis=1, dtype=jnp.int32) for count in counts]

    first_strips = strips(0)
    # The first programs have pairs, two halves of them; the others have experts, which begin and end somewhere.
    has_pairs, share, num_shares = program < blocks, program - blocks, pl.cdiv(num_experts, half)
    items = [program * config.block + i * half + index for i in range(2)]
    pair_experts = [local(item) for item in items]  # those of other programs lie past the end
    mine = share * half + index
    bounds = [
        jnp.where(has_pairs, _key(expert, item), (mine + i) << INDEX_BITS)
        for i, (expert, item) in enumerate(zip(pair_experts, items, strict=True))
    ]
    *places, used = below(*bounds, jnp.full((1,), num_experts << INDEX_BITS, jnp.int32))
    size, end = places[1] - places[0], jnp.sum(used)

    if align > 1:
        tile = (max(next_power_of_2(num_experts) // LOW, LOW), LOW)
        step = lambda i, total: _tally(total, local(i * config.counted + iota((config.counted,), 0)))
        counts = jax.lax.fori_loop(0, pl.cdiv(num_items, config.counted), step, jnp.zeros(tile, jnp.int32))
        padding, other = _padding(counts, align), iota(tile, 0) * LOW + iota(tile, 1)
        for i, expert in enumerate(pair_experts):
            expert = jnp.where(has_pairs, expert, mine)
            before = jnp.where(other[None] < expert[:, None, None], padding[None], 0)
            places[i] = places[i] + jnp.sum(jnp.sum(before, axis=2, dtype=jnp.int32), axis=1, dtype=jnp.int32)
        end = end + jnp.sum(padding, dtype=jnp.int32)

    @pl.when(has_pairs)
    def _() -> None:
        for expert, item, row in zip(pair_experts, items, places, strict=True):
            goes = expert >= 0
            if out.rows is not None:
                store(out.rows.at[item], jnp.where(goes, row, -1), mask=item < num_items)
            # Masked lanes point past the end, each elsewhere: the interpreter writes old values where the mask is off.
            store(out.slots.at[jnp.where(goes, row, rows + item)], item, mask=goes)

    @pl.when(share >= 0)
    def _() -> None:
        padding, inside = _padding(size, align), mine < num_experts
        forms.fill(out.slots, out.empty, end, rows, share, num_shares)
        if align > 1:
            forms.fill_runs(out.slots, jnp.full((half,), out.empty, jnp.int32), places[0] + size, padding, rows)
        if out.sizes is not None:
            store(out.sizes.at[mine], size + padding, mask=inside)
        else:
            in_use, whole = jnp.where(inside, size + padding, 0) // align, pl.cdiv(rows, align)
            forms.fill_runs(
                out.block_experts, forms.name(names_ref, mine, num_experts), places[0] // align, in_use, whole
            )
            forms.fill(out.block_experts, -1, end // align, whole, share, num_shares)
            forms.tell(out.used, end, share == 0)


def _count_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    form: str,
    config: Config,
    num_items: Any,
    rows: Any,
    blocks: Any,
    steps: Any,
) -> None:
    ids_ref, *given, order_ref, counts_ref, slots_ref = refs
    map_ref = forms.maps(given, form)[0]
    block, program, ranges = config.block, pl.program_id(0), pl.cdiv(num_experts, LOW * LOW)

    def local(item: jax.Array) -> jax.Array:
        return _local(ids_ref, map_ref, item, num_items, num_experts, map_size)

    @pl.when(program < blocks)
    def _() -> None:
        start, index = program * block, iota((block,), 0)
        expert = local(start + index)
        key = _key(expert, index)

        def step(i: jax.Array, place: jax.Array) -> jax.Array:
            other = i * STRIP + iota((STRIP,), 0)
            less = _minus_less(_key(local(start + other), other)[:, None], key[None, :])
            return place - jnp.sum(less, axis=0, dtype=jnp.int32)

        place = jax.lax.fori_loop(0, block // STRIP, step, jnp.zeros((block,), jnp.int32))
        store(order_ref.at[start + place], start + index, mask=expert >= 0)

    @pl.when(program >= blocks)
    def _() -> None:
        chunk, tile = (program - blocks) // ranges, (LOW, LOW)
        first = (program - blocks - chunk * ranges) * LOW * LOW
        column = first + iota(tile, 0) * LOW + iota(tile, 1)

        def strips(i: Any) -> list[jax.Array]:
            start = (chunk * steps + i) * block
            return [local(start + j * STRIP + iota((STRIP,), 0)) - first for j in range(block // STRIP)]

        def put(i: Any, total: jax.Array) -> None:
            store(counts_ref.at[chunk * (steps + 1) + i, column], total, mask=column < num_experts)

        def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            experts, total = carry
            following = strips(i + 1)
            put(i, total)
            return following, functools.reduce(_tally, experts, total)

        _, total = jax.lax.fori_loop(0, steps, step, (strips(0), jnp.zeros(tile, jnp.int32)))
        put(steps, total)

    empty = -1 if form == forms.PLAN else num_items
    forms.fill(slots_ref, empty, 0, rows, program, blocks + pl.cdiv(blocks, steps) * ranges)


def _place_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    align: int,
    form: str,
    config: Config,
    num_items: Any,
    rows: Any,
    blocks: Any,
    steps: Any,
) -> None:
    ids_ref, *given, order_ref, counts_ref, _, first_ref, second_ref, third_ref = refs
    out = forms.results([first_ref, second_ref, third_ref], form, num_items)
    map_ref, names_ref = forms.maps(given, form)
    block, experts, program = config.block, next_power_of_2(num_experts), pl.program_id(0)
    start, chunk, expert = program * block, program // steps, iota((experts,), 0)
    inside = expert < num_experts

    before = load(counts_ref.at[program + chunk, expert], mask=inside, other=0)
    count = load(counts_ref.at[program + chunk + 1, expert], mask=inside, other=0) - before
    if out.rows is not None:
        item = start + iota((block,), 0)
        dropped = _local(ids_ref, map_ref, item, num_items, num_experts, map_size) < 0
        store(out.rows.at[item], jnp.full((block,), -1, jnp.int32), mask=dropped & (item < num_items))

    tile = (min(config.chunks, max(8192 // experts, 1)), experts)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of all chunks, and of those before this block's."""
        other, column = i * tile[0] + iota(tile, 0), iota(tile, 1)
        mask = (column < num_experts) & (other < pl.cdiv(blocks, steps))
        total = load(counts_ref.at[other * (steps + 1) + steps, column], mask=mask, other=0)
        earlier = jnp.where(other < chunk, total, 0)
        return sums[0] + jnp.sum(total, axis=0, dtype=jnp.int32), sums[1] + jnp.sum(earlier, axis=0, dtype=jnp.int32)

    zeros = jnp.zeros((experts,), jnp.int32)
    size, before = jax.lax.fori_loop(0, pl.cdiv(config.chunks, tile[0]), add, (zeros, before))
    size = size + _padding(size, align)
    end = jnp.cumsum(size, axis=0, dtype=jnp.int32)
    if out.sizes is not None:
        store(out.sizes.at[expert], size, mask=inside & (program == 0))
    row = end - size + before
    place = start + jnp.cumsum(count, axis=0, dtype=jnp.int32) - count

    tile = (max(2048 // experts, 1), experts)

    def give(i: jax.Array, _: None) -> None:
        index = i * tile[0] + iota(tile, 0)
        goes = index < count[None, :]
        item = load(order_ref.at[place[None, :] + index], mask=goes, other=0)
        # Masked lanes point past the end, each elsewhere: the interpreter writes old values back where the mask is off.
        end = iota(tile, 0) * experts + iota(tile, 1)
        if out.rows is not None:
            store(out.rows.at[jnp.where(goes, item, num_items + end)], row[None, :] + index, mask=goes)
        store(out.slots.at[jnp.where(goes, row[None, :] + index, rows + end)], item, mask=goes)

    jax.lax.fori_loop(0, pl.cdiv(jnp.max(count), tile[0]), give, None)
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
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The results of one launch, called names[0], or of two."""
    sizes = sizes_for(experts.size, rows, config)
    grids = [(programs,) for programs in grids_for(num_experts, sizes, config)]
    ids = [experts.reshape(-1), *([] if given_map is None else [given_map])]
    common: dict[str, Any] = {"num_experts": num_experts, "form": form, "config": config}
    common["map_size"] = 0 if given_map is None else given_map.size
    run = functools.partial(launch, sizes=sizes, num_warps=config.num_warps, interpret=interpret)
    if config.chunks == 0:
        kernel = functools.partial(_plan_kernel, **common, align=align)
        return run(kernel, *ids, name=names[0], grid=grids[0], out_shape=out_shape)
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.int32)
    kernel = functools.partial(_count_kernel, **common)
    shapes = [shape(experts.size), shape(num_counts(sizes), num_experts), shape(rows)]
    found = run(kernel, *ids, name=names[1], grid=grids[0], out_shape=shapes)
    kernel = functools.partial(_place_kernel, **common, align=align)
    cleared = {len(ids) + 2: 1 if form == forms.PLAN else 0}  # the slots
    return run(kernel, *ids, *found, name=names[2], grid=grids[1], out_shape=out_shape, aliases=cleared)


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
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.int32)
    length = num_rows(experts.size, num_experts, align)
    rows, slots, group_sizes = planned(
        experts,
        expert_map,
        forms.PLAN,
        [shape(experts.size), shape(length), shape(num_experts)],
        NAMES,
        num_experts=num_experts,
        align=align,
        rows=length,
        config=config or config_for(experts.size, num_experts, align, target),
        interpret=interpret,
    )
    return rows.reshape(experts.shape), slots, group_sizes
