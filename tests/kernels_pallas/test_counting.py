"""`histogram` and `places`: in the interpreter where they have a form for it, and as PTX in the emulator."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.counting import STATIC, histogram, places
from kernels_pallas.launch import iota, launch, load, next_power_of_2, store
from kernels_pallas.targets import compile_kernel, lower
from tests.emulator import machine
from tests.emulator.memory import Global

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")


def emulate(function: Any, *arrays: np.ndarray, length: int) -> np.ndarray:
    """What a kernel of one program writes to int32 [length]."""
    (kernel,) = lower(function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays), target="sm_90")
    code = compile_kernel(kernel, "sm_90")
    out, memory = np.full(length, 0x5A5A5A5A, np.int32), Global()
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes, 4, writable=False)
    memory.add(out.ctypes.data, out.nbytes, 4)
    addresses = [array.ctypes.data for array in (*arrays, out)]
    machine.launch(machine.Code(code.asm["ptx"], code.metadata.shared), memory, (1, 1), addresses)
    return out


def counted(
    ids: Any, *, size: int, bins: int, num_warps: int, parts: int, assembly: bool, interpret: bool
) -> jax.Array:
    length = next_power_of_2(bins)

    def kernel(ids_ref: Any, out_ref: Any) -> None:
        numbers = lambda index: load(ids_ref.at[index], mask=index < ids.size, other=-1)
        found = histogram(numbers, size, bins, num_warps, assembly, parts=parts)
        index = iota(found.shape, 0)
        store(out_ref.at[index], found, mask=index < length)

    shape = jax.ShapeDtypeStruct((length,), jnp.int32)
    return launch(kernel, ids, name="count", grid=(1,), out_shape=[shape], num_warps=num_warps, interpret=interpret)[0]


SHAPES = [(32, 1, 4), (32, 300, 1), (64, 64, 4), (512, 5, 4), (512, 256, 8), (1024, 1000, 4), (128, 2048, 4)]


@pytest.mark.parametrize(("size", "bins", "num_warps"), SHAPES)
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("way", ["interpret", pytest.param("emulate", marks=needs_triton)])
def test_histogram(size: int, bins: int, num_warps: int, parts: int, way: str) -> None:
    """More numbers than bins and fewer, fewer than threads; some negative, and all the same."""
    run = functools.partial(counted, size=size, bins=bins, num_warps=num_warps, parts=parts)
    rng = np.random.default_rng(size)
    for low, high in ((-3, bins), (bins - 1, bins)):
        ids = rng.integers(low, high, size - 3, dtype=np.int32)
        if way == "interpret":
            got = np.asarray(run(jnp.asarray(ids), assembly=False, interpret=True))
        else:
            length = next_power_of_2(bins)
            got = emulate(functools.partial(run, assembly=True, interpret=False), ids, length=length)
        np.testing.assert_array_equal(got, np.bincount(ids[ids >= 0], minlength=len(got)))


@needs_triton
@pytest.mark.parametrize(
    ("size", "bins", "num_warps"),
    [(32, 1, 1), (128, 7, 4), (128, 256, 4), (512, 256, 4), (512, 1024, 4), (256, 2048, 8)],
)
def test_places(size: int, bins: int, num_warps: int) -> None:
    """Fewer numbers than there are and more; so many that their bits do not fit at once."""
    n = max(size, next_power_of_2(bins))

    def kernel(ids_ref: Any, first_ref: Any, out_ref: Any) -> None:
        index = iota((n,), 0)
        number = load(ids_ref.at[index], mask=index < size, other=-1)
        store(out_ref.at[index], places(number, load(first_ref.at[index]), size, bins, num_warps))

    shape = jax.ShapeDtypeStruct((n,), jnp.int32)
    fn = functools.partial(launch, kernel, name="place", grid=(1,), out_shape=[shape], num_warps=num_warps)
    rng = np.random.default_rng(bins)
    for low, high in ((-2, bins), (bins - 1, bins)):
        ids, first = rng.integers(low, high, size, dtype=np.int32), rng.integers(0, 1000, n, dtype=np.int32)
        want = np.full(n, -1)
        for i, number in enumerate(ids):
            if number >= 0:
                want[i] = first[number] + (ids[:i] == number).sum()
        np.testing.assert_array_equal(emulate(fn, ids, first, length=n), want)


def test_the_cases_reach_what_is_done_in_turns() -> None:
    assert 4 * 1024 * (512 // 32 + 1) > STATIC >= 4 * 256 * (512 // 32 + 1)


@needs_triton
def test_counting_in_a_loop_is_refused() -> None:
    """LLVM may unroll it, and then nobody knows what threads share; the assembler says so."""

    def kernel(ids_ref: Any, out_ref: Any, *, steps: Any) -> None:
        strip = lambda i: load(ids_ref.at[i * 128 + iota((128,), 0)])
        step = lambda i, total: total + histogram(lambda _: strip(i), 128, 128, 4, assembly=True)
        store(out_ref.at[iota((128,), 0)], jax.lax.fori_loop(0, steps, step, jnp.zeros(128, jnp.int32)))

    def compiled(steps: int) -> Any:
        shape = jax.ShapeDtypeStruct((128,), jnp.int32)
        fn = functools.partial(
            launch, kernel, name="loop", grid=(1,), out_shape=[shape], num_warps=4, sizes={"steps": steps}
        )
        (lowered,) = lower(fn, jax.ShapeDtypeStruct((1024,), jnp.int32), target="sm_90")
        return compile_kernel(lowered, "sm_90")

    compiled(1)
    with pytest.raises(Exception, match="Duplicate definition of variable"):
        compiled(8)
