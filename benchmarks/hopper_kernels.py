"""Triton's grouped products in JAX and, on Hopper, those by the copy engine, in turns.

    python -m benchmarks.hopper_kernels [--tokens 512 1024 2048 4096] [--experts 32] [--spread router] [--works down]
        [--output o.json]

DeepSeek-V3's width, tokens of top 8, bfloat16: the products of the layer's passes and both weights' gradients; for the
first product, which gathers tokens, `grouped_matmul` of as many columns stands here. Experts are drawn at random, as by
a router, or have shares of the rows as in `bench` (--spread even, uneven, zipf). "hopper" has groups that begin and end
anywhere, "blocks" the same filled up to multiples of 64 rows, as the layer has them from some number of rows on. Times
are taken as in `benchmarks.jax_layer`, with what is copied beforehand and, of blocks, the rows more; * marks what the
layer takes, and TFLOP/s count the tokens' rows alone. What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from benchmarks import matmuls
from benchmarks.jax_layer import in_turns
from benchmarks.layer_shapes import EXPERTS, INNER, TOP_K, WIDTH
from jaxmoe.grouped_matmul import alignment
from kernels_pallas import grouped_matmul_grad_hopper, grouped_matmul_hopper, hopper
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul_grad import grouped_outer

LIMIT = 0.02  # of the largest entry: what bfloat16 keeps of it, and some
ROUNDS = 12


@dataclass(frozen=True)
class Work:
    """A product [rows, left] by each expert's [left, right], or a gradient of these from both sides' rows."""

    name: str
    left: int
    right: int
    gradient: bool = False
    transposed: bool = False  # each weight lies as [right, left]
    in_layer: bool = True


def works() -> list[Work]:
    """What the layer does; the first product as the public function, without the activation."""
    return [
        Work("gate and up", WIDTH, 2 * INNER, in_layer=False),
        Work("down", INNER, WIDTH),
        Work("gradient of hidden rows", WIDTH, INNER, transposed=True),
        Work("gradient of rows", 2 * INNER, WIDTH, transposed=True),
        Work("gradient of gate and up", WIDTH, 2 * INNER, gradient=True),
        Work("gradient of down", INNER, WIDTH, gradient=True),
    ]


def plan_of(tokens: int, experts: int, align: int, spread: str) -> jaxmoe.DispatchPlan:
    """Where rows of tokens go, whose experts are drawn at random or have shares of the rows as `bench` spreads them."""
    if spread == "router":
        ids = np.argsort(np.random.default_rng(0).random((tokens, experts)), axis=1)[:, :TOP_K]
    else:
        sizes = matmuls.shares(spread, tokens * TOP_K, experts).cpu().numpy()
        ids = np.repeat(np.arange(experts), sizes).reshape(tokens, TOP_K)
    return jaxmoe.plan_dispatch(jnp.asarray(ids, jnp.int32), experts, align=align, implementation="xla")


def _rows(plan: jaxmoe.DispatchPlan, tokens: int, width: int, key: int) -> jax.Array:
    """Rows of tokens, different ones where a token has several."""
    pairs = jax.random.normal(jax.random.key(key), (tokens * TOP_K, width), jnp.bfloat16)
    return jnp.where((plan.slots >= 0)[:, None], pairs[jnp.maximum(plan.slots, 0)], 0).astype(jnp.bfloat16)


def _operands(work: Work, plan: jaxmoe.DispatchPlan, tokens: int, experts: int) -> tuple[jax.Array, ...]:
    rows = _rows(plan, tokens, work.left, 0)
    if work.gradient:
        return rows, _rows(plan, tokens, work.right, 1), plan.group_sizes
    sides = (work.right, work.left) if work.transposed else (work.left, work.right)
    return rows, jax.random.normal(jax.random.key(2), (experts, *sides), jnp.bfloat16), plan.group_sizes


Way = tuple[Callable[..., jax.Array], jaxmoe.DispatchPlan]


def ways(work: Work, tokens: int, experts: int, spread: str = "router") -> dict[str, Way]:
    """Each way to do it on this GPU, and the plan of its rows."""
    plain, blocks = (plan_of(tokens, experts, align, spread) for align in (1, hopper.BLOCK))
    triton = grouped_outer if work.gradient else functools.partial(grouped_matmul, transposed=work.transposed)
    programs = hopper.multiprocessors()
    if not programs:
        return {"triton": (jax.jit(triton), plain)}
    sides: dict[str, Any] = {"width": WIDTH, "inner": INNER, "dtype": jnp.bfloat16}
    align = alignment("pallas", num_rows=tokens * TOP_K, num_experts=experts, **sides)
    found: dict[str, Way] = {"triton": (triton, plain), "triton, blocks": (triton, blocks)}
    takes = "triton" if align == 1 else "triton, blocks"
    rows = len((plain if align == 1 else blocks).slots)
    if work.gradient:
        config = grouped_matmul_grad_hopper.config_for(rows, experts, work.left, work.right, jnp.bfloat16)
        for tile in (grouped_matmul_grad_hopper.WIDE, grouped_matmul_grad_hopper.HIGH):
            if work.left % tile.left or work.right % tile.right:
                continue
            run = functools.partial(grouped_matmul_grad_hopper.grouped_outer, programs=programs, config=tile)
            name = f"{tile.left} x {tile.right}"
            found[f"hopper {name}"] = run, plain
            found[f"hopper {name}, blocks"] = functools.partial(run, aligned=True), blocks
            if config == tile:
                takes = f"hopper {name}{'' if align == 1 else ', blocks'}"
    else:
        options: dict[str, Any] = {"transposed": work.transposed, "programs": programs}
        options["config"] = grouped_matmul_hopper.TILE
        found["hopper, blocks"] = functools.partial(grouped_matmul_hopper.grouped_matmul, **options), blocks
        if align > 1 and grouped_matmul_hopper.config_for(rows, experts, work.left, work.right, jnp.bfloat16):
            takes = "hopper, blocks"
    marked = lambda name: f"{name} *" if work.in_layer and name == takes else name
    return {marked(name): (jax.jit(run), plan) for name, (run, plan) in found.items()}


@functools.partial(jax.jit, static_argnames=("work", "most"))
def _off(got: jax.Array, a: jax.Array, b: jax.Array, start: Any, size: Any, *, work: Work, most: int) -> jax.Array:
    """How far an expert's result is off XLA's product, by the largest entry; its rows are from `start` on."""
    at = start + jnp.arange(most)
    mine = (jnp.arange(most) < size)[:, None]
    rows_of = lambda x: jnp.where(mine, x[jnp.clip(at, 0, len(x) - 1)], 0)
    x = rows_of(a)
    if work.gradient:
        want = jnp.dot(x.T, rows_of(b), preferred_element_type=jnp.float32)
    else:
        want, got = jnp.dot(x, b.T if work.transposed else b, preferred_element_type=jnp.float32), rows_of(got)
    off = jnp.abs(got.astype(jnp.float32) - want) / jnp.maximum(jnp.max(jnp.abs(want)), 1e-30)
    return jnp.max(jnp.where(jnp.isnan(off), jnp.inf, off))  # else a maximum may lose it


def wrong(work: Work, run: Callable[..., jax.Array], args: tuple[jax.Array, ...]) -> float:
    """The largest difference of an expert's result from XLA's."""
    (a, b, group_sizes), got = args, run(*args)
    sizes, worst = np.asarray(group_sizes), 0.0
    for e, end in enumerate(np.cumsum(sizes)):
        mine = (got[e], a, b) if work.gradient else (got, a, b[e])
        worst = max(worst, float(_off(*mine, end - sizes[e], sizes[e], work=work, most=int(sizes.max()))))
    return worst


def measure(work: Work, tokens: int, experts: int, spread: str = "router") -> dict[str, Any]:
    """Microseconds of each way, and how far it is off."""
    errors: dict[str, float] = {}
    good: dict[str, Callable[[], jax.Array]] = {}
    for name, (run, plan) in ways(work, tokens, experts, spread).items():
        args = _operands(work, plan, tokens, experts)
        errors[name] = wrong(work, run, args)
        if errors[name] < LIMIT:
            good[name] = functools.partial(run, *args)
    times = in_turns(good, jax.block_until_ready, ROUNDS)
    return {name: {"us": times[name] * 1e3 if name in times else None, "off by": off} for name, off in errors.items()}


def main() -> None:
    """Prints the times; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--spread", choices=["router", "even", "uneven", "zipf"], default="router")
    parser.add_argument("--works", nargs="+", choices=[work.name for work in works()], help="only these")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.experts < TOP_K:
        parser.error(f"--experts: expected {TOP_K} or more, got {arguments.experts}")
    device = jax.devices()[0].device_kind
    results: dict[str, Any] = {"device": device, "jax": jax.__version__, "experts": arguments.experts}
    results |= {"spread": arguments.spread, "rows": []}
    print(f"{device}, jax {jax.__version__}, {arguments.experts} experts, {arguments.spread}")
    chosen = [work for work in works() if arguments.works is None or work.name in arguments.works]
    for tokens, work in itertools.product(arguments.tokens, chosen):
        row = measure(work, tokens, arguments.experts, arguments.spread)
        results["rows"].append({"tokens": tokens, "work": work.name, "left": work.left, "right": work.right} | row)
        for name, found in row.items():
            flops = 2 * tokens * TOP_K * work.left * work.right
            speed = f"{found['us']:9.1f} us {flops / found['us'] / 1e6:6.1f} TFLOP/s" if found["us"] else "wrong"
            print(f"{tokens:6} {work.name:24} {name:28} {speed}, off by {found['off by']:.1e}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
