"""Routing: biased grouped top-k, from logits to weights and expert ids in one launch.

One warp handles a token. Its choices lie in a tile [1, groups, experts of a group] whose sides are padded to powers of
two, as order-preserving int32 keys; what is padding, or lies in a group that was dropped, has the lowest key. The
weights are computed from the chosen logits, loaded again by id: k of them instead of E.

A program is one token: nothing depends on how many there are. (A tile of several rows would be as easy to write, but
torch's triton 3.6 miscompiles its reshape from [rows, groups, size] to [rows, experts].)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, next_power_of_2, store
from kernels_pallas.score import EXCLUDED, NAN_KEY, encode, plus_zero, score, unscaled_weights
from kernels_pallas.select import keep_groups, top_k


@dataclass(frozen=True)
class Rule:
    """What is routed how; the meaning of each field is that of jaxmoe.RoutingConfig."""

    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    scoring_func: str
    group_score: str
    renormalize: bool
    scale: float  # of the routed weights
    n_shared: int
    replicas: int
    shared_weight: float

    @property
    def num_slots(self) -> int:
        return self.top_k + self.n_shared

    @property
    def num_ids(self) -> int:
        return self.num_experts + self.n_shared * self.replicas


@dataclass(frozen=True)
class Config:
    num_warps: int
    lanes: int  # of a warp


def config_for(rule: Rule, target: str) -> Config:
    """How to share out a token's experts on this target ("cuda" or "rocm")."""
    del rule
    return Config(num_warps=1, lanes=64 if target == "rocm" else 32)


