"""Wrong arguments: a ValueError that names the argument, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bridge
from bridge import path
from tests.bridge.calls import CONFIG, WITH_OUT, arguments, leaves, numbers, options, tensors

CPU = torch.device("cpu")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(name: str, **changed: Any) -> Any:
    """A call of the function as it should be, but for the changed arguments."""
    return getattr(bridge, name)(**{**tensors(arguments(name), CPU), **options(name), **changed})


def plan(**changed: Any) -> bridge.DispatchPlan:
    return tensors(arguments("dispatch")["plan"], CPU)._replace(**changed)


def params(**changed: Any) -> bridge.MoEParams:
    return tensors(arguments("moe")["params"], CPU)._replace(**changed)


def views(**changed: Any) -> bridge.MoEParams:
    """gate_up as Hugging Face keeps it."""
    return params(gate_up=params().gate_up.mT.contiguous().mT)._replace(**changed)


WRONG = {
    "logits shape": (
        "route",
        lambda: {"logits": torch.zeros(5, 7)},
        r"logits: expected .*\[T, 8\], got float32\[5, 7\]",
    ),
    "logits rank": ("route", lambda: {"logits": torch.zeros(8)}, r"logits: expected .*\[T, 8\], got float32\[8\]"),
    "logits rank, counted": (
        "route",
        lambda: {"logits": torch.zeros(()), "num_valid_tokens": 1},
        "logits: .* got 0 axes",
    ),
    "logits dtype": ("route", lambda: {"logits": ints(1, 2).expand(8, 2).T}, "logits: expected rows that lie apart"),
    "logits int": ("route", lambda: {"logits": torch.zeros(5, 8, dtype=torch.int32)}, "logits: expected bfloat16 or"),
    "logits float64": (
        "route",
        lambda: {"logits": torch.zeros(5, 8).double()},
        "logits: .* got float64; nothing is cast",
    ),
    "logits missing": ("route", lambda: {"logits": None}, "logits: expected an array .* got NoneType"),
    "nothing at all": ("route", lambda: {"logits": None, "bias": None}, "logits: expected an array .* got NoneType"),
    "logits numpy": ("route", lambda: {"logits": numbers(5, 8)}, "logits: expected a torch.Tensor, got ndarray"),
    "logits scalar": ("route", lambda: {"logits": np.int32(3)}, "logits: expected a torch.Tensor, got int32"),
    "logits device": (
        "route",
        lambda: {"logits": torch.zeros(5, 8, device="meta")},
        "bias: expected the device of the first argument, meta, got cpu",
    ),
    "logits columns apart": ("route", lambda: {"logits": torch.zeros(5, 16)[:, ::2]}, "logits: expected rows that lie"),
    "logits broadcast": ("route", lambda: {"logits": torch.zeros(8).expand(5, 8)}, r"logits: .* got strides \(0, 1\)"),
    "logits overlapping rows": (
        "route",
        lambda: {"logits": torch.zeros(64).as_strided((5, 8), (4, 1))},
        r"logits: .* got strides \(4, 1\) for \[5, 8\]; pass logits.contiguous\(\)",
    ),
    "logits unaligned": (
        "route",
        lambda: {"logits": torch.zeros(41)[1:].view(5, 8)},
        "logits: expected an address .* 64",
    ),
    "logits rows that no storage holds": (
        "route",
        lambda: {"logits": torch.zeros(4 * 9 + 8).as_strided((5, 8), (9, 1))},
        r"logits: expected columns of rows that lie in the storage .* strides \(9, 1\)",
    ),
    "logits between elements": (
        "route",
        lambda: {"logits": torch.frombuffer(bytearray(321), dtype=torch.float32, offset=1).view(5, 16)[:, :8]},
        r"logits: expected columns of rows that lie in the storage .* pass logits.contiguous\(\)",
    ),
    "bias shape": ("route", lambda: {"bias": torch.zeros(9)}, r"bias: expected .*\[8\], got float32\[9\]"),
    "bias unaligned": (
        "route",
        lambda: {"bias": torch.zeros(9)[1:]},
        r"bias: .* 64 bytes, got .*; pass bias.clone\(\)",
    ),
    "config": ("route", lambda: {"config": {"num_experts": 8}}, "config: expected a RoutingConfig, got dict"),
    "too many valid": ("route", lambda: {"num_valid_tokens": 6}, "num_valid_tokens: expected 0 to T=5, got 6"),
    "valid int64": (
        "route",
        lambda: {"num_valid_tokens": torch.tensor(3)},
        "num_valid_tokens: .* got int64; nothing is",
    ),
    "too many valid, numpy": (
        "route",
        lambda: {"num_valid_tokens": np.int32(99)},
        "num_valid_tokens: expected 0 to T=5, got 99",
    ),
    "fewer than none valid, numpy": (
        "route",
        lambda: {"num_valid_tokens": np.int64(-1)},
        "num_valid_tokens: expected 0 to T=5, got -1",
    ),
    "valid float": (
        "route",
        lambda: {"num_valid_tokens": 2.0},
        "num_valid_tokens: expected an int or an int32 tensor, got float",
    ),
    "valid rank": (
        "route",
        lambda: {"num_valid_tokens": ints(3)},
        r"num_valid_tokens: expected int32 \[\], got int32\[1\]",
    ),
    "valid bool": (
        "route",
        lambda: {"num_valid_tokens": True},
        "num_valid_tokens: expected an int or an int32 tensor, got bool",
    ),
    "valid numpy bool": (
        "route",
        lambda: {"num_valid_tokens": np.bool_(True)},
        "num_valid_tokens: expected an int or an int32 tensor, got bool",
    ),
    "implementation": (
        "route",
        lambda: {"implementation": "cuda"},
        "implementation: expected None or one of .* got 'cuda'",
    ),
    "pallas on a CPU": (
        "route",
        lambda: {"implementation": "pallas"},
        "implementation: 'pallas' needs arrays on a GPU",
    ),
    "weight shape": ("router_logits", lambda: {"weight": torch.zeros(8, 31)}, r"weight: expected .*\[E, 32\]"),
    "weight strided": (
        "router_logits",
        lambda: {"weight": torch.zeros(8, 64)[:, :32]},
        "weight: expected a contiguous",
    ),
    "experts int64": (
        "plan_dispatch",
        lambda: {"experts": torch.zeros(5, 3).long()},
        "experts: .* got int64; nothing is",
    ),
    "num_experts": ("plan_dispatch", lambda: {"num_experts": 0}, "num_experts: expected an int from 1 to .*, got 0"),
    "max_rows": ("plan_dispatch", lambda: {"max_rows": 6}, "max_rows: expected a positive multiple of align=4, got 6"),
    "max_rows bool": (
        "plan_dispatch",
        lambda: {"align": 1, "max_rows": True},
        "max_rows: expected a positive int, got True",
    ),
    "plan type": ("dispatch", lambda: {"plan": ints(1)}, "plan: expected a DispatchPlan, got Tensor"),
    "plan rows": (
        "dispatch",
        lambda: {"plan": plan(rows=ints(1))},
        r"plan.rows: expected int32 \[T, S\], got int32\[1\]",
    ),
    "plan slots": (
        "combine",
        lambda: {"plan": plan(slots=torch.zeros(15).long())},
        "plan.slots: .* got int64; nothing is",
    ),
    "x tokens": ("dispatch", lambda: {"x": torch.zeros(4, 32)}, r"x: expected .*\[5, H\], got float32\[4, 32\]"),
    "weights shape": ("combine", lambda: {"weights": torch.zeros(5, 2)}, r"weights: expected .*\[5, 3\]"),
    "rows dtype": (
        "experts",
        lambda: {"rows": torch.zeros(15, 32).bfloat16()},
        "gate_up: expected bfloat16 .* got float32",
    ),
    "activation": ("experts", lambda: {"activation": "relu"}, "activation: expected one of .*, got 'relu'"),
    "no name of an activation": (
        "experts",
        lambda: {"activation": ["silu"]},
        r"activation: expected one of .*, got \['silu'\]",
    ),
    # More of it in test_bridge_fused_experts.py: what is said on every way.
    "ids int64": ("fused_experts", lambda: {"experts": torch.zeros(5, 3).long()}, "experts: .* got int64; nothing is"),
    "tokens apart": (
        "fused_experts",
        lambda: {"x": torch.zeros(5, 64)[:, :32]},
        "x: expected a contiguous tensor, got",
    ),
    "implementation of fused_experts": (
        "fused_experts",
        lambda: {"implementation": "cuda"},
        "implementation: expected None or one of .* got 'cuda'",
    ),
    "views, gate_up unaligned": (
        "fused_experts",
        lambda: {"gate_up": torch.zeros(6 * 32 * 32 + 1)[1:].view(6, 32, 32).mT},
        "gate_up: expected an address that is a multiple of 64 bytes",
    ),
    "views, down of other strides": (
        "fused_experts",
        lambda: {"gate_up": torch.zeros(6, 32, 32).mT, "down": torch.zeros(6, 16, 64)[:, :, ::2]},
        "down: expected a contiguous tensor or the transpose of one",
    ),
    "views, weights": (
        "fused_experts",
        lambda: {"gate_up": torch.zeros(6, 32, 32).mT, "weights": None},
        r"weights: expected a torch.Tensor .* \[5, 3\], got NoneType",
    ),
    "too many valid in a layer, numpy": (
        "moe",
        lambda: {"num_valid_tokens": np.int32(99)},
        "num_valid_tokens: expected 0 to T=5, got 99",
    ),
    "views, rows": (
        "moe",
        lambda: {"params": views(), "x": torch.zeros(5, 31)},
        r"params.router: expected .*\[8, 31\], got float32\[8, 32\]",
    ),
    "views, params.down": (
        "moe",
        lambda: {"params": views(down=torch.zeros(9, 32, 15).mT)},
        r"params.down: expected .*\[9, 16, 32\], got float32\[9, 15, 32\]",
    ),
    "views, params.down of other strides": (
        "moe",
        lambda: {"params": views(down=torch.zeros(9, 16, 64)[:, :, ::2])},
        "params.down: expected a contiguous tensor or the transpose of one",
    ),
    "views, params.gate_up unaligned": (
        "moe",
        lambda: {"params": views(gate_up=torch.zeros(9 * 32 * 32 + 1)[1:].view(9, 32, 32).mT)},
        "params.gate_up: expected an address that is a multiple of 64 bytes",
    ),
    "views, config": (
        "moe",
        lambda: {"params": views(), "config": {}},
        "config: expected a RoutingConfig, got dict",
    ),
    "params type": ("moe", lambda: {"params": {}}, "params: expected MoEParams, got dict"),
    "params.down": (
        "moe",
        lambda: {"params": params(down=torch.zeros(9, 15, 32))},
        r"params.down: expected .*\[9, 16, 32\]",
    ),
    "params.gate_up": (
        "moe",
        lambda: {"params": params(gate_up=torch.zeros(9, 32, 31))},
        "params.gate_up: expected an even last axis, gate and up side by side, got 31",
    ),
    "params.router": (
        "moe",
        lambda: {"params": params(router=[1.0])},
        "params.router.0: expected a torch.Tensor, got float",
    ),
    "load": ("update_bias", lambda: {"load": ints(1)}, "load: expected at least the 8 routed experts of bias, got 1"),
    "rate": ("update_bias", lambda: {"rate": torch.tensor(0.1)}, "rate: expected a number, got Tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str) -> None:
    """Each is named, with what was expected and what came."""
    name, changed, message = WRONG[case]
    with pytest.raises(ValueError, match="^" + message):
        call(name, **changed())


@pytest.mark.parametrize("case", [case for case in WRONG if WRONG[case][0] == "route" and "logits" not in case])
def test_wrong_argument_with_gradients(case: str) -> None:
    """The path with a derivative refuses what the path without refuses."""
    name, changed, message = WRONG[case]
    if case == "config":
        message = "config: expected a hashable value, got dict"
    with pytest.raises(ValueError, match="^" + message):
        call(name, **{"logits": torch.zeros(5, 8, requires_grad=True), **changed()})


def test_devices_differ(device: torch.device) -> None:
    """Both tensors are fine by themselves."""
    if device.type == "cpu":
        pytest.skip("needs a GPU for a second device")
    with pytest.raises(ValueError, match="logits: expected the device of bias, cpu, got cuda:0"):
        bridge.route(torch.zeros(5, 8, device=device), torch.zeros(8), config=CONFIG)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, -77, dtype=dtype)


def good_out(name: str) -> Any:
    if name == "route":
        return (poisoned(5, 3), poisoned(5, 3, dtype=torch.int32), poisoned(9, dtype=torch.int32))
    return poisoned(15 if name == "dispatch" else 5, 32)


WRONG_OUT = {
    "shape": (lambda t: t.new_full((*t.shape[:-1], 31), -77), r"expected float32 \[.*\], got float32\[\d+, 31\]"),
    "rank": (lambda t: t.new_full((3,), -77), r"expected float32 \[.*\], got float32\[3\]"),
    "dtype": (lambda t: t.to(torch.bfloat16), "expected float32 .* got bfloat16"),
    "float64": (lambda t: t.double(), "expected a dtype that JAX keeps as it is, got float64"),
    "strides": (
        lambda t: t.T.contiguous().T,
        r"expected a contiguous tensor from a multiple of 64 bytes on, got strides",
    ),
    "address": (
        lambda t: t.new_full((t.numel() + 1,), -77)[1:].view_as(t),
        "expected a contiguous tensor from a multiple",
    ),
    "gradient": (lambda t: t.requires_grad_(), "expected a tensor without requires_grad"),
    "device": (lambda t: t.to("meta"), "expected a dense tensor on a CPU or GPU"),
    "type": (lambda t: t.tolist(), "expected a torch.Tensor, got float"),
}


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("kind", WRONG_OUT)
def test_wrong_out(name: str, kind: str) -> None:
    """Refused, and neither it nor its neighbours are written to."""
    spoil, message = WRONG_OUT[kind]
    out = good_out(name)
    spoilt = spoil(out[0] if name == "route" else out)
    with pytest.raises(ValueError, match=rf"^out(\.weights)?(\.0\.0|\.0)?: {message}"):
        call(name, out=(spoilt, *out[1:]) if name == "route" else spoilt)
    for tensor in leaves((out, spoilt)):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            assert bool((tensor == -77).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:2], r"out: expected a Routing or tuple \(weights, experts, load\), got a tuple of 2"),
        (list, r"out: expected a Routing or tuple .*, got list"),
        (
            lambda out: (*out[:2], None),
            "out.load: expected a torch.Tensor, or None with return_load=False, got NoneType",
        ),
        (lambda out: (None, *out[1:]), "out.weights: expected a torch.Tensor, got NoneType"),
        (lambda out: torch.empty(3), r"out: expected a Routing or tuple \(weights, experts, load\), got Tensor"),
        (lambda out: (out[0], out[1].float(), out[2]), r"out.experts: expected int32 .* got float32"),
        (
            lambda out: (out[0], out[0].view(torch.int32), out[2]),
            "out.experts: expected memory of its own, .* out.weights",
        ),
    ],
    ids=["two", "list", "no load", "no weights", "a tensor", "dtype", "same memory"],
)
@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
def test_wrong_out_of_route(change: Any, message: str, takes_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three are checked before one is written."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    out = good_out("route")
    with pytest.raises(ValueError, match="^" + message):
        call("route", out=change(out))
    assert all(bool((tensor == -77).all()) for tensor in out)


@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
def test_out_with_a_load_that_is_not_returned(takes_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    out = good_out("route")
    with pytest.raises(ValueError, match=r"^out.load: expected None with return_load=False, got Tensor"):
        call("route", out=out, return_load=False)
    with pytest.raises(ValueError, match=r"^out: expected .* \(weights, experts, None\), got a tuple of 2"):
        call("route", out=out[:2], return_load=False)
    assert all(bool((tensor == -77).all()) for tensor in out)


def test_no_name_of_an_activation_with_gradients() -> None:
    with pytest.raises(ValueError, match=r"^activation: expected a hashable value, got list"):
        call("experts", rows=torch.zeros(15, 32, requires_grad=True), activation=["silu"])


def test_out_overlaps_an_input() -> None:
    """The kernel would read what it has just written."""
    memory = torch.zeros(20 * 32)
    x, out = memory[: 5 * 32].view(5, 32), memory[4 * 32 : 19 * 32].view(15, 32)
    with pytest.raises(ValueError, match="out: expected memory of its own, got a tensor that overlaps x"):
        call("dispatch", x=x, out=out)
    assert not memory.any()
    call("dispatch", x=x, out=memory[5 * 32 :].view(15, 32))  # side by side is fine


@pytest.mark.parametrize("over", ["x", "experts", "weights", "gate_up", "down", "expert_map"])
def test_out_of_fused_experts_overlaps(over: str, way: str) -> None:
    """Nothing is written, on either way."""
    check_overlap("fused_experts", over, way)


@pytest.mark.parametrize(
    "over",
    ["x", *(f"params.{name}" for name in ("router", "bias", "gate_up", "down")), "num_valid_tokens", "expert_map"],
)
def test_out_of_moe_overlaps(over: str, way: str) -> None:
    check_overlap("moe", over, way)


def check_overlap(name: str, over: str, way: str) -> None:
    """`out` begins where one of the tensors that are read begins."""
    given = tensors(arguments(name), CPU)
    if name == "moe":
        given["num_valid_tokens"] = torch.tensor(4, dtype=torch.int32)
        given["expert_map"] = torch.arange(9, dtype=torch.int32)
    first, _, field = over.partition(".")
    old = getattr(given[first], field) if field else given[first]
    memory = torch.zeros(max(5 * 32, old.numel()))
    new = memory.view(old.dtype)[: old.numel()].view(old.shape).copy_(old)
    if field:
        given[first] = given[first]._replace(**{field: new})
    else:
        given[first] = new
    before, out = memory.clone(), memory[: 5 * 32].view(5, 32)
    called = over if way == "dlpack" else over.removeprefix("params.")
    with pytest.raises(ValueError, match=f"^out: expected memory of its own, got a tensor that overlaps {called}$"):
        getattr(bridge, name)(**given, **options(name), out=out)
    assert torch.equal(memory.view(torch.int32), before.view(torch.int32))


def test_out_within_rows_that_lie_apart(way: str) -> None:
    """The ops' way on a CPU makes these dense, which hides nothing."""
    given, memory = tensors(arguments("fused_experts"), CPU), torch.zeros(5, 64)
    memory[:, :32] = given["x"]
    given["x"] = memory[:, :32]
    before = memory.clone()
    message = "memory of its own, got a tensor that overlaps x" if way == "ops" else "x: expected a contiguous tensor"
    with pytest.raises(ValueError, match=message):
        bridge.fused_experts(**given, **options("fused_experts"), out=memory.view(-1)[32:192].view(5, 32))
    assert torch.equal(memory, before)
    if way == "ops":
        x, ids, weights, *stack = (given[name] for name in ("x", "experts", "weights", "gate_up", "down"))
        plan = bridge.plan_dispatch(ids, len(stack[0]))
        with pytest.raises(ValueError, match="memory of its own, got a tensor that overlaps x"):
            torch.ops.jaxmoe.weighted_experts_out(
                x, *plan, weights, *stack, 6, "silu", memory.view(-1)[32:192].view(5, 32)
            )


def test_out_between_columns_is_refused() -> None:
    """A strided input reaches from its first to its last element."""
    memory = torch.zeros(5, 96)
    with pytest.raises(ValueError, match="out: expected memory of its own, got a tensor that overlaps x"):
        call("dispatch", x=memory[:, :32], out=memory.view(15, 32))


@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("route", "logits"), ("dispatch", "x"), ("combine", "weights")),
        *(("fused_experts", "x"), ("fused_experts", "down"), ("moe", "x"), ("moe", "params.router")),
    ],
)
def test_out_where_gradients_are_wanted(
    name: str, argument: str, takes_ops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch itself refuses it: `out` has no history."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    given, out = tensors(arguments(name), CPU), good_out(name)
    first, _, field = argument.partition(".")
    (getattr(given[first], field) if field else given[first]).requires_grad_()
    with pytest.raises(ValueError, match=f"^out: expected None where {argument} requires grad"):
        getattr(bridge, name)(**given, **options(name), out=out)
    assert all(bool((tensor == -77).all()) for tensor in leaves(out))
    with torch.no_grad():
        getattr(bridge, name)(**given, **options(name), out=out)
    assert not any(bool((tensor == -77).any()) for tensor in leaves(out))
