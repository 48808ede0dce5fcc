"""Every tile and every cut of H of the router's matrix product, interpreted; and which of them is taken when."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.router_logits import (
    MOST_SLICES,
    Config,
    _parts,
    config_for,
    grid_for,
    kind_of,
    router_logits,
    router_logits_sum,
    slices_for,
    steps_for,
)
from tests.cases import BF16, F16, F32, normal

PAIRS = [(BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32), (BF16, F16), (F32, F32)]
KINDS = ["tensor", "tensor", "parts", "parts", "exact", "exact", "exact"]
TILE, PLAIN = Config(16, 32, 32, 4, 1), Config(2, 2, 32, 4, 1, plain=True)


def product(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize(("pair", "kind"), list(zip(PAIRS, KINDS, strict=True)))
def test_kinds(pair: tuple[Any, Any], kind: str) -> None:
    assert kind_of(*map(jnp.dtype, pair)) == kind
    assert kind_of(*pair) == kind


@pytest.mark.in_ci(slices=7)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("config", "slices"), [(PLAIN, 1), (TILE, 1), (TILE, 3), (TILE, 7)])
@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [(1, 1, 160), (33, 60, 139)],  # 5 steps: slices that are empty, or whose last step is ragged
)
def test_every_way(pair: tuple[Any, Any], config: Config, slices: int, tokens: int, experts: int, width: int) -> None:
    """Rows lie in a wider array, of NaN elsewhere."""
    x, weight = normal(0, tokens, width, dtype=pair[0]), normal(1, experts, width, dtype=pair[1])
    wide = jnp.full((tokens, width + 20), jnp.nan, x.dtype).at[:, 8 : 8 + width].set(x)
    got = router_logits(wide, weight, column=8, config=config, slices=slices, interpret=True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, product(x, weight), rtol=1e-5, atol=2e-5)


def test_long_rows_go_in_rounds() -> None:
    x, weight = normal(0, 2, 700), normal(1, 3, 700)  # 22 chunks: 3 rounds of 8
    got = router_logits(x, weight, config=PLAIN, slices=1, interpret=True)
    np.testing.assert_allclose(got, product(x, weight), rtol=1e-5, atol=1e-4)


def test_a_token_does_not_depend_on_the_others() -> None:
    """Bit for bit, as long as there are as many."""
    x, weight = normal(0, 20, 100, dtype=BF16), normal(1, 30, 100)
    order = np.random.default_rng(0).permutation(20)
    for config, slices in ((PLAIN, 1), (TILE, 1), (TILE, 3)):
        run = lambda x, config=config, slices=slices: router_logits(
            x, weight, config=config, slices=slices, interpret=True
        )
        np.testing.assert_array_equal(run(x)[order], run(x[order]))
        np.testing.assert_array_equal(run(x.at[1:].set(jnp.nan))[0], run(x)[0])


def test_parts_are_the_number() -> None:
    """24 bits in three times 8, also compiled, where a compiler may take casts there and back for nothing."""
    a = normal(0, 4096) * 10.0 ** normal(1, 4096).astype(jnp.int32)
    a = jnp.concatenate([a, jnp.float32([0.0, 1.0, -1.0, 3e38, 1e-30, 1 + 2**-23, 1 - 2**-24])])
    for split in (_parts, jax.jit(_parts)):
        parts = split(a)
        assert all(part.dtype == BF16 for part in parts)
        np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), np.asarray(a, np.float64))
    assert np.isnan(sum(np.asarray(part, np.float32) for part in _parts(jnp.float32([jnp.nan])))[0])


def test_parts_are_as_good_as_float32() -> None:
    """At full width, against float64."""
    x, weight = normal(0, 16, 7168, dtype=BF16), normal(1, 16, 7168)
    config = Config(16, 16, 128, 4, 1)
    got = router_logits(x, weight, config=config, slices=14, interpret=True)
    plain = router_logits(x.astype(F32), weight, config=config, slices=14, interpret=True)
    want = product(x, weight)
    error, error_of_plain = (np.abs(np.asarray(a, np.float64) - want).max() for a in (got, plain))
    assert error < 2 * error_of_plain
    two = product(x, sum(part.astype(F32) for part in _parts(weight)[:2]))
    assert np.abs(two - want).max() > error_of_plain, "two parts would not do"


SIZES = [*range(1, 300), 512, 1000, 2048, 4096, 5000, 8192, 12288, 16384, 40960, 200_000]


@pytest.mark.parametrize("target", ["cuda", "rocm"])
@pytest.mark.parametrize("kind", ["tensor", "parts", "exact"])
@pytest.mark.parametrize(("experts", "width"), [(256, 7168), (8, 4096), (60, 1001), (1024, 2048), (1, 1)])
def test_plans(experts: int, width: int, kind: str, target: str) -> None:
    """Few compilations; programs enough; slices that hold all of H."""
    configs = set()
    for tokens in SIZES:
        config = config_for(tokens, experts, width, kind, target)
        configs.add(config)
        slices = slices_for(tokens, experts, width, config)
        assert 1 <= slices <= MOST_SLICES
        steps, per = -(-width // config.depth), steps_for(width, slices, config)
        assert (slices - 1) * per < steps <= slices * per, "none is empty"
        x, y = grid_for(tokens, experts, slices, config)
        assert y == slices
        assert x * config.tokens * config.experts >= tokens * experts
        if slices > 1:
            assert x * y <= config.programs
            assert slices * tokens * experts * 4 < 2**31, "scratch memory that 32-bit offsets reach"
        if (experts, width) == (256, 7168):
            assert x * y >= 56
    assert len(configs) <= 5


@pytest.mark.parametrize(("tokens", "experts", "slices"), [(5, 60, 2), (3, 300, 17), (5, 256, 32), (7, 1, 16)])
def test_slices_are_added_in_order(tokens: int, experts: int, slices: int) -> None:
    sums = normal(0, slices * tokens, experts)
    want = np.zeros((tokens, experts), np.float32)
    for part in np.asarray(sums).reshape(slices, tokens, experts):
        want += part
    np.testing.assert_array_equal(router_logits_sum(sums, slices=slices, interpret=True), want)
