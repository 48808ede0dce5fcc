"""Experts apart: every device of a mesh has an equal part of them, and of the tokens.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/expert_parallel.py

Each device routes its tokens. Then the tokens of all are gathered, a device keeps the pairs of its own experts
(`expert_map`), and what it makes of them is summed over the devices as the tokens are shared out again. The same on one
device; on several GPUs it has not been run.

Shapes cannot depend on how many pairs come to a device, so there is room for `ROOM` times as many as if experts were
chosen equally often. Where more come, the last experts' are dropped; the load tells, and is looked at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe import MoEParams

CONFIG = jaxmoe.RoutingConfig(num_experts=16, top_k=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
TOKENS, WIDTH, INNER = 64, 16, 8
ROOM = 2.0
SPLIT = MoEParams(router=P(), bias=P(), gate_up=P("ep"), down=P("ep"))  # type: ignore[arg-type]


def layer(params: MoEParams, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y of this device's tokens, the load of all), for shard_map over "ep"; its experts lie in `params`."""
    routing = jaxmoe.route(jaxmoe.router_logits(x, params.router), params.bias, config=CONFIG)
    assert routing.load is not None
    gather = functools.partial(jax.lax.all_gather, axis_name="ep", tiled=True)
    here = params.gate_up.shape[0]
    local = jnp.arange(CONFIG.num_experts, dtype=jnp.int32) - here * jax.lax.axis_index("ep").astype(jnp.int32)
    expert_map = jnp.where((local >= 0) & (local < here), local, -1)
    experts, weights = gather(routing.experts), gather(routing.weights)
    y = jaxmoe.fused_experts(
        gather(x),
        experts,
        weights,
        params.gate_up,
        params.down,
        expert_map=expert_map,
        max_rows=room(experts.size, here),
    )
    return jax.lax.psum_scatter(y, "ep", tiled=True), jax.lax.psum(routing.load, "ep")


def room(pairs: int, here: int) -> int:
    """For how many of all pairs a device has room."""
    return math.ceil(pairs * min(1.0, ROOM * here / CONFIG.num_experts))


def fits(load: jax.Array, devices: int) -> bool:
    """Whether no pair was dropped."""
    of_devices = load.reshape(devices, -1).sum(axis=1)
    return int(of_devices.max()) <= room(int(load.sum()), CONFIG.num_experts // devices)


def parallel(mesh: jax.sharding.Mesh) -> Callable[[MoEParams, jax.Array], tuple[jax.Array, jax.Array]]:
    """The layer over the devices of a mesh."""
    return jax.shard_map(layer, mesh=mesh, in_specs=(SPLIT, P("ep")), out_specs=(P("ep"), P()))


def results(function: Callable[..., Any], params: MoEParams, x: jax.Array) -> Any:
    """(y, load, gradients of the parameters and of x)."""

    def loss(params: MoEParams, x: jax.Array) -> tuple[jax.Array, Any]:
        y, load = function(params, x)
        return jnp.sum(jnp.sin(y)), (y, load)

    grads, (y, load) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, load, grads


def main() -> tuple[Any, Any]:
    """Runs the layer on all devices and on one; returns (y, load, gradients) of both."""
    random = np.random.default_rng(0)
    normal = lambda scale, *shape: jnp.asarray(scale * random.standard_normal(shape), jnp.float32)
    params = MoEParams(
        router=normal(0.3, CONFIG.num_experts, WIDTH),
        bias=normal(0.1, CONFIG.num_experts),
        gate_up=normal(0.3, CONFIG.num_experts, WIDTH, 2 * INNER),
        down=normal(0.3, CONFIG.num_experts, INNER, WIDTH),
    )
    x = normal(1.0, TOKENS, WIDTH)
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))
    apart = results(parallel(mesh), jax.tree.map(place, params, SPLIT), place(x, P("ep")))
    alone = results(functools.partial(alone_on_one, config=CONFIG), params, x)
    assert fits(apart[1], jax.device_count()), "pairs were dropped: ROOM is too small"
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (apart, alone)), strict=True))
    print(
        f"{jax.device_count()} devices, {apart[0].sharding.spec}: the largest difference from one is {difference:.1e}"
    )
    return apart, alone


def alone_on_one(
    params: MoEParams, x: jax.Array, *, config: jaxmoe.RoutingConfig
) -> tuple[jax.Array, jax.Array | None]:
    """The layer with all of its experts in one place."""
    y, routing = jaxmoe.moe(x, params, config)
    return y, routing.load


if __name__ == "__main__":
    main()
