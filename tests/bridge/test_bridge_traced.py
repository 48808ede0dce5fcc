"""Where torch traces or transforms: nothing is lost, nothing is baked in, and what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import bridge
from bridge.compat import vllm
from bridge.ops.layer import weighted
from tests.bridge.calls import FUNCTIONS, WITH_OUT, arguments, filled, leaves, options, tensors

CONFIG = bridge.RoutingConfig(num_experts=8, top_k=2)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, ROUTER = numbers(5, 32), numbers(8, 32, seed=1)
IDS = torch.tensor([[0, 3], [1, 2], [7, 3], [3, 0], [5, 6]], dtype=torch.int32)
PLAN = bridge.plan_dispatch(IDS, 8)
LOCAL = torch.tensor([2, -1, 4, 0, -1, 3, -1, 1], dtype=torch.int32)  # five are here, of 8 pairs


def fused(x: torch.Tensor, weights: torch.Tensor, *stack: torch.Tensor) -> torch.Tensor:
    ids, local = (tensor.to(x.device) for tensor in (IDS, LOCAL))
    return bridge.fused_experts(x, ids, weights, *stack, expert_map=local, max_rows=5)


def differentiable() -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    down, gate_up = numbers(8, 6, 32, seed=2), numbers(8, 32, 12, seed=3)
    raw = bridge.RoutingConfig(num_experts=8, top_k=2, scoring_func="softmax", renormalize=False)
    sizes, rows = PLAN.group_sizes, numbers(10, 32, seed=4)
    params = lambda router, up, down: bridge.MoEParams(router=router, gate_up=up, down=down)
    return {
        "router_logits": (bridge.router_logits, [X, ROUTER]),
        "route": (lambda logits: bridge.route(logits, config=raw).weights, [X[:, :8].contiguous()]),
        "dispatch": (lambda x: bridge.dispatch(x, PLAN), [X]),
        "combine": (lambda rows, weights: bridge.combine(rows, PLAN, weights), [rows, numbers(5, 2)]),
        "grouped_matmul": (lambda rows, weight: bridge.grouped_matmul(rows, weight, sizes), [rows, gate_up]),
        "experts": (lambda *args: bridge.experts(*args, sizes), [rows, gate_up, down]),
        "fused_experts": (fused, [X, numbers(5, 2, seed=5), gate_up[:5], down[:5]]),
        "moe": (lambda x, *args: bridge.moe(x, params(*args), CONFIG)[0], [X, ROUTER, gate_up, down]),
    }


@pytest.mark.parametrize("name", differentiable())
def test_second_derivative_is_refused(name: str, way: str) -> None:
    """Also where no incoming gradient has a graph, but what was saved has: a sum's is a constant."""
    run, inputs = differentiable()[name]
    for reduced in (torch.Tensor.sum, lambda y: y.square().sum()):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        gradients = torch.autograd.grad(reduced(run(*leaves)), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^jaxmoe: expected a first derivative"):
            sum(gradient.square().sum() for gradient in gradients).backward()
        plain = torch.autograd.grad(reduced(run(*leaves)), leaves)
        for gradient, wanted in zip(gradients, plain, strict=True):
            assert torch.equal(gradient, wanted)
            assert not wanted.requires_grad


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same, between other columns."""
    if tensor.shape != (5, 32):
        return tensor
    wide = torch.full((5, 96), torch.nan)
    wide[:, 33:65] = tensor
    return wide[:, 33:65]


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides, in a storage that ends with the last element."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)


PACKED = [elsewhere, unaligned, in_place, torch.clone]


@pytest.mark.parametrize("pack", PACKED, ids=["elsewhere", "unaligned", "the same strides", "dense"])
def test_saved_tensors_may_move(pack: Callable[[torch.Tensor], torch.Tensor], way: str) -> None:
    """As offloading hooks move them: strided inputs come back dense, dense ones at any address."""
    wide, seed = numbers(5, 96, seed=5).requires_grad_(), numbers(5, 8, seed=6)
    stack = [(numbers(8, *sides) / 8).requires_grad_() for sides in ((32, 12), (6, 32))]

    def gradients() -> tuple[torch.Tensor, ...]:
        x, router, weights = wide[:, 16:48], ROUTER.clone().requires_grad_(), numbers(5, 2).requires_grad_()
        y = (
            bridge.combine(bridge.dispatch(x, PLAN), PLAN, weights).sum()
            + (bridge.router_logits(x, router) * seed).sum()
            + bridge.fused_experts(x.contiguous(), IDS, weights, *stack).square().sum()
        )
        routed = bridge.route(wide[:, 8:16], config=CONFIG).weights.square().sum()
        return torch.autograd.grad(y + routed, (wide, router, weights, *stack))

    wanted = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pack(tensor.detach()), lambda tensor: tensor):
        found = gradients()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert b.any()


def test_tensors_without_memory() -> None:
    """A fake one next to real ones, or where an implementation of JAX's is named: no address is made up."""
    with FakeTensorMode() as mode:
        x, router = torch.empty(5, 32), torch.empty(8, 32)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor with memory of its own, got FakeTensor without"):
        bridge.router_logits(X, router)
    with mode, pytest.raises(ValueError, match="with memory of its own"):
        bridge.router_logits(x, router, implementation="xla")
    with pytest.raises(ValueError, match=r"^out: expected a tensor with memory of its own"):
        bridge.dispatch(X, PLAN, out=mode.from_tensor(torch.empty(10, 32)))
    with pytest.raises(ValueError, match=r"^tensor: expected a tensor with memory of its own"):
        bridge.to_jax(x)
    assert bridge.router_logits(x, router).shape == (5, 8), "all fake"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors(name: str) -> None:
    """Shapes and dtypes alone, as of a model that is made before its weights are there."""
    function, given, how = getattr(bridge, name), arguments(name), options(name)
    wanted, found = (function(**tensors(given, torch.device(device)), **how) for device in ("cpu", "meta"))
    for a, b in zip(leaves(found), leaves(wanted), strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    meta = tensors(given, torch.device("meta"))
    if name in WITH_OUT:
        out = filled(name, found)
        again = filled(name, function(**meta, **how, out=out))
        assert all(a is b for a, b in zip(leaves(again), leaves(out), strict=True))
    if name != "update_bias":
        with pytest.raises(ValueError, match=r"expected a dense tensor on a CPU or GPU, got torch.strided on meta"):
            function(**meta, **{**how, "implementation": "xla"})
        with pytest.raises(ValueError, match=r"^implementation: 'native' needs tensors on a GPU, got one on meta"):
            function(**meta, **{**how, "implementation": "native"})


@pytest.mark.parametrize("name", differentiable())
def test_gradients_of_meta_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PLAN", bridge.DispatchPlan(*(tensor.to("meta") for tensor in PLAN)))
    run, inputs = differentiable()[name]
    given = [tensor.to("meta").requires_grad_() for tensor in inputs]
    for gradient, leaf in zip(torch.autograd.grad(run(*given).sum(), given), given, strict=True):
        assert gradient.is_meta
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_nothing_is_baked_in() -> None:
    """What a trace records holds for other inputs."""
    run = lambda x: bridge.router_logits(x, ROUTER) + 0
    for traced in (make_fx(run)(X), torch.jit.trace(run, (X,))):
        torch.testing.assert_close(traced(2 * X), run(2 * X))
    functional = torch.func.functionalize(run)
    torch.testing.assert_close(functional(X), run(X))
    several = numbers(3, 5, 32)
    torch.testing.assert_close(torch.func.vmap(run)(several), torch.stack([run(x) for x in several]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_tangents_are_refused(way: str) -> None:
    """There is no forward-mode derivative, and none is zero."""
    refused = lambda name: pytest.raises(
        ValueError, match=rf"^{name}: expected a tensor without a tangent, got one that"
    )
    with forward_ad.dual_level():
        dual = lambda *shape: forward_ad.make_dual(torch.ones(shape), torch.ones(shape))
        rows, out = bridge.dispatch(X, PLAN), torch.empty(5, 32)
        stack = torch.ones(8, 32, 12), torch.ones(8, 6, 32)
        with refused("weights"):
            bridge.combine(rows, PLAN, dual(5, 2))
        with refused("weights"):
            bridge.combine(rows, PLAN, dual(5, 2), out=out)
        with refused("x"):
            bridge.dispatch(dual(5, 32), PLAN, out=torch.empty(10, 32))
        for routing in (None, bridge.Routing(torch.empty(5, 2), torch.empty(5, 2, dtype=torch.int32), None)):
            with refused("logits"):
                bridge.route(dual(5, 8), config=CONFIG, return_load=False, out=routing)
        with refused("x"):
            weighted(dual(5, 32), PLAN, torch.ones(5, 2), *stack)
        with refused("weights"):
            bridge.fused_experts(X, IDS, dual(5, 2), *stack)
        with refused("permuted_hidden_states"):
            vllm.moe_unpermute(out, dual(10, 32), torch.ones(5, 2), PLAN.rows.flatten())
        assert bridge.combine(rows, PLAN, torch.ones(5, 2)).shape == (5, 32), "nothing with a tangent goes in"
    for name, run in (
        ("x", lambda x: bridge.router_logits(x, ROUTER)),
        ("logits", lambda x: bridge.route(x[:, :8].contiguous(), config=CONFIG).weights),
    ):
        with refused(name):
            torch.func.jvp(run, (X,), (X,))


@pytest.mark.parametrize("name", differentiable())
def test_vmap(name: str) -> None:
    """Also where an item of the batch begins or lies where JAX cannot view it, and with gradients behind."""
    run, inputs = differentiable()[name]
    first, *rest = (tensor[..., :6] if name == "route" else tensor for tensor in inputs)
    config = bridge.RoutingConfig(num_experts=6, top_k=2)
    if name == "route":
        run = lambda logits: bridge.route(logits, config=config).weights
    several = torch.stack([first, 2 * first, -first])
    wanted = torch.stack([run(x.clone(), *rest) for x in several])
    for axis in range(several.ndim):
        lying = several.movedim(0, axis).contiguous().requires_grad_()
        found = torch.func.vmap(lambda x: run(x, *rest), in_dims=axis)(lying)
        torch.testing.assert_close(found, wanted)
        (gradient,) = torch.autograd.grad(found.square().sum(), lying)
        one = several[1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(run(one, *rest).square().sum(), one)
        torch.testing.assert_close(gradient.select(axis, 1), expected)


def test_vmap_of_more() -> None:
    """Batches of batches, of weights that lie transposed, of ids; none at all."""
    vmap = torch.func.vmap
    route = lambda logits: bridge.route(logits, config=bridge.RoutingConfig(num_experts=7, top_k=2)).weights
    logits = numbers(2, 3, 5, 7)
    torch.testing.assert_close(vmap(vmap(route))(logits), route(logits.view(-1, 7)).view(2, 3, 5, 2))
    gate_up, down, rows = numbers(3, 8, 6, 7).mT, numbers(3, 8, 7, 3).mT, numbers(10, 7)
    found = vmap(lambda *stack: bridge.experts(rows, *stack, PLAN.group_sizes))(gate_up, down)
    alone = [bridge.experts(rows, gate_up[i].contiguous(), down[i].contiguous(), PLAN.group_sizes) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(alone))
    several = torch.stack([IDS, IDS.flip(0)])[:, :3].contiguous()
    for rows in (None, 4):
        plans = vmap(lambda ids, rows=rows: tuple(bridge.plan_dispatch(ids, 8, max_rows=rows)))(several)
        for i, ids in enumerate(several):
            wanted = bridge.plan_dispatch(ids.clone(), 8, max_rows=rows)
            assert all(torch.equal(a[i], b) for a, b in zip(plans, wanted, strict=True))
    loads = torch.arange(14, dtype=torch.int32).view(2, 7)
    found = vmap(lambda load: bridge.update_bias(torch.zeros(7), load, rate=0.5))(loads)
    assert torch.equal(found, torch.stack([bridge.update_bias(torch.zeros(7), x.clone(), rate=0.5) for x in loads]))
    with pytest.raises(ValueError, match=r"^vmap: expected at least one element"):
        vmap(route)(numbers(0, 5, 7))


def test_vmap_does_not_mend_what_is_given() -> None:
    """An odd address of a tensor that is not mapped is the caller's own."""
    with pytest.raises(ValueError, match=r"^weight: expected an address"):
        torch.func.vmap(lambda x: bridge.router_logits(x, unaligned(ROUTER)))(numbers(3, 5, 32))


@pytest.mark.parametrize("name", differentiable())
def test_functional_gradients_are_refused(name: str) -> None:
    """torch.func has no gradient of an op that is registered as a library's: in our words, by the argument's name."""
    run, inputs = differentiable()[name]
    names = {"route": ("logits",), "dispatch": ("x",), "combine": ("x", "weights"), "moe": ("x", "router")}
    names["fused_experts"] = ("x", "weights")
    for i, argument in enumerate(names.get(name, ("x" if name == "router_logits" else "rows",))):
        loss = lambda x, i=i: run(*inputs[:i], x, *inputs[i + 1 :]).sum()
        for transformed in (
            torch.func.grad(loss),
            torch.func.jacrev(loss),
            torch.func.grad(lambda x, loss=loss: torch.func.vmap(loss)(torch.stack([x, x])).sum()),
        ):
            with pytest.raises(ValueError, match=rf"^{argument}: expected a tensor that torch.func takes no gradient"):
                transformed(inputs[i])
    constant = torch.func.grad(lambda x: (x * run(*inputs).sum()).sum())(torch.ones(3))
    torch.testing.assert_close(constant, run(*inputs).sum().expand(3))


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(create_graph: bool, way: str) -> None:
    """As a vectorised jacobian asks for them; where its own derivative might be wanted that is refused."""
    x, seeds = X.clone().requires_grad_(), numbers(3, 5, 8)
    y = bridge.router_logits(x, ROUTER)
    ask = lambda: torch.autograd.grad(y, x, seeds, is_grads_batched=True, create_graph=create_graph)[0]
    if way == "dlpack":
        with pytest.raises(ValueError, match=r"^gradient: expected one, got a batch of them"):
            ask()
        with pytest.raises(ValueError, match=r"^gradient: expected one, got a batch of them"):
            torch.autograd.functional.jacobian(lambda x: bridge.router_logits(x, ROUTER), X, vectorize=True)
    elif create_graph:
        with pytest.raises(RuntimeError, match=r"^jaxmoe: expected a first derivative"):
            ask()
    else:
        torch.testing.assert_close(ask(), seeds @ ROUTER)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


def test_compiled_around_a_named_implementation() -> None:
    """The graph breaks there; where it may not, torch says so."""
    run = lambda x: bridge.router_logits(x * 1, ROUTER, implementation="xla") + 1
    torch.testing.assert_close(compiled(run)(X), run(X))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(run, fullgraph=True)(X)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_with_out_and_a_gradient() -> None:
    """Refused as uncompiled, not computed without its graph."""
    x, ids = X.clone().requires_grad_(), PLAN.rows % 4
    config = bridge.RoutingConfig(num_experts=4, top_k=2)
    stack = numbers(4, 32, 12), numbers(4, 6, 32)
    params = bridge.MoEParams(numbers(4, 32), *stack)
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: bridge.dispatch(x * 1, PLAN, out=torch.empty(10, 32)),
        lambda x: bridge.combine(torch.cat([x, x]), PLAN, torch.ones(5, 2), out=torch.empty(5, 32)),
        lambda x: bridge.fused_experts(x * 1, ids, torch.ones(5, 2), *stack, activation="gelu", out=torch.empty(5, 32)),
        lambda x: bridge.moe(x * 1, params, config, out=torch.empty(5, 32))[0],
    ]
    for call in calls:
        for run in (call, compiled(call)):
            with pytest.raises(ValueError, match=r"^out: expected None where (x|rows) requires grad"):
                run(x)
        with torch.no_grad():
            torch.testing.assert_close(compiled(call)(x), call(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_with_an_out_that_asks_for_a_gradient() -> None:
    """What is written over has none: refused as uncompiled."""
    ids, stack = PLAN.rows % 4, (numbers(4, 32, 12), numbers(4, 6, 32))
    config, rows = bridge.RoutingConfig(num_experts=4, top_k=2), torch.cat([X, X])
    params = bridge.MoEParams(numbers(4, 32), *stack)
    logits, chosen = numbers(5, 4), torch.empty(5, 2, dtype=torch.int32)
    calls: list[tuple[Callable[[torch.Tensor], Any], tuple[int, int]]] = [
        (lambda out: bridge.dispatch(X, PLAN, out=out * 1), (10, 32)),
        (lambda out: bridge.combine(rows, PLAN, torch.ones(5, 2), out=out * 1), (5, 32)),
        (lambda out: bridge.fused_experts(X, ids, torch.ones(5, 2), *stack, out=out * 1), (5, 32)),
        (lambda out: bridge.moe(X, params, config, out=out * 1), (5, 32)),
        (
            lambda out: bridge.route(logits, config=config, return_load=False, out=(out * 1, chosen, None)),
            (5, 2),
        ),
    ]
    for call, sizes in calls:
        out = torch.zeros(sizes).requires_grad_()
        for run in (call, compiled(call)):
            with pytest.raises(ValueError, match=r"^out(\.weights|\.0)?: expected a tensor without requires_grad"):
                run(out)


def test_compiled_with_any_gradient() -> None:
    """One at an odd address is not the user's to mend."""
    run, x = compiled(lambda x: bridge.dispatch(x, PLAN), fullgraph=True), X.clone().requires_grad_()
    seed = numbers(10, 32)
    (found,) = torch.autograd.grad(run(x), x, unaligned(seed))
    torch.testing.assert_close(found, torch.autograd.grad(bridge.dispatch(x, PLAN), x, seed)[0])


def test_compiled_around_a_config() -> None:
    """Made of what the call brings: each is a constant of its own graph."""

    def run(logits: torch.Tensor, top_k: int, scale: float) -> torch.Tensor:
        config = bridge.RoutingConfig(num_experts=logits.shape[1], top_k=top_k, routed_scaling_factor=scale)
        return bridge.route(logits, config=config).weights

    for dynamic in (None, True):
        whole = compiled(run, fullgraph=True, dynamic=dynamic)
        for experts, *rest in ((8, 2, 2.5), (16, 2, 2.5), (16, 3, 1.5), (16, 3, 3.5)):
            torch.testing.assert_close(whole(numbers(5, experts), *rest), run(numbers(5, experts), *rest))


@pytest.mark.parametrize("most", [lambda tokens: 8, lambda tokens: 4 * tokens], ids=["a number", "by the tokens"])
def test_compiled_around_a_plan_that_is_cut(most: Callable[[int], int]) -> None:
    """One graph for every number of tokens, whether the plan is cut or not."""

    def run(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plan = bridge.plan_dispatch(ids, 8, align=2, max_rows=most(ids.shape[0]))
        return bridge.dispatch(x, plan), *plan

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 2, 4, 3):
        given = X[:tokens].clone(), IDS[:tokens].clone()  # a view's graph is one of its base's, too
        torch.testing.assert_close(whole(*given), run(*given))
    assert counter.frame_count == 1


def test_compiled_with_a_number_of_tokens_that_data_decides() -> None:
    """As after an exchange between the ranks of expert parallelism."""
    mask = torch.tensor([True, False, True, True, False])
    params = bridge.MoEParams(router=ROUTER, gate_up=numbers(8, 32, 12), down=numbers(8, 6, 32))
    calls: list[Callable[..., torch.Tensor]] = [
        lambda x, ids, mask: bridge.dispatch(x[mask], bridge.plan_dispatch(ids[mask], 8)),
        lambda x, ids, mask: bridge.dispatch(x[mask], bridge.plan_dispatch(ids[mask], 8, max_rows=4)),
        lambda x, ids, mask: bridge.dispatch(x[mask], bridge.plan_dispatch(ids[mask], 8, max_rows=mask.sum().item())),
        lambda x, ids, mask: bridge.moe(x[mask], params, CONFIG)[0],
    ]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for call in calls:
            torch.testing.assert_close(compiled(call, fullgraph=True)(X, IDS, mask), call(X, IDS, mask))
