"""How the layer's time is told apart, and how many calls are queued: no GPU is needed for either."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import jax_layer, layer_kernels


def test_kernels_of() -> None:
    """Two calls of three kernels, two of which overlap; the order in which the driver tells of them does not matter."""
    first = [("a", 0.0, 1000.0), ("b", 1000.0, 4000.0), ("a", 4000.0, 500.0), ("c", 6000.0, 1000.0)]
    second = [("a", 10_000.0, 3000.0), ("b", 13_000.0, 4000.0), ("a", 14_000.0, 2000.0), ("c", 18_000.0, 3000.0)]
    found = layer_kernels.kernels_of([*second, *first], 2)
    assert found["us"] == 10.5
    assert found["idle us"] == (1 + 3 + 1) / 2
    assert found["most of it between"] == "c, a"
    assert found["kernels"] == [
        {"kernel": "b", "launches": 1.0, "us": 4.0},
        {"kernel": "a", "launches": 2.0, "us": 3.25},
        {"kernel": "c", "launches": 1.0, "us": 2.0},
    ]
    alone = layer_kernels.kernels_of([("a", 5.0, 1000.0)], 1)
    assert (alone["us"], alone["idle us"], alone["most of it between"]) == (1.0, 0.0, None)
    with pytest.raises(ValueError, match="events: expected those of at least one kernel, got none"):
        layer_kernels.kernels_of([], 1)


def test_last_calls() -> None:
    events = [(name, start, 1.0) for start, name in enumerate("abcabcabc")]
    assert layer_kernels.last_calls(events[::-1], 2, 3) == events[3:]
    with pytest.raises(ValueError, match="events: expected as many of each of 2 calls, got 9"):
        layer_kernels.last_calls(events, 1, 2)


@pytest.mark.parametrize(("seconds", "calls"), [(1e-3, 50), (0.7e-3, 72), (17e-3, 4), (0.4, 4)])
def test_calls_of_a_round(seconds: float, calls: int) -> None:
    assert jax_layer.calls_of_a_round(seconds) == calls


def test_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is waited for once, by its last call's result, and the first three do not count."""
    now = 0.0
    made: list[int] = []
    waited: list[int] = []

    def call() -> int:
        nonlocal now
        now += 1.0 if len(waited) < 3 else 2.0 if len(waited) < 5 else 0.01
        made.append(len(made))
        return made[-1]

    monkeypatch.setattr(jax_layer.time, "perf_counter", lambda: now)
    assert jax_layer._milliseconds(call, waited.append, 2) == 2000.0
    assert waited == [3, 7, 11, 15, 19]
    assert jax_layer._milliseconds(call, waited.append, 1) == pytest.approx(10.0)
    assert np.diff(waited).tolist()[4:] == [4, 5, 5, 5], "as many as take 50 milliseconds"


def test_layers_that_differ() -> None:
    want = torch.linspace(-1, 1, 100)
    wants = [want] * 5
    assert jax_layer.difference("ours", [want, want * 1.01, want, want * 0.98, want], wants) == pytest.approx(0.02)
    for wrong in (torch.zeros(100), want.roll(1), want.clone().fill_(torch.nan)):
        with pytest.raises(AssertionError, match=r"ours: the gradient of router differs by .* from torch's"):
            jax_layer.difference("ours", [want, want, wrong, want, want], wants)
