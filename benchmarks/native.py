"""Runs the Pallas kernels on torch tensors, without JAX's runtime, so that they are timed as the peers' kernels are.

jax lowers each kernel to Triton IR, torch's triton compiles it, and the launch goes to torch's current stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from kernels_pallas import targets

DTYPES = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16, torch.float32: jnp.float32, torch.int32: jnp.int32}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel; calling it launches it. Aliased arrays are passed twice, as argument and as output."""

    compiled: Any
    grid: tuple[int, int, int]
    name: str

    def __call__(self, *tensors: torch.Tensor) -> None:
        self.compiled[self.grid](*tensors)


def target_here() -> str:
    """The name of the target that torch's current device is."""
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def kernels_of(fn: Callable[..., Any], *tensors: torch.Tensor) -> list[Kernel]:
    """The kernels that `fn` launches, in order, compiled for this device; `fn` takes arrays shaped like `tensors`."""
    shapes = [jax.ShapeDtypeStruct(tuple(t.shape), DTYPES[t.dtype]) for t in tensors]
    target = target_here()
    return [
        Kernel(targets.compile_kernel(lowered, target), lowered.grid, lowered.name)
        for lowered in targets.lower(fn, *shapes, target=target)
    ]
