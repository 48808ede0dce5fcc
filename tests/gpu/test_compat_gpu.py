"""The drop-ins beside the kernels they stand in for, vLLM's and AITER's own, and what only a GPU can show of them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from jaxmoe import RoutingConfig, presets

torch = pytest.importorskip("torch")
from benchmarks import peers  # noqa: E402
from bridge.compat import aiter, vllm  # noqa: E402
from tests.bridge.test_bridge_compat_aiter import call as call_aiter  # noqa: E402
from tests.bridge.test_bridge_compat_vllm_experts import ACTIVATIONS, stated  # noqa: E402
from tests.bridge.test_bridge_compat_vllm_topk import clear_inputs, routed  # noqa: E402
from tests.check_compat_vllm import (  # noqa: E402
    CASES,
    IDS,
    Case,
    check_unpermute,
    drawn,
    local_ids,
    numbers,
    stated_align,
    stated_unpermute,
)
from tests.gpu.test_native_fused_experts_gpu import check_close, exactly, gradients, twice  # noqa: E402
from tests.jaxmoe import test_fused_experts as behind_routing  # noqa: E402
from tests.parity.compare import decided  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU")

PEERS = [case for case in CASES if case.peers]
NO_ACTIVATION, SIGMOID = 0, 1  # vLLM's numbers for them


@pytest.fixture
def gpu() -> Any:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def ops() -> Any:
    """torch.ops._moe_C, vLLM's kernels."""
    found = peers.vllm()
    if found is None:
        pytest.skip("needs vLLM's kernels")
    return found


# What vLLM's Python does around its kernels.


def real_grouped_topk(ops: Any, config: RoutingConfig, logits: Any, bias: Any) -> tuple[Any, Any]:
    softmax = config.scoring_func == "softmax"
    return ops.grouped_topk(
        logits.softmax(dim=-1) if softmax else logits,
        config.n_group,
        config.topk_group,
        config.top_k,
        config.renormalize,
        config.routed_scaling_factor,
        bias,
        NO_ACTIVATION if softmax else SIGMOID,
    )


