"""The MoE layer in JAX, on the Pallas kernels and on `jax.lax.ragged_dot`, and in torch, plain and through the bridge.

    python -m benchmarks.jax_layer [--output results.json]

DeepSeek-V3's width, 32 local experts, top 8, bfloat16; forward alone, and forward with all gradients. Times are medians
on the host's clock. Several calls are queued and waited for together, so that what the host does for one is hidden
behind the one before: as many as take 50 milliseconds, since waiting and beginning anew leave the GPU idle for up to
one. In JAX each call with gradients is given those of the call before to write into (donated): else several results of
gigabytes would be held at once, and what is measured then is how JAX's allocator grows. The torch layer is plain glue
around `torch._grouped_mm`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
ROUNDS = 8
ROUND = 0.05  # seconds of work that are queued at once, four calls at least


def _params(scale: float = 0.02) -> jaxmoe.MoEParams:
    make = lambda i, *shape: (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)
    return jaxmoe.MoEParams(
        router=make(0, EXPERTS, WIDTH),
        bias=jnp.zeros(EXPERTS),
        gate_up=make(1, EXPERTS, WIDTH, 2 * INNER),
        down=make(2, EXPERTS, INNER, WIDTH),
    )


def _milliseconds(call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int) -> float:
    """The median of `rounds` rounds of calls, after three that do not count; each the mean of its calls."""
    times: list[float] = []
    while len(times) < rounds + 3:
        queued = calls_of_a_round(times[-1]) if times else 4
        start = time.perf_counter()
        for _ in range(queued):
            result = call()
        wait(result)  # the last: a GPU does one after the other
        del result  # free again before the next
        times.append((time.perf_counter() - start) / queued)
    return statistics.median(times[3:]) * 1e3


def calls_of_a_round(seconds: float) -> int:
    """How many calls that take so long are queued before they are waited for."""
    return max(4, math.ceil(ROUND / seconds))


@dataclass(frozen=True)
class Calls:
    """The layer in JAX: each call queues one pass and returns its results."""

    forward: Callable[[], Any]
    both: Callable[[], Any]  # and the gradients of x and of every parameter
    memory: Callable[[], Any]  # XLA's plan of `both`


def calls_in_jax(tokens: int, implementation: str) -> Calls:
    """Nothing is compiled, and no room taken for gradients, before a call asks for it."""
    params, x = _params(), jax.random.normal(jax.random.key(3), (tokens, WIDTH), jnp.bfloat16)
    forward = jax.jit(lambda x, params: jaxmoe.moe(x, params, CONFIG, implementation=implementation)[0])

    def loss(x: jax.Array, weights: tuple[jax.Array, ...], bias: jax.Array) -> jax.Array:
        router, gate_up, down = weights
        full = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)
        return jnp.sum(jaxmoe.moe(x, full, CONFIG, implementation=implementation)[0].astype(jnp.float32) ** 2)

    @functools.partial(jax.jit, donate_argnames="earlier", keep_unused=True)
    def both(x: jax.Array, weights: tuple[jax.Array, ...], bias: jax.Array, earlier: Any) -> Any:
        del earlier  # its memory becomes the results'
        return jax.grad(loss, argnums=(0, 1))(x, weights, bias)

    weights = (params.router, params.gate_up, params.down)
    gradients: Any = None

    def step() -> Any:
        nonlocal gradients
        gradients = jax.tree.map(jnp.zeros_like, (x, weights)) if gradients is None else gradients
        gradients = both(x, weights, params.bias, gradients)
        return gradients

    return Calls(
        forward=lambda: forward(x, params),
        both=step,
        memory=lambda: both.lower(x, weights, params.bias, (x, weights)).compile().memory_analysis(),
    )


def in_jax(tokens: int, implementation: str, rounds: int, *, forward_only: bool = False) -> dict[str, float]:
    """Milliseconds of a forward pass, and of one with the gradients of x and of every parameter."""
    layer = calls_in_jax(tokens, implementation)
    times = {"forward": _milliseconds(layer.forward, jax.block_until_ready, rounds)}
    if forward_only:
        return times
    times["forward and backward"] = _milliseconds(layer.both, jax.block_until_ready, rounds)
    memory = layer.memory()
    times["peak GB beyond arguments"] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
    return times


def in_torch(tokens: int, rounds: int) -> tuple[dict[str, dict[str, float]], list[torch.Tensor]]:
    """The same of a torch layer and of `bridge.moe`, which are compared; and the torch layer's result and gradients."""
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

    def both(forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward().float().square().sum(), (x, router, gate_up, down))

    timed = functools.partial(_milliseconds, wait=lambda _: torch.cuda.synchronize(), rounds=rounds)
    found: dict[str, dict[str, float]] = {}
    for name, forward in {"torch": plain, "jaxmoe through torch": ours}.items():
        with torch.no_grad():
            found[name] = {"forward": timed(forward)}
        found[name]["forward and backward"] = timed(functools.partial(both, forward))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(forward)
        found[name]["peak GB beyond arguments"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    with torch.no_grad():
        y, y_of_ours = plain(), ours()
    wants = [y, *both(plain)]
    found["jaxmoe through torch"]["relative difference"] = difference("bridge.moe", [y_of_ours, *both(ours)], wants)
    torch.cuda.empty_cache()  # JAX needs the room
    return found, wants


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
    results: dict[str, Any] = in_jax(tokens, "xla", 4, forward_only=True)
    try:
        return in_jax(tokens, "xla", 4)
    except jax.errors.JaxRuntimeError as error:
        return {**results, "failed": str(error)[:200]}


def measure(tokens: int) -> dict[str, dict[str, float]]:
    """Ours and torch's at one number of tokens, the layers' results compared."""
    results, wants = in_torch(tokens, ROUNDS)
    layer = calls_in_jax(tokens, "pallas")
    dx, weights = layer.both()
    gots = [torch.from_dlpack(jax.block_until_ready(a)) for a in (layer.forward(), dx, *weights)]
    error = difference("jaxmoe.moe", gots, wants)
    del layer, dx, weights, gots, wants  # gigabytes
    torch.cuda.empty_cache()
    results["jaxmoe, pallas"] = {**in_jax(tokens, "pallas", ROUNDS), "relative difference": error}
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
