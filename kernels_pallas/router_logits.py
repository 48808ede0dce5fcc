"""The router's matrix product, x @ weight.T in float32, reading both operands in the dtype they are stored in.

Few tokens: a program multiplies them with a few experts, element by element, all of its loads in flight at once. More:
tiles. Where there are too few tiles to fill a GPU, H is cut into slices; each slice is a program, their sums go to a
scratch array, and a second launch adds them in the order of the slices. Nothing is added atomically.

How a tile is multiplied depends on the dtypes (`kind_of`):

* "tensor": two equal 16-bit dtypes, on tensor cores.
* "parts": bfloat16 and float32. A float32 number is the sum of three bfloat16 numbers of 8 bits each, exactly, so three
  products on tensor cores are as good as those of float32, but for infinities: times a part that is 0 they are NaN.
* "exact": every other pair, in float32 without tensor cores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, load_masked, next_power_of_2, remembered, store, within

MOST_SLICES = 32
SUMMED = 16  # slices at a time
UNROLLED = 8  # loads of a row in flight


@dataclass(frozen=True)
class Config:
    """A tile. There are few, whatever the number of tokens: each is a compilation."""

    tokens: int
    experts: int
    depth: int  # of one step along H
    num_warps: int
    num_stages: int
    plain: bool = False  # element by element, for few tokens
    programs: int = 128  # that fill a GPU, of some 130 multiprocessors: where there are fewer, H is cut


def kind_of(x: Any, weight: Any) -> str:
    """How to multiply these dtypes: "tensor", "parts" or "exact"."""
    if x == weight and x != jnp.float32:
        return "tensor"
    return "parts" if {jnp.dtype(x), jnp.dtype(weight)} == {jnp.dtype(t) for t in ("bfloat16", "float32")} else "exact"


@remembered
def config_for(num_tokens: int, num_experts: int, width: int, kind: str, target: str) -> Config:
    """Which tile to use on this target ("cuda" or "rocm")."""
    if num_tokens == 1:
        config = Config(1, 1, 2048, num_warps=8, num_stages=1, plain=True)
    elif num_tokens <= 8:
        config = Config(4, 2, 2048, num_warps=8, num_stages=1, plain=True)
    elif kind == "exact":
        square = 32 if num_tokens <= 256 else 64
        config = Config(square, square, 32, num_warps=4, num_stages=3, programs=512)
    elif width % 8:  # lines that do not begin at 16 bytes are loaded element by element
        config = Config(64, 32, 32, num_warps=4, num_stages=2)
    elif num_tokens <= 128:
        config = Config(64, *(32, 128) if kind == "tensor" else (64, 64), num_warps=4, num_stages=4)
    elif kind == "parts" and num_tokens <= 4096:
        config = Config(128, 64, 32, num_warps=4, num_stages=4, programs=256)  # more would not fit in registers
    elif kind == "parts":
        config = Config(128, 128, 64, num_warps=8, num_stages=3)
    elif target == "cuda" and 64 < num_experts <= 256 and num_tokens <= 1024:  # measured with 256
        config = Config(64, 128, 64, num_warps=4, num_stages=6)
    else:
        experts = 256 if target == "cuda" and num_tokens > 1024 else 128
        config = Config(128, experts, 64, num_warps=8, num_stages=4)
    return replace(
        config,
        experts=min(config.experts, next_power_of_2(num_experts) if config.plain else side(num_experts)),
        depth=min(config.depth, side(width)),
        num_stages=config.num_stages if target == "cuda" else min(config.num_stages, 2),
    )


def side(size: int) -> int:
    """Of a tile that holds it all."""
    return max(16, next_power_of_2(size))


@remembered
def slices_for(num_tokens: int, num_experts: int, width: int, config: Config) -> int:
    """Into how many slices to cut H. With 1 there is one launch, with more there are two."""
    tiles = pl.cdiv(num_tokens, config.tokens) * pl.cdiv(num_experts, config.experts)
    return 1 if config.plain else cut(pl.cdiv(width, config.depth), tiles, config.programs)


def cut(steps: int, tiles: int, programs: int) -> int:
    """Into how many slices to cut sums of so many steps, for so many tiles to make about that many programs."""
    if 2 * tiles > programs:
        return 1
    return pl.cdiv(steps, pl.cdiv(steps, min(MOST_SLICES, programs // tiles)))


@remembered
def steps_for(width: int, slices: int, config: Config) -> int:
    """How many steps a slice takes; the last one may take fewer."""
    return pl.cdiv(pl.cdiv(width, config.depth), slices)


@remembered
def grid_for(num_tokens: int, num_experts: int, slices: int, config: Config) -> tuple[int, int]:
    """The programs of the launch."""
    return pl.cdiv(num_tokens, config.tokens) * pl.cdiv(num_experts, config.experts), slices


def _sum_tile(num_experts: int) -> tuple[int, int]:
    """[tokens, experts] of a program that adds slices: 4 numbers a thread."""
    experts = min(256, next_power_of_2(num_experts))
    return 256 // experts, experts


def sum_grid_for(num_tokens: int, num_experts: int) -> tuple[int, int]:
    """The programs of the launch that adds slices."""
    tokens, experts = _sum_tile(num_experts)
    return pl.cdiv(num_tokens, tokens), pl.cdiv(num_experts, experts)


def _place(num_experts: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """(first token, first expert) of a program's tile. The experts of a tile of tokens come one after another."""
    columns = pl.cdiv(num_experts, config.experts)
    tile = pl.program_id(0)
    return tile // columns * config.tokens, tile % columns * config.experts


