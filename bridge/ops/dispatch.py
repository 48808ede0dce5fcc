"""The torch ops of the plan, dispatch and combine, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.autograd.graph import increment_version

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import INT32, check, check_at_least_one, check_layout, check_out, row_stride
from bridge.native import dispatch as native
from bridge.ops.library import define
from jaxmoe import reference
from jaxmoe.arguments import Rows, dense
from jaxmoe.dispatch import MOST_ROWS, check_max_rows, check_plan_rows, check_plan_sizes
from kernels_pallas.plan_dispatch import num_rows

Tensor = torch.Tensor


def _check_ids(experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: Any = None) -> None:
    check("experts", experts, ("T", "S"), INT32)
    check_layout(experts.device, experts=experts, expert_map=expert_map)
    check_at_least_one("experts", experts, 1)
    check_plan_sizes(num_experts, align)
    if not isinstance(max_rows, torch.SymInt):  # of which the op is told the value, when it runs
        check_max_rows(max_rows, align)
    if expert_map is not None:
        check("expert_map", expert_map, ("ids",), INT32)
        check_at_least_one("expert_map", expert_map, 0)
    check_plan_rows(experts.shape, num_experts, align)


def _plan_fake(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(experts, num_experts, align, expert_map, max_rows)
    rows = num_rows(experts.shape[0] * experts.shape[1], num_experts, align)
    if max_rows is not None:
        rows = torch.sym_min(rows, max_rows)  # not min, which would make torch.compile guard on the tokens
    return experts.new_empty(experts.shape), experts.new_empty(rows), experts.new_empty(num_experts)


def _plan_native(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _plan_fake(experts, num_experts, align, expert_map, max_rows)
    native.plan_dispatch(experts, num_experts, align, expert_map, *outs)
    return outs


def _plan_plain(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(experts, num_experts, align, expert_map, max_rows)
    options = {"num_experts": num_experts, "align": align, "max_rows": max_rows}
    return tuple(call(jaxmoe.plan_dispatch, {"experts": experts, "expert_map": expert_map}, options))


plan_dispatch = define(
    "plan_dispatch(Tensor experts, int num_experts, int align, Tensor? expert_map, SymInt? max_rows=None)"
    " -> (Tensor, Tensor, Tensor)",
    native=_plan_native,
    plain=_plan_plain,
    fake=_plan_fake,
)


def _check_named(experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool) -> None:
    _check_ids(experts, num_experts, block_size, expert_map)
    if named and (expert_map is None or expert_map.shape[0] < num_experts):
        got = "None" if expert_map is None else f"int32[{expert_map.shape[0]}]"
        raise ValueError(f"expert_map: expected a name for each of num_experts={num_experts}, got {got}")


def _align_fake(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    return _align_empty(experts, block_size, length)


def _align_empty(experts: Tensor, block_size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return experts.new_empty(length), experts.new_empty(-(-length // block_size)), experts.new_empty(1)


def _check_length(length: int, pairs: int, num_experts: int, block_size: int) -> None:
    """Every row in use has a place. Not for the fake, where it would make torch.compile guard on the tokens."""
    least = min(pairs * block_size, pairs + num_experts * (block_size - 1))
    if not least <= length < MOST_ROWS:
        raise ValueError(f"length: expected {least} for {pairs} pairs, or more, to {MOST_ROWS - 1}, got {length}")


def _align_native(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    _check_length(length, experts.numel(), num_experts, block_size)
    outs = _align_empty(experts, block_size, length)
    native.align_blocks(experts, num_experts, block_size, expert_map, named, *outs)
    return outs


def _align_plain(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    _check_length(length, experts.numel(), num_experts, block_size)
    pairs, block_experts, used = _align_empty(experts, block_size, length)
    _, slots, sizes = _plan_plain(experts, num_experts, block_size, None if named else expert_map)
    pairs.fill_(experts.numel())
    pairs[: len(slots)] = slots[:length].where(slots[:length] >= 0, experts.numel())
    end = sizes.cumsum(0)
    begin = torch.arange(len(block_experts), device=experts.device) * block_size
    expert = torch.searchsorted(end, begin, right=True).clamp(max=num_experts - 1)
    name = expert if not named or expert_map is None else expert_map[expert]
    block_experts.copy_(name.where(begin < end[-1], -1))
    return pairs, block_experts, used.copy_(end[-1:])


def _where_it_runs(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU that the kernels do not run on, through JAX's runtime, as on a CPU: a drop-in asks for no path."""

    def run(first: Tensor, *rest: Any) -> Any:
        if path.runs_natively(first):
            return native(first, *rest)
        with torch.no_grad():
            return plain(first, *rest)

    return run


align_blocks = define(
    "align_blocks(Tensor experts, int num_experts, int block_size, Tensor? expert_map, bool named, SymInt length)"
    " -> (Tensor, Tensor, Tensor)",
    native=_where_it_runs(_align_native, _align_plain),
    plain=_align_plain,
    fake=_align_fake,
)


def _check_maps(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    check("rows", rows, ("T", "S"), INT32)
    pairs = rows.shape[0] * rows.shape[1]
    for name, tensor in (("slots", slots), ("inverse", inverse), ("index", index)):
        check(name, tensor, (pairs,), INT32)
    check("group_sizes", group_sizes, ("E",), INT32)
    check("offsets", offsets, ("local + 1",), (torch.int64,))
    given = {"slots": slots, "group_sizes": group_sizes, "offsets": offsets, "inverse": inverse, "index": index}
    check_layout(rows.device, rows=rows, **given)
    if not 2 <= offsets.shape[0] <= group_sizes.shape[0] + 1:
        raise ValueError(f"offsets: expected int64 of 2 to E + 1 = {group_sizes.shape[0] + 1}, got {offsets.shape[0]}")


def _check_maps_apart(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps(rows, slots, group_sizes, offsets, inverse, index)
    outs: dict[str, Tensor | None] = {"offsets": offsets, "inverse": inverse, "index": index}
    check_out(outs, {"rows": rows, "slots": slots, "group_sizes": group_sizes})


def _permute_maps_native(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps_apart(rows, slots, group_sizes, offsets, inverse, index)
    native.permute_maps(rows, slots, group_sizes, offsets, inverse, index)
    increment_version([offsets, inverse, index])


def _permute_maps_plain(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps_apart(rows, slots, group_sizes, offsets, inverse, index)
    pairs = slots.numel()
    offsets[:1] = 0
    torch.cumsum(group_sizes[: len(offsets) - 1], 0, out=offsets[1:])
    inverse.copy_(rows.flatten().where(rows.flatten() >= 0, pairs - 1))
    index.copy_(slots.where(slots >= 0, pairs))


permute_maps_out = define(
    "permute_maps_out(Tensor rows, Tensor slots, Tensor group_sizes, Tensor(a!) offsets, Tensor(b!) inverse,"
    " Tensor(c!) index) -> ()",
    native=_where_it_runs(_permute_maps_native, _permute_maps_plain),
    plain=_permute_maps_plain,
    fake=_check_maps,
)


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
    native=_where_it_runs(_unpermute_native, _unpermute_plain),
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
