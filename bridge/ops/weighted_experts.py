"""The torch op of what lies behind routing: dispatch, the experts and combine, with one derivative for all of it.

Tokens are gathered by the first product as it reads them, so no row is dispatched in the forward pass. The backward
pass needs none of the rows that the forward pass made but gate and up: see `jaxmoe.layer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import torch
from torch.autograd.graph import increment_version

from bridge.autograd import is_batched
from bridge.call import call
from bridge.checks import INT32, check, check_layout, check_out, row_stride
from bridge.native import dispatch as moves
from bridge.native import experts as native
from bridge.ops.experts import check_weight, gradient_of
from bridge.ops.library import define
from bridge.views import made_dense
from jaxmoe import layer
from jaxmoe.arguments import half
from jaxmoe.experts import check_activation
from jaxmoe.grouped_matmul import Groups

Tensor = torch.Tensor
LEFT = Groups(clear=False)  # rows behind the last group: nobody reads them
IN = "Tensor x, Tensor rows, Tensor slots, Tensor group_sizes, Tensor weights, Tensor gate_up, Tensor down"


class Given(NamedTuple):
    """What all of these ops read, first of all: tokens, a plan of them, weights, and the experts."""

    x: Tensor
    rows: Tensor
    slots: Tensor
    group_sizes: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor


def _split(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """(Given, what else an op takes)."""
    return Given(*args[:7]), *args[7:]


def _check(given: Given) -> None:
    x, rows, slots, group_sizes, weights, gate_up, down = given
    check("x", x, ("T", "H"))
    row_stride("x", x)
    width = x.shape[1]
    check("rows", rows, (x.shape[0], "S"), INT32)
    check("slots", slots, ("M",), INT32)
    check("weights", weights, rows.shape)
    check("gate_up", gate_up, ("E", width, "2 * I"), (x.dtype,))
    num_experts, _, twice = gate_up.shape
    check("group_sizes", group_sizes, (num_experts,), INT32)
    check("down", down, (num_experts, half("gate_up", twice), width), (x.dtype,))
    for name, weight in (("gate_up", gate_up), ("down", down)):
        check_weight(name, weight, x.device)
    check_layout(x.device, rows=rows, slots=slots, group_sizes=group_sizes, weights=weights)


def _groups(given: Given, num_ids: int) -> Groups:
    """What is known of a plan's groups, if all ids are chosen equally often."""
    num_here, most = given.gate_up.shape[0], given.slots.shape[0]
    expected = layer.expected_rows(given.rows.numel(), num_ids, num_here, most)
    return Groups(expected=expected, clear=LEFT.clear)  # not _replace, which takes two microseconds


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    """args: Given; num_ids, how many ids there are, here and elsewhere; activation; whether to keep gate and up."""
    given, _, activation, keep = _split(args)
    _check(given)
    check_activation(activation)
    x, rows = given.x, given.slots.shape[0] if keep else 0
    return x.new_empty(x.shape), x.new_empty((rows, given.gate_up.shape[2]))


def _native(*args: Any) -> tuple[Tensor, Tensor]:
    (given, num_ids, activation, keep), (y, kept) = _split(args), _fake(*args)
    run(given, num_ids, activation, y, *([kept] if keep else []))
    return y, kept


def run(given: Given, num_ids: int, activation: str, y: Tensor, *kept: Tensor) -> None:
    """Fills y, and `kept` where it is given, that with gate and up of every row. All has been checked."""
    x, rows, slots, group_sizes, weights, gate_up, down = given
    hidden, each = x.new_empty((slots.shape[0], down.shape[1])), x.new_empty((slots.shape[0], x.shape[1]))
    groups, num_slots = _groups(given, num_ids), rows.shape[1]
    native.gated_matmul(
        x, gate_up, group_sizes, activation, hidden, *kept, slots=slots, num_slots=num_slots, groups=groups
    )
    native.grouped_matmul(hidden, down, group_sizes, each, groups=groups)
    moves.combine(each, rows, weights, y)


# For `call`, which hands arrays over by name.


