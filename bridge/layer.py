"""jaxmoe.layer on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import check
from bridge.ops import layer as ops
from bridge.routing import Routing, check_count, count
from jaxmoe import RoutingConfig
from jaxmoe.arguments import half


class MoEParams(NamedTuple):
    """The parameters of one layer.

    Attributes:
      router: [E, H], the router's weight, of any of the float dtypes.
      gate_up: [num_expert_ids, H, 2 * I]: the routed experts, then the shared ones (a replica each).
      down: [num_expert_ids, I, H].
      bias: [E], added to the scores for the choice only; None for none.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None


def moe(
    x: torch.Tensor,
    params: MoEParams,
    config: RoutingConfig,
    *,
    num_valid_tokens: int | torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, Routing]:
    """A Mixture-of-Experts layer: `jaxmoe.moe` on tensors.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      params: `MoEParams`; gate_up and down in x's dtype.
      config: how to route.
      num_valid_tokens: tokens at or past this index come out as zeros. An int, or an int32 tensor without axes.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      (y [T, H] in x's dtype, Routing). Differentiable in x and in every parameter but the bias.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; `jaxmoe.moe`.

    Example:
      >>> import torch, bridge
      >>> config = bridge.RoutingConfig(num_experts=4, top_k=2)
      >>> params = bridge.MoEParams(router=torch.randn(4, 8), gate_up=torch.randn(4, 8, 6), down=torch.randn(4, 3, 8))
      >>> y, routing = bridge.moe(torch.randn(5, 8), params, config)
      >>> y.shape, int(routing.load.sum())
      (torch.Size([5, 8]), 10)
    """
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    if path.takes_ops(x, implementation):
        return _moe(x, params, config, num_valid_tokens)
    arguments = {
        "x": x,
        "params": jaxmoe.MoEParams(**params._asdict()),
        "num_valid_tokens": count(num_valid_tokens, "x", x),
    }
    options = {"config": config, "implementation": implementation}
    y, routing = call(jaxmoe.moe, arguments, options, no_gradient=("params.bias",))
    return y, Routing(*routing)


def _moe(x: torch.Tensor, params: MoEParams, config: Any, num_valid_tokens: Any) -> tuple[torch.Tensor, Routing]:
    """`moe` through the ops."""
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    experts = config.num_experts
    check("x", x, ("T", "H"))
    check("params.router", params.router, (experts, x.shape[1]))
    if params.bias is not None:
        check("params.bias", params.bias, (experts,))
    check("params.gate_up", params.gate_up, (config.num_expert_ids, x.shape[1], "2 * I"), (x.dtype,))
    inner = half("params.gate_up", params.gate_up.shape[2])
    check("params.down", params.down, (config.num_expert_ids, inner, x.shape[1]), (x.dtype,))
    valid, number = check_count(num_valid_tokens, "x", x)
    arguments = x, params.router, params.bias, params.gate_up, params.down, valid, number, config.json
    y, *routing = path.at_once(ops.moe, *arguments)
    return y, Routing(*routing)
