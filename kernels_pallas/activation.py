"""The activations between the experts' two products, and their derivatives, in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _exp(x: jax.Array) -> jax.Array:
    """exp, through the instruction that GPUs have for 2**x."""
    return jnp.exp2(1.4426950409 * x)


def _sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + _exp(-x))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The share of the normal distribution that lies below x, to a relative error of 1e-7: Pallas has no erf here."""
    u = jnp.abs(x)
    t = 1.0 / (1.0 + 0.305 * u)
    # What lies above u over exp(-u**2 / 2), as a polynomial in t that was fitted for the least maximal relative error.
    tail = jnp.zeros_like(u)
    for c in (
        0.036698908,
        -0.152987177,
        0.185715013,
        -0.037975147,
        0.121020818,
        0.103421119,
        0.122466778,
        0.121639735,
    ):
        tail = (tail + c) * t
    tail = tail * _exp(-0.5 * u * u)
    return jnp.where(x > 0, 1.0 - tail, tail)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * _normal_cdf(x),
    "gelu_tanh": lambda x: x * _sigmoid(1.5957691216 * (x + 0.044715 * x * x * x)),  # (1 + tanh(z)) / 2 = _sigmoid(2 z)
}


def _silu_slope(x: jax.Array) -> jax.Array:
    s = _sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _gelu_slope(x: jax.Array) -> jax.Array:
    return _normal_cdf(x) + 0.3989422804 * x * _exp(-0.5 * x * x)


def _gelu_tanh_slope(x: jax.Array) -> jax.Array:
    s = _sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))
    return s * (1.0 + (1.0 - s) * x * 1.5957691216 * (1.0 + 0.134145 * x * x))


SLOPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": _silu_slope,
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
}
