"""Device time of a call: CUDA graphs of many calls, replayed; and what the card can copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the 20th, 50th and 80th percentile over replays."""

    p20: float
    p50: float
    p80: float


def time_graph(call: Callable[[int], object], *, calls: int = 20, replays: int = 40) -> Timing:
    """Times `call(i)` for i in 0..calls-1, captured in one CUDA graph that is replayed; i selects the input set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(calls):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []  # outputs that a peer allocates live as long as the graph
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept.append(call(i))
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(replays):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    p20, p50, p80 = (statistics.quantiles(times, n=10)[k] for k in (1, 4, 7))
    return Timing(p20, p50, p80)


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


def empty_launch() -> float:
    """Microseconds that a kernel of one thread takes inside a graph: the floor of any launch."""
    one = torch.zeros(1, device="cuda")
    return time_graph(lambda _: one.zero_()).p50
