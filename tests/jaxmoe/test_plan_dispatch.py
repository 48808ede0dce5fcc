"""The dispatch plan, on the reference and on the interpreted kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmoe
from kernels_pallas import plan_dispatch as kernels
from tests.cases import EXAMPLES
from tests.check_plan import PLAN_CASES, PLAN_IDS, PlanCase, check_plan

I32 = jnp.int32


@pytest.mark.parametrize("case", PLAN_CASES, ids=PLAN_IDS)
def test_plan_dispatch(case: PlanCase, implementation: str, tokens: int | None) -> None:
    experts, expert_map = case.inputs(tokens)
    plan = jaxmoe.plan_dispatch(
        experts,
        case.num_experts,
        align=case.align,
        expert_map=expert_map,
        max_rows=case.max_rows,
        implementation=implementation,
    )
    check_plan(plan, experts, case.num_experts, case.align, expert_map, case.max_rows)


def test_checks_reject_wrong_plans() -> None:
    experts = jnp.array([[0, 2], [2, 1], [0, 2]], I32)
    plan = jaxmoe.plan_dispatch(experts, 3)
    wrong = {
        "not stable": plan._replace(rows=plan.rows.at[0, 0].set(1).at[2, 0].set(0)),
        "zeros": jax.tree.map(jnp.zeros_like, plan),
        "swapped experts": plan._replace(group_sizes=plan.group_sizes[jnp.array([1, 0, 2])]),
        "slots of another plan": plan._replace(slots=plan.slots[::-1]),
    }
    for name, result in wrong.items():
        with pytest.raises(AssertionError):
            check_plan(result, experts, 3)
            pytest.fail(f"not caught: {name}", pytrace=False)


def test_checks_reject_plans_that_are_cut_wrongly() -> None:
    experts = jnp.array([[0, 2], [2, 1], [0, 2]], I32)
    plan, whole = (jaxmoe.plan_dispatch(experts, 3, max_rows=rows) for rows in (4, None))
    wrong = {
        "not cut": whole,
        "rows behind the last": plan._replace(rows=whole.rows),
        "groups that go on": plan._replace(group_sizes=whole.group_sizes),
        "the last expert dropped as a whole": plan._replace(group_sizes=plan.group_sizes.at[2].set(0)),
    }
    check_plan(plan, experts, 3, max_rows=4)
    for name, result in wrong.items():
        with pytest.raises(AssertionError):
            check_plan(result, experts, 3, max_rows=4)
            pytest.fail(f"not caught: {name}", pytrace=False)


@pytest.mark.in_ci(align=lambda align: align > 1, max_rows=None)
@pytest.mark.parametrize(("align", "max_rows"), [(1, None), (4, None), (1, 301), (4, 600)])
@pytest.mark.parametrize(
    "config",
    [
        kernels.Config(num_warps=4, owned=1, words=32),
        kernels.Config(num_warps=4, owned=8, words=32),
        kernels.Config(num_warps=4, owned=128, words=64),
        *(kernels.Config(num_warps=4, block=128, chunks=chunks) for chunks in (1, 3, 16)),
        kernels.Config(num_warps=4, block=256, chunks=2),
        kernels.Config(num_warps=4, block=128, chunks=1, together=8),
        kernels.Config(num_warps=4, block=128, chunks=3, together=4),
        kernels.Config(num_warps=4, block=512, chunks=16, together=8),
    ],
    ids=str,
)
def test_however_the_pairs_are_cut(config: kernels.Config, align: int, max_rows: int | None) -> None:
    """One launch or two, blocks in chunks that are not all full, a ragged end: the same plan."""
    experts = jnp.asarray(np.random.default_rng(0).integers(-1, 70, (191, 5)), I32)
    plan = kernels.plan_dispatch(
        experts,
        None,
        num_experts=69,
        align=align,
        max_rows=max_rows,
        config=config,
        interpret=True,
    )
    check_plan(jaxmoe.DispatchPlan(*plan), experts, 69, align, max_rows=max_rows)


@pytest.mark.parametrize(
    ("count", "num_experts", "align", "max_rows"),
    [(512, 33, 3, 1200), (513, 33, 1, 1000), (512, 33, 64, 2048), (513, 33, 64, 2048), (300, 600, 3, 1500)],
)
def test_cut_in_either_number_of_launches(
    implementation: str, count: int, num_experts: int, align: int, max_rows: int
) -> None:
    """Eight slots: as many pairs as one launch takes, or more; of more than 512 experts one takes half as many."""
    experts = jnp.asarray(np.random.default_rng(0).integers(-1, num_experts, (count, 8)), I32)
    plan = functools.partial(jaxmoe.plan_dispatch, experts, num_experts, align=align, implementation=implementation)
    cut, whole = plan(max_rows=max_rows), plan()
    check_plan(cut, experts, num_experts, align, max_rows=max_rows)
    check_plan(whole, experts, num_experts, align)
    before = np.cumsum(whole.group_sizes) <= max_rows
    assert 0 < before.sum() < num_experts
    np.testing.assert_array_equal(cut.group_sizes[before], whole.group_sizes[before], "what fits is as it was")


@pytest.mark.in_ci(implementation="interpret")
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3, 8]),
    st.one_of(st.none(), st.integers(1, 6)),
    st.integers(0, 2**31),
)
def test_any_plan_against_the_oracle(
    implementation: str, count: int, slots: int, num_experts: int, align: int, blocks: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    experts = jnp.asarray(rng.integers(-2, num_experts + 2, (count, slots)), I32)
    expert_map = jnp.asarray(rng.integers(-1, num_experts, num_experts + 1), I32) if seed % 2 else None
    how: dict[str, Any] = {"align": align, "expert_map": expert_map, "max_rows": blocks and blocks * align}
    check_plan(
        jaxmoe.plan_dispatch(experts, num_experts, implementation=implementation, **how), experts, num_experts, **how
    )


def test_vmap_and_jit(implementation: str) -> None:
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 7, 2)), I32)
    plan = functools.partial(jaxmoe.plan_dispatch, num_experts=5, align=4, implementation=implementation)
    for max_rows in (None, 12):
        mapped = jax.jit(jax.vmap(lambda e, max_rows=max_rows: plan(e, max_rows=max_rows)))(experts)
        for i in range(3):
            check_plan(jax.tree.map(lambda a, i=i: a[i], mapped), experts[i], 5, 4, max_rows=max_rows)


def test_under_x64(implementation: str) -> None:
    with jax.enable_x64(True):
        experts = jnp.array([[0, 2], [2, 1]], I32)
        for align, max_rows in ((1, None), (1, 3), (2, 4)):
            plan = jaxmoe.plan_dispatch(experts, 3, align=align, max_rows=max_rows, implementation=implementation)
            check_plan(plan, experts, 3, align, max_rows=max_rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": jnp.zeros((3,), I32)}, r"experts: expected int32 \[T, S\], got int32\[3\]"),
        ({"experts": jnp.zeros((3, 2))}, r"experts: expected int32 \[T, S\], got float32\[3, 2\]"),
        ({"experts": jnp.zeros((3, 0), I32)}, r"experts: expected at least one element along axis 1"),
        ({"experts": jaxmoe.Columns(jnp.zeros((3, 9), I32), 0, 2)}, r"experts: expected an array .*, got Columns"),
        ({"experts": [[0, 1]]}, r"experts: expected an array int32 \[T, S\], got list"),
        ({"experts": jax.random.split(jax.random.key(0), (3, 2))}, r"experts: expected int32 .*, got key<fry>\[3, 2\]"),
        (
            {"expert_map": jaxmoe.Columns(jnp.zeros((3, 9), I32), 0, 2)},
            r"expert_map: expected an array .*, got Columns",
        ),
        ({"num_experts": 0}, r"num_experts: expected an int from 1 to 2048, got 0"),
        ({"num_experts": 4.0}, r"num_experts: expected an int from 1 to 2048, got 4.0"),
        ({"align": 0}, r"align: expected an int from 1 to"),
        ({"max_rows": 100, "align": 64}, r"max_rows: expected a positive multiple of align=64, got 100$"),
        ({"max_rows": 0}, r"max_rows: expected a positive int, got 0$"),
        ({"max_rows": -64, "align": 64}, r"max_rows: expected a positive multiple of align=64, got -64$"),
        ({"max_rows": True}, r"max_rows: expected a positive int, got True$"),
        ({"max_rows": 4.0}, r"max_rows: expected a positive int, got 4\.0$"),
        ({"max_rows": jnp.int32(4)}, r"max_rows: expected a positive int, got Array\(4"),
        ({"expert_map": jnp.zeros((0,), I32)}, r"expert_map: expected at least one element"),
        ({"expert_map": jnp.zeros((4,))}, r"expert_map: expected int32 \[ids\], got float32\[4\]"),
        ({"implementation": "triton"}, r"implementation: expected None or one of"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    arguments = {"experts": jnp.zeros((3, 2), I32), "num_experts": 4, **arguments}
    experts, num_experts = arguments.pop("experts"), arguments.pop("num_experts")
    with pytest.raises(ValueError, match=message):
        jaxmoe.plan_dispatch(experts, num_experts, **arguments)


def test_more_pairs_than_32_bits_have_room_for() -> None:
    plan = functools.partial(jaxmoe.plan_dispatch, num_experts=8)
    fits = jax.ShapeDtypeStruct((2**24 - 1, 8), I32)
    assert jax.eval_shape(plan, fits).slots.shape == (2**27 - 8,)
    assert jax.eval_shape(functools.partial(plan, max_rows=np.int64(9)), fits).slots.shape == (9,)
    with pytest.raises(ValueError, match=r"experts: expected fewer than 2\*\*27 pairs, .* got \[16777216, 8\]"):
        jax.eval_shape(plan, jax.ShapeDtypeStruct((2**24, 8), I32))
    with pytest.raises(ValueError, match=r"3 \* 2\*\*29 rows after alignment"):
        jax.eval_shape(functools.partial(plan, align=2**20, num_experts=2048), jax.ShapeDtypeStruct((8, 8), I32))
