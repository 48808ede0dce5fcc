"""What is timed, run once on the CPU at small sizes, beside stand-ins for vLLM's kernels; and that its checks bite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import bridge
from benchmarks import matmuls, movement, operation, peers, routing, stated, timing
from benchmarks.operation import Operation, checked
from bridge import RoutingConfig

TOKENS = 9


class Vllm:
    """vLLM's kernels as their signatures have them, in plain torch."""

    @staticmethod
    def grouped_topk(
        scores: Any, n_group: int, topk_group: int, topk: int, renormalize: bool, scale: float, bias: Any, scoring: int
    ) -> Any:
        assert scoring == peers.SIGMOID
        assert bias.dtype == torch.float32
        config = RoutingConfig(
            num_experts=scores.shape[1],
            top_k=topk,
            n_group=n_group,
            topk_group=topk_group,
            renormalize=renormalize,
            routed_scaling_factor=scale,
        )
        return stated.route(scores, bias, config)

    @staticmethod
    def topk_sigmoid(
        weights: Any, ids: Any, indices: Any, gating: Any, renormalize: bool, bias: Any, scale: float, padding: Any
    ) -> None:
        experts, k = gating.shape[1], weights.shape[1]
        config = RoutingConfig(num_experts=experts, top_k=k, renormalize=renormalize, routed_scaling_factor=scale)
        for out, value in zip((weights, ids), stated.route(gating, bias, config), strict=True):
            out.copy_(value)

    @staticmethod
    def topk_softmax(
        weights: Any, ids: Any, indices: Any, gating: Any, renormalize: bool, bias: Any, padding: Any
    ) -> None:
        options: Any = {"num_experts": gating.shape[1], "top_k": weights.shape[1], "renormalize": renormalize}
        config = RoutingConfig(scoring_func="softmax", **options)
        for out, value in zip((weights, ids), stated.route(gating, bias, config), strict=True):
            out.copy_(value)

    @staticmethod
    def moe_permute(
        x: Any, ids: Any, indices: Any, here: Any, n: int, n_local: int, k: int, out: Any, offsets: Any, inverse: Any,
        permuted: Any,
    ) -> None:  # fmt: skip
        assert torch.equal(indices, torch.arange(ids.numel(), dtype=torch.int32).view_as(ids))
        assert n_local == n if here is None else n_local < n == len(here)
        plan = stated.plan(ids if here is None else here[ids.long()], n_local, 1, ids.numel())
        held = plan.slots >= 0
        out[held] = x[plan.slots[held] // k]
        offsets[0] = 0
        offsets[1:] = plan.group_sizes.cumsum(0)
        inverse.copy_(plan.rows.where(plan.rows >= 0, len(out) - 1))  # a row behind those that are held
        permuted.copy_(plan.slots)

    @staticmethod
    def moe_unpermute(rows: Any, weights: Any, inverse: Any, offsets: Any, k: int, out: Any) -> None:
        assert ((inverse >= 0) & (inverse < len(rows))).all()
        assert weights.shape[1] == k
        places = inverse.where(inverse < offsets[-1], -1)
        out.copy_(stated.combine(rows, bridge.DispatchPlan(places, places, places), weights))

    @staticmethod
    def moe_align_block_size(
        ids: Any, experts: int, block: int, sorted_ids: Any, blocks: Any, number: Any, here: None
    ) -> None:
        plan = stated.plan(ids, experts, block, ids.numel() + experts * (block - 1))
        used = int(plan.group_sizes.sum())
        sorted_ids[:used] = plan.slots[:used].where(plan.slots[:used] >= 0, ids.numel())
        sorted_ids[:used] = sorted_ids[:used].view(-1, block).flip(1).flatten()  # in no order
        blocks[: used // block] = torch.arange(experts).repeat_interleave(plan.group_sizes.long() // block)
        number.fill_(used)


def fused_topk_deepseek(
    scores: Any, bias: Any, n_group: int, topk_group: int, topk: int, scale: float, weights: Any, ids: Any
) -> None:
    """FlashInfer's, which wants one dtype."""
    assert scores.dtype == bias.dtype == weights.dtype == torch.bfloat16
    for out, value in zip(
        (weights, ids),
        Vllm.grouped_topk(scores, n_group, topk_group, topk, True, scale, bias.float(), peers.SIGMOID),
        strict=True,
    ):
        out.copy_(value)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, at small sizes."""
    sizes = {
        routing: {"WIDTH": 64, "EXPERTS": 24},
        movement: {"WIDTH": 32, "EXPERTS": 20, "TOP_K": 3, "BLOCK": 4},
        matmuls: {"WIDTH": 32, "INNER": 16, "EXPERTS": 16, "TOP_K": 4, "TOKENS": TOKENS},
    }
    for module, values in sizes.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    config = RoutingConfig(num_experts=16, top_k=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    monkeypatch.setattr(matmuls, "CONFIG", config)
    monkeypatch.setattr(operation, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "input_sets", lambda *_, **__: 2)
    monkeypatch.setattr(peers, "vllm", lambda: Vllm)
    monkeypatch.setattr(peers, "flashinfer", lambda: fused_topk_deepseek)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run(operations: Any, *, skip: str = "no such peer") -> list[Operation]:
    """Checks ours and the peers' as they are checked before they are timed; all input sets can be run."""
    found = list(operations)
    for one in found:
        for name, entry in {"ours": one.ours, **one.peers}.items():
            if name != skip:
                checked(entry)
                entry.call(1)
        assert one.bytes > 0
        assert one.tokens >= 1
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3", {"torch eager", "vLLM grouped_topk", "FlashInfer fused_topk_deepseek", "XLA (wall clock)"}),
        ("deepseek-v2", {"torch eager"}),
        ("qwen3-next", {"torch eager", "vLLM topk_softmax"}),
    ],
)
def test_route(name: str, expected: set[str]) -> None:
    xla = "XLA (wall clock)" in expected
    (one,) = run(routing._route(name, routing.config_of(name), TOKENS, None, xla=xla, jit=True))
    assert set(one.peers) == expected
    assert ("vLLM" in one.missing) == (name == "deepseek-v2")
    assert [name for name, entry in one.peers.items() if entry.runs] == ["XLA (wall clock)"] * xla


