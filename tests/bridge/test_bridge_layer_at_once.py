"""The layer where nobody asks for a gradient: on a GPU its arguments are checked once, and no op lies between launches.

Here the dispatcher has CPU tensors go where it sends those on a GPU, and launches only note that they were asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from bridge import checks_of_layer, path
from bridge import layer as public
from bridge.ops import layer as ops

CONFIG = bridge.RoutingConfig(num_experts=4, top_k=2)
T, H, I, E = 3, 8, 6, 4
BF16, INT32 = torch.bfloat16, torch.int32
NAMES = ("fused_experts", "fused_experts_out", "moe", "moe_out")


class Seen(NamedTuple):
    """What became of the calls."""

    launches: list[str]
    checks: list[str]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """From here on CPU tensors are as good as on a GPU."""
    found = Seen([], [])
    noted = lambda name, result=None: lambda *args: found.launches.append(name) or result

    def checked(name: str) -> Callable[..., None]:
        check = getattr(checks_of_layer, name)
        return lambda *args: found.checks.append(name) or check(*args)

    for module in (public, ops):
        for name in ("check_experts", "check_layer"):
            monkeypatch.setattr(module, name, checked(name))
    monkeypatch.setattr(path, "runs_natively", lambda tensor: not tensor.is_meta)
    monkeypatch.setattr(ops.moves, "plan_dispatch", noted("plan"))
    monkeypatch.setattr(ops.behind, "run", lambda *args: found.launches.append("experts") or args[3].data.fill_(7))
    monkeypatch.setattr(ops.native, "router_logits", noted("router", torch.zeros(T, E)))
    monkeypatch.setattr(ops.native, "route", noted("route"))
    with torch.library._scoped_library("jaxmoe", "IMPL") as library:
        for name in NAMES:
            library.impl(name, getattr(ops, f"_{name}"), "AutogradCPU")
            library.impl(name, getattr(ops, f"_{name}_native"), "CPU")
        forget_dispatch()
        yield found
    forget_dispatch()


def forget_dispatch() -> None:
    """torch (2.13) remembers where it sent a call when what was registered there is gone: tests behind these fail."""
    for name in NAMES:
        getattr(torch.ops.jaxmoe, name).default._dispatch_cache.clear()


def given(**others: Any) -> dict[str, Any]:
    """What both functions take."""
    zeros = lambda *shape, dtype=BF16: torch.zeros(shape, dtype=dtype)
    tensors = {"x": zeros(T, H), "experts": zeros(T, 2, dtype=INT32), "weights": zeros(T, 2, dtype=torch.float32)}
    return {**tensors, "gate_up": zeros(E, H, 2 * I), "down": zeros(E, I, H), "router": zeros(E, H), **others}


def fused(kept: dict[str, Any]) -> Any:
    return bridge.fused_experts(**{name: value for name, value in kept.items() if name not in ("router", "bias")})


def whole(kept: dict[str, Any]) -> Any:
    of_params = ("router", "gate_up", "down", "bias")
    params = bridge.MoEParams(**{name: value for name, value in kept.items() if name in of_params})
    others = {name: value for name, value in kept.items() if name not in (*of_params, "experts", "weights", "config")}
    return bridge.moe(params=params, config=kept.get("config", CONFIG), **others)[0]


BOTH = pytest.mark.parametrize("call", [fused, whole], ids=["fused_experts", "moe"])
LAUNCHES = {fused: ["plan", "experts"], whole: ["router", "route", "plan", "experts"]}


@BOTH
@pytest.mark.parametrize("out", [False, True], ids=["", "out"])
def test_once(call: Any, out: bool, seen: Seen) -> None:
    """One check, then the launches; twice the same."""
    kept = given(expert_map=torch.arange(E, dtype=INT32), max_rows=3)
    if out:
        kept["out"] = torch.zeros(T, H, dtype=BF16)
    for number in (1, 2):
        version = kept["out"]._version if out else 0
        y = call(kept)
        assert seen.launches == LAUNCHES[call] * number
        assert seen.checks == ["check_experts" if call is fused else "check_layer"] * number
        assert (y == 7).all()
        if out:
            assert y is kept["out"]
            assert y._version > version, "autograd sees that it was written to"


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_without_gradients(call: Any, mode: Any, seen: Seen) -> None:
    """As engines have them; the bias is never asked for one."""
    kept = given()
    kept |= {name: torch.nn.Parameter(kept[name]) for name in ("router", "gate_up", "down")}
    with mode():
        assert not call(kept).requires_grad
    assert seen.launches == LAUNCHES[call]
    bias = torch.nn.Parameter(torch.zeros(E))
    assert not whole(given(bias=bias)).requires_grad
    assert seen.launches == LAUNCHES[call] + LAUNCHES[whole]


def in_one_place(numbers: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(So many int32, or of that shape; an out), of the same memory."""
    memory = torch.zeros(T * H, dtype=BF16)
    return memory.view(INT32)[:numbers].view(shape or (numbers,)), memory.view(T, H)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)[..., ::2]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "x of another width": (lambda k: {"x": k["x"][:, 1:]}, r"^params.router: .*\[4, 7\]|^gate_up: .*\[E, 7, 2 \* I\]"),
    "x of another dtype": (lambda k: {"x": k["x"].float()}, r"gate_up: expected float32 \[.*got bfloat16\["),
    "x of int": (lambda k: {"x": k["x"].int()}, r"^x: expected bfloat16 or float16 or float32 \[T, H\], got int32\["),
    "x of three axes": (lambda k: {"x": k["x"][None]}, r"^x: expected .*\[T, H\], got bfloat16\[1, 3, 8\]"),
    "x whose columns lie apart": (lambda k: {"x": strided(k["x"])}, r"^x: expected rows that lie apart"),
    "weights of experts that lie apart": (lambda k: {"gate_up": strided(k["gate_up"])}, r"gate_up: expected a contig"),
    "down that lies apart": (
        lambda k: {"down": strided(k["down"])},
        r"down: expected a contiguous tensor or the trans",
    ),
    "down of another size": (lambda k: {"down": k["down"][:, 1:]}, r"down: expected bfloat16 \[4, 6, 8\]"),
    "down of another dtype": (lambda k: {"down": k["down"].float()}, r"down: expected bfloat16 .*got float32"),
    "down of another device": (lambda k: {"down": k["down"].to("meta")}, r"down: expected the device of the first"),
    "an odd gate and up": (lambda k: {"gate_up": k["gate_up"][..., 1:]}, r"gate_up: expected an even last axis"),
    "no experts": (lambda k: {"gate_up": k["gate_up"][:0]}, r"gate_up: expected "),
    "no tensor": (lambda k: {"down": 3}, r"down: expected a torch.Tensor .*got int"),
    "an activation": (lambda k: {"activation": "relu"}, r"^activation: expected one of .*got 'relu'"),
    "no activation": (lambda k: {"activation": ["silu"]}, r"^activation: expected one of .*got \['silu'\]"),
    "a map that is no tensor": (
        lambda k: {"expert_map": [0, 1, 2, 3]},
        r"^expert_map: expected a torch.Tensor .*got list",
    ),
    "out that is no tensor": (lambda k: {"out": 3}, r"^out: expected a torch.Tensor .*got int"),
    "out within the map": (
        lambda k: dict(zip(("expert_map", "out"), in_one_place(E), strict=True)),
        r"^out: .* overlaps expert_map$",
    ),
    "room for none": (lambda k: {"max_rows": 0}, r"^max_rows: expected a positive int, got 0"),
    "a map of another dtype": (lambda k: {"expert_map": torch.arange(E)}, r"^expert_map: expected int32 .*got int64"),
    "a map that lies apart": (
        lambda k: {"expert_map": torch.zeros(2 * E, dtype=INT32)[::2]},
        r"^expert_map: expected a contiguous",
    ),
    "out of another dtype": (lambda k: {"out": torch.zeros(T, H)}, r"^out: expected bfloat16 \[3, 8\], got float32"),
    "out that lies apart": (lambda k: {"out": strided(k["x"])}, r"^out: expected a contiguous tensor"),
    "out in the place of x": (lambda k: {"out": k["x"]}, r"^out: expected memory of its own.* overlaps x$"),
    "out within down": (lambda k: {"out": k["down"][1, :T]}, r"^out: .* overlaps down$"),
    "out that asks for a gradient": (
        lambda k: {"out": torch.zeros(T, H, dtype=BF16, requires_grad=True)},
        r"^out: expected a tensor without requires_grad",
    ),
}
OF_FUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "ids of another dtype": (
        lambda k: {"experts": k["experts"].long()},
        r"^experts: expected int32 \[3, S\], got int64",
    ),
    "ids of other tokens": (
        lambda k: {"experts": k["experts"][1:]},
        r"^experts: expected int32 \[3, S\], got int32\[2",
    ),
    "ids that lie apart": (lambda k: {"experts": strided(k["experts"])}, r"^experts: expected a contiguous"),
    "no slots": (
        lambda k: {"experts": k["experts"][:, :0].contiguous(), "weights": k["weights"][:, :0].contiguous()},
        r"^experts: expected at least one element along axis 1",
    ),
    "weights of other tokens": (
        lambda k: {"weights": k["weights"][1:]},
        r"^weights: expected .*\[3, 2\], got float32\[2",
    ),
    "weights that lie apart": (lambda k: {"weights": strided(k["weights"])}, r"^weights: expected a contiguous"),
    "an empty map": (lambda k: {"expert_map": torch.zeros(0, dtype=INT32)}, r"^expert_map: expected at least one"),
    "out in the place of weights": (
        lambda k: (
            {"weights": (both := torch.zeros(T, H, dtype=BF16))[:, :2].contiguous(), "out": both}
            | {"weights": both.view(-1)[: 2 * T].view(T, 2)}
        ),
        r"^out: .* overlaps weights$",
    ),
}
OF_MOE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no config": (lambda k: {"config": CONFIG.json}, r"^config: expected a RoutingConfig, got str"),
    "a router for others": (lambda k: {"router": k["router"][1:]}, r"^params.router: expected .*\[4, 8\]"),
    "a router that lies apart": (lambda k: {"router": strided(k["router"])}, r"^router: expected a contiguous"),
    "a bias for others": (lambda k: {"bias": torch.zeros(E + 1)}, r"^params.bias: expected .*\[4\]"),
    "no tensor for a bias": (lambda k: {"bias": 0.5}, r"^params.bias: expected a torch.Tensor .*got float"),
    "a map of other ids": (
        lambda k: {"expert_map": torch.zeros(E + 1, dtype=INT32)},
        r"^expert_map: expected int32 \[4\]",
    ),
    "experts of other ids": (lambda k: {"gate_up": k["gate_up"][1:]}, r"^params.gate_up: expected bfloat16 \[4, 8, "),
    "too many tokens": (lambda k: {"num_valid_tokens": T + 1}, r"^num_valid_tokens: expected 0 to T=3, got 4"),
    "too many tokens of three axes": (
        lambda k: {"x": k["x"][None], "num_valid_tokens": 9},
        r"^x: expected .*\[T, H\], got bfloat16\[1, 3, 8\]",
    ),
    "a number of another dtype": (
        lambda k: {"num_valid_tokens": torch.tensor(1)},
        r"^num_valid_tokens: expected int32 \[\], got int64",
    ),
    "out in the place of the bias": (
        lambda k: {"out": (both := torch.zeros(T, H, dtype=BF16)), "bias": both[0, :E]},
        r"^out: .* overlaps bias$",
    ),
    "out in the place of the number": (
        lambda k: {"out": (both := torch.zeros(T, H, dtype=BF16)), "num_valid_tokens": both.view(INT32)[0, 0]},
        r"^out: .* overlaps num_valid_tokens$",
    ),
    "no width": (
        lambda k: {
            name: k[name][tuple(slice(0) if size == H else slice(None) for size in k[name].shape)]
            for name in ("x", "router", "gate_up", "down")
        },
        r"^router: expected at least one element along axis 1",
    ),
    "out in the place of the router": (
        lambda k: {"out": k["router"][:T], "router": k["router"]},
        r"^out: .* overlaps router$",
    ),
}
CALLS = [(call, what, *wrong) for call in (fused, whole) for what, wrong in WRONG.items()]
CALLS += [(fused, what, *wrong) for what, wrong in OF_FUSED.items()]
CALLS += [(whole, what, *wrong) for what, wrong in OF_MOE.items()]


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [pytest.param(call, *wrong, id=f"{call.__name__}, {what}") for call, what, *wrong in CALLS],
)
def test_a_wrong_call_after_a_right_one(call: Any, change: Any, message: str, seen: Seen) -> None:
    """It is refused, nothing is launched, and nothing written."""
    kept = given()
    call(kept)
    wrong = {**kept, **change(kept)}
    outs = {name: value for name, value in wrong.items() if name == "out" and isinstance(value, torch.Tensor)}
    before = {name: (value.clone(), value._version) for name, value in outs.items()}
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(wrong)
    assert seen.launches == LAUNCHES[call]
    for name, (value, version) in before.items():
        assert torch.equal(value, wrong[name])
        assert version == wrong[name]._version


