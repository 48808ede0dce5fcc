"""The experts, the whole layer, the bias update."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import MoEParams, RoutingConfig
from jaxmoe.grouped_matmul import Groups
from jaxmoe.layer import weighted_experts
from tests import oracle
from tests.cases import BF16, F32, normal

CONFIG = RoutingConfig(num_experts=8, top_k=3, n_group=4, topk_group=2, routed_scaling_factor=1.5, n_shared_experts=1)
I32 = jnp.int32
STEP = 1e-3  # of the finite differences
ACTIVATIONS: dict[str, Any] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def params_for(config: RoutingConfig, width: int = 16, inner: int = 6, dtype: Any = F32) -> MoEParams:
    ids = config.num_expert_ids
    return MoEParams(
        router=normal(0, config.num_experts, width),
        bias=normal(1, config.num_experts) * 0.1,
        gate_up=normal(2, ids, width, 2 * inner, dtype=dtype, scale=0.3),
        down=normal(3, ids, inner, width, dtype=dtype, scale=0.3),
    )


def one_expert(x: np.ndarray, gate_up: Any, down: Any, activation: str = "silu") -> np.ndarray:
    gate, up = np.split(x @ np.asarray(gate_up, np.float64), 2, axis=-1)
    return (ACTIVATIONS[activation](gate) * up) @ np.asarray(down, np.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 0, 0], [0, 0, 8, 0], [0, 0, 0, 1]], ids=str)
def test_experts(sizes: list[int], activation: str) -> None:
    """Uneven groups, empty ones, one that has everything, fewer rows than experts, rows behind the last group."""
    rows, gate_up, down = normal(0, 9, 10), normal(1, 4, 10, 12), normal(2, 4, 6, 10)
    got = jaxmoe.experts(rows, gate_up, down, jnp.array(sizes, I32), activation=activation)
    want, first = np.zeros((9, 10)), 0
    for e, size in enumerate(sizes):
        part = slice(first, first + size)
        want[part] = one_expert(np.asarray(rows[part], np.float64), gate_up[e], down[e], activation)
        first += size
    oracle.same(got, want, rtol=1e-5, atol=1e-5)


def test_experts_in_bfloat16() -> None:
    rows, gate_up, down = (
        normal(0, 6, 10, dtype=BF16),
        normal(1, 2, 10, 12, dtype=BF16),
        normal(2, 2, 6, 10, dtype=BF16),
    )
    got = jaxmoe.experts(rows, gate_up, down, jnp.array([2, 4], I32))
    assert got.dtype == BF16
    exact = np.asarray(rows, np.float64)
    want = np.concatenate([one_expert(exact[:2], gate_up[0], down[0]), one_expert(exact[2:], gate_up[1], down[1])])
    oracle.same(got, want, rtol=0.02, atol=0.1)
    with pytest.raises(AssertionError):
        oracle.same(got[::-1], want, rtol=0.02, atol=0.1)


def test_moe_against_the_formula(implementation: str) -> None:
    """scaling * sum(routed) + sum(shared), token by token."""
    params, x = params_for(CONFIG), normal(4, 9, 16)
    y, routing = jaxmoe.moe(x, params, CONFIG, num_valid_tokens=8, implementation=implementation)
    want, exact = np.zeros((9, 16)), np.asarray(x, np.float64)
    for t in range(8):
        for e, w in zip(routing.experts[t], routing.weights[t], strict=True):
            want[t] += float(w) * one_expert(exact[t], params.gate_up[e], params.down[e])
    oracle.same(y, want, rtol=2e-5, atol=2e-5)
    assert int(routing.load.sum()) == 8 * 4
    with pytest.raises(AssertionError):
        oracle.same(jnp.zeros_like(y), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_moe_of_few_tokens(tokens: int) -> None:
    y, routing = jaxmoe.moe(normal(4, tokens, 16), params_for(CONFIG), CONFIG)
    assert y.shape == (tokens, 16)
    assert int(routing.load.sum()) == tokens * 4


def test_moe_gradients(implementation: str) -> None:
    """The gradient that finite differences show, for every parameter but the bias, and the reference's."""
    params, x, up = params_for(CONFIG), normal(4, 5, 16), normal(5, 5, 16)

    def loss(params: MoEParams, x: jax.Array, implementation: str) -> jax.Array:
        return jnp.sum(jaxmoe.moe(x, params, CONFIG, implementation=implementation)[0] * up)

    grads = {i: jax.grad(loss, argnums=(0, 1))(params, x, i) for i in ("xla", implementation)}
    for a, b in zip(jax.tree.leaves(grads["xla"]), jax.tree.leaves(grads[implementation]), strict=True):
        oracle.same(a, np.asarray(b, np.float64), rtol=1e-3, atol=1e-4)
    dparams, dx = grads[implementation]
    assert not dparams.bias.any()
    for name, value, grad in (
        ("router", params.router, dparams.router),
        ("gate_up", params.gate_up, dparams.gate_up),
        ("down", params.down, dparams.down),
        ("x", x, dx),
    ):
        direction = normal(6, *value.shape)

        def moved(sign: float, name: str = name, direction: jax.Array = direction) -> float:
            if name == "x":
                return float(loss(params, x + sign * STEP * direction, "xla"))
            changed = jax.tree.map(lambda a: a, params)
            setattr(changed, name, getattr(params, name) + sign * STEP * direction)
            return float(loss(changed, x, "xla"))

        numeric = (moved(1) - moved(-1)) / (2 * STEP)
        analytic = float(jnp.sum(grad * direction))
        assert abs(numeric - analytic) < 0.02 * max(1.0, abs(analytic)), (name, numeric, analytic)


