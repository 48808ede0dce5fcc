"""Which tests are left to CI.

`@pytest.mark.in_ci()` leaves a test to it, `@pytest.mark.in_ci(lanes=64, case=is_large)` where the test is given these:
a value, or a function that says whether it is one. For what says little beside other tests for the time it takes. On a
GPU all run. CI runs them on both Pythons (.ci/run).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"


def leave_to_ci(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out of `items`, but not in CI, those that are marked."""
    if "JAXMOE_EVERY_TARGET" in os.environ:
        return
    left = [item for item in items if marked(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = {id(item) for item in left}
        items[:] = [item for item in items if id(item) not in gone]


def marked(item: pytest.Item) -> bool:
    """Whether a mark says so."""
    if GPU_TESTS in item.path.parents:
        return False
    return any(_fits(item, mark) for mark in item.iter_markers("in_ci"))


def _fits(item: pytest.Item, mark: pytest.Mark) -> bool:
    given = getattr(item, "callspec", None)
    params = given.params if given else {}
    if mark.args or not mark.kwargs.keys() <= params.keys():  # a mark that never does anything is a mistake
        raise pytest.UsageError(f"{item.nodeid}: expected in_ci(parameter=value, ...), got {mark.args} {mark.kwargs}")
    return all(
        wanted(params[name]) if callable(wanted) else params[name] == wanted for name, wanted in mark.kwargs.items()
    )
