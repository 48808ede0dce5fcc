"""From a function of `kernels_pallas` to kernels that can be launched on torch tensors.

Lowering is jax's work and compiling triton's, both in `kernels_pallas.targets`; a process that finds its kernels on
disk needs neither.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import torch

import kernels_pallas
from bridge.native import cache
from bridge.native.driver import Kernel
from kernels_pallas import targets


class Build(NamedTuple):
    """What became of one request for kernels."""

    name: str
    key: str
    seconds: float
    compiled: bool  # False: found on disk


builds: list[Build] = []  # in this process, one after another

JAX_DTYPES = {
    torch.bfloat16: jax.numpy.bfloat16,
    torch.float16: jax.numpy.float16,
    torch.float32: jax.numpy.float32,
    torch.int32: jax.numpy.int32,
}


def shape(dtype: torch.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    """What jax needs to know of a tensor."""
    return jax.ShapeDtypeStruct(sizes, JAX_DTYPES[dtype])


@functools.cache
def target_of(device: int) -> targets.Target:
    """The target that a device of torch's is; raises ValueError for one that the kernels do not run on."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return targets.target_for(properties.gcnArchName.split(":")[0])
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return targets.target_for(f"sm_{properties.major}{properties.minor}", shared)


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("compiling kernels needs the triton package, which torch's GPU builds come with")


@functools.cache
def _toolchain() -> str:
    """Everything besides the request that the machine code depends on."""
    sources = hashlib.sha256()
    for path in sorted(Path(kernels_pallas.__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return f"{sources.hexdigest()} jax {jax.__version__} {_triton_version()}"


def build(
    function: Callable[..., Any], device: int, is_aligned: bool, *, divisor: int = 0, **arguments: Any
) -> list[Kernel]:
    """The kernels that function(**arguments) launches, in order, for any number of rows.

    Args:
      function: of `kernels_pallas`.
      device: torch's index.
      is_aligned: whether every address will be a multiple of 32 bytes.
      divisor: 0, or what the first kernel's last size, the distance of rows, is a multiple of: see `laid`.
      arguments: those that are shapes stand for arrays, in the function's order; sides that change from call to call
        may have any size. The others are passed as they are; their repr must say all of them.
    """
    start = time.perf_counter()
    target = target_of(device)
    name = f"{function.__module__}.{function.__qualname__}"
    key = f"{name} {arguments!r} {target!r} aligned={is_aligned} divisor={divisor} {_toolchain()}"
    binaries = cache.load(key)
    compiled = binaries is None
    if binaries is None:
        if "target" in inspect.signature(function).parameters:  # it tunes for it
            arguments["target"] = target.platform
        shapes = {name: value for name, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)}

        def fn(*arrays: jax.Array) -> Any:
            return function(**{**arguments, **dict(zip(shapes, arrays, strict=True))})

        lowered = targets.lower(fn, *shapes.values(), target=target, sizes_at_run_time=True)
        lowered = lowered if is_aligned else [kernel.unaligned() for kernel in lowered]
        if divisor:
            lowered[0] = lowered[0].with_stride(divisor)
        if targets.waits(target):
            lowered = [kernel.waiting() for kernel in lowered]
        binaries = [targets.binary(kernel, targets.compile_kernel(kernel, target)) for kernel in lowered]
        cache.store(key, binaries)
    kernels = [Kernel(binary, device) for binary in binaries]
    builds.append(Build(name, key, time.perf_counter() - start, compiled))
    return kernels


ALIGNMENT = 32  # of every address, or a kernel of its own is used
WIDE = 2**32  # bytes; past that Pallas takes offsets of 64 bits


def rows_for(num_rows: int, width: int, itemsize: int) -> int:
    """How many rows to lower for: 1, or, where 32-bit offsets do not reach, those that fill the next power of two."""
    return 1 if num_rows * width * itemsize <= WIDE else 1 << (num_rows - 1).bit_length()


def laid(matrix: torch.Tensor, num_rows: int) -> tuple[int, int, int, tuple[int, ...]]:
    """How a matrix lies, for a kernel that reads its rows.

    Returns:
      (length of the rows, how many of them) to lower for, `build`'s divisor, and what to pass behind the sizes: nothing
      where rows lie close. Else their distance, and one kernel serves all that are multiples of the same power of two.
    """
    return lying(row_stride(matrix), matrix.shape[1], num_rows, matrix.itemsize)


def lying(stride: int, width: int, num_rows: int, itemsize: int) -> tuple[int, int, int, tuple[int, ...]]:
    """`laid`, of rows that are so far apart."""
    rows = rows_for(num_rows, stride, itemsize)
    if stride == width:
        return width, rows, 0, ()
    many = 1 if rows == 1 else 1 << 14  # of that length, enough for offsets of 64 bits
    return targets.STRIDE, many, math.gcd(stride, 16), (stride,)


def aligned(*addresses: int) -> bool:
    """Whether the kernels may count on every address being a multiple of 32 bytes."""
    together = 0
    for address in addresses:
        together |= address
    return together % ALIGNMENT == 0


def row_stride(matrix: torch.Tensor) -> int:
    """How far apart the rows lie."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
