"""The experts themselves: two grouped matmuls with a gated activation between them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe import arguments, reference
from jaxmoe.arguments import check_array
from jaxmoe.config import as_int
from jaxmoe.dispatch import check_align
from jaxmoe.grouped_matmul import ANY, Groups, no_gradient, outer, product
from jaxmoe.implementation import check_implementation, compiled, run
from kernels_pallas.activation import ACTIVATIONS
from kernels_pallas.gated_grad import gated_grad as gated_grad_kernel
from kernels_pallas.grouped_matmul import gated_matmul as gated_kernel

Static = tuple[str | None, str, bool]  # implementation, activation, transposed


def gated(
    static: Static,
    x: jax.Array,
    gate_up: jax.Array,
    group_sizes: jax.Array,
    plan: tuple[jax.Array, jax.Array] | None = None,
    *,
    keep: bool,
    groups: Groups = ANY,
) -> tuple[jax.Array, ...]:
    """(activation(gate) * up [M, I],), and with `keep` (gate, up) [M, 2 * I] too, of x [M, H].

    With (rows, slots) of a plan x are tokens [T, H], which are dispatched as they are read.
    """
    implementation, activation, transposed = static
    width = gate_up.shape[1 if transposed else 2] // 2
    num_rows = x.shape[0] if plan is None else plan[1].shape[0]

    def kernels(
        x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array, plan: Any, *, target: str, interpret: bool
    ) -> tuple[jax.Array, ...]:
        rows, slots = plan or (None, None)
        return gated_kernel(
            x,
            gate_up,
            group_sizes,
            activation=activation,
            transposed=transposed,
            keep=keep,
            slots=slots,
            num_slots=0 if rows is None else rows.shape[1],
            clear=groups.clear,
            expected=groups.expected,
            target=target,
            interpret=interpret,
        )

    def xla(x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array, plan: Any) -> tuple[jax.Array, ...]:
        held = x if plan is None else reference.dispatch(x, *plan)
        both = reference.gated_matmul(held, gate_up, group_sizes, activation=activation, transposed=transposed)
        return both[: 2 if keep else 1]

    if 0 in (*x.shape, num_rows, width):
        return tuple(jnp.zeros((num_rows, w), x.dtype) for w in (width, 2 * width)[: 2 if keep else 1])
    return run(implementation, kernels, xla, x, gate_up, group_sizes, plan)


def gated_grad(
    static: Static,
    kept: jax.Array,
    grad: jax.Array,
    scale: jax.Array | None = None,
    end: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """(gradient of `kept`, hidden), both times each row's scale if there is one; then hidden . grad [M] too.

    Rows at or past end, int32 [1], hold nothing.
    """
    implementation, activation, _ = static
    kernels = functools.partial(gated_grad_kernel, activation=activation)

    def plain(
        kept: jax.Array, grad: jax.Array, scale: jax.Array | None, end: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        del end  # zeros lie there
        return reference.gated_grad(kept, grad, scale, activation=activation)

    if 0 in grad.shape:
        dots = () if scale is None else (jnp.zeros_like(scale),)
        return kept, grad, *dots
    return run(implementation, kernels, plain, kept, grad, scale, end)


# Implementation, activation, whether gate_up and down are transposed, what is known of the groups.
Both = tuple[str | None, str, bool, bool, Groups]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(static: Both, rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    implementation, activation, first, second, groups = static
    (hidden,) = gated((implementation, activation, first), rows, gate_up, group_sizes, keep=False, groups=groups)
    return product(implementation, hidden, down, group_sizes, transposed=second, groups=groups)


def _experts_fwd(
    static: Both, rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, Any]:
    implementation, activation, first, second, groups = static
    # Of what lies between the two products, gate and up are kept, written by the same kernel: computing them again
    # would make the backward pass a third longer. The hidden rows follow from them without a product.
    hidden, kept = gated((implementation, activation, first), rows, gate_up, group_sizes, keep=True, groups=groups)
    kept = checkpoint_name(kept, "moe_gate_up")
    out = product(implementation, hidden, down, group_sizes, transposed=second, groups=groups)
    return out, (rows, gate_up, down, group_sizes, kept)


def _experts_bwd(static: Both, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    implementation, _, first, second, groups = static
    rows, gate_up, down, group_sizes, kept = saved
    dhidden = product(implementation, grad, down, group_sizes, transposed=not second, groups=groups)
    dkept, hidden = gated_grad(static[:3], kept, dhidden)
    return (
        product(implementation, dkept, gate_up, group_sizes, transposed=not first, groups=groups),
        outer(implementation, rows, dkept, group_sizes, transposed=first, groups=groups),
        outer(implementation, hidden, grad, group_sizes, transposed=second, groups=groups),
        no_gradient(group_sizes),
    )


_experts.defvjp(_experts_fwd, _experts_bwd)
_experts_jit = compiled(_experts)


def check_activation(activation: Any) -> None:
    """Raises ValueError for a name that is not known."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}")


