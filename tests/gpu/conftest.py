"""The GPU runs the tests of the JAX API on its kernels, with more tokens than the interpreter can take."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["pallas"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> int:
    return 777
