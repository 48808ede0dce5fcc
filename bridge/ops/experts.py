"""The torch ops of the experts: the grouped matmul, the gated pair of them, and their gradients."""

from __future__ import annotations

from typing import Any

import jax
import torch

import jaxmoe
from bridge.call import call
from bridge.checks import INT32, check, check_layout
from bridge.native import experts as native
from bridge.ops.library import define
from bridge.views import is_view
from jaxmoe.arguments import half
from jaxmoe.experts import check_activation

Tensor = torch.Tensor


def check_weight(name: str, weight: Tensor, device: torch.device) -> None:
    """Raises ValueError unless the kernels can read the weight as it lies."""
    if weight.device != device:
        raise ValueError(f"{name}: expected the device of the first argument, {device}, got {weight.device}")
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        raise ValueError(
            f"{name}: expected a contiguous tensor or the transpose of one, got strides {weight.stride()} for "
            f"{list(weight.shape)}; pass {name}.contiguous()"
        )


def as_they_lie(*weights: Tensor) -> tuple[tuple[Tensor, ...], tuple[bool, ...]]:
    """The weights as they lie in memory, and which of them lie transposed."""
    transposed = tuple(map(is_view, weights))
    return tuple(w.mT if is_so else w for w, is_so in zip(weights, transposed, strict=True)), transposed


def _check_matmul(rows: Tensor, weight: Tensor, group_sizes: Tensor) -> None:
    check("rows", rows, ("M", "K"))
    check("weight", weight, ("E", rows.shape[1], "N"), (rows.dtype,))
    check("group_sizes", group_sizes, (weight.shape[0],), INT32)
    check_weight("weight", weight, rows.device)
    check_layout(rows.device, rows=rows, group_sizes=group_sizes)


