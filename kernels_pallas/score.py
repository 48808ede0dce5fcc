"""Scores, weights and order-preserving keys: the arithmetic that the routing kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SCORING_FUNCS = ("sigmoid", "softmax", "sqrtsoftplus")

EXCLUDED = -(2**31)  # below everything: not a candidate
INFINITY = 0x7F800000  # the bits of float32's
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2_E = 1.4426950408889634
LOG1P_RATIO = (  # of a polynomial that minimises the largest relative error
    1.0,
    -0.49999902,
    0.33329964,
    -0.24954134,
    0.19675939,
    -0.1530559,
    0.106036514,
    -0.0569595,
    0.019851444,
    -0.003244021,
)
NAN_KEY = EXCLUDED + (1 << 22)  # below every number


def float_bits(x: jax.Array) -> jax.Array:
    """The bits of float32 as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def encode(x: jax.Array) -> jax.Array:
    """float32 -> int32 that compares as the numbers do, every NaN below them. -0.0 must not come in (`plus_zero`)."""
    bits = float_bits(x)
    key = bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.int32(31)) & 0x7FFFFFFF)
    return jnp.where(x != x, NAN_KEY, key)


def decode(key: jax.Array) -> jax.Array:
    """The float32 that `encode` was given (a NaN for NAN_KEY and EXCLUDED)."""
    bits = key ^ (jax.lax.shift_right_arithmetic(key, jnp.int32(31)) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def plus_zero(x: jax.Array) -> jax.Array:
    """-0.0 -> 0.0, so that the two tie. Not `x + 0`: XLA simplifies that away."""
    return jnp.where(x == 0.0, 0.0, x)


def quick_exp(x: jax.Array, factor: float = 1.0) -> jax.Array:
    """exp(factor * x), to (|x| + 4) * 2**-24 of it, 0 if less than 2**-126; one instruction and a product on CUDA."""
    return jnp.exp2(x * (factor * LOG2_E))


def quick_reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of a positive x, to two units in the last place: a division takes three times as many instructions."""
    root = jax.lax.rsqrt(x)
    return root * root


def log1p_ratio(u: jax.Array) -> jax.Array:
    """log(1 + u) / u for u from 0 to 1, to a unit in the last place."""
    ratio = jnp.full_like(u, LOG1P_RATIO[-1])
    for c in LOG1P_RATIO[-2::-1]:
        ratio = ratio * u + c
    return ratio


def log1p_exp(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) without overflow, to a few units in the last place."""
    u = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0.0) + u * log1p_ratio(u)


def score(x: jax.Array, scoring_func: str) -> jax.Array:
    """sigmoid or sqrtsoftplus, elementwise; softmax needs the whole row (see the kernel)."""
    if scoring_func == "sigmoid":
        return 1.0 / (1.0 + jnp.exp(-x))
    assert scoring_func == "sqrtsoftplus", scoring_func
    # Far below zero exp(x) is too small for float32 long before its root is.
    return jnp.where(x < -30.0, jnp.exp(0.5 * x), jnp.sqrt(log1p_exp(x)))


def quick_score(x: jax.Array, scoring_func: str) -> jax.Array:
    """The same to one part in 2**17, or 0 where that is less than 2**-63."""
    if scoring_func == "sigmoid":
        return quick_reciprocal(1.0 + quick_exp(x, -1.0))
    assert scoring_func == "sqrtsoftplus", scoring_func
    u = quick_exp(jnp.abs(x), -1.0)
    return jnp.sqrt(jnp.maximum(x, 0.0) + u * log1p_ratio(u))


def _largest(x: jax.Array, negative: bool) -> jax.Array:
    """The largest of x [..., K], as [..., 1], which a NaN may hide; as integers, one instruction across a warp.

    negative: no number is above zero.
    """
    if negative:
        return -jax.lax.bitcast_convert_type(jnp.min(float_bits(x) & 0x7FFFFFFF, axis=-1, keepdims=True), jnp.float32)
    return decode(jnp.max(encode(x), axis=-1, keepdims=True))


def unscaled_weights(
    x: jax.Array,
    valid: jax.Array,
    *,
    scoring_func: str,
    renormalize: bool,
    row_max: jax.Array,
    row_sum: jax.Array,
    width: int | None = None,
) -> jax.Array:
    """The weights of chosen logits x [..., K] before the scaling factor; `valid` [..., K] marks the slots that count.

    width: a power of two; none counts from there on, where the result means nothing.

    Renormalised weights are ratios, so a common factor is free to choose: each score is divided by the exponential part
    of the row's largest, which leaves nothing to underflow to 0/0 (eight logits of -100 give eight times 1/8) and needs
    no epsilon. row_max, row_sum [..., 1 or K] are softmax's over all experts; with `renormalize` only row_sum's NaN
    counts.
    """
    softmax = scoring_func == "softmax"
    exponent = jnp.maximum(x if softmax else jnp.minimum(x, 0.0), LOWEST)  # no inf - inf below
    if renormalize:
        top = _largest(jnp.where(valid, exponent, LOWEST), negative=not softmax)
    else:
        top = row_max if softmax else jnp.zeros_like(row_max)
    shift = exponent - top
    if softmax:
        ratio = jnp.exp(shift)
        # NaN is softmax's for the whole row
        ratio = ratio + 0.0 * row_sum if renormalize else ratio * quick_reciprocal(row_sum)
    elif scoring_func == "sigmoid":  # exp(min(x, 0)) / (1 + exp(-|x|))
        ratio = jnp.exp(shift) * quick_reciprocal(1.0 + quick_exp(jnp.abs(x), -1.0))
    else:  # sqrt(log(1 + exp(x))) = exp(min(x, 0) / 2) * sqrt(log(1 + exp(x)) / exp(min(x, 0)))
        u = quick_exp(jnp.abs(x), -1.0)
        tail = log1p_ratio(u)
        ratio = jnp.exp(0.5 * shift) * jnp.sqrt(jnp.where(x > 0.0, x + u * tail, tail))
    ratio = jnp.where(valid, ratio, 0.0)
    if not renormalize:
        return ratio
    runs = (*x.shape[:-1], -1, width or x.shape[-1])  # sums over fewer lanes take fewer steps
    total = jnp.sum(ratio.reshape(runs), axis=-1, keepdims=True)
    return ratio * quick_reciprocal(jnp.broadcast_to(total, ratio.reshape(runs).shape).reshape(x.shape))
