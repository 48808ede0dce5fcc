"""Programs on several devices, which jax has to be told of before it starts: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_on_cpus(number: int, program: str, *arguments: str) -> str:
    """What a Python program prints where jax sees this many CPUs."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (os.getcwd(), os.environ.get("PYTHONPATH")) if path)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
