"""The quick search for a token's experts, by scores that are only good enough to order choices which are clearly apart.

It says where they were not. Its keys are the scores' own bits, or, for a sigmoid with a bias, numbers of a fixed step
(`_keys_on_scale`), which leave room for a place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.launch import next_power_of_2, plgpu
from kernels_pallas.layout import Layout
from kernels_pallas.rule import Rule
from kernels_pallas.score import (
    EXCLUDED,
    INFINITY,
    decode,
    encode,
    float_bits,
    quick_exp,
    quick_reciprocal,
    quick_score,
)
from kernels_pallas.select import RANGE, UNKNOWN, quick_top_k

# Steps of float32 (2**-24 of a number) by which two quick scores may be further apart than the scores: twice 87 for the
# rounding of the exponent that still gives a normal number, and what exponential, reciprocal and sums add.
MARGIN = 256
# The same for scores with a bias, which need less: what is off by much of itself is small, and the sum is not. Between
# two sums it holds, in steps of the smaller one, s: six roundings of the largest, two of expert 0's bias and twice what
# scores are off; that is, SUM_MARGIN * s >= 6 * largest + 2 * |bias 0| + 2 * error * the largest score, or, by 8,
# RANGE * s >= largest + |bias 0| / 4 + SCORE_ERROR * the largest score. A group's sum of two has four times the margin.
SUM_MARGIN = 96
assert 8 * RANGE == SUM_MARGIN
LEAST = 0x2B800000  # the bits of 2**-40: quick scores below 2**-63 are 0, which no share of a pick must be near
MOST = 0x71800000  # the bits of 2**100: no sum of two is infinite where the same is not
SCORE_ERROR = {"sqrtsoftplus": 3.0, "softmax": 6.0}

# Keys on a scale: see `offsets` and `_keys_on_scale`. Up to SCALE_LEAST a bias may have been clamped from below, from
# SCALE_MOST on from above. A step of 2**-24 of what they stand for is 24 of a key. By so many steps two of them may be
# further apart than the choices: 20 for the scores, 5 and twice the bias of expert 0 for the sums' rounding, of which
# there is that bias; 13 for rounding what is laid on the scale (8 where products and sums are fused, as on CUDA); and
# one unit of the scale. Elsewhere than on CUDA there are 6 more: nobody has measured how far scores are off there.
SCALE_LEAST, SCALE_MOST = 0x18010000, 0x60000000
SCALE_ERROR = 38
SCALE_BIAS = 2.0**16  # of expert 0, up to which this is done


def _keys_of_logits(xs: list[jax.Array], spare: bool) -> list[jax.Array]:
    """Keys of logits; a lane that has a NaN or an infinity says that the quick search cannot answer."""
    xs = [x * -0.0 + x for x in xs]  # -0.0 becomes 0.0 (XLA would drop a sum with 0), an infinity NaN
    flipped = 0x7FFFE000 if spare else 0x7FFFFFFF  # the low bits of keys from 16 bits stay 0
    keys = [bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.int32(31)) & flipped) for bits in map(float_bits, xs)]
    total = functools.reduce(jnp.add, xs)
    return [jnp.where(total != total, UNKNOWN, keys[0]), *keys[1:]]


class Found(NamedTuple):
    """What the quick search says of a token."""

    place: jax.Array  # [slots], as `Layout.expert` takes it
    sure: jax.Array | None  # these are the chosen experts, in order; None: no search was possible
    members_sure: jax.Array | None  # they are, in some order; None where it would be `sure`
    row_max: jax.Array  # [1]; this and row_sum [1] are what softmax's weights need of the row
    row_sum: jax.Array


def on_scale(rule: Rule, has_bias: bool) -> bool:
    """Whether keys are numbers of a fixed step."""
    return rule.scoring_func == "sigmoid" and has_bias


def offsets(biases: list[jax.Array], first: jax.Array, assembly: bool) -> list[jax.Array]:
    """What biases are on the scale of `_keys_on_scale`: 3/8 for that of expert 0, `first`; 1 is four.

    A common term decides nothing. Where a bias is 1.5 below that of expert 0 it is clamped, and where it is 2.5 above:
    on CUDA by the instruction that scales it, which Pallas has no name for. Minimum and maximum are two on the busiest
    pipe.
    """
    term = 0.375 - 0.25 * first
    if not assembly:
        return [jnp.clip(bias * 0.25 + term, 0.0, 1.0) for bias in biases]
    return [
        plgpu.elementwise_inline_asm(
            "fma.rn.sat.f32 $0, $1, 0f3E800000, $2;",  # by 0.25
            args=[bias, jnp.broadcast_to(term, bias.shape)],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(bias.shape, jnp.float32)],
        )[0]
        for bias in biases
    ]


def _keys_on_scale(xs: list[jax.Array], offsets: list[jax.Array], shift: int, assembly: bool) -> list[jax.Array]:
    """Keys whose low `shift` bits, 8 at least, are free: sigmoid(x) / 4 + offset in numbers of a fixed step.

    They are the mantissas of numbers that all have one exponent, and moved to the left: floats themselves give as many
    bits to a range that hardly any pick lies in. A NaN becomes a key below SCALE_LEAST: on CUDA a sum's is 0x7FFFFFFF,
    which is negative then; elsewhere it may be any, and is looked for.
    """
    keys = []
    for x, offset in zip(xs, offsets, strict=True):
        root = jax.lax.rsqrt(4.0 * quick_exp(x, -1.0) + 4.0)
        total = (root * root + offset) * 1.5 + 2.0 ** (shift - 7)
        key = float_bits(total) << shift
        keys.append(key if assembly else jnp.where(total == total, key, 0))
    return keys


def layout_for(rule: Rule, lanes: int, spare: bool) -> tuple[Layout, bool]:
    """How a token's experts lie on the lanes; and whether the quick search can take them. `spare`: see `by_bits`."""
    n_group, size = rule.groups
    layout = Layout(max(lanes, next_power_of_2(n_group)), n_group, size)  # a lane holds one group at most
    picks = rule.top_k + (not spare)
    return layout, picks <= layout.size * (rule.topk_group if rule.grouped else 1)


