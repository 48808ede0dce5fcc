"""jaxmoe.layer on tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import check
from bridge.ops import layer as ops
from bridge.ops.experts import as_they_lie, check_weight
from bridge.routing import Routing, check_count, count, without_gradient
from bridge.views import is_view
from jaxmoe import RoutingConfig
from jaxmoe.arguments import half


class MoEParams(NamedTuple):
    """The parameters of one layer.

    Attributes:
      router: [E, H], the router's weight, of any of the float dtypes.
      gate_up: [num_expert_ids, H, 2 * I]: the routed experts, then the shared ones (a replica each).
      down: [num_expert_ids, I, H]. Either of these two may be a transposed view, `.mT`, of a contiguous tensor.
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
    options: dict[str, Any] = {"config": config, "implementation": implementation}
    function: Callable[..., Any] = jaxmoe.moe
    if is_view(params.gate_up) or is_view(params.down):
        _check(x, params, config)  # in the words of jaxmoe.moe, which is not called
        for name, weight in (("params.gate_up", params.gate_up), ("params.down", params.down)):
            check_weight(name, weight, x.device)
        (gate_up, down), options["transposed"] = as_they_lie(params.gate_up, params.down)
        arguments["params"] = dataclasses.replace(arguments["params"], gate_up=gate_up, down=down)
        function = _of_views
    y, routing = call(function, arguments, options, no_gradient=("params.bias",))
    return y, Routing(*routing)


def _of_views(
    x: Any,
    params: jaxmoe.MoEParams,
    *,
    config: RoutingConfig,
    transposed: tuple[bool, bool],
    num_valid_tokens: Any,
    implementation: str | None,
) -> tuple[Any, jaxmoe.Routing]:
    """`jaxmoe.moe` in its parts, of which `experts` takes weights that lie transposed."""
    how: dict[str, Any] = {"implementation": implementation}
    logits = jaxmoe.router_logits(x, params.router, **how)
    routing = jaxmoe.route(logits, params.bias, config=config, num_valid_tokens=num_valid_tokens, **how)
    plan = jaxmoe.plan_dispatch(routing.experts, config.num_expert_ids, **how)
    rows = jaxmoe.dispatch(x, plan, **how)
    rows = jaxmoe.experts(rows, params.gate_up, params.down, plan.group_sizes, transposed=transposed, **how)
    return jaxmoe.combine(rows, plan, routing.weights, **how), routing


def _check(x: torch.Tensor, params: MoEParams, config: Any) -> None:
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


def _moe(x: torch.Tensor, params: MoEParams, config: Any, num_valid_tokens: Any) -> tuple[torch.Tensor, Routing]:
    """`moe` through the ops."""
    _check(x, params, config)
    valid, number = check_count(num_valid_tokens, "x", x)
    bias = without_gradient(params.bias)
    arguments = x, params.router, bias, params.gate_up, params.down, valid, number, config.json
    y, *routing = path.at_once(ops.moe, *arguments)
    return y, Routing(*routing)
