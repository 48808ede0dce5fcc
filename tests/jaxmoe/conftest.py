"""Which implementations the tests of the JAX API run here; tests/gpu runs the same tests on "pallas"."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["xla", "interpret"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> int | None:
    """How many tokens a case gets; None: the few that it names."""
    return None
