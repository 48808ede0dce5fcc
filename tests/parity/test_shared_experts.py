"""The fused shared expert against the unfused layer: routed experts by one call, the shared MLP computed apart."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import MoEParams, RoutingConfig
from tests.parity.compare import assert_layer

NUM_TOKENS, HIDDEN, INTERMEDIATE = 13, 8, 6
ROUTED = RoutingConfig(num_experts=12, top_k=3, n_group=3, topk_group=2)


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def make_inputs(shared: int) -> tuple[jax.Array, MoEParams, MoEParams]:
    """(x, the routed layer's parameters, the shared experts' with neither router nor bias to speak of)."""
    num_experts = ROUTED.num_experts
    x, router = normal(0, NUM_TOKENS, HIDDEN), normal(1, num_experts, HIDDEN)
    gate_up = normal(2, num_experts + shared, HIDDEN, 2 * INTERMEDIATE)
    down = normal(3, num_experts + shared, INTERMEDIATE, HIDDEN)
    split = lambda part: MoEParams(router=router, bias=normal(4, num_experts), gate_up=gate_up[part], down=down[part])
    return x, split(slice(0, num_experts)), split(slice(num_experts, None))


def shared_mlp(x: jax.Array, params: MoEParams) -> jax.Array:
    """The sum of the shared experts, as dense products in NumPy's float64."""
    total = np.zeros(x.shape)
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, params.gate_up, params.down))
    for e in range(len(gate_up)):
        gate, up = np.split(x @ gate_up[e], 2, axis=1)
        total += (gate / (1 + np.exp(-gate)) * up) @ down[e]
    return total


def fuse(routed: MoEParams, shared: MoEParams, replicas: int) -> MoEParams:
    """Shared experts behind the routed ones, each as often as it has replicas."""
    join = lambda a, b: jnp.concatenate([a, jnp.repeat(b, replicas, axis=0)])
    return dataclasses.replace(
        routed, gate_up=join(routed.gate_up, shared.gate_up), down=join(routed.down, shared.down)
    )


CASES = [
    case
    for case in itertools.product((1.0, 2.5), (True, False), (0, 1, 2), (True, False), (1, 3))
    if case[2] or case[4] == 1  # replicas of no shared expert are nothing
]


@pytest.mark.parametrize(("scale", "renormalize", "shared", "scale_weights", "replicas"), CASES)
def test_fused_layer_equals_the_unfused(scale, renormalize, shared, scale_weights, replicas):
    # The output is scale * routed + shared in every combination: neither scaled twice nor weighted 1 / scale or more.
    x, routed, shared_params = make_inputs(shared)
    plain = dataclasses.replace(ROUTED, renormalize=renormalize)
    expected = scale * np.asarray(jaxmoe.moe(x, routed, plain)[0], np.float64) + shared_mlp(x, shared_params)

    config = dataclasses.replace(
        plain,
        routed_scaling_factor=scale,
        scale_weights=scale_weights,
        n_shared_experts=shared,
        shared_expert_replicas=replicas,
    )
    y, routing = jaxmoe.moe(x, fuse(routed, shared_params, replicas), config)
    y = y if scale_weights else scale * y  # the caller scales the layer's output
    assert_layer(y, expected)

    token = np.arange(NUM_TOKENS)[:, None]
    ids = ROUTED.num_experts + np.arange(shared) * replicas + token % replicas
    np.testing.assert_array_equal(routing.experts[:, ROUTED.top_k :], ids)
    weight = np.float32(1 if scale_weights else 1 / scale)
    np.testing.assert_array_equal(routing.weights[:, ROUTED.top_k :], np.full((NUM_TOKENS, shared), weight))
    assert int(routing.load.sum()) == NUM_TOKENS * config.num_slots

    # The comparison can fail: on zeros, on swapped experts, on a factor that is forgotten or applied twice.
    fused = fuse(routed, shared_params, replicas)
    swapped = dataclasses.replace(fused, down=jnp.roll(fused.down, replicas, axis=0))
    wrongs = [np.zeros_like(expected), jaxmoe.moe(x, swapped, config)[0]]
    if scale != 1.0:
        wrongs += [y * scale, y / scale]
    for wrong in wrongs:
        with pytest.raises(AssertionError):
            assert_layer(wrong, expected)


@pytest.mark.parametrize("scale_weights", [True, False])
def test_fused_layer_in_the_interpreter(scale_weights):
    # The kernels themselves fill the shared slots that dispatch and combine then read.
    x, routed, shared_params = make_inputs(2)
    config = dataclasses.replace(
        ROUTED, routed_scaling_factor=2.5, scale_weights=scale_weights, n_shared_experts=2, shared_expert_replicas=3
    )
    expected = 2.5 * np.asarray(jaxmoe.moe(x, routed, ROUTED)[0], np.float64) + shared_mlp(x, shared_params)
    y, _ = jaxmoe.moe(x, fuse(routed, shared_params, 3), config, implementation="interpret")
    assert_layer(y if scale_weights else 2.5 * y, expected)
