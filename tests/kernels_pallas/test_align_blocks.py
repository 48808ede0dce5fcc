"""align_blocks in the interpreter, in one launch and in two, against the oracle's plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.align_blocks import align_blocks
from tests.check_plan import WAYS, PlanCase, blocks_length, check_blocks, drawn

CASES = [
    PlanCase("one token, odd E", 5, tokens=1, align=4),
    PlanCase("E = K = 1", 1, tokens=1, slots=1, align=4),
    PlanCase("K = E", 3, slots=3, align=2, ids=lambda t, s: np.tile(np.arange(s), (t, 1))),
    PlanCase("blocks of one pair", 13),
    PlanCase("more experts than pairs: most get none", 200, tokens=7, align=16),
    PlanCase("every pair to the last expert", 6, align=8, ids=lambda t, s: np.full((t, s), 5)),
    PlanCase("all dropped", 9, align=4, ids=lambda t, s: np.full((t, s), -1)),
    PlanCase("aligned to 3; negative ids and ids past the end", 7, align=3, ids=drawn(-3, 9)),
    PlanCase("more blocks than a program names at once", 6, tokens=150, align=2),
    PlanCase("mapped, some elsewhere", 3, align=8, expert_map=(-1, 2, -1, 0, 1, -1)),
    PlanCase("nothing is here", 3, align=4, expert_map=(-1, -1, -1)),
]
NAMED = [
    PlanCase("experts by the names of a map", 6, align=4, expert_map=(-1, 2, -1, 0, 1, -1)),
    PlanCase("and ids past the end", 5, align=8, expert_map=(3, -1, 0, 9, 1), ids=drawn(-1, 9)),
]


@pytest.mark.in_ci(way="two launches")  # the same but for how blocks are counted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("case", "named"), [(case, case in NAMED) for case in CASES + NAMED], ids=lambda v: getattr(v, "why", "")
)
def test_align_blocks(case: PlanCase, named: bool, way: str) -> None:
    ids, expert_map = case.inputs()
    length = blocks_length(ids.size, case.num_experts, case.align)
    options = {"num_experts": case.num_experts, "align": case.align, "length": length, "named": named}
    got = align_blocks(ids, expert_map, config=WAYS[way], interpret=True, **options)
    check_blocks(got, ids, case.num_experts, case.align, expert_map, named=named)


def test_the_check_rejects_what_is_wrong() -> None:
    """Pairs that changed places, a block of another expert, one row more in use."""
    case = PlanCase("", 5, align=4, tokens=7)
    ids, _ = case.inputs()
    right = align_blocks(ids, None, num_experts=5, align=4, length=blocks_length(14, 5, 4), interpret=True)
    swapped = jnp.asarray(right[0]).at[jnp.array([0, 4])].set(right[0][jnp.array([4, 0])])
    wrong: list[tuple[jax.Array, ...]] = [
        (swapped, *right[1:]),
        (right[0], right[1].at[1].add(1), right[2]),
        (*right[:2], right[2] + 1),
    ]
    check_blocks(right, ids, 5, 4)
    for blocks in wrong:
        with pytest.raises(AssertionError):
            check_blocks(blocks, ids, 5, 4)
