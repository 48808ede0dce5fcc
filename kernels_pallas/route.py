"""Routing: biased grouped top-k, from logits to weights and expert ids in one launch.

A warp handles a token, or several: no result depends on how many there are. Many share programs, since a GPU begins
programs (1.6 a nanosecond, an H100) more slowly than it routes. A token's experts lie on the lanes, one token after
another, and the picks of all tokens of a warp together. What is done for all experts is counted in instructions: that
is what this kernel's time is made of. So scores are only good enough to find the order of choices that are clearly
apart, and the search that orders them says where they were not (`quick.quick_choice`). Where only the order of the
chosen is in doubt, they alone are compared again, by scores to the last bits; otherwise, as with a NaN or an infinity,
the token is done again by `_exact_choice`. Either way the order is that of scores to the last bits. `python -m
benchmarks.instructions` says how often. The weights are computed from the chosen logits, loaded again by id: k of them
instead of E.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import divmod_by, iota, launch, load_masked, next_power_of_2, remembered, store
from kernels_pallas.layout import Layout, Load, LoadRows, load_flat
from kernels_pallas.quick import by_bits, layout_for, offsets, on_scale, quick_choice
from kernels_pallas.rule import Rule
from kernels_pallas.score import EXCLUDED, NAN_KEY, encode, plus_zero, score, unscaled_weights
from kernels_pallas.select import by_run, in_order, keep_groups, top_k


@dataclass(frozen=True)
class Config:
    rows: int  # tokens of a program
    warps: int  # among which these are shared out
    lanes: int  # of a warp

    @property
    def together(self) -> int:
        """Tokens of a warp."""
        return self.rows // self.warps

    def slots(self, num_slots: int) -> int:
        """So many of a token lie on the lanes.

        Of fewer Triton would lay each on several lanes, or several on one, and all tiles before them in that way, too.
        """
        return max(next_power_of_2(num_slots), self.lanes // self.together)


FEW = 512  # tokens
# (Experts a lane at most, (from so many tokens on, so many share a warp), ...): measured on an H100 and an H200.
SHARED = (
    (1, ((4096, 8), (2048, 4))),
    (5, ((2048, 4),)),
    (12, ((32768, 4), (8192, 2))),
    (16, ((8192, 2),)),
)


@remembered
def config_for(num_tokens: int, num_experts: int, num_slots: int, target: str) -> Config:
    """How to share out tokens on this target ("cuda" or "rocm").

    Few tokens begin at once all the same, and do best without company: one that is not sure holds up the others. So it
    is where a token takes long. Of many, a warp takes some, so that fewer programs have to begin: they need not wait
    for one another, and their picks share its lanes. Those that take little time do so from fewer tokens on. More than
    eight would gain with 8 experts, but each takes its time to compile.
    """
    lanes = 64 if target == "rocm" else 32
    if num_tokens <= FEW or num_experts > 512:
        return Config(1, 1, lanes)
    steps = next(steps for most, steps in SHARED if num_experts <= most * lanes)
    together = next((together for tokens, together in steps if num_tokens >= tokens), 1)
    together = min(together, lanes // next_power_of_2(num_slots))
    if together > 1 and target == "cuda":
        return Config(together, 1, lanes)
    rows = 2 if num_experts <= 384 else 4
    return Config(rows, rows, lanes)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return load_masked(ref, mask).astype(jnp.float32)


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
    period: int,
) -> tuple[jax.Array, jax.Array]:
    """(places [slots], row_sum, made NaN where softmax of the row is) of one token, whatever its logits.

    xs, biases: as for `quick_choice`. The places come again after `period`.
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
    return top_k(keys, rule.top_k, slots, period=period), row_sum


def _of_each_warp(function: Callable[..., Any], *args: Any) -> Any:
    """`jax.vmap`, but for one warp without its axis: Triton's passes would take nearly twice as long."""
    if jax.tree.leaves(args)[0].shape[0] > 1:
        return jax.vmap(function)(*args)
    alone = jax.tree.map(lambda a: a.reshape(a.shape[1:]), args)
    return jax.tree.map(lambda a: a.reshape(1, *a.shape), function(*alone))


def _all(values: list[jax.Array]) -> jax.Array:
    return jnp.min(functools.reduce(operator.and_, values).astype(jnp.int32)) > 0


