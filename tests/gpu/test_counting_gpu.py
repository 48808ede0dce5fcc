"""Every way to a plan and to the load on the GPU, however the pairs are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from kernels_pallas import plan_dispatch as kernels
from kernels_pallas.count import Config, count_load
from tests.check_plan import WAYS, check_plan
from tests.kernels_pallas.test_count import CONFIGS, ids_of, stated
from tests.kernels_pallas.test_count import SHAPES as COUNTS

SHAPES = [(1, 1), (5, 1), (5, 4), (13, 3), (256, 1), (256, 64), (1026, 8), (2048, 1)]


@pytest.mark.parametrize(("num_experts", "align"), SHAPES)
@pytest.mark.parametrize("way", [*WAYS, "large blocks", "large blocks, counted together", "as configured"])
def test_every_way(way: str, num_experts: int, align: int, implementation: str) -> None:
    """Blocks whose bits are counted in turns among them; by XLA's compiler, which no test without a GPU asks."""
    del implementation  # memory is poisoned for it
    few = way in WAYS
    large = kernels.Config(num_warps=4, block=512, chunks=16, together=2 if "together" in way else 0)
    config = WAYS[way] if few else None if way == "as configured" else large
    rng = np.random.default_rng(num_experts)
    for tokens in (1, 113) if few else (600, 3 * 600):
        experts = jnp.asarray(rng.integers(-1, num_experts + 1, (tokens, 9)), jnp.int32)
        plan = jax.jit(
            functools.partial(
                kernels.plan_dispatch, expert_map=None, num_experts=num_experts, align=align, config=config
            )
        )(experts)
        check_plan(jaxmoe.DispatchPlan(*plan), experts, num_experts, align)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("num_ids", "tokens", "slots"), [*COUNTS, (257, 40960, 8)])
def test_load(num_ids: int, tokens: int, slots: int, config: Config | None, implementation: str) -> None:
    del implementation
    ids = ids_of(num_ids, tokens, slots)
    run = jax.jit(functools.partial(count_load, config=config), donate_argnums=1)
    got = run(jnp.asarray(ids), jnp.zeros(num_ids, jnp.int32))
    np.testing.assert_array_equal(got, stated(ids, num_ids), strict=True)
