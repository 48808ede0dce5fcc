"""The MoE layer in JAX, on the Pallas kernels and on `jax.lax.ragged_dot`, and in torch, plain and through the bridge.

    python -m benchmarks.jax_layer [--output results.json]

DeepSeek-V3's width, 32 local experts, top 8, bfloat16; forward alone, and forward with all gradients. Times are medians
on the host's clock. Several calls are queued and waited for together, so that what the host does for one is hidden
behind the one before: as many as take 50 milliseconds, since waiting and beginning anew leave the GPU idle for up to
one. Such rounds of all ways take turns, since how fast a card is depends on what it did before (its power limit); but
for `ragged_dot`'s, which needs the memory for itself. In JAX each call with gradients is given those of the call before
to write into (donated): else several results of gigabytes would be held at once, and what is measured then is how JAX's
allocator grows. The torch layer is plain glue around `torch._grouped_mm`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

import bridge
import jaxmoe
from benchmarks.layer_shapes import CONFIG, EXPERTS, INNER, TOP_K, WIDTH

LIMIT = 0.03  # of the relative error: a router whose logits differ in the last bits may choose otherwise here and there
PARTS = ("x", "router", "gate_up", "down")
PEAK = "peak GB beyond arguments"
ROUNDS = 16
ROUND = 0.05  # seconds of work that are queued at once, four calls at least


def _params(scale: float = 0.02) -> jaxmoe.MoEParams:
    make = lambda i, *shape: (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)
    return jaxmoe.MoEParams(
        router=make(0, EXPERTS, WIDTH),
        bias=jnp.zeros(EXPERTS),
        gate_up=make(1, EXPERTS, WIDTH, 2 * INNER),
        down=make(2, EXPERTS, INNER, WIDTH),
    )


def in_turns(ways: Mapping[str, Callable[[], Any]], wait: Callable[[Any], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of a call of each: the median of `rounds` rounds of calls, after three that do not count.

    A round's order is drawn anew.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, draw = list(ways), random.Random(0)
    for _ in range(rounds + 3):
        draw.shuffle(order)
        for name in order:
            queued = calls_of_a_round(times[name][-1]) if times[name] else 4
            start = time.perf_counter()
            for _ in range(queued):
                result = ways[name]()
            wait(result)  # the last: a GPU does one after the other
            del result  # free again before the next
            times[name].append((time.perf_counter() - start) / queued)
    return {name: statistics.median(of[3:]) * 1e3 for name, of in times.items()}


def calls_of_a_round(seconds: float) -> int:
    """How many calls that take so long are queued before they are waited for."""
    return max(4, math.ceil(ROUND / seconds))


@dataclass(frozen=True)
class Calls:
    """The layer: each call queues one pass and returns its results."""

    forward: Callable[[], Any]
    both: Callable[[], Any]  # and the gradients of x and of every parameter
    memory: Callable[[], int]  # bytes beyond the arguments that `both` takes at most


def calls_in_jax(tokens: int, implementation: str) -> Calls:
    """Nothing is compiled, and no room taken for gradients, before a call asks for it."""
    params, x = _params(), jax.random.normal(jax.random.key(3), (tokens, WIDTH), jnp.bfloat16)
    forward = jax.jit(lambda x, params: jaxmoe.moe(x, params, CONFIG, implementation=implementation)[0])

    def loss(x: jax.Array, weights: tuple[jax.Array, ...], bias: jax.Array) -> jax.Array:
        router, gate_up, down = weights
        full = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)
        return jnp.sum(jaxmoe.moe(x, full, CONFIG, implementation=implementation)[0].astype(jnp.float32) ** 2)

    weights = (params.router, params.gate_up, params.down)
    both, memory = gradients_in_jax(loss, (0, 1), (x, weights, params.bias))
    return Calls(forward=lambda: forward(x, params), both=both, memory=memory)


def gradients_in_jax(
    loss: Callable[..., jax.Array], argnums: tuple[int, ...], args: tuple[Any, ...]
) -> tuple[Callable[[], Any], Callable[[], int]]:
    """(a call of loss(*args) and its gradients, the bytes beyond the arguments that it takes at most)."""

    @functools.partial(jax.jit, donate_argnames="earlier", keep_unused=True)
    def both(args: tuple[Any, ...], earlier: Any) -> Any:
        del earlier  # its memory becomes the results'
        return jax.grad(loss, argnums=argnums)(*args)

    like, gradients = tuple(args[i] for i in argnums), None

    def step() -> Any:
        nonlocal gradients
        gradients = jax.tree.map(jnp.zeros_like, like) if gradients is None else gradients
        gradients = both(args, gradients)
        return gradients

    def memory() -> int:
        plan: Any = both.lower(args, like).compile().memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes

    return step, memory


def calls_in_torch(tokens: int) -> tuple[Calls, Calls]:
    """The same of a plain torch layer and of `bridge.moe`."""
    params = _params()
    copy = lambda a: torch.from_dlpack(a).clone().requires_grad_()
    router, gate_up, down = copy(params.router), copy(params.gate_up), copy(params.down)
    bias = torch.from_dlpack(params.bias).clone()
    x = torch.from_dlpack(jax.random.normal(jax.random.key(3), (tokens, WIDTH), jnp.bfloat16)).clone().requires_grad_()

    def plain() -> torch.Tensor:
        scores = (x.float() @ router.float().T).sigmoid()
        weights, ids = scores.topk(TOP_K, dim=1)
        weights = 2.5 * weights / weights.sum(dim=1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        offsets = ids.flatten().bincount(minlength=EXPERTS).cumsum(0).int()
        gate, up = torch._grouped_mm(x[order // TOP_K], gate_up, offs=offsets).chunk(2, dim=1)
        rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=offsets)
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(x).index_add(0, order // TOP_K, rows)

    def ours() -> torch.Tensor:
        return bridge.moe(x, bridge.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down), CONFIG)[0]

    of = functools.partial(calls_of, leaves=(x, router, gate_up, down))
    torch.cuda.synchronize()  # what was copied goes back to JAX, which minds no stream of torch's
    return of(plain), of(ours)


def calls_of(layer: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> Calls:
    """Of a layer in torch, with the gradients of `leaves`."""

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer().float().square().sum(), leaves)

    def memory() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return torch.cuda.max_memory_allocated() - before

    return Calls(forward=torch.no_grad()(layer), both=both, memory=memory)


def difference(what: str, gots: Sequence[torch.Tensor], wants: Sequence[torch.Tensor]) -> float:
    """The largest relative one of the layer's result and gradients.

    Raises AssertionError where it is more than results that are rounded to bfloat16 on the way may differ by.
    """
    worst = 0.0
    for name, got, want in zip(("result", *(f"gradient of {n}" for n in PARTS)), gots, wants, strict=True):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        if not error < LIMIT:
            raise AssertionError(f"{what}: the {name} differs by {error:.1%} from torch's: its time is worth nothing")
        worst = max(worst, error)
    return worst


def stock(tokens: int) -> dict[str, Any]:
    """The same of the layer on `jax.lax.ragged_dot`, whose gradient takes most of a GPU: in a process of its own.

    Only that of the forward pass, and why, where there is too little memory.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.97"}
    command = [sys.executable, "-m", "benchmarks.jax_layer", "--stock", str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _stock(tokens: int) -> dict[str, Any]:
    layer = calls_in_jax(tokens, "xla")
    timed = functools.partial(in_turns, wait=jax.block_until_ready, rounds=4)
    results: dict[str, Any] = timed({"forward": layer.forward})
    try:
        return {**results, **timed({"forward and backward": layer.both}), PEAK: layer.memory() / 1e9}
    except jax.errors.JaxRuntimeError as error:
        return {**results, "failed": str(error)[:200]}


def wait(result: Any) -> None:
    """For what torch or JAX has queued."""
    if all(isinstance(leaf, torch.Tensor) for leaf in jax.tree.leaves(result)):
        torch.cuda.synchronize()
    else:
        jax.block_until_ready(result)


def _results(way: Calls) -> list[torch.Tensor]:
    found = (way.forward(), way.both())
    wait(found)
    return [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(found)]


def measure(tokens: int) -> dict[str, dict[str, float]]:
    """Ours and torch's at one number of tokens, the layers' results compared."""
    plain, through = calls_in_torch(tokens)
    ways = {"torch": plain, "jaxmoe through torch": through, "jaxmoe, pallas": calls_in_jax(tokens, "pallas")}
    wants = _results(plain)
    errors = {name: difference(name, _results(way), wants) for name, way in ways.items() if way is not plain}
    del wants  # gigabytes
    forward = in_turns({name: way.forward for name, way in ways.items()}, wait, ROUNDS)
    both = in_turns({name: way.both for name, way in ways.items()}, wait, ROUNDS)
    results = {
        name: {"forward": forward[name], "forward and backward": both[name], PEAK: way.memory() / 1e9}
        for name, way in ways.items()
    }
    for name, error in errors.items():
        results[name]["relative difference"] = error
    torch.cuda.empty_cache()  # the next number of tokens needs the room, in JAX too
    return results


def main() -> None:
    """Prints the figures; with --output writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--stock", type=int, help="only the layer on ragged_dot, of this many tokens, as JSON")
    arguments = parser.parse_args()
    if arguments.stock:
        print(json.dumps(_stock(arguments.stock)))
        return
    plain = {tokens: stock(tokens) for tokens in arguments.tokens}  # before this process takes memory
    results = {
        "device": torch.cuda.get_device_name(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "tokens": {
            str(tokens): {**measure(tokens), "jaxmoe, xla (ragged_dot)": plain[tokens]} for tokens in arguments.tokens
        },
    }
    print(json.dumps(results, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