def _route_kernel(
    *refs: Any,
    rule: Rule,
    config: Config,
    column: int,
    has_bias: bool,
    has_valid: bool,
    aliased: int,
    num_valid_tokens: Any = None,
) -> None:
    refs_in = iter(refs)
    logits_ref = next(refs_in)
    bias_ref = next(refs_in) if has_bias else None
    valid_ref = next(refs_in) if has_valid else None
    for _ in range(aliased):
        next(refs_in)
    weights_ref, experts_ref, *load_ref = refs_in

    row = pl.program_id(0)
    k, softmax = rule.top_k, rule.scoring_func == "softmax"
    grouped = rule.n_group > rule.topk_group
    n_group = rule.n_group if grouped else 1
    size = rule.num_experts // n_group
    groups, padded = next_power_of_2(n_group), next_power_of_2(size)
    # Softmax keeps the order of the logits, so without a bias they are the choice: finer than scores in float32, which
    # round different logits to one score, and no exp for E experts. The sum of two needs the scores themselves.
    by_logit = softmax and bias_ref is None and not (grouped and rule.group_score == "top2")

    tile, flat = (1, groups, padded), (1, groups * padded)
    expert = iota(tile, 1) * size + iota(tile, 2)
    is_expert = (iota(tile, 1) < n_group) & (iota(tile, 2) < size)
    x = load(logits_ref.at[row, column + expert], mask=is_expert, other=0.0).astype(jnp.float32)

    row_max = row_sum = jnp.zeros((1, 1), jnp.float32)
    choice = x
    if softmax and not (by_logit and rule.renormalize):
        low = jnp.where(is_expert, x, -jnp.inf).reshape(flat)
        row_max = jnp.max(low, axis=1, keepdims=True)
        exp = jnp.where(is_expert.reshape(flat), jnp.exp(low - row_max), 0.0)
        row_sum = jnp.sum(exp, axis=1, keepdims=True)
        choice = (exp / row_sum).reshape(tile)
    if by_logit:
        key = encode(plus_zero(x))
        # softmax of a row with a NaN or +inf, or of nothing but -inf, is NaN throughout
        seen = jnp.where(is_expert, jnp.where(x != x, jnp.inf, x), -jnp.inf).reshape(flat)
        row_sum += jnp.where(jnp.abs(jnp.max(seen, axis=1, keepdims=True)) == jnp.inf, jnp.nan, 0.0)
        key = jnp.where((row_sum != row_sum)[:, :, None], NAN_KEY, key)
    else:
        if not softmax:
            choice = score(x, rule.scoring_func)
        if bias_ref is not None:
            choice = choice + load(bias_ref.at[expert], mask=is_expert, other=0.0).astype(jnp.float32)
        key = encode(choice)
    key = jnp.where(is_expert, key, EXCLUDED)
    if grouped:
        key = keep_groups(key, n_group, rule.topk_group, top2=rule.group_score == "top2" and size > 1)

    slots = next_power_of_2(rule.num_slots)
    spare_bits = 13 if by_logit and logits_ref.dtype != jnp.float32 else 0  # float16 leaves 13 bits of a float32 alone
    ids = top_k(key.reshape(flat), k, slots, lanes=config.lanes, spare_bits=spare_bits)
    if size != padded:  # position in the padded tile -> expert
        ids = (ids // padded) * size + ids % padded

    slot = iota((1, slots), 1)
    chosen = load(logits_ref.at[row, column + ids], mask=slot < k, other=0.0).astype(jnp.float32)
    weights = rule.scale * unscaled_weights(
        chosen, slot < k, scoring_func=rule.scoring_func, renormalize=rule.renormalize, row_max=row_max, row_sum=row_sum
    )
    if rule.n_shared:
        shared = rule.num_experts + (slot - k) * rule.replicas + row % rule.replicas
        ids = jnp.where(slot < k, ids, shared)
        weights = jnp.where(slot < k, weights, rule.shared_weight)
    if valid_ref is not None:
        num_valid_tokens = valid_ref[0]
    if num_valid_tokens is not None:
        is_valid = row < num_valid_tokens
        ids, weights = jnp.where(is_valid, ids, -1), jnp.where(is_valid, weights, 0.0)
    written = slot < rule.num_slots
    store(weights_ref.at[row, slot], weights, mask=written)
    store(experts_ref.at[row, slot], ids, mask=written)

    if load_ref:  # cleared here for the launch that counts
        ids_padded = next_power_of_2(rule.num_ids)
        index = iota((ids_padded,), 0)
        clear = (index < rule.num_ids) & (row == 0)
        store(load_ref[0].at[index], jnp.zeros((ids_padded,), jnp.int32), mask=clear)


def route(
    logits: jax.Array,
    bias: jax.Array | None,
    num_valid_tokens: jax.Array | int | None,
    *,
    rule: Rule,
    column: int = 0,
    clear_load: bool = False,
    out: tuple[jax.Array, ...] | None = None,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """(weights float32 [T, S], experts int32 [T, S]) and, with `clear_load`, a zeroed load int32 [num_ids].

    logits [T, at least column + E]: the experts' logits are its columns from `column` on, so a strided view needs
    no copy. num_valid_tokens: int32 [1], a number, or None. `out`: arrays of the results' shapes, whose buffers the
    results take over.
    """
    num_tokens = logits.shape[0]
    if config is None:
        config = config_for(rule, target)
    valid = None if isinstance(num_valid_tokens, int) else num_valid_tokens
    args = [logits, *([] if bias is None else [bias]), *([] if valid is None else [valid])]
    out = out or ()
    shape = (num_tokens, rule.num_slots)
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)]
    if clear_load:
        out_shape.append(jax.ShapeDtypeStruct((rule.num_ids,), jnp.int32))
    kernel = functools.partial(
        _route_kernel,
        rule=rule,
        config=config,
        column=column,
        has_bias=bias is not None,
        has_valid=valid is not None,
        aliased=len(out),
    )
    return launch(
        kernel,
        *args,
        *out,
        name="route",
        grid=(num_tokens,),
        sizes={"num_valid_tokens": num_valid_tokens} if isinstance(num_valid_tokens, int) else {},
        out_shape=out_shape,
        num_warps=config.num_warps,
        aliases={len(args) + i: i for i in range(len(out))},
        interpret=interpret,
    )
