"""The language model of the demo: a small pre-norm transformer over bytes, with `jaxmoe.moe` for feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import RoutingConfig
from jaxmoe.layer import MoEParams, moe

VOCABULARY = 256
Params = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. The routing is DeepSeek-V3's, with fewer experts."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    hidden: int = 64  # of one expert
    context: int = 128
    lookback: int = 4
    routing: RoutingConfig = RoutingConfig(
        num_experts=16, top_k=2, n_group=4, topk_group=2, routed_scaling_factor=2.5, n_shared_experts=1
    )


class Block(NamedTuple):
    """What a block's MoE layer was given, and how it was spread."""

    x: jax.Array  # float32 [tokens, width]
    load: jax.Array  # int32 [num_expert_ids]


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Random parameters in float32; the balancing bias starts at zero."""
    keys = iter(jax.random.split(key, 2 + 5 * config.layers))
    width, ids = config.width, config.routing.num_expert_ids

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    def block() -> Params:
        return {
            "attention_norm": jnp.ones(width),
            "qkv": matrix(width, 3 * width),
            "out": matrix(width, width),
            "moe_norm": jnp.ones(width),
            "moe": MoEParams(
                router=matrix(width, config.routing.num_experts).T,
                bias=jnp.zeros(config.routing.num_experts),
                gate_up=matrix(ids, width, 2 * config.hidden),
                down=matrix(ids, config.hidden, width),
            ),
        }

    return {
        "embedding": jax.random.normal(next(keys), (config.lookback, VOCABULARY, width)),
        "blocks": [block() for _ in range(config.layers)],
        "norm": jnp.ones(width),
        "head": matrix(width, VOCABULARY) * 0.1,
    }


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (arXiv:2104.09864) for [batch, length, heads, size]."""
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-jnp.arange(half) / half)
    angle = (jnp.arange(x.shape[1])[:, None] * frequency)[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


def apply(
    params: Params, tokens: jax.Array, config: ModelConfig, implementation: str | None
) -> tuple[jax.Array, list[Block]]:
    """Logits [batch, length, 256] for the byte after each of tokens [batch, length], and what each MoE layer saw."""
    # Each place also embeds the bytes just before it: half a minute is too short for attention to learn to look there.
    before = jnp.stack([jnp.pad(tokens, ((0, 0), (i, 0)))[:, : tokens.shape[1]] for i in range(config.lookback)])
    x = jax.vmap(lambda table, ids: table[ids])(params["embedding"], before).sum(axis=0)
    seen = []
    for block in params["blocks"]:
        qkv = _norm(x, block["attention_norm"]) @ block["qkv"]
        q, k, v = jnp.split(qkv.reshape(*tokens.shape, 3 * config.heads, -1), 3, axis=2)
        attended = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        x = x + attended.reshape(x.shape) @ block["out"]
        rows = _norm(x, block["moe_norm"]).reshape(-1, config.width)
        y, routing = moe(rows, block["moe"], config.routing, implementation=implementation)
        x = x + y.reshape(x.shape)
        assert routing.load is not None  # `moe` always counts
        seen.append(Block(rows, routing.load))
    return _norm(x, params["norm"]) @ params["head"], seen
