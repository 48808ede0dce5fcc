"""The devices that the bridge is tested on."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, through_dlpack: None) -> Iterator[torch.device]:
    """Where tensors lie; on a GPU too the path is DLPack (tests/gpu/test_native_gpu.py is about the other)."""
    if request.param == "cuda" and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        pytest.skip("needs a GPU that torch and JAX both see")
    # A machine with a GPU still tests the CPU: JAX's own arrays have to be made there then.
    with jax.default_device(jax.local_devices(backend=request.param)[0]):
        yield torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
