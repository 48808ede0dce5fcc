"""The order of (token, slot) pairs by expert in whole blocks, with the expert of each block.

What vLLM's fused experts, a product block by block, read (moe_align_block_size). The kernels are those of
plan_dispatch.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.plan_dispatch import Config, config_for, planned
from kernels_pallas.plan_forms import BLOCKS, NAMED_BLOCKS

NAMES = ("align_blocks", "align_count", "align_place")


def align_blocks(
    experts: jax.Array,
    expert_map: jax.Array | None,
    *,
    num_experts: int,
    align: int,
    length: int,
    named: bool = False,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pairs int32 [length], block_experts int32 [ceil(length / align)], used int32 [1]) of experts int32 [T, S].

    pairs: the flat index t * S + j of each row, T * S where there is none. used: how many rows the blocks in use have;
    behind them block_experts is -1. `expert_map` says where an id goes, as in `plan_dispatch`; if `named`, it says
    instead what the blocks of an expert are called. `length`: as many rows as can be in use, at least,
    which is not checked here. T and S over 0.
    """
    shape = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    assert not named or (expert_map is not None and expert_map.size >= num_experts)
    pairs, block_experts, used = planned(
        experts,
        expert_map,
        NAMED_BLOCKS if named else BLOCKS,
        [shape(length), shape(pl.cdiv(length, align)), shape(1)],
        NAMES,
        num_experts=num_experts,
        align=align,
        rows=length,
        config=config or config_for(experts.size, num_experts, target),
        assembly=target == "cuda" and not interpret,
        interpret=interpret,
    )
    return pairs, block_experts, used
