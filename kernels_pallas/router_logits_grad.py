"""The gradients of the router's matrix product: grad @ weight and grad.T @ x, in float32 whatever the dtypes.

How a tile is multiplied depends on the dtypes as in `router_logits`: grad is float32, so next to bfloat16 it goes as
three bfloat16 parts on tensor cores ("parts"), next to anything else without them ("exact").

The weight's gradient is a sum over tokens with few tiles, which are cut into slices as the logits are: one launch of
sums and one that adds them in their order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import cdiv, iota, launch, load_masked, remembered, store, within
from kernels_pallas.router_logits import add_dot, cut, kind_of, router_logits_sum, side


@dataclass(frozen=True)
class Config:
    rows: int  # of the result, in one tile
    columns: int
    depth: int  # of one step
    num_warps: int
    num_stages: int
    programs: int = 0  # that fill a GPU: where there are fewer, sums over tokens are cut

    def stage_bytes(self, itemsize: int) -> int:
        """What a step takes, of grad and of what it is multiplied with."""
        return self.depth * (4 * self.rows + itemsize * self.columns)


@remembered
def config_for(num_experts: int, width: int, dtype: Any, target: str, *, by_token: bool) -> Config:
    """Which tile to use on this target ("cuda" or "rocm"), where grad is multiplied with this dtype.

    by_token: for the gradient of x; else for that of the weight.
    """
    if kind_of(jnp.dtype("float32"), jnp.dtype(dtype)) == "exact":
        config = Config(32, 64, 32, num_warps=4, num_stages=2, programs=512)
    elif width % 8:  # lines that do not begin at 16 bytes are loaded element by element: not measured
        config = Config(64, 64, 32, num_warps=4, num_stages=2, programs=512)
    elif num_experts <= 32 and not by_token:  # measured on an H200, as what follows
        config = Config(32, 128, 64, num_warps=4, num_stages=3, programs=256)
    else:
        config = Config(64, 128, 32, num_warps=4, num_stages=3, programs=512)
    return replace(
        config,
        rows=config.rows if by_token else min(config.rows, side(num_experts)),
        columns=min(config.columns, side(width)),
        depth=min(config.depth, side(num_experts)) if by_token else config.depth,
        num_stages=config.num_stages if target == "cuda" else 2,
    )


@remembered
def slices_for(num_tokens: int, num_experts: int, width: int, config: Config) -> int:
    """Into how many slices of tokens to cut the gradient of the weight. With 1 there is one launch, with more two."""
    tiles, _ = grid_for(num_experts, width, 1, config)
    return cut(pl.cdiv(num_tokens, config.depth), tiles, config.programs)


@remembered
def steps_for(num_tokens: int, slices: int, config: Config) -> int:
    """How many steps a slice takes; the last one may take fewer."""
    return pl.cdiv(pl.cdiv(num_tokens, config.depth), slices)


@remembered
def grid_for(rows: int, columns: int, slices: int, config: Config) -> tuple[int, int]:
    """The programs of a launch whose result is [rows, columns]."""
    return pl.cdiv(rows, config.rows) * pl.cdiv(columns, config.columns), slices


def _kernel(
    grad_ref: Any,
    other_ref: Any,
    out_ref: Any,
    *,
    config: Config,
    by_token: bool,
    num_experts: int,
    width: int,
    column: int,
    num_tokens: Any,
    steps: Any = None,
) -> None:
    """Slice i of a weight's gradient is written to row i * num_experts of `out_ref`."""
    m, n, k = config.rows, config.columns, config.depth
    kind = kind_of(grad_ref.dtype, other_ref.dtype)
    rows, depth = (num_tokens, num_experts) if by_token else (num_experts, num_tokens)
    # Neighbours share what is read from memory: a tile of grad, which the next columns need too, or one of x.
    tile = pl.program_id(0)
    if by_token:
        row_tile, column_tile = tile // pl.cdiv(width, n), tile % pl.cdiv(width, n)
        part = first_step = jnp.int32(0)
    else:
        row_tile, column_tile = tile % pl.cdiv(num_experts, m), tile // pl.cdiv(num_experts, m)
        part = pl.program_id(1)
        first_step = part * steps
    first_row, first_col = row_tile * m, column_tile * n

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        start = (first_step + i) * k
        row, at_grad = first_row + iota((m, k), 0), start + iota((m, k), 1)
        at_other, col = start + iota((k, n), 0), first_col + iota((k, n), 1)
        place = (row, at_grad) if by_token else (at_grad, row)
        grad = load_masked(grad_ref.at[place], within((row, rows, m), (at_grad, depth, k)))
        other = load_masked(other_ref.at[at_other, column + col], within((at_other, depth, k), (col, width, n)))
        return add_dot(total, grad, other, kind)

    count = pl.cdiv(num_experts, k) if by_token else jnp.minimum(steps, cdiv(num_tokens, k) - first_step)
    total = jax.lax.fori_loop(0, count, step, jnp.zeros((m, n), jnp.float32))
    row, col = first_row + iota((m, n), 0), first_col + iota((m, n), 1)
    mask = within((row, rows, m), (col, width, n))
    store(out_ref.at[part * num_experts + row, col], total.astype(out_ref.dtype), mask=mask)


def router_logits_grad_x(
    grad: jax.Array,
    weight: jax.Array,
    *,
    dtype: Any,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """dtype [T, H] = grad [T, E] @ weight [E, H], T at least 1."""
    num_tokens, (num_experts, width) = grad.shape[0], weight.shape
    config = config or config_for(num_experts, width, weight.dtype, target, by_token=True)
    return launch(
        functools.partial(_kernel, config=config, by_token=True, num_experts=num_experts, width=width, column=0),
        grad,
        weight,
        name="router_logits_grad_x",
        grid=grid_for(num_tokens, width, 1, config),
        out_shape=[jax.ShapeDtypeStruct((num_tokens, width), dtype)],
        sizes={"num_tokens": num_tokens},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.stage_bytes(weight.dtype.itemsize),
        interpret=interpret,
    )[0]


def router_logits_grad_weight(
    grad: jax.Array,
    x: jax.Array,
    *,
    dtype: Any,
    column: int = 0,
    width: int | None = None,
    config: Config | None = None,
    slices: int | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """dtype [E, H] = grad.T @ x[:, column : column + width] for grad [T, E] and x [T, at least column + width]."""
    num_tokens, num_experts = grad.shape
    width = x.shape[1] - column if width is None else width
    config = config or config_for(num_experts, width, x.dtype, target, by_token=False)
    slices = slices or slices_for(num_tokens, num_experts, width, config)
    out = launch(
        functools.partial(_kernel, config=config, by_token=False, num_experts=num_experts, width=width, column=column),
        grad,
        x,
        name="router_logits_grad_weight",
        grid=grid_for(num_experts, width, slices, config),
        out_shape=[jax.ShapeDtypeStruct((slices * num_experts, width), dtype if slices == 1 else jnp.float32)],
        sizes={"num_tokens": num_tokens, "steps": steps_for(num_tokens, slices, config)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        stage_bytes=config.stage_bytes(x.dtype.itemsize),
        interpret=interpret,
    )[0]
    return out if slices == 1 else router_logits_sum(out, slices=slices, dtype=dtype, interpret=interpret)