def through_ops(call: Any, kept: dict[str, Any]) -> None:
    """The kernel for a GPU itself, as the dispatcher calls it."""
    kept = {"bias": torch.zeros(E), "num_valid_tokens": torch.tensor(T, dtype=INT32), **kept}
    last = kept["expert_map"], kept.get("max_rows"), "silu"
    experts = kept["gate_up"], kept["down"]
    if call is fused:
        ops._fused_experts_native(kept["x"], kept["experts"], kept["weights"], *experts, *last)
    else:
        of_routing = kept["num_valid_tokens"], None, CONFIG.json
        ops._moe_native(kept["x"], kept["router"], kept["bias"], *experts, *of_routing, *last)


@BOTH
@pytest.mark.parametrize(
    "name", ["experts", "weights", "router", "bias", "num_valid_tokens", "gate_up", "down", "expert_map"]
)
def test_another_device(call: Any, name: str, seen: Seen) -> None:
    """Of one argument alone: it is named, and nothing launched."""
    kept = given(
        expert_map=torch.arange(E, dtype=INT32), bias=torch.zeros(E), num_valid_tokens=torch.tensor(T, dtype=INT32)
    )
    through_ops(call, kept)
    if name in (("router", "bias", "num_valid_tokens") if call is fused else ("experts", "weights")):
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected the device of the first argument, cpu, got meta"):
        through_ops(call, {**kept, name: kept[name].to("meta")})
    assert seen.launches == LAUNCHES[call]


