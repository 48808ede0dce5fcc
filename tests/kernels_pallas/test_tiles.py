"""Every way to share out the work gives the same, those too that are only chosen for more tokens than fit here."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine, dispatch, grouped_matmul, grouped_matmul_grad, route
from kernels_pallas.rule import Rule

RULE = Rule(12, 3, 1, 1, "sigmoid", "top2", True, 1.0, 0, 1, 1.0)


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 4), (4, 2), (5, 2), (5, 8), (7, 4)])
def test_route_however_many_tokens_a_program_takes(num_tokens: int, rows: int) -> None:
    """Full programs, and a last one that has fewer tokens; among them some that the quick search does not answer."""
    config = route.config_for(num_tokens, 12, 3, "cuda")
    logits, bias = normal(1, num_tokens, 12), normal(2, 12)
    logits = logits.at[num_tokens // 2].set(0.0).at[num_tokens // 3, 5].set(jnp.nan)
    run = lambda config: route.route(
        logits, bias, num_tokens - 1, rule=RULE, config=config, clear_load=True, interpret=True
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU rounds what is interpreted as XLA fuses it
        expected, got = run(config), run(dataclasses.replace(config, rows=rows))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert set(np.asarray(got[1])[-1]) == {-1}
    assert np.asarray(got[1])[:-1].min(initial=0) >= 0


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_slots", "tokens", "warps"),
    [
        (512, 256, 8, 1, 1),
        (513, 256, 8, 2, 2),
        (8191, 256, 8, 2, 2),
        (8192, 256, 8, 2, 1),
        (32767, 256, 8, 2, 1),
        (32768, 256, 8, 4, 1),
        (10**6, 256, 9, 2, 1),  # the slots of four would not fit on the lanes
        (10**6, 256, 16, 2, 1),
        (10**6, 256, 17, 2, 2),  # nor these, of two
        (2047, 160, 8, 2, 2),
        (2048, 160, 8, 4, 1),
        (10**6, 160, 9, 2, 1),
        (2048, 128, 8, 4, 1),
        (2048, 64, 6, 4, 1),
        (10**6, 64, 4, 4, 1),
        (513, 8, 2, 2, 2),
        (2048, 8, 2, 4, 1),
        (4096, 8, 2, 8, 1),
        (10**6, 8, 1, 8, 1),
        (32768, 384, 8, 4, 1),
        (10**6, 385, 8, 2, 1),
        (8191, 512, 10, 4, 4),
        (8192, 512, 10, 2, 1),
        (10**6, 513, 8, 1, 1),
    ],
)
def test_tokens_of_a_program(num_tokens: int, num_experts: int, num_slots: int, tokens: int, warps: int) -> None:
    """As measured on an H100 and an H200; a warp of ROCm's takes one."""
    config = route.config_for(num_tokens, num_experts, num_slots, "cuda")
    assert (config.rows, config.warps, config.lanes) == (tokens, warps, 32)
    assert config.together * config.slots(num_slots) == 32, "a slot a lane"
    elsewhere = route.config_for(num_tokens, num_experts, num_slots, "rocm")
    assert (elsewhere.together, elsewhere.lanes) == (1, 64)


@pytest.mark.parametrize("width", [64, 200, 513])
def test_combine_by_token(width: int) -> None:
    """Other tiles in another order, and of tokens some of whose slots have no row these one after another."""
    x, weights = normal(1, 15, width), normal(2, 5, 3)
    rows = jnp.asarray([[3, 0, 14], [-1, 2, 0], [1, 4, 6], [7, -1, -1], [-1, -1, -1]], jnp.int32)
    few, many = (combine.config_for(n, 3, width, jnp.float32, "cuda") for n in (512, 1025))
    assert (few.by_token, many.by_token) == (few.apart, many.apart) == (False, True)
    assert (few.pieces, many.pieces) == (1, 2 if width > 256 else 1)
    expected = combine.combine(x, rows, weights, config=few, interpret=True)
    got = combine.combine(x, rows, weights, config=many, interpret=True)
    np.testing.assert_array_equal(got, expected, strict=True)
    oracle = np.where(rows[..., None] >= 0, np.asarray(x, np.float64)[rows], 0.0)
    oracle = np.sum(oracle * np.asarray(weights)[..., None], axis=1)
    np.testing.assert_allclose(got, oracle, rtol=1e-5, atol=1e-5)


