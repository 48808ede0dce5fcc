"""What the kernels on Pallas' Mosaic GPU backend share, which are for NVIDIA Hopper and called from JAX alone.

The backend can say what Triton's cannot. A program stays on its multiprocessor and takes tile after tile. One of its
three warpgroups loads by the copy engine (TMA), as far ahead as there is room, past the end of a tile; the other two
multiply, and hand their results to the copy engine while they multiply the next tile. So no tile waits for its first
loads, nor for the store of the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LOADER = 2  # the warpgroup that loads; 0 and 1 multiply
BLOCK = 64  # rows that are copied at a time, or that a warpgroup multiplies; and a side of the pieces of a result
OLDEST_JAX = 0, 11, 2  # that these kernels have run on; in 0.10.2 their backend needs absl, which jax does not bring


def multiprocessors() -> int:
    """Those of this process' GPUs, the fewest, if all are Hopper's and jax is new enough, else 0.

    Also 0 where jax lowers for another kind of GPU, which is described to it.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return 0
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # no such GPU here
        return 0
    if any(device.compute_capability != "9.0" for device in devices):
        return 0
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.device_kind != devices[0].device_kind:
        return 0
    return min(int(getattr(device, "core_count", 0)) for device in devices)


def stage(step: Any, stages: int) -> Any:
    """Where a step of a program is held."""
    return jax.lax.rem(step, np.int32(stages))


def wait_for_all(empty: Any, done: Any, stages: int) -> None:
    """At the loader's end: the stages that were last filled are empty again; each phase of a barrier is to be seen."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    wait = lambda step, _: plgpu.barrier_wait(empty.at[stage(step, stages)])
    jax.lax.fori_loop(jnp.maximum(done - stages, 0), done, wait, None)


class Pending(NamedTuple):
    """A result that a warpgroup still holds, in registers, while it multiplies the next tile."""

    result: Any
    place: tuple[Any, ...]  # int32: where it goes
    exists: Any  # bool


def nothing(shape: tuple[int, int], dtype: Any, places: int) -> Pending:
    """What a warpgroup holds at first; `places`: the length of `place`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    zeros = plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)
    return Pending(zeros, (jnp.int32(0),) * places, jnp.bool_(False))


@dataclass(frozen=True)
class Writer:
    """Hands a warpgroup's results to the copy engine, in pieces of 64 x 64.

    held_smem: room for some of them, which take turns. corner: where a piece goes, by the result's place and the row
    and column, in the result, of its first entry.
    """

    held_smem: Any
    corner: Callable[..., Any]

    @staticmethod
    def pieces(pending: Pending) -> list[tuple[int, int]]:
        """Of each its first row and column."""
        rows, columns = pending.result.shape
        return [(y, x) for y in range(0, rows, BLOCK) for x in range(0, columns, BLOCK)]

    def put(self, pending: Pending, piece: int) -> None:
        """One piece."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        (y, x), room = self.pieces(pending)[piece], self.held_smem.shape[0]
        plgpu.wait_smem_to_gmem(room - 1, wait_read_only=True)
        held = self.held_smem.at[piece % room]
        held[...] = pending.result[y : y + BLOCK, x : x + BLOCK]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held, self.corner(*pending.place, y, x))

    def put_if(self, pending: Pending, which: Callable[[int], Any]) -> None:
        """The pieces for which that holds, if there is a result."""
        for piece in range(len(self.pieces(pending))):
            pl.when(pending.exists & which(piece))(functools.partial(self.put, pending, piece))

    def put_all(self, pending: Pending) -> None:
        """At the end, when there is nothing more to multiply."""
        self.put_if(pending, lambda _: True)


def multiply(
    operands: Callable[[Any], tuple[Any, Any]],
    steps: Any,
    done: Any,
    full: Any,
    empty: Any,
    stages: int,
    pending: Pending,
    writer: Writer,
) -> jax.Array:
    """A warpgroup's sum, in float32, of the products of so many steps behind those that are done.

    operands: of a stage, which is waited for, and is empty as far as this warpgroup goes when they have been read.
    What is pending is stored, a piece a step, while tensor cores are busy, and has been stored in the end.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(total: Any) -> Any:
        def step(j: Any, _: None) -> None:
            at = stage(done + j, stages)
            plgpu.barrier_wait(full.at[at])
            plgpu.wgmma(total, *operands(at))
            plgpu.wgmma_wait(1)  # of the step before: what it read is free
            pl.when(j > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + j - 1, stages)]))
            writer.put_if(pending, lambda piece: j == piece)

        jax.lax.fori_loop(0, steps, step, None)
        return total[...]

    total = pl.run_scoped(run, plgpu.ACC(pending.result.shape, jnp.float32))
    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + steps - 1, stages)]))
    writer.put_if(pending, lambda piece: piece >= steps)  # of few steps, or none
    return total


def launch(
    kernel: Callable[..., None],
    *args: jax.Array,
    name: str,
    out_shape: jax.ShapeDtypeStruct,
    stages: Sequence[tuple[int, int]],
    num_stages: int,
    arrivals: int,
    stores: int,
    programs: int,
    interpret: Any,
) -> jax.Array:
    """kernel(*args, out, *what a stage holds, pieces of the result, full, empty); args and out are in global memory.

    stages: the shapes of what a stage holds. arrivals: copies that fill one. programs: how many run at a time, one a
    multiprocessor. Under vmap a loop: this backend's own vmap, of more programs and arrays of one more axis, has not
    been tried.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = out_shape.dtype
    tiled = plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128)
    shared = lambda *shape: plgpu.SMEM(shape, dtype, transforms=tiled)
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=num_stages)

    def body(*refs: Any) -> None:
        kernel(*refs)

    body.__name__ = name  # the machine-code kernel's
    run = plgpu.kernel(
        body,
        out_type=out_shape,
        scratch_types=[
            *(shared(num_stages, *shape) for shape in stages),
            shared(2, stores, BLOCK, BLOCK),
            barriers(arrivals),
            barriers(2),  # warpgroups that multiply
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return jax.custom_batching.sequential_vmap(lambda *args: run(*args))(*args)
