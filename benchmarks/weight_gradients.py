"""The gradient of grouped matmul's weights in JAX: Triton's kernel, and on Hopper that by the copy engine, in turns.

    python -m benchmarks.weight_gradients [--tokens 512 1024 2048 4096] [--experts 32] [--output results.json]

DeepSeek-V3's width, tokens of top 8 over experts drawn at random, bfloat16; both weights, gate and up [7168, 4096] and
down [2048, 7168]. Times are taken as in `benchmarks.jax_layer`, with the tiles that `config_for` has for a Hopper GPU
(* marks the one it takes). What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_layer import in_turns
from benchmarks.layer_shapes import EXPERTS, INNER, TOP_K, WIDTH
from kernels_pallas import grouped_matmul_grad_hopper as by_engine
from kernels_pallas import hopper
from kernels_pallas.grouped_matmul_grad import grouped_outer

LIMIT = 0.02  # of the largest entry: what bfloat16 keeps of it, and some
ROUNDS = 12

Gradient = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ways(tokens: int, experts: int, left: int, right: int) -> dict[str, Gradient]:
    """Each way to take it on this GPU."""
    found: dict[str, Gradient] = {"triton": jax.jit(grouped_outer)}
    programs, taken = hopper.multiprocessors(), by_engine.config_for(tokens * TOP_K, experts, left, right, jnp.bfloat16)
    for config in (by_engine.WIDE, by_engine.HIGH) if programs else ():
        if left % config.left == 0 and right % config.right == 0:
            name = f"hopper {config.left} x {config.right}{' *' if config == taken else ''}"
            found[name] = jax.jit(functools.partial(by_engine.grouped_outer, programs=programs, config=config))
    return found


def inputs(tokens: int, experts: int, left: int, right: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of a and of b, and how many of them each expert has."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :TOP_K]
    sizes = jnp.asarray(np.bincount(ids.ravel(), minlength=experts), jnp.int32)
    a, b = (jax.random.normal(jax.random.key(i), (ids.size, w), jnp.bfloat16) for i, w in enumerate((left, right)))
    return a, b, sizes


def wrong(way: Gradient, a: jax.Array, b: jax.Array, sizes: jax.Array) -> float:
    """The largest difference of an expert's gradient from XLA's product of its rows, by the largest entry."""
    got, worst = way(a, b, sizes), 0.0
    for e, end in enumerate(np.cumsum(np.asarray(sizes))):
        rows = slice(int(end - sizes[e]), int(end))
        want = jnp.dot(a[rows].T, b[rows], preferred_element_type=jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(want)), 1e-30)
        off = jnp.abs(got[e].astype(jnp.float32) - want) / scale
        worst = max(worst, float(jnp.max(jnp.where(jnp.isnan(off), jnp.inf, off))))  # else a maximum may lose it
    return worst


def measure(tokens: int, experts: int, left: int, right: int) -> dict[str, Any]:
    """Microseconds of each way, and how far it is off."""
    args, found = inputs(tokens, experts, left, right), ways(tokens, experts, left, right)
    errors = {name: wrong(way, *args) for name, way in found.items()}
    good = {name: functools.partial(way, *args) for name, way in found.items() if errors[name] < LIMIT}
    times = in_turns(good, jax.block_until_ready, ROUNDS)
    return {name: {"us": times[name] * 1e3 if name in times else None, "off by": errors[name]} for name in found}


def main() -> None:
    """Prints the times; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.experts < TOP_K:
        parser.error(f"--experts: expected {TOP_K} or more, got {arguments.experts}")
    device = jax.devices()[0].device_kind
    results: dict[str, Any] = {"device": device, "jax": jax.__version__, "experts": arguments.experts, "rows": []}
    print(f"{device}, jax {jax.__version__}, {arguments.experts} experts")
    for tokens, (left, right) in itertools.product(arguments.tokens, ((WIDTH, 2 * INNER), (INNER, WIDTH))):
        row = measure(tokens, arguments.experts, left, right)
        results["rows"].append({"tokens": tokens, "left": left, "right": right, "ways": row})
        for name, found in row.items():
            flops = 2 * tokens * TOP_K * left * right
            speed = f"{found['us']:9.1f} us {flops / found['us'] / 1e6:6.1f} TFLOP/s" if found["us"] else "wrong"
            print(f"{tokens:6} {left} x {right}  {name:20} {speed}, off by {found['off by']:.1e}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