def test_columns_that_combine_takes() -> None:
    """As measured on H100s and an H200."""
    sizes = (1, 64, 65, 512, 513, 1024, 1025, 40960)
    configs = [combine.config_for(tokens, 8, 7168, jnp.bfloat16, "cuda") for tokens in sizes]
    assert [config.columns for config in configs] == [256, 256, 512, 512, 512, 512, 1024, 1024]
    assert [config.pieces for config in configs] == [1] * 6 + [2] * 2
    assert [config.apart for config in configs] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("tokens", [5, 1025])
@pytest.mark.parametrize("end", [0, 7, 15])
def test_combine_up_to_an_end(end: int, tokens: int) -> None:
    """Rows at or past it add nothing, as if they had been dropped, even where they hold NaN; of few tokens and many."""
    x, weights = normal(1, 15, 64).at[end:].set(jnp.nan), normal(2, 5, 3)
    rows = jnp.asarray([[3, 0, 14], [-1, 2, 5], [1, 4, 6], [7, -1, -1], [8, 9, 10]], jnp.int32)
    ends = jnp.asarray([end, 0], jnp.int32)
    config = combine.config_for(tokens, 3, 64, jnp.float32, "cuda")
    got = combine.combine(x, rows, weights, end=ends, config=config, interpret=True)
    wanted = combine.combine(x, jnp.where(rows < end, rows, -1), weights, config=config, interpret=True)
    np.testing.assert_array_equal(got, wanted, strict=True)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("clear_rows", [1, 4, 16, 64])
@pytest.mark.parametrize("num_rows", [6, 21, 40])
def test_dispatch_however_many_rows_a_program_clears(num_rows: int, clear_rows: int) -> None:
    """Rows without a token, one by one and side by side, in several pieces, and in a last program of fewer rows.

    Those programs leave alone what holds a token: here row 4, to which no other program writes.
    """
    x = normal(1, 2, 40)
    rows = jnp.asarray([[3, -1], [0, 5]], jnp.int32)
    slots = jnp.full(num_rows, -1, jnp.int32).at[jnp.asarray([3, 0, 5, 4])].set(jnp.asarray([0, 2, 3, 1]))
    config = dispatch.Config(columns=16, clear_rows=clear_rows, num_warps=1)
    poisoned = jnp.full((num_rows, 40), jnp.nan)
    got = dispatch.dispatch(x, rows, slots, out=poisoned, config=config, interpret=True)
    expected = np.zeros((num_rows, 40), np.float32)
    expected[[3, 0, 5]], expected[4] = np.asarray(x)[[0, 1, 1]], np.nan
    np.testing.assert_array_equal(got, expected, strict=True)


def test_rows_that_a_program_clears() -> None:
    """Few where there are few programs, and where groups are filled up; as measured on an H200."""

    def rows(tokens: int, more: int = 0, **options: Any) -> int:
        number = 8 * tokens
        return dispatch.config_for(number + more, number, 7168, jnp.bfloat16, "cuda", **options).clear_rows

    assert [rows(tokens) for tokens in (1, 128, 129, 512, 513, 40960)] == [4, 4, 8, 8, 32, 32]
    assert [rows(tokens, 63 * 32) for tokens in (1, 4096)] == [8, 8]
    assert rows(4096, clear=False) == 0


