"""Shared experts kept apart from the routed ones: a gated MLP that every token goes through."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.experts import check_activation
from jaxmoe.reference import ACTIVATIONS


@jax.tree_util.register_dataclass
@dataclass(kw_only=True)
class SharedMLP:
    """The parameters of a gated MLP; a pytree. Called with x [T, H], it gives (activation(gate) * up) @ down [T, H].

    Its width may differ from that of the routed experts. Add its output to that of `moe`, called with a config without
    shared experts.

    Attributes:
      gate_up: [H, 2 * W]: columns [0, W) are the gate, [W, 2 * W) the up projection.
      down: [W, H].
      activation: as for `experts`: "silu", "gelu" (exact) or "gelu_tanh". It is no array but part of the tree's
        structure, which checkpoints of arrays do not hold.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmoe
      >>> mlp = jaxmoe.SharedMLP(gate_up=jnp.array([[1.0, 3.0]]), down=jnp.array([[2.0]]))
      >>> (mlp(jnp.ones((1, 1))) / jax.nn.silu(1.0)).tolist()
      [[6.0]]
    """

    gate_up: jax.Array
    down: jax.Array
    activation: str = field(default="silu", metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, H] in x's dtype, for x [T, H] in the dtype of both weights; the activation is taken in float32."""
        check_array("x", x, ("T", "H"))
        check_activation(self.activation)
        check_array("gate_up", self.gate_up, (x.shape[1], "2 * W"), (x.dtype,))
        width = arguments.half("gate_up", self.gate_up.shape[1])
        check_array("down", self.down, (width, x.shape[1]), (x.dtype,))
        arguments.check_one_device(x=x, params=self)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # as `experts`: no TF32
        both = jnp.dot(x, self.gate_up, precision=precision)
        gate, up = jnp.split(both.astype(jnp.float32), 2, axis=1)
        return jnp.dot((ACTIVATIONS[self.activation](gate) * up).astype(x.dtype), self.down, precision=precision)
