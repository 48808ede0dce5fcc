"""Which tests the mark leaves to CI."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import in_ci

HERE = Path(__file__).parent


def item(*marks: pytest.MarkDecorator, folder: str = "jaxmoe", **given: object) -> Any:
    """A test of that folder that has these marks and was given these parameters."""
    return SimpleNamespace(
        nodeid="test_it",
        path=HERE / folder / "test_it.py",
        callspec=SimpleNamespace(params=given),
        iter_markers=lambda name: [decorator.mark for decorator in marks if decorator.name == name],
    )


@pytest.mark.parametrize(
    ("marks", "given", "left"),
    [
        ((), {"lanes": 64}, False),
        ((pytest.mark.in_ci(),), {}, True),
        ((pytest.mark.in_ci(lanes=64),), {"lanes": 64}, True),
        ((pytest.mark.in_ci(lanes=64),), {"lanes": 32}, False),
        ((pytest.mark.in_ci(lanes=64, top=True),), {"lanes": 64, "top": False}, False),
        ((pytest.mark.in_ci(lanes=lambda lanes: lanes > 32, top=True),), {"lanes": 64, "top": True}, True),
        ((pytest.mark.in_ci(lanes=32), pytest.mark.in_ci(top=True)), {"lanes": 64, "top": True}, True),
        ((pytest.mark.gpu(),), {}, False),
    ],
)
def test_marked(marks: tuple[pytest.MarkDecorator, ...], given: dict[str, object], left: bool) -> None:
    assert in_ci.marked(item(*marks, **given)) == left
    assert not in_ci.marked(item(*marks, folder="gpu", **given)), "on a GPU all run"


@pytest.mark.parametrize("mark", [pytest.mark.in_ci(lane=64), pytest.mark.in_ci(64)])
def test_a_mark_that_leaves_nothing(mark: pytest.MarkDecorator) -> None:
    with pytest.raises(pytest.UsageError, match=r"test_it: expected in_ci\(parameter=value, ...\), got"):
        in_ci.marked(item(mark, lanes=64))


@pytest.mark.parametrize("everything", [False, True])
def test_in_ci_all_run(everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXMOE_EVERY_TARGET", raising=False)
    if everything:
        monkeypatch.setenv("JAXMOE_EVERY_TARGET", "1")
    told: list[Any] = []
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: told.extend(items)))
    left, stays = item(pytest.mark.in_ci(lanes=64), lanes=64), item(lanes=64)
    items = [left, stays]
    in_ci.leave_to_ci(config, items)
    assert items == ([left, stays] if everything else [stays])
    assert told == ([] if everything else [left])
