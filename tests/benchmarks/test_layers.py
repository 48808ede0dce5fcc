"""The measurement of transformers' layers: what it compares, and what it does where something fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers package")
from benchmarks import huggingface, operation, timing

# transformers' static cache imports torch's compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

SIZES = huggingface.Sizes(experts=16, layers=1, hidden=32, inner=8, heads=2, prefill=4, batch=4, past=1)
TIMING = timing.Timing(1.0, 2.0, 3.0)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what would be timed; on the CPU nothing can be captured."""

    def time_eager(call: Any) -> timing.Timing:
        call()
        return TIMING

    def time_graph(call: Any, calls: int) -> timing.Timing:
        raise RuntimeError("no graphs here\nat all")

    monkeypatch.setattr(operation, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "time_eager", time_eager)
    monkeypatch.setattr(timing, "time_graph", time_graph)


def test_measure() -> None:
    """Three states of one model with the same outputs, each timed; what cannot be captured says why."""
    found = huggingface.measure(SIZES)
    assert found["sizes"]["dtype"] == "torch.bfloat16"
    states = {name: value for name, value in found.items() if name not in ("sizes", "version")}
    assert list(states) == ["transformers grouped_mm", "patched", "patched, shared expert fused"]
    for name, state in states.items():
        assert "error" not in state, f"{name}: {state}"
        assert set(state["relative error"]) == {"prefill", "decode", "prefill, MoE block", "decode, MoE block"}
        assert all(error < 0.02 for error in state["relative error"].values())
        assert any(error > 0 for error in state["relative error"].values()) == (name != "transformers grouped_mm")
        assert state["decode, eager"] == dataclasses.asdict(TIMING)
        assert state["decode, graph"] == {"error": "RuntimeError: no graphs here"}


def test_wrong_outputs_are_not_timed() -> None:
    wanted = {"prefill, MoE block": torch.ones(4), "prefill": torch.ones(4)}
    calls = {name: value.clone for name, value in wanted.items()}
    assert set(huggingface._compared(calls, wanted).values()) == {0.0}
    for wrong in (torch.zeros(4), torch.full((4,), torch.nan), torch.tensor([1.0, 1.0, 1.0, 0.9])):
        with pytest.raises(AssertionError, match="prefill, MoE block, relative error"):
            huggingface._compared(calls | {"prefill, MoE block": wrong.clone}, wanted)
