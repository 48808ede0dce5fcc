"""`python -m jaxmoe bench`: times every operation beside its peers and its floor, on this machine's GPU."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def _said(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    import torch
    import triton

    from benchmarks import peers

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "triton": triton.__version__}
        | peers.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints a table and writes it, with the machine, as JSON; returns 1 where a result is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m jaxmoe bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two numbers of tokens for each operation")
    parser.add_argument(
        "--output", type=Path, default=None, help="the JSON file to write (default: benchmarks/results)"
    )
    parser.add_argument("--commit", default=None, help="what is measured (default: git describe)")
    parser.add_argument("--note", default="peers as installed", help="kept with the results, such as the peers' source")
    arguments = parser.parse_args(argv)
    try:
        import torch
    except ModuleNotFoundError:
        print("bench needs torch, which times the kernels and the peers in CUDA graphs", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "bench needs a CUDA or ROCm GPU that torch sees: here is none, so there is nothing to time", file=sys.stderr
        )
        return 2
    from benchmarks import native, operations, timing
    from kernels_pallas.targets import TARGETS

    if (target := native.target_here()) not in TARGETS:
        print(f"bench knows the targets {', '.join(TARGETS)}: this GPU is {target}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    machine = _machine()
    bandwidth, empty = timing.copy_bandwidth(), timing.empty_launch()
    commit = arguments.commit or _said("git", "describe", "--always", "--dirty")
    machine |= {"commit": commit, "note": arguments.note}
    machine |= {"copy_bytes_per_second": bandwidth, "empty_launch_us": empty}
    print(f"{machine['gpu']}, driver {machine['driver']}, {machine['versions']}, commit {machine['commit']}")
    print(
        f"copy {bandwidth / 1e12:.2f} TB/s; a launch that does nothing {empty:.2f} us; medians, microseconds a call\n"
    )
    print(f"{'operation':<20}{'tokens':>7}{'jaxmoe':>10}{'floor':>9}   peers (times jaxmoe)")
    records = []
    try:
        for operation in operations.operations(arguments.quick):
            ours = timing.time_graph(operation.ours)
            others = {name: timing.time_graph(call) for name, call in operation.others.items()}
            floor = max(operation.bytes / bandwidth * 1e6, empty)
            shown = ", ".join(f"{name} {t.p50:.2f} ({t.p50 / ours.p50:.2f}x)" for name, t in others.items())
            print(f"{operation.name:<20}{operation.tokens:>7}{ours.p50:>10.2f}{floor:>9.2f}   {shown}", flush=True)
            records.append(
                {
                    "operation": operation.name,
                    "tokens": operation.tokens,
                    "launches": operation.launches,
                    "bytes": operation.bytes,
                    "floor_us": floor,
                    "jaxmoe": asdict(ours),
                    "peers": {name: asdict(t) for name, t in others.items()},
                }
            )
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    stamp = machine["date"].replace(":", "").replace("+0000", "")
    path = arguments.output or RESULTS / f"{machine['gpu'].replace(' ', '-')}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": records}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
