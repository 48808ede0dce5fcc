"""Runs every kernel on small, ragged shapes, forward and backward: the program to put under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck python -m benchmarks.sanitize [experts layer ...]

The kernels are launched from torch; those of JAX alone are in `benchmarks.sanitize_hopper`. jax keeps to the CPU, where
it computes what has to come out: with jax's runtime on the GPU compute-sanitizer itself crashes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch

import bridge
from benchmarks.operation import expect
from bridge.compat import vllm
from bridge.native import driver
from kernels_pallas.catalogue import CATALOGUE

Tensor = torch.Tensor
F32, BF16, INT32 = torch.float32, torch.bfloat16, torch.int32
GROUPED = bridge.RoutingConfig(
    num_experts=72, top_k=5, n_group=9, topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5
)
SOFTMAX = bridge.RoutingConfig(num_experts=60, top_k=4, scoring_func="softmax", renormalize=False)
FEW = bridge.RoutingConfig(num_experts=12, top_k=2)
MANY = bridge.RoutingConfig(num_experts=200, top_k=4)
WIDTH, INNER = 104, 40


def _random(device: str, seed: int, *sizes: int, dtype: torch.dtype = F32, shift: int = 0) -> Tensor:
    """Normal numbers; with a shift they do not begin at a multiple of 32 bytes."""
    values = torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shift = shift if device != "cpu" else 0  # jax takes none there
    flat = torch.zeros(values.numel() + shift, dtype=dtype, device=device)
    flat[shift:] = values.flatten().to(device)
    return flat[shift:].view(sizes)


def _ids(device: str, seed: int, *sizes: int, low: int, high: int) -> Tensor:
    ids = torch.randint(low, high, sizes, generator=torch.Generator().manual_seed(seed), dtype=INT32)
    return ids.to(device)


def _with_gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value, *torch.autograd.grad(value.float().square().sum(), inputs)]


def route(
    device: str,
    config: bridge.RoutingConfig,
    tokens: int,
    *,
    ties: bool = False,
    strided: bool = False,
    count: Any = None,
) -> list[Tensor]:
    """Weights, ids, load, and the gradient of the logits; with ties the exact search has to follow."""
    wide = _random(device, 0, tokens, config.num_experts + 8 * strided, dtype=BF16, shift=int(ties))
    logits = (wide.round() if ties else wide)[:, 8 * strided :].requires_grad_()
    bias = None if config is SOFTMAX else _random(device, 1, config.num_experts) * (0.0 if ties else 0.1)
    if isinstance(count, str):
        count = torch.tensor(tokens - 1, dtype=INT32, device=device)
    routing = bridge.route(logits, bias, config=config, num_valid_tokens=count)
    assert routing.load is not None
    return [routing.experts, routing.load, *_with_gradients(routing.weights, logits)]


def router(
    device: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, num_experts: int = 72
) -> list[Tensor]:
    """The product and its gradients."""
    x = _random(device, 2, tokens, WIDTH, dtype=x_dtype).requires_grad_()
    weight = (_random(device, 3, num_experts, WIDTH) * WIDTH**-0.5).to(weight_dtype).requires_grad_()
    return _with_gradients(bridge.router_logits(x, weight), x, weight)


def moved(
    device: str,
    tokens: int,
    slots: int,
    align: int,
    *,
    mapped: bool = False,
    width: int = WIDTH,
    max_rows: int | None = None,
) -> list[Tensor]:
    """A plan, dispatch and combine, with the gradients of tokens and weights."""
    ids = _ids(device, 4, tokens, slots, low=-1, high=75)  # some are dropped
    expert_map = _ids(device, 5, 73, low=-1, high=9) if mapped else None
    plan = bridge.plan_dispatch(ids, 9 if mapped else 73, align=align, expert_map=expert_map, max_rows=max_rows)
    x = _random(device, 6, tokens, width, dtype=BF16, shift=int(mapped)).requires_grad_()
    weights = _random(device, 7, tokens, slots).requires_grad_()
    rows = bridge.dispatch(x, plan)
    return [*plan, rows, *_with_gradients(bridge.combine(rows, plan, weights), x, weights)]


def blocks(device: str, tokens: int, slots: int, *, here: bool = False, named: bool = False) -> list[Tensor]:
    """vLLM's forms of a plan: of all experts, of some that are here, or with names for the experts."""
    ids = _ids(device, 4, tokens, slots, low=-1, high=75)
    expert_map = _ids(device, 5, 73, low=-1, high=9) if here or named else None
    aligned = vllm.moe_align_block_size(ids, 16, 73, expert_map, ignore_invalid_experts=here)
    x = _random(device, 6, tokens, WIDTH, dtype=BF16)
    rows, _, *maps = vllm.moe_permute(x, None, ids, 73, 9 if expert_map is not None else -1, expert_map)
    out, weights = torch.empty_like(x), _random(device, 7, tokens, slots)
    vllm.moe_unpermute(out, rows, weights, maps[1], maps[0])
    rows[int(maps[0][-1]) :] = 0  # which a GPU leaves as they were
    return [*aligned, rows, *maps, out]


