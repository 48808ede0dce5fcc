# ruff: noqa: E501
"""The torch ops: schema, fake implementation, autograd and torch.compile, on CPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import bridge
from bridge import path
from bridge.ops import weighted_experts as ops

CONFIG = bridge.RoutingConfig(num_experts=16, top_k=3, n_group=4, topk_group=2, n_shared_experts=1)
T, H, I, M, E = 5, 32, 16, 20, 17
OPS = torch.ops.jaxmoe


def normal(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def plan(align: int = 1) -> bridge.DispatchPlan:
    return bridge.plan_dispatch(bridge.route(normal(T, 16), config=CONFIG).experts, E, align=align)


def weights(transposed: bool, grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    if transposed:
        return (normal(E, 2 * I, H, grad=grad) / 8).mT, (normal(E, H, I, grad=grad) / 8).mT
    return normal(E, H, 2 * I, grad=grad) / 8, normal(E, I, H, grad=grad) / 8


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of every op: (op, args)."""
    rows, slots, sizes = plan()
    ids = bridge.route(normal(T, 16), config=CONFIG).experts
    gate_up, down = (leaf(w) for w in weights(False))
    transposed = tuple(leaf(w) for w in weights(True))
    stack, kept = (gate_up.detach(), down.detach()), normal(M, 2 * I, seed=2)
    valid = torch.tensor(3, dtype=torch.int32)
    here, local = torch.arange(-2, E - 2, dtype=torch.int32), (leaf(gate_up[: E - 2]), leaf(down[: E - 2]))
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype)
    out = empty(T, 4), empty(T, 4, dtype=torch.int32), empty(E, dtype=torch.int32)
    router = normal(16, H, seed=1, grad=True)
    return {
        "route": (OPS.route, (normal(T, 16, grad=True), normal(16), None, None, CONFIG.json, True)),
        "route, a count on the device": (OPS.route, (normal(T, 16), None, valid, None, CONFIG.json, False)),
        "route, a number": (OPS.route, (normal(T, 16, grad=True), None, None, 2, CONFIG.json, True)),
        "route_out": (OPS.route_out, (normal(T, 16), normal(16), None, None, CONFIG.json, *out)),
        "route_out, no load": (OPS.route_out, (normal(T, 16), None, valid, None, CONFIG.json, *out[:2], None)),
        "route_backward": (OPS.route_backward, (normal(T, 4), normal(T, 16), ids, CONFIG.json)),
        "router_logits": (OPS.router_logits, (normal(T, H, grad=True), router)),
        "router_logits_backward": (OPS.router_logits_backward, (normal(T, 16), normal(T, H), router.detach())),
        "plan_dispatch": (OPS.plan_dispatch, (ids, E, 4, None)),
        "plan_dispatch, mapped": (OPS.plan_dispatch, (ids, 3, 1, torch.arange(-1, E - 1, dtype=torch.int32))),
        "plan_dispatch, cut": (OPS.plan_dispatch, (ids, E, 4, None, 24)),
        "align_blocks": (OPS.align_blocks, (ids, E, 4, None, False, T * 4 + 3 * E)),
        "align_blocks, named": (
            OPS.align_blocks,
            (ids, E, 8, torch.arange(-1, E - 1, dtype=torch.int32), True, T * 32),
        ),
        "permute_maps_out": (
            OPS.permute_maps_out,
            (rows, slots, sizes, empty(E, dtype=torch.int64), *(empty(M, dtype=torch.int32) for _ in range(2))),
        ),
        "dispatch": (OPS.dispatch, (normal(T, H, grad=True), rows, slots)),
        "dispatch_out": (OPS.dispatch_out, (normal(T, H), rows, slots, empty(M, H))),
        "dispatch_backward": (OPS.dispatch_backward, (normal(M, H), rows, slots)),
        "combine": (OPS.combine, (normal(M, H, grad=True), rows, slots, normal(T, 4, grad=True))),
        "combine_out": (OPS.combine_out, (normal(M, H), rows, slots, normal(T, 4), empty(T, H))),
        "unpermute_out": (
            OPS.unpermute_out,
            (normal(M, H), rows, normal(T, 4), torch.tensor([9]), empty(T, H)),
        ),
        "combine_backward": (OPS.combine_backward, (normal(T, H), normal(M, H), rows, slots, normal(T, 4))),
        "grouped_matmul": (OPS.grouped_matmul, (normal(M, H, grad=True), gate_up, sizes)),
        **{
            f"grouped_matmul_backward{', frozen' * (not trained)}": (
                OPS.grouped_matmul_backward,
                (normal(M, 2 * I), normal(M, H), gate_up.detach(), sizes, trained),
            )
            for trained in (True, False)
        },
        "experts": (OPS.experts, (normal(M, H, grad=True), gate_up, down, sizes, "silu")),
        "experts, transposed": (OPS.experts, (normal(M, H, grad=True), *transposed, sizes, "gelu")),
        **{
            f"experts_backward{', frozen' * (not trained)}": (
                OPS.experts_backward,
                (normal(M, H, seed=1), normal(M, H), *stack, sizes, "silu", trained),
            )
            for trained in (True, False)
        },
        "weighted_experts": (
            OPS.weighted_experts,
            (normal(T, H, grad=True), rows, slots, sizes, normal(T, 4, grad=True), gate_up, down, E, True),
        ),
        "weighted_experts, transposed": (
            OPS.weighted_experts,
            (normal(T, H, grad=True), rows, slots, sizes, normal(T, 4, grad=True), *transposed, 4 * E, True),
        ),
        "weighted_experts, nothing kept": (
            OPS.weighted_experts,
            (normal(T, H), rows, slots, sizes, normal(T, 4), *stack, E, False),
        ),
        **{
            f"weighted_experts_backward{', frozen' * (not trained)}": (
                OPS.weighted_experts_backward,
                (normal(T, H, seed=1), normal(T, H), rows, slots, sizes, normal(T, 4), *stack, kept, E, trained),
            )
            for trained in (True, False)
        },
        "weighted_experts_last_backward": (
            OPS.weighted_experts_last_backward,
            (normal(T, H, seed=1), normal(T, H), rows, slots, sizes, normal(T, 4), *stack, kept.clone(), E, True),
        ),
        "fused_experts": (OPS.fused_experts, (normal(T, H, grad=True), ids, normal(T, 4, grad=True), gate_up, down)),
        "fused_experts, of other ids, with room for few": (
            OPS.fused_experts,
            (normal(T, H, grad=True), ids, normal(T, 4, grad=True), *local, here, 7),
        ),
        "moe": (OPS.moe, (normal(T, H, grad=True), router, normal(16), gate_up, down, None, None, CONFIG.json)),
        "update_bias": (OPS.update_bias, (normal(16), torch.arange(E, dtype=torch.int32), 0.5)),
    }


