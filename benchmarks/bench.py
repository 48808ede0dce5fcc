"""`python -m jaxmoe bench`: times every operation beside its peers and its floor, on this machine's GPU."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import record, report

ROOT = Path(__file__).parents[1]
# Whether this is the repository, and not an installed package, whose folder is not the user's to write to.
IS_SOURCE = (ROOT / "pyproject.toml").exists()
RESULTS = ROOT / "benchmarks" / "results" if IS_SOURCE else Path("jaxmoe-bench")
# What --only may name: module and function. The last two measure by themselves.
KINDS = {
    "route": ("benchmarks.routing", "routes"),
    "load": ("benchmarks.routing", "loads"),
    "router_logits": ("benchmarks.routing", "router_logits"),
    "movement": ("benchmarks.movement", "movement"),
    "elsewhere": ("benchmarks.movement", "elsewhere"),
    "align": ("benchmarks.movement", "align"),
    "step": ("benchmarks.movement", "step"),
    "experts": ("benchmarks.matmuls", "experts"),
    "layer": ("benchmarks.matmuls", "layer"),
    "part": ("benchmarks.parts", "part"),
    "host": ("benchmarks.host", "measure"),
    "huggingface": ("benchmarks.huggingface", "measure"),
}
ALONE = ("host", "huggingface")


def _said(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine(commit: str | None, note: str) -> dict[str, Any]:
    """The conditions of this run."""
    import torch

    from benchmarks import peers, timing

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
        "versions": {name: _version(name) for name in ("jax", "torch", "triton", "transformers")} | peers.found(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or (_said("git", "describe", "--always", "--dirty") if IS_SOURCE else _version("jaxmoe")),
        "note": note,
        "copy_bytes_per_second": timing.copy_bandwidth(),
        "matmul_flops_per_second": timing.matmul_rate(),
        "empty_launch_us": timing.empty_launch(),
    }


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few sizes, and nothing that is compiled at first use (FlashInfer, torch.compile, XLA)",
    )
    parser.add_argument(
        "--only", type=_names, default=None, metavar="NAME,...", help=f"some of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="the JSON file to write (default: in the sources' benchmarks/results; installed, in ./jaxmoe-bench)",
    )
    parser.add_argument("--append", action="store_true", help="add to what that file holds, in place of the same sizes")
    parser.add_argument("--commit", default=None, help="what is measured (default: git describe, or the version)")
    parser.add_argument("--note", default="peers as installed", help="kept with the results, such as the peers' source")
    arguments = parser.parse_args(argv)
    if arguments.only is None:
        arguments.only = [name for name in KINDS if not (arguments.quick and name in ALONE)]
    if arguments.append and (arguments.output is None or not arguments.output.exists()):
        parser.error("--append: expected --output with a file that is there")
    return arguments


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Prints a table and writes it as JSON; returns 1 where a result is wrong or missing, 2 without a GPU."""
    arguments = _arguments(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the GPU's memory from torch
    try:
        import torch
    except ModuleNotFoundError:
        return _refuse("bench needs torch, which times in CUDA graphs: pip install 'jaxmoe[bench]'")
    if not torch.cuda.is_available():
        return _refuse("bench needs a CUDA or ROCm GPU that torch sees: here is none, so there is nothing to time")
    from bridge.native.build import target_of

    try:
        target_of(torch.cuda.current_device())
    except ValueError as error:
        return _refuse(f"bench: {error}")
    torch.manual_seed(0)
    machine = _machine(arguments.commit, arguments.note)
    stamp = machine["date"].replace(":", "").replace("+0000", "")
    path = arguments.output or RESULTS / f"{machine['gpu'].replace(' ', '-')}-{stamp}" / "bench.json"
    try:
        data = record.start(machine, record.load(path) if arguments.append else None)
    except ValueError as error:
        return _refuse(str(error))
    print(f"{machine['gpu']}, driver {machine['driver']}, {machine['versions']}, commit {machine['commit']}")
    print(
        f"copy {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{machine['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, a launch that does nothing "
        f"{machine['empty_launch_us']:.2f} us; medians, microseconds a call\n"
    )
    print(f"{'operation':<34}{'tokens':>7}{'jaxmoe':>10}{'floor':>9}   peers (times jaxmoe)")
    with torch.no_grad():
        problems = run(arguments.only, arguments.quick, data, lambda: record.save(path, data))
    print(f"\nwritten: {path}")
    for problem in problems:
        print(f"NOT TIMED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 2


def run(kinds: list[str], quick: bool, data: record.Data, save: Callable[[], None]) -> list[str]:
    """Times these kinds into `data`, saved after each; returns what of jaxmoe's could not be timed, and why."""
    problems = []
    for kind in kinds:
        begin = time.perf_counter()
        module, function = KINDS[kind]
        measure = getattr(importlib.import_module(module), function)
        if kind in ALONE:
            problems += _alone(kind, measure, data)
            save()
        else:
            for found in _timed(measure(quick), data["machine"]):
                record.add(data, found)
                save()
                if "error" in found:
                    problems.append(f"{found['operation']} at {found['tokens']} tokens: {found['error']}")
                print(line(found), flush=True)
        print(f"{f'({kind}: {time.perf_counter() - begin:.0f} s)':>60}", flush=True)
    return problems


def _alone(kind: str, measure: Callable[[], Any], data: record.Data) -> list[str]:
    """What measures by itself, recorded under its name; a failure with its text."""
    try:
        found = measure()
    except Exception as error:
        data[kind] = {"error": _text(error), "run": len(data["runs"]) - 1}
        return [f"{kind}: {_text(error)}"]
    data[kind] = {**found, "run": len(data["runs"]) - 1}
    print(kind, *report.section(found), sep="\n", flush=True)
    return []


def _timed(builds: Iterator[Any], machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of all operations; one whose inputs cannot be made is a record of the failure."""
    for build in builds:
        try:
            for operation in build():
                yield timed(operation, machine)
        except Exception as error:
            arguments = [value for value in build.args if isinstance(value, (int, str))]
            tokens = next((value for value in arguments if isinstance(value, int)), 0)
            name = " ".join([build.func.__name__.strip("_"), *(v for v in arguments if isinstance(v, str))])
            yield {"operation": name, "tokens": tokens, "error": _text(error), "peers": {}}
        _free()


def timed(operation: Any, machine: dict[str, Any]) -> dict[str, Any]:
    """The record of an operation: checked, then timed, ours and each peer; failures with their text."""
    floor = max(
        operation.bytes / machine["copy_bytes_per_second"] * 1e6,
        operation.flops / machine["matmul_flops_per_second"] * 1e6,
        machine["empty_launch_us"],
    )
    found: dict[str, Any] = {
        "operation": operation.name,
        "tokens": operation.tokens,
        "bytes": operation.bytes,
        "flops": operation.flops,
        "floor_us": floor,
        "peers": {},
        "missing": dict(operation.missing),
    }
    try:
        found["jaxmoe"] = _time(operation.ours, operation)
    except Exception as error:
        found["error"] = _text(error)
        _check_alive()
        return found
    for name, entry in operation.peers.items():
        try:
            found["peers"][name] = _time(entry, operation)
        except Exception as error:
            found["missing"][name] = _text(error)
            _check_alive()
    return found


def _time(entry: Any, operation: Any) -> dict[str, float]:
    from benchmarks import timing
    from benchmarks.operation import checked

    checked(entry)
    if entry.runs:
        result = timing.time_wall(entry.call, entry.runs)
    else:
        result = timing.time_graph(entry.call, calls=operation.calls, pause=operation.pause)
    found = asdict(result)
    if operation.flops:
        found["tflops"] = operation.flops / result.p50 / 1e6
    return found


def _check_alive() -> None:
    """Ends the program where a failure has taken the GPU with it: nothing that follows could be believed."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the GPU does not answer any more, what was timed until now is written: {error}") from error


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _text(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


def line(found: dict[str, Any]) -> str:
    """A line of the printed table."""
    begin = f"{found['operation']:<34}{found['tokens']:>7}"
    if "error" in found:
        return f"{begin}   NOT TIMED: {found['error']}"
    ours = found["jaxmoe"]["p50"]
    shown = [f"{name} {t['p50']:.2f} ({t['p50'] / ours:.2f}x)" for name, t in found["peers"].items()]
    shown += [f"{name}: {why}" for name, why in found["missing"].items()]
    rate = f"   {found['jaxmoe']['tflops']:.0f} TFLOP/s" if found["flops"] else ""
    return f"{begin}{ours:>10.2f}{found['floor_us']:>9.2f}   {', '.join(shown)}{rate}"


if __name__ == "__main__":
    raise SystemExit(main())
