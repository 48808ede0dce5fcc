"""What the tests of the kernels for Hopper share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import hopper
from kernels_pallas.targets import TARGETS, custom_call_target

MULTIPROCESSORS = hopper.multiprocessors()
on_hopper = pytest.mark.skipif(not MULTIPROCESSORS, reason="needs a Hopper GPU")
new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"needs jax {hopper.OLDEST_JAX}")


def interpreted() -> Any:
    """With the race detector, which raises from jax 0.12 on (0.11.2 prints).

    It takes products as done at once: a stage that is written while a product reads it does not show.
    """
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(detect_races=True)


def poison() -> None:
    """What is allocated next on the GPU holds NaN."""
    jnp.full(2**28, jnp.nan).block_until_ready().delete()


def _device(target: str) -> Any:
    platform, kind = TARGETS[target].platform, TARGETS[target].device_kind
    return jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=None)


def described(target: str) -> Any:
    """As if the device were this target's."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=_device(target)))


def two_devices() -> Any:
    """A mesh of two Hopper GPUs, "data"."""
    axes: dict[str, Any] = {"axis_types": (jax.sharding.AxisType.Auto,), "abstract_device": _device("sm_90")}
    return jax.sharding.AbstractMesh((2,), ("data",), **axes)


def lowered(function: Callable[..., Any], *args: Any, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def launches(text: str) -> tuple[int, int]:
    """(of Mosaic GPU's backend, of Triton's) in a lowered computation."""
    return text.count("custom_call @mosaic_gpu"), text.count(f"custom_call @{custom_call_target()}")


def check_lowers(run: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]) -> None:
    """One launch: as it is, under vmap, and in 64-bit mode, since this backend would take no 64-bit index."""
    assert launches(lowered(run, *shapes)) == (1, 0)
    batched = [jax.ShapeDtypeStruct((3, *s.shape), s.dtype) for s in shapes]
    assert launches(lowered(jax.vmap(run), *batched)) == (1, 0)
    assert launches(lowered(jax.vmap(run, in_axes=(0, None, None)), batched[0], *shapes[1:])) == (1, 0)
    with jax.enable_x64(True):
        assert launches(lowered(run, *shapes)) == (1, 0)
