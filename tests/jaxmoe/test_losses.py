"""The auxiliary losses against plain statements of their formulas in float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import Routing, RoutingConfig
from tests.cases import BF16, normal

LENGTH = 6
CONFIGS = {
    "sigmoid, groups, shared": RoutingConfig(num_experts=12, top_k=3, n_group=3, topk_group=2, n_shared_experts=2),
    "softmax, odd E": RoutingConfig(num_experts=7, top_k=2, scoring_func="softmax"),
    "softplus, K=E": RoutingConfig(num_experts=3, top_k=3, scoring_func="sqrtsoftplus"),
    "one expert": RoutingConfig(num_experts=1, top_k=1),
}
SCORES: dict[str, Any] = {
    "softmax": np.exp,  # divided by the sum below
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrtsoftplus": lambda x: np.sqrt(np.log1p(np.exp(x))),
}


def shares(logits: np.ndarray, ids: np.ndarray, config: RoutingConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """(choices of each expert, sum of score / sum(scores), valid tokens), token by token."""
    counts, total, tokens = np.zeros(config.num_experts), np.zeros(config.num_experts), 0
    for x, chosen in zip(logits.astype(np.float64), ids, strict=True):
        if (chosen < 0).all():
            continue
        score = SCORES[config.scoring_func](x)
        total += score / score.sum()
        for expert in chosen[: config.top_k]:
            counts[expert] += expert >= 0
        tokens += 1
    return counts, total, tokens


def expected_switch(logits: np.ndarray, ids: np.ndarray, config: RoutingConfig) -> float:
    counts, total, tokens = shares(logits, ids, config)
    return float(config.num_experts * np.sum(counts * total) / tokens**2)


def expected_sequence(logits: np.ndarray, ids: np.ndarray, config: RoutingConfig) -> float:
    losses = []
    for first in range(0, len(logits), LENGTH):
        part = slice(first, first + LENGTH)
        counts, total, tokens = shares(logits[part], ids[part], config)
        if tokens:
            f, p = config.num_experts / (config.top_k * tokens) * counts, total / tokens
            losses.append(np.sum(f * p))
    return float(np.mean(losses))


def routed(logits: np.ndarray, config: RoutingConfig, valid: int) -> Routing:
    """Some routing of these logits, not theirs by any rule: the losses take the ids as they come."""
    ids = np.argsort(np.random.default_rng(0).random(logits.shape), axis=1)[:, : config.top_k]
    shared = np.arange(config.num_experts, config.num_expert_ids)
    ids = np.concatenate([ids, np.tile(shared, (len(ids), 1))], axis=1).astype(np.int32)
    ids[valid:] = -1
    return Routing(jnp.zeros(ids.shape), jnp.asarray(ids), None)


def both(logits: jax.Array, routing: Routing, config: RoutingConfig) -> tuple[jax.Array, jax.Array]:
    sequence = jaxmoe.sequence_balance_loss(logits, routing, config, sequence_length=LENGTH)
    return jaxmoe.switch_loss(logits, routing, config), sequence


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_against_the_formulas(name: str) -> None:
    """Whole sequences, a half one, sequences of padding; what stands in the padding does not matter, NaN included."""
    config = CONFIGS[name]
    losses = jax.jit(lambda x, routing: both(x, routing, config))
    for valid in (24, 15, 6, 1):
        logits = 2 * np.asarray(normal(0, 24, config.num_experts))
        logits[valid:] = np.nan
        routing = routed(logits, config, valid)
        ids = np.asarray(routing.experts)
        want = expected_switch(logits, ids, config), expected_sequence(logits, ids, config)
        np.testing.assert_allclose(losses(logits, routing), want, rtol=2e-6)
        if config.num_experts > config.top_k and valid > 1:  # else every choice costs the same
            swapped = routing._replace(experts=jnp.asarray(np.where(ids < 0, -1, (ids + 1) % config.num_experts)))
            for wrong in ((0.0, 0.0), losses(logits, swapped)):
                for got, expected in zip(wrong, want, strict=True):
                    assert abs(float(got) - expected) > 1e-4


def dropped(routing: Routing, seed: int) -> Routing:
    """Some pairs less: of some tokens the first, of some a shared expert, of some all."""
    gone = np.random.default_rng(seed).random(routing.experts.shape) < 0.4
    return routing._replace(experts=jnp.where(gone, -1, routing.experts))


@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_that_were_dropped(name: str) -> None:
    """They count for no expert of any sequence, and a token is there while one pair of it is."""
    config = CONFIGS[name]
    losses = jax.jit(lambda x, routing: both(x, routing, config))
    for seed in range(3):
        routing = dropped(routed(np.zeros((24, config.num_experts)), config, 20), seed)
        ids = np.asarray(routing.experts)
        logits = 2 * np.array(normal(seed, 24, config.num_experts))
        logits[(ids < 0).all(axis=1)] = np.nan
        want = expected_switch(logits, ids, config), expected_sequence(logits, ids, config)
        np.testing.assert_allclose(losses(logits, routing), want, rtol=2e-6)
        outside = jnp.where(routing.experts < 0, config.num_expert_ids, routing.experts)  # as `plan_dispatch` has it
        np.testing.assert_allclose(losses(logits, routing._replace(experts=outside)), want, rtol=2e-6)


def test_dropped_pairs_by_hand() -> None:
    """All probabilities 1/4: 4 * (2 + 2 + 1 + 1) / 4 * 1/4; of two sequences the mean of 4 * 1/4 and 2 * 1/4."""
    config = RoutingConfig(num_experts=4, top_k=2, scoring_func="softmax")
    ids = jnp.array([[0, 1], [2, 3], [0, -1], [1, -1]], jnp.int32)
    for experts in (ids, ids[:, ::-1]):
        routing = Routing(jnp.zeros((4, 2)), experts, None)
        assert float(jaxmoe.switch_loss(jnp.zeros((4, 4)), routing, config)) == 1.5
        assert float(jaxmoe.sequence_balance_loss(jnp.zeros((4, 4)), routing, config, sequence_length=2)) == 0.75


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "one expert"])
def test_gradients_against_finite_differences(name: str, drop: bool) -> None:
    """Through the probabilities alone: the choices are held; padding gets exact zeros."""
    config = CONFIGS[name]
    logits = np.array(normal(0, 18, config.num_experts))
    routing = routed(logits, config, 10)
    if drop:
        routing = dropped(routing, 0)
    exact, ids = logits.astype(np.float64), np.asarray(routing.experts)
    direction = np.asarray(normal(1, *logits.shape), np.float64)
    logits[10:] = np.nan
    grads = jax.jit(jax.jacrev(lambda x: both(x, routing, config)))(logits)
    for grad, formula in zip(grads, (expected_switch, expected_sequence), strict=True):
        assert not np.asarray(grad[10:]).any()
        ends = [formula(exact + step * direction, ids, config) for step in (1e-5, -1e-5)]
        numeric = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(grad, np.float64) * direction), numeric, rtol=1e-4, atol=1e-7)
        assert (abs(numeric) > 1e-4) == (drop or config.top_k < config.num_experts)  # else every choice costs the same


def test_losses_of_an_even_load() -> None:
    """What the docstrings say that it costs: top_k, and 1."""
    config = RoutingConfig(num_experts=6, top_k=2)
    logits = np.asarray(5.0 * (np.eye(6) + np.roll(np.eye(6), 1, axis=1)), np.float32)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :2].astype(np.int32)
    routing = Routing(jnp.zeros((6, 2)), jnp.asarray(ids), None)
    np.testing.assert_allclose(both(logits, routing, config), (2.0, 1.0), rtol=1e-6)


@pytest.mark.parametrize("scoring_func", SCORES)
def test_scores_that_underflow(scoring_func: str) -> None:
    config = RoutingConfig(num_experts=4, top_k=2, scoring_func=scoring_func)
    logits = np.full((LENGTH, 4), -200.0, np.float32)
    routing = routed(logits, config, LENGTH)
    np.testing.assert_allclose(both(logits, routing, config), (2.0, 1.0), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jaxmoe.switch_loss(x, routing, config))(logits)).all()


def test_equation_18_to_the_letter() -> None:
    """As the docstring says: ids of a routing without bias and groups count the top k of the scores."""
    config = CONFIGS["sigmoid, groups, shared"]
    plain = dataclasses.replace(config, n_group=1, topk_group=1)
    logits = normal(0, 12, 12)
    top = np.argsort(-np.asarray(logits), axis=1)[:, :3]
    got = jaxmoe.sequence_balance_loss(logits, jaxmoe.route(logits, config=plain), config, sequence_length=LENGTH)
    np.testing.assert_allclose(got, expected_sequence(np.asarray(logits), top, config), rtol=2e-6)


@pytest.mark.parametrize("valid", [0, None])
def test_losses_of_no_token(valid: int | None) -> None:
    config = CONFIGS["softmax, odd E"]
    logits = normal(0, 0 if valid is None else LENGTH, 7, dtype=BF16)
    routing = routed(np.asarray(logits), config, 0)
    assert [(loss.dtype, float(loss)) for loss in both(logits, routing, config)] == [(jnp.float32, 0.0)] * 2
    for grad in jax.jacrev(lambda x: both(x, routing, config))(logits):
        assert (grad.shape, grad.dtype) == (logits.shape, BF16)
        assert not np.asarray(grad, np.float32).any()


def test_nothing_comes_from_the_host() -> None:
    """Arrays on the device suffice: a number of Python's would have to be copied to it in every step."""
    config = CONFIGS["softmax, odd E"]
    logits = jnp.zeros((6, 7))
    routing = jax.device_put(routed(np.zeros((6, 7)), config, 6))
    losses = (jaxmoe.switch_loss, functools.partial(jaxmoe.sequence_balance_loss, sequence_length=np.int64(3)))
    for loss in losses:
        with jax.transfer_guard("disallow"):
            loss(logits, routing, config).block_until_ready()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": jnp.zeros((6, 8))}, r"logits: expected .*\[T, 7\], got float32\[6, 8\]"),
        ({"logits": jnp.zeros((5, 7))}, r"routing.experts: expected int32 \[5, 2\], got int32\[6, 2\]"),
        ({"routing": (1, 2, 3)}, r"routing: expected a Routing, got tuple"),
        ({"config": {}}, r"config: expected a RoutingConfig, got dict"),
        ({"sequence_length": 4}, r"sequence_length: expected a positive divisor of T=6, got 4"),
        ({"sequence_length": 0}, r"sequence_length: expected a positive divisor of T=6, got 0"),
        ({"sequence_length": True}, r"sequence_length: expected a positive divisor of T=6, got True"),
    ],
)
def test_wrong_input(changed: dict[str, Any], message: str) -> None:
    config = CONFIGS["softmax, odd E"]
    logits = jnp.zeros((6, 7))
    given = {"logits": logits, "routing": routed(np.zeros((6, 7)), config, 6), "config": config} | changed
    length = given.pop("sequence_length", None)
    if length is None:
        with pytest.raises(ValueError, match=message):
            jaxmoe.switch_loss(**given)
    with pytest.raises(ValueError, match=message):
        jaxmoe.sequence_balance_loss(**given, sequence_length=6 if length is None else length)
