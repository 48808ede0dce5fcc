"""Which implementations the tests of the JAX API run here; tests/gpu runs the same tests on "pallas"."""

from __future__ import annotations

import os

import pytest

from tests import cases


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the interpreted cases that say little for the time they take to CI: see tests/cases.py."""
    if "JAXMOE_EVERY_TARGET" in os.environ:
        return
    found: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        given = getattr(item, "callspec", None)
        case = given and given.params.get("case")
        in_ci = isinstance(case, cases.Case) and case.why in cases.INTERPRETED_IN_CI
        found[in_ci and given.params.get("implementation") == "interpret"].append(item)
    config.hook.pytest_deselected(items=found[True])
    items[:] = found[False]


@pytest.fixture(params=["xla", "interpret"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> int | None:
    """How many tokens a case gets; None: the few that it names."""
    return None