def experts(
    device: str,
    dtype: torch.dtype,
    rows: int,
    activation: str,
    *,
    transposed: bool,
    width: int = WIDTH,
    inner: int = INNER,
) -> list[Tensor]:
    """The experts and a grouped product, with all gradients; rows behind the last group, and an expert without any."""
    sizes = torch.tensor([rows // 3, 0, 1, rows // 2], dtype=INT32, device=device)
    x = _random(device, 8, rows, width, dtype=dtype).requires_grad_()
    gate_up = (_random(device, 9, 4, width, 2 * inner) / width**0.5).to(dtype)
    down = (_random(device, 10, 4, inner, width) / inner**0.5).to(dtype)
    if transposed:
        gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
    gate_up.requires_grad_()
    down.requires_grad_()
    y = bridge.experts(x, gate_up, down, sizes, activation=activation)
    product = bridge.grouped_matmul(x, gate_up, sizes)
    return [*_with_gradients(y, x, gate_up, down), *_with_gradients(product, x, gate_up)]


def layer(device: str, config: bridge.RoutingConfig, tokens: int) -> list[Tensor]:
    """The whole layer, in which the first product gathers tokens, with all gradients."""
    x = _random(device, 11, tokens, WIDTH, dtype=BF16).requires_grad_()
    router = (_random(device, 12, config.num_experts, WIDTH) / 10).requires_grad_()
    gate_up = (_random(device, 13, config.num_expert_ids, WIDTH, 2 * INNER) / 10).to(BF16).requires_grad_()
    down = (_random(device, 14, config.num_expert_ids, INNER, WIDTH) / 6).to(BF16).requires_grad_()
    y, routing = bridge.moe(x, bridge.MoEParams(router, gate_up, down), config)
    return [routing.experts, *_with_gradients(y, x, router, gate_up, down)]


def part(device: str, tokens: int, max_rows: int | None = None) -> list[Tensor]:
    """What lies behind routing with a few of many experts here, with all gradients."""
    ids, weights = _ids(device, 15, tokens, 5, low=-1, high=75), _random(device, 16, tokens, 5).requires_grad_()
    x = _random(device, 11, tokens, WIDTH, dtype=BF16).requires_grad_()
    gate_up = (_random(device, 13, 9, WIDTH, 2 * INNER) / 10).to(BF16).requires_grad_()
    down = (_random(device, 14, 9, INNER, WIDTH) / 6).to(BF16).requires_grad_()
    leaves = x, weights, gate_up, down
    y = bridge.fused_experts(x, ids, *leaves[1:], expert_map=_ids(device, 5, 73, low=-1, high=20), max_rows=max_rows)
    return _with_gradients(y, *leaves)


def parts() -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """(what runs, the function of a device that runs it)."""
    for tokens in (1, 3, 37):
        yield f"route, groups, {tokens} tokens", functools.partial(route, config=GROUPED, tokens=tokens, count=tokens)
    yield "route, ties, strided", functools.partial(route, config=GROUPED, tokens=37, ties=True, strided=True)
    yield "route, count on the GPU", functools.partial(route, config=GROUPED, tokens=9, count="tensor")
    yield "route, softmax", functools.partial(route, config=SOFTMAX, tokens=37)
    yield "route, a warp for each of two tokens", functools.partial(route, config=FEW, tokens=701)
    yield "route, two tokens a warp", functools.partial(route, config=MANY, tokens=8193, ties=True)
    yield "route, four tokens a warp", functools.partial(route, config=GROUPED, tokens=8191, ties=True)
    yield "route, eight tokens a warp", functools.partial(route, config=FEW, tokens=16390)
    for x, weight in ((BF16, BF16), (BF16, F32), (F32, F32)):
        for tokens in (1, 7, 37, 300):
            yield (
                f"router, {x} by {weight}, {tokens} tokens",
                functools.partial(router, x_dtype=x, weight_dtype=weight, tokens=tokens),
            )
    few = functools.partial(router, x_dtype=BF16, weight_dtype=BF16, num_experts=20)
    yield "router, few experts", functools.partial(few, tokens=300)
    sizes = ((1, 5, 1), (37, 5, 1), (1, 5, 4), (37, 5, 64), (700, 5, 1), (900, 5, 4), (9000, 4, 4), (132000, 4, 1))
    for tokens, slots, align in sizes:
        yield (
            f"{tokens} x {slots} pairs, align {align}",
            functools.partial(moved, tokens=tokens, slots=slots, align=align, width=8 if tokens > 1000 else WIDTH),
        )
    yield "pairs, mapped, any width", functools.partial(moved, tokens=50, slots=3, align=8, mapped=True, width=77)
    yield "pairs, columns in pieces", functools.partial(moved, tokens=1100, slots=5, align=1, width=1100)
    for tokens, align in ((37, 1), (37, 4), (1100, 1), (1100, 4)):
        yield (
            f"{tokens} x 5 pairs, align {align}, cut",
            functools.partial(moved, tokens=tokens, slots=5, align=align, max_rows=tokens * 2 // 4 * 4),
        )
    for tokens in (1, 37, 900):
        yield f"blocks, {tokens} x 5 pairs", functools.partial(blocks, tokens=tokens, slots=5)
    yield "blocks, here", functools.partial(blocks, tokens=50, slots=3, here=True)
    yield "blocks, named", functools.partial(blocks, tokens=900, slots=5, named=True)
    yield "experts, many rows", functools.partial(experts, dtype=BF16, rows=600, activation="silu", transposed=False)
    yield (
        "experts, tiles in parts",
        functools.partial(experts, dtype=BF16, rows=3400, activation="silu", transposed=True, width=512, inner=256),
    )
    yield "experts, few rows", functools.partial(experts, dtype=BF16, rows=37, activation="gelu_tanh", transposed=True)
    yield "layer, few rows an expert", functools.partial(layer, config=GROUPED, tokens=37)
    yield "layer, many", functools.partial(layer, config=FEW, tokens=600)
    for tokens, max_rows in ((1, None), (37, None), (900, None), (900, 200)):
        name = f"a part of the layer, {tokens} x 5 pairs{', cut' if max_rows else ''}"
        yield name, functools.partial(part, tokens=tokens, max_rows=max_rows)
    yield "experts, float32", functools.partial(experts, dtype=F32, rows=37, activation="gelu", transposed=False)


def check(got: list[Tensor], want: list[Tensor], name: str) -> None:
    """Integers exactly; numbers to what bfloat16 keeps of the largest."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a = a.detach().cpu()
        expect(a.shape == b.shape and a.dtype == b.dtype, f"{name}: result {i} is {a.dtype} {list(a.shape)}")
        if not a.is_floating_point():
            expect(torch.equal(a, b), f"{name}: integers of result {i}")
            continue
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        error = float((a.double() - b.double()).abs().max()) / scale if b.numel() else 0.0
        expect(error < 1e-2, f"{name}: result {i} is off by {error:.1e} of the largest")


def main(device: str = "cuda", words: list[str] | None = None) -> int:
    """Returns 0 where every kernel ran, and every result agrees with the reference.

    With words, only the parts that have one of them in their names; then not every kernel has to run.
    """
    jax.config.update("jax_platforms", "cpu")
    launched: set[str] = set()
    driver.observers.append(lambda name, grid: launched.add(name))
    chosen = [(name, run) for name, run in parts() if not words or any(word in name for word in words)]
    for word in words or ():
        expect(any(word in name for name, _ in chosen), f"no part has {word!r} in its name")
    for name, run in chosen:
        check(run(device), [tensor.detach() for tensor in run("cpu")], name)
        print(f"{name}: agrees with the reference", flush=True)
    if words:
        print(f"{sorted(launched)} ran, and agree with the reference")
        return 0
    missing = {kernel for entry in CATALOGUE for kernel in entry.kernels} - launched
    expect(not missing, f"never launched: {sorted(missing)}")
    print(f"all {len(launched)} kernels ran, and agree with the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(words=sys.argv[1:]))
