"""Scores, weights and order-preserving keys: the arithmetic that the routing kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SCORING_FUNCS = ("sigmoid", "softmax", "sqrtsoftplus")

EXCLUDED = -(2**31)  # below everything: not a candidate
NAN_KEY = EXCLUDED + (1 << 22)  # below every number, and apart from EXCLUDED in its high bits too: see select.top_k


def encode(x: jax.Array) -> jax.Array:
    """float32 -> int32 that compares as the numbers do, every NaN below them. -0.0 must not come in (`plus_zero`)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    key = bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.int32(31)) & 0x7FFFFFFF)
    return jnp.where(x != x, NAN_KEY, key)


def decode(key: jax.Array) -> jax.Array:
    """The float32 that `encode` was given (a NaN for NAN_KEY and EXCLUDED)."""
    bits = key ^ (jax.lax.shift_right_arithmetic(key, jnp.int32(31)) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def plus_zero(x: jax.Array) -> jax.Array:
    """-0.0 -> 0.0, so that the two tie. Not `x + 0`: XLA simplifies that away."""
    return jnp.where(x == 0.0, 0.0, x)


def log1p_exp(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) without overflow, to a few units in the last place, from exp and log alone."""
    u = jnp.exp(-jnp.abs(x))
    w = 1.0 + u
    # Kahan: the rounding of 1 + u cancels in u / (w - 1).
    log1p = jnp.where(w == 1.0, u, jnp.log(w) * (u / jnp.where(w == 1.0, 1.0, w - 1.0)))
    return jnp.maximum(x, 0.0) + log1p


def score(x: jax.Array, scoring_func: str) -> jax.Array:
    """sigmoid or sqrtsoftplus, elementwise; softmax needs the whole row (see the kernel)."""
    if scoring_func == "sigmoid":
        return 1.0 / (1.0 + jnp.exp(-x))
    assert scoring_func == "sqrtsoftplus", scoring_func
    # Far below zero exp(x) is too small for float32 long before its root is.
    return jnp.where(x < -30.0, jnp.exp(0.5 * x), jnp.sqrt(log1p_exp(x)))


def unscaled_weights(
    x: jax.Array, valid: jax.Array, *, scoring_func: str, renormalize: bool, row_max: jax.Array, row_sum: jax.Array
) -> jax.Array:
    """The weights of chosen logits x [R, K] before the scaling factor; `valid` [R, K] marks the slots that count.

    Renormalised weights are ratios, so a common factor is free to choose: each score is divided by the exponential part
    of the row's largest, which leaves nothing to underflow to 0/0 (eight logits of -100 give eight times 1/8) and needs
    no epsilon. row_max, row_sum [R, 1] are softmax's over all experts; with `renormalize` only a NaN in row_sum counts.
    """
    softmax = scoring_func == "softmax"
    exponent = x if softmax else jnp.where(x != x, x, jnp.minimum(x, 0.0))
    if renormalize:
        top = jnp.max(jnp.where(valid, exponent, -jnp.inf), axis=1, keepdims=True)
    else:
        top = row_max if softmax else jnp.zeros_like(row_max)
    shift = jnp.where(exponent == top, 0.0, exponent - top)  # the test spares inf - inf
    if softmax:
        ratio = jnp.exp(shift)
        ratio = ratio + 0.0 * row_sum if renormalize else ratio / row_sum  # NaN is softmax's for the whole row
    elif scoring_func == "sigmoid":  # exp(min(x, 0)) / (1 + exp(-|x|))
        ratio = jnp.exp(shift) / (1.0 + jnp.exp(-jnp.abs(x)))
    else:  # sqrt(log(1 + exp(x))) = exp(min(x, 0) / 2) * sqrt(log(1 + exp(x)) / exp(min(x, 0)))
        tail = jnp.sqrt(log1p_exp(x) / jnp.exp(jnp.maximum(exponent, -30.0)))
        ratio = jnp.exp(0.5 * shift) * jnp.where(x < -30.0, 1.0, tail)
    ratio = jnp.where(valid, ratio, 0.0)
    return ratio / jnp.sum(ratio, axis=1, keepdims=True) if renormalize else ratio
