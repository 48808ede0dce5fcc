"""How the layer's time is told apart, and how many calls are queued: no GPU is needed for either."""

from __future__ import annotations

from collections.abc import Callable

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


def test_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is waited for once, by its last call's result, the first three do not count, and ways take turns."""
    now = 0.0
    made: list[str] = []
    waited: list[str] = []

    def way(name: str, *seconds: float) -> Callable[[], str]:
        """A call of which takes these, round after round, the last from then on."""

        def call() -> str:
            nonlocal now
            rounds = sum(of.startswith(name) for of in waited)
            now += seconds[min(rounds, len(seconds) - 1)]
            made.append(name)
            return f"{name}{made.count(name)}"

        return call

    monkeypatch.setattr(jax_layer.time, "perf_counter", lambda: now)
    ways = {"a": way("a", 1.0, 1.0, 1.0, 2.0, 3.0, 0.01), "b": way("b", 0.006)}
    assert jax_layer.in_turns(ways, waited.append, 2) == pytest.approx({"a": 2500.0, "b": 6.0})
    assert [of for of in waited if of < "b"] == ["a4", "a8", "a12", "a16", "a20"]
    of_b = [int(of[1:]) for of in waited if of > "b"]
    assert np.diff([0, *of_b]).tolist() == [4, 9, 9, 9, 9], "as many as take 50 milliseconds"
    for turn in range(5):
        assert {of[0] for of in waited[2 * turn : 2 * turn + 2]} == {"a", "b"}
    firsts = "".join(of[0] for of in waited[::2])
    assert set(firsts) == {"a", "b"}, "neither always comes first"
    assert jax_layer.in_turns({"a": ways["a"]}, waited.append, 1) == pytest.approx({"a": 10.0})


def test_layers_that_differ() -> None:
    want = torch.linspace(-1, 1, 100)
    wants = [want] * 5
    assert jax_layer.difference("ours", [want, want * 1.01, want, want * 0.98, want], wants) == pytest.approx(0.02)
    for wrong in (torch.zeros(100), want.roll(1), want.clone().fill_(torch.nan)):
        with pytest.raises(AssertionError, match=r"ours: the gradient of router differs by .* from torch's"):
            jax_layer.difference("ours", [want, want, wrong, want, want], wants)