def test_dispatch_that_leaves_rows_without_a_token() -> None:
    """As they were, in a buffer that is taken over; the others are written."""
    x = normal(1, 3, 40)
    rows = jnp.asarray([[3, -1], [0, 5], [-1, -1]], jnp.int32)
    slots = jnp.full(7, -1, jnp.int32).at[jnp.asarray([3, 0, 5])].set(jnp.asarray([0, 2, 3]))
    got = dispatch.dispatch(x, rows, slots, out=jnp.full((7, 40), 7.0), clear=False, interpret=True)
    expected = np.full((7, 40), 7.0, np.float32)
    expected[[3, 0, 5]] = np.asarray(x)[[0, 1, 1]]
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize(
    ("tokens", "one_warp", "once"), [(64, False, True), (512, True, True), (3072, True, True), (4096, False, False)]
)
def test_what_rows_about_as_large_as_the_cache_change(tokens: int, one_warp: bool, once: bool) -> None:
    """7168 columns of bfloat16 and 8 slots: 7, 59, 352 and 470 MB of rows; as measured on an H100, and there alone."""
    pairs = 8 * tokens
    assert (dispatch.config_for(pairs, pairs, 7168, jnp.bfloat16, "cuda").num_warps == 1) == one_warp
    assert combine.config_for(tokens, 8, 7168, jnp.bfloat16, "cuda").once == once
    assert dispatch.config_for(pairs, pairs, 7168, jnp.bfloat16, "rocm").num_warps == 4
    assert not combine.config_for(tokens, 8, 7168, jnp.bfloat16, "rocm").once


@pytest.mark.parametrize(
    ("num_rows", "experts", "depth", "width", "gated", "columns", "stages"),
    [
        (64, 32, 7168, 2048, True, 64, 5),  # 16 rows a tile, a long sum
        (64, 32, 2048, 7168, False, 128, 4),  # a shorter one
        (512, 32, 7168, 2048, True, 64, 3),  # 32 rows
        (1024, 32, 7168, 2048, True, 64, 4),  # 64 rows
        (1, 32, 7168, 2048, True, 16, 6),  # 32 programs with tiles of 128 columns, 128 with these
        (1, 32, 2048, 7168, False, 64, 6),  # 56
        (2, 8, 14336, 4096, False, 64, 6),  # 64
        (3, 8, 14336, 4096, False, 128, 5),  # 96
        (3, 32, 7168, 2048, True, 64, 5),  # 96: gate and up are both counted
        (1, 1, 4096, 64, False, 32, 6),  # never narrower
    ],
)
def test_tiles_of_products_that_read_the_weights(
    num_rows: int, experts: int, depth: int, width: int, gated: bool, columns: int, stages: int
) -> None:
    """Many bytes on their way, and narrow tiles where there would be few programs; as measured on an H200."""
    config = grouped_matmul.config_for(num_rows, experts, depth, width, jnp.bfloat16, "cuda", gated=gated)
    assert (config.columns, config.num_stages) == (columns, stages)
    assert grouped_matmul.config_for(num_rows, experts, depth, width, jnp.bfloat16, "rocm", gated=gated).num_stages == 2


@pytest.mark.parametrize(("num_rows", "few"), [(1, True), (8192, True), (8193, False), (32768, False)])
def test_tiles_of_weight_gradients(num_rows: int, few: bool) -> None:
    """256 rows an expert and fewer take small programs, as measured on an H200, and there alone."""
    config = grouped_matmul_grad.config_for(num_rows, 32, 7168, 4096, jnp.bfloat16, "cuda")
    sides = (config.left, config.right, config.rows, config.num_warps)
    assert sides == ((128, 128, 32, 4) if few else (128, 256, 64, 8))
    one = grouped_matmul_grad.config_for(1, 32, 7168, 4096, jnp.bfloat16, "rocm")
    assert one == grouped_matmul_grad.config_for(32768, 32, 7168, 4096, jnp.bfloat16, "rocm")


@pytest.mark.parametrize(("depth", "together"), [(2048, 16), (4096, 16), (4104, 8), (7168, 8)])
def test_tiles_of_rows_that_take_turns(depth: int, together: int) -> None:
    """As measured on an H200, and there alone."""
    config = grouped_matmul.config_for(32768, 32, depth, 7168, jnp.bfloat16, "cuda")
    assert (config.together, config.columns) == (together, 256)
    assert grouped_matmul.config_for(32768, 32, depth, 7168, jnp.bfloat16, "rocm").together == 8
