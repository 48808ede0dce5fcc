"""The torch ops of routing: route, router_logits and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.autograd.graph import increment_version

import jaxmoe
from bridge.call import call
from bridge.checks import FLOAT32, INT32, check, check_at_least_one, check_layout, check_out, row_stride
from bridge.native import routing as native
from bridge.native.routing import config_of
from bridge.ops.library import define
from jaxmoe import reference
from jaxmoe.arguments import Rows, dense
from jaxmoe.config import rule_for

Tensor = torch.Tensor
# What torch.autograd.graph.increment_version calls once it has looked at what it was given, which takes as long again.
_increment_version: Callable[[Sequence[Tensor]], None] = getattr(torch._C, "_increment_version", increment_version)


def _check_route(logits: Tensor, bias: Tensor | None, valid: Tensor | None, number: Any, config: Any) -> None:
    check("logits", logits, ("T", config.num_experts))
    row_stride("logits", logits)
    if bias is not None:
        check("bias", bias, (config.num_experts,))
    check_count(valid, number)
    check_layout(logits.device, bias=bias, num_valid_tokens=valid)


def check_count(valid: Tensor | None, number: Any) -> None:
    """Raises ValueError unless this says how many tokens are valid."""
    if valid is not None:
        check("num_valid_tokens", valid, (), INT32)
        if number is not None:
            raise ValueError("num_valid_tokens: expected a tensor or a number, got both")


def empty_results(logits: Tensor, config: Any, return_load: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for weights, experts and load."""
    sizes = (logits.shape[0], config.num_slots)
    return (
        logits.new_empty(sizes, dtype=torch.float32),
        logits.new_empty(sizes, dtype=torch.int32),
        logits.new_empty(config.num_expert_ids if return_load else 0, dtype=torch.int32),
    )


