"""`python -m jaxmoe info`: what is here, and what would run."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata

import jax

import jaxmoe
from jaxmoe.implementation import default_implementation

PACKAGES = ("jax", "jaxlib", "numpy", "triton", "torch", "transformers")  # read, not imported
WITH_KERNELS = ("router_logits", "route", "plan_dispatch", "dispatch", "experts", "grouped_matmul", "combine")
WITHOUT = {
    "update_bias": "a few elementwise operations: left to XLA",
    "switch_loss": "a softmax and sums: left to XLA",
    "sequence_balance_loss": "a softmax and sums: left to XLA",
    "load_hf_moe": "copies on the host",
    "export_hf_moe": "copies on the host",
}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str]) -> int:
    """Prints versions, devices, and the implementation of each function with the reason."""
    about = "Devices, versions, and which implementation each function would use on this machine, and why."
    argparse.ArgumentParser(prog="python -m jaxmoe info", description=about).parse_args(argv)

    versions = {"jaxmoe": jaxmoe.__version__, "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}
    print("versions")
    for name, version in versions.items():
        print(f"  {name:15}{version}")
    print("devices")
    for device in jax.devices():
        print(f"  {device!s:15}{device.device_kind}")
    chosen, why = default_implementation()
    print("functions, with implementation=None on arrays of the first device")
    for name in WITH_KERNELS:
        print(f"  {name:23}{chosen:8}{why}")
    for name in ("fused_experts", "moe"):
        print(f"  {name:23}{chosen:8}made of those above")
    for name, reason in WITHOUT.items():
        print(f"  {name:23}{'xla':8}{reason}")
    return 0
