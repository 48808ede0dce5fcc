"""Every operation in plain jnp, as the formulas read: what "xla" runs, and what tests and benchmarks compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.plan_dispatch import num_rows
from kernels_pallas.route_grad import log_score_slope
from kernels_pallas.rule import Rule


def scores(x: jax.Array, scoring_func: str) -> jax.Array:
    """float32 scores of logits [T, E]."""
    if scoring_func == "sigmoid":
        return jax.nn.sigmoid(x)
    if scoring_func == "softmax":
        return jax.nn.softmax(x, axis=1)
    # sqrt(log(1 + exp(x))); far below zero exp(x) is too small for float32 long before its root is.
    return jnp.where(x < -30.0, jnp.exp(0.5 * x), jnp.sqrt(jax.nn.softplus(x)))


def _ranking(values: jax.Array) -> jax.Array:
    """Indices along the last axis from the largest value to the smallest; NaN last; a tie to the lower index."""
    is_nan = jnp.isnan(values)
    # Not NaN -> -inf: a NaN ranks below -inf. Nor argsort(-values): XLA would order -0.0 before 0.0.
    order = jnp.argsort(jnp.where(is_nan | (values == 0), 0.0, -values), axis=-1, stable=True)
    nan_last = jnp.argsort(jnp.take_along_axis(is_nan, order, axis=-1), axis=-1, stable=True)
    return jnp.take_along_axis(order, nan_last, axis=-1)


def _chosen(x: jax.Array, bias: jax.Array | None, rule: Rule) -> jax.Array:
    """ids int32 [T, k] for float32 logits x [T, E]."""
    num_tokens = x.shape[0]
    score = scores(x, rule.scoring_func)
    grouped = rule.n_group > rule.topk_group
    if bias is not None:
        choice = score + bias.astype(jnp.float32)[None]
    elif rule.scoring_func == "softmax" and not (grouped and rule.group_score == "top2"):
        choice = jnp.where(jnp.isnan(score), score, x)  # the same order, without the ties that rounding makes
    else:
        choice = score
    out_of_reach = jnp.zeros(choice.shape, bool)
    if grouped:
        size = rule.num_experts // rule.n_group
        by_group = choice.reshape(num_tokens, rule.n_group, size)
        best = jnp.take_along_axis(by_group, _ranking(by_group)[:, :, : 2 if rule.group_score == "top2" else 1], axis=2)
        kept = _ranking(jnp.sum(best, axis=2))[:, : rule.topk_group]
        is_kept = jnp.any(kept[:, :, None] == jnp.arange(rule.n_group)[None, None], axis=1)
        out_of_reach = ~jnp.repeat(is_kept, size, axis=1)
    order = _ranking(choice)
    reach_first = jnp.argsort(jnp.take_along_axis(out_of_reach, order, axis=1), axis=1, stable=True)
    return jnp.take_along_axis(order, reach_first, axis=1)[:, : rule.top_k].astype(jnp.int32)


def route_weights(x: jax.Array, ids: jax.Array, rule: Rule) -> jax.Array:
    """float32 weights [T, k] of the chosen ids, for float32 logits x [T, E], before the scaling factor.

    Renormalised weights are ratios: dividing every score by the exponential part of the token's largest changes nothing
    in exact arithmetic, and leaves nothing to underflow to 0/0.
    """
    score = jnp.take_along_axis(scores(x, rule.scoring_func), ids, axis=1)
    if not rule.renormalize:
        return score
    z = jnp.take_along_axis(x, ids, axis=1)
    low = z if rule.scoring_func == "softmax" else jnp.where(jnp.isnan(z), z, jnp.minimum(z, 0.0))
    top = jnp.max(low, axis=1, keepdims=True)
    shift = jnp.where(low == top, 0.0, low - top)  # the test spares inf - inf
    if rule.scoring_func == "softmax":
        ratio = jnp.where(jnp.isnan(score), jnp.nan, jnp.exp(shift))
    elif rule.scoring_func == "sigmoid":
        ratio = jnp.exp(shift) / (1.0 + jnp.exp(-jnp.abs(z)))
    else:
        ratio = jnp.exp(0.5 * shift) * jnp.where(z < -30.0, 1.0, score / jnp.exp(0.5 * low))
    return ratio / jnp.sum(ratio, axis=1, keepdims=True)


def route_grad(x: jax.Array, experts: jax.Array, grad: jax.Array, rule: Rule) -> jax.Array:
    """The gradient [T, E] of logits x, in their dtype, from experts [T, S] and grad [T, S] of the weights.

    With w the unscaled weights and g the gradient of the scaled ones times the scale:
    d logit[chosen j] = (g_j - [renormalised] sum_i g_i w_i) * w_j * (log score)'(logit_j).
    """
    logits = x.astype(jnp.float32)
    ids = jnp.maximum(experts[:, : rule.top_k], 0)
    is_routed = experts[:, : rule.top_k] >= 0
    weights = jnp.where(is_routed, route_weights(logits, ids, rule), 0.0)
    g = jnp.where(is_routed, rule.scale * grad[:, : rule.top_k], 0.0)
    mean = jnp.sum(g * weights, axis=1, keepdims=True)
    z = jnp.take_along_axis(logits, ids, axis=1)
    slope = (g - mean if rule.renormalize else g) * weights * log_score_slope(z, rule.scoring_func)
    total = jnp.zeros(logits.shape, jnp.float32)
    if rule.scoring_func == "softmax" and not rule.renormalize:
        total = total - scores(logits, "softmax") * mean
    token = jnp.arange(logits.shape[0])[:, None]
    total = total.at[token, ids].add(jnp.where(is_routed, slope, 0.0))
    return jnp.where(jnp.any(is_routed, axis=1, keepdims=True), total, 0.0).astype(x.dtype)


def route(
    logits: jax.Array, bias: jax.Array | None, num_valid_tokens: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [T, S], experts int32 [T, S])."""
    x = logits.astype(jnp.float32)
    token = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    ids = _chosen(x, bias, rule)
    weights = rule.scale * route_weights(x, ids, rule)
    if rule.n_shared:
        shared = rule.num_experts + jnp.arange(rule.n_shared, dtype=jnp.int32) * rule.replicas + token % rule.replicas
        ids = jnp.concatenate([ids, shared], axis=1)
        weights = jnp.concatenate([weights, jnp.full(shared.shape, rule.shared_weight, jnp.float32)], axis=1)
    if num_valid_tokens is not None:
        is_valid = token < num_valid_tokens
        ids, weights = jnp.where(is_valid, ids, -1), jnp.where(is_valid, weights, 0.0)
    return weights, ids


