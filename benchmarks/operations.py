"""What is timed: each operation on torch tensors, checked before it is timed, beside its peers and its floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import native, peers, timing
from jaxmoe import presets, reference
from jaxmoe.config import RoutingConfig, rule_for
from kernels_pallas.combine import combine
from kernels_pallas.count import count_load
from kernels_pallas.dispatch import dispatch
from kernels_pallas.plan_dispatch import plan_dispatch
from kernels_pallas.route import route

WIDTH, TOP_K, EXPERTS = 7168, 8, 256  # DeepSeek-V3's
Call = Callable[[int], object]


@dataclass
class Operation:
    """One operation at one number of tokens: ours, the peers', and the bytes that any of them must move."""

    name: str
    tokens: int
    bytes: int
    ours: Call
    others: dict[str, Call] = field(default_factory=dict)
    launches: int = 1


def _expect(ok: object, what: str) -> None:
    if not bool(ok):
        raise AssertionError(f"wrong result, nothing is timed: {what}")


def _routing(name: str, config: RoutingConfig, tokens: int) -> Operation:
    rule, experts, k = rule_for(config, True), config.num_experts, config.top_k
    num_sets = timing.input_sets(tokens * experts * 2)
    logits = [torch.randn(tokens, experts, device="cuda").bfloat16() for _ in range(num_sets)]
    bias = torch.randn(experts, device="cuda") * 0.1
    weights = torch.full((tokens, k), float("nan"), device="cuda")
    ids = torch.full((tokens, k), -7, dtype=torch.int32, device="cuda")
    (kernel,) = native.kernels_of(lambda x, b: route(x, b, None, rule=rule), logits[0], bias)

    kernel(logits[0], bias, weights, ids)
    some = slice(0, 4096)
    x = jnp.asarray(logits[0][some].float().cpu().numpy()).astype(jnp.bfloat16)
    want_weights, want_ids = reference.route(x, jnp.asarray(bias.cpu().numpy()), None, rule)
    same = torch.from_numpy(np.array(want_ids)) == ids[some].cpu()
    _expect(same.all(dim=1).float().mean() > 0.999, f"{name} ids at {tokens} tokens")
    close = torch.isclose(torch.from_numpy(np.array(want_weights)), weights[some].cpu(), rtol=2e-6, atol=0)
    _expect((close | ~same).all(), f"{name} weights at {tokens} tokens")

    operation = Operation(
        f"route {name}",
        tokens,
        tokens * (experts * 2 + k * 8) + experts * 4,
        lambda i: kernel(logits[i % num_sets], bias, weights, ids),
    )
    scale = config.routed_scaling_factor
    if vllm := peers.vllm():
        grouped = lambda i: vllm.grouped_topk(
            logits[i % num_sets], config.n_group, config.topk_group, k, True, scale, bias, peers.SIGMOID
        )
        operation.others["vLLM grouped_topk"] = grouped
        theirs = grouped(0)[1][some].cpu().int().sort(dim=1).values
        agree = (theirs == ids[some].cpu().sort(dim=1).values).all(dim=1).float().mean()
        _expect(agree > 0.99, f"vLLM chooses other experts for {1 - agree:.2%} of tokens")
    if (flashinfer := peers.flashinfer()) and config.n_group > 1:
        bias16, out16, ids16 = bias.bfloat16(), weights.bfloat16(), torch.empty_like(ids)
        fused = lambda i: flashinfer(
            logits[i % num_sets], bias16, config.n_group, config.topk_group, k, scale, out16, ids16
        )
        operation.others["FlashInfer"] = fused
        fused(0)
        found = ids16[some, :, None] == ids[some, None, :]  # its bias has 8 bits of mantissa: most ids, not all
        _expect(found.any(dim=2).float().mean() > 0.9, "FlashInfer chooses other experts")
    return operation


