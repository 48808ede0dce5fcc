"""Which kernels the layer's time in JAX goes to, by what the GPU's driver records of each (jax.profiler, CUPTI).

    python -m benchmarks.layer_kernels [--tokens 4096] [--output kernels.json]

Calls are queued as in `benchmarks.jax_layer`, whose layer this is, for so long before the round that counts that the
card's clock is that of a card at work; "idle" is time in which no kernel runs.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks.jax_layer import calls_in_jax, calls_of_a_round


def kernels_of(events: Iterable[tuple[str, float, float]], calls: int) -> dict[str, Any]:
    """What `calls` equal calls did, of (name, start, duration) in nanoseconds: microseconds a call, the longest first.

    Also how long no kernel ran, and between which two that was longest in all.
    """
    ordered = sorted(events, key=lambda event: event[1])
    if not ordered:
        raise ValueError("events: expected those of at least one kernel, got none: nothing ran on a GPU, or no CUPTI")
    durations: dict[str, list[float]] = collections.defaultdict(list)
    gaps: dict[str, float] = collections.defaultdict(float)
    first, end, last = ordered[0][1], ordered[0][1], ""
    for name, start, duration in ordered:
        durations[name].append(duration)
        if start > end:
            gaps[f"{last}, {name}"] += start - end
        if start + duration > end:
            end, last = start + duration, name
    kernels = [
        {"kernel": name, "launches": len(times) / calls, "us": sum(times) / calls / 1e3}
        for name, times in durations.items()
    ]
    return {
        "us": (end - first) / calls / 1e3,
        "idle us": sum(gaps.values()) / calls / 1e3,
        "most of it between": max(gaps, key=lambda pair: gaps[pair], default=None),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
    }


def last_calls(
    events: Iterable[tuple[str, float, float]], calls: int, all_calls: int
) -> list[tuple[str, float, float]]:
    """The events of the last `calls` of `all_calls` calls that launch the same."""
    ordered = sorted(events, key=lambda event: event[1])
    if len(ordered) % all_calls:
        raise ValueError(f"events: expected as many of each of {all_calls} calls, got {len(ordered)}")
    return ordered[len(ordered) - len(ordered) // all_calls * calls :]


def recorded(call: Callable[[], Any], *, seconds: float = 0.5) -> dict[str, Any]:
    """`kernels_of` one round of `call`, after that many seconds of the same."""
    for _ in range(2):  # the first is compiled
        begun = time.perf_counter()
        jax.block_until_ready(call())
    calls, rounds = calls_of_a_round(time.perf_counter() - begun), 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):  # which takes a while to start, in which the card rests
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds or rounds < 2:
                for _ in range(calls):
                    result = call()
                jax.block_until_ready(result)
                rounds += 1
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            (event.name, event.start_ns, event.duration_ns)
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return kernels_of(last_calls(events, calls, calls * rounds), calls)


def main() -> None:
    """Prints a table of each pass; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tokens": {}}
    for tokens in arguments.tokens:
        layer = calls_in_jax(tokens, "pallas")
        passes = {"forward": recorded(layer.forward), "forward and backward": recorded(layer.both)}
        results["tokens"][tokens] = passes
        for name, found in passes.items():
            print(f"{tokens} tokens, {name}: {found['us']:.0f} us, of which idle {found['idle us']:.0f}")
            for of in found["kernels"]:
                print(f"  {of['us']:9.1f} {of['launches']:6.2f}  {of['kernel'][:100]}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
