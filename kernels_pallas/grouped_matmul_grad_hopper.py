"""The gradient of grouped matmul's weights on NVIDIA Hopper, for JAX: `grouped_matmul_grad` by the copy engine (TMA).

The one kernel on Pallas' Mosaic GPU backend, which can say what Triton's cannot: a program stays on its multiprocessor
and takes tile after tile. One of its three warpgroups loads, as far ahead as there is room, past the end of a tile; the
other two multiply, and hand their results to the copy engine. So no tile waits for its first loads, nor for the store
of the one before.

The engine copies rows from a multiple of eight on, whatever group they belong to. Of each group the first eight and the
last 64 may hold others' rows, so these come from copies of them made beforehand, with zeros for those rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.launch import remembered

LOADER = 2  # the warpgroup that loads; 0 and 1 multiply
BLOCK, LINE = 64, 8  # rows of a copy, and what it begins at a multiple of: the engine's tile is LINE rows of 128 bytes


@dataclass(frozen=True)
class Config:
    left: int  # columns of a in one tile
    right: int  # columns of b
    together: int  # tiles of a that go through b's side by side, and so share b in the L2 cache
    num_stages: int  # blocks of rows that are loaded ahead
    stores: int = 2  # pieces of a result, 64 x 64, that a warpgroup has on their way


WIDE, HIGH = Config(128, 256, 8, num_stages=4), Config(256, 128, 4, num_stages=4)  # measured on an H200


@remembered
def config_for(num_rows: int, num_experts: int, left: int, right: int, dtype: Any) -> Config | None:
    """Which tile to use for these shapes; None where there is none, or with too few rows to have been tried."""
    if dtype not in (jnp.bfloat16, jnp.float16) or num_rows % LINE or num_rows < 128 * num_experts:
        return None
    return next((c for c in (WIDE, HIGH) if left % c.left == 0 and right % c.right == 0), None)


OLDEST_JAX = 0, 11, 2  # that this kernel has run on; in 0.10.2 its backend needs absl, which jax does not bring


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


def edges(x: jax.Array, starts: jax.Array, ends: jax.Array, first: jax.Array, rows: int) -> jax.Array:
    """[E, rows, width]: of each group that many rows from `first` on, zeros for those of others."""
    at = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    inside = (at >= starts[:, None]) & (at < ends[:, None])
    return jnp.where(inside[..., None], x[jnp.clip(at, 0, x.shape[0] - 1)], jnp.zeros((), x.dtype))


def blocks(start: Any, end: Any) -> tuple[Any, Any]:
    """(the row at which the first block of a group begins, how many blocks it has)."""
    first = jax.lax.div(start, np.int32(LINE)) * LINE
    return first, jnp.where(end > start, jax.lax.div(end - first + (BLOCK - 1), np.int32(BLOCK)), 0)


def tile(number: Any, tiles_a: int, tiles_b: int, together: int) -> tuple[Any, Any, Any]:
    """(expert, tile of a's columns, of b's) of this number, of tiles_a * tiles_b for each expert."""
    div, rem = (lambda x, y, op=op: op(x, np.int32(y)) for op in (jax.lax.div, jax.lax.rem))
    within = rem(number, tiles_a * tiles_b)
    above, within = div(within, together * tiles_b) * together, rem(within, together * tiles_b)
    here = jnp.minimum(tiles_a - above, together)
    return div(number, tiles_a * tiles_b), above + jax.lax.rem(within, here), jax.lax.div(within, here)


def _kernel(*refs: Any, config: Config, num_experts: int, left: int, right: int, programs: int) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs, (starts_ref, ends_ref, out_ref), (a_smem, b_smem, out_smem, full, empty) = refs[:6], refs[6:9], refs[9:]
    whole, head, tail = inputs[0:2], inputs[2:4], inputs[4:6]  # of a and of b
    m, n, tiles_a, tiles_b = config.left, config.right, left // config.left, right // config.right
    warpgroup, program = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("program")
    tiles = num_experts * tiles_a * tiles_b
    mine = jax.lax.div(tiles - program + (programs - 1), np.int32(programs))

    def place(i: Any) -> tuple[Any, ...]:
        """(expert, first columns of a and of b, first row and that behind the last) of my tile i."""
        expert, tile_a, tile_b = tile(program + i * programs, tiles_a, tiles_b, config.together)
        return expert, tile_a * m, tile_b * n, starts_ref[expert], ends_ref[expert]

    def stage(step: Any) -> Any:
        return jax.lax.rem(step, np.int32(config.num_stages))

    @pl.when(warpgroup == LOADER)
    def load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load_tile(i: Any, done: Any) -> Any:
            expert, column_a, column_b, start, end = place(i)
            first, steps = blocks(start, end)

            def step(j: Any, done: Any) -> Any:
                at = stage(done)

                pl.when(done >= config.num_stages)(lambda: plgpu.barrier_wait(empty.at[at]))

                def copy(refs: tuple[Any, Any], row: Any, rows: int, to: int = 0) -> None:
                    for ref, smem, column, width in zip(
                        refs, (a_smem, b_smem), (column_a, column_b), (m, n), strict=True
                    ):
                        part = ref.at[pl.ds(row, rows), pl.ds(column, width)]
                        plgpu.copy_gmem_to_smem(part, smem.at[at, pl.ds(to, rows)], full.at[at])

                def copy_alone(refs: tuple[Any, Any], row: Any) -> None:
                    copy(refs, row, BLOCK)
                    for _ in range(2):  # for the copies that a block in two parts has more
                        plgpu.barrier_arrive(full.at[at])

                row = pl.multiple_of(first + j * BLOCK, LINE)
                is_tail = (row + BLOCK > end) | ((row < start) & (steps == 1))
                is_head = (row < start) & (steps > 1)

                @pl.when(is_head)
                def _() -> None:
                    copy(head, expert * LINE, LINE)
                    copy(whole, row + LINE, BLOCK - LINE, to=LINE)

                pl.when(is_tail)(lambda: copy_alone(tail, expert * BLOCK))
                pl.when(jnp.logical_not(is_head | is_tail))(lambda: copy_alone(whole, row))
                return done + 1

            return jax.lax.fori_loop(0, steps, step, done)

        jax.lax.fori_loop(0, mine, load_tile, jnp.int32(0))

    @pl.when(warpgroup != LOADER)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        half = pl.ds(warpgroup * (m // 2), m // 2)

        def compute_tile(i: Any, done: Any) -> Any:
            expert, column_a, column_b, start, end = place(i)
            _, steps = blocks(start, end)

            def multiply(total: Any) -> Any:
                def step(j: Any, _: None) -> None:
                    at = stage(done + j)
                    plgpu.barrier_wait(full.at[at])
                    plgpu.wgmma(total, a_smem.at[at, :, half].transpose((1, 0)), b_smem.at[at])
                    plgpu.wgmma_wait(1)  # of the step before: what it read is free
                    pl.when(j > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + j - 1)]))

                jax.lax.fori_loop(0, steps, step, None)
                return total[...]

            total = pl.run_scoped(multiply, plgpu.ACC((m // 2, n), jnp.float32))
            pl.when(steps > 0)(lambda: plgpu.barrier_arrive(empty.at[stage(done + steps - 1)]))

            result = total.astype(out_ref.dtype)
            pieces = [(y, x) for y in range(0, m // 2, 64) for x in range(0, n, 64)]
            for piece, (y, x) in enumerate(pieces):
                plgpu.wait_smem_to_gmem(config.stores - 1, wait_read_only=True)
                held = out_smem.at[warpgroup, piece % config.stores]
                held[...] = result[y : y + 64, x : x + 64]
                plgpu.commit_smem()
                row = column_a + warpgroup * (m // 2) + y
                plgpu.copy_smem_to_gmem(held, out_ref.at[expert, pl.ds(row, 64), pl.ds(column_b + x, 64)])
            return done + steps

        jax.lax.fori_loop(0, mine, compute_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def grouped_outer(
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    programs: int,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[E, A, B]: what `grouped_matmul_grad.grouped_outer` returns, of shapes for which `config_for` has a tile.

    Sizes are held to what there is: none negative, none past the rows.

    programs: how many run at a time, one a multiprocessor. interpret: this backend's `InterpretGPUParams`.
    """
    (num_rows, left), right, num_experts = a.shape, b.shape[1], group_sizes.shape[0]
    config = config or config_for(num_rows, num_experts, left, right, a.dtype)
    assert config is not None, f"no tile for {a.dtype} [{num_rows}, {left}], [{num_rows}, {right}]"
    assert left % config.left == right % config.right == num_rows % LINE == 0, f"{config} for {a.shape}, {b.shape}"
    assert config.num_stages > 1, "a stage is free when the next has begun"
    assert 4 % config.stores == 0, "the four pieces of a result take turns"
    run = functools.partial(_launch, programs=programs, config=config, interpret=interpret)
    # Under vmap a loop. This backend's own vmap, of more programs and arrays of one more axis, has not been tried.
    return jax.custom_batching.sequential_vmap(run)(a, b, group_sizes)