CALLS = calls()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the op made of others
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    """torch's own checks: what is mutated, the fake implementation, autograd's registration, static and dynamic."""
    op, args = CALLS[name]
    opcheck(op.default, args)


def test_every_op_is_here() -> None:
    defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("jaxmoe::")}
    assert defined == {name.partition(",")[0] for name in CALLS}


@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (3, 4)])
def test_weighted_experts_without_pairs(tokens: int, experts: int) -> None:
    """No tokens, but rows that fill experts up; tokens whose every pair is dropped: zeros, and gradients of zero."""
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    rows, slots, sizes = bridge.plan_dispatch(ids, experts, align=4)
    assert len(slots) > 0
    leaves = [normal(tokens, H, grad=True), normal(tokens, 2, grad=True)]
    leaves += [normal(experts, H, 2 * I, grad=True), normal(experts, I, H, grad=True)]
    x, weights, gate_up, down = leaves
    y, kept = OPS.weighted_experts(x, rows, slots, sizes, weights, gate_up, down, experts, True)
    assert (y.shape, kept.shape) == ((tokens, H), (len(slots), 2 * I))
    assert not y.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.fixture
def written_over(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backward ops that are called, chosen as for tensors on a GPU."""
    called: list[str] = []
    noted = lambda name, op: lambda *args: (called.append(name), op(*args))[1]
    monkeypatch.setattr(ops, "_is_last", lambda kept, grad: not ops._keeps_graph() and not ops.is_batched(grad))
    for name, short in (("weighted_experts_backward", "another"), ("weighted_experts_last_backward", "last")):
        monkeypatch.setattr(ops, name, noted(short, getattr(ops, name)))
    return called


def weighted(x: Any) -> Any:
    ids = torch.arange(T * 2, dtype=torch.int32).view(T, 2) % E
    return OPS.weighted_experts(x, *bridge.plan_dispatch(ids, E), normal(T, 2), *weights(False), E, True)[0]


def test_what_is_kept_is_written_over_by_the_last_backward_pass_alone(written_over: list[str]) -> None:
    """torch says which is the last: not one that keeps the graph, and none of several at once."""
    x = normal(T, H, grad=True)
    y, up = weighted(x), normal(T, H, seed=3)
    first, second, third = (torch.autograd.grad(y, x, up, retain_graph=keep)[0] for keep in (True, True, False))
    assert written_over == ["another", "another", "last"]
    assert first.any()
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    written_over.clear()
    (both,) = torch.autograd.grad(weighted(x), x, torch.stack([up, 2 * up]), is_grads_batched=True)
    assert set(written_over) == {"another"}
    torch.testing.assert_close(both, torch.stack([first, 2 * first]))


def test_nothing_is_written_over_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    is_last = ops._is_last
    monkeypatch.setattr(ops, "_is_last", lambda *args: asked.append((ops._keeps_graph(), is_last(*args))) or False)
    x = normal(T, H, grad=True)
    torch.autograd.grad(weighted(x), x, normal(T, H, seed=3))
    assert asked == [(False, False)]


def test_a_backward_pass_that_failed_is_not_repeated(written_over: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory halfway, say: what it would need has been written over. One that keeps the graph may be."""
    x = normal(T, H, grad=True)
    y, up = weighted(x), normal(T, H, seed=3)

    def fails(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    for name in ("weighted_experts_backward", "weighted_experts_last_backward"):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="no room"):
            patch.setattr(ops, name, fails)
            torch.autograd.grad(y, x, up, retain_graph=name == "weighted_experts_backward")
        if name == "weighted_experts_backward":
            assert torch.autograd.grad(y, x, up, retain_graph=True)[0].any()
    with pytest.raises(RuntimeError, match="a backward pass that failed has written over what the next one needs"):
        torch.autograd.grad(y, x, up)


@pytest.mark.parametrize("frozen", ["x", "experts", "router"])
def test_what_is_frozen_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others get what they get otherwise."""
    from bridge import path

    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    x, router = normal(T, H, grad=True), normal(16, H, seed=1, grad=True)
    stack = [leaf(w) for w in weights(False)]
    tensors = {"x": [x], "router": [router], "experts": stack}
    run = lambda: bridge.moe(x, bridge.MoEParams(router, *stack, None), CONFIG)[0].square().sum()
    some = [t for name, group in tensors.items() if name != frozen for t in group]
    want = torch.autograd.grad(run(), some)
    for tensor in tensors[frozen]:
        tensor.requires_grad_(False)
    for got, wanted in zip(torch.autograd.grad(run(), some), want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("op", "frozen"), [("experts", (1,)), ("experts", (2,)), ("experts", (1, 2)), ("grouped_matmul", (1,))], ids=str
)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_frozen_weights_get_no_gradient(op: str, transposed: bool, frozen: tuple[int, ...]) -> None:
    """And the others, and the rows, get what they get otherwise."""
    sizes = plan()[2]
    leaves = [normal(M, H, grad=True), *(leaf(w) for w in weights(transposed))]
    if op == "grouped_matmul":
        run = lambda: OPS.grouped_matmul(*leaves[:2], sizes)
        leaves = leaves[:2]
    else:
        run = lambda: OPS.experts(*leaves, sizes, "silu")
    some = [t for i, t in enumerate(leaves) if i not in frozen]
    want = torch.autograd.grad(run().square().sum(), some)
    for index in frozen:
        leaves[index].requires_grad_(False)
    for got, wanted in zip(torch.autograd.grad(run().square().sum(), some), want, strict=True):
        torch.testing.assert_close(got, wanted)


def layer(x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, *stack: torch.Tensor) -> tuple[Any, ...]:
    logits = bridge.router_logits(x, router)
    routing = bridge.route(logits, bias, config=CONFIG, num_valid_tokens=max(x.shape[0] - 1, 0))
    plan = bridge.plan_dispatch(routing.experts, CONFIG.num_expert_ids, align=4)
    rows = bridge.experts(bridge.dispatch(x, plan), *stack, plan.group_sizes)
    return bridge.combine(rows, plan, routing.weights), routing.experts, routing.load


def whole(x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, *stack: torch.Tensor) -> tuple[Any, ...]:
    y, routing = bridge.moe(x, bridge.MoEParams(router, *stack, bias), CONFIG)
    return y, routing.experts, routing.load


def in_place(x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor, *stack: torch.Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        logits = bridge.router_logits(x, router)
        make = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype)
        slots = CONFIG.num_slots
        out = bridge.Routing(make(len(x), slots), make(len(x), slots, dtype=torch.int32), None)
        routing = bridge.route(logits, bias, config=CONFIG, return_load=False, out=out)
        plan = bridge.plan_dispatch(routing.experts, CONFIG.num_expert_ids)
        rows = bridge.dispatch(x, plan, out=make(len(x) * slots, H))
        return bridge.combine(rows, plan, routing.weights, out=torch.empty_like(x)), out.experts, out.weights


@pytest.mark.parametrize("function", [layer, whole, in_place])
def test_torch_compile(function: Callable[..., Any]) -> None:
    """One graph for every number of tokens, the same results and gradients as without."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # inductor, which takes long, on the GPU: test_native_gpu.py
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with_gradient = function is not in_place
    stack = [leaf(w) for w in weights(False)]
    router, bias = normal(16, H, seed=1, grad=True), normal(16, seed=2)
    for tokens in (5, 9, 3):
        x = normal(tokens, H, seed=tokens, grad=with_gradient)
        got, wanted = compiled(x, router, bias, *stack), function(x, router, bias, *stack)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
        if with_gradient:
            inputs = [x, router, *stack]
            gradients = [torch.autograd.grad(y[0].square().sum(), inputs) for y in (got, wanted)]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
                assert a.abs().max() > 0
    assert counter.frame_count == 1


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "logits shape": (lambda: bridge.route(normal(T, 15), config=CONFIG), r"logits: expected .* \[T, 16\], got float32\[5, 15\]"),
    "bias dtype": (
        lambda: bridge.route(normal(T, 16), torch.zeros(16, dtype=torch.int32), config=CONFIG),
        r"bias: expected bfloat16 or float16 or float32 \[16\], got int32\[16\]",
    ),
    "count": (lambda: bridge.route(normal(T, 16), config=CONFIG, num_valid_tokens=6), "num_valid_tokens: expected 0 to T=5"),
    "kind of count": (lambda: bridge.route(normal(T, 16), config=CONFIG, num_valid_tokens="3"), "num_valid_tokens: expected an int"),
    "columns": (lambda: bridge.route(normal(16, T).T, config=CONFIG), r"logits: expected rows that lie apart .* strides \(1, 5\)"),
    "config": (lambda: bridge.route(normal(T, 16), config=CONFIG.json), "config: expected a RoutingConfig, got str"),
    "ids dtype": (lambda: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int64), 4), r"experts: expected int32 \[T, S\]"),
    "align": (lambda: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int32), 4, align=0), "align: expected an int from 1"),
    **{
        f"max_rows {rows}": (
            lambda rows=rows: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int32), 4, align=8, max_rows=rows),  # type: ignore[misc]
            rf"max_rows: expected a positive multiple of align=8, got {rows}$",
        )
        for rows in (0, 12, -8, True, 8.0)
    },
    "length": (
        lambda: OPS.align_blocks(torch.zeros(5, 2, dtype=torch.int32), 4, 8, None, False, 37),
        "length: expected 38 for 10 pairs, or more, to 1610612735, got 37",
    ),
    "names": (
        lambda: OPS.align_blocks(torch.zeros(5, 2, dtype=torch.int32), 4, 8, torch.zeros(3, dtype=torch.int32), True, 40),
        r"expert_map: expected a name for each of num_experts=4, got int32\[3\]",
    ),
    "offsets": (
        lambda: OPS.permute_maps_out(*plan(), torch.empty(E + 2, dtype=torch.int64), *(torch.empty_like(plan().slots),) * 2),
        "offsets: expected int64 of 2 to E",
    ),
    "plan": (lambda: bridge.dispatch(normal(T, H), tuple(plan())), "plan: expected a DispatchPlan, got tuple"),
    "tokens of x": (lambda: bridge.dispatch(normal(T + 1, H), plan()), r"x: expected .* \[5, H\], got float32\[6, 32\]"),
    "weights": (lambda: bridge.combine(normal(M, H), plan(), normal(T, 3)), r"weights: expected .* \[5, 4\], got float32\[5, 3\]"),
    "weights kind": (lambda: bridge.combine(normal(M, H), plan(), 1.0), "weights: expected a torch.Tensor, got float"),
    "router": (lambda: bridge.router_logits(normal(T, H), normal(16, H + 1)), r"weight: expected .* \[E, 32\]"),
    "strided weights": (
        lambda: bridge.experts(normal(M, H), normal(E, H, 4 * I)[..., ::2], normal(E, I, H), plan().group_sizes),
        "gate_up: expected a contiguous tensor or the transpose of one",
    ),
    "odd gate and up": (
        lambda: bridge.moe(
            normal(T, H), bridge.MoEParams(normal(16, H), normal(E, H, 2 * I - 1), normal(E, I, H)), CONFIG
        ),
        "params.gate_up: expected an even last axis",
    ),
    "activation": (
        lambda: bridge.experts(normal(M, H), *weights(False), plan().group_sizes, activation="relu"),
        "activation: expected one of",
    ),
    "out": (lambda: bridge.dispatch(normal(T, H), plan(), out=normal(M, H + 1)), r"out: expected float32 \[20, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' own checks, which CUDA tensors meet: the same words as jaxmoe's."""
    from bridge import path

    call, message = WRONG[name]
    planned = plan()
    monkeypatch.setitem(globals(), "plan", lambda: planned)
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "how", ["no_grad", "nothing asks for one", "gradients", "inference", "tangents", "torch.func", "a subclass"]
)
def test_what_is_run_past_autograd(how: str) -> None:
    """Where nobody asks for a gradient, in one form or another; results are the same either way."""
    x, router = normal(T, H, grad=True), torch.nn.Parameter(normal(16, H, seed=1))
    past: list[bool] = []

    def op(*args: torch.Tensor) -> torch.Tensor:
        key = torch._C.DispatchKey.AutogradFunctionality
        past.append(torch._C._dispatch_tls_is_dispatch_key_excluded(key))
        # torch.func has no rule for such ops
        return args[0] @ args[1].T if how == "torch.func" else OPS.router_logits(*args)

    op._schema = OPS.router_logits.default._schema  # type: ignore[attr-defined]
    run, plain = functools.partial(path.at_once, op), (x.detach(), router.detach())
    if how == "no_grad":
        with torch.no_grad():
            got = run(x, router)
    elif how == "inference":
        with torch.inference_mode():
            got = run(x, router)
    elif how == "nothing asks for one":
        got = run(*plain)
    elif how == "gradients":
        got = run(x, plain[1])
        assert got.grad_fn is not None
    elif how == "tangents":
        with torch.autograd.forward_ad.dual_level():
            got = run(*plain)
    elif how == "torch.func":
        got = torch.func.vmap(lambda row: run(row[None], plain[1])[0])(plain[0])
    else:
        mine = plain[0].as_subclass(type("Mine", (torch.Tensor,), {}))
        got = run(mine, plain[1]).as_subclass(torch.Tensor)
    assert past == [how in ("no_grad", "inference", "nothing asks for one")]
    torch.testing.assert_close(got.detach(), OPS.router_logits(*plain))


def test_fake_tensors() -> None:
    """Shapes and dtypes without values; nothing is run."""
    with FakeTensorMode():
        x = torch.empty(7, H, dtype=torch.bfloat16)
        routing = bridge.route(bridge.router_logits(x, torch.empty(16, H)), config=CONFIG)
        plan = bridge.plan_dispatch(routing.experts, E, align=8)
        rows = bridge.dispatch(x, plan)
        y = bridge.combine(rows, plan, routing.weights)
        cut = [bridge.plan_dispatch(routing.experts, E, align=8, max_rows=most).slots.shape for most in (64, 160)]
        with pytest.raises(ValueError, match="max_rows: expected a positive multiple of align=8, got 12"):
            bridge.plan_dispatch(routing.experts, E, align=8, max_rows=12)
    assert cut == [(64,), (152,)]
    assert (routing.weights.shape, routing.load.shape) == ((7, 4), (E,))
    assert rows.shape == (152, H), "28 pairs and 17 * 7 for the alignment, up to a multiple of 8"
    assert (y.shape, y.dtype) == ((7, H), torch.bfloat16)


def test_native_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="implementation: 'native' needs tensors on a GPU, got one on cpu"):
        bridge.route(normal(T, 16), config=CONFIG, implementation="native")
