"""The GPU runs what the CPU runs: each module of tests/jaxmoe that takes an implementation has a twin in tests/gpu."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Only some tests of these take an implementation; the others are of what has no kernel.
IN_PART = {"moe"}


def collected(module: str) -> dict[str, Callable[..., None]]:
    """What pytest collects from a module of tests."""
    return {name: value for name, value in vars(importlib.import_module(module)).items() if name.startswith("test_")}


def on_kernels(name: str) -> dict[str, Callable[..., None]]:
    """The tests of tests/jaxmoe/test_<name>.py that take an implementation."""
    tests = collected(f"tests.jaxmoe.test_{name}")
    return {key: test for key, test in tests.items() if "implementation" in inspect.signature(test).parameters}


NAMES = [path.stem.removeprefix("test_") for path in sorted((TESTS / "jaxmoe").glob("test_*.py"))]
MIRRORED = [name for name in NAMES if on_kernels(name)]


@pytest.mark.parametrize("name", MIRRORED)
def test_the_gpu_runs_the_same_tests(name: str) -> None:
    """Modules that shared one file hid each other's tests of the same name."""
    wanted = on_kernels(name) if name in IN_PART else collected(f"tests.jaxmoe.test_{name}")
    assert collected(f"tests.gpu.test_{name}_gpu") == wanted


def test_there_is_something_to_mirror() -> None:
    assert {"route", "plan_dispatch", "dispatch", "router_logits", "moe", "transforms"} <= set(MIRRORED)
