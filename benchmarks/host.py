"""What a call costs the host: the time until it returns, nothing waited for on the GPU.

    python -m benchmarks.host [--output results.json]

An in-place routing call at decode size, beside torch's own `add` into a tensor that is there, and vLLM's and
FlashInfer's ops where they are installed; and what the first call in a process costs, with an empty cache of compiled
kernels and with a full one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bridge
from benchmarks import peers
from bridge.native import routing as native

CALLS, ROUNDS = 200, 40

FIRST_CALL = """
import json, time, torch, bridge
from bridge.native import build
config = bridge.presets["deepseek-v3"]
logits, bias = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16), torch.randn(256, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
bridge.route(logits, bias, config=config, return_load=False)
torch.cuda.synchronize()
print(json.dumps({"call": time.perf_counter() - start, "build": sum(b.seconds for b in build.builds),
                  "compiled": [b.compiled for b in build.builds]}))
"""


def host_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds a call, the medians of rounds; the GPU is idle when a round begins.

    The calls take turns, so that what else the machine does falls on all of them.
    """
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _, (name, call) in itertools.product(range(ROUNDS), calls.items()):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds[name].append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(times) for name, times in rounds.items()}


def first_call(cache: str) -> dict[str, Any]:
    """The first routing call of a fresh process that keeps its kernels in `cache`."""
    environment = {**os.environ, "JAXMOE_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> dict[str, Any]:
    """All of it, in microseconds and seconds."""
    config = bridge.presets["deepseek-v3"]
    config = dataclasses.replace(config, n_shared_experts=0)
    logits = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(256, device="cuda")
    out = bridge.Routing(torch.empty(64, 8, device="cuda"), torch.empty(64, 8, device="cuda", dtype=torch.int32), None)
    text, weights, experts = config.json, out.weights, out.experts
    op = torch.ops.jaxmoe.route_out.default
    made_for, device = native.route_kernels.config_for(64, 256, 8, "cuda"), logits.get_device()
    kernel = native._route(text, logits.dtype, bias.dtype, None, False, 256, 1, 0, made_for, True, device)
    addresses = logits.data_ptr(), bias.data_ptr(), 64, weights.data_ptr(), experts.data_ptr()
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            "torch.add(out=)": lambda: torch.add(weights, weights, out=weights),
            "launch": lambda: kernel(64, 1, *addresses),
            "torch.ops.jaxmoe.route_out": lambda: op(logits, bias, None, None, text, weights, experts, None),
            "bridge.route(out=)": lambda: bridge.route(logits, bias, config=config, return_load=False, out=out),
            "bridge.route": lambda: bridge.route(logits, bias, config=config, return_load=False),
        }
        calls |= peers.routing_calls(logits.float(), bias)
        micros = host_times(calls)
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = first_call(cache), first_call(cache)
    return {"microseconds a call": micros, "first call, cold": cold, "first call, warm": warm}


def main() -> None:
    """Prints the figures; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **measure()}
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
