"""The torch ops of the whole layer, of what lies behind its routing, and of the bias update."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

from bridge import path
from bridge.checks import check_at_least_one, check_layout, check_out, row_stride
from bridge.checks_of_layer import check_experts, check_layer
from bridge.native import dispatch as moves
from bridge.native import routing as native
from bridge.ops import weighted_experts as behind
from bridge.ops.experts import check_weight
from bridge.ops.library import LIBRARY, register_batch
from bridge.ops.plan_dispatch import check_sizes, empty_plan, plan_dispatch
from bridge.ops.routing import check_count, empty_results, route, router_logits
from bridge.ops.weighted_experts import weighted_experts, weighted_experts_out
from jaxmoe.layer import rows_of

Tensor = torch.Tensor


def weighted(
    x: Tensor,
    plan: tuple[Tensor, Tensor, Tensor],
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_ids: int | None = None,
    activation: str = "silu",
) -> Tensor:
    """dispatch, experts and combine: [T, H] of x [T, H], a plan's (rows, slots, group_sizes) and weights [T, S].

    num_ids: how many there are, where experts are elsewhere, too.
    """
    path.check_no_tangents(x=x, weights=weights, gate_up=gate_up, down=down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    return weighted_experts(x, *plan, weights, gate_up, down, num_ids or gate_up.shape[0], activation, keep)[0]


def _fused_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_map: Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
) -> Tensor:
    plan = plan_dispatch(experts, gate_up.shape[0], 1, expert_map, rows_of(max_rows))
    num_ids = None if expert_map is None else expert_map.shape[0]
    return weighted(x, plan, weights, gate_up, down, num_ids, activation)


def _check_out(out: Tensor, **given: Tensor | None) -> None:
    """Raises ValueError where writing to `out` would reach what is read, or what has a graph."""
    path.check_no_tangents(**given)
    if path.is_memory(out, *given.values()):
        check_out({"out": out}, given)


def _fused_experts_out(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_map: Tensor | None,
    max_rows: int | None,
    activation: str,
    out: Tensor,
) -> None:
    given = {"x": x, "experts": experts, "weights": weights, "gate_up": gate_up, "down": down}
    _check_out(out, **given, expert_map=expert_map)
    plan = plan_dispatch(experts, gate_up.shape[0], 1, expert_map, rows_of(max_rows))
    num_ids = (gate_up if expert_map is None else expert_map).shape[0]
    weighted_experts_out(x, *plan, weights, gate_up, down, num_ids, activation, out)


def _moe(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None,
    number: int | None,
    config: str,
    expert_map: Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, chosen, load = route(router_logits(x, router), bias, valid, number, config, True)
    y = _fused_experts(x, chosen, weights, gate_up, down, expert_map, max_rows, activation)
    return y, weights, chosen, load


def _moe_out(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None,
    number: int | None,
    config: str,
    expert_map: Tensor | None,
    max_rows: int | None,
    activation: str,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    given = {"x": x, "router": router, "bias": bias, "gate_up": gate_up, "down": down}  # before anything runs
    _check_out(out, **given, num_valid_tokens=valid, expert_map=expert_map)
    weights, chosen, load = route(router_logits(x, router), bias, valid, number, config, True)
    _fused_experts_out(x, chosen, weights, gate_up, down, expert_map, max_rows, activation, out)
    return weights, chosen, load


# On a GPU, below autograd: all that can be wrong is said first, then kernels are launched, with no ops between.


def _check_layouts(x: Tensor, gate_up: Tensor, down: Tensor, **others: Tensor | None) -> None:
    row_stride("x", x)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        check_weight(name, weight, x.device)
    check_layout(x.device, **others)


def _check_native(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_map: Tensor | None,
    max_rows: int | None,
    activation: str,
    out: Tensor | None = None,
) -> None:
    check_experts(x, experts, weights, gate_up, down, expert_map, activation, out)
    _check_layouts(x, gate_up, down, experts=experts, weights=weights, expert_map=expert_map, out=out)
    check_sizes(experts, gate_up.shape[0], 1, expert_map, rows_of(max_rows))
    if out is not None:
        given = {"x": x, "experts": experts, "weights": weights, "gate_up": gate_up, "down": down}
        check_out({"out": out}, {**given, "expert_map": expert_map})


def _fill(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_map: Tensor | None,
    max_rows: int | None,
    activation: str,
    out: Tensor,
) -> None:
    num_here, num_ids = gate_up.shape[0], (gate_up if expert_map is None else expert_map).shape[0]
    plan = empty_plan(experts, num_here, 1, rows_of(max_rows))
    moves.plan_dispatch(experts, num_here, 1, expert_map, *plan)
    behind.run(behind.Given(x, *plan, weights, gate_up, down), num_ids, activation, out)


def _fused_experts_native(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_map: Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
) -> Tensor:
    given = x, experts, weights, gate_up, down, expert_map, max_rows, activation
    _check_native(*given)
    out = x.new_empty(x.shape)
    _fill(*given, out)
    return out


def _fused_experts_out_native(*args: Any) -> None:
    _check_native(*args)
    _fill(*args)
    increment_version(args[-1])


def _moe_native(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    valid: Tensor | None,
    number: int | None,
    config: str,
    expert_map: Tensor | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = native.config_of(config)
    check_layer(x, router, gate_up, down, bias, known, expert_map, activation, out)
    check_at_least_one("router", router, 1)
    check_count(valid, number)
    others = {"router": router, "bias": bias, "num_valid_tokens": valid, "expert_map": expert_map}
    _check_layouts(x, gate_up, down, **others, out=out)
    weights, experts, load = empty_results(x, known, True)
    check_sizes(experts, gate_up.shape[0], 1, expert_map, rows_of(max_rows))
    if out is None:
        y = x.new_empty(x.shape)
    else:
        y = out
        check_out({"out": out}, {"x": x, **others, "gate_up": gate_up, "down": down})
    native.route(native.router_logits(x, router), bias, valid, number, config, weights, experts, load)
    _fill(x, experts, weights, gate_up, down, expert_map, max_rows, activation, y)
    return y, weights, experts, load


def _moe_out_native(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, weights, experts, load = _moe_native(*args)
    increment_version(out)
    return weights, experts, load


def _update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    routed = load[: bias.shape[0]]
    # In integers: a rounded mean would move the bias of a load that is perfectly even.
    total = routed.sum(dtype=torch.int64)
    mean, rest = total // bias.shape[0], total % bias.shape[0]
    sign = torch.where(routed == mean, rest.sign(), (mean - routed).sign())
    return (bias.float() + rate * sign.float()).to(bias.dtype)


def _define(schema: str, function: Any, native: Any = None) -> Any:
    """An op that is other ops: `function`. Where `native` is given that is it on a GPU, below autograd.

    Torch then keeps it whole where it decomposes what autograd would have: traced by make_fx in inference mode, in
    inference mode within a compiled function, by an exported program's run_decompositions.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    if native is not None:
        LIBRARY.impl(name, function, "AutogradCUDA")  # which "CUDA" alone would take away
        LIBRARY.impl(name, native, "CUDA")
    op = getattr(torch.ops.jaxmoe, name).default
    if "!" not in schema:
        register_batch(name, op)
    return op


fused_experts = _define(
    "fused_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? expert_map=None,"
    " SymInt? max_rows=None, str activation='silu') -> Tensor",
    _fused_experts,
    _fused_experts_native,
)
fused_experts_out = _define(
    "fused_experts_out(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? expert_map,"
    " SymInt? max_rows, str activation, Tensor(a!) out) -> ()",
    _fused_experts_out,
    _fused_experts_out_native,
)
moe = _define(
    "moe(Tensor x, Tensor router, Tensor? bias, Tensor gate_up, Tensor down, Tensor? num_valid_tokens, SymInt? number,"
    " str config, Tensor? expert_map=None, SymInt? max_rows=None, str activation='silu')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _moe,
    _moe_native,
)
moe_out = _define(
    "moe_out(Tensor x, Tensor router, Tensor? bias, Tensor gate_up, Tensor down, Tensor? num_valid_tokens,"
    " SymInt? number, str config, Tensor? expert_map, SymInt? max_rows, str activation, Tensor(a!) out)"
    " -> (Tensor, Tensor, Tensor)",
    _moe_out,
    _moe_out_native,
)
update_bias = _define("update_bias(Tensor bias, Tensor load, float rate) -> Tensor", _update_bias)
