"""The gradient of grouped matmul's weights by Hopper's copy engine: interpreted, lowered, chosen; on a GPU run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from kernels_pallas import grouped_matmul_grad_hopper as kernels
from kernels_pallas import hopper
from kernels_pallas.grouped_matmul_grad_hopper import HIGH, LINE, WIDE, Config
from kernels_pallas.hopper import BLOCK
from kernels_pallas.targets import TARGETS
from tests.cases import BF16, F16, F32, normal
from tests.jaxmoe.test_grouped_matmul import close, outer
from tests.kernels_pallas.on_hopper import (
    MULTIPROCESSORS,
    check_lowers,
    described,
    interpreted,
    launches,
    lowered,
    new_jax,
    on_hopper,
    poison,
    two_devices,
)

I32 = jnp.int32


@dataclass(frozen=True)
class Case:
    """Groups of rows, of which copies take 64 at a multiple of eight."""

    why: str
    sizes: tuple[int, ...]
    rows: int
    left: int = 256
    right: int = 256


CASES = [
    Case("groups that begin and end anywhere", (70, 3, 1, 129, 61), 264),
    Case("empty groups first, last and between", (0, 90, 0, 38, 0), 128),
    Case("blocks exactly", (64, 128, 64), 256),
    Case("one huge group, odd E", (0, 0, 328), 328),
    Case("no group has a row", (0, 0), 64),
    Case("fewer rows than a block", (0, 3, 0, 5), 8),
    Case("rows behind the last group", (70, 0, 9), 136),
    Case("tiles of columns that are no multiple of those that take turns", (9, 55), 64, 768, 512),
    Case("sizes past the rows, and negative ones", (100, -7, 100, 2**31 - 1), 136),
]

BLOCKS = [
    Case("blocks, one group empty", (64, 0, 192), 320),
    Case("empty groups at the ends, one block", (0, 64, 0), 64),
    Case("no group has a row", (0, 0), 64),
    Case("one huge group, odd E", (0, 0, 320), 320, 256, 512),
]


def groups(case: Case) -> tuple[int, ...]:
    """The sizes, held to what there is."""
    left, found = case.rows, []
    for size in case.sizes:
        found.append(min(max(size, 0), left))
        left -= found[-1]
    return tuple(found)


def check(case: Case, dtype: Any, run: Callable[..., jax.Array]) -> None:
    """Rows of no group are not numbers, and may not show."""
    a, b = normal(0, case.rows, case.left, dtype=dtype), normal(1, case.rows, case.right, dtype=dtype)
    sizes = groups(case)
    used = jnp.arange(case.rows)[:, None] < sum(sizes)
    got = run(jnp.where(used, a, jnp.nan), jnp.where(used, b, jnp.inf), jnp.array(case.sizes, I32))
    close(got, outer(a, b, sizes), dtype)


@new_jax
@pytest.mark.parametrize(
    ("case", "config", "dtype"),
    [
        *((case, Config(128, 256, 2, num_stages=2), BF16) for case in CASES),
        *((case, Config(256, 128, 4, num_stages=3, stores=1), F16) for case in CASES[:3]),
    ],
    ids=lambda value: value.why if isinstance(value, Case) else "",
)
def test_interpreted(case: Case, config: Config, dtype: Any) -> None:
    """With few stages and programs, so that each is used again and again; results nobody wrote are NaN."""
    options: dict[str, Any] = {"programs": 2, "config": config, "interpret": interpreted()}
    check(case, dtype, functools.partial(kernels.grouped_outer, **options))


@new_jax
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.why)
def test_interpreted_blocks(case: Case) -> None:
    """Groups of whole blocks, of which nothing is copied beforehand."""
    config = Config(128, 256, 2, num_stages=2)
    options: dict[str, Any] = {"programs": 2, "config": config, "aligned": True, "interpret": interpreted()}
    check(case, BF16, functools.partial(kernels.grouped_outer, **options))


@on_hopper
@pytest.mark.parametrize("programs", [MULTIPROCESSORS, 7], ids=["all", "7"])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("config", [WIDE, HIGH], ids=["wide", "high"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_on_hopper(case: Case, config: Config, dtype: Any, programs: int) -> None:
    poison()
    check(case, dtype, jax.jit(functools.partial(kernels.grouped_outer, programs=programs, config=config)))


@on_hopper
@pytest.mark.parametrize("config", [WIDE, HIGH], ids=["wide", "high"])
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.why)
def test_on_hopper_blocks(case: Case, config: Config) -> None:
    poison()
    options: dict[str, Any] = {"programs": MULTIPROCESSORS, "config": config, "aligned": True}
    check(case, BF16, jax.jit(functools.partial(kernels.grouped_outer, **options)))


@on_hopper
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_on_hopper_many_steps(seed: int, aligned: bool) -> None:
    """Tens of tiles a program: a stage that is written too early would probably show."""
    rng, unit = np.random.default_rng(seed), BLOCK if aligned else 1
    sizes = jnp.asarray(rng.multinomial(8000 // unit, np.ones(9) / 9) * unit, I32)
    a, b = normal(seed, 8192, 2048, dtype=BF16), normal(seed + 9, 8192, 3840, dtype=BF16)
    got = jax.jit(functools.partial(kernels.grouped_outer, programs=MULTIPROCESSORS, aligned=aligned))(a, b, sizes)
    ends = np.cumsum(np.asarray(sizes))
    parts = [(a[end - size : end], b[end - size : end]) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    want = [jnp.matmul(x.T, y, precision="highest", preferred_element_type=F32) for x, y in parts]
    close(got, np.asarray(jnp.stack(want), np.float64), BF16)


def test_config_for() -> None:
    """Bfloat16 and float16, enough rows, sides that a tile divides, rows that lines of the copy engine divide."""
    find = kernels.config_for
    assert find(32768, 32, 7168, 4096, BF16) == find(4096, 32, 7168, 4096, F16) == WIDE
    assert find(32768, 32, 7168, 1408, BF16) == HIGH  # 1408 = 11 * 128
    assert find(32768, 32, 1408, 7168, BF16) == WIDE
    assert find(32768, 32, 7168, 4096, F32) is None
    assert find(32768, 32, 1408, 1408, BF16) is find(32768, 32, 7168, 1400, BF16) is None
    assert find(32772, 32, 7168, 4096, BF16) is None, "rows"
    assert find(4088, 32, 7168, 4096, BF16) is find(8192, 32, 7168, 4096, BF16, 4095) is None, "too few rows"


@pytest.mark.parametrize(
    ("experts", "tiles_a", "tiles_b", "together"), [(3, 8, 4, 8), (2, 11, 3, 4), (5, 1, 7, 8), (1, 3, 1, 2)]
)
def test_every_tile_once(experts: int, tiles_a: int, tiles_b: int, together: int) -> None:
    numbers = jnp.arange(experts * tiles_a * tiles_b, dtype=I32)
    expert, a, b = jax.vmap(lambda number: kernels.tile(number, tiles_a, tiles_b, together))(numbers)
    every = {(e, i, j) for e in range(experts) for i in range(tiles_a) for j in range(tiles_b)}
    assert set(zip(expert.tolist(), a.tolist(), b.tolist(), strict=True)) == every
    assert len(numbers) == len(every)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_edges(case: Case) -> None:
    """Blocks of a group hold each of its rows once, in order; of others' rows those before it are in its first lines,
    those behind it in its last block.
    """
    sizes = np.array(groups(case))
    ends = np.cumsum(sizes)
    starts = ends - sizes
    x = normal(0, case.rows, 16, dtype=BF16).at[sum(sizes) :].set(jnp.nan)
    first, steps = (np.asarray(v) for v in kernels.blocks(jnp.asarray(starts, I32), jnp.asarray(ends, I32)))
    assert not np.any(first % LINE)
    last = first + np.maximum(steps - 1, 0) * BLOCK
    start, end, *begin = (jnp.asarray(v, I32) for v in (starts, ends, first, last))
    heads, tails = (
        np.asarray(kernels.edges(x, start, end, *at), np.float32) for at in ((begin[0], LINE), (begin[1], BLOCK))
    )
    assert heads.shape == (len(sizes), LINE, 16)
    for e, size in enumerate(sizes):
        held = np.array(x[first[e] :], np.float32)
        if size == 0:
            assert steps[e] == 0
            assert not heads[e].any()
            assert not tails[e].any()
            continue
        if steps[e] > 1:
            held[:LINE] = heads[e]
        held = np.concatenate([held[: last[e] - first[e]], tails[e]])
        assert len(held) == BLOCK * steps[e]
        before = starts[e] - first[e]
        assert 0 <= before < LINE
        np.testing.assert_array_equal(held[before:][:size], np.asarray(x[starts[e] : ends[e]], np.float32))
        assert not held[:before].any()
        assert not held[before + size :].any()


SHAPES = [jax.ShapeDtypeStruct(shape, BF16) for shape in ((4096, 256), (4096, 512))] + [
    jax.ShapeDtypeStruct((32,), I32)
]


@new_jax
def test_lowers() -> None:
    check_lowers(functools.partial(kernels.grouped_outer, programs=132), SHAPES)


def weight_gradient(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, up: jax.Array, transposed: bool = False
) -> jax.Array:
    product = functools.partial(jaxmoe.grouped_matmul, transposed=transposed, implementation="pallas")
    return jax.vjp(lambda weight: product(rows, weight, sizes), weight)[1](up)[0]


@new_jax
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.usefixtures("traced_anew")
def test_under_shard_map(shared: bool, check_vma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of weights that devices share, or each has its own, and Triton's of the rows."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    mesh = two_devices()
    split, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    spec = same if shared else split

    def loss(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
        product = functools.partial(jaxmoe.grouped_matmul, implementation="pallas")
        specs = {"in_specs": (split, spec, spec), "out_specs": split}
        return jnp.sum(jax.shard_map(product, mesh=mesh, check_vma=check_vma, **specs)(rows, weight, sizes))

    experts = 32 if shared else 64
    shapes = (8192, 256), (experts, 256, 512)
    args = [*(jax.ShapeDtypeStruct(shape, BF16) for shape in shapes), jax.ShapeDtypeStruct((experts,), I32)]
    with jax.sharding.use_abstract_mesh(mesh):
        assert launches(lowered(jax.grad(loss, argnums=(0, 1)), *args)) == (1, 1)


@new_jax
@pytest.mark.parametrize(
    ("why", "multiprocessors", "target", "dtype", "rows", "taken"),
    [
        ("a Hopper GPU", 132, "sm_90", BF16, 4096, True),
        ("another GPU", 0, "sm_80", BF16, 4096, False),
        ("AMD's", 132, "gfx942", BF16, 4096, False),
        ("float32", 132, "sm_90", F32, 4096, False),
        ("few rows", 132, "sm_90", BF16, 1024, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("traced_anew")
def test_what_takes_it(
    why: str,
    multiprocessors: int,
    target: str,
    dtype: Any,
    rows: int,
    taken: bool,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of the weights alone: the product and the gradient of rows are Triton's."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: multiprocessors)

    def loss(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
        product = jaxmoe.grouped_matmul(rows, weight, sizes, transposed=transposed, implementation="pallas")
        return jnp.sum(product.astype(F32) ** 2)

    args = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, 256), (32, 512, 256) if transposed else (32, 256, 512))]
    args.append(jax.ShapeDtypeStruct((32,), I32))
    with described(target):
        text = lowered(jax.grad(loss, argnums=(0, 1)), *args, platform=TARGETS[target].platform)
    assert launches(text) == ((1, 2) if taken else (0, 3))


def test_no_tile() -> None:
    with pytest.raises(AssertionError, match=r"no tile for float32 \[8, 128\], \[8, 256\]"):
        kernels.grouped_outer(jnp.zeros((8, 128)), jnp.zeros((8, 256)), jnp.zeros(1, I32), programs=1)


@pytest.mark.parametrize(
    ("rows", "left", "config", "message"),
    [
        (8, 384, HIGH, r"Config\(left=256.* for \(8, 384\), \(8, 256\)"),
        (12, 128, WIDE, r"for \(12, 128\), \(12, 256\)"),
        (8, 128, replace(WIDE, num_stages=1), "a stage is free when the next has begun"),
        (8, 128, replace(WIDE, stores=3), "take turns"),
        (72, 128, replace(WIDE, num_stages=4), "blocks of 64 of 72 rows"),
    ],
)
def test_configs_that_do_not_suit(rows: int, left: int, config: Config, message: str) -> None:
    a, b = jnp.zeros((rows, left), BF16), jnp.zeros((rows, 256), BF16)
    with pytest.raises(AssertionError, match=message):
        kernels.grouped_outer(a, b, jnp.zeros(1, I32), programs=1, config=config, aligned=rows == 72)


@on_hopper
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_on_hopper(transposed: bool) -> None:
    """Through `grouped_matmul`: by itself, under vmap, and under shard_map."""
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(4090, np.ones(32) / 32, size=2), I32)
    rows, up = normal(0, 2, 4096, 256, dtype=BF16), normal(1, 2, 4096, 512, dtype=BF16)
    weight = normal(2, 32, *((512, 256) if transposed else (256, 512)), dtype=BF16)
    gradient = functools.partial(weight_gradient, transposed=transposed)
    assert launches(lowered(gradient, rows[0], weight, sizes[0], up[0]))[0] == 1
    want = [outer(*((u, r) if transposed else (r, u)), s) for r, u, s in zip(rows, up, sizes, strict=True)]

    close(jax.jit(gradient)(rows[0], weight, sizes[0], up[0]), want[0], BF16)
    batched = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0, 0)))(rows, weight, sizes, up)
    for got, right in zip(batched, want, strict=True):
        close(got, right, BF16)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(split,) * 4, out_specs=split)
    close(jax.jit(sharded)(rows[0], weight, sizes[0], up[0]), want[0], BF16)
