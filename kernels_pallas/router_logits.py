"""The router's matrix product, x @ weight.T in float32, reading both operands in the dtype they are stored in."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.launch import iota, launch, load, next_power_of_2, store


@dataclass(frozen=True)
class Config:
    tokens: int
    experts: int
    depth: int  # of one step along H
    num_warps: int
    num_stages: int


def config_for(num_tokens: int, num_experts: int, width: int, exact: bool, target: str) -> Config:
    """Which tile to use; `exact` is for float32 operands, which go without tensor cores."""
    experts = min(16 if num_tokens <= 64 else 64, max(16, next_power_of_2(num_experts)))
    tokens = min(64, max(16, next_power_of_2(num_tokens)))
    depth = min(32 if exact else 128, max(16, next_power_of_2(width)))
    return Config(tokens, experts, depth, num_warps=4, num_stages=1 if target == "rocm" else 3)


def grid_for(num_tokens: int, num_experts: int, config: Config) -> tuple[int, int]:
    """The programs of the launch."""
    return pl.cdiv(num_tokens, config.tokens), pl.cdiv(num_experts, config.experts)


def _kernel(
    x_ref: Any,
    weight_ref: Any,
    out_ref: Any,
    *,
    config: Config,
    num_experts: int,
    width: int,
    column: int,
    num_tokens: Any,
) -> None:
    m, n, k = config.tokens, config.experts, config.depth
    token = pl.program_id(0) * m + iota((m, k), 0)
    expert = pl.program_id(1) * n + iota((k, n), 1)
    same = x_ref.dtype == weight_ref.dtype and x_ref.dtype != jnp.float32
    precision = None if same else jax.lax.Precision.HIGHEST

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at_x, at_w = i * k + iota((m, k), 1), i * k + iota((k, n), 0)
        x = load(x_ref.at[token, column + at_x], mask=(token < num_tokens) & (at_x < width), other=0.0)
        w = load(weight_ref.at[expert, at_w], mask=(expert < num_experts) & (at_w < width), other=0.0)
        if not same:  # in registers
            x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        return total + jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, pl.cdiv(width, k), step, jnp.zeros((m, n), jnp.float32))
    token = pl.program_id(0) * m + iota((m, n), 0)
    expert = pl.program_id(1) * n + iota((m, n), 1)
    store(out_ref.at[token, expert], total, mask=(token < num_tokens) & (expert < num_experts))


def router_logits(
    x: jax.Array,
    weight: jax.Array,
    *,
    column: int = 0,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> jax.Array:
    """float32 [T, E] = x[:, column : column + H] @ weight.T for weight [E, H]; any two float dtypes, T at least 1."""
    num_tokens = x.shape[0]
    num_experts, width = weight.shape
    exact = x.dtype != weight.dtype or x.dtype == jnp.float32
    config = config or config_for(num_tokens, num_experts, width, exact, target)
    return launch(
        functools.partial(_kernel, config=config, num_experts=num_experts, width=width, column=column),
        x,
        weight,
        name="router_logits",
        grid=grid_for(num_tokens, num_experts, config),
        sizes={"num_tokens": num_tokens},
        out_shape=[jax.ShapeDtypeStruct((num_tokens, num_experts), jnp.float32)],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )[0]