def load(experts: jax.Array, num_ids: int) -> jax.Array:
    """int32 [num_ids]: how often each id was chosen; -1 is not counted."""
    return jnp.bincount(jnp.where(experts < 0, num_ids, experts).reshape(-1), length=num_ids + 1)[:-1].astype(jnp.int32)


def router_logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 [T, E]."""
    dtype = x.dtype if x.dtype == weight.dtype else jnp.float32
    return jax.lax.dot_general(
        x.astype(dtype),
        weight.astype(dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def router_logits_grad(grad: jax.Array, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(grad @ weight, grad.T @ x) in the dtypes of x [T, H] and weight [E, H]; grad float32 [T, E]."""
    _, pull = jax.vjp(router_logits, x, weight)
    return pull(grad)


def plan_dispatch(
    experts: jax.Array, expert_map: jax.Array | None, *, num_experts: int, align: int, max_rows: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows int32 [T, S], slots int32 [M], group_sizes int32 [num_experts])."""
    num_items = experts.size
    total = num_rows(num_items, num_experts, align, max_rows)
    ids = experts.reshape(-1)
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.size)
        ids = jnp.where(known, expert_map[jnp.clip(ids, 0, expert_map.size - 1)], -1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = jnp.bincount(ids, length=num_experts + 1).astype(jnp.int32)[:-1]
    sizes = (counts + align - 1) // align * align
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    sorted_ids = ids[order]
    first_sorted = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    first_row = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
    row = first_row[sorted_ids] + jnp.arange(num_items, dtype=jnp.int32) - first_sorted[sorted_ids]
    row = jnp.where((sorted_ids < num_experts) & (row < total), row, -1)
    rows = jnp.zeros(num_items, jnp.int32).at[order].set(row)
    slots = jnp.full(total, -1, jnp.int32).at[jnp.where(row < 0, total, row)].set(order, mode="drop")
    return rows.reshape(experts.shape), slots, jnp.diff(jnp.minimum(first_row, total))


def dispatch(
    x: jax.Array, rows: jax.Array, slots: jax.Array, scale: jax.Array | None = None, dtype: Any = None
) -> jax.Array:
    """[M, H]."""
    value = x[jnp.maximum(slots, 0) // rows.shape[1]]
    if scale is not None:
        value = value.astype(jnp.float32) * scale.reshape(-1)[jnp.maximum(slots, 0)][:, None].astype(jnp.float32)
    return jnp.where((slots >= 0)[:, None], value, 0).astype(dtype or x.dtype)


def combine(x: jax.Array, rows: jax.Array, weights: jax.Array | None, dtype: Any = None) -> jax.Array:
    """[T, H]."""
    total = jnp.zeros((rows.shape[0], x.shape[1]), jnp.float32)
    for j in range(rows.shape[1]):
        goes = (rows[:, j] >= 0)[:, None]
        value = x[jnp.maximum(rows[:, j], 0)].astype(jnp.float32)
        if weights is not None:
            value = value * jnp.where(goes, weights[:, j : j + 1].astype(jnp.float32), 0.0)
        total = total + jnp.where(goes, value, 0.0)
    return total.astype(dtype or x.dtype)


def combine_weight_grad(x: jax.Array, dy: jax.Array, rows: jax.Array) -> jax.Array:
    """float32 [T, S]."""
    dots = [
        jnp.sum(x[jnp.maximum(rows[:, j], 0)].astype(jnp.float32) * dy.astype(jnp.float32), axis=1)
        for j in range(rows.shape[1])
    ]
    return jnp.where(rows >= 0, jnp.stack(dots, axis=1), 0.0)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged_dot(a: jax.Array, b: jax.Array, group_sizes: jax.Array, sides: tuple[int, int], grouped: bool) -> jax.Array:
    """float32: a, cut into groups along axis 0, times b over the axes `sides`; b has an axis 0 of groups or none."""
    dot = functools.partial(
        jax.lax.ragged_dot_general,
        ragged_dot_dimension_numbers=jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((sides[0],), (sides[1],)), ((), ())),
            lhs_ragged_dimensions=(0,),
            rhs_group_dimensions=(0,) if grouped else (),
        ),
        # By default a GPU multiplies float32 with 10 bits of mantissa.
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return jax.custom_batching.sequential_vmap(dot)(a, b, group_sizes)  # jax batches it only where all is batched


def _ragged_dot_fwd(a: jax.Array, b: jax.Array, group_sizes: jax.Array, *static: Any) -> tuple[jax.Array, Any]:
    return _ragged_dot(a, b, group_sizes, *static), (a, b, group_sizes)


def _ragged_dot_bwd(sides: tuple[int, int], grouped: bool, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    """Products again, for second derivatives: jax has none of what `sequential_vmap` makes."""
    a, b, group_sizes = saved
    if grouped:  # grad [M, N], of weights b
        transposed = sides[1] == 2
        da = _product(grad, b.astype(jnp.float32), group_sizes, not transposed)
        pair = (grad, a) if transposed else (a, grad)
        db = _ragged_dot(*(x.astype(jnp.float32) for x in pair), group_sizes, (0, 0), False)
    else:  # grad [E, A, B]
        da = _product(b.astype(jnp.float32), grad, group_sizes, True)
        db = _product(a.astype(jnp.float32), grad, group_sizes, False)
    return da.astype(a.dtype), db.astype(b.dtype), np.zeros(group_sizes.shape, jax.dtypes.float0)


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)


def _product(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """float32 [M, N]."""
    out = _ragged_dot(rows, weight, group_sizes, (1, 2 if transposed else 1), True)
    # Past the last group ragged_dot leaves zeros on some backends and anything on others.
    used = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(used[:, None], out, 0.0)


def grouped_matmul(rows: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """[M, N]."""
    return _product(rows, weight, group_sizes, transposed).astype(rows.dtype)


def gated_matmul(
    rows: jax.Array, gate_up: jax.Array, group_sizes: jax.Array, *, activation: str, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """([M, I], gate and up [M, 2 * I])."""
    kept = _product(rows, gate_up, group_sizes, transposed)
    gate, up = jnp.split(kept, 2, axis=1)
    return (ACTIVATIONS[activation](gate) * up).astype(rows.dtype), kept.astype(rows.dtype)


def gated_grad(kept: jax.Array, grad: jax.Array, scale: jax.Array | None, *, activation: str) -> tuple[jax.Array, ...]:
    """(gradient of gate and up [M, 2 * I], hidden [M, I]), with a scale [M] also hidden . grad, not scaled, [M]."""
    gate, up = jnp.split(kept.astype(jnp.float32), 2, axis=1)
    hidden, pull = jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, gate, up)
    wide = grad.astype(jnp.float32)
    dots = () if scale is None else (jnp.sum(hidden * wide, axis=1),)
    if scale is not None:
        hidden, wide = scale[:, None] * hidden, scale[:, None] * wide
    return jnp.concatenate(pull(wide), axis=1).astype(kept.dtype), hidden.astype(kept.dtype), *dots


def grouped_outer(a: jax.Array, b: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[E, A, B]."""
    return _ragged_dot(a, b, group_sizes, (0, 0), False).astype(a.dtype)
