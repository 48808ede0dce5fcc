"""The dispatch plan of few pairs, in one launch: each program owns some experts.

It reads all ids. For each of its experts it makes words of bits, a bit for a pair that chose it, so a pair's place
among its expert's is the number of bits before its own. Where its experts begin is how many pairs the experts before
have, and, aligned, their padding, for which it counts the pairs of each (`histogram`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import plan_forms as forms
from kernels_pallas.counting import BITS, histogram
from kernels_pallas.launch import cdiv, iota, next_power_of_2, store


def plan_kernel(
    *refs: Any,
    map_size: int,
    num_experts: int,
    align: int,
    form: str,
    owned: int,
    words: int,
    num_warps: int,
    assembly: bool,
    num_items: Any,
    rows: Any,
) -> None:
    """Fills the results. `owned` experts are a program's; all pairs have a bit in `words`, [words, 32]."""
    ids_ref, *given, first_ref, second_ref, third_ref = refs
    out = forms.results([first_ref, second_ref, third_ref], form, num_items)
    map_ref, names_ref = forms.maps(given, form)
    program = pl.program_id(0)
    programs, first = np.int32(pl.cdiv(num_experts, owned)), program * owned  # int32 under x64, too

    def local(item: jax.Array) -> jax.Array:
        return forms.local(ids_ref, map_ref, item, num_items, num_experts, map_size)

    pairs, tile = (words, BITS), (owned, words, BITS)
    expert = local(iota(pairs, 0) * BITS + iota(pairs, 1))
    chosen = expert[None] == first + iota(tile, 0)
    word = jnp.sum(jnp.where(chosen, 1 << iota(tile, 2), 0), axis=2, dtype=jnp.int32)
    if align == 1:
        before = jnp.sum(((expert >= 0) & (expert < first)).astype(jnp.int32), dtype=jnp.int32)
        end = jnp.sum((expert >= 0).astype(jnp.int32), dtype=jnp.int32)
    else:
        counts = histogram(local, words * BITS, num_experts, num_warps, assembly)
        counts = counts + forms.padding(counts, align)
        other = iota(counts.shape, 0)
        before = jnp.sum(jnp.where(other < first, counts, 0), dtype=jnp.int32)
        end = jnp.sum(counts, dtype=jnp.int32)

    count = jax.lax.population_count(word)
    size = jnp.sum(count, axis=1, dtype=jnp.int32)
    padding = forms.padding(size, align)
    start = before + jnp.cumsum(size + padding, axis=0, dtype=jnp.int32) - (size + padding)
    row = start[:, None] + jnp.cumsum(count, axis=1, dtype=jnp.int32) - count

    def give(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        word, row = carry
        lowest, goes = word & -word, word != 0
        fits = goes & (row < rows)
        item = iota(word.shape, 1) * BITS + jax.lax.population_count(lowest - 1)
        # Masked lanes point past the end, each elsewhere: the interpreter writes old values where the mask is off.
        past = iota(word.shape, 0) * words + iota(word.shape, 1)
        if out.rows is not None:
            store(out.rows.at[jnp.where(goes, item, num_items + past)], jnp.where(fits, row, -1), mask=goes)
        store(out.slots.at[jnp.where(fits, row, rows + past)], item, mask=fits)
        return word ^ lowest, row + 1

    jax.lax.fori_loop(0, jnp.max(count), give, (word, row))

    if out.rows is not None:
        share = next_power_of_2(pl.cdiv(words * BITS, int(programs)))
        item = program * share + iota((share,), 0)
        store(out.rows.at[item], jnp.full((share,), -1, jnp.int32), mask=(local(item) < 0) & (item < num_items))
    mine = first + iota((owned,), 0)
    inside = mine < num_experts
    forms.fill(out.slots, out.empty, jnp.minimum(end, rows), rows, program, programs)
    if align > 1:
        forms.fill_runs(out.slots, jnp.full((owned,), out.empty, jnp.int32), start + size, padding, rows)
    if out.sizes is not None:
        store(out.sizes.at[mine], forms.held(start, size + padding, rows), mask=inside)
    else:
        whole = cdiv(rows, align)
        called = forms.name(names_ref, mine, num_experts)
        forms.fill_runs(out.block_experts, called, start // align, (size + padding) // align, whole)
        forms.fill(out.block_experts, -1, end // align, whole, program, programs)
        forms.tell(out.used, end, program == 0)