@BOTH
def test_ops_check_the_room(call: Any, seen: Seen) -> None:
    """For those who call an op by its name."""
    with pytest.raises(ValueError, match=r"^max_rows: expected .*, got -8"):
        through_ops(call, given(expert_map=torch.arange(E, dtype=INT32), max_rows=-8))
    assert not seen.launches


@BOTH
def test_all_is_checked_where_torch_does_not_go_below_autograd(
    call: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does it is private. Above autograd an op is its parts, which do not know how many experts there are."""
    monkeypatch.setattr(path, "_below_autograd", contextlib.nullcontext)
    kept = given()
    kept |= {"gate_up": kept["gate_up"][:2], "down": kept["down"][1:]}
    with pytest.raises(
        ValueError, match=r"down: expected bfloat16 \[2, 6, 8\]|^params.gate_up: expected bfloat16 \[4, 8, "
    ):
        call(kept)
    assert seen.checks == ["check_experts" if call is fused else "check_layer"]
    assert not seen.launches


@BOTH
@pytest.mark.parametrize("x", [3, None, [1.0]], ids=str)
def test_compiled_with_no_tensor(call: Any, x: Any) -> None:
    """What is wrong is said where torch traces, too."""
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"^x: expected a torch.Tensor .*got (int|NoneType|list)"):
        torch.compile(lambda: call(given(x=x)), backend="eager")()


@pytest.fixture
def parts(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a call takes whose parts are those on a CPU, and compute; the launches of no call are asked for."""
    monkeypatch.setattr(ops.native, "route", None)
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))
    stack = {"gate_up": draw(E, H, 2 * I), "down": draw(E, I, H), "router": draw(E, H)}
    ids = torch.tensor([[0, 3], [1, 2], [3, 1]], dtype=INT32)
    yield given(x=draw(T, H), experts=ids, weights=draw(T, 2), **stack)
    assert not seen.launches


