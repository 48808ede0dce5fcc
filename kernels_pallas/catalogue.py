"""Every Triton kernel of the package with the shapes and settings it is built for in the tests and by `jaxmoe targets`.

Nothing here runs: an entry is a function and the shapes of its arguments, for `targets.lower`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.align_blocks import NAMES, align_blocks
from kernels_pallas.combine import combine, combine_weight_grad
from kernels_pallas.count import count_load
from kernels_pallas.dispatch import dispatch
from kernels_pallas.gated_grad import gated_grad
from kernels_pallas.grouped_matmul import gated_matmul, grouped_matmul
from kernels_pallas.grouped_matmul_grad import grouped_outer
from kernels_pallas.permute_maps import permute_maps
from kernels_pallas.plan_dispatch import num_rows, plan_dispatch
from kernels_pallas.route import route
from kernels_pallas.route_grad import route_grad
from kernels_pallas.router_logits import router_logits
from kernels_pallas.router_logits_grad import router_logits_grad_weight, router_logits_grad_x
from kernels_pallas.rule import Rule
from kernels_pallas.targets import TARGETS, Lowered, lower

BF16, F16, F32, I32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32


@dataclass(frozen=True)
class Entry:
    """A call of one of the package's functions. `kernels` are the machine-code kernels it launches, in order."""

    name: str
    kernels: tuple[str, ...]
    fn: Callable[..., Any]
    args: tuple[Any, ...]  # shapes, or None where an argument is left out
    takes_target: bool = True  # whether `fn` picks its tile by target

    def lower(self, target: str) -> list[Lowered]:
        """Its kernels as Triton IR for one of `targets.TARGETS`."""
        fn = functools.partial(self.fn, target=TARGETS[target].platform) if self.takes_target else self.fn
        found = lower(fn, *self.args, target=target)
        if tuple(k.name for k in found) != self.kernels:
            raise RuntimeError(f"{self.name}: expected the kernels {self.kernels}, got {[k.name for k in found]}")
        return found


