"""Cases and checks of dispatch plans, shared by the CPU and the GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import DispatchPlan
from kernels_pallas.plan_dispatch import Config
from tests import oracle

# The ways to a plan, for up to 1024 pairs.
WAYS = {
    "one launch": Config(num_warps=4, owned=2, words=32),
    "two launches": Config(num_warps=4, block=128, chunks=4),
    "two launches, blocks counted together": Config(num_warps=4, block=128, chunks=4, together=2),
}


@dataclass(frozen=True)
class PlanCase:
    """One dispatch plan."""

    why: str
    num_experts: int
    slots: int = 2
    tokens: int = 21
    align: int = 1
    ids: Callable[[int, int], np.ndarray] | None = None  # (tokens, slots) -> ids
    expert_map: tuple[int, ...] | None = None
    max_rows: int | None = None

    def inputs(self, tokens: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        count = self.tokens if tokens is None or self.tokens == 0 else tokens
        high = len(self.expert_map) if self.expert_map else self.num_experts
        ids = (self.ids or (lambda t, s: np.random.default_rng(0).integers(0, high, (t, s))))(count, self.slots)
        expert_map = None if self.expert_map is None else jnp.asarray(self.expert_map, jnp.int32)
        return jnp.asarray(ids, jnp.int32), expert_map


def drawn(low: int, high: int) -> Callable[[int, int], np.ndarray]:
    return lambda t, s: np.random.default_rng(1).integers(low, high, (t, s))


def in_turn(count: int) -> Callable[[int, int], np.ndarray]:
    return lambda t, s: np.arange(t * s).reshape(t, s) % count


PLAN_CASES = [
    PlanCase("no tokens", 5, tokens=0),
    PlanCase("no tokens, aligned: rows that hold nothing", 5, tokens=0, align=8),
    PlanCase("one token", 5, tokens=1),
    PlanCase("one pair, one expert", 1, tokens=1, slots=1),
    PlanCase("odd E", 13, slots=3),
    PlanCase("more experts than pairs: most get none", 200, tokens=7),
    PlanCase("every pair to one expert", 6, ids=lambda t, s: np.full((t, s), 4)),
    PlanCase("every pair to the last expert, aligned", 6, align=8, ids=lambda t, s: np.full((t, s), 5)),
    PlanCase("only the first and the last expert", 33, ids=lambda t, s: drawn(0, 2)(t, s) * 32),
    PlanCase("negative ids are dropped", 9, ids=drawn(-3, 9)),
    PlanCase("all dropped", 9, ids=lambda t, s: np.full((t, s), -1)),
    PlanCase("all dropped, aligned", 9, align=4, ids=lambda t, s: np.full((t, s), -1)),
    PlanCase("ids past the end are dropped, not read (AITER #4636)", 9, ids=drawn(0, 12)),
    PlanCase("aligned to 4", 7, align=4),
    PlanCase("aligned to 3, no power of two", 7, align=3),
    PlanCase("aligned to 64, as grouped products want it", 5, align=64),
    PlanCase("expert map: the first and the last are here (vLLM #42034)", 2, expert_map=(0, -1, -1, -1, 1)),
    PlanCase("expert map with -1, aligned (SGLang #15250)", 3, align=8, expert_map=(-1, 2, -1, 0, 1, -1)),
    PlanCase("expert map, dropped ids, ids past its end", 3, expert_map=(2, 1, 0, -1), ids=drawn(-1, 7)),
    PlanCase("two ids to one local expert", 2, expert_map=(0, 1, 0, 1)),
    PlanCase("nothing is here", 3, expert_map=(-1, -1, -1)),
    PlanCase("256 experts, 9 slots: DeepSeek-V3", 257, slots=9),
    PlanCase("1024 experts", 1024, tokens=40),
    PlanCase("more pairs than one block", 6, tokens=150),
    PlanCase("cut within a group", 5, max_rows=20, ids=drawn(-1, 6)),
    PlanCase("cut where a group ends", 3, max_rows=28, ids=in_turn(3)),
    PlanCase("cut to one row", 5, max_rows=1),
    PlanCase("cut to as many rows as there are", 5, max_rows=42),
    PlanCase("rows for more than there is", 5, align=3, max_rows=2**20 * 3),
    PlanCase("cut before the last expert has a row", 9, max_rows=6, ids=lambda t, s: drawn(0, 2)(t, s) * 8),
    PlanCase("cut, aligned to 3", 7, align=3, max_rows=30),
    PlanCase("cut within a group, aligned to 64", 3, tokens=100, align=64, max_rows=192, ids=in_turn(3)),
    PlanCase("cut where a group ends, aligned to 64", 3, tokens=100, align=64, max_rows=256, ids=in_turn(3)),
    PlanCase("cut to one block", 5, align=64, max_rows=64),
    PlanCase("cut, with an expert map", 3, max_rows=8, expert_map=(-1, 2, -1, 0, 1, -1)),
    PlanCase("cut, with an expert map, aligned", 3, align=8, max_rows=16, expert_map=(-1, 2, -1, 0, 1, -1)),
    PlanCase("cut, nothing is here", 3, align=4, max_rows=8, expert_map=(-1, -1, -1)),
    PlanCase("cut, no tokens", 5, tokens=0, align=8, max_rows=16),
    PlanCase("cut, 1024 experts", 1024, tokens=40, align=4, max_rows=100),
]
PLAN_IDS = [case.why for case in PLAN_CASES]


def check_plan(
    plan: DispatchPlan,
    experts: Any,
    num_experts: int,
    align: int = 1,
    expert_map: Any = None,
    max_rows: int | None = None,
) -> None:
    """Equal to the oracle's plan; and the invariants that make it one."""
    rows, slots, sizes = (np.asarray(a) for a in plan)
    assert rows.dtype == slots.dtype == sizes.dtype == np.int32
    here = None if expert_map is None else np.asarray(expert_map)
    want = oracle.plan(np.asarray(experts), num_experts, align, here, max_rows)
    for got, expected in zip((rows, slots, sizes), want, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)
    flat = rows.reshape(-1)
    kept = np.flatnonzero(flat >= 0)
    np.testing.assert_array_equal(slots[flat[kept]], kept, "slots is the inverse of rows")
    assert (slots >= 0).sum() == len(kept)
    assert (sizes % align == 0).all()
    assert sizes.sum() <= len(slots)


def blocks_length(pairs: int, num_experts: int, align: int) -> int:
    """As many rows as can be in use."""
    return min(pairs * align, pairs + num_experts * (align - 1))


def check_blocks(
    blocks: Any, experts: Any, num_experts: int, align: int, expert_map: Any = None, *, named: bool = False
) -> None:
    """(pairs, block_experts, used), by the oracle; the map says where ids go or, if named, what blocks are called."""
    pairs, block_experts, used = (np.asarray(a) for a in blocks)
    assert pairs.dtype == block_experts.dtype == used.dtype == np.int32
    given = None if expert_map is None else np.asarray(expert_map)
    _, slots, sizes = oracle.plan(np.asarray(experts), num_experts, align, None if named else given)
    names = np.repeat(given[:num_experts] if named else np.arange(num_experts), sizes // align)
    length, total = len(pairs), np.asarray(experts).size
    assert used.tolist() == [sizes.sum()]
    np.testing.assert_array_equal(pairs, np.where(slots >= 0, slots, total)[:length])
    assert (slots[length:] < 0).all()
    assert block_experts.shape == (-(-length // align),)
    np.testing.assert_array_equal(block_experts, [*names, *[-1] * (len(block_experts) - len(names))])