def _choice(
    load_logits: LoadRows,
    load_bias: Load | None,
    itemsizes: tuple[int, int],
    rule: Rule,
    config: Config,
    token: jax.Array,
    slot: jax.Array,
    assembly: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(ids, their logits, row_max, row_sum): the experts of each [warps, slots], and what their weights need.

    token, slot [warps, slots]: of a program and of a token, each of which has a period of slots. itemsizes: the bytes
    of a logit and of a bias.
    """
    warps, together = config.warps, config.together
    slots, period = slot.shape[1], slot.shape[1] // together
    spare = by_bits(rule, load_bias is not None, itemsizes[0])
    layout, possible = layout_for(rule, config.lanes, spare)

    def load(which: int | jax.Array) -> list[jax.Array]:
        """A token of every warp."""
        return layout.load(lambda row, *at: load_logits(row * together + which, *at), itemsizes[0], warps)

    def load_biases() -> list[jax.Array] | None:
        return load_bias and layout.load(lambda row, *at: load_bias(*at), itemsizes[1], warps)

    def merged(of_tokens: list[jax.Array]) -> jax.Array:
        """What each slot's token has; of_tokens [warps, slots or 1]."""
        return by_run(of_tokens, token % together)

    first = load_bias and load_bias(jnp.int32(0), None)
    xs, biases = [load(t) for t in range(together)], load_biases()  # logits first: they come from furthest away
    if biases is not None and first is not None and on_scale(rule, True):
        biases = offsets(biases, first, assembly)
    search = functools.partial(
        quick_choice,
        first=first,
        rule=rule,
        layout=layout,
        possible=possible,
        spare=spare,
        slots=slots,
        assembly=assembly,
    )
    found = [_of_each_warp(search, x, biases) for x in xs]
    row_max, row_sum = merged([f.row_max for f in found]), merged([f.row_sum for f in found])

    def at(ids: jax.Array, load: LoadRows) -> jax.Array:
        return load_flat(load, token, ids, slot < rule.top_k)

    sure = [f.sure for f in found if f.sure is not None]
    members_sure = [f.members_sure for f in found if f.members_sure is not None]

    def exact_one(which: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """(places, row_sum) of a token of every warp, from the beginning: no logits are kept for what is rare."""
        row_max, row_sum = (by_run(of, which) for of in zip(*((f.row_max, f.row_sum) for f in found), strict=True))
        choose = functools.partial(_exact_choice, rule=rule, layout=layout, slots=slots, period=period)
        return _of_each_warp(choose, load(which), load_biases(), row_max, row_sum)

    def exact() -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of the tokens that are not sure, one after another: a search for each would take long to compile."""

        def step(which: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            def put() -> tuple[jax.Array, ...]:
                mine = token % together == which
                return tuple(jnp.where(mine, new, old) for new, old in zip(exact_one(which), state, strict=True))

            return jax.lax.cond(_all([by_run(sure, which)]), lambda: state, put) if sure else put()

        if together == 1:
            place, total = exact_one(0)
        else:
            state = merged([f.place for f in found]), jnp.broadcast_to(row_sum, slot.shape)
            place, total = jax.lax.fori_loop(0, together, step, state)
        ids = layout.expert(place)
        return ids, at(ids, load_logits), total

    if not sure:
        ids, x, row_sum = exact()
        return ids, x, row_max, row_sum
    ids = layout.expert(merged([f.place for f in found]))
    x = at(ids, load_logits)  # on its way while the search finds out whether it is sure

    def again() -> tuple[jax.Array, jax.Array, jax.Array]:
        bias = None if load_bias is None else at(ids, lambda row, *args: load_bias(*args))
        key = _choices(x, bias, rule, row_max, row_sum)
        ordered = _of_each_warp(functools.partial(in_order, k=rule.top_k, period=period), ids, key)
        return ordered, at(ordered, load_logits), row_sum

    def otherwise() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jax.lax.cond(_all(members_sure), again, exact) if members_sure else exact()

    ids, x, row_sum = jax.lax.cond(_all(sure), lambda: (ids, x, row_sum), otherwise)
    return ids, x, row_max, row_sum


def _route_kernel(
    *refs: Any,
    rule: Rule,
    config: Config,
    column: int,
    has_bias: bool,
    has_valid: bool,
    aliased: int,
    assembly: bool,
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

    program, period = pl.program_id(0), config.slots(rule.num_slots)
    first = program * config.rows

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

    tile = (config.warps, config.together * period)
    row, slot = iota(tile, 0), iota(tile, 1)
    if config.together > 1:  # else left as it is: where Triton does not see slots next to one another, it moves them
        which, slot = divmod_by(slot, period)
        row = row * config.together + which
    ids, x, row_max, row_sum = _choice(load_logits, load_bias, itemsizes, rule, config, row, slot, assembly)
    token, routed, width = first + row, slot < rule.top_k, next_power_of_2(rule.top_k)
    weigh = functools.partial(unscaled_weights, scoring_func=rule.scoring_func, renormalize=rule.renormalize)
    if config.together == 1:
        weights = weigh(x, routed, row_max=row_max, row_sum=row_sum, width=width)
    else:  # in runs of so many, among which are a token's
        # Were all slots known to count, LLVM would fuse a product with the sum: other bits than with a warp a token.
        counts = routed & (token < num_tokens)
        runs = (jnp.broadcast_to(a, tile).reshape(config.warps, -1, width) for a in (x, counts, row_max, row_sum))
        x, counts, row_max, row_sum = runs
        weights = weigh(x, counts, row_max=row_max, row_sum=row_sum).reshape(tile)
    weights = rule.scale * weights
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

    if load_ref:

        @pl.when(program == 0)
        def _() -> None:  # cleared for the launch that counts
            index = iota((next_power_of_2(rule.num_ids),), 0)
            store(load_ref[0].at[index], jnp.zeros_like(index), mask=index < rule.num_ids)


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
        config = config_for(num_tokens, rule.num_experts, rule.num_slots, target)
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
        assembly=target == "cuda" and not interpret,
    )
    return launch(
        kernel,
        *args,
        *out,
        name="route",
        grid=(pl.cdiv(num_tokens, config.rows),),
        sizes=sizes,
        out_shape=out_shape,
        num_warps=config.warps,
        aliases={len(args) + i: i for i in range(len(out))},
        interpret=interpret,
    )
