"""The gradient of routing: from the weights' to the logits'.

The weights are functions of the chosen logits alone, except for softmax that is not renormalised, whose sum runs over
all experts. With w the unscaled weights and g the gradient of the scaled ones times the scale,

    d logit[chosen j] = (g_j - [renormalised] sum_i g_i w_i) * w_j * (log score)'(logit_j)

which divides by nothing that could underflow. Ids, groups and the bias get no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, next_power_of_2, store
from kernels_pallas.rule import Rule
from kernels_pallas.score import log1p_exp, unscaled_weights


def log_score_slope(x: jax.Array, scoring_func: str) -> jax.Array:
    """The derivative of log(score) at logits x; 1 for softmax, whose sum is taken care of elsewhere."""
    if scoring_func == "softmax":
        return jnp.ones_like(x)
    if scoring_func == "sigmoid":
        return 1.0 / (1.0 + jnp.exp(x))
    # sqrt(s), s = log(1 + exp(x)): sigmoid(x) / (2 s), and 1/2 where both have become exp(x)
    softplus = log1p_exp(x)
    return jnp.where(x < -30.0, 0.5, 0.5 / ((1.0 + jnp.exp(-x)) * jnp.where(softplus > 0.0, softplus, 1.0)))


def _kernel(logits_ref: Any, experts_ref: Any, grad_ref: Any, out_ref: Any, *, rule: Rule, column: int) -> None:
    row = pl.program_id(0)
    slots, experts = next_power_of_2(rule.top_k), next_power_of_2(rule.num_experts)
    softmax_all = rule.scoring_func == "softmax" and not rule.renormalize

    expert = iota((1, experts), 1)
    is_expert = expert < rule.num_experts
    row_max = row_sum = jnp.zeros((1, 1), jnp.float32)
    p = jnp.zeros((1, experts), jnp.float32)
    if softmax_all:
        x = load(logits_ref.at[row, column + expert], mask=is_expert, other=-jnp.inf).astype(jnp.float32)
        row_max = jnp.max(x, axis=1, keepdims=True)
        p = jnp.where(is_expert, jnp.exp(x - row_max), 0.0)
        row_sum = jnp.sum(p, axis=1, keepdims=True)
        p = p / row_sum

    slot = iota((1, slots), 1)
    ids = load(experts_ref.at[row, slot], mask=slot < rule.top_k, other=-1)
    routed = ids >= 0  # all of a token's slots, or none where it lies past num_valid_tokens
    chosen = load(logits_ref.at[row, column + jnp.maximum(ids, 0)], mask=routed, other=0.0).astype(jnp.float32)
    weights = unscaled_weights(
        chosen, routed, scoring_func=rule.scoring_func, renormalize=rule.renormalize, row_max=row_max, row_sum=row_sum
    )
    grad = rule.scale * load(grad_ref.at[row, slot], mask=routed, other=0.0).astype(jnp.float32)
    mean = jnp.sum(jnp.where(routed, grad * weights, 0.0), axis=1, keepdims=True)
    if rule.renormalize:
        grad = grad - mean
    slope = grad * weights * log_score_slope(chosen, rule.scoring_func)

    total = -p * mean if softmax_all else jnp.zeros((1, experts), jnp.float32)
    for j in range(rule.top_k):  # ids are distinct: each lands once, without a scatter
        take = slot == j
        at = jnp.sum(jnp.where(take, ids, 0), axis=1, dtype=jnp.int32, keepdims=True)
        value = jnp.sum(jnp.where(take & routed, slope, 0.0), axis=1, keepdims=True)
        total = total + jnp.where(expert == at, value, 0.0)
    any_routed = jnp.sum(routed.astype(jnp.int32), axis=1, dtype=jnp.int32, keepdims=True) > 0
    store(out_ref.at[row, expert], jnp.where(any_routed, total, 0.0).astype(out_ref.dtype), mask=is_expert)


def route_grad(
    logits: jax.Array,
    experts: jax.Array,
    grad: jax.Array,
    *,
    rule: Rule,
    column: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """The gradient [T, E] of the logits, in their dtype, from experts int32 [T, S] and grad [T, S] of the weights."""
    num_tokens = logits.shape[0]
    return launch(
        functools.partial(_kernel, rule=rule, column=column),
        logits,
        experts,
        grad,
        name="route_grad",
        grid=(num_tokens,),
        out_shape=[jax.ShapeDtypeStruct((num_tokens, rule.num_experts), logits.dtype)],
        num_warps=1,
        interpret=interpret,
    )[0]
