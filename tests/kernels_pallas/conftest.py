"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """What was traced for another device is forgotten, before and after."""
    jax.clear_caches()
    yield
    jax.clear_caches()
