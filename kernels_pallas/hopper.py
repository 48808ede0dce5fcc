"""What the kernels on Pallas' Mosaic GPU backend share, which are for NVIDIA Hopper and called from JAX alone.

The backend can say what Triton's cannot. A program stays on its multiprocessor and takes tile after tile. One of its
three warpgroups loads by the copy engine (TMA), as far ahead as there is room, past the end of a tile; the other two
multiply, and hand their results to the copy engine. So no tile waits for its first loads, nor for the store of the one
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def multiply(
    shape: tuple[int, int],
    operands: Callable[[Any], tuple[Any, Any]],
    steps: Any,
    done: Any,
    full: Any,
    empty: Any,
    stages: int,
) -> jax.Array:
    """A warpgroup's sum, in float32, of the products of so many steps behind those that are done.

    operands: of a stage, which is waited for, and is empty as far as this warpgroup goes when they have been read.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(total: Any) -> Any:
        def step(j: Any, _: None) -> None:
            at = stage(done + j, stages)
            plgpu.barrier_wait(full.at[at])
            plgpu.wgmma(total, *operands(at))
            plgpu.wgmma_wait(1)  # of the step before: what it read is free
            pl.when(j > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + j - 1, stages)]))

        jax.lax.fori_loop(0, steps, step, None)
        return total[...]

    total = pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + steps - 1, stages)]))
    return total


def store(result: jax.Array, held_smem: Any, corner: Callable[[int, int], Any]) -> None:
    """Hands a warpgroup's result to the copy engine, in pieces of 64 x 64.

    held_smem: room for some of them, which take turns. corner: where one goes, by row and column of its first entry.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, columns = result.shape
    room = held_smem.shape[0]
    corners = [(y, x) for y in range(0, rows, BLOCK) for x in range(0, columns, BLOCK)]
    for piece, (y, x) in enumerate(corners):
        plgpu.wait_smem_to_gmem(room - 1, wait_read_only=True)
        held = held_smem.at[piece % room]
        held[...] = result[y : y + BLOCK, x : x + BLOCK]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held, corner(y, x))


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
