"""The native path's launches on a GPU: few compilations, graphs, streams, threads, torch.compile, and several GPUs."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests import cases
from tests.check_dispatch import check_combine, check_dispatch
from tests.check_plan import check_plan
from tests.check_route import check_route

torch = pytest.importorskip("torch")
import bridge  # noqa: E402
from bridge.native import build  # noqa: E402
from tests.gpu.tensors import array, plan_of, poisoned, routing, tensor  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU"),
    pytest.mark.usefixtures("synchronized"),
]

V3 = bridge.presets["deepseek-v3"]


def test_one_compilation_serves_every_number_of_tokens() -> None:
    config = bridge.RoutingConfig(num_experts=96, top_k=3, n_group=3, topk_group=2)  # no other test's
    bias = torch.randn(96, device="cuda")
    before = len(build.builds)
    for tokens in [*range(40), 63, 64, 65, 511, 512, 513, 1000, 2048, 4095, 4096]:
        logits = torch.randn(tokens, 96, device="cuda")
        got = bridge.route(logits, bias, config=config)
        plan = bridge.plan_dispatch(got.experts, 96, align=16)
        x = torch.randn(tokens, 1032, device="cuda", dtype=torch.bfloat16)
        rows = bridge.dispatch(x, plan)
        y = bridge.combine(rows, plan, got.weights)
        if tokens in (1, 39, 512, 4096):
            check_route(routing(got), array(logits), array(bias), config)
            check_plan(plan_of(plan), array(got.experts), 96, 16)
            check_dispatch(array(rows), array(x), plan_of(plan))
            check_combine(array(y), array(rows), plan_of(plan), array(got.weights))
    names = [made.name.rpartition(".")[2] for made in build.builds[before:]]
    counts = {name: names.count(name) for name in set(names)}
    assert counts.pop("plan_dispatch") == 5, "of one launch with 2, 16, 64 and 128 words, and of two"
    assert counts == {"route": 3, "count_load": 2, "dispatch": 2, "combine": 4}, "more than one: others for many tokens"


class Step:
    """route, plan, dispatch, combine, as an engine captures them."""

    def __init__(self, tokens: int, config: bridge.RoutingConfig = V3, width: int = 512) -> None:
        self.config, self.tokens, self.width = config, tokens, width
        self.logits = torch.zeros(tokens, config.num_experts, device="cuda", dtype=torch.bfloat16)
        self.bias = torch.randn(config.num_experts, device="cuda")
        self.x = torch.zeros(tokens, width, device="cuda", dtype=torch.bfloat16)
        self.valid = torch.tensor(tokens, dtype=torch.int32, device="cuda")

    def __call__(self) -> tuple[Any, ...]:
        got = bridge.route(self.logits, self.bias, config=self.config, num_valid_tokens=self.valid)
        plan = bridge.plan_dispatch(got.experts, self.config.num_expert_ids)
        rows = bridge.dispatch(self.x, plan)
        return got, plan, rows, bridge.combine(rows, plan, got.weights)

    def fill(self, seed: int, valid: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.logits.normal_(generator=generator)
        self.x.normal_(generator=generator)
        self.valid.fill_(valid)

    def check(self, results: tuple[Any, ...], valid: int) -> None:
        got, plan, rows, y = results
        check_route(routing(got), array(self.logits), array(self.bias), self.config, valid=valid)
        check_plan(plan_of(plan), array(got.experts), self.config.num_expert_ids)
        check_dispatch(array(rows), array(self.x), plan_of(plan))
        check_combine(array(y), array(rows), plan_of(plan), array(got.weights))


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "first call inside the capture"])
def test_captured_and_replayed(warm: bool) -> None:
    """New inputs, another number of valid tokens, every result poisoned in between."""
    width = 512 if warm else 520  # another width, another kernel
    step = Step(33, width=width)
    if warm:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX, against which is checked, has other threads
        results = step()
    poison = torch.empty(2**20, device="cuda")  # what the capture freed must not be what it needs
    for seed, valid in enumerate((33, 0, 7, 33, 1)):
        step.fill(seed, valid)
        poison.fill_(float("nan"))
        for part in (*results[0], *results[1], *results[2:]):
            part.fill_(-77)
        graph.replay()
        torch.cuda.synchronize()
        step.check(results, valid)


def test_side_stream() -> None:
    """A launch goes to torch's current stream, behind what that stream holds."""
    step, stream = Step(64), torch.cuda.Stream()
    step()
    step.fill(0, 64)
    logits, x = step.logits.clone(), step.x.clone()
    step.logits.zero_()
    step.x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        step.logits.copy_(logits)
        step.x.copy_(x)
        results = step()
        assert not stream.query(), "the host must not have waited"
    torch.cuda.synchronize()
    step.check(results, 64)


