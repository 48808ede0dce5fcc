"""jaxmoe.layer on tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import check_gradients_of_out, most_rows
from bridge.checks_of_layer import check_experts, check_layer
from bridge.ops import layer as ops
from bridge.ops.experts import as_they_lie, check_weight
from bridge.routing import Routing, check_count, count, without_gradient
from bridge.views import is_view
from jaxmoe import RoutingConfig
from jaxmoe.layer import rows_of


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


def fused_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """What lies behind routing, with one derivative: `jaxmoe.fused_experts` on tensors.

    With an `expert_map` it is a rank's part of the layer under expert parallelism: the parts of all ranks add up to the
    layer (`torch.distributed.all_reduce`).

    Args:
      x: [T, H] bfloat16, float16 or float32.
      experts: int32 [T, S], the ids that `route` chose; a negative one, or one not below the number of ids, is dropped.
      weights: [T, S] of any of the float dtypes.
      gate_up: [E, H, 2 * I] of x's dtype: the gate and up projections of the experts that are here.
      down: [E, I, H] of x's dtype. Either of these two may be a transposed view, `.mT`, of a contiguous tensor.
      expert_map: int32 [number of ids], id -> local expert, -1, or a number not below E, for one that is not here.
      max_rows: for how many (token, slot) pairs of experts that are here there is room in what lies between, rounded up
        to a multiple of eight (through JAX maybe more). Pairs that do not fit are dropped, those of the last experts
        first, as if their ids were negative: compare it with the load of the experts here. None: for all T * S.
      activation: as for `experts`: "silu", "gelu" (exact) or "gelu_tanh".
      out: [T, H] of x's dtype to write into, contiguous memory of its own; the same tensor is returned, without
        gradients. On the CPU that is a copy.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      [T, H] in x's dtype: the sum over a token's slots of weights times expert(x). Differentiable in x, weights,
      gate_up and down.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: vLLM's fused_experts; `jaxmoe.fused_experts`.

    Example:
      >>> import torch, bridge
      >>> x, ids = torch.ones(2, 1), torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
      >>> gate_up, down = torch.full((1, 1, 2), 20.0), torch.ones(1, 1, 1)  # of expert 1, which is here
      >>> weights, here = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([-1, 0, -1], dtype=torch.int32)
      >>> bridge.fused_experts(x, ids, weights, gate_up, down, expert_map=here).tolist()
      [[300.0], [400.0]]
    """
    max_rows = most_rows(max_rows, 1)
    if path.takes_ops(x, implementation):
        eager = _is_eager(x, experts, weights, gate_up, down, expert_map, out)
        if not _is_checked_below(eager, x, activation):
            check_experts(x, experts, weights, gate_up, down, expert_map, activation, out)
        given = x, experts, weights, gate_up, down, expert_map, max_rows, activation
        if out is None:
            return path.run(ops.fused_experts, eager, *given)
        check_gradients_of_out({"out": out}, x=x, weights=weights, gate_up=gate_up, down=down)
        path.run(ops.fused_experts_out, eager, *given, out)
        return out
    arguments = {"x": x, "experts": experts, "weights": weights, "gate_up": gate_up, "down": down}
    options: dict[str, Any] = {"max_rows": max_rows, "activation": activation, "implementation": implementation}
    function: Callable[..., Any] = jaxmoe.fused_experts
    if is_view(gate_up) or is_view(down):
        # In the words of the function that is not called.
        check_experts(x, experts, weights, gate_up, down, expert_map, activation, out)
        arguments["gate_up"], arguments["down"], options["transposed"] = _as_they_lie(gate_up, down, "")
        function = _fused_of_views
    return call(function, {**arguments, "expert_map": expert_map}, options, out=out)


def _as_they_lie(gate_up: Any, down: Any, prefix: str) -> tuple[Any, Any, tuple[bool, bool]]:
    """The weights, dense, and whether each is transposed then."""
    for name, weight in (("gate_up", gate_up), ("down", down)):
        check_weight(prefix + name, weight, gate_up.device)
    (gate_up, down), (first, second) = as_they_lie(gate_up, down)
    return gate_up, down, (first, second)


def _fused_of_views(
    x: Any,
    experts: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    expert_map: Any,
    *,
    transposed: tuple[bool, bool],
    max_rows: int | None,
    activation: str,
    implementation: str | None,
    out: Any = None,
) -> Any:
    """`jaxmoe.fused_experts` in its parts, of which `experts` takes weights that lie transposed."""
    how: dict[str, Any] = {"implementation": implementation}
    plan = jaxmoe.plan_dispatch(experts, gate_up.shape[0], expert_map=expert_map, max_rows=rows_of(max_rows), **how)
    rows = jaxmoe.dispatch(x, plan, **how)
    rows = jaxmoe.experts(rows, gate_up, down, plan.group_sizes, activation=activation, transposed=transposed, **how)
    return jaxmoe.combine(rows, plan, weights, out=out, **how)


def moe(
    x: torch.Tensor,
    params: MoEParams,
    config: RoutingConfig,
    *,
    num_valid_tokens: int | torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, Routing]:
    """A Mixture-of-Experts layer: `jaxmoe.moe` on tensors.

    With an `expert_map` it is a rank's part of the layer, where ranks have the same tokens: the parts of all add up.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      params: `MoEParams`; gate_up and down in x's dtype, with an `expert_map` those of the experts that are here.
      config: how to route.
      num_valid_tokens: tokens at or past this index come out as zeros. An int, or an int32 tensor without axes.
      expert_map: int32 [num_expert_ids], id -> local expert, -1 for one that is not here.
      max_rows: as for `fused_experts`, with which to compare sums of routing.load.
      activation: as for `experts`: "silu", "gelu" (exact) or "gelu_tanh".
      out: [T, H] of x's dtype to write y into, contiguous memory of its own; y is the same tensor then, without
        gradients. On the CPU that is a copy.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      (y [T, H] in x's dtype, Routing). Differentiable in x and in every parameter but the bias.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

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
    max_rows = most_rows(max_rows, 1)
    if path.takes_ops(x, implementation):
        return _moe(x, params, config, num_valid_tokens, expert_map, max_rows, activation, out)
    arguments = {
        "x": x,
        "params": jaxmoe.MoEParams(**params._asdict()),
        "num_valid_tokens": count(num_valid_tokens, "x", x),
        "expert_map": expert_map,
    }
    options: dict[str, Any] = {
        "config": config,
        "max_rows": max_rows,
        "activation": activation,
        "implementation": implementation,
    }
    function: Callable[..., Any] = jaxmoe.moe
    if is_view(params.gate_up) or is_view(params.down):
        # In the words of the function that is not called.
        check_layer(x, *params, config, expert_map, activation, out)
        gate_up, down, options["transposed"] = _as_they_lie(params.gate_up, params.down, "params.")
        arguments["params"] = dataclasses.replace(arguments["params"], gate_up=gate_up, down=down)
        function = _of_views
    y, routing = call(function, arguments, options, no_gradient=("params.bias",), out=out)
    return y, Routing(*routing)


def _of_views(
    x: Any,
    params: jaxmoe.MoEParams,
    *,
    config: RoutingConfig,
    num_valid_tokens: Any,
    implementation: str | None,
    **options: Any,
) -> tuple[Any, jaxmoe.Routing]:
    """`jaxmoe.moe`, of weights that lie transposed."""
    logits = jaxmoe.router_logits(x, params.router, implementation=implementation)
    routing = jaxmoe.route(
        logits, params.bias, config=config, num_valid_tokens=num_valid_tokens, implementation=implementation
    )
    of_experts = routing.experts, routing.weights, params.gate_up, params.down
    return _fused_of_views(x, *of_experts, implementation=implementation, **options), routing


def _is_eager(*tensors: torch.Tensor | None) -> bool:
    """`path.is_eager`, of ops that are other ops, which is what a mode wants to see."""
    return path.is_eager(*tensors) and not path.has_modes()


def _is_checked_below(eager: bool, x: Any, activation: Any) -> bool:
    """Whether the op itself says what is wrong, and can be called to do so."""
    return path.goes_below(eager, x) and isinstance(activation, str) and x.ndim == 2


def _moe(
    x: torch.Tensor,
    params: MoEParams,
    config: Any,
    num_valid_tokens: Any,
    expert_map: Any,
    max_rows: int | None,
    activation: str,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, Routing]:
    """`moe` through the ops."""
    weights = params.router, without_gradient(params.bias), params.gate_up, params.down
    valid = num_valid_tokens if isinstance(num_valid_tokens, torch.Tensor) else None
    eager = _is_eager(x, *weights, valid, expert_map, out)
    if not (isinstance(config, RoutingConfig) and _is_checked_below(eager, x, activation)):
        check_layer(x, *params, config, expert_map, activation, out)
    valid, number = check_count(num_valid_tokens, "x", x)
    given = x, *weights, valid, number, config.json, expert_map, max_rows, activation
    if out is None:
        y, *routing = path.run(ops.moe, eager, *given)
        return y, Routing(*routing)
    asked = {f"params.{name}": value for name, value in params._asdict().items() if name != "bias"}
    check_gradients_of_out({"out": out}, x=x, **asked)
    return out, Routing(*path.run(ops.moe_out, eager, *given, out))
