"""A decode step replayed a million times, and called a hundred thousand times: right throughout, in constant memory.

    python -m benchmarks.endurance [--replays 1000000] [--calls 100000] [--output results.json]

The step is route, plan, dispatch and combine. First it is captured in a CUDA graph for 64 tokens and replayed; logits,
tokens and how many of them are valid change from turn to turn. Then it is called from Python, for 0 to 512 tokens in
random order. Every check compares with plain torch. Host memory is the process's resident set, device memory what torch
has allocated, what it has reserved, and what the driver says is in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bridge
from benchmarks import operation, stated
from benchmarks.operation import expect
from bridge import Routing, presets

CONFIG = dataclasses.replace(presets["deepseek-v3"], n_shared_experts=0)
WIDTH, TOKENS, MOST = 256, 64, 512
MIB = 1 << 20
# How much more there may be at the end than after warming up: Python's and the driver's allocators are not still.
LIMITS = {"host": 16 * MIB, "allocated": 0, "reserved": 32 * MIB, "driver": 64 * MIB}

Tensor = torch.Tensor


def memory() -> dict[str, int]:
    """Bytes in use: by the process on the host; on the device by torch's tensors, by torch, by everyone."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"host": pages * os.sysconf("SC_PAGE_SIZE")}
    if operation.DEVICE != "cuda":
        return used
    torch.cuda.synchronize()
    stats, (free, total) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
    used |= {"allocated": stats["allocated_bytes.all.current"], "reserved": stats["reserved_bytes.all.current"]}
    return used | {"driver": total - free}


class Watch:
    """Memory over time."""

    def __init__(self) -> None:
        self.samples: list[dict[str, int]] = []

    def look(self) -> None:
        """Takes a sample."""
        gc.collect()
        self.samples.append(memory())

    def growth(self) -> dict[str, int]:
        """The last sample less the first, in bytes."""
        return {name: self.samples[-1][name] - first for name, first in self.samples[0].items()}

    def check(self, what: str) -> None:
        """Raises AssertionError where memory has grown."""
        for name, grown in self.growth().items():
            expect(grown <= LIMITS[name], f"{what}: {name} memory grew by {grown:,} bytes")


class Step:
    """The tensors of a decode step, for as many tokens as they have room for."""

    def __init__(self, most: int) -> None:
        experts, slots = CONFIG.num_experts, CONFIG.num_slots
        make = lambda *sizes, dtype=torch.float32: torch.zeros(sizes, device=operation.DEVICE, dtype=dtype)
        self.x, self.logits = make(most, WIDTH, dtype=torch.bfloat16), make(most, experts, dtype=torch.bfloat16)
        self.bias, self.valid = make(experts), make(dtype=torch.int32)
        self.weights, self.ids = make(most, slots), make(most, slots, dtype=torch.int32)
        self.rows, self.y = make(most * slots, WIDTH, dtype=torch.bfloat16), torch.zeros_like(self.x)

    def fill(self, valid: int) -> None:
        """New inputs, and nothing right in the outputs."""
        for tensor in (self.x, self.logits, self.bias):
            tensor.normal_()
        self.bias.mul_(0.1)
        self.valid.fill_(valid)
        for tensor in (self.weights, self.rows, self.y):
            tensor.fill_(float("nan"))
        self.ids.fill_(-7)

    def run(self, tokens: int, *, checked: bool = False) -> None:
        """On the first tokens; `checked`: in comparison with plain torch."""
        slots, logits, x = CONFIG.num_slots, self.logits[:tokens], self.x[:tokens]
        out = Routing(self.weights[:tokens], self.ids[:tokens], None)
        options: Any = {"config": CONFIG, "return_load": False, "num_valid_tokens": self.valid, "out": out}
        routing = bridge.route(logits, self.bias, **options)
        plan = bridge.plan_dispatch(routing.experts, CONFIG.num_expert_ids)
        rows = bridge.dispatch(x, plan, out=self.rows[: tokens * slots])
        bridge.combine(rows, plan, routing.weights, out=self.y[:tokens])
        if checked:
            stated.check_plan(plan, routing.experts, CONFIG.num_expert_ids)
            self.check(tokens)

    def check(self, tokens: int) -> None:
        """Raises AssertionError where the last run's results are wrong."""
        valid = min(tokens, int(self.valid))
        weights, ids, y = self.weights[:tokens], self.ids[:tokens], self.y[:tokens]
        expect((ids[valid:] == -1).all() and (weights[valid:] == 0).all() and (y[valid:] == 0).all(), "past the valid")
        x, logits = self.x[:tokens], self.logits[:valid]
        stated.check_rows(self.rows[: ids.numel()], x, stated.plan(ids, CONFIG.num_expert_ids, 1, ids.numel()))
        if valid == 0:
            return
        stated.check_routing(weights[:valid], ids[:valid], logits, self.bias, CONFIG, least=1.0)
        stated.check_close(y[:valid], x[:valid].float() * weights[:valid].sum(1, keepdim=True), 1e-2, "sums")


def _captured(step: Step) -> Callable[[], None]:
    """A replay of the step at its full size."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run(TOKENS)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(TOKENS)
    return graph.replay


def replays(number: int, *, between: int = 50_000, capture: Callable[[Step], Callable[[], None]] = _captured) -> Watch:
    """Replays, with a check of the results, on new inputs, at every turn."""
    step, watch = Step(TOKENS), Watch()
    step.fill(TOKENS)
    replay = capture(step)
    done = turn = 0
    while done < number:
        step.fill((TOKENS, 37, 0, 1)[turn % 4])
        replay()
        step.check(TOKENS)  # of the first replay on these inputs, and below of the last
        count = min(between, number - done)
        for _ in range(count):
            replay()
        step.check(TOKENS)
        done, turn = done + count, turn + 1
        watch.look()
    watch.check(f"{number} replays")
    return watch


def calls(number: int, *, between: int = 2_000) -> Watch:
    """Steps called from Python for 0 to 512 tokens, the first 2,000 to warm up, with checks at every turn."""
    step, watch = Step(MOST), Watch()
    order = torch.randperm(MOST + 1, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(min(between, number)):
        step.run(order[i % len(order)])
    for done in range(0, number, between):
        for tokens in (0, 1, MOST, order[done % len(order)]):
            step.fill(tokens * 3 // 4 if done % 2 else tokens)
            step.run(tokens, checked=True)
        watch.look()
        for i in range(done, min(done + between, number)):
            step.run(order[i % len(order)])
    step.fill(MOST)
    step.run(MOST, checked=True)
    watch.look()
    watch.check(f"{number} calls")
    return watch


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Prints what was done and how memory went; with --output writes it. Returns 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__.partition("\n")[0])
    parser.add_argument("--replays", type=int, default=1_000_000, help="of the captured step (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=100_000, help="of the step from Python (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("endurance needs a CUDA or ROCm GPU that torch sees")
        return 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch.manual_seed(0)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "wrong": None}
    try:
        for name, run, number in (("replays", replays, arguments.replays), ("calls", calls, arguments.calls)):
            start = time.perf_counter()
            watch = run(number)
            seconds = time.perf_counter() - start
            found[name] = {"number": number, "seconds": seconds, "checks": len(watch.samples)}
            found[name] |= {"growth": watch.growth(), "samples": watch.samples}
            print(f"{number} {name} in {seconds:.1f} s, {len(watch.samples)} times checked; bytes more at the end than")
            print(f"  after warming up: {watch.growth()}", flush=True)
    except AssertionError as error:
        found["wrong"] = str(error)
        print(f"WRONG: {error}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
