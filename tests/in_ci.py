"""Which tests are left to CI."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


def leave_to_ci(config: pytest.Config, items: list[pytest.Item], says_little: Callable[[pytest.Item], bool]) -> None:
    """Takes out of `items`, but not in CI, those that say little for the time they take."""
    if "JAXMOE_EVERY_TARGET" in os.environ:
        return
    left = [item for item in items if says_little(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def parameter(item: pytest.Item, name: str) -> object:
    """What a test was given by this name, or None."""
    given = getattr(item, "callspec", None)
    return given and given.params.get(name)