def _load(ref: Any, index: tuple[Any, Any], *bounds: tuple[jax.Array, Any, int]) -> jax.Array:
    """What lies there, 0 outside the bounds. A size may be known at run time only."""
    return load_masked(ref.at[index], within(*bounds))


def _plain_kernel(
    x_ref: Any, weight_ref: Any, out_ref: Any, *, config: Config, num_experts: int, width: int, column: int,
    num_tokens: Any,
) -> None:  # fmt: skip
    m, n, k = config.tokens, config.experts, config.depth
    first_token, first_expert = _place(num_experts, config)
    token = first_token + iota((m, k), 0)
    chunks = pl.cdiv(width, k)
    rounds = pl.cdiv(chunks, UNROLLED)
    unrolled = pl.cdiv(chunks, rounds)

    def step(i: Any, totals: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        xs, weights = [], []
        for j in range(unrolled):  # all loads before any product
            start = (i * unrolled + j) * k
            at, at_w = start + iota((m, k), 1), start + iota((1, k), 1)
            row = [first_expert + e + iota((1, k), 0) for e in range(n)]
            whole = unrolled * k
            weights.append([_load(weight_ref, (r, at_w), (r, num_experts, n), (at_w, width, whole)) for r in row])
            xs.append(_load(x_ref, (token, column + at), (token, num_tokens, m), (at, width, whole)))
        for x, ws in zip(xs, weights, strict=True):
            x = x.astype(jnp.float32)
            totals = [total + x * w.astype(jnp.float32) for total, w in zip(totals, ws, strict=True)]
        return tuple(totals)

    totals: Any = (jnp.zeros((m, k), jnp.float32),) * n
    totals = step(0, totals) if rounds == 1 else jax.lax.fori_loop(0, rounds, step, totals)
    token = first_token + iota((m,), 0)
    for e, total in enumerate(totals):
        expert = first_expert + e + jnp.zeros((m,), jnp.int32)
        mask = (token < num_tokens) & (expert < num_experts)
        store(out_ref.at[token, expert], jnp.sum(total, axis=1), mask=mask)


def _parts(a: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 array: by bits, so that no compiler takes it for a no-op."""
    parts = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        a = a - part
    return [*parts, a.astype(jnp.bfloat16)]


def add_dot(total: jax.Array, a: jax.Array, b: jax.Array, kind: str) -> jax.Array:
    """total + a @ b; of "parts", a is the float32 one, which tensor cores can take from registers."""
    # The precision is said everywhere: else jax_default_matmul_precision would decide what a kernel computes.
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision=jax.lax.Precision.DEFAULT)
    if kind == "tensor":
        return total + dot(a, b)
    if kind == "parts":
        # The parts' sum is added by itself, which waits for its products. Into `total` the last one would still run,
        # from registers, when the next step makes its parts in them: NaN on an H100 that has several programs a
        # multiprocessor (triton 3.6).
        first, *others = (dot(part, b) for part in _parts(a))
        return total + functools.reduce(jnp.add, others, first)
    return total + dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _tile_kernel(
    x_ref: Any, weight_ref: Any, out_ref: Any, *, config: Config, num_experts: int, width: int, column: int,
    num_tokens: Any, steps: Any,
) -> None:  # fmt: skip
    """Writes its slice's sums to row slice * num_tokens + token of `out_ref`."""
    m, n, k = config.tokens, config.experts, config.depth
    kind = kind_of(x_ref.dtype, weight_ref.dtype)
    turned = kind == "parts" and weight_ref.dtype == jnp.float32  # out.T = weight @ x.T
    first_token, first_expert = _place(num_experts, config)
    part = pl.program_id(1)
    first = part * steps

    def x_tile(start: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        token, at = first_token + iota(shape, axis), start + iota(shape, 1 - axis)
        return _load(x_ref, (token, column + at), (token, num_tokens, m), (at, width, k))

    def weight_tile(start: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        expert, at = first_expert + iota(shape, axis), start + iota(shape, 1 - axis)
        return _load(weight_ref, (expert, at), (expert, num_experts, n), (at, width, k))

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        start = (first + i) * k
        if turned:
            return add_dot(total, weight_tile(start, (n, k), 0), x_tile(start, (k, m), 1), kind)
        return add_dot(total, x_tile(start, (m, k), 0), weight_tile(start, (k, n), 1), kind)

    shape = (n, m) if turned else (m, n)
    count = jnp.minimum(steps, pl.cdiv(width, k) - first)
    total = jax.lax.fori_loop(0, count, step, jnp.zeros(shape, jnp.float32))
    token, expert = first_token + iota(shape, int(turned)), first_expert + iota(shape, 1 - int(turned))
    mask = within((token, num_tokens, m), (expert, num_experts, n))
    store(out_ref.at[part * num_tokens + token, expert], total, mask=mask)


def _sum_kernel(slices_ref: Any, out_ref: Any, *, num_experts: int, num_tokens: Any, slices: Any) -> None:
    shape = _sum_tile(num_experts)
    token = pl.program_id(0) * shape[0] + iota(shape, 0)
    expert = pl.program_id(1) * shape[1] + iota(shape, 1)
    inside = (token < num_tokens) & (expert < num_experts)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        for j in range(SUMMED):
            part = i * SUMMED + j
            at = slices_ref.at[part * num_tokens + token, expert]
            total = total + load(at, mask=inside & (part < slices), other=0.0)
        return total

    total = jax.lax.fori_loop(0, (slices + SUMMED - 1) // SUMMED, step, jnp.zeros(shape, jnp.float32))
    store(out_ref.at[token, expert], total.astype(out_ref.dtype), mask=inside)


def router_logits(
    x: jax.Array,
    weight: jax.Array,
    *,
    column: int = 0,
    config: Config | None = None,
    slices: int | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """float32 [T, E] = x[:, column : column + H] @ weight.T for weight [E, H]; any two float dtypes, T at least 1."""
    num_tokens = x.shape[0]
    num_experts, width = weight.shape
    config = config or config_for(num_tokens, num_experts, width, kind_of(x.dtype, weight.dtype), target)
    slices = slices or slices_for(num_tokens, num_experts, width, config)
    kernel = _plain_kernel if config.plain else _tile_kernel
    out = launch(
        functools.partial(kernel, config=config, num_experts=num_experts, width=width, column=column),
        x,
        weight,
        name="router_logits",
        grid=grid_for(num_tokens, num_experts, slices, config),
        sizes={"num_tokens": num_tokens} | ({} if config.plain else {"steps": steps_for(width, slices, config)}),
        out_shape=[jax.ShapeDtypeStruct((slices * num_tokens, num_experts), jnp.float32)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.depth * (config.tokens * x.dtype.itemsize + config.experts * weight.dtype.itemsize),
        interpret=interpret,
    )[0]
    return out if slices == 1 else router_logits_sum(out, slices=slices, interpret=interpret)


def router_logits_sum(sums: jax.Array, *, slices: int, dtype: Any = jnp.float32, interpret: bool = False) -> jax.Array:
    """dtype [T, E]: the sum, in their order, of the [T, E] that lie one behind the other in sums [slices * T, E].

    In float32, and then in dtype. (The gradient of the weight adds [E, H] that way.)
    """
    num_tokens, num_experts = sums.shape[0] // slices, sums.shape[1]
    return launch(
        functools.partial(_sum_kernel, num_experts=num_experts),
        sums,
        name="router_logits_sum",
        grid=sum_grid_for(num_tokens, num_experts),
        sizes={"num_tokens": num_tokens, "slices": slices},
        out_shape=[jax.ShapeDtypeStruct((num_tokens, num_experts), dtype)],
        num_warps=2,
        interpret=interpret,
    )[0]
