"""What only a GPU can show: real sizes, repeatability, buffers in place, the launches of a compiled program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import RoutingConfig, presets
from tests import hlo
from tests.cases import BF16, F32, normal
from tests.check_dispatch import check_combine, check_dispatch
from tests.check_plan import check_plan
from tests.check_route import check_route

pallas = functools.partial(functools.partial, implementation="pallas")
route, plan_dispatch = pallas(jaxmoe.route), pallas(jaxmoe.plan_dispatch)
dispatch, combine = pallas(jaxmoe.dispatch), pallas(jaxmoe.combine)
V3 = presets["deepseek-v3"]
WIDTH = 7168


def random_experts(seed: int, tokens: int, slots: int, num_experts: int) -> jax.Array:
    """Distinct ids for each token."""
    keys = np.random.default_rng(seed).random((tokens, num_experts), dtype=np.float32)
    return jnp.asarray(np.argpartition(keys, slots, axis=1)[:, :slots], jnp.int32)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-v2", "kimi-k2", "kimi-k3", "qwen3-next", "qwen3-moe", "mixtral-8x7b"]
)
@pytest.mark.parametrize("tokens", [1, 64, 4096, 65536])
def test_route_at_real_sizes(tokens: int, name: str, dtype: Any) -> None:
    config = presets[name]
    logits = normal(tokens, tokens, config.num_experts, dtype=dtype, scale=2.0)
    bias = normal(1, config.num_experts, scale=0.1) if config.scoring_func == "sigmoid" else None
    shape = (tokens, config.num_slots)
    out = (
        jnp.full(shape, jnp.nan, F32),
        jnp.full(shape, -9, jnp.int32),
        jnp.full((config.num_expert_ids,), -9, jnp.int32),
    )
    got = route(logits, bias, config=config, out=out)
    assert check_route(got, logits, bias, config) > 0.95


def test_route_at_the_limits() -> None:
    config = RoutingConfig(num_experts=1024, top_k=32, n_group=16, topk_group=8)
    logits, bias = normal(0, 20000, 1024, dtype=BF16), normal(1, 1024, scale=0.1)
    assert check_route(route(logits, bias, config=config), logits, bias, config) > 0.9


@pytest.mark.parametrize("tokens", [1, 64, 4096, 65536])
@pytest.mark.parametrize("align", [1, 64])
def test_plan_at_real_sizes(tokens: int, align: int) -> None:
    experts = random_experts(tokens, tokens, 8, 256)
    check_plan(plan_dispatch(experts, 256, align=align), experts, 256, align)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("tokens", [1, 63, 2048])
def test_dispatch_and_combine_at_real_sizes(tokens: int, dtype: Any) -> None:
    plan = plan_dispatch(random_experts(0, tokens, 8, 256), 256, align=16)
    x, weights = normal(1, tokens, WIDTH, dtype=dtype), normal(2, tokens, 8)
    rows = dispatch(x, plan, out=jnp.full((plan.slots.shape[0], WIDTH), jnp.nan, dtype))
    check_dispatch(rows, x, plan)
    y = combine(rows, plan, weights, out=jnp.full((tokens, WIDTH), jnp.nan, dtype))
    check_combine(y, rows, plan, weights)


def test_more_than_2_to_the_31_elements() -> None:
    """DLBlas #171, TransformerEngine #2908: 32-bit offsets wrap. 65,536 tokens x 8 x 7168 are 3.76e9 elements."""
    tokens = 65536
    plan = plan_dispatch(random_experts(0, tokens, 8, 256), 256)
    x = jax.random.normal(jax.random.key(0), (tokens, WIDTH), BF16)
    weights = jax.random.normal(jax.random.key(1), (tokens, 8), F32)
    rows = dispatch(x, plan)
    assert rows.size > 2**31
    some = np.random.default_rng(0).integers(0, rows.shape[0], 2000)
    some = np.concatenate([some, [0, rows.shape[0] - 1]])
    take = jax.jit(lambda a, i: a[i])
    tokens_of = np.asarray(plan.slots)[some] // 8
    np.testing.assert_array_equal(np.asarray(take(rows, some), np.float32), np.asarray(take(x, tokens_of), np.float32))
    y = combine(rows, plan, weights)
    some = np.concatenate([some[:500] % tokens, [tokens - 1]])
    exact = np.asarray(take(x, some), np.float64) * np.asarray(weights, np.float64)[some].sum(axis=1)[:, None]
    np.testing.assert_allclose(np.asarray(take(y, some), np.float64), exact, rtol=2e-2, atol=2e-2)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(dispatch(x, plan).astype(F32), axis=1).sum()))(x[:1024].repeat(64, axis=0))
    assert (dx == 8).all()


