"""`python -m jaxmoe audit` on a GPU: torch.profiler sees our kernels, and no others, where all is ours."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import bridge  # noqa: E402
from bridge import audit, counting  # noqa: E402
from jaxmoe.__main__ import main  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU"),
    pytest.mark.counts_launches,
]

LAYER = audit.Layer(tokens=33, hidden=256, inner=128, experts=32, dtype="bfloat16")
KERNELS = [
    "router_logits",
    "router_logits_sum",
    "route",
    "plan_dispatch",
    "dispatch",
    "gated_matmul",
    "grouped_matmul",
    "combine",
]
OURS = {
    audit.PATCHED: functools.partial(audit._block, LAYER, patched=True),
    audit.FUSED: functools.partial(audit._block, LAYER, patched=True, fused=True),
    audit.OWN: functools.partial(audit._own, LAYER),
}


def kernels(column: str) -> Counter[str]:
    """A patched model gathers instead of dispatching."""
    return Counter(kernel for kernel in KERNELS if kernel != "dispatch" or column == audit.OWN)


@pytest.fixture(params=OURS)
def column(request: pytest.FixtureRequest) -> str:
    if request.param != audit.OWN:
        pytest.importorskip("transformers")
    return request.param


def profiled(column: str) -> counting.Counts:
    if not counting.can_profile():
        pytest.skip("torch.profiler sees no kernels here: CUPTI is missing or closed")
    return counting.count(OURS[column], "cuda")


def test_lowering_says_what_the_driver_launches(column: str) -> None:
    """What the command tells without a GPU is what happens on one."""
    told, seen = counting.count(OURS[column], "meta"), counting.count(OURS[column], "cuda")
    assert told.launches == seen.launches
    assert seen.ours == kernels(column)
    assert (told.operations, told.casts, told.copies) == (seen.operations, seen.casts, seen.copies)
    assert audit.broken(column, seen) == []


def test_allocations(column: str) -> None:
    """The results, and what an op needs besides: sums of slices in router_logits, hidden rows of the experts; in a
    patched model, where one op does more, also the rows that come of them."""
    told, seen = counting.count(OURS[column], "meta"), counting.count(OURS[column], "cuda")
    assert told.allocations is not None
    assert seen.allocations is not None
    if column == audit.PATCHED:  # what cuBLAS allocates for the shared expert is its own affair
        assert seen.allocations >= told.allocations + 3
    else:
        assert seen.allocations == told.allocations + (2 if column == audit.OWN else 3)


def test_the_profiler_sees_our_kernels(column: str) -> None:
    counts = profiled(column)
    assert counts.kernels is not None
    if column == audit.PATCHED:  # torch runs the shared expert
        assert counts.kernels >= counts.ours
        assert counts.kernels.total() > counts.ours.total()
    else:
        assert counts.kernels == kernels(column)
        assert counts.transfers == Counter()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.float().bfloat16(), "casts: expected none, got aten::_to_copy bfloat16 to float32"),
        (lambda x: x.clone(), "copies: expected none, got aten::clone bfloat16"),
    ],
    ids=["cast", "copy"],
)
def test_waste_is_noticed(change: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = bridge.dispatch
    monkeypatch.setattr(bridge, "dispatch", lambda x, plan: dispatch(change(x), plan))
    counts = profiled(audit.OWN)
    found = audit.broken(audit.OWN, counts)
    assert any(what.startswith(f"{audit.OWN}: {said}") for what in found)
    assert counts.kernels is not None
    assert counts.transfers is not None
    assert counts.kernels.total() + counts.transfers.total() > len(KERNELS)


def test_a_copy_hidden_from_torch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an op torch dispatches nothing that the mode could see; the profiler does."""
    from bridge.native import dispatch as native

    combine = native.combine
    monkeypatch.setattr(native, "combine", lambda x, *rest: combine(x.clone(), *rest))
    counts = profiled(audit.OWN)
    assert not counts.copies
    assert audit.broken(audit.OWN, counts)


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "counts.json"
    sizes = ["--tokens", "33", "--hidden", "256", "--inner", "128", "--experts", "32"]
    assert main(["audit", *sizes, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["broken"] == []
    theirs, ours = report["columns"]["transformers"], report["columns"]["jaxmoe"]
    assert sum(theirs["casts"].values()) >= 3
    assert ours["allocations"] < theirs["allocations"]
    if counting.can_profile():
        assert sum(theirs["kernels"].values()) > 3 * sum(ours["kernels"].values())
