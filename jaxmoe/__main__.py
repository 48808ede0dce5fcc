"""The command line: `python -m jaxmoe COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import jaxmoe

# Loaded when they are called for: jaxmoe itself imports neither torch nor the packages above it.
COMMANDS = {
    "info": ("jaxmoe.command.info", "devices, versions, and which implementation each function uses here, and why"),
    "targets": ("jaxmoe.command.targets", "compiles every kernel for every GPU target; no GPU needed"),
    "audit": ("bridge.audit", "what one MoE forward pass launches, beside transformers' own; needs jaxmoe[torch]"),
    "demo": ("bridge.demo", "trains a small model on real text, then runs it from PyTorch; needs jaxmoe[demo]"),
    "bench": ("benchmarks.bench", "timings on this machine, with peers where they are installed; needs jaxmoe[bench]"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe",
        description="Mixture-of-Experts routing, dispatch and combine as Pallas GPU kernels.",
        epilog="commands:\n" + "\n".join(f"  {name:9}{about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxmoe {jaxmoe.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments; try COMMAND --help")
    args = parser.parse_args(argv)
    name, about = COMMANDS[args.command]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("jaxmoe", "bridge", "benchmarks", "kernels_pallas"):
            raise  # one of our own is broken, not missing
        extra = about.partition("; needs ")[2]
        remedy = f": pip install '{extra}'" if extra else ""
        parser.exit(2, f"python -m jaxmoe {args.command}: {error.name} is not installed{remedy}\n")
    return int(module.main(args.arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
