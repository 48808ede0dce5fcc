"""`python -m jaxmoe targets`: every kernel compiled to machine code for every target, on whatever machine this is."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from kernels_pallas import catalogue
from kernels_pallas.targets import TARGETS, compile_kernel, report


def main(argv: Sequence[str]) -> int:
    """Prints the table. Returns 0, 1 where a kernel fails to compile, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe targets",
        description="Compiles every kernel for every GPU target and prints what it takes. Needs triton, but no GPU.",
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be given again")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only the kernels whose line contains this text")
    args = parser.parse_args(argv)
    entries = [e for e in catalogue.CATALOGUE if args.kernel in e.name or args.kernel in e.kernels]
    if not entries:
        functions = ", ".join(sorted({e.name.split()[0] for e in catalogue.CATALOGUE}))
        parser.error(f"--kernel: nothing contains {args.kernel!r}; there are {functions}")
    if importlib.util.find_spec("triton") is None:
        print("python -m jaxmoe targets compiles with triton, which is not installed: pip install triton")
        return 2

    names = args.target or list(TARGETS)
    failed: list[str] = []
    compiled = 0
    width = max(len(f"{e.name}: {kernel}") for e in entries for kernel in e.kernels)
    print(f"{'kernel':{width}}  {'target':8}{'code bytes':>11}{'registers':>11}{'spills':>8}{'shared bytes':>14}")
    for entry in entries:
        for target in names:
            try:
                reports = [(k.name, report(compile_kernel(k, target))) for k in entry.lower(target)]
            except Exception as error:  # whatever stops a compiler: it is the result that this command reports
                failed.append(f"{entry.name} for {target}")
                print(f"{entry.name:{width}}  {target:8} FAILED: {type(error).__name__}: {error}")
                continue
            for name, r in reports:
                label = entry.name if len(reports) == 1 else f"{entry.name}: {name}"
                sizes = f"{r.machine_code_bytes:11}{r.registers:11}{r.spills:8}{r.shared_bytes:14}"
                print(f"{label:{width}}  {target:8}{sizes}", flush=True)
                compiled += 1

    print(f"\n{compiled} kernels compiled. Registers are a thread's (vector registers on ROCm). Spills: instructions")
    print("that touch local memory on CUDA, registers on ROCm.")
    if rocm := [target for target in names if TARGETS[target].platform == "rocm"]:
        print(f"{', '.join(rocm)}: compiled, not run.")
    for what in failed:
        print(f"FAILED: {what}", file=sys.stderr)
    return 1 if failed else 0
