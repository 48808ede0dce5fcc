"""A device's part of the layer under expert parallelism: what lies behind routing, with an eighth of 256 experts here.

`python -m jaxmoe bench --only part` times the forward pass; with all gradients, in JAX and through torch, by the host's
clock as `benchmarks.jax_layer` does it:

    python -m benchmarks.parts [--tokens 4096] [--output parts.json]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import torch

import bridge
import jaxmoe
from benchmarks import operation, peers, stated, timing
from benchmarks.jax_layer import PEAK, ROUNDS, calls_of, gradients_in_jax, in_turns, wait
from benchmarks.operation import Build, Entry, Operation, random
from jaxmoe.layer import expected_rows

WIDTH, INNER, EXPERTS, HERE, TOP_K = 7168, 2048, 256, 32, 8  # DeepSeek-V3's, on one of eight devices
TOKENS = (1, 64, 512, 4096, 16384)
LIMIT = 2e-2  # of the relative error: bfloat16 results of two products
ROOM = 1.5  # times as many rows as are expected, where there is room for some alone

Tensor = torch.Tensor


def room_for(num_pairs: int, num_ids: int, num_here: int) -> int:
    """`max_rows` where there is room for some rows alone."""
    return int(expected_rows(num_pairs, num_ids, num_here, None) * ROOM) + 64


def room(tokens: int) -> int:
    """`room_for` what is timed here."""
    return room_for(tokens * TOP_K, EXPERTS, HERE)


def _ids(tokens: int) -> Tensor:
    """Distinct ids for each token, the same on every run: the first draw with as many pairs here as are expected."""
    expected = expected_rows(tokens * TOP_K, EXPERTS, HERE, None)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator(operation.DEVICE).manual_seed(seed)
        drawn = torch.rand(tokens, EXPERTS, device=operation.DEVICE, generator=generator)
        return drawn.argsort(dim=1)[:, :TOP_K].int().contiguous()

    return next(ids for ids in map(draw, itertools.count()) if int((ids < HERE).sum()) == expected)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [T, k], weights [T, k], gate_up, down, expert_map), experts as Hugging Face keeps them."""
    device, ids = operation.DEVICE, _ids(tokens)
    weights = torch.rand(tokens, TOP_K, device=device)
    gate_up = random(HERE, 2 * INNER, WIDTH).mul_(WIDTH**-0.5).mT
    down = random(HERE, WIDTH, INNER).mul_(INNER**-0.5).mT
    here = torch.full((EXPERTS,), -1, dtype=torch.int32, device=device)
    here[:HERE] = torch.arange(HERE, device=device)
    return ids, weights, gate_up, down, here


def in_parts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, here: Tensor) -> Tensor:
    """The same by jaxmoe's functions of the parts, as they promise zeros in rows that hold no token."""
    plan = bridge.plan_dispatch(ids, HERE, expert_map=here)
    return bridge.combine(bridge.experts(bridge.dispatch(x, plan), gate_up, down, plan.group_sizes), plan, weights)


