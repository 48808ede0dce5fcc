"""The torch ops: schema, fake implementation, torch.compile and what is run past autograd, on CPU tensors."""

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
from tests.bridge.op_inputs import CONFIG, OPS, E, H, I, M, T, leaf, normal, plan, weights


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
            (normal(T, H, grad=True), rows, slots, sizes, normal(T, 4, grad=True), gate_up, down, E, "silu", True),
        ),
        "weighted_experts, transposed": (
            OPS.weighted_experts,
            (normal(T, H, grad=True), rows, slots, sizes, normal(T, 4, grad=True), *transposed, 4 * E, "gelu", True),
        ),
        "weighted_experts, nothing kept": (
            OPS.weighted_experts,
            (normal(T, H), rows, slots, sizes, normal(T, 4), *stack, E, "silu", False),
        ),
        "weighted_experts_out": (
            OPS.weighted_experts_out,
            (normal(T, H), rows, slots, sizes, normal(T, 4), *stack, E, "gelu_tanh", normal(T, H)),
        ),
        **{
            f"weighted_experts_backward{', frozen' * (not trained)}": (
                OPS.weighted_experts_backward,
                (
                    normal(T, H, seed=1),
                    normal(T, H),
                    rows,
                    slots,
                    sizes,
                    normal(T, 4),
                    *stack,
                    kept,
                    E,
                    "gelu",
                    trained,
                ),
            )
            for trained in (True, False)
        },
        "weighted_experts_last_backward": (
            OPS.weighted_experts_last_backward,
            (
                normal(T, H, seed=1),
                normal(T, H),
                rows,
                slots,
                sizes,
                normal(T, 4),
                *stack,
                kept.clone(),
                E,
                "silu",
                True,
            ),
        ),
        "fused_experts": (OPS.fused_experts, (normal(T, H, grad=True), ids, normal(T, 4, grad=True), gate_up, down)),
        "fused_experts, of other ids, with room for few": (
            OPS.fused_experts,
            (normal(T, H, grad=True), ids, normal(T, 4, grad=True), *local, here, 7, "gelu"),
        ),
        "fused_experts_out": (
            OPS.fused_experts_out,
            (normal(T, H), ids, normal(T, 4), *(w.detach() for w in local), here, 7, "silu", normal(T, H)),
        ),
        "moe": (OPS.moe, (normal(T, H, grad=True), router, normal(16), gate_up, down, None, None, CONFIG.json)),
        "moe_out": (
            OPS.moe_out,
            (normal(T, H), normal(16, H), normal(16), *stack, None, 3, CONFIG.json, None, None, "silu", normal(T, H)),
        ),
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
        y = bridge.combine(rows, plan, routing.weights, out=torch.empty_like(x))
        held, how = torch.full((2 * len(x), H), 7.0), {"activation": "gelu"}  # in a part of what is there already
        bridge.fused_experts(x, routing.experts, routing.weights, *stack, out=held[len(x) :], **how)
        whole, chosen = bridge.moe(x, bridge.MoEParams(router, *stack, bias), CONFIG, out=torch.empty_like(x), **how)
        return y, out.experts, out.weights, held, whole, *chosen


@pytest.mark.parametrize("function", [layer, whole, in_place])
def test_torch_compile(function: Callable[..., Any]) -> None:
    """One graph for every number of tokens, the same results and gradients as without."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(
        "aot_eager"
    )  # inductor, which takes long, on the GPU: test_native_launches_gpu.py
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