@functools.partial(jax.jit, static_argnames="activation")
def _jax_forward(
    x: Any, rows: Any, slots: Any, group_sizes: Any, weights: Any, gate_up: Any, down: Any, *, activation: str
) -> Any:
    static = None, activation, LEFT
    y, (kept, *_) = layer.weighted_fwd(static, x, rows, slots, group_sizes, weights, gate_up, down, None)
    return y, kept


def _jax_out(
    x: Any, rows: Any, slots: Any, group_sizes: Any, weights: Any, gate_up: Any, down: Any, *, activation: str, out: Any
) -> Any:
    static = None, activation, LEFT
    return layer.weighted_experts(static, x, rows, slots, group_sizes, weights, gate_up, down, out)


def _named(given: Given) -> dict[str, Tensor]:
    """Dense: on a CPU alone, where nothing is fast."""
    return {name: made_dense(tensor) for name, tensor in given._asdict().items()}


def _plain(*args: Any) -> tuple[Tensor, Tensor]:
    _fake(*args)
    given, _, activation, keep = _split(args)
    y, kept = call(_jax_forward, _named(given), {"activation": activation})
    return y, kept if keep else kept[:0].clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_ids, ctx.activation, keep = inputs
    if not keep:
        raise RuntimeError("weighted_experts: expected keep=True where a gradient is asked for, got False")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


# Whether the backward pass that is under way may be followed by another. Private; without it there may.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_last(kept: Tensor, grad: Tensor) -> bool:
    """Whether nobody reads `kept` after this backward pass.

    What torch.compile traces has to leave its inputs alone, and of several gradients at once (is_grads_batched) each
    reads it.
    """
    if not kept.is_cuda or type(kept) is not Tensor or torch.compiler.is_compiling():
        return False
    return not _keeps_graph() and not is_batched(grad)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    trained = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
    *tensors, kept = ctx.saved_tensors
    if getattr(ctx, "written_over", False):  # torch frees the graph only after a pass that came to its end
        raise RuntimeError("weighted_experts: a backward pass that failed has written over what the next one needs")
    ctx.written_over = _is_last(kept, grad)
    op = weighted_experts_last_backward if ctx.written_over else weighted_experts_backward
    dx, dweights, *stack = op(grad.contiguous(), *tensors, kept, ctx.num_ids, ctx.activation, trained)
    return dx, None, None, None, dweights, *(stack if trained else (None, None)), None, None, None


weighted_experts = define(
    f"weighted_experts({IN}, SymInt num_ids, str activation, bool keep) -> (Tensor, Tensor)",
    native=_native,
    plain=_plain,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)


def _check_out(*args: Any) -> None:
    """args: Given; num_ids; activation; out."""
    given, _, activation, out = _split(args)
    _check(given)
    check_activation(activation)
    check("out", out, tuple(given.x.shape), (given.x.dtype,))
    check_layout(given.x.device, out=out)


def _out_native(*args: Any) -> None:
    _check_out(*args)
    given, num_ids, activation, out = _split(args)
    check_out({"out": out}, given._asdict())
    run(given, num_ids, activation, out)
    increment_version(out)


def _out_plain(*args: Any) -> None:
    _check_out(*args)
    given, _, activation, out = _split(args)
    check_out({"out": out}, given._asdict())  # not copies of these
    call(_jax_out, _named(given), {"activation": activation}, out=out)


weighted_experts_out = define(
    f"weighted_experts_out({IN}, SymInt num_ids, str activation, Tensor(a!) out) -> ()",
    native=_out_native,
    plain=_out_plain,
    fake=_check_out,
)


def _check_saved(grad: Tensor, given: Given, kept: Tensor) -> None:
    _check(given)
    x = given.x
    check("grad", grad, tuple(x.shape), (x.dtype,))
    check("kept", kept, (given.slots.shape[0], given.gate_up.shape[2]), (x.dtype,))
    check_layout(x.device, grad=grad, kept=kept)


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """args: Given; kept; num_ids; activation; trained: without it no gradients of gate_up and down are returned, nor
    computed on a GPU.
    """
    given, kept, _, _, trained = _split(args)
    _check_saved(grad, given, kept)
    stack = gradient_of(given.gate_up, trained), gradient_of(given.down, trained)
    return given.x.new_empty(given.x.shape), torch.empty_like(given.weights), *stack


