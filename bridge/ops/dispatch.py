"""The torch ops of dispatch and combine, and their gradients."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch.autograd.graph import increment_version

import jaxmoe
from bridge.call import call
from bridge.checks import INT32, check, check_layout, check_out, row_stride
from bridge.native import dispatch as native
from bridge.ops.library import define, where_it_runs
from jaxmoe import reference
from jaxmoe.arguments import Rows, dense

Tensor = torch.Tensor


def _plan(rows: Any, slots: Any) -> jaxmoe.DispatchPlan:
    """What jaxmoe takes, of tensors until they are imported; dispatch and combine do not read the group sizes."""
    return jaxmoe.DispatchPlan(rows, slots, rows.new_zeros(1))


def _check_plan(device: torch.device, rows: Tensor, slots: Tensor) -> None:
    check("plan.rows", rows, ("T", "S"), INT32)
    check("plan.slots", slots, ("M",), INT32)
    check_layout(device, **{"plan.rows": rows, "plan.slots": slots})


def _check_dispatch(x: Tensor, rows: Tensor, slots: Tensor) -> None:
    _check_plan(x.device, rows, slots)
    check("x", x, (rows.shape[0], "H"))
    row_stride("x", x)


def _dispatch_fake(x: Tensor, rows: Tensor, slots: Tensor, clear: bool = True) -> Tensor:
    _check_dispatch(x, rows, slots)
    return x.new_empty((slots.shape[0], x.shape[1]))


def _dispatch_native(x: Tensor, rows: Tensor, slots: Tensor, clear: bool = True) -> Tensor:
    out = _dispatch_fake(x, rows, slots)
    native.dispatch(x, rows, slots, None, out, clear=clear)
    return out


def _dispatch_plain(x: Tensor, rows: Tensor, slots: Tensor, clear: bool = True) -> Tensor:
    _check_dispatch(x, rows, slots)
    return call(jaxmoe.dispatch, {"x": x, "plan": _plan(rows, slots)}, {}, strided=("x",))


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *plan, _ = inputs
    ctx.save_for_backward(*plan)


def _dispatch_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return dispatch_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None


# Without `clear`, rows that hold no token may hold anything: through JAX they are zero all the same.
dispatch = define(
    "dispatch(Tensor x, Tensor rows, Tensor slots, bool clear=True) -> Tensor",
    native=_dispatch_native,
    plain=_dispatch_plain,
    fake=_dispatch_fake,
    backward=_dispatch_backward,
    setup_context=_dispatch_setup,
)


def _check_dispatch_out(x: Tensor, rows: Tensor, slots: Tensor, out: Tensor, clear: bool = True) -> None:
    _check_dispatch(x, rows, slots)
    check("out", out, (slots.shape[0], x.shape[1]), (x.dtype,))
    check_layout(x.device, out=out)


def _dispatch_out_native(x: Tensor, rows: Tensor, slots: Tensor, out: Tensor, clear: bool = True) -> None:
    _check_dispatch_out(x, rows, slots, out)
    check_out({"out": out}, {"x": x, "plan.rows": rows, "plan.slots": slots})
    native.dispatch(x, rows, slots, None, out, clear=clear)
    increment_version(out)


def _dispatch_out_plain(x: Tensor, rows: Tensor, slots: Tensor, out: Tensor, clear: bool = True) -> None:
    _check_dispatch_out(x, rows, slots, out)
    call(jaxmoe.dispatch, {"x": x, "plan": _plan(rows, slots)}, {}, strided=("x",), out=out)


dispatch_out = define(
    "dispatch_out(Tensor x, Tensor rows, Tensor slots, Tensor(a!) out, bool clear=True) -> ()",
    native=_dispatch_out_native,
    plain=_dispatch_out_plain,
    fake=_check_dispatch_out,
)


def _dispatch_backward_fake(grad: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    _check_plan(grad.device, rows, slots)
    check("grad", grad, (slots.shape[0], "H"))
    check_layout(grad.device, grad=grad)
    return grad.new_empty((rows.shape[0], grad.shape[1]))


def _dispatch_backward_native(grad: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    out = _dispatch_backward_fake(grad, rows, slots)
    native.combine(grad, rows, None, out)
    return out


def _jax_sum(x: Any, rows: Any) -> Any:
    return reference.combine(x, rows, None)


_jax_sum_jit = jax.jit(_jax_sum)


def _dispatch_backward_plain(grad: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    out = _dispatch_backward_fake(grad, rows, slots)
    if 0 in (*out.shape, *grad.shape):
        return out.zero_()
    return call(_jax_sum_jit, {"x": grad, "rows": rows}, {})


dispatch_backward = define(
    "dispatch_backward(Tensor grad, Tensor rows, Tensor slots) -> Tensor",
    native=_dispatch_backward_native,
    plain=_dispatch_backward_plain,
    fake=_dispatch_backward_fake,
)


def _check_combine(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> None:
    _check_plan(x.device, rows, slots)
    check("rows", x, (slots.shape[0], "H"))
    row_stride("rows", x)
    check("weights", weights, rows.shape)
    check_layout(x.device, weights=weights)


def _combine_fake(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    _check_combine(x, rows, slots, weights)
    return x.new_empty((rows.shape[0], x.shape[1]))


def _combine_native(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    out = _combine_fake(x, rows, slots, weights)
    native.combine(x, rows, weights, out)
    return out


def _combine_plain(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    _check_combine(x, rows, slots, weights)
    arguments = {"rows": x, "plan": _plan(rows, slots), "weights": weights}
    return call(jaxmoe.combine, arguments, {}, strided=("rows",))


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx, dweights = combine_backward(grad.contiguous(), *ctx.saved_tensors)
    return dx, None, None, dweights


combine = define(
    "combine(Tensor x, Tensor rows, Tensor slots, Tensor weights) -> Tensor",
    native=_combine_native,
    plain=_combine_plain,
    fake=_combine_fake,
    backward=_combine_backward,
    setup_context=_combine_setup,
)


def _check_combine_out(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    _check_combine(x, rows, slots, weights)
    check("out", out, (rows.shape[0], x.shape[1]), (x.dtype,))
    check_layout(x.device, out=out)


def _combine_out_native(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    _check_combine_out(x, rows, slots, weights, out)
    check_out({"out": out}, {"rows": x, "plan.rows": rows, "plan.slots": slots, "weights": weights})
    native.combine(x, rows, weights, out)
    increment_version(out)


def _combine_out_plain(x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
    _check_combine_out(x, rows, slots, weights, out)
    arguments = {"rows": x, "plan": _plan(rows, slots), "weights": weights}
    call(jaxmoe.combine, arguments, {}, strided=("rows",), out=out)


combine_out = define(
    "combine_out(Tensor x, Tensor rows, Tensor slots, Tensor weights, Tensor(a!) out) -> ()",
    native=_combine_out_native,
    plain=_combine_out_plain,
    fake=_check_combine_out,
)


def _check_unpermute(x: Tensor, rows: Tensor, weights: Tensor, end: Tensor, out: Tensor) -> None:
    check("plan.rows", rows, ("T", "S"), INT32)
    check("rows", x, ("M", "H"))
    row_stride("rows", x)
    check("weights", weights, rows.shape)
    check("end", end, (1,), (torch.int64,))
    check("out", out, (rows.shape[0], x.shape[1]), (x.dtype,))
    check_layout(x.device, **{"plan.rows": rows, "weights": weights, "end": end, "out": out})


def _unpermute_native(x: Tensor, rows: Tensor, weights: Tensor, end: Tensor, out: Tensor) -> None:
    _check_unpermute(x, rows, weights, end, out)
    check_out({"out": out}, {"rows": x, "plan.rows": rows, "weights": weights, "end": end})
    native.combine(x, rows, weights, out, end)
    increment_version(out)


def _unpermute_plain(x: Tensor, rows: Tensor, weights: Tensor, end: Tensor, out: Tensor) -> None:
    _check_unpermute(x, rows, weights, end, out)
    check_out({"out": out}, {"rows": x, "plan.rows": rows, "weights": weights, "end": end})
    held = rows.where(rows < end, -1)
    _combine_out_plain(x, held, rows.new_empty(x.shape[0]), weights, out)  # which reads the plan's rows alone


unpermute_out = define(
    "unpermute_out(Tensor x, Tensor rows, Tensor weights, Tensor end, Tensor(a!) out) -> ()",
    native=where_it_runs(_unpermute_native, _unpermute_plain),
    plain=_unpermute_plain,
    fake=_check_unpermute,
)


def _combine_backward_fake(
    grad: Tensor, x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    _check_combine(x, rows, slots, weights)
    check("grad", grad, (rows.shape[0], x.shape[1]), (x.dtype,))
    check_layout(x.device, grad=grad)
    return x.new_empty(x.shape), torch.empty_like(weights)


def _combine_backward_native(
    grad: Tensor, x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweights = _combine_backward_fake(grad, x, rows, slots, weights)
    native.dispatch(grad, rows, slots, weights, dx)
    native.combine_weight_grad(x, grad, rows, dweights)
    return dx, dweights


@jax.jit
def _jax_combine_grad(grad: Any, x: Rows, rows: Any, slots: Any, weights: Any) -> Any:
    dx = reference.dispatch(grad, rows, slots, weights, x.dtype)
    return dx, reference.combine_weight_grad(dense(x), grad, rows).astype(weights.dtype)


def _combine_backward_plain(
    grad: Tensor, x: Tensor, rows: Tensor, slots: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweights = _combine_backward_fake(grad, x, rows, slots, weights)
    if 0 in (*x.shape, rows.shape[0]):
        return dx.zero_(), dweights.zero_()
    arguments = {"grad": grad, "x": x, "rows": rows, "slots": slots, "weights": weights}
    return tuple(call(_jax_combine_grad, arguments, {}, strided=("x",)))


combine_backward = define(
    "combine_backward(Tensor grad, Tensor x, Tensor rows, Tensor slots, Tensor weights) -> (Tensor, Tensor)",
    native=_combine_backward_native,
    plain=_combine_backward_plain,
    fake=_combine_backward_fake,
)
