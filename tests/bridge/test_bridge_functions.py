"""Each function of the bridge: jaxmoe's results bit for bit, in memory that was not copied on the way in or out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
import jaxmoe
from bridge import path
from bridge.compat import vllm
from tests.bridge.calls import (
    CONFIG,
    FUNCTIONS,
    WITH_OUT,
    arguments,
    arrays,
    filled,
    leaves,
    numbers,
    options,
    same,
    tensors,
)


class Spy:
    """A jaxmoe function that notes the addresses of what goes in and comes out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.function = getattr(jaxmoe, name)
        self.going_in: list[int] = []
        self.coming_out: list[int] = []
        monkeypatch.setattr(jaxmoe, name, self)

    def __call__(self, **arguments: Any) -> Any:
        addresses = lambda tree: [a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]
        self.going_in = addresses(arguments)  # before a donated array is gone
        results = self.function(**arguments)
        self.coming_out = addresses(results)
        return results


class Operations(TorchDispatchMode):
    """Notes the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("tokens", [0, 1, 5], ids=lambda n: f"T{n}")
def test_equals_jaxmoe(name: str, tokens: int, device: torch.device) -> None:
    """The bridge adds nothing to the arithmetic; no token and one token are shapes of their own."""
    values = arguments(name, tokens)
    got = leaves(getattr(bridge, name)(**tensors(values, device), **options(name)))
    wanted = leaves(getattr(jaxmoe, name)(**arrays(values), **options(name)))
    for tensor, array in zip(got, wanted, strict=True):
        assert tensor.device == device
        same(tensor, array)


@pytest.mark.parametrize("name", ["route", "router_logits", "plan_dispatch", "dispatch", "combine", "fused_experts"])
def test_implementation_is_passed_on(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice of implementation must reach jaxmoe, and give its results there."""
    values, asked = arguments(name), []
    function = getattr(jaxmoe, name)
    monkeypatch.setattr(jaxmoe, name, lambda **given: asked.append(given["implementation"]) or function(**given))
    implementation = "interpret" if device.type == "cpu" else "pallas"
    got = leaves(getattr(bridge, name)(**tensors(values, device), **options(name, implementation)))
    wanted = leaves(function(**arrays(values), **options(name, implementation)))
    assert asked == [implementation]
    for tensor, array in zip(got, wanted, strict=True):
        same(tensor, array)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_addresses(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero copies: JAX reads torch's buffers, and torch gets JAX's."""
    given = tensors(arguments(name), device)
    spy = Spy(monkeypatch, name)
    results = getattr(bridge, name)(**given, **options(name))
    assert sorted(spy.going_in) == sorted(tensor.data_ptr() for tensor in leaves(given))
    assert spy.coming_out == [tensor.data_ptr() for tensor in leaves(results)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_runs_nothing(name: str, device: torch.device) -> None:
    """No copy, cast or any other work of torch's around a call: it would be a launch each on a GPU."""
    given = tensors(arguments(name), device)
    with torch.no_grad(), Operations() as operations:
        getattr(bridge, name)(**given, **options(name))
    assert set(operations.names) <= {"aten::is_pinned"}, operations.names  # which asks, and moves nothing


def test_routing_at_last_token(device: torch.device) -> None:
    """num_valid_tokens as an int and as a scalar in device memory mean the same as in jaxmoe."""
    logits = numbers(5, 8)
    wanted = jaxmoe.route(arrays(logits), config=CONFIG, num_valid_tokens=3)
    for count in (3, np.int32(3), np.int64(3), np.uint8(3), torch.tensor(3, dtype=torch.int32, device=device)):
        routing = bridge.route(tensors(logits, device), config=CONFIG, num_valid_tokens=count)
        assert isinstance(routing, bridge.Routing)
        for tensor, array in zip(routing, wanted, strict=True):
            same(tensor, array)
    x, params = tensors(numbers(5, 32), device), tensors(arguments("moe")["params"], device)
    for count in (3, np.int64(3)):
        y, routing = bridge.moe(x, params, CONFIG, num_valid_tokens=count)
        assert not y[3:].any()
        assert (routing.experts[3:] == -1).all()


@pytest.mark.parametrize("number", [np.int32(3), np.int64(3), np.uint8(3)], ids=lambda n: type(n).__name__)
def test_numpy_integers_through_the_ops(number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: counted, and in range."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    logits = torch.tensor(numbers(5, 8))
    wanted = bridge.route(logits, config=CONFIG, num_valid_tokens=3)
    for a, b in zip(bridge.route(logits, config=CONFIG, num_valid_tokens=number), wanted, strict=True):
        assert torch.equal(a, b)
    for wrong in (number + 3, np.int16(-1)):
        with pytest.raises(ValueError, match=f"^num_valid_tokens: expected 0 to T=5, got {wrong}"):
            bridge.route(logits, config=CONFIG, num_valid_tokens=wrong)


VIEWS = [(True, False), (False, True), (True, True)]
NAMES = lambda views: "+".join(name for name, is_view in zip(("gate_up", "down"), views, strict=True) if is_view)


def laid(weights: tuple[torch.Tensor, ...], views: tuple[bool, ...]) -> list[torch.Tensor]:
    """The same weights, some of them transposed views of what lies as Hugging Face keeps it; leaves of autograd."""
    lying = [w.mT.contiguous().mT if is_view else w.clone() for w, is_view in zip(weights, views, strict=True)]
    return [weight.detach().requires_grad_() for weight in lying]


@pytest.mark.parametrize("views", VIEWS, ids=NAMES)
@pytest.mark.parametrize("inner", [16, 1], ids=lambda n: f"I{n}")
@pytest.mark.parametrize("through", ["DLPack", "ops"])
def test_transposed_views(inner: int, views: tuple[bool, bool], through: str, device: torch.device) -> None:
    """Either weight may be one, also where one column makes a transpose contiguous: results and gradients are equal."""
    given = tensors(arguments("experts"), device)
    gate, up = given["gate_up"].chunk(2, dim=2)
    weights = torch.cat([gate[:, :, :inner], up[:, :, :inner]], dim=2), given["down"][:, :inner].contiguous()
    run = bridge.experts if through == "DLPack" else lambda *args: torch.ops.jaxmoe.experts(*args, "silu")
    found = []
    for how in ((False, False), views):
        leaves = [given["rows"].clone().requires_grad_(), *laid(weights, how)]
        y = run(*leaves, given["group_sizes"])
        with torch.no_grad():
            torch.testing.assert_close(run(*leaves, given["group_sizes"]), y.detach())
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(gradient.any() for gradient in found[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", VIEWS, ids=NAMES)
def test_addresses_of_transposed_views(
    views: tuple[bool, bool], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read where they lie."""
    given = tensors(arguments("experts"), device)
    given["gate_up"], given["down"] = (w.detach() for w in laid((given["gate_up"], given["down"]), views))
    spy = Spy(monkeypatch, "experts")
    bridge.experts(**given)
    assert sorted(spy.going_in) == sorted(tensor.data_ptr() for tensor in given.values())


@pytest.mark.parametrize("views", VIEWS, ids=NAMES)
@pytest.mark.parametrize("valid", [None, 3], ids=str)
def test_layer_of_transposed_views(views: tuple[bool, bool], valid: int | None, device: torch.device) -> None:
    """The layer takes them as the experts do, and gives what it gives otherwise."""
    given = tensors(arguments("moe"), device)
    params = given["params"]
    found = []
    for how in ((False, False), views):
        x, router = (tensor.clone().requires_grad_() for tensor in (given["x"], params.router))
        stack = laid((params.gate_up, params.down), how)
        layer = bridge.MoEParams(router, *stack, params.bias)
        with torch.no_grad():
            evaluated = leaves(bridge.moe(x, layer, CONFIG, num_valid_tokens=valid))
        y, routing = bridge.moe(x, layer, CONFIG, num_valid_tokens=valid)
        assert isinstance(routing, bridge.Routing)
        torch.testing.assert_close(evaluated, [t.detach() for t in (y, *routing)], rtol=2e-6, atol=1e-6)
        gradients = torch.autograd.grad(y.square().sum(), [x, router, *stack])
        assert all(gradient.any() for gradient in gradients)
        found.append([*evaluated, *gradients])
    assert not found[1][0][5 if valid is None else valid :].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_without_load(device: torch.device) -> None:
    """return_load=False leaves the field empty."""
    routing = bridge.route(tensors(numbers(5, 8), device), config=CONFIG, return_load=False)
    assert routing.load is None
    assert routing.experts.shape == (5, 3)


def test_expert_map(device: torch.device) -> None:
    """An optional tensor reaches jaxmoe."""
    ids, local = arguments("plan_dispatch")["experts"], np.array([-1, 0, 1, -1, 2, -1, 3, -1, 0], np.int32)
    for max_rows in (None, 2):
        plan = bridge.plan_dispatch(tensors(ids, device), 4, expert_map=tensors(local, device), max_rows=max_rows)
        wanted = jaxmoe.plan_dispatch(arrays(ids), 4, expert_map=arrays(local), max_rows=max_rows)
        for tensor, array in zip(plan, wanted, strict=True):
            same(tensor, array)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_route_dtypes(
    logits_dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair of dtypes goes in as it is."""
    logits = torch.tensor(numbers(5, 8), device=device, dtype=logits_dtype)
    bias = torch.tensor(numbers(8, seed=1), device=device, dtype=bias_dtype)
    spy = Spy(monkeypatch, "route")
    routing = bridge.route(logits, bias, config=CONFIG)
    assert sorted(spy.going_in) == sorted([logits.data_ptr(), bias.data_ptr()])
    wanted = spy.function(bridge.to_jax(logits.clone()), bridge.to_jax(bias.clone()), config=CONFIG)
    for tensor, array in zip(routing, wanted, strict=True):
        same(tensor, array)


def make_out(name: str, device: torch.device, tokens: int = 5) -> Any:
    """Poisoned tensors of the right shapes."""
    pairs = tokens * CONFIG.num_slots
    full = lambda dtype, *shape: torch.full(shape, -77, dtype=dtype, device=device)
    if name == "route":
        shapes = ((tokens, CONFIG.num_slots), (tokens, CONFIG.num_slots), (CONFIG.num_expert_ids,))
        return tuple(full(t, *s) for t, s in zip((torch.float32, torch.int32, torch.int32), shapes, strict=True))
    return full(torch.float32, pairs if name == "dispatch" else tokens, 32)


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("tokens", [0, 1, 5], ids=lambda n: f"T{n}")
def test_out_is_filled(name: str, tokens: int, device: torch.device) -> None:
    """The caller's own tensors come back, filled in place, with jaxmoe's results."""
    values, out = arguments(name, tokens), make_out(name, device, tokens)
    before = [(tensor.data_ptr(), tensor._version) for tensor in leaves(out)]
    results = getattr(bridge, name)(**tensors(values, device), **options(name), out=out)
    wanted = leaves(getattr(jaxmoe, name)(**arrays(values), **options(name)))
    assert all(a is b for a, b in zip(leaves(filled(name, results)), leaves(out), strict=True))
    assert [tensor.data_ptr() for tensor in leaves(out)] == [address for address, _ in before]
    assert all(tensor._version > version for tensor, (_, version) in zip(leaves(out), before, strict=True))
    for tensor, array in zip(leaves(results), wanted, strict=True):
        same(tensor, array)


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_takes_one_copy_at_most(name: str, device: torch.device) -> None:
    """On the CPU JAX cannot write to torch's memory, so one copy a tensor is left; on a GPU there is none."""
    given, out = tensors(arguments(name), device), make_out(name, device)
    with Operations() as operations:
        getattr(bridge, name)(**given, **options(name), out=out)
    copies = [operation for operation in operations.names if operation != "aten::is_pinned"]
    assert copies == ["aten::copy_"] * (len(leaves(out)) if device.type == "cpu" else 0)


@pytest.mark.parametrize(
    ("name", "argument"), [("route", "logits"), ("router_logits", "x"), ("dispatch", "x"), ("combine", "rows")]
)
@pytest.mark.parametrize("cut", ["first", "last", "short", "shifted"])
def test_columns_of_a_wider_tensor(
    name: str, argument: str, cut: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided rows are read where they lie, not as if contiguous: at either end of a row, and where the storage ends
    with the last element or starts in the middle of a row."""
    values = arguments(name)
    dense = values[argument]
    height, width = dense.shape
    stride = 3 * width
    stored = torch.full((height * stride + 16,), 99.0, device=device)
    offset = {"first": 0, "last": 2 * width, "short": 2 * width, "shifted": 16}[cut]
    if cut == "short":  # nothing behind the last element
        stored = stored[: (height - 1) * stride + offset + width].clone()
    view = stored.as_strided((height, width), (stride, 1), offset)
    view.copy_(torch.tensor(dense))
    given = {**tensors(values, device), argument: view}
    spy = Spy(monkeypatch, name)
    with torch.no_grad(), Operations() as operations:
        results = getattr(bridge, name)(**given, **options(name))
    wanted = leaves(spy.function(**arrays(values), **options(name)))
    for tensor, array in zip(leaves(results), wanted, strict=True):
        same(tensor, array)
    assert any(0 <= view.data_ptr() - address < stride * 4 for address in spy.going_in)
    assert set(operations.names) <= {"aten::is_pinned", "aten::as_strided"}


def test_params_and_plan_are_not_changed(device: torch.device) -> None:
    """A call must not write to what it reads."""
    given = tensors(arguments("moe"), device)
    before = [tensor.clone() for tensor in leaves(given)]
    bridge.moe(**given, config=CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(given), strict=True))


@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
def test_integers_of_numpy(takes_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come from an array: taken wherever an int is; a bool is none."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    ids = torch.tensor([[2, 0], [0, 1]], dtype=torch.int32)
    wanted = bridge.plan_dispatch(ids, 3, align=2, max_rows=4)
    plan = bridge.plan_dispatch(ids, np.int64(3), align=np.int32(2), max_rows=np.uint8(4))
    for found, tensor in zip(plan, wanted, strict=True):
        assert torch.equal(found, tensor)
    rows, *_ = vllm.moe_permute(torch.ones(2, 4), None, ids, np.int64(3), n_local_expert=np.int64(-1))
    assert rows.shape == (4, 4)
    assert len(vllm.moe_align_block_size(ids, np.int64(2), np.int64(3))) == 3
    for name in ("num_experts", "align"):
        with pytest.raises(ValueError, match=rf"^{name}: expected an int from 1 to \d+, got True"):
            bridge.plan_dispatch(**{"experts": ids, "num_experts": 3, name: True})
