"""Grouped matmul of blocks by Hopper's copy engine: interpreted and lowered; on a GPU run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul_hopper as kernels
from kernels_pallas.grouped_matmul_hopper import TILE, Config
from kernels_pallas.hopper import BLOCK
from tests.cases import BF16, F16, F32, normal
from tests.jaxmoe.test_grouped_matmul import close, product
from tests.kernels_pallas.on_hopper import (
    MULTIPROCESSORS,
    check_lowers,
    interpreted,
    new_jax,
    on_hopper,
    poison,
)

I32 = jnp.int32
FEW = Config(256, 2, num_stages=2)


@dataclass(frozen=True)
class Case:
    """Groups of whole blocks of rows."""

    why: str
    sizes: tuple[int, ...]
    rows: int
    depth: int = 128
    width: int = 512


CASES = [
    Case("whole tiles and half ones, an empty group", (128, 64, 0, 192), 384),
    Case("rows behind the last group", (64, 128), 384),
    Case("empty groups at the ends, one block", (0, 64, 0), 64),
    Case("no group has a row", (0, 0), 128),
    Case("one huge group, odd E, parts that take turns", (0, 0, 704), 768),
    Case("many columns, an odd number of steps", (64, 320), 384, 192, 1536),
    Case("one step", (128, 64), 256, 64),
    Case("more steps than a result has pieces", (128, 64, 128), 320, 320),
    Case("experts in and out of order, some with as many rows", (64, 192, 128, 64, 256, 0, 192), 896),
]


def check(case: Case, dtype: Any, run: Callable[..., jax.Array], transposed: bool) -> None:
    """Rows of no group are not numbers, and come out as zeros."""
    shape = (case.width, case.depth) if transposed else (case.depth, case.width)
    rows = normal(0, case.rows, case.depth, dtype=dtype).at[sum(case.sizes) :].set(jnp.nan)
    weight = normal(1, len(case.sizes), *shape, dtype=dtype, scale=case.depth**-0.5)
    got = run(rows, weight, jnp.array(case.sizes, I32), transposed=transposed)
    close(got, product(rows, weight, case.sizes, transposed), dtype)


@new_jax
@pytest.mark.parametrize(
    ("case", "config", "dtype", "transposed"),
    [
        *((case, FEW, BF16, False) for case in CASES),
        *((case, FEW, BF16, True) for case in CASES[:2]),
        (CASES[0], Config(256, 8, num_stages=3, stores=1), F16, True),
        (CASES[0], Config(256, 1, num_stages=4, stores=4), F16, False),
    ],
    ids=lambda value: value.why if isinstance(value, Case) else "",
)
def test_interpreted(case: Case, config: Config, dtype: Any, transposed: bool) -> None:
    """With few stages and programs, so that each is used again and again; results nobody wrote are NaN."""
    options: dict[str, Any] = {"programs": 3, "config": config, "interpret": interpreted()}
    check(case, dtype, functools.partial(kernels.grouped_matmul, **options), transposed)


@new_jax
@pytest.mark.parametrize("case", CASES[-1:], ids=lambda case: case.why)
def test_interpreted_large_experts_first(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an expert's weights do not fit into the cache."""
    seen: list[bool] = []
    of_blocks = kernels.experts_of_blocks

    def experts_of_blocks(*args: Any, large_first: bool) -> jax.Array:
        seen.append(large_first)
        return of_blocks(*args, large_first=large_first)

    monkeypatch.setattr(kernels, "experts_of_blocks", experts_of_blocks)
    options: dict[str, Any] = {"programs": 3, "config": FEW, "interpret": interpreted()}
    size = case.depth * case.width * 2
    for cache in (size, size - 1):
        monkeypatch.setattr(kernels, "CACHE", cache)
        check(case, BF16, functools.partial(kernels.grouped_matmul, **options), False)
    assert seen == [False, True]


@new_jax
@pytest.mark.parametrize("case", [c for c in CASES if sum(c.sizes) < c.rows], ids=lambda case: case.why)
def test_rows_behind_the_last_group_are_left(case: Case) -> None:
    """Where nobody reads them: they stay what nobody wrote, NaN; the others are what they are else."""
    rows, sizes = normal(0, case.rows, case.depth, dtype=BF16), jnp.array(case.sizes, I32)
    weight = normal(1, len(case.sizes), case.depth, case.width, dtype=BF16)
    options: dict[str, Any] = {"programs": 3, "config": FEW, "interpret": interpreted()}
    whole, cut = (kernels.grouped_matmul(rows, weight, sizes, clear=clear, **options) for clear in (True, False))
    end = sum(case.sizes)
    np.testing.assert_array_equal(cut[:end].astype(F32), whole[:end].astype(F32))
    assert jnp.isnan(cut[end:]).all()