def _route_fake(
    logits: Tensor, bias: Tensor | None, valid: Tensor | None, number: Any, config: str, return_load: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_route(logits, bias, valid, number, config_of(config))
    return empty_results(logits, config_of(config), return_load)


def _route_native(
    logits: Tensor, bias: Tensor | None, valid: Tensor | None, number: int | None, config: str, return_load: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights, experts, load = _route_fake(logits, bias, valid, number, config, return_load)
    native.route(logits, bias, valid, number, config, weights, experts, load if return_load else None)
    return weights, experts, load


def _route_plain(
    logits: Tensor, bias: Tensor | None, valid: Tensor | None, number: int | None, config: str, return_load: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_route(logits, bias, valid, number, config_of(config))
    count = np.int32(number) if number is not None else valid
    arguments = {"logits": logits, "bias": bias, "num_valid_tokens": count}
    options = {"config": config_of(config), "return_load": return_load}
    weights, experts, load = call(jaxmoe.route, arguments, options, strided=("logits",))
    return weights, experts, logits.new_empty(0, dtype=torch.int32) if load is None else load


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *_, ctx.config, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, output[1])


def _route_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    logits, experts = ctx.saved_tensors
    return route_backward(grad.contiguous(), logits, experts, ctx.config), None, None, None, None, None


route = define(
    "route(Tensor logits, Tensor? bias, Tensor? num_valid_tokens, SymInt? number, str config, bool return_load)"
    " -> (Tensor, Tensor, Tensor)",
    native=_route_native,
    plain=_route_plain,
    fake=_route_fake,
    backward=_route_backward,
    setup_context=_route_setup,
)


def _check_route_out(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    number: Any,
    config: str,
    weights: Tensor,
    experts: Tensor,
    load: Tensor | None,
) -> None:
    known = config_of(config)
    _check_route(logits, bias, valid, number, known)
    sizes = (logits.shape[0], known.num_slots)
    check("out.weights", weights, sizes, FLOAT32)
    check("out.experts", experts, sizes, INT32)
    if load is not None:
        check("out.load", load, (known.num_expert_ids,), INT32)
    check_layout(logits.device, **{"out.weights": weights, "out.experts": experts, "out.load": load})


def _route_out_native(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    number: int | None,
    config: str,
    weights: Tensor,
    experts: Tensor,
    load: Tensor | None,
) -> None:
    usual = valid is None and number is None and load is None
    if not (usual and native.route_at_once(logits, bias, config, weights, experts)):
        _check_route_out(logits, bias, valid, number, config, weights, experts, load)
        check_out(
            {"out.weights": weights, "out.experts": experts, "out.load": load},
            {"logits": logits, "bias": bias, "num_valid_tokens": valid},
        )
        native.route(logits, bias, valid, number, config, weights, experts, load)
        if usual:
            native.remember_route(logits, bias, config, weights, experts)
    _increment_version([weights, experts] if load is None else [weights, experts, load])


def _route_out_plain(
    logits: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    number: int | None,
    config: str,
    weights: Tensor,
    experts: Tensor,
    load: Tensor | None,
) -> None:
    _check_route_out(logits, bias, valid, number, config, weights, experts, load)
    count = np.int32(number) if number is not None else valid
    arguments = {"logits": logits, "bias": bias, "num_valid_tokens": count}
    options = {"config": config_of(config), "return_load": load is not None}
    out: Any = (weights, experts, load)
    call(jaxmoe.route, arguments, options, strided=("logits",), out=jaxmoe.Routing(*out))


# No keywords, here and below: torch takes twice as long to pass them.
route_out = define(
    "route_out(Tensor logits, Tensor? bias, Tensor? num_valid_tokens, SymInt? number, str config,"
    " Tensor(a!) weights, Tensor(b!) experts, Tensor(c!)? load) -> ()",
    native=_route_out_native,
    plain=_route_out_plain,
    fake=_check_route_out,
)


def _check_route_backward(grad: Tensor, logits: Tensor, experts: Tensor, config: str) -> None:
    known = config_of(config)
    check("logits", logits, ("T", known.num_experts))
    check("grad", grad, (logits.shape[0], known.num_slots), FLOAT32)
    check("experts", experts, (logits.shape[0], known.num_slots), INT32)
    row_stride("logits", logits)
    check_layout(logits.device, grad=grad, experts=experts)


def _route_backward_fake(grad: Tensor, logits: Tensor, experts: Tensor, config: str) -> Tensor:
    _check_route_backward(grad, logits, experts, config)
    return logits.new_empty(logits.shape)


def _route_backward_native(grad: Tensor, logits: Tensor, experts: Tensor, config: str) -> Tensor:
    _check_route_backward(grad, logits, experts, config)
    return native.route_backward(grad, logits, experts, config)


def _jax_route_grad(logits: Rows, experts: Any, grad: Any, *, config: jaxmoe.RoutingConfig) -> Any:
    return reference.route_grad(dense(logits), experts, grad, rule_for(config, False))


_jax_route_grad_jit = jax.jit(_jax_route_grad, static_argnames="config")


def _route_backward_plain(grad: Tensor, logits: Tensor, experts: Tensor, config: str) -> Tensor:
    _check_route_backward(grad, logits, experts, config)
    arguments = {"logits": logits, "experts": experts, "grad": grad}
    return call(_jax_route_grad_jit, arguments, {"config": config_of(config)}, strided=("logits",))


route_backward = define(
    "route_backward(Tensor grad, Tensor logits, Tensor experts, str config) -> Tensor",
    native=_route_backward_native,
    plain=_route_backward_plain,
    fake=_route_backward_fake,
)


def _check_router_logits(x: Tensor, weight: Tensor) -> None:
    check("x", x, ("T", "H"))
    check("weight", weight, ("E", x.shape[1]))
    row_stride("x", x)
    check_layout(x.device, weight=weight)
    for axis in (0, 1):
        check_at_least_one("weight", weight, axis)


def _router_logits_fake(x: Tensor, weight: Tensor) -> Tensor:
    _check_router_logits(x, weight)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _router_logits_native(x: Tensor, weight: Tensor) -> Tensor:
    _check_router_logits(x, weight)
    return native.router_logits(x, weight)


def _router_logits_plain(x: Tensor, weight: Tensor) -> Tensor:
    _check_router_logits(x, weight)
    return call(jaxmoe.router_logits, {"x": x, "weight": weight}, {}, strided=("x",))


def _router_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_logits_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return router_logits_backward(grad.contiguous(), *ctx.saved_tensors)


router_logits = define(
    "router_logits(Tensor x, Tensor weight) -> Tensor",
    native=_router_logits_native,
    plain=_router_logits_plain,
    fake=_router_logits_fake,
    backward=_router_logits_backward,
    setup_context=_router_logits_setup,
)


def _check_router_logits_backward(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    _check_router_logits(x, weight)
    check("grad", grad, (x.shape[0], weight.shape[0]), FLOAT32)
    check_layout(x.device, grad=grad)


def _router_logits_backward_fake(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_router_logits_backward(grad, x, weight)
    return x.new_empty(x.shape), torch.empty_like(weight)


def _router_logits_backward_native(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_router_logits_backward(grad, x, weight)
    return native.router_logits_backward(grad, x, weight)


@jax.jit
def _jax_router_logits_grad(x: Rows, weight: Any, grad: Any) -> Any:
    return reference.router_logits_grad(grad, dense(x), weight)


def _router_logits_backward_plain(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_router_logits_backward(grad, x, weight)
    arguments = {"x": x, "weight": weight, "grad": grad}
    return tuple(call(_jax_router_logits_grad, arguments, {}, strided=("x",)))


router_logits_backward = define(
    "router_logits_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    native=_router_logits_backward_native,
    plain=_router_logits_backward_plain,
    fake=_router_logits_backward_fake,
)
