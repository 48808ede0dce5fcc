"""The command line: `python -m jaxmoe COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jaxmoe


class Command(NamedTuple):
    """Its module is loaded when it is called for: jaxmoe itself imports neither torch nor the packages above it."""

    module: str
    about: str
    extra: str = ""  # that brings what it needs


COMMANDS = {
    "info": Command(
        "jaxmoe.command.info", "devices, versions, and which implementation each function uses here, and why"
    ),
    "targets": Command("jaxmoe.command.targets", "compiles every kernel for every GPU target; no GPU needed"),
    "audit": Command("bridge.audit", "what one MoE forward pass launches, beside transformers' own", "torch"),
    "demo": Command("bridge.demo", "trains a small model on real text, then runs it from PyTorch", "demo"),
    "bench": Command("benchmarks.bench", "timings on this machine, with peers where they are installed", "bench"),
}


def _described(command: Command) -> str:
    return f"{command.about}; needs jaxmoe[{command.extra}]" if command.extra else command.about


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe",
        description="Mixture-of-Experts routing, dispatch and combine as Pallas GPU kernels.",
        epilog="commands:\n" + "\n".join(f"  {name:9}{_described(command)}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxmoe {jaxmoe.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments; try COMMAND --help")
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("jaxmoe", "bridge", "benchmarks", "kernels_pallas"):
            raise  # one of our own is broken, not missing
        remedy = f": pip install 'jaxmoe[{command.extra}]'" if command.extra else ""
        parser.exit(2, f"python -m jaxmoe {args.command}: {error.name} is not installed{remedy}\n")
    return int(module.main(args.arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