def _shape(dtype: Any, *sides: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def _rule(
    experts: int,
    top_k: int,
    scoring_func: str = "sigmoid",
    *,
    groups: tuple[int, int] = (1, 1),
    group_score: str = "top2",
    renormalize: bool = True,
    shared: int = 0,
) -> Rule:
    return Rule(experts, top_k, *groups, scoring_func, group_score, renormalize, 2.5, shared, 1, 1.0)


def _route(
    name: str,
    rule: Rule,
    logits: Any = BF16,
    bias: Any = F32,
    *,
    tokens: int = 4096,
    valid: bool = False,
    column: int = 0,
    aliased: bool = False,
) -> Entry:
    outs = (_shape(F32, tokens, rule.num_slots), _shape(I32, tokens, rule.num_slots), _shape(I32, rule.num_ids))

    def fn(logits: Any, bias: Any, valid: Any, out: Any, target: str) -> Any:
        return route(logits, bias, valid, rule=rule, column=column, clear_load=True, out=out, target=target)

    args = (
        _shape(logits, tokens, column + rule.num_experts),
        None if bias is None else _shape(bias, rule.num_experts),
        _shape(I32, 1) if valid else None,
        outs if aliased else None,
    )
    return Entry(f"route {name}", ("route",), fn, args)


def _route_grad(name: str, rule: Rule, logits: Any = BF16, tokens: int = 4096) -> Entry:
    args = (
        _shape(logits, tokens, rule.num_experts),
        _shape(I32, tokens, rule.num_slots),
        _shape(F32, tokens, rule.num_slots),
    )
    fn = functools.partial(route_grad, rule=rule)
    return Entry(f"route_grad {name}", ("route_grad",), fn, args, takes_target=False)


def _count(name: str, tokens: int, slots: int, ids: int) -> Entry:
    args = (_shape(I32, tokens, slots), _shape(I32, ids))
    return Entry(f"count_load {name}", ("count_load",), count_load, args)


def _plan(
    name: str, tokens: int, slots: int, experts: int, *, align: int = 1, ids: int | None = None, at_once: bool = False
) -> Entry:
    args = (_shape(I32, tokens, slots), None if ids is None else _shape(I32, ids))
    fn = functools.partial(plan_dispatch, num_experts=experts, align=align)
    return Entry(f"plan_dispatch {name}", ("plan_dispatch",) if at_once else ("plan_count", "plan_place"), fn, args)


def _align(
    name: str, tokens: int, slots: int, experts: int, align: int, *, named: bool = False, at_once: bool = False
) -> Entry:
    args = (_shape(I32, tokens, slots), _shape(I32, experts) if named else None)
    length = num_rows(tokens * slots, experts, align)
    fn = functools.partial(align_blocks, num_experts=experts, align=align, length=length, named=named)
    return Entry(f"align_blocks {name}", NAMES[:1] if at_once else NAMES[1:], fn, args)


def _maps(name: str, pairs: int, experts: int, local: int) -> Entry:
    args = (_shape(I32, pairs, 1), _shape(I32, pairs), _shape(I32, experts))
    fn = functools.partial(permute_maps, num_local=local)
    return Entry(f"permute_maps {name}", ("permute_maps",), fn, args, takes_target=False)


def _dispatch(
    name: str,
    dtype: Any,
    tokens: int,
    width: int = 7168,
    slots: int = 8,
    *,
    align: int = 1,
    scale: Any = None,
    ends: bool = False,
    aliased: bool = False,
) -> Entry:
    rows = num_rows(tokens * slots, 256, align)

    def fn(x: Any, rows: Any, order: Any, scale: Any, end: Any, out: Any, target: str) -> Any:
        return dispatch(x, rows, order, scale=scale, end=end, out=out, target=target)

    args = (
        _shape(dtype, tokens, width),
        _shape(I32, tokens, slots),
        _shape(I32, rows),
        None if scale is None else _shape(scale, tokens, slots),
        _shape(I32, 1) if ends else None,
        _shape(dtype, rows, width) if aliased else None,
    )
    return Entry(f"dispatch {name}", ("dispatch",), fn, args)


def _combine(
    name: str,
    dtype: Any,
    tokens: int,
    width: int = 7168,
    slots: int = 8,
    *,
    weights: Any = F32,
    ends: bool = False,
    aliased: bool = False,
) -> Entry:
    def fn(x: Any, rows: Any, weights: Any, end: Any, out: Any, target: str) -> Any:
        return combine(x, rows, weights, end=end, out=out, target=target)

    args = (
        _shape(dtype, tokens * slots, width),
        _shape(I32, tokens, slots),
        None if weights is None else _shape(weights, tokens, slots),
        _shape(I32, 2) if ends else None,
        _shape(dtype, tokens, width) if aliased else None,
    )
    return Entry(f"combine {name}", ("combine",), fn, args)


def _weight_grad(name: str, dtype: Any, tokens: int, width: int = 7168, slots: int = 8) -> Entry:
    args = (_shape(dtype, tokens * slots, width), _shape(dtype, tokens, width), _shape(I32, tokens, slots))
    return Entry(f"combine_weight_grad {name}", ("combine_weight_grad",), combine_weight_grad, args)


def _logits(
    name: str, x: Any, weight: Any, tokens: int, experts: int = 256, width: int = 7168, *, sliced: bool = True
) -> Entry:
    args = (_shape(x, tokens, width), _shape(weight, experts, width))
    kernels = ("router_logits", "router_logits_sum") if sliced else ("router_logits",)
    return Entry(f"router_logits {name}", kernels, router_logits, args)


def _grouped(
    name: str,
    dtype: Any,
    rows: int,
    experts: int,
    depth: int = 7168,
    width: int = 4096,
    *,
    transposed: bool = False,
    activation: str | None = None,
    keep: bool = False,
    num_slots: int = 0,
    clear: bool = True,
) -> Entry:
    """With an activation, `width` is that of gate and up together; with slots the rows are tokens, gathered."""
    weight = (experts, width, depth) if transposed else (experts, depth, width)
    args = (_shape(dtype, rows, depth), _shape(dtype, *weight), _shape(I32, experts))
    if activation is None:
        fn: Callable[..., Any] = functools.partial(grouped_matmul, transposed=transposed, clear=clear)
        return Entry(f"grouped_matmul {name}", ("grouped_matmul",), fn, args)
    fn = functools.partial(gated_matmul, transposed=transposed, activation=activation, keep=keep, clear=clear)
    if num_slots:
        slots = _shape(I32, rows * num_slots)

        def gathering(*arrays: Any, **options: Any) -> Any:
            return fn(*arrays[:3], slots=arrays[3], num_slots=num_slots, **options)

        return Entry(f"gated_matmul {name}", ("gated_matmul",), gathering, (*args, slots))
    return Entry(f"gated_matmul {name}", ("gated_matmul",), fn, args)


def _gated_grad(
    name: str, dtype: Any, rows: int, width: int, activation: str, *, scaled: bool = False, ends: bool = False
) -> Entry:
    args = (
        _shape(dtype, rows, 2 * width),
        _shape(dtype, rows, width),
        _shape(F32, rows) if scaled else None,
        _shape(I32, 1) if ends else None,
    )
    return Entry(f"gated_grad {name}", ("gated_grad",), functools.partial(gated_grad, activation=activation), args)


def _outer(name: str, dtype: Any, rows: int, experts: int, left: int = 7168, right: int = 4096) -> Entry:
    args = (_shape(dtype, rows, left), _shape(dtype, rows, right), _shape(I32, experts))
    return Entry(f"grouped_outer {name}", ("grouped_outer",), grouped_outer, args)


def _logits_grads(name: str, x: Any, weight: Any, tokens: int, experts: int = 256, width: int = 7168) -> Entry:
    def fn(grad: Any, x: Any, weight: Any, target: str) -> Any:
        dx = router_logits_grad_x(grad, weight, dtype=x.dtype, target=target)
        return dx, router_logits_grad_weight(grad, x, dtype=weight.dtype, target=target)

    args = (_shape(F32, tokens, experts), _shape(x, tokens, width), _shape(weight, experts, width))
    kernels = ("router_logits_grad_x", "router_logits_grad_weight", "router_logits_sum")
    return Entry(f"router_logits_grad {name}", kernels, fn, args)


LONG = 37_450  # tokens: 8 rows of 7168 for each are just above 2**31 elements, past 32-bit offsets
_GROUPED = _rule(256, 8, groups=(8, 4), shared=1)
_SOFTMAX_ALL = _rule(160, 6, "softmax", groups=(8, 3), group_score="max", renormalize=False, shared=2)

CATALOGUE: tuple[Entry, ...] = (
    _route("256/8, 8 groups", _GROUPED),
    _route("256/8, 8 groups, float32 logits, bfloat16 bias, valid count", _GROUPED, F32, BF16, valid=True),
    _route("256/8, 8 groups, strided, into out", _GROUPED, column=64, aliased=True),
    _route("384/8", _rule(384, 8, shared=1)),
    _route("896/16", _rule(896, 16, shared=2)),
    _route("1024/32, 32 groups", _rule(1024, 32, groups=(32, 8))),
    _route("1024/8, float32", _rule(1024, 8), F32),
    _route("256/6, sqrtsoftplus", _rule(256, 6, "sqrtsoftplus", shared=1)),
    _route("160/6, softmax, 8 groups by maximum, no bias", _SOFTMAX_ALL, bias=None),
    _route("512/10, softmax, no bias", _rule(512, 10, "softmax"), bias=None),
    _route("64/6, softmax, bias", _rule(64, 6, "softmax", shared=2), F32),
    _route("60/4, float16", _rule(60, 4), F16, F16),
    _route("1/1", _rule(1, 1), bias=None),
    _route("256/8, 8 groups, many tokens", _rule(256, 8, groups=(8, 4)), tokens=40960),
    _route("512/10, softmax, no bias, many tokens", _rule(512, 10, "softmax", shared=1), bias=None, tokens=16384),
    _route("160/8, many tokens", _rule(160, 8), tokens=16384),
    _route("8/2, softmax, no bias, many tokens", _rule(8, 2, "softmax"), bias=None, tokens=8192),
    _route_grad("256/8", _GROUPED),
    _route_grad("256/6, sqrtsoftplus, float32", _rule(256, 6, "sqrtsoftplus"), F32),
    _route_grad("160/6, softmax, not renormalised", _SOFTMAX_ALL),
    _route_grad("1024/32", _rule(1024, 32)),
    _count("257 ids", 4096, 9, 257),
    _count("1026 ids, many tokens", 65536, 32, 1026),
    _plan("256 experts", 4096, 8, 256),
    _plan("8 experts, one token", 1, 2, 8, at_once=True),
    _plan("256 experts, 256 tokens", 256, 8, 256, at_once=True),
    _plan("256 experts, one token, aligned", 1, 8, 256, align=64, at_once=True),
    _plan("256 experts, 64 tokens, aligned", 64, 8, 256, align=64, at_once=True),
    _plan("2048 experts, 128 tokens, aligned", 128, 8, 2048, align=8, at_once=True),
    _plan("2048 experts, aligned", 4096, 8, 2048, align=8),
    _plan("256 experts, many tokens", 65536, 32, 256),
    _plan("32 of 256 experts, mapped, aligned", 4096, 8, 32, align=128, ids=256),
    _plan("1026 experts, many tokens, aligned", 65536, 32, 1026, align=64),
    _align("256 experts", 4096, 8, 256, 64),
    _align("256 experts, 64 tokens", 64, 8, 256, 64, at_once=True),
    _align("160 experts, named", 1024, 6, 160, 128, named=True),
    _align("160 experts, 512 tokens, named", 512, 6, 160, 128, named=True, at_once=True),
    _maps("256 experts", 32768, 256, 256),
    _maps("5 of 13 experts", 42, 13, 5),
    _dispatch("bfloat16", BF16, 4096),
    _dispatch("bfloat16, 1024 tokens", BF16, 1024),
    _dispatch("bfloat16, aligned, up to where rows end, into out", BF16, 4096, align=128, ends=True, aliased=True),
    _dispatch("float32, over 2**31 elements", F32, LONG),
    _dispatch("float16, scaled, ragged width", F16, 512, 1000, scale=F32),
    _combine("bfloat16", BF16, 4096),
    _combine("bfloat16, 1024 tokens", BF16, 1024),
    _combine("bfloat16, up to where rows end", BF16, 64, ends=True),
    _combine("bfloat16, 2048 tokens, up to where rows end", BF16, 2048, ends=True),
    _combine("bfloat16, over 2**31 elements, into out", BF16, LONG, aliased=True),
    _combine("float32, over 2**31 elements", F32, LONG),
    _combine("float16, unweighted, ragged width", F16, 512, 1000, weights=None),
    _weight_grad("bfloat16", BF16, 4096),
    _weight_grad("float32, over 2**31 elements", F32, LONG),
    _logits("bfloat16", BF16, BF16, 4096),
    _logits("bfloat16, 512 tokens", BF16, BF16, 512),
    _logits("bfloat16, few tokens", BF16, BF16, 16),
    _logits("bfloat16, 8 tokens", BF16, BF16, 8, sliced=False),
    _logits("bfloat16, one token", BF16, BF16, 1, sliced=False),
    _logits("bfloat16, many tokens", BF16, BF16, 40960, sliced=False),
    _logits("bfloat16, ragged sizes", BF16, BF16, 333, 60, 1001),
    _logits("bfloat16 by float32", BF16, F32, 4096),
    _logits("bfloat16 by float32, few tokens", BF16, F32, 16),
    _logits("bfloat16 by float32, 8 tokens", BF16, F32, 8, sliced=False),
    _logits("bfloat16 by float32, one token", BF16, F32, 1, sliced=False),
    _logits("float32 by bfloat16", F32, BF16, 512),
    _logits("float32 by bfloat16, few tokens, ragged sizes", F32, BF16, 77, 60, 1000),
    _logits("bfloat16 by float32, many tokens", BF16, F32, 40960, sliced=False),
    _logits("float16 by float32", F16, F32, 4096),
    _logits("float32, ragged sizes", F32, F32, 77, 60, 1000),
    _logits_grads("bfloat16", BF16, BF16, 4096),
    _logits_grads("bfloat16 by float32, few experts", BF16, F32, 4096, 32),
    _logits_grads("ragged sizes", F32, BF16, 77, 60, 1000),
    _grouped("bfloat16", BF16, 32768, 32),
    _grouped("bfloat16, few rows, weights over 2**32 bytes", BF16, 512, 256),
    _grouped("bfloat16, one row, few programs", BF16, 1, 32, 2048, 7168),
    _grouped("bfloat16, 32 rows a tile, rows behind the last group left", BF16, 512, 32, clear=False),
    _grouped("silu, bfloat16, one row, few programs, transposed", BF16, 1, 32, transposed=True, activation="silu"),
    _grouped("float16, middling, transposed", F16, 1024, 32, 2048, 7168, transposed=True),
    _grouped("bfloat16, ragged sizes", BF16, 777, 7, 1001, 333),
    _grouped("float32, ragged sizes", F32, 777, 7, 1001, 333),
    _grouped("silu, bfloat16, kept", BF16, 32768, 32, activation="silu", keep=True),
    _grouped("silu, bfloat16, gathered, low last tiles", BF16, 1024, 32, activation="silu", num_slots=8),
    _grouped(
        "silu, bfloat16, gathered, kept, transposed",
        BF16,
        4096,
        32,
        transposed=True,
        activation="silu",
        keep=True,
        num_slots=8,
        clear=False,
    ),
    _grouped("gelu_tanh, bfloat16, few rows, transposed", BF16, 512, 256, transposed=True, activation="gelu_tanh"),
    _grouped("gelu, float32, ragged sizes", F32, 777, 7, 1001, 666, activation="gelu"),
    _gated_grad("silu, bfloat16, scaled, up to where rows end", BF16, 32768, 2048, "silu", scaled=True, ends=True),
    _gated_grad("gelu, float32, ragged width, over 2**31 elements", F32, 2**21, 1001, "gelu"),
    _gated_grad("gelu_tanh, float16", F16, 777, 300, "gelu_tanh", scaled=True),
    _outer("bfloat16", BF16, 32768, 32),
    _outer("bfloat16, of down", BF16, 32768, 32, 2048, 7168),
    _outer("bfloat16, few rows", BF16, 512, 32),
    _outer("float32, ragged sizes", F32, 777, 7, 1001, 333),
)