def experts(
    rows: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str = "silu",
    transposed: bool | tuple[bool, bool] = False,
    align: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Applies each expert to its group of rows: (activation(gate) * up) @ down with gate, up = split(rows @ gate_up).

    Two kernels, whatever the sizes of the groups: a grouped matmul that ends in the activation, and a second one.

    Args:
      rows: [M, H] bfloat16, float16 or float32, in expert order, as `dispatch` returns them. M may be 0.
      gate_up: [E, H, 2 * I] of rows' dtype: columns [0, I) are the gate, [I, 2 * I) the up projection. With
        `transposed` [E, 2 * I, H].
      down: [E, I, H] of rows' dtype; with `transposed` [E, H, I].
      group_sizes: int32 [E], how many rows each expert has; from the plan. Their sum is at most M.
      activation: "silu", "gelu" (exact) or "gelu_tanh", taken in float32.
      transposed: whether the weights lie as Hugging Face transformers has them; a pair where gate_up and down differ.
        They are read as they lie.
      align: what group_sizes are multiples of, as for `grouped_matmul`.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      [M, H] in rows' dtype; rows behind the last group are zero. Differentiable in rows, gate_up and down; kept for it
      are rows, and gate and up in rows' dtype (under `jax.checkpoint` they are computed again).

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Shazeer, arXiv:2002.05202 (SwiGLU).

    Example:
      >>> import jax, jax.numpy as jnp, jaxmoe
      >>> rows, sizes = jnp.ones((2, 1)), jnp.array([1, 1], jnp.int32)
      >>> gate_up = jnp.array([[[1.0, 2.0]], [[1.0, 4.0]]])
      >>> y = jaxmoe.experts(rows, gate_up, jnp.ones((2, 1, 1)), sizes)
      >>> (y / jax.nn.silu(1.0)).round(4).tolist()
      [[2.0], [4.0]]
    """
    pair = transposed if isinstance(transposed, tuple) else (transposed, transposed)
    if [type(each) for each in pair] != [bool, bool]:
        wanted = "a bool for gate_up and one for down" if isinstance(transposed, tuple) else "a bool"
        raise ValueError(f"transposed: expected {wanted}, got {transposed!r}")
    first, second = pair
    check_array("rows", rows, ("M", "H"))
    width = rows.shape[1]
    check_array("gate_up", gate_up, ("E", "2 * I", width) if first else ("E", width, "2 * I"), (rows.dtype,))
    arguments.check_at_least_one("gate_up", gate_up, 0)
    num_experts = gate_up.shape[0]
    axis = ("second", 1) if first else ("last", 2)
    inner = arguments.half("gate_up", gate_up.shape[axis[1]], axis[0])
    check_array("down", down, (num_experts, width, inner) if second else (num_experts, inner, width), (rows.dtype,))
    check_array("group_sizes", group_sizes, (num_experts,), (jnp.int32,))
    check_activation(activation)
    align = as_int(align)
    check_align(align)
    check_implementation(implementation, rows, gate_up, down, group_sizes)
    arguments.check_one_device(rows=rows, gate_up=gate_up, down=down, group_sizes=group_sizes)
    static = (implementation, activation, first, second, Groups(align))
    return _experts_jit(static, rows, gate_up, down, group_sizes)
