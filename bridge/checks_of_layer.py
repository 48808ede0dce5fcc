"""Checks of what comes to the layer, and to what lies behind its routing: see `bridge.checks`."""

from __future__ import annotations

from typing import Any

from bridge.checks import INT32, check, check_at_least_one
from jaxmoe import RoutingConfig
from jaxmoe.arguments import half
from jaxmoe.experts import check_activation
from jaxmoe.layer import check_number_of_experts


def check_experts(
    x: Any, experts: Any, weights: Any, gate_up: Any, down: Any, expert_map: Any, activation: Any, out: Any
) -> None:
    """Raises ValueError unless `fused_experts` can be called with these, wherever they lie."""
    check("x", x, ("T", "H"))
    check("experts", experts, (x.shape[0], "S"), INT32)
    check("weights", weights, experts.shape)
    _check_weights(x, gate_up, down, "E", "")
    if expert_map is not None:
        check("expert_map", expert_map, ("ids",), INT32)
    _check_choices(x, activation, out)


def check_layer(
    x: Any,
    router: Any,
    gate_up: Any,
    down: Any,
    bias: Any,
    config: Any,
    expert_map: Any,
    activation: Any,
    out: Any,
) -> None:
    """Raises ValueError unless `moe` can be called with these, wherever they lie."""
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    experts = config.num_experts
    check("x", x, ("T", "H"))
    check("params.router", router, (experts, x.shape[1]))
    if bias is not None:
        check("params.bias", bias, (experts,))
    here: int | str = config.num_expert_ids
    if expert_map is not None:
        check("expert_map", expert_map, (here,), INT32)
        here = "experts here"
    _check_weights(x, gate_up, down, here, "params.")
    _check_choices(x, activation, out)


def _check_weights(x: Any, gate_up: Any, down: Any, num_here: int | str, prefix: str) -> None:
    check(f"{prefix}gate_up", gate_up, (num_here, x.shape[1], "2 * I"), (x.dtype,))
    check_at_least_one(f"{prefix}gate_up", gate_up, 0)
    check_number_of_experts(f"{prefix}gate_up", gate_up.shape[0])
    inner = half(f"{prefix}gate_up", gate_up.shape[2])
    check(f"{prefix}down", down, (gate_up.shape[0], inner, x.shape[1]), (x.dtype,))


def _check_choices(x: Any, activation: Any, out: Any) -> None:
    check_activation(activation)
    if out is not None:
        check("out", out, tuple(x.shape), (x.dtype,))