def real_align(ops: Any, ids: Any, block: int, num_experts: int, expert_map: Any, padded: bool, ignore: bool) -> Any:
    pairs = ids.numel()
    length = pairs + num_experts * (block - 1)
    length = -(-length // block) * block if padded else length
    length = min(length, pairs * block) if pairs < num_experts else length
    sizes = (length, -(-length // block), 1)
    sorted_ids, experts, rows = (torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes)
    ops.moe_align_block_size(ids, num_experts, block, sorted_ids, experts, rows, expert_map if ignore else None)
    if expert_map is not None and not ignore:
        experts = expert_map[experts.long()]
    return sorted_ids, experts, rows


def real_permute(ops: Any, x: Any, ids: Any, n_expert: int, n_local: int, expert_map: Any) -> Any:
    """(rows, offsets, inverse [T * K], index [T * K])."""
    (tokens, top_k), device = ids.shape, ids.device
    pairs = tokens * top_k
    pair = torch.arange(pairs, dtype=torch.int32, device=device).reshape(tokens, top_k)
    rows = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=device)
    offsets = torch.empty(n_local + 1, dtype=torch.int64, device=device)
    inverse = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    index = torch.full((pairs,), pairs, dtype=torch.int32, device=device)
    ops.moe_permute(x, ids, pair, expert_map, n_expert, n_local, top_k, rows, offsets, inverse, index)
    return rows, offsets, inverse.flatten(), index


# All but the last go to a kernel of vLLM's that has its scores in float32; the last has them in the logits' dtype.
GROUPED = {
    "deepseek-v3": replace(presets["deepseek-v3"], n_shared_experts=0),
    "kimi-k2": replace(presets["kimi-k2"], n_shared_experts=0),
    "160 experts, 3 of 8 groups": RoutingConfig(num_experts=160, top_k=6, n_group=8, topk_group=3),
    "odd E": RoutingConfig(num_experts=61, top_k=6),
    "288 experts, groups of 36": RoutingConfig(num_experts=288, top_k=8, n_group=8, topk_group=4),
}


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_topk(name: str, scoring_func: str, renormalize: bool, ops: Any, gpu: Any) -> None:
    """The same experts in the same order, with the same weights, wherever rounding cannot decide."""
    config = replace(GROUPED[name], scoring_func=scoring_func, renormalize=renormalize)
    logits, bias = (tensor.to(gpu) for tensor in clear_inputs(config, True, 300))
    check_routing(routed(config, logits, bias), real_grouped_topk(ops, config, logits, bias))


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2"])
def test_grouped_topk_in_bfloat16(name: str, ops: Any, gpu: Any) -> None:
    logits, bias = (tensor.to(gpu) for tensor in clear_inputs(GROUPED[name], True, 100, torch.bfloat16))
    check_routing(routed(GROUPED[name], logits, bias), real_grouped_topk(ops, GROUPED[name], logits, bias))


def check_routing(got: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    """vLLM's sigmoid, by tanh, is off by 1e-7: much for a small score."""
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in wanted] == [torch.float32, torch.int32]
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.zeros_like(got[0]), wanted[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("case", PEERS, ids=IDS)
def test_align(case: Case, block: int, ops: Any, gpu: Any) -> None:
    """Equal, but for the order of an expert's pairs, which vLLM leaves open, and for blocks that are not in use."""
    ids, expert_map = case.inputs(gpu)
    for padded in (False, True):
        for ignore in (False, True):
            given = (ids, block, case.num_experts, expert_map, padded, ignore)
            (sorted_ids, experts, rows), wanted = vllm.moe_align_block_size(*given), real_align(ops, *given)
            begins = stated_align(*given)[3]
            assert torch.equal(rows, wanted[2])
            used = int(rows)
            assert torch.equal(experts[: used // block], wanted[1][: used // block])
            assert experts.shape == wanted[1].shape
            ordered = wanted[0].clone()
            for begin, end in zip(begins, [*begins[1:], used], strict=True):
                ordered[begin:end] = wanted[0][begin:end].sort().values
            assert torch.equal(sorted_ids, ordered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", PEERS, ids=IDS)
def test_permute(case: Case, dtype: Any, ops: Any, gpu: Any) -> None:
    """Equal wherever there is a token; where there is none, vLLM's rows and the order of its indices are open."""
    ids, expert_map = case.inputs(gpu)
    n_local = case.num_experts if case.num_local == -1 else case.num_local
    x = numbers(case.tokens, 64, device=gpu).to(dtype)
    rows, _, offsets, inverse, index = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    wanted = real_permute(ops, x, ids, case.num_experts, n_local, expert_map)
    assert torch.equal(offsets, wanted[1])
    held, has_row = int(offsets[-1]), local_ids(ids, case.num_experts, expert_map) >= 0
    bits = lambda tensor: tensor[:held].view(torch.uint8)
    assert rows.dtype == dtype
    assert torch.equal(bits(rows), bits(wanted[0]))
    assert (inverse.dtype, inverse.shape) == (wanted[2].dtype, wanted[2].shape)
    assert torch.equal(inverse[has_row], wanted[2][has_row])
    assert (inverse[~has_row] >= held).all()
    assert (wanted[2][~has_row] >= held).all()
    assert torch.equal(index, wanted[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", PEERS, ids=IDS)
def test_there_and_back_across_libraries(case: Case, dtype: Any, ops: Any, gpu: Any) -> None:
    """Ours takes what vLLM's has permuted and the other way round; all four sums agree."""
    ids, expert_map = case.inputs(gpu)
    n_local = case.num_experts if case.num_local == -1 else case.num_local
    x, weights = numbers(case.tokens, 64, device=gpu, dtype=dtype), numbers(*ids.shape, device=gpu).abs()
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, case.num_experts, case.num_local, expert_map)
    theirs = real_permute(ops, x, ids, case.num_experts, n_local, expert_map)
    has_row = local_ids(ids, case.num_experts, expert_map).reshape(ids.shape) >= 0
    wanted = x.double() * (weights.double() * has_row).sum(1, keepdim=True)
    for given, their_offsets, place in ((rows, offsets, inverse), theirs[:3]):
        out = torch.full_like(x, -77.0)
        vllm.moe_unpermute(out, given, weights, place, their_offsets)
        check_unpermute(out, wanted)
        out = torch.full_like(x, -77.0)
        ops.moe_unpermute(given, weights, place.reshape(ids.shape), their_offsets, ids.shape[1], out)
        check_unpermute(out, wanted)


# What needs no peer.

WIDTH, INNER, EXPERTS, TOP_K = 512, 96, 32, 4


@functools.cache
def expert_weights(device: Any, count: int = EXPERTS, dtype: Any = torch.bfloat16) -> tuple[Any, Any]:
    """w1 and w2 as vLLM keeps them."""
    make = torch.Generator(device).manual_seed(5)
    sizes = (count, 2 * INNER, WIDTH), (count, WIDTH, INNER)
    return tuple((torch.randn(size, device=device, generator=make) / size[2] ** 0.5).to(dtype) for size in sizes)


def step(x: Any, logits: Any, bias: Any, out: Any, scale: Any = None) -> tuple[Any, ...]:
    """Route, align, permute and unpermute, as an engine calls them; and the experts, in both of their ways."""
    weights, ids = vllm.grouped_topk(x, logits, TOP_K, True, 4, 2, "sigmoid", 2.5, bias)
    aligned = vllm.moe_align_block_size(ids, 16, EXPERTS)
    rows, scales, offsets, inverse, index = vllm.moe_permute(x, scale, ids, EXPERTS)
    vllm.moe_unpermute(out, rows, weights, inverse, offsets)
    fused = [vllm.fused_experts(x, *expert_weights(x.device), weights, ids, name) for name in ("silu", "gelu")]
    return weights, ids, *aligned, rows, scales, offsets, inverse, index, *fused


def step_inputs(gpu: Any, tokens: int, seed: int = 0) -> tuple[Any, ...]:
    make = torch.Generator(gpu).manual_seed(seed)
    x = torch.randn(tokens, WIDTH, device=gpu, generator=make, dtype=torch.bfloat16)
    logits = torch.randn(tokens, EXPERTS, device=gpu, generator=make)
    return x, logits, torch.randn(EXPERTS, device=gpu, generator=make) * 0.1, torch.empty_like(x)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_waits_for_nothing(gpu: Any) -> None:
    """torch reports each synchronisation of its own; there is none."""
    given = step_inputs(gpu, 64)
    scale = torch.rand(64, 2, device=gpu)
    step(*given, scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [64, 300])
def test_replays_in_a_graph(tokens: int, gpu: Any) -> None:
    """Captured whole, and replayed on other inputs; of 300 tokens pairs are aligned in two launches."""
    given = step_inputs(gpu, tokens)
    scale = torch.rand(tokens, 2, device=gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*given, scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*given, scale)
    for seed in (1, 2):
        fresh = step_inputs(gpu, tokens, seed)
        for tensor, value in zip(given, fresh, strict=True):
            tensor.copy_(value)
        given[3].fill_(-77)
        graph.replay()
        wanted = step(*fresh, scale)
        torch.cuda.synchronize()
        for a, b in zip((*results, given[3]), (*wanted, fresh[3]), strict=True):
            assert torch.equal(a, b)
        weights, rows, offsets, inverse = (results[i] for i in (0, 5, 7, 8))
        check_unpermute(given[3], stated_unpermute(rows, weights, inverse, offsets))


def test_offsets_of_held_rows_change_nothing(gpu: Any) -> None:
    """To the bit: with offsets or without it is the same kernel."""
    x, ids, weights = numbers(21, 512, device=gpu), drawn(0, 9)(21, 3).to(gpu, torch.int32), numbers(21, 3, device=gpu)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, 9)
    out, without = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    vllm.moe_unpermute(out, rows, weights, inverse, offsets)
    vllm.moe_unpermute(without, rows, weights, inverse)
    check_unpermute(out, stated_unpermute(rows, weights, inverse, offsets))
    assert torch.equal(out, without)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("few", [tuple(range(EXPERTS)), (5, 17, 2, 30, 9)], ids=["all experts", "some experts"])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_fused_experts(tokens: int, few: tuple[int, ...], dtype: Any, activation: str, gpu: Any) -> None:
    """Against a loop in float64, gradients too; the same bits on every run."""
    case = behind_routing.Case("", few, tokens, TOP_K)
    ids = drawn(-1, EXPERTS)(tokens, TOP_K).to(gpu)
    ids[:, 1] = few[0]
    x, weights = numbers(tokens, WIDTH, device=gpu, dtype=dtype), numbers(tokens, TOP_K, device=gpu)
    leaves = [t.clone().requires_grad_() for t in (x, weights, *expert_weights(gpu, len(few), dtype))]
    up, options = x.flip(1), {"activation": activation}
    if len(few) < EXPERTS:
        local = torch.full((EXPERTS,), -1, dtype=torch.int32, device=gpu)
        local[list(few)] = torch.arange(len(few), dtype=torch.int32, device=gpu)
        options |= {"expert_map": local, "global_num_experts": EXPERTS}

    def run() -> list[Any]:
        x, weights, w1, w2 = leaves
        y = vllm.fused_experts(x, w1, w2, weights, ids, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, up)]

    found, exact = twice(run), exactly(leaves)
    want = stated(case, ids, *exact, activation=activation)
    wanted = want, *gradients(want, exact, up.double())
    for tensor, exactly_that, like in zip(found, wanted, (leaves[0], *leaves), strict=True):
        check_close(tensor, exactly_that, dtype)
        assert (tensor.dtype, tensor.stride()) == (like.dtype, like.stride())
    assert bool(want.any()) == bool(tokens)


def launches(call: Callable[[], object]) -> list[str]:
    """What one call runs on the GPU, by name."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    found = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in found if "Sync" not in name]  # newer profilers list waits of the host too


@pytest.mark.counts_launches
def test_launches_are_as_documented(gpu: Any) -> None:
    x, logits, bias, out = step_inputs(gpu, 64)
    weights, ids = vllm.grouped_topk(x, logits, TOP_K, True, 4, 2, "sigmoid", 2.5, bias)
    here = torch.arange(EXPERTS, dtype=torch.int32, device=gpu)
    scale = torch.rand(64, 2, device=gpu)
    rows, _, offsets, inverse, _ = vllm.moe_permute(x, None, ids, EXPERTS)
    fused = functools.partial(vllm.fused_experts, x, *expert_weights(gpu), weights)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "grouped_topk": (1, lambda: vllm.grouped_topk(x, logits, TOP_K, True, 4, 2, "sigmoid", 2.5, bias)),
        "biased_grouped_topk": (1, lambda: aiter.biased_grouped_topk(logits, bias, weights, ids, 4, 2, True, 2.5)),
        "moe_align_block_size": (1, lambda: vllm.moe_align_block_size(ids, 16, EXPERTS)),
        "moe_align_block_size with a map": (1, lambda: vllm.moe_align_block_size(ids, 16, EXPERTS, here)),
        "moe_permute": (3, lambda: vllm.moe_permute(x, None, ids, EXPERTS)),
        "moe_permute with scales": (6, lambda: vllm.moe_permute(x, scale, ids, EXPERTS)),
        "moe_unpermute": (1, lambda: vllm.moe_unpermute(out, rows, weights, inverse)),
        "moe_unpermute with offsets": (1, lambda: vllm.moe_unpermute(out, rows, weights, inverse, offsets)),
        "fused_experts": (4, lambda: fused(ids)),
        "fused_experts with a map": (4, lambda: fused(ids, expert_map=here)),
        "fused_experts with gelu": (5, lambda: fused(ids, activation="gelu")),
        "fused_experts with ids of 64 bits": (6, functools.partial(fused, ids.long())),
    }
    for name, (most, call) in calls.items():
        found = launches(call)
        assert 1 <= len(found) <= most, f"{name}: {found}"


@pytest.mark.skipif(importlib.util.find_spec("aiter") is None, reason="needs the aiter package")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2"])
def test_biased_grouped_topk_of_aiter(name: str, dtype: Any, gpu: Any) -> None:
    """The same experts and weights; the order of AITER's ids is open, and its bias has the dtype of the logits."""
    from aiter import biased_grouped_topk

    config = GROUPED[name]
    logits, bias = clear_inputs(config, True, 100, dtype)
    bias = bias.to(dtype)
    logits, bias = logits[decided(logits, bias, config)].to(gpu), bias.to(gpu)
    assert len(logits) > 10
    (weights, ids), (their_weights, their_ids) = (
        call_aiter(function, config, logits, bias) for function in (aiter.biased_grouped_topk, biased_grouped_topk)
    )
    order, their_order = ids.argsort(dim=1), their_ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, their_order))
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-3, atol=0)
