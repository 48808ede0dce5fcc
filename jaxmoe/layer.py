"""The whole Mixture-of-Experts layer."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.config import RoutingConfig
from jaxmoe.dispatch import combine, dispatch, plan_dispatch
from jaxmoe.experts import experts
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
    check_array(
        "params.down", params.down, (config.num_expert_ids, params.gate_up.shape[2] // 2, x.shape[1]), (x.dtype,)
    )
    arguments.check_one_device(x=x, params=params)

    logits = router_logits(x, params.router, implementation=implementation)
    routing = route(
        logits, params.bias, config=config, num_valid_tokens=num_valid_tokens, implementation=implementation
    )
    plan = plan_dispatch(routing.experts, config.num_expert_ids, implementation=implementation)
    rows = dispatch(x, plan, implementation=implementation)
    rows = experts(rows, params.gate_up, params.down, plan.group_sizes, implementation=implementation)
    return combine(rows, plan, routing.weights, implementation=implementation), routing
