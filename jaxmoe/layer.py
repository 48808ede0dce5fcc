"""The whole Mixture-of-Experts layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.config import RoutingConfig
from jaxmoe.dispatch import gather, move, plan_dispatch
from jaxmoe.experts import gated, gated_grad
from jaxmoe.grouped_matmul import alignment, no_gradient, outer, product
from jaxmoe.implementation import check_not_sharded, compiled
from jaxmoe.routing import Routing, route, router_logits


@jax.tree_util.register_dataclass
@dataclass(kw_only=True)
class MoEParams:
    """The parameters of one layer; a pytree.

    Attributes:
      router: [E, H], the router's weight, of any float dtype.
      bias: [E], added to the scores for the choice only; None for none.
      gate_up: [num_expert_ids, H, 2 * I]: the routed experts, then the shared ones (a replica each).
      down: [num_expert_ids, I, H].
    """

    router: jax.Array
    bias: jax.Array | None = None
    gate_up: jax.Array
    down: jax.Array


Static = tuple[str | None, int]  # implementation, the plan's align


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(static: Static, *args: jax.Array) -> jax.Array:
    """dispatch, experts, combine: y [T, H] of x, the plan's rows, slots and group_sizes, weights, gate_up, down."""
    return _weighted_pass(static, *args, keep=False)[0]


def _weighted_pass(
    static: Static,
    x: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    keep: bool,
) -> tuple[jax.Array, ...]:
    implementation, align = static
    hidden, *kept = gated((implementation, "silu", False), x, gate_up, group_sizes, (rows, slots), keep=keep)
    out = product(implementation, hidden, down, group_sizes, transposed=False, align=align)
    return gather(implementation, out, rows, weights, None, x.dtype), *kept


def weighted_fwd(static: Static, *args: jax.Array) -> tuple[jax.Array, Any]:
    """`_weighted` and what its derivative needs: gate and up of every row, then the arguments."""
    y, kept = _weighted_pass(static, *args, keep=True)
    return y, (checkpoint_name(kept, "moe_gate_up"), *args)


def weighted_bwd(static: Static, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    """The gradients of the arguments, from what `weighted_fwd` kept: of all rows gate and up alone.

    In float16 the gradient of the hidden rows is rounded before a token's weight makes it smaller: it is infinite from
    65504 / weight on, which loss scales have to allow for.

    A weight's gradient, its row of the experts' result . grad, is hidden . (grad @ down.T) too, so that result is not
    needed; and the rows that went in, which the forward pass only gathered, are dispatched now.
    """
    implementation, align = static
    kept, x, rows, slots, group_sizes, weights, gate_up, down = saved
    # Or XLA, where it dispatches itself, would see that it did so before, and keep them until now.
    x, grad = jax.lax.optimization_barrier((x, grad))
    scale = jnp.zeros(slots.shape, jnp.float32)
    if 0 not in rows.shape:
        scale = jnp.where(slots >= 0, weights.astype(jnp.float32).reshape(-1)[jnp.maximum(slots, 0)], 0.0)
    dout = move(implementation, grad, rows, slots, None, None, grad.dtype)
    dhidden = product(implementation, dout, down, group_sizes, transposed=True, align=align)
    dkept, hidden, dots = gated_grad((implementation, "silu", False), kept, dhidden, scale)
    ddown = outer(implementation, hidden, dout, group_sizes, transposed=False, align=align)
    held = move(implementation, x, rows, slots, None, None, x.dtype)
    dgate_up = outer(implementation, held, dkept, group_sizes, transposed=False, align=align)
    dheld = product(implementation, dkept, gate_up, group_sizes, transposed=True, align=align)
    dx = gather(implementation, dheld, rows, None, None, x.dtype)
    dweights = jnp.zeros_like(weights)
    if 0 not in dots.shape:
        dweights = jnp.where(rows >= 0, dots[jnp.maximum(rows, 0)], 0.0).astype(weights.dtype)
    return dx, *map(no_gradient, (rows, slots, group_sizes)), dweights, dgate_up, ddown


_weighted.defvjp(weighted_fwd, weighted_bwd)
weighted_experts = compiled(_weighted)


def moe(
    x: jax.Array,
    params: MoEParams,
    config: RoutingConfig,
    *,
    num_valid_tokens: int | jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Routing]:
    """A Mixture-of-Experts layer: router_logits, route, plan_dispatch, dispatch, experts, combine.

    Shared experts are slots like any other, so the layer's output is scaling * sum(routed) + sum(shared). (With
    `scale_weights=False` the caller multiplies the output by the scaling factor.) No token is dropped: there is no
    capacity.

    Of what lies between the two products the backward pass needs gate and up, [M, 2 * I], and else what came in, the
    plan and the weights. A policy of `jax.checkpoint` knows them as "moe_gate_up", and the router's logits as
    "moe_logits": `save_only_these_names("moe_gate_up", "moe_logits")` does no product again.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      params: `MoEParams`; gate_up and down in x's dtype.
      config: how to route.
      num_valid_tokens: tokens at or past this index come out as zeros. (A NaN in their x still reaches the router's
        gradient, through 0 * NaN: clear the padding where you train.)
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      (y [T, H] in x's dtype, Routing). Differentiable in x and in every parameter but the bias.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=4, top_k=2)
      >>> normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
      >>> params = jaxmoe.MoEParams(router=normal(0, 4, 8), gate_up=normal(1, 4, 8, 6), down=normal(2, 4, 3, 8))
      >>> y, routing = jaxmoe.moe(normal(3, 5, 8), params, config)
      >>> y.shape, int(routing.load.sum())
      ((5, 8), 10)
    """
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    check_array("x", x, ("T", "H"))
    check_array("params.router", params.router, (config.num_experts, x.shape[1]))
    if params.bias is not None:
        check_array("params.bias", params.bias, (config.num_experts,))
    check_array("params.gate_up", params.gate_up, (config.num_expert_ids, x.shape[1], "2 * I"), (x.dtype,))
    inner = arguments.half("params.gate_up", params.gate_up.shape[2])
    check_array("params.down", params.down, (config.num_expert_ids, inner, x.shape[1]), (x.dtype,))
    arguments.check_one_device(x=x, params=params)
    check_not_sharded(x=x, params=params)

    logits = checkpoint_name(router_logits(x, params.router, implementation=implementation), "moe_logits")
    routing = route(
        logits, params.bias, config=config, num_valid_tokens=num_valid_tokens, implementation=implementation
    )
    num_rows, experts = routing.experts.size, config.num_expert_ids
    align = alignment(
        implementation, num_rows=num_rows, num_experts=experts, width=x.shape[1], inner=inner, dtype=x.dtype
    )
    plan = plan_dispatch(routing.experts, experts, align=align, implementation=implementation)
    y = weighted_experts((implementation, align), x, *plan, routing.weights, params.gate_up, params.down)
    return y, routing