def test_several_streams_and_threads_at_once() -> None:
    """Threads share kernels, and a kernel's argument buffer."""
    steps = [Step(1 + 37 * i) for i in range(4)]
    for i, step in enumerate(steps):
        step.fill(i, step.tokens)
    torch.cuda.synchronize()
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                results[i] = steps[i]()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, step in enumerate(steps):
        step.check(results[i], step.tokens)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # inductor captures one for its pool of memory
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    """fullgraph, no recompilation for another number of tokens; with "reduce-overhead" in inductor's CUDA graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    bias = torch.randn(256, device="cuda")
    weight = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)

    def layer(x: Any) -> Any:
        got = bridge.route(bridge.router_logits(x, weight), bias, config=V3, return_load=False)
        plan = bridge.plan_dispatch(got.experts, 257)
        return bridge.combine(bridge.dispatch(x, plan) * 2, plan, got.weights)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, mode=mode)
    for tokens in (64, 33, 7, 128):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        assert torch.allclose(compiled(x).float(), layer(x).float(), rtol=1e-2, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1


def test_opcheck() -> None:
    from torch.library import opcheck

    step = Step(5)
    step.fill(0, 5)
    got, plan, rows, _ = step()
    ops, logits = torch.ops.jaxmoe, step.logits.clone().requires_grad_()
    checks: list[tuple[Any, ...]] = [
        (ops.route.default, (logits, step.bias, step.valid, None, V3.json, True)),
        (ops.route.default, (logits, None, None, 3, V3.json, False)),
        (ops.plan_dispatch.default, (got.experts, 257, 8, None)),
        (ops.plan_dispatch.default, (got.experts, 257, 8, None, 64)),
        (ops.dispatch.default, (step.x.clone().requires_grad_(), plan.rows, plan.slots)),
        (ops.combine.default, (rows.clone().requires_grad_(), plan.rows, plan.slots, got.weights.requires_grad_())),
        (ops.router_logits.default, (step.x.clone().requires_grad_(), torch.randn(9, 512, device="cuda"))),
    ]
    for op, args in checks:
        opcheck(op, args)
    plain, maps = got.weights.detach(), (torch.empty_like(plan.slots), torch.empty_like(plan.slots))
    outs: list[tuple[Any, ...]] = [
        (ops.route_out.default, (step.logits, step.bias, None, None, V3.json, plain, got.experts, None)),
        (ops.dispatch_out.default, (step.x, plan.rows, plan.slots, rows)),
        (ops.combine_out.default, (rows, plan.rows, plan.slots, plain, torch.empty_like(step.x))),
        (ops.align_blocks.default, (got.experts, 257, 8, None, False, 5 * V3.num_slots * 8)),
        (ops.permute_maps_out.default, (*plan, torch.empty(258, dtype=torch.int64, device="cuda"), *maps)),
        (
            ops.unpermute_out.default,
            (rows, plan.rows, plain, torch.tensor([9], device="cuda"), torch.empty_like(step.x)),
        ),
    ]
    for op, args in outs:
        opcheck(op, args)


def test_first_cuda_call_of_a_thread() -> None:
    """A thread has no context until something makes one: FlashInfer's and triton's launchers look after that too."""
    logits, found = torch.randn(9, 256, device="cuda"), []
    out = bridge.Routing(poisoned(9, V3.num_slots), poisoned(9, V3.num_slots, dtype=torch.int32), None)
    bridge.route(logits, config=V3, return_load=False)
    torch.cuda.synchronize()
    work = lambda: found.append(bridge.route(logits, config=V3, return_load=False, out=out))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    check_route(routing(found[0]), array(logits), None, V3)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_second_gpu() -> None:
    """The tensors' device decides, not torch's current one; tensors of both are refused."""
    logits = torch.randn(50, 256, device="cuda:1")
    got = bridge.route(logits, config=V3)
    assert got.weights.device == logits.device
    check_route(routing(got), array(logits), None, V3)
    plan = bridge.plan_dispatch(got.experts, 257)
    check_plan(plan_of(plan), array(got.experts), 257)
    with pytest.raises(ValueError, match="bias: expected the device of the first argument, cuda:1, got cuda:0"):
        bridge.route(logits, torch.zeros(256, device="cuda:0"), config=V3)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_calls_alike_on_two_gpus() -> None:
    """A call is known by its device too, and goes to that device's current stream."""
    for seed, device in enumerate(("cuda:1", "cuda:0", "cuda:1", "cuda:0", "cuda:1")):
        logits, bias = (tensor(cases.normal(seed, *sizes)).to(device) for sizes in ((64, 256), (256,)))
        with torch.device(device):
            out = bridge.Routing(torch.full((64, 9), torch.nan), torch.full((64, 9), -77, dtype=torch.int32), None)
        stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream), torch.cuda.device(0):
            bridge.route(logits, bias, config=V3, return_load=False, out=out)
        torch.cuda.synchronize(device)
        check_route(routing(out), array(logits), array(bias), V3)
