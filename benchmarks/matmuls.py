"""What is timed of the experts: the grouped product, the pair of them with the activation, and the whole layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import bridge
from benchmarks import operation, peers, stated, timing
from benchmarks.operation import Build, Entry, Operation, random
from benchmarks.routing import bias_of
from bridge import RoutingConfig

WIDTH, INNER, EXPERTS, TOP_K = 7168, 2048, 32, 8
TOKENS = 4096  # prefill
# One of eight devices, say, over which DeepSeek-V3's experts are spread; groups as there.
CONFIG = RoutingConfig(num_experts=EXPERTS, top_k=TOP_K, n_group=8, topk_group=4, routed_scaling_factor=2.5)
LAYER_TOKENS = (1, 64, 512, 4096, 16384)
LIMIT = 1e-2  # of the relative error: bfloat16 results
PAUSE = 0.1  # seconds after which an H200 was back at its highest clock

Tensor = torch.Tensor


def shares(kind: str, num_rows: int, experts: int) -> Tensor:
    """How many of the rows each expert has, int32 [experts]."""
    if kind == "even":
        sizes = torch.full((experts,), num_rows // experts)
        sizes[: num_rows % experts] += 1
    else:
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(experts, generator=generator) ** 2
        if kind == "uneven":
            weight[torch.randperm(experts, generator=generator)[: experts // 8]] = 0  # some have none
        else:  # Zipf
            weight = (1 / torch.arange(1, experts + 1))[torch.randperm(experts, generator=generator)]
        drawn = torch.multinomial(weight, num_rows, replacement=True, generator=generator)
        sizes = drawn.bincount(minlength=experts)
    return sizes.int().to(operation.DEVICE)


def _weights(*sizes: int) -> Tensor:
    return random(*sizes).mul_(sizes[-1] ** -0.5)


def _cases(quick: bool) -> list[tuple[str, int]]:
    """(how the rows are spread, how many there are)."""
    prefill = TOKENS * TOP_K
    cases = [("even", prefill), ("zipf", prefill), ("uneven", EXPERTS // 2)]
    return cases if quick else [("even", prefill), ("uneven", prefill), *cases[1:], ("uneven", EXPERTS * 16)]


def experts(quick: bool) -> Iterator[Build]:
    """grouped_matmul and experts: prefill in several shares, decode, and fewer rows than experts."""
    for kind, num_rows in _cases(quick):
        yield functools.partial(_grouped_matmul, kind, num_rows)
    if not quick:
        yield functools.partial(_grouped_matmul, "even", TOKENS * TOP_K, transposed=False)
        for kind in ("even", "uneven", "zipf"):
            yield functools.partial(_grouped_matmul, kind, TOKENS * TOP_K, pause=PAUSE)
    for kind, num_rows in _cases(quick):
        yield functools.partial(_experts, kind, num_rows)


def _calls(num_rows: int) -> int:
    return 4 if num_rows > 4096 else 20


def _grouped_matmul(kind: str, num_rows: int, *, transposed: bool = True, pause: float = 0.0) -> Iterator[Operation]:
    """One grouped product, the weight as Hugging Face keeps it ([E, N, K]) or as it is read ([E, K, N])."""
    depth, width, calls = WIDTH, 2 * INNER, 2 if pause else _calls(num_rows)
    weight = _weights(EXPERTS, width, depth).mT if transposed else _weights(EXPERTS, depth, width)
    sizes = shares(kind, num_rows, EXPERTS)
    offsets = sizes.cumsum(0, dtype=torch.int32)
    rows = [random(num_rows, depth) for _ in range(timing.input_sets(num_rows * depth * 2, calls=calls))]

    def entry(function: Callable[[Tensor, Tensor, Tensor], Tensor], how: Tensor) -> Entry:
        def check(got: Tensor) -> None:
            stated.check_close(got, stated.grouped_matmul(rows[0], weight, sizes), LIMIT, "grouped product")

        return Entry(lambda i: function(rows[i % len(rows)], weight, how), check)

    used = int((sizes > 0).sum())
    yield Operation(
        f"grouped matmul {kind}{'' if transposed else ', weight not transposed'}{', after a pause' if pause else ''}",
        num_rows // TOP_K,
        2 * (num_rows * (depth + width) + used * depth * width),
        entry(bridge.grouped_matmul, sizes),
        {"torch grouped_mm": entry(stated.grouped_mm, offsets)},
        flops=2 * num_rows * depth * width,
        calls=calls,
        pause=pause,
    )


def _experts(kind: str, num_rows: int) -> Iterator[Operation]:
    """gate and up, silu, down."""
    calls = _calls(num_rows)
    gate_up, down = _weights(EXPERTS, 2 * INNER, WIDTH).mT, _weights(EXPERTS, WIDTH, INNER).mT
    sizes = shares(kind, num_rows, EXPERTS)
    offsets = sizes.cumsum(0, dtype=torch.int32)
    rows = [random(num_rows, WIDTH) for _ in range(timing.input_sets(num_rows * WIDTH * 2, calls=calls))]

    def entry(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], how: Tensor) -> Entry:
        def check(got: Tensor) -> None:
            stated.check_close(got, stated.experts_loop(rows[0], gate_up, down, sizes), LIMIT, "experts")

        return Entry(lambda i: function(rows[i % len(rows)], gate_up, down, how), check)

    used = int((sizes > 0).sum())
    yield Operation(
        f"experts {kind}",
        num_rows // TOP_K,
        2 * (num_rows * 2 * WIDTH + used * 3 * WIDTH * INNER),
        entry(bridge.experts, sizes),
        {"torch grouped_mm, silu": entry(stated.experts, offsets)},
        flops=6 * num_rows * WIDTH * INNER,
        calls=calls,
    )


def layer(quick: bool) -> Iterator[Build]:
    """The whole layer, from the tokens to their sums."""
    for tokens in (64, TOKENS) if quick else LAYER_TOKENS:
        yield functools.partial(_layer, tokens)


def _layer(tokens: int) -> Iterator[Operation]:
    calls = _calls(tokens * TOP_K)
    router = _weights(EXPERTS, WIDTH)
    gate_up, down = _weights(EXPERTS, 2 * INNER, WIDTH).mT, _weights(EXPERTS, WIDTH, INNER).mT
    x = [random(tokens, WIDTH) for _ in range(timing.input_sets(tokens * WIDTH * 2, calls=calls))]
    bias = bias_of(CONFIG)
    weights = router, bias, gate_up, down
    params = bridge.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)

    def entry(function: Callable[[Tensor], Tensor]) -> Entry:
        def check(got: Tensor) -> None:
            stated.check_close(got, stated.layer_loop(x[0], *weights, CONFIG), 2 * LIMIT, "layer")

        return Entry(lambda i: function(x[i % len(x)]), check)

    others = {"torch, grouped_mm": entry(lambda a: stated.layer(a, *weights, CONFIG))}
    if (ops := peers.loaded(peers.vllm)) and bias is not None:
        permute = peers.Permute(x[0].new_empty(tokens * TOP_K, WIDTH), TOP_K, EXPERTS)
        options = (CONFIG.n_group, CONFIG.topk_group, TOP_K, True, CONFIG.routed_scaling_factor, bias, peers.SIGMOID)

        def theirs(a: Tensor) -> Tensor:
            scales, ids = ops.grouped_topk(torch.mm(a, router.T, out_dtype=torch.float32), *options)
            rows = permute(a, ids)
            return permute.unpermute(
                stated.experts(rows, gate_up, down, permute.offsets[1:].int()), scales, torch.empty_like(a)
            )

        others["vLLM's kernels, torch grouped_mm"] = entry(theirs)
    pairs = tokens * TOP_K
    used = min(EXPERTS, pairs)
    yield Operation(
        "layer",
        tokens,
        2 * (2 * tokens * WIDTH + EXPERTS * WIDTH + used * 3 * WIDTH * INNER),
        entry(lambda a: bridge.moe(a, params, CONFIG)[0]),
        others,
        flops=6 * pairs * WIDTH * INNER + 2 * tokens * EXPERTS * WIDTH,
        calls=calls,
    )
