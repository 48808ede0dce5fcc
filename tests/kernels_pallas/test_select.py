"""Selection by key: the parts that the routing cases reach only together."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import score, select


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_sorting_network_sorts(n: int) -> None:
    """It sorts every sequence of zeros and ones, so it sorts every sequence."""
    pairs = select._sorting_network(n)
    values = np.array(list(itertools.product([0, 1], repeat=n)))
    for a, b in pairs:
        assert a < b
        values[:, a], values[:, b] = np.maximum(values[:, a], values[:, b]), np.minimum(values[:, a], values[:, b])
    assert (np.diff(values, axis=1) <= 0).all()


def falling(key: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-key.astype(np.int64), kind="stable")[:k]


@pytest.mark.parametrize(
    ("n", "k", "lanes"),
    [(1, 1, 32), (2, 2, 32), (16, 5, 32), (64, 8, 32), (64, 8, 64), (256, 8, 32), (512, 22, 64), (1024, 32, 32)],
)
def test_top_k(n: int, k: int, lanes: int) -> None:
    """From keys that are nearly all equal, or differ in bits that are given up, to keys far apart."""
    pick = jax.jit(lambda key: select.top_k(key[None], k, score_slots(k), lanes=lanes, spare_bits=0)[0])
    for spread in (1, 3, 300, 2**31 - 1):
        key = np.random.default_rng(n + spread).integers(-spread, spread, n).astype(np.int32)
        found = pick(jnp.asarray(key))
        np.testing.assert_array_equal(found[:k], falling(key, k))
        assert not found[k:].any()


def score_slots(k: int) -> int:
    return 1 << (k - 1).bit_length()


def test_bits_that_decide_are_not_spare() -> None:
    """What `spare_bits` promises matters: with a false promise the result is wrong."""
    key = np.arange(64, dtype=np.int32)
    found = select.top_k(jnp.asarray(key)[None], 4, 4, lanes=32, spare_bits=6)
    assert found[0].tolist() != [63, 62, 61, 60]
    found = select.top_k(jnp.asarray(key << 6)[None], 4, 4, lanes=32, spare_bits=6)
    assert found[0].tolist() == [63, 62, 61, 60]


@pytest.mark.parametrize("groups", [1, 2, 8, 32, 64, 1024])
@pytest.mark.parametrize("spread", [2, 2**31 - 1])
def test_best_groups(groups: int, spread: int) -> None:
    """Both ways to find the best groups agree with a stable sort, ties included."""
    key = np.random.default_rng(groups).integers(-spread, spread, groups).astype(np.int32)
    for k in {1, max(1, groups // 3), groups}:
        want = np.zeros(groups, bool)
        want[falling(key, k)] = True
        for best in (select._best_of_few, select._best_of_many):
            if groups > 64 and best is select._best_of_few:
                continue
            np.testing.assert_array_equal(best(jnp.asarray(key)[None], k)[0], want)


def test_keys_order_as_numbers_do() -> None:
    """NaN of either sign below everything, -0.0 (made 0.0) equal to 0.0; decode gives the number back."""
    values = np.array([np.nan, -np.nan, -np.inf, -3e38, -1.0, -1e-37, 0.0, 1e-37, 1.0, 3e38, np.inf], np.float32)
    key = np.asarray(score.encode(score.plus_zero(jnp.asarray(values))))
    assert key.dtype == np.int32
    assert key[2] > key[0] == key[1] == score.NAN_KEY > score.EXCLUDED
    assert (np.diff(key[2:].astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(score.decode(jnp.asarray(key)), values)
    assert score.encode(score.plus_zero(jnp.float32(-0.0))) == score.encode(jnp.float32(0.0))