def plain(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, here: Tensor, *, trained: bool = False
) -> Tensor:
    """Plain torch, its grouped product, and sums in float32; without asking the GPU how many rows there are."""
    local = here[ids.long()].flatten()
    in_order, order = local.where(local >= 0, HERE).sort()
    counts = torch.histc(in_order.float(), bins=HERE, min=0, max=HERE - 1)
    rows, is_here = x[order // TOP_K], (in_order < HERE)[:, None]
    if trained:  # torch's product leaves other rows, and their gradients, as they were
        rows = rows.where(is_here, 0.0)
    rows = stated.experts(rows, gate_up, down, counts.cumsum(0, dtype=torch.int32))
    scaled = (rows * weights.flatten()[order, None]).where(is_here, 0.0)
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, order // TOP_K, scaled).to(x.dtype)


def fused(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, here: Tensor, **how: Any) -> Tensor:
    """As one function."""
    return bridge.fused_experts(x, ids, weights, gate_up, down, expert_map=here, **how)


def part(quick: bool) -> Iterator[Build]:
    """The forward pass of what lies behind routing, an eighth of the experts being here."""
    for tokens in (64, 4096) if quick else TOKENS:
        yield functools.partial(_part, tokens)


def _part(tokens: int) -> Iterator[Operation]:
    pairs, calls = tokens * TOP_K, 20 if tokens <= 512 else 4
    ids, weights, gate_up, down, here = given = inputs(tokens)
    x = [random(tokens, WIDTH) for _ in range(timing.input_sets(tokens * WIDTH * 2, calls=calls))]
    plan = stated.plan(here[ids.long()], HERE, 1, pairs)
    held, used = int(plan.group_sizes.sum()), int((plan.group_sizes > 0).sum())

    def check(got: Tensor) -> None:
        rows = x[0].new_zeros(pairs, WIDTH, dtype=torch.float32)
        tokens_of = plan.slots[:held].long() // TOP_K
        rows[:held] = stated.experts_loop(x[0][tokens_of], gate_up, down, plan.group_sizes)
        stated.check_close(got, stated.combine(rows, plan, weights), LIMIT, "a part of the layer")

    entry = lambda function: Entry(lambda i: function(x[i % len(x)]), check)
    ours = {
        "jaxmoe, in parts": entry(lambda a: in_parts(a, *given)),
        f"jaxmoe, room for {ROOM} times as many": entry(lambda a: fused(a, *given, max_rows=room(tokens))),
    }
    others = {"torch, grouped_mm": entry(lambda a: plain(a, *given))}
    if peers.loaded(peers.vllm):
        permute = peers.Permute(x[0].new_empty(pairs, WIDTH), TOP_K, EXPERTS, here, HERE)

        def theirs(a: Tensor) -> Tensor:
            rows = stated.experts(permute(a, ids), gate_up, down, permute.offsets[1:].int())
            return permute.unpermute(rows, weights, torch.empty_like(a))

        others["vLLM's kernels, torch grouped_mm"] = entry(theirs)
    size = 2 * (2 * tokens * WIDTH + used * 3 * WIDTH * INNER)
    make = functools.partial(Operation, tokens=tokens, bytes=size, flops=6 * held * WIDTH * INNER, calls=calls)
    name = "behind routing, an eighth of the experts here"
    yield make(name, ours=entry(lambda a: fused(a, *given)), peers=others)
    for how, way in ours.items():
        yield make(f"{name}: {how}", ours=way)


def _ways(tokens: int) -> dict[str, tuple[Callable[[], Any], Callable[[], int]]]:
    """Of each: a call with all gradients, of x, weights, gate_up and down; and the bytes that it takes at most."""
    ids, weights, gate_up, down, here = inputs(tokens)
    leaves = [leaf.detach().requires_grad_() for leaf in (random(tokens, WIDTH), weights, gate_up, down)]
    # In JAX weights lie as the products read them.
    arrays = tuple(bridge.to_jax(leaf.detach().contiguous()) for leaf in leaves)
    j_ids, j_here = bridge.to_jax(ids), bridge.to_jax(here)

    def in_torch(function: Callable[..., Tensor], **how: Any) -> tuple[Callable[[], Any], Callable[[], int]]:
        x, *rest = leaves
        calls = calls_of(lambda: function(x, ids, *rest, here, **how), leaves)
        return calls.both, calls.memory

    def in_jax(function: Callable[..., Any]) -> tuple[Callable[[], Any], Callable[[], int]]:
        loss = lambda *args: jnp.sum(function(*args).astype(jnp.float32) ** 2)
        return gradients_in_jax(loss, (0, 1, 2, 3), arrays)

    def jax_parts(x: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        plan = jaxmoe.plan_dispatch(j_ids, HERE, expert_map=j_here)
        return jaxmoe.combine(jaxmoe.experts(jaxmoe.dispatch(x, plan), gate_up, down, plan.group_sizes), plan, weights)

    def jax_fused(x: Any, weights: Any, gate_up: Any, down: Any, **how: Any) -> Any:
        return jaxmoe.fused_experts(x, j_ids, weights, gate_up, down, expert_map=j_here, **how)

    return {
        "torch, grouped_mm": in_torch(plain, trained=True),
        "bridge, in parts": in_torch(in_parts),
        "bridge.fused_experts": in_torch(fused),
        "bridge.fused_experts, max_rows": in_torch(fused, max_rows=room(tokens)),
        "jaxmoe, in parts": in_jax(jax_parts),
        "jaxmoe.fused_experts": in_jax(jax_fused),
        "jaxmoe.fused_experts, max_rows": in_jax(functools.partial(jax_fused, max_rows=room(tokens))),
    }


def _check(ways: dict[str, Callable[[], Any]]) -> None:
    """Each way's gradients against those of the first, which is torch's."""
    first, *others = ways
    wants = ways[first]()
    for name in others:
        gots = ways[name]()
        wait(gots)
        for got, want in zip(gots, wants, strict=True):
            tensor = got if isinstance(got, torch.Tensor) else torch.from_dlpack(got)
            stated.check_close(tensor, want, LIMIT, f"{name}: a gradient")


def main() -> None:
    """Prints milliseconds of a pass with all gradients and its memory; with --output writes them too."""
    parser = argparse.ArgumentParser(description="A part of the layer with all its gradients.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "tokens": {}}
    for tokens in arguments.tokens:
        ways = _ways(tokens)
        calls = {name: call for name, (call, _) in ways.items()}
        _check(calls)
        times = in_turns(calls, wait, ROUNDS)
        found = {name: {"ms": times[name], PEAK: memory() / 1e9} for name, (_, memory) in ways.items()}
        results["tokens"][tokens] = found
        for name, of in found.items():
            print(f"{tokens:6} {of['ms']:9.3f} ms {of[PEAK]:7.3f} GB  {name}", flush=True)
        del ways, calls
        torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