def test_groups_of_whole_blocks(implementation: str) -> None:
    """The same layer and gradients where each expert's rows begin at a multiple of 64, as some kernels want them.

    The last token is padding.
    """
    params, x = params_for(CONFIG), normal(4, 9, 16).at[8].set(jnp.nan)
    routing = jaxmoe.route(normal(5, 9, 8), config=CONFIG, num_valid_tokens=8)

    def gradients(align: int, implementation: str) -> tuple[jax.Array, ...]:
        plan = jaxmoe.plan_dispatch(routing.experts, CONFIG.num_expert_ids, align=align, implementation=implementation)
        assert len(plan.slots) == (36 if align == 1 else 640)

        def layer(*args: jax.Array) -> jax.Array:
            x, *rest = args
            return weighted_experts((implementation, "silu", Groups(align, clear=False)), x, *plan, *rest, None)

        y, backward = jax.vjp(layer, x, routing.weights, params.gate_up, params.down)
        return y, *backward(normal(6, 9, 16))

    blocks = gradients(64, implementation)
    assert not any(of_tokens[8].any() for of_tokens in blocks[:3]), "padding: y, dx, dweights"
    for got, want in zip(blocks, gradients(1, "xla"), strict=True):
        exact = np.asarray(want, np.float64)
        oracle.same(got, exact, rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError):
            oracle.same(jnp.roll(got, 1, axis=0), exact, rtol=1e-4, atol=1e-4)


def test_params_are_a_pytree() -> None:
    params = params_for(CONFIG)
    doubled = jax.jit(lambda p: jax.tree.map(lambda a: 2 * a, p))(params)
    np.testing.assert_array_equal(doubled.router, 2 * params.router)
    assert MoEParams(router=params.router, gate_up=params.gate_up, down=params.down).bias is None


def test_update_bias_balances() -> None:
    """On a router that favours some experts, the update evens out the load; without it nothing changes."""
    config = RoutingConfig(num_experts=16, top_k=2)
    logits = normal(0, 512, 16) + jnp.linspace(-1.5, 1.5, 16)
    bias = jnp.zeros(16)
    before = jaxmoe.route(logits, bias, config=config).load
    for _ in range(150):
        bias = jaxmoe.update_bias(bias, jaxmoe.route(logits, bias, config=config).load, rate=0.01)
    after = jaxmoe.route(logits, bias, config=config).load
    assert before.max() > 3 * 64
    assert after.max() < 1.2 * 64
    assert after.min() > 0.8 * 64


@pytest.mark.parametrize("num_experts", [7, 13, 14, 256])
def test_update_bias_leaves_an_even_load_alone(num_experts: int) -> None:
    even = jnp.full(num_experts, 3, I32)
    assert not jaxmoe.update_bias(jnp.zeros(num_experts), even, rate=1.0).any()
    nearly = jaxmoe.update_bias(jnp.zeros(num_experts), even.at[0].add(1), rate=1.0)  # the mean lies in between
    assert nearly.tolist() == [-1.0] + [1.0] * (num_experts - 1)


def test_update_bias_leaves_shared_experts_out() -> None:
    got = jaxmoe.update_bias(jnp.zeros(2), jnp.array([3, 1, 100], I32), rate=0.5)
    assert got.tolist() == [-0.5, 0.5]
    assert jaxmoe.update_bias(jnp.zeros(2, BF16), jnp.array([2, 2], I32), rate=0.5).dtype == BF16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jaxmoe.update_bias(jnp.zeros(4), jnp.zeros(3, I32), rate=1.0),
            r"load: expected at least the 4 routed",
        ),
        (lambda: jaxmoe.update_bias(jnp.zeros(4), jnp.zeros(4, I32), rate="a"), r"rate: expected an array .* got str"),
        (lambda: jaxmoe.update_bias(jnp.zeros(4), jnp.zeros(4), rate=1.0), r"load: expected int32 \[E\], got float32"),
        (lambda: jaxmoe.moe(normal(0, 3, 17), params_for(CONFIG), CONFIG), r"params.router: expected .*\[8, 17\]"),
        (lambda: jaxmoe.moe(normal(0, 3, 16), {}, CONFIG), r"params: expected MoEParams, got dict"),
        (
            lambda: jaxmoe.moe(
                normal(0, 3, 16), dataclasses.replace(params_for(CONFIG), gate_up=normal(0, 9, 16, 13)), CONFIG
            ),
            r"params.gate_up: expected an even last axis, gate and up side by side, got 13",
        ),
        (
            lambda: jaxmoe.moe(normal(0, 3, 16, dtype=BF16), params_for(CONFIG), CONFIG),
            r"params.gate_up: expected bfloat16",
        ),
        (
            lambda: jaxmoe.moe(normal(0, 3, 16), params_for(RoutingConfig(num_experts=8, top_k=3)), CONFIG),
            r"params.gate_up: expected float32 \[9, 16, 2 \* I\], got float32\[8, 16, 12\]",
        ),
        (
            lambda: jaxmoe.experts(normal(0, 3, 4), normal(0, 2, 4, 6), normal(0, 2, 3, 4), jnp.zeros(3, I32)),
            r"group_sizes: expected int32 \[2\], got int32\[3\]",
        ),
        (
            lambda: jaxmoe.experts(normal(0, 3, 4), normal(0, 2, 4, 5), normal(0, 2, 3, 4), jnp.zeros(2, I32)),
            r"gate_up: expected an even last axis",
        ),
        (
            lambda: jaxmoe.experts(
                normal(0, 3, 4), normal(0, 2, 4, 6), normal(0, 2, 3, 4), jnp.zeros(2, I32), activation="relu"
            ),
            r"activation: expected one of .*, got 'relu'",
        ),
    ],
)
def test_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
