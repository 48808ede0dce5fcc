"""Device time of a call: CUDA graphs of many calls, replayed; and what the card can copy and multiply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the 20th, 50th and 80th percentile over replays."""

    p20: float
    p50: float
    p80: float


def _percentiles(times: Sequence[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10)
    return Timing(deciles[1], deciles[4], deciles[7])


def time_graph(
    call: Callable[[int], object],
    *,
    calls: int = 20,
    replays: int = 40,
    seconds: float = 0.3,
    warm: int = 3,
    pause: float = 0.0,
) -> Timing:
    """Times `call(i)` for i in 0..calls-1, captured in one CUDA graph that is replayed; i selects the input set.

    Where the replays, with their pauses, would take more than `seconds` there are fewer, ten at least.

    Replays follow one another at once. Large products then draw as much power as the card may, which lowers its clock;
    with a pause before each replay, in seconds, it does not come to that (docs/performance/grouped_matmul.md).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(calls, warm)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []  # outputs that a call allocates live as long as the graph
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # XLA has threads of its own
        for i in range(calls):
            kept.append(call(i))
    one = min(_time(graph.replay) for _ in range(3)) + pause * 1e6
    times = []
    for _ in range(max(10, min(replays, int(seconds * 1e6 / one)))):
        time.sleep(pause)
        times.append(_time(graph.replay) / calls)
    return _percentiles(times)


def time_eager(call: Callable[[], object], *, repeats: int = 20, warm: int = 3) -> Timing:
    """Times a call as it is made from Python, until the GPU has done it: where the host is slower, the host."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    return _percentiles([_time(call) for _ in range(repeats)])


def time_wall(call: Callable[[int], object], runs: int, *, repeats: int = 10) -> Timing:
    """Times a call that waits for `runs` runs of an operation, by the host's clock; microseconds a run."""
    call(0)
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append((time.perf_counter() - start) / runs * 1e6)
    return _percentiles(times)


def _time(run: Callable[[], object]) -> float:
    """Microseconds between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def input_sets(bytes_of_one: int, *, calls: int = 20, beyond: int = 160 << 20) -> int:
    """How many copies of the inputs to rotate through, at most `calls`: past the cache where that suffices."""
    return max(2, min(calls, -(-beyond // max(bytes_of_one, 1))))


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read and written: the driver's or a kernel's, the faster."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda _: target.copy_(source), lambda _: torch.neg(source, out=target))
    fastest = min(time_graph(way, calls=4, replays=20).p50 for way in ways)
    return 2 * source.numel() * source.element_size() / fastest * 1e6


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a large product of random bfloat16 matrices, by torch."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_graph(lambda _: a @ b, calls=2, replays=20).p50 * 1e6


def empty_launch() -> float:
    """Microseconds that a kernel of one thread takes inside a graph: the floor of any launch."""
    one = torch.zeros(1, device="cuda")
    return time_graph(lambda _: one.zero_()).p50
