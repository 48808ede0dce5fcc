"""`count_load`, however pairs are shared out: interpreted, and as PTX in the emulator; on a GPU in tests/gpu."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.count import Config, config_for, count_load, grid_for
from kernels_pallas.launch import next_power_of_2
from kernels_pallas.targets import compile_kernel, lower
from tests.emulator import machine
from tests.emulator.memory import Global

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")

SHAPES = [
    pytest.param(1, 1, 1, id="one pair, one id"),
    pytest.param(1, 700, 2, id="every pair to one expert, two programs and more"),
    pytest.param(9, 5, 3, id="fewer pairs than a program has"),
    pytest.param(256, 64, 8, id="a power of two of ids, and of pairs"),
    pytest.param(257, 65, 9, id="as many ids again that there are not, ragged: DeepSeek-V3, one shared"),
    pytest.param(1026, 40, 32, id="more ids than pairs of a program"),
]
CONFIGS = [None, Config(pairs=32, num_warps=1), Config(pairs=4096, num_warps=4), Config(pairs=4096, num_warps=16)]


def ids_of(num_ids: int, tokens: int, slots: int) -> np.ndarray:
    """Some dropped, some that are no id, one id with many pairs."""
    rng = np.random.default_rng(num_ids + tokens)
    ids = rng.integers(-2, num_ids + 3, (tokens, slots), dtype=np.int32)
    return np.where(rng.random(ids.shape) < 0.3, num_ids - 1, ids)


def stated(ids: np.ndarray, num_ids: int) -> np.ndarray:
    return np.bincount(ids[(ids >= 0) & (ids < num_ids)], minlength=num_ids).astype(np.int32)


def emulate(ids: np.ndarray, num_ids: int, config: Config) -> np.ndarray:
    cleared = jax.ShapeDtypeStruct((num_ids,), jnp.int32)
    run = functools.partial(count_load, config=config)
    (kernel,) = lower(run, jax.ShapeDtypeStruct(ids.shape, ids.dtype), cleared, target="sm_90")
    code = compile_kernel(kernel, "sm_90")
    load, memory = np.zeros(num_ids, np.int32), Global()
    memory.add(ids.ctypes.data, ids.nbytes, 4, writable=False)
    memory.add(load.ctypes.data, load.nbytes, 4)
    addresses = [ids.ctypes.data, load.ctypes.data, load.ctypes.data]
    grid = (*grid_for(ids.size, config), 1)
    machine.launch(machine.Code(code.asm["ptx"], code.metadata.shared), memory, grid, addresses)
    return load


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("num_ids", "tokens", "slots"), SHAPES)
@pytest.mark.parametrize("way", ["interpret", pytest.param("emulate", marks=needs_triton)])
def test_count(num_ids: int, tokens: int, slots: int, config: Config | None, way: str) -> None:
    ids = ids_of(num_ids, tokens, slots)
    if way == "interpret":
        got = count_load(jnp.asarray(ids), jnp.zeros(num_ids, jnp.int32), config=config, interpret=True)
    else:
        got = emulate(ids, num_ids, config or config_for(ids.size, "cuda"))
    np.testing.assert_array_equal(got, stated(ids, num_ids), strict=True)


@pytest.mark.parametrize(("num_items", "pairs", "num_warps"), [(1, 512, 16), (8192, 512, 16), (8193, 4096, 16)])
def test_config(num_items: int, pairs: int, num_warps: int) -> None:
    assert config_for(num_items, "cuda") == Config(pairs, num_warps)
    assert config_for(num_items, "rocm") == Config(pairs, num_warps // 2)
    assert pairs == next_power_of_2(pairs), "what `histogram` asks for"
