"""Auxiliary losses that even out the load, from what routing already has: logits and ids."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.config import RoutingConfig, as_int
from jaxmoe.implementation import check_not_sharded
from jaxmoe.routing import Routing


def _log_scores(x: jax.Array, scoring_func: str) -> jax.Array:
    """The logarithm of the scores of float32 logits, up to a constant a token."""
    if scoring_func == "softmax":
        return x
    if scoring_func == "sigmoid":
        return jax.nn.log_sigmoid(x)
    low = x < -30.0  # there softplus(x) is exp(x), and soon too small for float32
    return 0.5 * jnp.where(low, x, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, x))))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _mean_loss(
    logits: jax.Array, experts: jax.Array, config: RoutingConfig, num_sequences: int, even: int
) -> jax.Array:
    """E / even * sum over experts of share of choices * mean probability: the mean of sequences with valid tokens.

    All of it is one computation: what follows one would bring a number of Python's to the device.
    """
    num_tokens, num_experts = logits.shape
    valid = jnp.any((experts >= 0) & (experts < config.num_expert_ids), axis=1, keepdims=True)
    # Cleared first: the gradient of a padding token must be zero, though its logits be NaN.
    x = jnp.where(valid, logits.astype(jnp.float32), 0.0)
    # A softmax of log scores is score / sum(scores), also where every score underflows.
    probability = jnp.where(valid, jax.nn.softmax(_log_scores(x, config.scoring_func), axis=1), 0.0)

    length = num_tokens // num_sequences if num_sequences else 0
    sequence = jnp.repeat(jnp.arange(num_sequences), length, total_repeat_length=num_tokens)[:, None]
    outside = num_sequences * num_experts
    chosen = experts[:, : config.top_k]
    # Of each pair alone: a token may have lost some, and an index of -1 would be the expert before.
    index = jnp.where((chosen >= 0) & (chosen < num_experts), sequence * num_experts + chosen, outside)
    counts = jnp.zeros(outside, jnp.int32).at[index].add(1, mode="drop").reshape(num_sequences, num_experts)
    tokens = jnp.sum(valid.reshape(num_sequences, length), axis=1)
    per_token = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)[:, None]
    mean = jnp.sum(probability.reshape(num_sequences, length, num_experts), axis=1) * per_token
    losses = num_experts * jnp.sum(counts.astype(jnp.float32) * per_token * mean, axis=1)
    return jnp.sum(losses) / (even * jnp.maximum(jnp.sum(tokens > 0), 1))


def _check(logits: jax.Array, routing: Routing, config: RoutingConfig) -> None:
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    if not isinstance(routing, Routing):
        raise ValueError(f"routing: expected a Routing, got {type(routing).__name__}")
    check_array("logits", logits, ("T", config.num_experts))
    check_array("routing.experts", routing.experts, (logits.shape[0], config.num_slots), (jnp.int32,))
    arguments.check_one_device(logits=logits, routing=routing)
    check_not_sharded(logits=logits, routing=routing)


def switch_loss(logits: jax.Array, routing: Routing, config: RoutingConfig) -> jax.Array:
    """The load balancing loss of Switch Transformer, for any top_k: E * sum over experts of f * P.

    f is the number of tokens that chose the expert over the number of tokens; P the mean over tokens of score /
    sum(scores). A perfectly even load costs top_k (1 for the top_k = 1 of the paper), as in Hugging Face transformers.

    Args:
      logits: [T, E] bfloat16, float16 or float32. T may be 0: the loss is 0 then.
      routing: what `route` made of them. Shared experts do not count, nor do pairs that were dropped since (id -1); a
        token is valid, and counts in the number of tokens, where any of its slots still has an id.
      config: what `route` was given.

    Returns:
      float32 scalar, to be multiplied by a factor of the caller's. Differentiable in logits, through P.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Fedus et al., arXiv:2101.03961, equations 4 to 6.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=4, top_k=1, scoring_func="softmax")
      >>> even, uneven = 50 * jnp.eye(4), 50 * jnp.eye(4)[jnp.array([0, 0, 0, 1])]
      >>> [float(jaxmoe.switch_loss(x, jaxmoe.route(x, config=config), config)) for x in (even, uneven)]
      [1.0, 2.5]
    """
    _check(logits, routing, config)
    return _mean_loss(logits, routing.experts, config, 1, 1)


def sequence_balance_loss(
    logits: jax.Array, routing: Routing, config: RoutingConfig, *, sequence_length: int
) -> jax.Array:
    """The sequence-wise balance loss of DeepSeek-V3: for every sequence sum over experts of f * P; then their mean.

    f is E / (top_k * T) times the number of tokens of the sequence that chose the expert; P the mean over its tokens of
    score / sum(scores); T the number of its valid tokens. A perfectly even load costs 1.

    f counts the experts that were chosen, with the bias and within the kept groups. The paper's equation 18 reads as
    the top k of the scores alone: for that pass `route(logits, config=...)` of a config with one group and no bias.

    Args:
      logits: [T, E] bfloat16, float16 or float32: the sequences one after another. T may be 0: the loss is 0 then.
      routing: what `route` made of them. Shared experts do not count, nor do pairs that were dropped since (id -1),
        nor does a sequence without a valid token; a token is valid where any of its slots still has an id.
      config: what `route` was given.
      sequence_length: how many tokens a sequence has, padding included; a divisor of T.

    Returns:
      float32 scalar, to be multiplied by a factor of the caller's (the paper's is 0.0001). Differentiable in logits,
      through P.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=2, top_k=1, scoring_func="softmax")
      >>> logits = 50 * jnp.eye(2)[jnp.array([0, 0, 1, 1])]  # even over the batch, not within a sequence
      >>> routing = jaxmoe.route(logits, config=config)
      >>> [float(jaxmoe.sequence_balance_loss(logits, routing, config, sequence_length=n)) for n in (4, 2)]
      [1.0, 2.0]
    """
    _check(logits, routing, config)
    num_tokens = logits.shape[0]
    sequence_length = as_int(sequence_length)
    if type(sequence_length) is not int or sequence_length < 1 or num_tokens % sequence_length:
        raise ValueError(f"sequence_length: expected a positive divisor of T={num_tokens}, got {sequence_length!r}")
    return _mean_loss(logits, routing.experts, config, num_tokens // sequence_length, config.top_k)
