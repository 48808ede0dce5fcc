"""Runs the kernels of JAX alone, those for Hopper, on small shapes: the program to put under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize_hopper
    compute-sanitizer --tool racecheck python -m benchmarks.sanitize_hopper

With jax's runtime on the GPU compute-sanitizer crashes, so jax keeps to the CPU, where it makes what a kernel takes and
what has to come out, and the kernel is launched from torch, over a result of NaN. For that it needs jax's CUDA plugin,
and a function that jax keeps to itself.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.operation import expect
from jaxmoe import reference
from kernels_pallas import grouped_matmul_grad_hopper, grouped_matmul_hopper, hopper

PROGRAMS = 7  # so that each takes several tiles
NARROW, WIDE = 256, 512
ANYWHERE, BLOCKS = (100, 3, 0, 201, 70), (128, 64, 0, 192, 64)  # rows of each expert, of 512
_launch = hopper.launch  # as it is where it has been replaced


def module_of(lowered: Any) -> bytes:
    """The one Mosaic GPU kernel of a lowered computation, as its compiler takes it."""
    found: list[bytes] = []

    def look_into(operation: Any) -> None:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(attributes["call_target_name"]):
            config = {entry.name: entry.attr for entry in attributes["mhlo.backend_config"]}
            found.append(config["module"].value_bytes)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    look_into(inner.operation)

    look_into(lowered.compiler_ir("stablehlo").operation)
    (module,) = found
    return module


def _tensor(array: Any) -> torch.Tensor:
    """A copy on the GPU; torch's numpy has no bfloat16."""
    host = np.array(array)
    if host.dtype.itemsize == 2:
        return torch.from_numpy(host.view(np.int16)).to("cuda").view(getattr(torch, str(array.dtype)))
    return torch.from_numpy(host).to("cuda")


def from_torch(module: bytes, args: Sequence[jax.Array], out: jax.ShapeDtypeStruct) -> jax.Array:
    """The kernel's result."""
    from jax.experimental.mosaic.gpu import core

    result = torch.full(out.shape, torch.nan, dtype=getattr(torch, str(out.dtype)), device="cuda")
    tensors = [*map(_tensor, args), result]  # which also makes the context that the kernel is loaded into
    launch, unload = core._compile_as_torch_gpu_kernel(module)
    launch((ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)), result.device)
    torch.cuda.synchronize()
    unload()
    return jnp.asarray(result.float().cpu().numpy()).astype(out.dtype)


def launch_from_torch(kernel: Any, *args: jax.Array, out_shape: jax.ShapeDtypeStruct, **options: Any) -> jax.Array:
    """In place of `hopper.launch`."""
    run = jax.jit(functools.partial(_launch, kernel, out_shape=out_shape, **options))
    return from_torch(module_of(run.trace(*args).lower(lowering_platforms=("cuda",))), args, out_shape)


def parts() -> Iterator[tuple[str, Callable[[], jax.Array], Callable[[], jax.Array]]]:
    """(name, the kernel's function, the reference)."""
    normal = lambda seed, dtype, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    rows = sum(BLOCKS) + 64
    for dtype in (jnp.bfloat16, jnp.float16):
        for transposed in (False, True):
            sides = (2 * WIDE, 192) if transposed else (192, 2 * WIDE)
            args = normal(0, dtype, rows, 192), normal(1, dtype, len(BLOCKS), *sides), jnp.array(BLOCKS, jnp.int32)
            options: dict[str, Any] = {"transposed": transposed}
            run = functools.partial(
                grouped_matmul_hopper.grouped_matmul, programs=PROGRAMS, config=grouped_matmul_hopper.TILE, **options
            )
            name = f"product, {dtype.__name__}{', transposed' if transposed else ''}"
            yield name, functools.partial(run, *args), functools.partial(reference.grouped_matmul, *args, **options)
        for sizes, aligned in ((ANYWHERE, False), (BLOCKS, True)):
            for tile in (grouped_matmul_grad_hopper.WIDE, grouped_matmul_grad_hopper.HIGH):
                both = normal(0, dtype, rows, NARROW), normal(1, dtype, rows, WIDE), jnp.array(sizes, jnp.int32)
                outer = functools.partial(
                    grouped_matmul_grad_hopper.grouped_outer, programs=PROGRAMS, config=tile, aligned=aligned
                )
                name = f"weights' gradient, {dtype.__name__}, {tile.left} x {tile.right}, {sizes}"
                yield name, functools.partial(outer, *both), functools.partial(reference.grouped_outer, *both)


def main(launch: Callable[..., jax.Array] = launch_from_torch) -> None:
    """Prints which parts agree with the reference, and stops at one that does not."""
    jax.config.update("jax_platforms", "cpu")
    for name, run, want in parts():
        with mock.patch.object(hopper, "launch", launch):
            got = run()
        right = np.asarray(want(), np.float64)
        error = np.max(np.abs(np.asarray(got, np.float64) - right)) / np.max(np.abs(right))
        expect(bool(error < 1e-2), f"{name}: off by {error:.1e} of the largest")
        print(f"{name}: agrees with the reference", flush=True)


if __name__ == "__main__":
    main()
