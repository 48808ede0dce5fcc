"""Routing: biased grouped top-k, from logits to weights and expert ids in one launch.

A warp handles a token: nothing depends on how many there are. Many share programs, two or four of them, since a GPU
begins programs (1.6 a nanosecond, an H100) more slowly than it routes. A token's experts lie on the lanes, and what
is done for all of them is counted in instructions: that is what this kernel's time is made of. So scores are only good
enough to find the order of choices that are clearly apart, and the search that orders them says where they were not
(`select.quick_top_k`). Where only the order of the chosen is in doubt, they alone are compared again, by scores to the
last bits; otherwise, as with a NaN or an infinity, the token is done again by `_exact_choice`. Either way the order is
that of scores to the last bits. `python -m benchmarks.instructions` says how often. The weights are computed from the
chosen logits, loaded again by id: k of them instead of E.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load_masked, next_power_of_2, store
from kernels_pallas.layout import Layout, Load, LoadRows, load_flat
from kernels_pallas.score import (
    EXCLUDED,
    INFINITY,
    NAN_KEY,
    decode,
    encode,
    float_bits,
    plus_zero,
    quick_exp,
    quick_reciprocal,
    quick_score,
    score,
    unscaled_weights,
)
from kernels_pallas.select import (
    RANGE,
    UNKNOWN,
    Groups,
    in_order,
    keep_groups,
    quick_top_k,
    top_k,
)

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
SCORE_ERROR = {"sigmoid": 2.5, "sqrtsoftplus": 3.0, "softmax": 6.0}


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

    @property
    def grouped(self) -> bool:
        """Whether some group is dropped; if not, there might as well be one."""
        return self.n_group > self.topk_group

    @property
    def groups(self) -> tuple[int, int]:
        """(how many, how large)."""
        count = self.n_group if self.grouped else 1
        return count, self.num_experts // count

    @property
    def top2(self) -> bool:
        return self.grouped and self.group_score == "top2" and self.groups[1] > 1

    def on_lanes(self, layout: Layout) -> Groups:
        """The groups as they lie there."""
        return Groups(layout.runs, self.n_group, self.topk_group, self.top2)

    def by_logit(self, has_bias: bool) -> bool:
        """Whether logits are the choices.

        Softmax keeps their order, so without a bias they are: finer than scores in float32, which round different
        logits to one score, and no exp for E experts. The sum of two needs the scores themselves.
        """
        return self.scoring_func == "softmax" and not has_bias and not (self.grouped and self.group_score == "top2")


@dataclass(frozen=True)
class Config:
    rows: int  # tokens of a program, each a warp's
    lanes: int  # of a warp


FEW = 1024  # tokens


def config_for(num_tokens: int, num_experts: int, target: str) -> Config:
    """How to share out tokens on this target ("cuda" or "rocm").

    Few tokens begin at once all the same, and do best without company: one that is not sure holds up the others. So it
    is where a token takes long.
    """
    rows = 1 if num_tokens <= FEW or num_experts > 512 else 2 if num_experts <= 384 else 4  # measured on an H100
    return Config(rows, lanes=64 if target == "rocm" else 32)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return load_masked(ref, mask).astype(jnp.float32)


def _keys_of_logits(xs: list[jax.Array], spare: bool) -> list[jax.Array]:
    """Keys of logits; a lane that has a NaN or an infinity says that the quick search cannot answer."""
    xs = [x * -0.0 + x for x in xs]  # -0.0 becomes 0.0 (XLA would drop a sum with 0), an infinity NaN
    flipped = 0x7FFFE000 if spare else 0x7FFFFFFF  # the low bits of keys from 16 bits stay 0
    keys = [bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.int32(31)) & flipped) for bits in map(float_bits, xs)]
    total = functools.reduce(jnp.add, xs)
    return [jnp.where(total != total, UNKNOWN, keys[0]), *keys[1:]]


def _choices(x: jax.Array, bias: jax.Array | None, rule: Rule, row_max: jax.Array, row_sum: jax.Array) -> jax.Array:
    """The choices of logits as keys, to the last bits."""
    if rule.by_logit(bias is not None):
        return encode(plus_zero(x))
    softmax = rule.scoring_func == "softmax"
    choice = jnp.exp(x - row_max) / row_sum if softmax else score(x, rule.scoring_func)
    return encode(choice if bias is None else choice + bias)


def _exact_choice(
    xs: list[jax.Array],
    biases: list[jax.Array] | None,
    row_max: jax.Array,
    row_sum: jax.Array,
    *,
    rule: Rule,
    layout: Layout,
    slots: int,
) -> tuple[jax.Array, jax.Array]:
    """(ids [slots], row_sum, made NaN where softmax of the row is) of one token, whatever its logits.

    xs, biases: as for `quick_choice`.
    """
    by_logit = rule.by_logit(biases is not None)
    if by_logit:
        # softmax of a row with a NaN or +inf, or of nothing but -inf, is NaN throughout
        seen = layout.mask([jnp.where(x != x, jnp.inf, x) for x in xs], -jnp.inf)
        largest = jnp.max(functools.reduce(jnp.maximum, seen))
        row_sum = row_sum + jnp.where(jnp.abs(largest) == jnp.inf, jnp.float32(jnp.nan), jnp.float32(0.0))
    of_bias: Iterable[jax.Array | None] = itertools.repeat(None) if biases is None else biases
    keys = [_choices(x, b, rule, row_max, row_sum) for x, b in zip(xs, of_bias, strict=False)]
    if by_logit:
        keys = [jnp.where(row_sum != row_sum, NAN_KEY, key) for key in keys]
    keys = layout.mask(keys, EXCLUDED)
    if rule.grouped:
        keys = keep_groups(keys, rule.on_lanes(layout))
    return layout.expert(top_k(keys, rule.top_k, slots)), row_sum


class Found(NamedTuple):
    """What the quick search says of a token."""

    ids: jax.Array  # [slots]
    sure: jax.Array | None  # ids are those of the chosen experts, in order; None: no search was possible
    members_sure: jax.Array | None  # they are, in some order; None where it would be `sure`
    row_max: jax.Array  # [1]; this and row_sum [1] are what softmax's weights need of the row
    row_sum: jax.Array


def layout_for(rule: Rule, config: Config, spare: bool) -> tuple[Layout, bool]:
    """How a token's experts lie on the lanes; and whether the quick search can take them. `spare`: see `by_bits`."""
    n_group, size = rule.groups
    layout = Layout(max(config.lanes, next_power_of_2(n_group)), n_group, size)  # a lane holds one group at most
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
) -> Found:
    """The chosen experts of one token by scores good to 17 bits, and whether these are enough to tell.

    xs, biases: [lanes] for each column of the layout; first: the bias of expert 0; spare: as `by_bits` says.
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

    summed: jax.Array | None = None
    if by_logit:
        keys = _keys_of_logits(xs, spare)
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
            largest: Any = 1.0  # score that there can be
            if softmax:
                largest = quick_reciprocal(row_sum)[0]
            elif rule.scoring_func != "sigmoid":
                largest = decode(jnp.max(float_bits(functools.reduce(jnp.maximum, scores))))
            summed = 0.25 * jnp.abs(first) + SCORE_ERROR[rule.scoring_func] * largest
    place, sure, members_sure = quick_top_k(
        layout.mask(keys, EXCLUDED),
        rule.top_k,
        slots,
        groups=rule.on_lanes(layout) if rule.grouped else None,
        depth=layout.depth(picks, rule.topk_group if rule.grouped else 1),
        margin=None if spare else 0 if by_logit else MARGIN if biases is None else SUM_MARGIN,
        least=-INFINITY if by_logit else LEAST,
        most=INFINITY if summed is None else MOST,
        summed=summed,
    )
    return Found(layout.expert(place), sure, None if spare else members_sure, row_max, row_sum)


def _all(values: jax.Array) -> jax.Array:
    return jnp.min(values.astype(jnp.int32)) > 0


def _choice(
    load_logits: LoadRows,
    load_bias: Load | None,
    itemsizes: tuple[int, int],
    rule: Rule,
    config: Config,
    slots: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [rows, slots], row_max [rows, 1], row_sum [rows, 1]): the experts, and what softmax's weights need besides.

    itemsizes: the bytes of a logit and of a bias.
    """
    rows = config.rows
    spare = by_bits(rule, load_bias is not None, itemsizes[0])
    layout, possible = layout_for(rule, config, spare)

    def load() -> tuple[list[jax.Array], list[jax.Array] | None]:
        xs = layout.load(load_logits, itemsizes[0], rows)
        return xs, load_bias and layout.load(lambda row, *at: load_bias(*at), itemsizes[1], rows)

    first = load_bias and load_bias(jnp.int32(0), None)
    search = functools.partial(quick_choice, rule=rule, layout=layout, possible=possible, spare=spare, slots=slots)
    found = jax.vmap(search, in_axes=(0, 0, None))(*load(), first)
    ids, sure, members_sure, row_max, row_sum = found

    def exact() -> tuple[jax.Array, jax.Array]:
        choose = functools.partial(_exact_choice, rule=rule, layout=layout, slots=slots)
        return jax.vmap(choose)(*load(), row_max, row_sum)  # loaded again: nothing is kept for what is rare

    def again() -> tuple[jax.Array, jax.Array]:
        is_pick = iota((rows, slots), 1) < rule.top_k
        load_picks = lambda load_at: load_flat(load_at, iota(ids.shape, 0), ids, is_pick)
        bias = None if load_bias is None else load_picks(lambda row, *args: load_bias(*args))
        key = _choices(load_picks(load_logits), bias, rule, row_max, row_sum)
        return jax.vmap(functools.partial(in_order, k=rule.top_k))(ids, key), row_sum

    def otherwise() -> tuple[jax.Array, jax.Array]:
        return exact() if members_sure is None else jax.lax.cond(_all(members_sure), again, exact)

    ids, row_sum = exact() if sure is None else jax.lax.cond(_all(sure), lambda: (ids, row_sum), otherwise)
    return ids, row_max, row_sum


