"""The one place that touches Pallas' Triton backend.

Every kernel of this package is launched through `launch`, but for those on another backend (`hopper`). Blocks are
never used: a kernel gets each array whole, as a pointer with a shape, and addresses it by index with explicit masks.
Three reasons: rows may be strided, ragged ends are masked by hand in every version of jax (before 0.12 the loads of a
ragged last block are not), and one lowering serves every number of rows. Indexing a two-dimensional array by (row,
column) also makes Pallas switch to 64-bit offsets as soon as the array passes 2**32 bytes; a flat index would wrap at
2**31 elements.

Numbers that change with the number of tokens are `sizes`. XLA, which compiles for shapes anyway, has them built in;
inside `runtime_sizes` a kernel takes them as arguments instead, so that one compilation serves every number of tokens.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Deprecated since jax 0.11.0, without a date, and the only Pallas backend there is for ROCm. The warning comes when a
# kernel is lowered, long after the call, so a filter around the call would miss it.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

load = plgpu.load
store = plgpu.store

_Function = TypeVar("_Function", bound=Callable[..., Any])


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """0, 1, 2, ... along `axis`, int32 also under x64."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def within(*bounds: tuple[jax.Array, Any, int]) -> jax.Array | None:
    """The mask of the indices below their size, for (index, size, tile); None where every tile is whole.

    A size that is known at run time only is always masked.
    """
    masks = [at < size for at, size, tile in bounds if not isinstance(size, int) or size % tile]
    return functools.reduce(operator.and_, masks) if masks else None


def load_masked(ref: Any, mask: jax.Array | None) -> jax.Array:
    """What lies at `ref`, zero where the mask is off."""
    return load(ref) if mask is None else load(ref, mask=mask, other=0.0)


# Bytes that one kernel writes and the next reads, on an H100 with 50 MB of cache: from the first on they do not all
# stay in it, above the second hardly any do (docs/performance/plan_dispatch_combine.md, "The cache").
CACHED, PAST_CACHE = 24 << 20, 400 << 20


def divmod_by(x: jax.Array, power_of_2: int) -> tuple[jax.Array, jax.Array]:
    """divmod of what is not negative."""
    return x >> (power_of_2.bit_length() - 1), x & (power_of_2 - 1)


def remembered(function: _Function) -> _Function:
    """Around what follows from shapes alone, and each launch from torch asks for again: pl.cdiv takes a microsecond.

    What is remembered is shared, so nothing that can be written to.
    """
    return cast(_Function, functools.lru_cache(maxsize=1024)(function))  # whose type would take any arguments


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n = 0): every Triton tensor has such sides."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(x: Any, y: Any) -> Any:
    """How many times y, one of them not full, make x, in a kernel; neither is negative.

    pl.cdiv of a traced number takes Python's for 64 bits where JAX does (jax_enable_x64), and refuses the pair.
    """
    if isinstance(x, int) and isinstance(y, int):
        return pl.cdiv(x, y)
    x, y = jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32)
    return jax.lax.div(x + (y - np.int32(1)), y)


def bounded(index: jax.Array, most: Any) -> jax.Array:
    """The index, held to 0 to `most`: also where it is there anyway, so that a compiler sees it.

    Pallas adds up in 32 bits how far an element lies from an array's start, and widens that to the 64 of an address. A
    loop can move its addresses from step to step only where a compiler sees, part by part, that the sum does not wrap.
    Else it widens the place of each 16 bytes anew, and XLA's LLVM takes an instruction for that (IMAD.WIDE) for which
    warps wait while tensor cores are busy: grouped products took 10 to 17 % longer on an H200. No result shows it;
    `test_loops_move_addresses` reads it off the PTX. Sizes that are passed at the launch have no bound to be seen.
    """
    return jnp.clip(index, 0, most)


def add_at(ref: Any, index: Any, value: jax.Array) -> None:
    """Adds integers to ref[index] atomically: the sum does not depend on the order. The indices must be in range.

    Not plgpu.atomic_add, which takes a mask: up to jax 0.11.2 it adds a tensor of integers as if they were floats.
    """
    jax.ref.addupdate(ref, (index,), value)


# (the first argument that is a size, the names of the sizes) of each launch, while `runtime_sizes` is in force
_Launched = list[tuple[int, tuple[str, ...]]]
_launched: contextvars.ContextVar[_Launched | None] = contextvars.ContextVar("launched", default=None)


@contextlib.contextmanager
def runtime_sizes() -> Iterator[_Launched]:
    """Kernels traced inside read each of their sizes from an array of its own, [1], between arguments and results.

    Yields a list that says where, launch after launch. Whoever lowers the kernel turns these arrays into numbers.
    """
    launched: _Launched = []
    token = _launched.set(launched)
    try:
        yield launched
    finally:
        _launched.reset(token)


_room: contextvars.ContextVar[int | None] = contextvars.ContextVar("room", default=None)


@contextlib.contextmanager
def shared_memory(room: int) -> Iterator[None]:
    """Kernels traced inside are for a GPU whose programs can have this many bytes of shared memory."""
    token = _room.set(room)
    try:
        yield
    finally:
        _room.reset(token)


HOPPER = 227 * 1024  # bytes of shared memory that a program can have there; before and on small GPUs it is less


def room() -> int:
    """Shared memory that a program can have: that of `shared_memory`, else of this process' GPU, else Hopper's."""
    found = _room.get()
    if found is None:
        try:
            found = int(jax.local_devices(backend="cuda")[0].shared_memory_per_block_optin)
        except (RuntimeError, AttributeError):  # no such GPU here
            found = HOPPER
    return found


def launch(
    kernel: Callable[..., None],
    *args: jax.Array,
    name: str,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int = 1,
    stage_bytes: int = 0,
    sizes: Mapping[str, int] | None = None,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Launches `kernel(*in_refs, *out_refs, **sizes)` on `grid`, every ref a whole array.

    Of its `num_stages` each takes `stage_bytes` of shared memory; where those do not fit there are fewer.

    A kernel that needs to know how many programs there are takes that as a size: Pallas builds `num_programs` in.

    `aliases` maps the index of an argument to that of the output which takes over its buffer. The grid must hold at
    least one program: what a call without work returns is for the caller to say.
    """
    assert 0 not in grid, f"{name}: an empty grid {grid}"
    if stage_bytes and not interpret:  # a GPU does not start a kernel for which it has too little
        num_stages = max(1, min(num_stages, room() // stage_bytes))

    sizes, num_args = dict(sizes or {}), len(args)
    launched = _launched.get()
    if launched is not None:
        launched.append((num_args, tuple(sizes)))
        if not interpret:  # which runs the grid; lowered, it is no part of the kernel, but for the index along a 1
            grid = (2,) * len(grid)
        args = (*args, *(jnp.full((1,), size, jnp.int32) for size in sizes.values()))

    # Pallas names the machine-code kernel after the function.
    @functools.wraps(kernel)
    def named(*refs: Any) -> None:
        numbers = refs[num_args : len(args)]
        known = dict(zip(sizes, (ref[0] for ref in numbers), strict=True)) if numbers else sizes
        kernel(*refs[:num_args], *refs[len(args) :], **known)

    named.__name__ = named.__qualname__ = name
    # Under shard_map the results vary over the mesh axes that the arguments vary over, which the caller made one.
    kind = jax.typeof(args[0]).manual_axis_type
    call = pl.pallas_call(
        named,
        grid=grid,
        out_shape=tuple(jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=kind) for s in out_shape),
        input_output_aliases=dict(aliases or {}),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
    )
    return tuple(call(*args))