def test_route_and_load() -> None:
    run(routing._route_and_load(TOKENS))


def test_kinds_at_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models and numbers of tokens that are asked for; few in a quick run, and nothing that is compiled there."""
    monkeypatch.setattr(routing, "_compiled", lambda config: "compiled")
    asked = {(build.args[0], build.args[2]) for build in routing.routes(False) if len(build.args) > 1}
    table = {("deepseek-v3", tokens) for tokens in range(5000, 40001, 5000)}
    sizes = (1, 8, 64, 512, 4096, 16384, 40960)
    assert asked == {(name, tokens) for name in routing.MODELS for tokens in sizes} | table
    compiled = {build.args[2] for build in routing.routes(False) if "compiled" in build.args}
    assert compiled == set(routing.COMPILED_AT)
    quick = list(routing.routes(True))
    assert len(quick) < 20
    assert all(build.args[3] is None and not build.keywords["jit"] for build in quick if len(build.args) > 1)
    for kind in (
        routing.router_logits,
        movement.movement,
        movement.elsewhere,
        movement.align,
        movement.step,
        matmuls.experts,
    ):
        assert 0 < len(list(kind(True))) < len(list(kind(False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_router_logits(dtype: torch.dtype) -> None:
    (one,) = run(routing._product(TOKENS, dtype), skip="torch.mm(out_dtype=float32)")  # GPUs alone have it
    assert len(one.peers) == (3 if dtype == torch.bfloat16 else 1)
    assert one.flops == 2 * TOKENS * 24 * 64


def test_movement() -> None:
    found = run(movement._movement(TOKENS))
    assert [(one.name, *one.peers) for one in found] == [
        ("plan",),
        ("dispatch",),
        ("plan + dispatch", "vLLM moe_permute"),
        ("permute, vLLM's form", "vLLM moe_permute"),
        ("combine", "vLLM moe_unpermute"),
        ("unpermute, vLLM's form", "vLLM moe_unpermute"),
    ]


def test_elsewhere() -> None:
    found = run(movement._elsewhere(TOKENS))
    here = "an eighth of the experts here"
    assert [(one.name, *one.peers) for one in found] == [
        (f"permute, vLLM's form, {here}", "vLLM moe_permute"),
        (f"plan + dispatch, {here}", "vLLM moe_permute"),
        (f"plan + dispatch, {here}, max_rows", "vLLM moe_permute"),
        (f"unpermute, vLLM's form, {here}", "vLLM moe_unpermute"),
    ]
    assert found[0].bytes < found[1].bytes


def test_elsewhere_with_room_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens enough for there to be fewer rows than pairs."""
    monkeypatch.setattr(movement, "WIDTH", 8)
    found = run(movement._elsewhere(40))
    assert found[0].bytes < found[2].bytes < found[1].bytes


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_align(tokens: int) -> None:
    found = run(movement._align(tokens))
    assert [(one.name, *one.peers) for one in found] == [
        ("align 4", "vLLM moe_align_block_size"),
        ("align 4, vLLM's form", "vLLM moe_align_block_size"),
    ]


def test_step() -> None:
    (one,) = run(movement._step("deepseek-v3", TOKENS))
    assert list(one.peers) == ["vLLM grouped_topk, moe_permute, moe_unpermute"]


@pytest.mark.parametrize(("kind", "num_rows"), [("even", 40), ("zipf", 40), ("uneven", 8)])
def test_grouped_matmul(kind: str, num_rows: int) -> None:
    """The last has fewer rows than experts."""
    assert int(matmuls.shares(kind, num_rows, 16).sum()) == num_rows
    (one,) = run(matmuls._grouped_matmul(kind, num_rows))
    assert one.flops == 2 * num_rows * 32 * 32


