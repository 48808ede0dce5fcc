"""Which implementations the tests of the JAX API run here; tests/gpu runs the same tests on "pallas"."""

from __future__ import annotations

import pytest

from tests import cases
from tests.in_ci import leave_to_ci, parameter


def _says_little(item: pytest.Item) -> bool:
    case = parameter(item, "case")
    in_ci = isinstance(case, cases.Case) and case.why in cases.INTERPRETED_IN_CI
    return in_ci and parameter(item, "implementation") == "interpret"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves interpreted cases to CI: see tests/cases.py."""
    leave_to_ci(config, items, _says_little)


@pytest.fixture(params=["xla", "interpret"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> int | None:
    """How many tokens a case gets; None: the few that it names."""
    return None