def _matmul_fake(rows: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    _check_matmul(rows, weight, group_sizes)
    return rows.new_empty((rows.shape[0], weight.shape[2]))


def _matmul_native(rows: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    out = _matmul_fake(rows, weight, group_sizes)
    native.grouped_matmul(rows, weight, group_sizes, out)
    return out


def _matmul_plain(rows: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    _check_matmul(rows, weight, group_sizes)
    (weight,), (transposed,) = as_they_lie(weight)
    arguments = {"rows": rows, "weight": weight, "group_sizes": group_sizes}
    return call(jaxmoe.grouped_matmul, arguments, {"transposed": transposed})


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    trained = ctx.needs_input_grad[1]
    drows, dweight = grouped_matmul_backward(grad.contiguous(), *ctx.saved_tensors, trained)
    return drows, dweight if trained else None, None


grouped_matmul = define(
    "grouped_matmul(Tensor rows, Tensor weight, Tensor group_sizes) -> Tensor",
    native=_matmul_native,
    plain=_matmul_plain,
    fake=_matmul_fake,
    backward=_matmul_backward,
    setup_context=_matmul_setup,
)


def gradient_of(weight: Tensor, trained: bool) -> Tensor:
    """Room for it, in the weight's layout; none for a frozen weight."""
    return torch.empty_like(weight) if trained else weight.new_empty(0)


def _matmul_backward_fake(
    grad: Tensor, rows: Tensor, weight: Tensor, group_sizes: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    """Where not `trained`, no gradient of the weight is returned, nor computed on a GPU."""
    _check_matmul(rows, weight, group_sizes)
    check("grad", grad, (rows.shape[0], weight.shape[2]), (rows.dtype,))
    check_layout(rows.device, grad=grad)
    return rows.new_empty(rows.shape), gradient_of(weight, trained)


def _matmul_backward_native(
    grad: Tensor, rows: Tensor, weight: Tensor, group_sizes: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    drows, dweight = _matmul_backward_fake(grad, rows, weight, group_sizes, trained)
    native.grouped_matmul(grad, weight.mT, group_sizes, drows)
    if trained:
        native.grouped_outer(rows, grad, group_sizes, dweight)
    return drows, dweight


def _pull(function: Any) -> Any:
    """A jitted function of (grad, *arrays, group_sizes) for the gradients of `function` in all of `arrays`."""

    def gradients(*, grad: Any, arrays: Any, group_sizes: Any, **options: Any) -> Any:
        forward = lambda *arrays: function(*arrays, group_sizes, **options)
        return jax.vjp(forward, *arrays)[1](grad)

    return jax.jit(gradients, static_argnames=("transposed", "activation"))


_jax_matmul_grad = _pull(jaxmoe.grouped_matmul)
_jax_experts_grad = _pull(jaxmoe.experts)


def _transpose_back(gradients: Any, transposed: tuple[bool, ...]) -> Any:
    rows, *weights = gradients
    return rows, *(weight.mT if is_so else weight for weight, is_so in zip(weights, transposed, strict=True))


def _matmul_backward_plain(
    grad: Tensor, rows: Tensor, weight: Tensor, group_sizes: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    _, frozen = _matmul_backward_fake(grad, rows, weight, group_sizes, trained)
    lying, transposed = as_they_lie(weight)
    arguments = {"grad": grad, "arrays": (rows, *lying), "group_sizes": group_sizes}
    drows, dweight = _transpose_back(call(_jax_matmul_grad, arguments, {"transposed": transposed[0]}), transposed)
    return drows, dweight if trained else frozen


grouped_matmul_backward = define(
    "grouped_matmul_backward(Tensor grad, Tensor rows, Tensor weight, Tensor group_sizes, bool trained)"
    " -> (Tensor, Tensor)",
    native=_matmul_backward_native,
    plain=_matmul_backward_plain,
    fake=_matmul_backward_fake,
)


def _check_experts(rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str) -> None:
    check("rows", rows, ("M", "H"))
    check("gate_up", gate_up, ("E", rows.shape[1], "2 * I"), (rows.dtype,))
    num_experts, width, twice = gate_up.shape
    check("down", down, (num_experts, half("gate_up", twice), width), (rows.dtype,))
    check("group_sizes", group_sizes, (num_experts,), INT32)
    check_activation(activation)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        check_weight(name, weight, rows.device)
    check_layout(rows.device, rows=rows, group_sizes=group_sizes)


def _experts_fake(rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str) -> Tensor:
    _check_experts(rows, gate_up, down, group_sizes, activation)
    return rows.new_empty(rows.shape)


def _experts_native(rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str) -> Tensor:
    out = _experts_fake(rows, gate_up, down, group_sizes, activation)
    hidden = rows.new_empty((rows.shape[0], down.shape[1]))
    native.gated_matmul(rows, gate_up, group_sizes, activation, hidden)
    native.grouped_matmul(hidden, down, group_sizes, out)
    return out


def _experts_plain(rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str) -> Tensor:
    _check_experts(rows, gate_up, down, group_sizes, activation)
    (gate_up, down), transposed = as_they_lie(gate_up, down)
    arguments = {"rows": rows, "gate_up": gate_up, "down": down, "group_sizes": group_sizes}
    return call(jaxmoe.experts, arguments, {"activation": activation, "transposed": transposed})


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    drows, *stack = experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation, trained)
    return drows, *(stack if trained else (None, None)), None, None


experts = define(
    "experts(Tensor rows, Tensor gate_up, Tensor down, Tensor group_sizes, str activation) -> Tensor",
    native=_experts_native,
    plain=_experts_plain,
    fake=_experts_fake,
    backward=_experts_backward,
    setup_context=_experts_setup,
)


def _check_experts_backward(
    grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str
) -> None:
    _check_experts(rows, gate_up, down, group_sizes, activation)
    check("grad", grad, tuple(rows.shape), (rows.dtype,))
    check_layout(rows.device, grad=grad)


def _experts_backward_fake(
    grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where not `trained`, no gradients of gate_up and down are returned, nor computed on a GPU."""
    _check_experts_backward(grad, rows, gate_up, down, group_sizes, activation)
    return rows.new_empty(rows.shape), gradient_of(gate_up, trained), gradient_of(down, trained)


def _experts_backward_native(
    grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_experts_backward(grad, rows, gate_up, down, group_sizes, activation)
    num_rows, inner = rows.shape[0], down.shape[1]
    # gate and up are computed again: what is saved from the forward pass is its input alone. Gradients are made as they
    # are needed, so that little is alive at one time.
    hidden, both = rows.new_empty((num_rows, inner)), rows.new_empty((num_rows, 2 * inner))
    native.gated_matmul(rows, gate_up, group_sizes, activation, hidden, both)
    native.grouped_matmul(grad, down.mT, group_sizes, hidden)  # written over: the gradient of the hidden rows,
    native.gated_grad(both, hidden, activation, both, hidden)  # then these again; both is its own gradient from here on
    ddown = gradient_of(down, trained)
    if trained:
        native.grouped_outer(hidden, grad, group_sizes, ddown)
    del hidden
    dgate_up = gradient_of(gate_up, trained)
    if trained:
        native.grouped_outer(rows, both, group_sizes, dgate_up)
    drows = rows.new_empty(rows.shape)
    native.grouped_matmul(both, gate_up.mT, group_sizes, drows)
    return drows, dgate_up, ddown


def _experts_backward_plain(
    grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, group_sizes: Tensor, activation: str, trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, *frozen = _experts_backward_fake(grad, rows, gate_up, down, group_sizes, activation, trained)
    lying, transposed = as_they_lie(gate_up, down)
    arguments = {"grad": grad, "arrays": (rows, *lying), "group_sizes": group_sizes}
    options = {"activation": activation, "transposed": transposed}
    drows, *stack = _transpose_back(call(_jax_experts_grad, arguments, options), transposed)
    return drows, *(stack if trained else frozen)


experts_backward = define(
    "experts_backward(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor group_sizes, str activation,"
    " bool trained) -> (Tensor, Tensor, Tensor)",
    native=_experts_backward_native,
    plain=_experts_backward_plain,
    fake=_experts_backward_fake,
)