def _launch(
    a: jax.Array, b: jax.Array, group_sizes: jax.Array, *, programs: int, config: Config, interpret: Any
) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (num_rows, left), right, num_experts = a.shape, b.shape[1], group_sizes.shape[0]
    sizes = jnp.clip(group_sizes, 0, num_rows)  # whatever they say
    total = jnp.cumsum(sizes, dtype=jnp.int32)
    starts, ends = jnp.clip(total - sizes, 0, num_rows), jnp.clip(total, 0, num_rows)
    first, steps = blocks(starts, ends)
    last = first + jnp.maximum(steps - 1, 0) * BLOCK
    heads = [edges(x, starts, ends, first, LINE).reshape(-1, x.shape[1]) for x in (a, b)]
    tails = [edges(x, starts, ends, last, BLOCK).reshape(-1, x.shape[1]) for x in (a, b)]

    tiled = plgpu.TilingTransform((LINE, 128 // a.dtype.itemsize)), plgpu.SwizzleTransform(128)
    shared = lambda *shape: plgpu.SMEM(shape, a.dtype, transforms=tiled)
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.num_stages)

    def grouped_outer(*refs: Any) -> None:  # the machine-code kernel's name
        _kernel(*refs, config=config, num_experts=num_experts, left=left, right=right, programs=programs)

    return plgpu.kernel(
        grouped_outer,
        out_type=jax.ShapeDtypeStruct((num_experts, left, right), a.dtype),
        scratch_types=[
            shared(config.num_stages, BLOCK, config.left),
            shared(config.num_stages, BLOCK, config.right),
            shared(2, config.stores, 64, 64),
            barriers(4),  # copies of a block that is in two parts
            barriers(2),  # warpgroups that multiply
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(a, b, *heads, *tails, starts, ends)