def _route_kernel(
    *refs: Any,
    rule: Rule,
    config: Config,
    column: int,
    has_bias: bool,
    has_valid: bool,
    aliased: int,
    num_tokens: Any,
    num_valid_tokens: Any = None,
) -> None:
    refs_in = iter(refs)
    logits_ref = next(refs_in)
    bias_ref = next(refs_in) if has_bias else None
    valid_ref = next(refs_in) if has_valid else None
    for _ in range(aliased):
        next(refs_in)
    weights_ref, experts_ref, *load_ref = refs_in

    rows, slots = config.rows, next_power_of_2(rule.num_slots)
    if rows > 1:  # fewer than there are lanes, Triton would lay across rows
        slots = max(slots, config.lanes)
    program = pl.program_id(0)
    first = program * rows

    load_bias: Load | None = None
    itemsizes = (logits_ref.dtype.itemsize, 0)
    if bias_ref is not None:
        load_bias = lambda expert, mask: _load(bias_ref.at[expert], mask)
        itemsizes = (itemsizes[0], bias_ref.dtype.itemsize)
    if valid_ref is not None:
        num_valid_tokens = valid_ref[0]

    def load_logits(row: jax.Array, expert: jax.Array, mask: jax.Array | None) -> jax.Array:
        token = jnp.minimum(first + row, num_tokens - 1)  # those past the end read the last one, and write nothing
        return _load(logits_ref.at[jnp.broadcast_to(token, expert.shape), column + expert], mask)

    ids, row_max, row_sum = _choice(load_logits, load_bias, itemsizes, rule, config, slots)
    slot, row = iota((rows, slots), 1), iota((rows, slots), 0)
    token = first + row
    routed = slot < rule.top_k
    weights = rule.scale * unscaled_weights(
        load_flat(load_logits, row, ids, routed),
        routed,
        scoring_func=rule.scoring_func,
        renormalize=rule.renormalize,
        row_max=row_max,
        row_sum=row_sum,
    )
    if rule.n_shared:
        shared = rule.num_experts + (slot - rule.top_k) * rule.replicas + token % rule.replicas
        ids = jnp.where(routed, ids, shared)
        weights = jnp.where(routed, weights, rule.shared_weight)
    if num_valid_tokens is not None:
        is_valid = token < num_valid_tokens
        ids, weights = jnp.where(is_valid, ids, -1), jnp.where(is_valid, weights, 0.0)
    written = (slot < rule.num_slots) & (token < num_tokens)
    store(weights_ref.at[token, slot], weights, mask=written)
    store(experts_ref.at[token, slot], ids, mask=written)

    if load_ref:  # cleared here for the launch that counts
        ids_padded = next_power_of_2(rule.num_ids)
        index = iota((ids_padded,), 0)
        clear = (index < rule.num_ids) & (program == 0)
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
        config = config_for(num_tokens, rule.num_experts, target)
    valid = None if isinstance(num_valid_tokens, int) else num_valid_tokens
    args = [logits, *([] if bias is None else [bias]), *([] if valid is None else [valid])]
    out = out or ()
    shape = (num_tokens, rule.num_slots)
    out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)]
    if clear_load:
        out_shape.append(jax.ShapeDtypeStruct((rule.num_ids,), jnp.int32))
    sizes = {"num_tokens": num_tokens}
    if isinstance(num_valid_tokens, int):
        sizes["num_valid_tokens"] = num_valid_tokens
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
        grid=(pl.cdiv(num_tokens, config.rows),),
        sizes=sizes,
        out_shape=out_shape,
        num_warps=config.rows,
        aliases={len(args) + i: i for i in range(len(out))},
        interpret=interpret,
    )
