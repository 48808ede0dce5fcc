"""A line for each of several ways to do the same, each checked before it is timed: what tiles are chosen by."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import timing


def line(
    label: str,
    call: Callable[[int], object],
    check: Callable[[], None],
    *,
    calls: int,
    seconds: float,
    flops: float = 0,
) -> None:
    """Prints the time of `call(i)` for i in 0..calls-1, and its speed if `flops` are given; or what is wrong."""
    try:
        check()
        taken = timing.time_graph(call, calls=calls, seconds=seconds).p50
        speed = f" {flops / taken / 1e6:7.1f} TFLOP/s" if flops else ""
        print(f"{taken:9.2f} us{speed}  {label}", flush=True)
    except Exception as error:  # the others are timed all the same
        print(f"   FAILED  {label}: {type(error).__name__}: {str(error)[:150]}", flush=True)
