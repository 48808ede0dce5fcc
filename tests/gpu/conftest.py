"""The GPU runs the tests of the JAX API on its kernels, with more tokens than the interpreter can take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

try:
    import torch
except ImportError:
    torch = None


@pytest.fixture(params=["pallas"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> int:
    return 777


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is allocated holds NaN (the largest integer), so that a result nobody wrote shows.

    torch fills every new tensor; of XLA's pool, the piece that the larger arrays of its tests come from, and not where
    torch's are run: what XLA's threads ask of the driver would break a capture that begins meanwhile. Not where
    launches are counted, since filling is one.
    """
    if jax.default_backend() != "gpu" or request.node.get_closest_marker("counts_launches"):
        yield
        return
    if "implementation" in request.fixturenames:
        jnp.full(2**28, jnp.nan).block_until_ready().delete()
    if torch is None or not torch.cuda.is_available():
        yield
        return
    # Of torch's own kernels; pytest puts the filters back after the test.
    warnings.filterwarnings("ignore", message=r"(?s).*eterminis", category=UserWarning)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def synchronized() -> Iterator[None]:
    """What a test launched has ended, or failed, before the next one begins."""
    yield
    torch.cuda.synchronize()
