"""Every way to share out the work gives the same, those too that are only chosen for more tokens than fit here."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine, route

RULE = route.Rule(12, 3, 1, 1, "sigmoid", "top2", True, 1.0, 0, 1, 1.0)


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("num_tokens", "share"), [(4, 2), (5, 3), (6, 3), (7, 3)])
def test_route_of_several_tokens_a_program(num_tokens: int, share: int) -> None:
    """Full programs, and a last one that has fewer tokens than the others."""
    each = route.config_for("cuda")
    several = dataclasses.replace(each, few=2)
    assert (route.share_for(num_tokens, each), route.share_for(num_tokens, several)) == (1, share)
    logits, bias = normal(1, num_tokens, 12), normal(2, 12)
    expected = route.route(logits, bias, num_tokens - 1, rule=RULE, config=each, clear_load=True, interpret=True)
    got = route.route(logits, bias, num_tokens - 1, rule=RULE, config=several, clear_load=True, interpret=True)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert set(np.asarray(got[1])[-1]) == {-1}
    assert np.asarray(got[1])[:-1].min() >= 0


def test_route_shares() -> None:
    config = route.config_for("cuda")
    assert [route.share_for(n, config) for n in (1, 8192, 8193, 16384, 16385, 40960)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("width", [64, 200, 513])
def test_combine_by_token(width: int) -> None:
    """The same tiles in another order: full ones, one that ends early, and several a row."""
    x, weights = normal(1, 15, width), normal(2, 5, 3)
    rows = jnp.asarray([[3, 0, 14], [-1, 2, 5], [1, 4, 6], [7, -1, -1], [8, 9, 10]], jnp.int32)
    few, many = (combine.config_for(n, width, jnp.float32, "cuda") for n in (512, 513))
    assert (few.by_token, many.by_token) == (False, True)
    expected = combine.combine(x, rows, weights, config=few, interpret=True)
    got = combine.combine(x, rows, weights, config=many, interpret=True)
    np.testing.assert_array_equal(got, expected, strict=True)
    oracle = np.where(rows[..., None] >= 0, np.asarray(x, np.float64)[rows], 0.0)
    oracle = np.sum(oracle * np.asarray(weights)[..., None], axis=1)
    np.testing.assert_allclose(got, oracle, rtol=1e-5, atol=1e-5)