class Watching(TorchDispatchMode):
    """Notes jaxmoe's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "jaxmoe":
            self.ops.append(func._schema.name.removeprefix("jaxmoe::"))
        return func(*args, **(kwargs or {}))


BEHIND = ["plan_dispatch", "weighted_experts"]
PARTS = {fused: BEHIND, whole: ["router_logits", "route", *BEHIND]}


@BOTH
def test_a_mode_sees_the_parts(call: Any, parts: dict[str, Any]) -> None:
    """Each is checked by itself, so all is before."""
    with Watching() as mode:
        call(parts)
        assert mode.ops == PARTS[call]
        with pytest.raises(ValueError, match="down: expected float32"):
            call({**parts, "down": parts["down"].half()})
        assert mode.ops == PARTS[call]


def test_where_kernels_do_not_run_all_is_checked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts would say it of what they are given."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    kept = given()
    with pytest.raises(ValueError, match=r"^experts: expected int32 \[3, S\], got int32\[2, 2\]"):
        fused({**kept, "experts": kept["experts"][1:]})
    with pytest.raises(ValueError, match=r"^params.router: expected .*\[4, 8\], got bfloat16\[3, 8\]"):
        whole({**kept, "router": kept["router"][1:]})


@BOTH
def test_gradients_take_the_parts(call: Any, parts: dict[str, Any]) -> None:
    """Above autograd an op is its parts, which have them, on a GPU too."""
    parts["gate_up"].requires_grad_()
    y = call(parts)
    (gradient,) = torch.autograd.grad(y.square().sum(), parts["gate_up"])
    assert gradient.any()
    with pytest.raises(ValueError, match=r"out: expected None where .*gate_up requires grad"):
        call({**parts, "out": torch.empty(T, H)})


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward_ad's own
@BOTH
def test_transforms_take_the_parts(call: Any, parts: dict[str, Any]) -> None:
    x = parts["x"]
    batch = torch.stack([x, 2 * x])
    over = lambda x: call({**parts, "x": x})
    wanted = torch.stack([over(one.clone().requires_grad_()) for one in batch]).detach()
    torch.testing.assert_close(torch.func.vmap(over)(batch), wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="x: expected a tensor without a tangent"):
            over(dual)
    with pytest.raises(ValueError, match=r"x: expected a tensor that torch\.func takes no gradient of"):
        torch.func.grad(lambda x: over(x).sum())(x)


def names_of(parts: dict[str, Any], call: Any) -> list[str]:
    return [name for name in parts if name not in (("router",) if call is fused else ("experts", "weights"))]


@BOTH
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_compiled_it_is_the_parts(call: Any, mode: Any, parts: dict[str, Any]) -> None:
    """Also where nobody asks for gradients: what runs then is what torch traced."""
    names = names_of(parts, call)
    run = lambda *tensors: call(dict(zip(names, tensors, strict=True)))
    tensors = [parts[name] for name in names]
    wanted = run(*(tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors)).detach()
    torch._dynamo.reset()
    with mode():
        torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(*tensors), wanted)


@BOTH
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trained", [False, True])
def test_fake_tensors_take_the_parts(call: Any, mode: Any, trained: bool, parts: dict[str, Any]) -> None:
    """Which say what comes out, without memory."""
    with FakeTensorMode() as fake, mode():
        kept = {name: fake.from_tensor(tensor) for name, tensor in parts.items()}
        kept["gate_up"].requires_grad_(trained)
        y = call(kept)
        assert (y.shape, y.requires_grad) == ((T, H), trained and mode is contextlib.nullcontext)
        with pytest.raises(ValueError, match="down: expected float32"):
            call({**kept, "down": kept["down"].half()})


@BOTH
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("trained", [False, True])
def test_make_fx_traces_the_parts(call: Any, mode: Any, trained: bool, parts: dict[str, Any]) -> None:
    names = names_of(parts, call)
    with mode():
        tensors = [parts[name].clone().requires_grad_(trained and name == "down") for name in names]
        traced = make_fx(lambda *tensors: call(dict(zip(names, tensors, strict=True))))(*tensors)
    called = [str(node.target) for node in traced.graph.nodes if str(node.target).startswith("jaxmoe.")]
    assert called == [f"jaxmoe.{name}.default" for name in PARTS[call]]


@BOTH
def test_where_torch_keeps_it_whole(call: Any, seen: Seen) -> None:
    """In inference mode torch decomposes no op that has a kernel of its own: it is the op that is traced, and run."""
    kept = given()
    names = names_of(kept, call)
    run = lambda *tensors: call(dict(zip(names, tensors, strict=True)))
    tensors = [kept[name] for name in names]
    with torch.inference_mode():
        traced = make_fx(run)(*tensors)
    called = [str(node.target) for node in traced.graph.nodes if str(node.target).startswith("jaxmoe.")]
    assert called == ["jaxmoe.fused_experts.default" if call is fused else "jaxmoe.moe.default"]
    seen.launches.clear()
    with torch.inference_mode():
        assert (traced(*tensors) == 7).all()
    assert seen.launches == LAUNCHES[call]


@BOTH
def test_inference_mode_within_a_compiled_function(call: Any, parts: dict[str, Any]) -> None:
    """There, too; what comes out is the same."""
    names = names_of(parts, call)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return call(dict(zip(names, tensors, strict=True)))

    tensors = [parts[name] for name in names]
    wanted = call({**parts, "x": parts["x"].clone().requires_grad_()}).detach()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(*tensors), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_where_ops_are_registered(name: str) -> None:
    has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(f"jaxmoe::{name}", key)
    assert all(has(key) for key in ("CUDA", "AutogradCUDA", "CompositeImplicitAutograd"))
