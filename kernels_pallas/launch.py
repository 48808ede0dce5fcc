"""The one place that touches Pallas' Triton backend.

Every kernel of this package is launched through `launch`. Blocks are never used: a kernel gets each array whole, as a
pointer with a shape, and addresses it by index with explicit masks. Three reasons: rows may be strided, ragged ends are
masked by hand in every version of jax (before 0.12 the loads of a ragged last block are not), and one lowering serves
every number of rows. Indexing a two-dimensional array by (row, column) also makes Pallas switch to 64-bit offsets as
soon as the array passes 2**32 bytes; a flat index would wrap at 2**31 elements.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Deprecated since jax 0.11.0, without a date, and the only Pallas backend there is for ROCm. The warning comes when a
# kernel is lowered, long after the call, so a filter around the call would miss it.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

load = plgpu.load
store = plgpu.store


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """0, 1, 2, ... along `axis`, int32 also under x64."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n = 0): every Triton tensor has such sides."""
    return 1 << max(n - 1, 0).bit_length()


def add_at(ref: Any, index: Any, value: jax.Array) -> None:
    """Adds integers to ref[index] atomically: the sum does not depend on the order. The indices must be in range.

    Not plgpu.atomic_add, which takes a mask: up to jax 0.11.2 it adds a tensor of integers as if they were floats.
    """
    jax.ref.addupdate(ref, (index,), value)


def launch(
    kernel: Callable[..., None],
    *args: jax.Array,
    name: str,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int = 1,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Launches `kernel(*in_refs, *out_refs)` on `grid`, every ref a whole array.

    `aliases` maps the index of an argument to that of the output which takes over its buffer. The grid must hold at
    least one program: what a call without work returns is for the caller to say.
    """
    assert 0 not in grid, f"{name}: an empty grid {grid}"

    # Pallas names the machine-code kernel after the function.
    @functools.wraps(kernel)
    def named(*refs: Any) -> None:
        kernel(*refs)

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