@on_hopper
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("programs", [MULTIPROCESSORS, 3], ids=["all", "3"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_on_hopper(case: Case, dtype: Any, programs: int, transposed: bool) -> None:
    poison()
    run = functools.partial(kernels.grouped_matmul, programs=programs, config=Config(256, 2, num_stages=4))
    check(case, dtype, jax.jit(run, static_argnames="transposed"), transposed)


@on_hopper
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_on_hopper_many_steps(seed: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of tiles a program, at a layer's size; the tile is that of `config_for`. Large experts first, but once."""
    monkeypatch.setattr(kernels, "CACHE", 2048 * 4608 * 2 - min(seed, 1))
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(150, np.ones(9) / 9) * BLOCK
    rows, shape = normal(seed, 10240, 2048, dtype=BF16), (4608, 2048) if transposed else (2048, 4608)
    weight = normal(seed + 9, 9, *shape, dtype=BF16, scale=2048**-0.5)
    run = functools.partial(kernels.grouped_matmul, transposed=transposed, programs=MULTIPROCESSORS)
    poison()
    got = jax.jit(run)(rows, weight, jnp.asarray(sizes, I32))
    want, first = np.zeros(got.shape), 0
    for e, size in enumerate(sizes):
        w = weight[e].T if transposed else weight[e]
        part = jnp.matmul(rows[first : first + size], w, precision="highest", preferred_element_type=F32)
        want[first : first + size] = np.asarray(part, np.float64)
        first += size
    close(got, want, BF16)


def test_config_for() -> None:
    """Bfloat16 and float16, whole blocks and steps, pairs of tiles, enough rows: more where the result is narrow."""
    find = kernels.config_for
    assert find(34816, 32, 2048, 7168, BF16) == find(16384, 32, 4096, 4096, F16) == TILE
    assert find(32768, 32, 7168, 2048, BF16) is not None
    assert find(32704, 32, 7168, 2048, BF16) is find(16320, 32, 2048, 7168, BF16) is None, "too few rows"
    assert find(34816, 32, 2048, 7168, F32) is None
    assert find(34816 + 8, 32, 2048, 7168, BF16) is None, "rows"
    assert find(34816, 32, 2048 + 8, 7168, BF16) is None, "depth"
    assert find(34816, 32, 2048, 7168 + 256, BF16) is None, "an odd number of tiles"
    assert find(34816, 32, 2048, 7168, BF16, 16320) is None, "few of them hold tokens"
    assert find(65536, 32, 2048, 7168, BF16, 16384) == TILE


def test_takes_large_first() -> None:
    """DeepSeek-V3's gate and up and gradient of rows do not fit into 50 MB, the others do."""
    find = kernels.takes_large_first
    assert all(find(*shape) for shape in ((7168, 4096, BF16), (4096, 7168, F16), (2048, 7168, F32)))
    assert not any(find(*sides, BF16) for sides in ((2048, 7168), (7168, 2048)))


@pytest.mark.parametrize("together", [1, 2, 3, 8])
@pytest.mark.parametrize("columns", [2, 6])
def test_every_tile_once(columns: int, together: int) -> None:
    """Two halves to a part; whole tiles go through pairs of columns side by side, and the half one with the last."""
    shapes = [(0, 1), *itertools.product(range(1, 10), (0, 1))]
    numbers = [(n, t, h) for t, h in shapes for n in range(t * columns + h * columns // 2)]
    find = jax.vmap(functools.partial(kernels.part_of, columns=columns, together=together))
    parts = np.stack(find(*jnp.array(numbers, I32).T), axis=1).tolist()
    for tiles, half in shapes:
        mine = [part for part, (_, *shape) in zip(parts, numbers, strict=True) if shape == [tiles, half]]
        assert all(count == (2 if row == tiles else 1) for row, _, count in mine)
        seen = [(row, column + i) for row, column, count in mine for i in range(count)]
        assert sorted(seen) == list(itertools.product(range(tiles + half), range(columns)))
        turns = max(-(-tiles // together), 1)
        height = max(-(-tiles // turns), 1)
        order = [(min(row, max(tiles - 1, 0)) // height, column // 2) for row, column, _ in mine]
        assert order == sorted(order), "turns, and within one pairs of columns, one after the other"


@pytest.mark.parametrize("large_first", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_experts_of_blocks(case: Case, large_first: bool) -> None:
    """Those with many tiles first, then those without half a one; else they keep their order."""
    sizes = case.sizes
    order = list(range(len(sizes)))
    if large_first:
        order.sort(key=lambda e: (-(sizes[e] // (2 * BLOCK)), sizes[e] % (2 * BLOCK)))
    bounds = [0, *np.cumsum(sizes).tolist(), case.rows]
    want: list[tuple[int, ...]] = []
    for e in (*order, len(sizes)):
        want += [(e, bounds[e], bounds[e + 1], len(want))] * ((bounds[e + 1] - bounds[e]) // BLOCK)
    got = np.asarray(kernels.experts_of_blocks(jnp.array(sizes, I32), case.rows, large_first=large_first))
    np.testing.assert_array_equal(got.reshape(4, -1), np.array(want).T)


SHAPES = [jax.ShapeDtypeStruct(shape, BF16) for shape in ((4096, 256), (4, 256, 512))]
SHAPES += [jax.ShapeDtypeStruct((4,), I32)]


@new_jax
def test_lowers() -> None:
    check_lowers(functools.partial(kernels.grouped_matmul, programs=132), SHAPES)


@pytest.mark.parametrize(
    ("rows", "depth", "width", "config", "message"),
    [
        (64, 64, 512, None, r"no tile for bfloat16 \(64, 64\), \(1, 64, 512\)"),
        (72, 64, 512, FEW, r"for \(72, 64\), 512"),
        (64, 96, 512, FEW, r"for \(64, 96\), 512"),
        (64, 64, 768, FEW, r"for \(64, 64\), 768"),
        (64, 64, 512, replace(FEW, num_stages=1), "a stage is free when the next has begun"),
        (64, 64, 512, replace(FEW, stores=3), "take turns"),
    ],
)
def test_what_does_not_suit(rows: int, depth: int, width: int, config: Config | None, message: str) -> None:
    a, weight = jnp.zeros((rows, depth), BF16), jnp.zeros((1, depth, width), BF16)
    with pytest.raises(AssertionError, match=message):
        kernels.grouped_matmul(a, weight, jnp.zeros(1, I32), programs=1, config=config)