def by_bits(rule: Rule, has_bias: bool, itemsize: int) -> bool:
    """Whether keys have bits to spare: 16 bits leave 13 bits of a float32 zero, and a place fits in."""
    return rule.by_logit(has_bias) and itemsize == 2


def quick_choice(
    xs: list[jax.Array],
    biases: list[jax.Array] | None,
    first: jax.Array | None,
    *,
    rule: Rule,
    layout: Layout,
    possible: bool,
    spare: bool,
    slots: int,
    assembly: bool,
) -> Found:
    """The chosen experts of one token by scores good to 17 bits, and whether these are enough to tell.

    xs, biases: [lanes] for each column of the layout; first: the bias of expert 0; spare: as `by_bits` says. Where keys
    are `on_scale`, `offsets` of the biases come in their place.
    """
    softmax, by_logit = rule.scoring_func == "softmax", rule.by_logit(biases is not None)
    picks = rule.top_k + (not spare)
    row_max = row_sum = jnp.zeros((1,), jnp.float32)
    if softmax and not (by_logit and rule.renormalize):
        low = layout.mask(xs, -jnp.inf)
        row_max = decode(jnp.max(encode(functools.reduce(jnp.maximum, low))))[None]
        exps = [quick_exp(x - row_max) for x in low]
        row_sum = jnp.sum(functools.reduce(jnp.add, exps), keepdims=True)
    if not possible:
        return Found(jnp.zeros((slots,), jnp.int32), None, None, row_max, row_sum)

    margin: Any = None if spare else 0 if by_logit else MARGIN if biases is None else SUM_MARGIN
    least = -INFINITY if by_logit else LEAST
    most, summed, scale = INFINITY if biases is None else MOST, None, on_scale(rule, biases is not None)
    if by_logit:
        keys = _keys_of_logits(xs, spare)
    elif biases is not None and first is not None and scale:
        shift = max(8, (layout.lanes * next_power_of_2(layout.columns) - 1).bit_length())
        keys = _keys_on_scale(xs, biases, shift, assembly)
        large = jnp.abs(first)
        whole = float_bits(48.0 * large + 2.0**23) - 0x4B000000  # an integer in a float's mantissa
        margin = whole + (24 * (SCALE_ERROR if assembly else SCALE_ERROR + 6) + (1 << shift))
        least, most = SCALE_LEAST, SCALE_MOST
    else:
        if softmax:
            scores = [e * quick_reciprocal(row_sum) for e in exps]
        else:
            scores = [quick_score(x, rule.scoring_func) for x in xs]
        if biases is None or first is None:
            keys = [float_bits(s) for s in scores]
        else:
            # A common term decides nothing, so biases count from expert 0: what is ahead of expert 0 is positive then,
            # as `least` asks, and a large bias takes no bits from the scores.
            keys = [float_bits(s + (b - first)) for s, b in zip(scores, biases, strict=True)]
            if softmax:
                largest = quick_reciprocal(row_sum)[0]  # score that there can be
            else:
                largest = decode(jnp.max(float_bits(functools.reduce(jnp.maximum, scores))))
            summed = 0.25 * jnp.abs(first) + SCORE_ERROR[rule.scoring_func] * largest
    place, sure, members_sure = quick_top_k(
        layout.mask(keys, EXCLUDED),
        rule.top_k,
        slots,
        groups=rule.on_lanes(layout) if rule.grouped else None,
        depth=layout.depth(picks, rule.topk_group if rule.grouped else 1),
        margin=margin,
        least=least,
        most=most,
        summed=summed,
        on_scale=scale,
    )
    if scale:
        sure, members_sure = sure & (large < SCALE_BIAS), members_sure & (large < SCALE_BIAS)
    return Found(place, sure, None if spare else members_sure, row_max, row_sum)
