"""What the tests of the kernels for Hopper share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import hopper
from kernels_pallas.targets import TARGETS, custom_call_target

MULTIPROCESSORS = hopper.multiprocessors()
on_hopper = pytest.mark.skipif(not MULTIPROCESSORS, reason="needs a Hopper GPU")
new_jax = pytest.mark.skipif(jax.__version_info__ < hopper.OLDEST_JAX, reason=f"needs jax {hopper.OLDEST_JAX}")


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """What was traced for another device is forgotten, before and after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def interpreted() -> Any:
    """With the race detector, which raises from jax 0.12 on (0.11.2 prints).

    It takes products as done at once: a stage that is written while a product reads it does not show.
    """
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(detect_races=True)


def poison() -> None:
    """What is allocated next on the GPU holds NaN."""
    jnp.full(2**28, jnp.nan).block_until_ready().delete()


def described(target: str) -> Any:
    """As if the device were this target's."""
    platform, kind = TARGETS[target].platform, TARGETS[target].device_kind
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=None)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lowered(function: Callable[..., Any], *args: Any, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def launches(text: str) -> tuple[int, int]:
    """(of Mosaic GPU's backend, of Triton's) in a lowered computation."""
    return text.count("custom_call @mosaic_gpu"), text.count(f"custom_call @{custom_call_target()}")
