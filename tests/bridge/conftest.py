"""The devices that the bridge is tested on, and where what it compiles is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import torch

from bridge import path
from tests.emulator.native import TARGETS, Emulator, forget


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, through_dlpack: None) -> Iterator[torch.device]:
    """Where tensors lie; on a GPU too the path is DLPack (tests/gpu/test_native_*_gpu.py are about the other)."""
    if request.param == "cuda" and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        pytest.skip("needs a GPU that torch and JAX both see")
    # A machine with a GPU still tests the CPU: JAX's own arrays have to be made there then.
    with jax.default_device(jax.local_devices(backend=request.param)[0]):
        yield torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(params=["dlpack", "ops"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that calls on CPU tensors can take; on a GPU it is the second."""
    if request.param == "ops":
        monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    return request.param


@pytest.fixture(params=TARGETS)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Kernels on CPU tensors run in it."""
    made = Emulator()
    made.install(request.param, monkeypatch)
    yield made
    forget()


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled kernels are kept meanwhile."""
    monkeypatch.setenv("JAXMOE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """What runs once takes longer to compile well than to run; kernels on a GPU are compiled as for users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not torch.cuda.is_available())
    yield
    jax.config.update("jax_disable_most_optimizations", before)
