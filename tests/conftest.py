"""What every test shares: no network, memory that two frameworks can share, and GPU tests skipped without a GPU."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.in_ci import GPU_TESTS, leave_to_ci

# Before jax and transformers are imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the GPU's memory too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from config classes, never fetched
# Most of the suite's time on a CPU is LLVM optimising programs that then run once; more about that below.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_QUICK += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones refuse the name
    _QUICK += " --xla_cpu_use_fusion_emitters=false"  # half the time
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}"


@functools.cache
def has_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def pytest_configure() -> None:
    """Without a GPU jax' own optimisations are left out too."""
    import jax

    if not has_gpu():
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for what the tests start
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_finish() -> None:
    """Python looks for garbage less often, and not among what was imported: what tracing makes is nearly all used."""
    if has_gpu():  # not tried there
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind says at the end that jax leaks


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs() -> Iterator[None]:
    """
    Without this the suite outgrows Linux's limit on a process' memory maps (vm.max_map_count, 65530): jax keeps each
    program that it compiled for the CPU, in about four maps, and XLA crashes where it cannot map the next one.
    """
    yield
    import jax

    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:  # one module makes as many at most
        jax.clear_caches()
        gc.collect()  # what lies in cycles


@pytest.fixture
def through_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on GPU tensors go through DLPack and JAX's runtime, as those on CPU tensors do."""
    from bridge import path

    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_to_ci(config, items)
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))