def _backward_native(grad: Tensor, *args: Any, over: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With `over`, gate and up are written over by their gradient."""
    given, kept, num_ids, activation, trained = _split(args)
    _check_saved(grad, given, kept)
    x, rows, slots, group_sizes, weights, gate_up, down = given
    dweights = torch.empty_like(weights)
    if rows.numel():
        flat = weights.reshape(-1).float()  # of float32, as routing's are, nothing is cast
        scale = flat[slots.clamp(min=0)].masked_fill_(slots < 0, 0.0)
    else:  # no tokens, but rows that fill experts up
        scale = torch.zeros_like(slots, dtype=torch.float32)
    dots = torch.empty_like(scale)
    # Gradients of gigabytes are made as they are needed, and what lies in `held` and `hidden` is written over: all of
    # it at once would take more memory than plain torch does.
    held, hidden = x.new_empty((slots.shape[0], x.shape[1])), x.new_empty((slots.shape[0], down.shape[1]))
    dkept = kept if over else torch.empty_like(kept)
    groups, end = _groups(given, num_ids), group_sizes.sum(0, keepdim=True, dtype=torch.int32)
    moves.dispatch(grad, rows, slots, None, held, end=end)
    native.grouped_matmul(held, down.mT, group_sizes, hidden, groups=groups)  # the gradient of the hidden rows,
    native.gated_grad(kept, hidden, activation, dkept, hidden, scale, dots, end)  # then these themselves
    ddown = gradient_of(down, trained)
    if trained:
        native.grouped_outer(hidden, held, group_sizes, ddown, groups=groups)
        moves.dispatch(x, rows, slots, None, held, end=end)  # now the tokens,
    del hidden
    dgate_up = gradient_of(gate_up, trained)
    if trained:
        native.grouped_outer(held, dkept, group_sizes, dgate_up, groups=groups)
    native.grouped_matmul(dkept, gate_up.mT, group_sizes, held, groups=groups)  # then their gradients
    dx = x.new_empty(x.shape)
    moves.combine(held, rows, None, dx)
    if dots.numel():
        dweights.copy_(dots[rows.clamp(min=0)]).masked_fill_(rows < 0, 0.0)
    else:
        dweights.zero_()
    return dx, dweights, dgate_up, ddown


@functools.partial(jax.jit, static_argnames="activation")
def _jax_backward(
    grad: Any,
    x: Any,
    rows: Any,
    slots: Any,
    group_sizes: Any,
    weights: Any,
    gate_up: Any,
    down: Any,
    kept: Any,
    *,
    activation: str,
) -> Any:
    saved = (kept, x, rows, slots, group_sizes, weights, gate_up, down)
    dx, _, _, _, dweights, dgate_up, ddown, _ = layer.weighted_bwd((None, activation, LEFT), saved, grad)
    return dx, dweights, dgate_up, ddown


def _backward_plain(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = _backward_fake(grad, *args)
    given, kept, _, activation, trained = _split(args)
    found = call(_jax_backward, {"grad": grad, **_named(given), "kept": kept}, {"activation": activation})
    # In the layout of the weights, as the fake implementation says.
    if not trained:
        return found[0], found[1], like[2], like[3]
    dx, dweights, *stack = (
        got if got.stride() == out.stride() else out.copy_(got) for got, out in zip(found, like, strict=True)
    )
    return dx, dweights, stack[0], stack[1]


weighted_experts_backward = define(
    f"weighted_experts_backward(Tensor grad, {IN}, Tensor kept, SymInt num_ids, str activation, bool trained)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    native=_backward_native,
    plain=_backward_plain,
    fake=_backward_fake,
)

# The same where there is no second backward pass: `kept` holds gradients afterwards.
weighted_experts_last_backward = define(
    f"weighted_experts_last_backward(Tensor grad, {IN}, Tensor(a!) kept, SymInt num_ids, str activation, bool trained)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    native=functools.partial(_backward_native, over=True),
    plain=_backward_plain,
    fake=_backward_fake,
)