def test_100_runs_are_bitwise_equal() -> None:
    """SGLang #33511: with atomics, one run in a hundred differed."""
    logits, bias, x = normal(0, 3000, 256, dtype=BF16), normal(1, 256, scale=0.1), normal(2, 3000, 512, dtype=BF16)

    @jax.jit
    def chain(logits: jax.Array, x: jax.Array) -> Any:
        routing = route(logits, bias, config=V3)
        plan = plan_dispatch(routing.experts, V3.num_expert_ids, align=8)
        rows = dispatch(x, plan)
        return routing, plan, rows, combine(rows, plan, routing.weights)

    bits = lambda tree: [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]
    first = bits(chain(logits, x))
    for _ in range(99):
        for a, b in zip(first, bits(chain(logits, x)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_batch_invariance() -> None:
    logits, bias, x = normal(0, 500, 256, dtype=BF16), normal(1, 256, scale=0.1), normal(2, 500, 512, dtype=BF16)

    def layer(logits: jax.Array, x: jax.Array) -> Any:
        routing = route(logits, bias, config=V3)
        plan = plan_dispatch(routing.experts, V3.num_expert_ids)
        return routing.weights, routing.experts, combine(dispatch(x, plan), plan, routing.weights)

    whole = layer(logits, x)
    for part in (slice(0, 1), slice(37, 38), slice(100, 163), slice(499, 500)):
        for a, b in zip(layer(logits[part], x[part]), whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b[part]).view(np.uint8))


def test_compiled_chain_has_no_copy_and_no_cast() -> None:
    """The whole chain with donated outputs: kernels only, and the results in the caller's buffers.

    A float32 router weight next to bfloat16 tokens, a float32 bias: what others cast on every forward pass.
    """
    tokens, config = 64, V3
    x, weight, bias = (
        normal(0, tokens, WIDTH, dtype=BF16),
        normal(1, 256, WIDTH, scale=2 * WIDTH**-0.5),
        normal(2, 256, scale=0.1),
    )
    outs = lambda: (
        jaxmoe.Routing(jnp.zeros((tokens, 9), F32), jnp.zeros((tokens, 9), jnp.int32), jnp.zeros(257, jnp.int32)),
        jnp.zeros((tokens * 9, WIDTH), BF16),
        jnp.zeros((tokens, WIDTH), BF16),
    )

    @functools.partial(jax.jit, donate_argnums=(3, 4, 5))
    def chain(x: jax.Array, weight: jax.Array, bias: jax.Array, routing: Any, rows: jax.Array, y: jax.Array) -> Any:
        logits = jaxmoe.router_logits(x, weight)
        routing = jaxmoe.route(logits, bias, config=config, out=routing)
        plan = jaxmoe.plan_dispatch(routing.experts, config.num_expert_ids)
        rows = jaxmoe.dispatch(x, plan, out=rows)
        return routing, rows, jaxmoe.combine(rows, plan, routing.weights, out=y)

    compiled = chain.lower(x, weight, bias, *outs()).compile()
    text = compiled.as_text()
    kernels = [line for line in text.splitlines() if "custom-call" in line and "triton" in line]
    assert len(kernels) == 7, (
        f"router_logits and its sum, route, count_load, plan_dispatch, dispatch, combine: {kernels}"
    )
    moved = {"copy", "copy-start", "convert", "fusion", "transpose", "broadcast", "memcpy"}
    assert not moved & hlo.ops(text), f"{sorted(hlo.ops(text))} in\n{text}"

    given = outs()
    jax.block_until_ready(given)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)]
    results = compiled(x, weight, bias, *given)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(results)] == addresses
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    check_route(results[0], jaxmoe.router_logits(x, weight), bias, config)


def test_default_implementation_is_pallas() -> None:
    text = jax.jit(functools.partial(jaxmoe.route, config=V3)).lower(normal(0, 4, 256)).as_text()
    assert "triton" in text


def test_arrays_on_two_devices_are_refused() -> None:
    cpu = jax.devices("cpu")[0]
    with pytest.raises(ValueError, match=r"bias: expected the device of logits"):
        jaxmoe.route(
            jax.device_put(normal(0, 4, 256), jax.devices()[0]), jax.device_put(normal(1, 256), cpu), config=V3
        )