def _movement(tokens: int) -> Iterator[Operation]:
    num_sets = timing.input_sets(tokens * WIDTH * 2)
    x = [torch.randn(tokens, WIDTH, device="cuda").bfloat16() for _ in range(num_sets)]
    ids = torch.rand(tokens, EXPERTS, device="cuda").argsort(dim=1)[:, :TOP_K].int().contiguous()
    weights = torch.rand(tokens, TOP_K, device="cuda")
    pairs = tokens * TOP_K
    integers = lambda *shape: torch.full(shape, -7, dtype=torch.int32, device="cuda")
    rows, slots, sizes = integers(tokens, TOP_K), integers(pairs), integers(EXPERTS)
    moved = torch.full((pairs, WIDTH), float("nan"), dtype=torch.bfloat16, device="cuda")
    y = torch.full((tokens, WIDTH), float("nan"), dtype=torch.bfloat16, device="cuda")
    load = integers(EXPERTS)

    count, place = native.kernels_of(lambda e: plan_dispatch(e, None, num_experts=EXPERTS), ids)
    counts = integers(count.grid[0], EXPERTS)
    (move,) = native.kernels_of(dispatch, x[0], rows, slots)
    (gather,) = native.kernels_of(combine, moved, rows, weights)
    (tally,) = native.kernels_of(count_load, ids, load)

    def plan(_: int) -> None:
        count(ids, counts, slots)
        place(ids, counts, slots, rows, slots, sizes)

    def plan_and_dispatch(i: int) -> None:
        plan(i)
        move(x[i % num_sets], rows, slots, moved)

    plan_and_dispatch(0)
    order = ids.flatten().long().argsort(stable=True)
    _expect(torch.equal(slots.long(), order), f"slots at {tokens} tokens")
    _expect(torch.equal(rows.flatten()[order].long(), torch.arange(pairs, device="cuda")), f"rows at {tokens} tokens")
    _expect(torch.equal(sizes.long(), ids.flatten().long().bincount(minlength=EXPERTS)), f"sizes at {tokens} tokens")
    _expect(torch.equal(moved, x[0][slots.long() // TOP_K]), f"dispatch at {tokens} tokens")
    gather(moved, rows, weights, y)
    want = torch.stack([weights[:, j, None] * moved[rows[:, j].long()].float() for j in range(TOP_K)]).sum(dim=0)
    _expect(torch.allclose(y.float(), want, rtol=8e-3, atol=1e-3), f"combine at {tokens} tokens")
    load.zero_()
    tally(ids, load, load)
    _expect(torch.equal(load, sizes), f"load at {tokens} tokens")

    permute = [peers.Permute(a, ids, EXPERTS) for a in x] if peers.vllm() else []
    others: dict[str, Call] = {}
    if permute:
        others["vLLM moe_permute"] = lambda i: permute[i % num_sets]()
        permute[0]()
        _expect(torch.equal(permute[0].out, moved), "vLLM permutes otherwise")
    row = WIDTH * 2
    yield Operation("plan", tokens, pairs * 12 + EXPERTS * 4, plan, launches=2)
    yield Operation(
        "dispatch", tokens, (tokens + pairs) * row + pairs * 8, lambda i: move(x[i % num_sets], rows, slots, moved)
    )
    yield Operation("plan + dispatch", tokens, (tokens + pairs) * row + pairs * 12, plan_and_dispatch, others, 3)
    others = {}
    if permute:
        others["vLLM moe_unpermute"] = lambda i: permute[i % num_sets].unpermute(weights, y)
        permute[0].unpermute(weights, y.fill_(float("nan")))
        _expect(torch.allclose(y.float(), want, rtol=2e-2, atol=2e-2), "vLLM combines otherwise")
    yield Operation(
        "combine", tokens, (tokens + pairs) * row + pairs * 8, lambda i: gather(moved, rows, weights, y), others
    )
    yield Operation("load", tokens, pairs * 4 + EXPERTS * 4, lambda i: tally(ids, load, load))


def operations(quick: bool) -> Iterator[Operation]:
    """Every operation at every number of tokens; `quick` leaves out all but the smallest and one large."""
    for name in ("deepseek-v3", "kimi-k2"):
        config = dataclasses.replace(presets[name], n_shared_experts=0)  # as the peers': routed experts alone
        for tokens in (1, 4096) if quick else (1, 64, 512, 4096, 16384, 40960):
            yield _routing(name, config, tokens)
    for tokens in (1, 512) if quick else (1, 64, 512, 4096):
        yield from _movement(tokens)
