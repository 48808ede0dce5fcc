"""The experts themselves: two grouped matrix products with a gated activation between them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.implementation import check_implementation

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@functools.partial(jax.jit, static_argnames=("activation",))
def _experts(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array, *, activation: str
) -> jax.Array:
    # By default a GPU multiplies float32 with 10 bits of mantissa.
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    product = functools.partial(
        jax.lax.ragged_dot, group_sizes=group_sizes, precision=precision, preferred_element_type=jnp.float32
    )
    gate, up = jnp.split(product(rows, gate_up), 2, axis=1)
    hidden = (ACTIVATIONS[activation](gate) * up).astype(rows.dtype)
    # Past the last group ragged_dot leaves zeros on some backends and anything on others.
    used = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes)
    return jnp.where(used[:, None], product(hidden, down), 0.0).astype(rows.dtype)


def experts(
    rows: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """Applies each expert to its group of rows: (activation(gate) * up) @ down with gate, up = split(rows @ gate_up).

    Runs on every device through `jax.lax.ragged_dot`, and is correct on all of them; on NVIDIA GPUs that is far from
    fast. There is no Pallas kernel for it yet: asking for "pallas" or "interpret" is an error.

    Args:
      rows: [M, H] bfloat16, float16 or float32, in expert order, as `dispatch` returns them.
      gate_up: [E, H, 2 * I] of rows' dtype: columns [0, I) are the gate, [I, 2 * I) the up projection.
      down: [E, I, H] of rows' dtype.
      group_sizes: int32 [E], how many rows each expert has; from the plan.
      activation: "silu", "gelu" (exact) or "gelu_tanh", taken in float32.
      implementation: "xla" or None.

    Returns:
      [M, H] in rows' dtype; rows behind the last group are zero.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Shazeer, arXiv:2002.05202 (SwiGLU); the stacked layout is that of Hugging Face transformers, transposed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmoe
      >>> rows, sizes = jnp.ones((2, 1)), jnp.array([1, 1], jnp.int32)
      >>> gate_up = jnp.array([[[1.0, 2.0]], [[1.0, 4.0]]])
      >>> y = jaxmoe.experts(rows, gate_up, jnp.ones((2, 1, 1)), sizes)
      >>> (y / jax.nn.silu(1.0)).tolist()
      [[2.0], [4.0]]
    """
    check_array("rows", rows, ("M", "H"))
    check_array("gate_up", gate_up, ("E", rows.shape[1], "2 * I"), (rows.dtype,))
    num_experts, width, twice = gate_up.shape
    if twice % 2:
        raise ValueError(f"gate_up: expected an even last axis, gate and up side by side, got {twice}")
    check_array("down", down, (num_experts, twice // 2, width), (rows.dtype,))
    check_array("group_sizes", group_sizes, (num_experts,), (jnp.int32,))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}")
    check_implementation(implementation, rows)
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation: expected None or 'xla' (experts has no Pallas kernel), got {implementation!r}"
        )
    arguments.check_one_device(rows=rows, gate_up=gate_up, down=down, group_sizes=group_sizes)
    return _experts(rows, gate_up, down, group_sizes, activation=activation)
