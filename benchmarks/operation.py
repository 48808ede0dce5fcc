"""What is timed: one operation at one number of tokens, ours and the peers', each with the check of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

DEVICE = "cuda"  # the tests, which time nothing, put it on "cpu"

Call = Callable[[int], Any]
Check = Callable[[Any], None]


class Entry(NamedTuple):
    """A way to do an operation."""

    call: Call  # call(i) works on input set i, as often as it comes round
    check: Check  # of what call(0) returned; raises AssertionError
    writes: tuple[torch.Tensor, ...] = ()  # what call(0) fills: the check must not see an earlier result there
    runs: int = 0  # 0: captured in a CUDA graph. Else call(i) waits for as many runs of the operation, and is clocked


@dataclass
class Operation:
    """One operation at one number of tokens, and the least that any way to do it must move and compute."""

    name: str
    tokens: int
    bytes: int
    ours: Entry
    peers: dict[str, Entry] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peers that are not timed, and why
    flops: int = 0
    calls: int = 20  # in a graph
    pause: float = 0.0  # seconds before each replay of it, in which the card cools down


Build = Callable[[], Iterable[Operation]]  # operations that share their inputs


def random(*sizes: int) -> torch.Tensor:
    """bfloat16, normally distributed."""
    return torch.empty(sizes, device=DEVICE, dtype=torch.bfloat16).normal_()


def empty(*sizes: int) -> torch.Tensor:
    """bfloat16, whatever there was."""
    return torch.empty(sizes, device=DEVICE, dtype=torch.bfloat16)


def checked(entry: Entry) -> None:
    """Runs an entry once, into tensors that hold nothing right; raises what its check raises."""
    for tensor in entry.writes:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    entry.check(entry.call(0))


def expect(ok: object, what: str) -> None:
    """Raises AssertionError unless ok: nothing is timed then."""
    if not bool(ok):
        raise AssertionError(f"wrong result: {what}")
