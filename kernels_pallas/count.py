"""Routing's load: how many (token, slot) pairs chose each expert id.

Each program counts its pairs by themselves (`histogram`) and adds its counts to those of the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.counting import histogram
from kernels_pallas.launch import add_at, iota, launch, load, next_power_of_2, remembered


@dataclass(frozen=True)
class Config:
    pairs: int  # of one program, a power of two
    num_warps: int


@remembered
def config_for(num_items: int, target: str) -> Config:
    """How to share out so many pairs on this target ("cuda" or "rocm")."""
    # As many threads as there are ids of most models: each reads back, and adds, one count. Measured on an H200.
    return Config(pairs=512 if num_items <= 8192 else 4096, num_warps=8 if target == "rocm" else 16)


def _kernel(
    experts_ref: Any, _: Any, load_ref: Any, *, num_ids: int, config: Config, assembly: bool, num_items: Any
) -> None:
    start, bins = pl.program_id(0) * config.pairs, next_power_of_2(num_ids)

    def ids(index: jax.Array) -> jax.Array:
        mask = (index < config.pairs) & (start + index < num_items)
        found = load(experts_ref.at[start + index], mask=mask, other=-1)
        return jnp.where(found < num_ids, found, -1)

    parts = max(config.pairs // max(bins, 32 * config.num_warps), 1)
    counts = histogram(ids, config.pairs, num_ids, config.num_warps, assembly, parts=parts)
    if counts.shape[0] >= 4 * bins:  # many more threads than ids: zeros that would all be added to the same few places
        counts = jnp.sum(counts.reshape(-1, bins), axis=0, dtype=jnp.int32)
    # Lanes past the last id add nothing, each elsewhere: additions to one place wait for one another.
    add_at(load_ref, jax.lax.rem(iota(counts.shape, 0), np.int32(num_ids)), counts)


@remembered
def grid_for(num_items: int, config: Config) -> tuple[int]:
    """The programs of the launch."""
    return (pl.cdiv(num_items, config.pairs),)


def count_load(
    experts: jax.Array,
    cleared: jax.Array,
    *,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """load int32 [num_ids], written over `cleared` (zeros): how often each id stands in experts int32 [T, S]."""
    config = config or config_for(experts.size, target)
    return launch(
        functools.partial(_kernel, num_ids=cleared.size, config=config, assembly=target == "cuda" and not interpret),
        experts.reshape(-1),
        cleared,
        name="count_load",
        grid=grid_for(experts.size, config),
        sizes={"num_items": experts.size},
        out_shape=[jax.ShapeDtypeStruct(cleared.shape, jnp.int32)],
        num_warps=config.num_warps,
        aliases={1: 0},
        interpret=interpret,
    )[0]
