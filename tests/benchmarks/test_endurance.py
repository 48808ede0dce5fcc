"""The endurance run: that it checks what it says, at small sizes on the CPU, with plain torch in place of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import endurance, operation, stated
from benchmarks.endurance import MIB, Step, Watch

E, SLOTS = endurance.CONFIG.num_expert_ids, endurance.CONFIG.num_slots


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(operation, "DEVICE", "cpu")
    monkeypatch.setattr(endurance, "WIDTH", 16)
    monkeypatch.setattr(endurance, "TOKENS", 40)
    monkeypatch.setattr(endurance, "MOST", 5)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def plain(step: Step, tokens: int) -> None:
    """The step in plain torch."""
    valid = min(tokens, int(step.valid))
    weights, ids = stated.route(step.logits[:tokens], step.bias, endurance.CONFIG)
    step.weights[:tokens], step.ids[:tokens] = weights, ids
    step.weights[valid:tokens], step.ids[valid:tokens] = 0, -1
    plan = stated.plan(step.ids[:tokens], E, 1, tokens * SLOTS)
    moved = step.x[plan.slots.clamp(min=0) // SLOTS].masked_fill((plan.slots < 0)[:, None], 0)
    step.rows[: tokens * SLOTS] = moved
    step.y[:tokens] = stated.combine(moved, plan, step.weights[:tokens]).bfloat16()


def test_step() -> None:
    """jaxmoe's own, with fewer tokens than there is room for, and not all of them valid."""
    step = Step(5)
    step.fill(2)
    step.run(3, checked=True)
    assert (step.ids[3:] == -7).all()
    step.y[0] += 1
    with pytest.raises(AssertionError, match="sums"):
        step.check(3)


def captured(step: Step, spoil: Callable[[Step, int], None] = lambda step, number: None) -> Callable[[], None]:
    """A replay that counts itself."""
    done = iter(range(10**6))

    def replay() -> None:
        plain(step, 40)
        spoil(step, next(done))

    return replay


def test_replays() -> None:
    """With all, some, no and one of the tokens valid."""
    counts: list[int] = []
    count = lambda step, number: counts.append(int(step.valid))
    watch = endurance.replays(10, between=3, capture=lambda step: captured(step, count))
    assert counts == [40] * 4 + [37] * 4 + [0] * 4 + [1] * 2
    assert len(watch.samples) == 4


@pytest.mark.parametrize("number", [0, 4, 5])
@pytest.mark.parametrize("name", ["x", "weights", "ids", "rows", "y"])
def test_replays_that_go_wrong(name: str, number: int) -> None:
    """Once, in one element, in a replay that is checked: the first, the last, or the first on other inputs."""

    def spoil(step: Step, done: int) -> None:
        if done == number:
            getattr(step, name)[7, 1] += 1

    with pytest.raises(AssertionError, match="wrong result"):
        endurance.replays(8, between=4, capture=lambda step: captured(step, spoil))


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as were asked for after warming up, of every size, and checks of the smallest and the largest."""
    plainly, checked = [], []

    def run(step: Step, tokens: int, *, checked_: bool = False) -> None:
        plain(step, tokens)
        (checked if checked_ else plainly).append(tokens)
        if checked_:
            step.check(tokens)

    monkeypatch.setattr(Step, "run", lambda step, tokens, checked=False: run(step, tokens, checked_=checked))
    watch = endurance.calls(20, between=8)
    assert len(plainly) == 8 + 20
    assert set(plainly) == {0, 1, 2, 3, 4, 5}
    assert {0, 1, 5} <= set(checked)
    assert len(watch.samples) == 4


@pytest.mark.parametrize("name", endurance.LIMITS)
def test_growth_of_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind, beyond its limit and not before."""
    used = dict.fromkeys(endurance.LIMITS, 100 * MIB)
    monkeypatch.setattr(endurance, "memory", lambda: dict(used))
    watch = Watch()
    watch.look()
    used[name] += endurance.LIMITS[name]
    watch.look()
    watch.check("calls")
    used[name] += 1
    watch.look()
    with pytest.raises(AssertionError, match=f"calls: {name} memory grew by"):
        watch.check("calls")


def test_memory_of_this_process() -> None:
    """Bytes: a tensor that is written to shows."""
    before = endurance.memory()["host"]
    kept = torch.ones(32 * MIB)
    assert endurance.memory()["host"] - before > 0.9 * kept.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert endurance.main([]) == 2
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().out
