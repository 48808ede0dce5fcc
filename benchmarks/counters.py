"""Hardware counters of the kernels whose time bytes do not explain: what to read beside a time and its floor.

    python -m benchmarks.counters [--output counters.md]

Needs Nsight Compute (`ncu`) and leave to read counters. Every operation runs once before it is counted. A launch a row:
how long it took (longer than in a CUDA graph: ncu empties the caches and waits), how many programs, warp instructions,
how busy issue slots, the ALU and the tensor cores were, warps on a multiprocessor, how long a warp waited for what
between two instructions (cycles), bytes of memory, and the clock, which falls where a kernel draws all of the card's
power.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import bridge
from benchmarks.matmuls import EXPERTS, INNER, TOKENS, TOP_K, WIDTH, shares
from bridge.native import driver, experts

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "gpu__time_duration.sum": "time",
    "launch__grid_size": "programs",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue %",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "ALU %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor %",
    "sm__warps_active.avg.per_cycle_active": "warps",
    STALLED.format("long_scoreboard"): "waits: memory",
    STALLED.format("barrier"): "barrier",
    STALLED.format("no_instruction"): "code",
    STALLED.format("wait"): "fixed",
    "dram__bytes.sum": "bytes",
    "sm__cycles_elapsed.avg.per_second": "clock",
}
RANGE = "counted"


def operations() -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, a function that launches it)."""
    make = lambda *sizes: torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)
    for name in ("deepseek-v3", "kimi-k2"):
        config = bridge.presets[name]
        bias = torch.randn(config.num_experts, device="cuda") * 0.1
        for tokens in (64, 4096, 40960):
            x = make(tokens, config.num_experts)
            yield f"route {name} {tokens}", lambda: bridge.route(x, bias, config=config, return_load=False)  # noqa: B023
    for tokens in (64, 512, 4096):
        ids = torch.rand(tokens, 256, device="cuda").topk(8, dim=1).indices.int()
        for align in (1, 64):
            yield f"plan {tokens}, align {align}", lambda: bridge.plan_dispatch(ids, 256, align=align)  # noqa: B023
        rows, plan = make(tokens, 7168), bridge.plan_dispatch(ids, 256)
        yield f"dispatch {tokens}", lambda: bridge.dispatch(rows, plan)  # noqa: B023
    for kind in ("even", "uneven"):
        sizes = shares(kind, TOKENS * TOP_K, EXPERTS)
        for depth, width in ((WIDTH, 2 * INNER), (INNER, WIDTH)):
            rows, grad = make(TOKENS * TOP_K, depth), make(TOKENS * TOP_K, width)
            weight = make(EXPERTS, width, depth).mT
            what = f"{kind}, {depth} x {width}"
            yield f"grouped matmul {what}", lambda: bridge.grouped_matmul(rows, weight, sizes)  # noqa: B023
            out = make(EXPERTS, depth, width)
            yield f"its weights' gradient, {what}", lambda: experts.grouped_outer(rows, grad, sizes, out)  # noqa: B023


def launch(path: Path) -> None:
    """Runs every operation in a range that ncu looks for, and writes down (operation, kernel) for each launch."""
    launched: list[tuple[str, str]] = []
    for what, run in operations():
        run()
        torch.cuda.synchronize()
        observe = lambda name, grid, what=what: launched.append((what, name))
        driver.observers.append(observe)
        with torch.cuda.nvtx.range(RANGE):
            run()
            torch.cuda.synchronize()
        driver.observers.remove(observe)
    path.write_text(json.dumps(launched))


def table(printed: str, launched: list[tuple[str, str]]) -> Iterator[str]:
    """The lines of a table in Markdown, from what ncu printed."""
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(printed[printed.index('"ID"') :].splitlines()):
        value = f"{row['Metric Value']} {row['Metric Unit'].replace('%', '')}".strip()
        found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})[row["Metric Name"]] = value
    if [row["kernel"] for row in found.values()] != [kernel for _, kernel in launched]:
        raise RuntimeError(f"ncu saw {[row['kernel'] for row in found.values()]}, launched were {launched}")
    yield f"| operation | kernel | {' | '.join(METRICS.values())} |"
    yield f"|---|---|{'---:|' * len(METRICS)}"
    for (what, kernel), row in zip(launched, found.values(), strict=True):
        yield f"| {what} | {kernel} | {' | '.join(row[metric] for metric in METRICS)} |"


def main() -> None:
    """Prints the table; with --output writes it too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    parser.add_argument("--launch", type=Path, help="only launch what is counted, and write down here what that is")
    arguments = parser.parse_args()
    if arguments.launch:
        launch(arguments.launch)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launched.json")
        ncu = ["ncu", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
        ncu += ["--nvtx", "--nvtx-include", f"{RANGE}/"]
        command = [*ncu, sys.executable, "-m", "benchmarks.counters", "--launch", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [torch.cuda.get_device_name(), "", *table(done.stdout, json.loads(path.read_text()))]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
