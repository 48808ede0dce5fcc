"""The gradients of the router's matrix product: grad @ weight and grad.T @ x, in float32 whatever the dtypes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, store


@dataclass(frozen=True)
class Config:
    rows: int
    columns: int
    depth: int  # of one step
    num_warps: int


def config_for(target: str) -> Config:
    """Which tile to use on this target ("cuda" or "rocm")."""
    del target
    return Config(rows=32, columns=64, depth=32, num_warps=4)


def grid_for(rows: int, columns: int, config: Config) -> tuple[int, int]:
    """The programs of a launch whose result is [rows, columns]."""
    return pl.cdiv(rows, config.rows), pl.cdiv(columns, config.columns)


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
) -> None:
    m, n, k = config.rows, config.columns, config.depth
    rows, depth = (num_tokens, num_experts) if by_token else (num_experts, num_tokens)
    row, col = pl.program_id(0) * m + iota((m, k), 0), pl.program_id(1) * n + iota((k, n), 1)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at_grad, at_other = i * k + iota((m, k), 1), i * k + iota((k, n), 0)
        place = (row, at_grad) if by_token else (at_grad, row)
        grad = load(grad_ref.at[place], mask=(row < rows) & (at_grad < depth), other=0.0)
        other = load(other_ref.at[at_other, column + col], mask=(at_other < depth) & (col < width), other=0.0)
        return total + jnp.dot(
            grad.astype(jnp.float32),
            other.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    total = jax.lax.fori_loop(0, pl.cdiv(depth, k), step, jnp.zeros((m, n), jnp.float32))
    row, col = pl.program_id(0) * m + iota((m, n), 0), pl.program_id(1) * n + iota((m, n), 1)
    store(out_ref.at[row, col], total.astype(out_ref.dtype), mask=(row < rows) & (col < width))


def router_logits_grad_x(
    grad: jax.Array, weight: jax.Array, *, dtype: Any, target: str = "cuda", interpret: bool = False
) -> jax.Array:
    """dtype [T, H] = grad [T, E] @ weight [E, H], T at least 1."""
    num_tokens, (num_experts, width) = grad.shape[0], weight.shape
    config = config_for(target)
    return launch(
        functools.partial(_kernel, config=config, by_token=True, num_experts=num_experts, width=width, column=0),
        grad,
        weight,
        name="router_logits_grad_x",
        grid=grid_for(num_tokens, width, config),
        out_shape=[jax.ShapeDtypeStruct((num_tokens, width), dtype)],
        sizes={"num_tokens": num_tokens},
        num_warps=config.num_warps,
        interpret=interpret,
    )[0]


def router_logits_grad_weight(
    grad: jax.Array,
    x: jax.Array,
    *,
    dtype: Any,
    column: int = 0,
    width: int | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """dtype [E, H] = grad.T @ x[:, column : column + width] for grad [T, E] and x [T, at least column + width]."""
    num_tokens, num_experts = grad.shape
    width = x.shape[1] - column if width is None else width
    config = config_for(target)
    return launch(
        functools.partial(_kernel, config=config, by_token=False, num_experts=num_experts, width=width, column=column),
        grad,
        x,
        name="router_logits_grad_weight",
        grid=grid_for(num_experts, width, config),
        out_shape=[jax.ShapeDtypeStruct((num_experts, width), dtype)],
        sizes={"num_tokens": num_tokens},
        num_warps=config.num_warps,
        interpret=interpret,
    )[0]
