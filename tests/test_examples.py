"""Every public function has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from types import ModuleType

import pytest
from packaging.version import Version

import jaxmoe

HAS_TORCH = importlib.util.find_spec("torch") is not None


def _has_transformers() -> bool:
    """Whether there is one that bridge.huggingface works with."""
    try:
        return Version(importlib.metadata.version("transformers")) >= Version("5.13")
    except importlib.metadata.PackageNotFoundError:
        return False


def _modules() -> list[str]:
    names = []
    for package in ("kernels_pallas", "jaxmoe", *(["bridge"] if HAS_TORCH else [])):
        path = importlib.import_module(package).__path__
        names += [package, *(m.name for m in pkgutil.walk_packages(path, f"{package}."))]
    left_out = () if _has_transformers() else ("bridge.huggingface",)
    return [name for name in names if not name.endswith("__main__") and not name.startswith(left_out)]


def _public() -> list[tuple[ModuleType, str]]:
    modules = [jaxmoe, *([importlib.import_module("bridge")] if HAS_TORCH else [])]
    return [(m, n) for m in modules for n in m.__all__ if inspect.isfunction(getattr(m, n))]


@pytest.mark.parametrize("name", _modules())
def test_examples_run(name: str) -> None:
    """What the docstrings show is what comes out."""
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize(("module", "name"), _public(), ids=lambda value: getattr(value, "__name__", value))
def test_public_functions_have_examples(module: ModuleType, name: str) -> None:
    doc = getattr(module, name).__doc__ or ""
    assert doctest.DocTestParser().get_examples(doc), f"{module.__name__}.{name} has no example"
