"""jaxmoe.moe as a function of a pytree, as MaxText and the like use their layers: one jitted step, its state donated.

    python examples/functional.py

No module: parameters go in and come out, their buffers are used again, and the bias is one leaf among them that the
load moves and the gradient does not.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe import MoEParams

CONFIG = jaxmoe.RoutingConfig(num_experts=8, top_k=2, n_group=4, topk_group=2, routed_scaling_factor=2.5)
TOKENS, WIDTH, INNER, STEPS, RATE = 64, 16, 8, 40, 0.3


@jax.jit
def init(key: jax.Array) -> MoEParams:
    """Random parameters; the bias starts at zero."""
    router, gate_up, down = jax.random.split(key, 3)
    experts = CONFIG.num_experts
    return MoEParams(
        router=jax.random.normal(router, (experts, WIDTH)) * WIDTH**-0.5,
        bias=jnp.zeros(experts),
        gate_up=jax.random.normal(gate_up, (experts, WIDTH, 2 * INNER)) * WIDTH**-0.5,
        down=jax.random.normal(down, (experts, INNER, WIDTH)) * INNER**-0.5,
    )


@functools.partial(jax.jit, donate_argnums=0)
def step(params: MoEParams, x: jax.Array, target: jax.Array) -> tuple[MoEParams, jax.Array]:
    """One step of gradient descent and one of the bias; (the new parameters in the old ones' memory, the loss)."""

    @jax.checkpoint  # nothing between the layer's input and output is kept for the backward pass
    def layer(params: MoEParams, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, routing = jaxmoe.moe(x, params, CONFIG)
        assert routing.load is not None  # `moe` always counts
        return y, routing.load

    def loss(params: MoEParams) -> tuple[jax.Array, jax.Array]:
        y, load = layer(params, x)
        return jnp.mean((y - target) ** 2), load

    (value, load), grads = jax.value_and_grad(loss, has_aux=True)(params)
    new = jax.tree.map(lambda p, g: p - RATE * g, params, grads)  # the bias has a gradient of zero
    assert params.bias is not None
    return dataclasses.replace(new, bias=jaxmoe.update_bias(params.bias, load, rate=0.001)), value


def main() -> tuple[list[float], MoEParams, MoEParams]:
    """Trains; returns (the losses, the parameters, those given to the last step, which are deleted)."""
    x, target = map(jnp.asarray, np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH), np.float32))
    params, losses = init(jax.random.key(0)), []
    for _ in range(STEPS):
        given = params
        params, loss = step(given, x, target)
        losses.append(float(loss))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"the parameters given to the last step are deleted: {given.gate_up.is_deleted()}")
    return losses, params, given


if __name__ == "__main__":
    main()