def test_experts() -> None:
    run(matmuls._experts("uneven", 40))


def test_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the weights of a whole layer must lie as they are read, and torch has no product of two dtypes."""
    moe, mm = bridge.moe, torch.mm
    dense: Any = lambda params: params._replace(gate_up=params.gate_up.contiguous(), down=params.down.contiguous())
    monkeypatch.setattr(bridge, "moe", lambda x, params, config: moe(x, dense(params), config))
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    (one,) = run(matmuls._layer(TOKENS))
    assert list(one.peers) == ["torch, grouped_mm", "vLLM's kernels, torch grouped_mm"]


# The checks.

CONFIG = RoutingConfig(num_experts=24, top_k=4, n_group=4, topk_group=2)


def broken_routings() -> dict[str, Callable[[Any, Any], tuple[Any, Any]]]:
    return {
        "nothing written": lambda weights, ids: (weights * torch.nan, ids),
        "zeros": lambda weights, ids: (weights * 0, ids),
        "swapped experts": lambda weights, ids: (weights, ids.roll(1, dims=1)),
        "another expert": lambda weights, ids: (weights, (ids + 6) % 24),
        "an expert twice": lambda weights, ids: (weights, ids.where(torch.arange(4) > 0, ids[:, 1:2])),
        "out of range": lambda weights, ids: (weights, ids.where(torch.arange(4) > 0, 24)),
        "not scaled": lambda weights, ids: (weights * 1.001, ids),
        "too few": lambda weights, ids: (weights[:, :3], ids[:, :3]),
    }


@pytest.mark.parametrize("what", broken_routings())
def test_check_of_routing(what: str) -> None:
    logits, bias = torch.randn(40, 24), torch.randn(24) * 0.1
    right = stated.route(logits, bias, CONFIG)
    stated.check_routing(*right, logits, bias, CONFIG)
    with pytest.raises(AssertionError, match="wrong result"):
        stated.check_routing(*broken_routings()[what](*right), logits, bias, CONFIG)


def test_check_of_routing_takes_any_of_what_is_equal() -> None:
    """Equal experts, and equal groups; but not experts of two groups where one is kept."""
    config = RoutingConfig(num_experts=8, top_k=2, n_group=4, topk_group=1, scoring_func="softmax")
    logits = torch.zeros(1, 8)
    weights = torch.full((1, 2), 0.5)
    for ids in ([[0, 1]], [[5, 4]], [[6, 7]]):
        stated.check_routing(weights, torch.tensor(ids), logits, None, config)
    with pytest.raises(AssertionError, match="experts right for 0"):
        stated.check_routing(weights, torch.tensor([[0, 2]]), logits, None, config)


def test_check_of_plan_and_rows() -> None:
    ids = torch.tensor([[2, 0], [-1, 2]], dtype=torch.int32)
    plan = stated.plan(ids, 3, 2, 4 + 3)
    assert [part.tolist() for part in plan] == [[[2, 0], [-1, 3]], [1, -1, 0, 3, -1, -1, -1], [2, 0, 2]]
    stated.check_plan(plan, ids, 3, 2)
    with pytest.raises(AssertionError, match="slots of the plan"):
        stated.check_plan(plan._replace(slots=plan.slots.roll(1)), ids, 3, 2)
    x = torch.tensor([[1.0], [2.0]])
    rows = torch.tensor([[1.0], [0.0], [1.0], [2.0], [0.0], [0.0], [0.0]])
    stated.check_rows(rows, x, plan)
    with pytest.raises(AssertionError, match="dispatched rows"):
        stated.check_rows(rows + (plan.slots < 0)[:, None] * torch.nan, x, plan)
    sums = stated.combine(rows, plan, torch.tensor([[3.0, 5.0], [7.0, 11.0]]))
    assert sums.tolist() == [[8.0], [22.0]]
    for wrong in (sums * 0, sums * torch.nan, sums.flip(0)):
        with pytest.raises(AssertionError, match="sums, relative error"):
            stated.check_close(wrong, sums, 1e-2, "sums")
    nothing = torch.zeros(2, 1)
    stated.check_close(nothing, nothing, 1e-2, "sums of no rows")
    for wrong in (sums, nothing + torch.nan):
        with pytest.raises(AssertionError, match="sums of no rows, relative error inf"):
            stated.check_close(wrong, nothing, 1e-2, "sums of no rows")


def test_layer_of_torch() -> None:
    """The fast one that is timed against the plain one that checks."""
    make = functools.partial(torch.randn, dtype=torch.bfloat16)
    x, router, gate_up, down = make(7, 32), make(16, 32), make(16, 32, 32).mT, make(16, 32, 16).mT
    weights = router, torch.randn(16) * 0.1, gate_up, down, matmuls.CONFIG
    stated.check_close(stated.layer(x, *weights), stated.layer_loop(x, *weights), 1e-2, "layer")
