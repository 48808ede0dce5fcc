"""What lies behind routing as one call: experts that are elsewhere, room for some rows alone, weights as views."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
import jaxmoe
from bridge.ops import layer as ops
from bridge.ops import weighted_experts as gradients
from tests.bridge.calls import CONFIG, HERE, arguments, arrays, same, tensors
from tests.bridge.calls import leaves as flat
from tests.bridge.test_bridge_functions import NAMES, VIEWS, Operations, laid
from tests.jaxmoe.test_fused_experts import CASES, IDS, TOLERANCE, Case, drawn, kept_pairs, map_of

F = torch.nn.functional
CPU = torch.device("cpu")
DENSE = (False, False)
LYING = [pytest.param(views, id=NAMES(views) or "dense") for views in (DENSE, *VIEWS)]
PARTS = ((7, 0), (4,), (8, 1, 2), (3, 5, 6))
WHOLE = Case("")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU: tensors are the CPU's here."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def given(case: Case, views: tuple[bool, bool] = DENSE) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(ids, leaves of autograd: x, weights, gate_up and down of the experts that are here; the result's gradient)."""
    x, ids, weights, gate_up, down, up = (torch.tensor(np.asarray(array)) for array in drawn(case))
    here = list(case.here)
    return ids, [x.requires_grad_(), weights.requires_grad_(), *laid((gate_up[here], down[here]), views)], up


def here(experts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(np.asarray(map_of(experts)))


def fused(case: Case, ids: torch.Tensor, *leaves: torch.Tensor, **options: Any) -> torch.Tensor:
    x, weights, *stack = leaves
    options = {"expert_map": here(case.here), "max_rows": case.max_rows, "activation": case.activation, **options}
    return bridge.fused_experts(x, ids, weights, *stack, **options)


ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def by_hand(case: Case, ids: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
    """Expert by expert."""
    x, weights, gate_up, down = leaves
    kept, y = torch.tensor(kept_pairs(case, ids.cpu().numpy()), device=ids.device), 0 * x
    for local, expert in enumerate(case.here):
        token, slot = (kept & (ids == expert)).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[local]).chunk(2, dim=1)
        rows = weights[token, slot, None] * (ACTIVATIONS[case.activation](gate) * up @ down[local])
        y = y.index_add(0, token, rows)
    return y


@pytest.mark.in_ci(way="dlpack")  # the ops call the same functions
@pytest.mark.parametrize(
    ("case", "views"),
    [*((case, DENSE) for case in CASES), *((case, VIEWS[-1]) for case in (CASES[1], CASES[4], CASES[8], CASES[11]))],
    ids=lambda value: value.why if isinstance(value, Case) else NAMES(value) or "dense",
)
def test_against_plain_torch(case: Case, views: tuple[bool, bool], way: str) -> None:
    """A loop in float64: the result and every gradient, in the layout of what it is of."""
    ids, leaves, up = given(case, views)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = by_hand(case, ids, *exact)
    wants = torch.autograd.grad(want, exact, up.double(), allow_unused=True, materialize_grads=True)
    y = fused(case, ids, *leaves)
    with torch.no_grad():
        torch.testing.assert_close(fused(case, ids, *leaves), y.detach(), rtol=2e-6, atol=2e-6)
        out = torch.full_like(leaves[0], torch.nan, requires_grad=False)
        assert fused(case, ids, *leaves, out=out) is out
        torch.testing.assert_close(out, y.detach(), rtol=2e-6, atol=2e-6)
    for found, wanted, like in zip(
        (y, *torch.autograd.grad(y, leaves, up)), (want, *wants), (leaves[0], *leaves), strict=True
    ):
        assert (found.dtype, found.shape, found.stride()) == (like.dtype, like.shape, like.stride())
        torch.testing.assert_close(found.double(), wanted, **TOLERANCE)


@pytest.mark.parametrize("views", LYING[1:-1])
def test_one_of_the_weights_is_a_view(views: tuple[bool, bool], way: str) -> None:
    case = CASES[8]
    found = []
    for how in (DENSE, views):
        ids, leaves, up = given(case, how)
        y = fused(case, ids, *leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, up)])
    assert all(tensor.any() for tensor in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_dtypes(way: str) -> None:
    """Weights of a dtype of their own, and their gradient; with jaxmoe's results."""
    ids, (x, weights, *stack), up = given(CASES[8])
    x, *stack = (tensor.detach().bfloat16().requires_grad_() for tensor in (x, *stack))
    weights = weights.detach().half().requires_grad_()
    y = fused(CASES[8], ids, x, weights, *stack)
    gradients = torch.autograd.grad(y, (x, weights, *stack), up.bfloat16())

    run = lambda x, weights, *stack: jaxmoe.fused_experts(
        x, jnp.asarray(ids), weights, *stack, expert_map=map_of(CASES[8].here), max_rows=CASES[8].max_rows
    )
    to_jax = lambda tensor: bridge.to_jax(tensor.detach().clone())
    wanted, pull = jax.vjp(run, *map(to_jax, (x, weights, *stack)))
    for found, want in zip((y, *gradients), (wanted, *pull(to_jax(up.bfloat16()))), strict=True):
        assert str(found.dtype).removeprefix("torch.") == want.dtype.name
        np.testing.assert_allclose(found.detach().float(), np.asarray(want, np.float32), rtol=0.02, atol=0.02)
        assert found.any()


def test_parts_add_up(way: str) -> None:
    """As ranks of expert parallelism add them: results and gradients."""
    ids, leaves, up = given(WHOLE)
    x, weights, gate_up, down = leaves
    whole = bridge.fused_experts(x, ids, weights, gate_up, down)
    part = lambda few: fused(Case("", few), ids, x, weights, gate_up[list(few)], down[list(few)])
    wanted = torch.autograd.grad(whole, leaves, up)
    total = sum(map(part, PARTS), torch.zeros_like(whole))
    torch.testing.assert_close(total, whole, **TOLERANCE)
    for a, b in zip(torch.autograd.grad(total, leaves, up), wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
        assert b.any()


def part_of_layer(tokens: int, few: tuple[int, ...] = HERE, views: tuple[bool, bool] = DENSE) -> tuple[Any, ...]:
    """(x, params with some experts, their map) of tests/bridge/calls.py, the shared expert being one of the ids."""
    values = arguments("moe", tokens)
    params = tensors(values["params"], CPU)
    gate_up, down = (weight.detach() for weight in laid((params.gate_up[list(few)], params.down[list(few)]), views))
    return tensors(values["x"], CPU), params._replace(gate_up=gate_up, down=down), here(few)


@pytest.mark.in_ci(way="dlpack")  # the ops call the same functions
@pytest.mark.parametrize(
    ("tokens", "valid", "max_rows", "views"),
    [(0, None, 1, DENSE), (1, None, None, DENSE), (5, None, None, DENSE), (5, 4, 8, VIEWS[-1])],
)
def test_layer_with_experts_elsewhere(
    tokens: int, valid: int | None, max_rows: int | None, views: tuple[bool, bool], way: str
) -> None:
    """jaxmoe's result and gradients; it routes among all ids, and counts all of the load."""
    x, params, local = part_of_layer(tokens, HERE, views)
    some = [tensor.requires_grad_() for tensor in (x, params.router, params.gate_up, params.down)]
    how: dict[str, Any] = {"num_valid_tokens": valid, "max_rows": max_rows}
    y, routing = bridge.moe(x, params, CONFIG, expert_map=local, **how)
    gradients = torch.autograd.grad(y.square().sum(), some)

    values, order = arguments("moe", tokens), jnp.array(HERE)

    def loss(x: Any, router: Any, gate_up: Any, down: Any) -> Any:
        bias = arrays(values["params"]["bias"])
        params = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)
        found = jaxmoe.moe(x, params, CONFIG, expert_map=map_of(HERE), **how)
        return jnp.sum(found[0] ** 2), found

    router, *stack = (arrays(values["params"][name]) for name in ("router", "gate_up", "down"))
    there = arrays(values["x"]), router, *(weight[order] for weight in stack)
    wanted, (want, all_of_it) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*there)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(y.detach(), want)
    close(routing.weights.detach(), all_of_it.weights)
    for tensor, array in zip(routing[1:], all_of_it[1:], strict=True):
        same(tensor, array)
    assert int(routing.load.sum()) == CONFIG.num_slots * (tokens if valid is None else valid)
    for gradient, tensor, array in zip(gradients, some, wanted, strict=True):
        assert gradient.stride() == tensor.stride() or not tokens
        close(gradient, array)
        assert gradient.any() == (tokens > 0)


@pytest.mark.in_ci(way="dlpack")  # the ops call the same functions
def test_parts_of_a_layer_add_up(way: str) -> None:
    """Where ranks have the same tokens, and the shared expert is on one of them."""
    whole = part_of_layer(5, tuple(range(IDS)))
    x, params = whole[0], whole[1]
    some = [tensor.requires_grad_() for tensor in (x, params.router, params.gate_up, params.down)]
    want = bridge.moe(x, params, CONFIG)[0]
    wanted = torch.autograd.grad(want.square().sum(), some)
    total = torch.zeros_like(want)
    for few in PARTS:
        mine = params._replace(gate_up=params.gate_up[list(few)], down=params.down[list(few)])
        total = total + bridge.moe(x, mine, CONFIG, expert_map=here(few))[0]
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(total.square().sum(), some), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [DENSE, VIEWS[-1]], ids=["dense", "views"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_with_an_activation(activation: str, views: tuple[bool, bool], way: str) -> None:
    """And with an `out`, of all experts and of some."""
    for few, local in ((tuple(range(IDS)), None), (HERE, here(HERE))):
        x, params, _ = part_of_layer(5, few, views)
        layer = functools.partial(bridge.moe, x, params, CONFIG, expert_map=local, activation=activation)
        y, routing = layer()
        exact = (tensor.double() for tensor in (x, routing.weights, params.gate_up, params.down))
        want = by_hand(Case("", few, 5, CONFIG.num_slots, activation=activation), routing.experts, *exact)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        out = torch.full_like(x, torch.nan)
        filled, again = layer(out=out)
        assert filled is out
        assert torch.equal(out, y)
        assert all(torch.equal(a, b) for a, b in zip(again, routing, strict=True))


@pytest.mark.usefixtures("through_dlpack")
@pytest.mark.parametrize("views", LYING[1:])
def test_views_are_read_where_they_lie(views: tuple[bool, bool]) -> None:
    """Torch runs nothing on them, nor on what else goes in, of which all is left as it was."""
    ids, leaves, _ = given(CASES[8], views)
    tokens, params, local = part_of_layer(5, HERE, views)
    x, weights, *stack = (leaf.detach() for leaf in leaves)
    some = here(CASES[8].here)
    before = [tensor.clone() for tensor in (ids, *leaves, *params)]
    with torch.no_grad(), Operations() as operations:
        bridge.fused_experts(x, ids, weights, *stack, expert_map=some, max_rows=6)
        bridge.moe(tokens, params, CONFIG, expert_map=local, max_rows=8)
    assert set(operations.names) <= {"aten::is_pinned", "aten::transpose.int"}, operations.names
    for tensor, old in zip((ids, *leaves, *params), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("name", ["fused_experts", "moe"])
def test_implementation_reaches_every_part_of_views(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["plan_dispatch", "dispatch", "experts", "combine"]
    parts = parts if name == "fused_experts" else ["router_logits", "route", *parts]
    asked: list[tuple[str, str | None]] = []

    def noted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: asked.append((part, options["implementation"])) or function(*args, **options)

    if name == "fused_experts":
        ids, leaves, _ = given(CASES[1], (True, True))
        run = functools.partial(fused, CASES[1], ids, *(leaf.detach() for leaf in leaves))
    else:
        x, params, local = part_of_layer(5, HERE, (True, True))
        run = functools.partial(bridge.moe, x, params, CONFIG, expert_map=local)
    wanted = flat(run())
    for part in parts:
        monkeypatch.setattr(jaxmoe, part, noted(part, getattr(jaxmoe, part)))
    found = flat(run(implementation="interpret"))
    assert asked == [(part, "interpret") for part in parts]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [np.int64(9), np.int32(9), np.uint8(9)], ids=lambda n: type(n).__name__)
def test_numpy_integers(number: Any, way: str) -> None:
    ids, leaves, _ = given(WHOLE)
    wanted = by_hand(Case("", max_rows=9), ids, *leaves)
    torch.testing.assert_close(fused(Case("", max_rows=number), ids, *leaves), wanted, **TOLERANCE)
    x, params, local = part_of_layer(20)
    moe = functools.partial(bridge.moe, x, params, CONFIG, expert_map=local)
    assert torch.equal(moe(max_rows=number)[0], moe(max_rows=9)[0])
    assert not torch.equal(moe(max_rows=number)[0], moe()[0])


def test_room_beyond_all_numbers(way: str) -> None:
    """A plan has fewer rows, and an op takes 64 bits."""
    ids, leaves, _ = given(WHOLE)
    for a, b in zip(bridge.plan_dispatch(ids, IDS, max_rows=2**70), bridge.plan_dispatch(ids, IDS), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fused(Case("", max_rows=2**63 - 1), ids, *leaves), fused(WHOLE, ids, *leaves))


def test_kernels_are_told_how_many_ids_there_are(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """And keep what a gradient needs where one is asked for alone. Only the ops have such kernels."""
    op, told = ops.weighted_experts, list[Any]()
    monkeypatch.setattr(ops, "weighted_experts", lambda *args: told.append((args[-3], args[-1])) or op(*args))
    op_out = ops.weighted_experts_out
    monkeypatch.setattr(ops, "weighted_experts_out", lambda *args: told.append((args[-3], "out")) or op_out(*args))
    backward, told_back = gradients.weighted_experts_backward, list[int]()
    noted = lambda *args: told_back.append(args[-3]) or backward(*args)
    monkeypatch.setattr(gradients, "weighted_experts_backward", noted)
    ids, leaves, _ = given(CASES[1])
    fused(CASES[1], ids, *leaves).sum().backward()
    with torch.no_grad():
        fused(CASES[1], ids, *leaves)
        fused(CASES[1], ids, *leaves, out=torch.empty_like(leaves[0]))
    bridge.fused_experts(leaves[0], ids, *leaves[1:])  # of three ids
    x, params, local = part_of_layer(5)
    bridge.moe(x, params, CONFIG, expert_map=local)
    assert told == ([(IDS, True), (IDS, False), (IDS, "out"), (3, True), (IDS, False)] if way == "ops" else [])
    assert told_back == ([IDS] if way == "ops" else [])


ints, floats = functools.partial(torch.zeros, dtype=torch.int32), torch.zeros
ROOM = "expected a positive int, got"
WRONG: dict[str, tuple[str, Any, str]] = {
    "x dtype": ("x", ints(11, 16), r"expected bfloat16 or float16 or float32 \[T, H\], got int32\[11, 16\]"),
    "x axes": ("x", floats(11), r"expected .* \[T, H\], got float32\[11\]"),
    "experts shape": ("experts", ints(10, 3), r"expected int32 \[11, S\], got int32\[10, 3\]"),
    "experts dtype": ("experts", floats(11, 3), r"expected int32 \[11, S\], got float32\[11, 3\]"),
    "weights shape": ("weights", floats(11, 2), r"expected .* \[11, 3\], got float32\[11, 2\]"),
    "weights dtype": ("weights", ints(11, 3), r"expected bfloat16 or float16 or float32 \[11, 3\], got int32"),
    "gate_up width": ("gate_up", floats(9, 15, 12), r"expected float32 \[E, 16, 2 \* I\], got float32\[9, 15, 12\]"),
    "gate_up dtype": ("gate_up", floats(9, 16, 12).half(), r"expected float32 \[E, 16, 2 \* I\], got float16"),
    "gate_up odd": ("gate_up", floats(9, 16, 13), "expected an even last axis, gate and up side by side, got 13"),
    "no experts": (
        "gate_up",
        floats(0, 16, 12),
        r"expected at least one element along axis 0, got float32\[0, 16, 12\]",
    ),
    "down shape": ("down", floats(8, 6, 16), r"expected float32 \[9, 6, 16\], got float32\[8, 6, 16\]"),
    "down dtype": ("down", floats(9, 6, 16).bfloat16(), r"expected float32 \[9, 6, 16\], got bfloat16"),
    "map dtype": ("expert_map", floats(9), r"expected int32 \[ids\], got float32\[9\]"),
    "map axes": ("expert_map", ints(3, 3), r"expected int32 \[ids\], got int32\[3, 3\]"),
    "map of nothing": ("expert_map", ints(0), r"expected at least one element along axis 0, got int32\[0\]"),
    "map that is a list": ("expert_map", [0, 1], "expected a torch.Tensor"),
    "room for none": ("max_rows", 0, f"{ROOM} 0$"),
    "less room than none": ("max_rows", -4, f"{ROOM} -4$"),
    "room for none, numpy": ("max_rows", np.int64(0), f"{ROOM} 0$"),
    "half a row": ("max_rows", 2.5, f"{ROOM} 2.5$"),
    "a bool": ("max_rows", True, f"{ROOM} True$"),
    "a numpy bool": ("max_rows", np.bool_(True), f"{ROOM} "),
    "a word": ("max_rows", "9", f"{ROOM} '9'$"),
    "a list": ("max_rows", [9], rf"{ROOM} \[9\]$"),
    "a tensor": ("max_rows", ints(()), f"{ROOM} tensor"),
    "activation": ("activation", "relu", r"expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'"),
    "no activation": ("activation", None, "expected one of .*, got None"),
    "out shape": ("out", floats(11, 15), r"expected float32 \[11, 16\], got float32\[11, 15\]"),
    "out dtype": ("out", floats(11, 16).half(), r"expected float32 \[11, 16\], got float16"),
}


@pytest.mark.parametrize("views", [LYING[0], LYING[-1]])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str, views: tuple[bool, bool], way: str) -> None:
    """The same words on each way."""
    name, value, message = WRONG[case]
    ids, leaves, _ = given(WHOLE, views)
    x, weights, gate_up, down = (leaf.detach() for leaf in leaves)
    right = {
        "x": x,
        "experts": ids,
        "weights": weights,
        "gate_up": gate_up,
        "down": down,
        "expert_map": here(WHOLE.here),
    }
    with pytest.raises(ValueError, match=rf"^{name}(\.0)?: {message}"):
        bridge.fused_experts(**{**right, name: value})


WRONG_LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "map shape": ({"expert_map": ints(8)}, r"expert_map: expected int32 \[9\], got int32\[8\]"),
    "map dtype": ({"expert_map": floats(9)}, r"expert_map: expected int32 \[9\], got float32\[9\]"),
    "room": ({"max_rows": 0}, f"max_rows: {ROOM} 0$"),
    "room of a bool": ({"max_rows": True}, f"max_rows: {ROOM} True$"),
    "down of fewer": (
        {"down": floats(5, 16, 32)},
        r"params.down: expected float32 \[6, 16, 32\], got float32\[5, 16, 32\]",
    ),
    "gate_up": ({"gate_up": floats(6, 31, 32)}, r"params.gate_up: expected float32 \[experts here, 32, 2 \* I\], got"),
    "no experts": ({"gate_up": floats(0, 32, 32)}, "params.gate_up: expected at least one element along axis 0"),
    "activation": ({"activation": "relu"}, "activation: expected one of .*, got 'relu'"),
    "out": ({"out": floats(4, 32)}, r"out: expected float32 \[5, 32\], got float32\[4, 32\]"),
    "all experts here": (
        {"expert_map": None},
        r"params.gate_up: expected float32 \[9, 32, 2 \* I\], got float32\[6, 32, 32\]",
    ),
}


@pytest.mark.parametrize("views", [LYING[0], LYING[-1]])
@pytest.mark.parametrize("case", WRONG_LAYER)
def test_wrong_argument_of_a_layer(case: str, views: tuple[bool, bool], way: str) -> None:
    changed, message = WRONG_LAYER[case]
    x, params, local = part_of_layer(5, HERE, views)
    params = params._replace(**{name: changed[name] for name in ("gate_up", "down") if name in changed})
    options = {name: value for name, value in changed.items() if name not in ("gate_up", "down")}
    with pytest.raises(ValueError, match=f"^{message}"):
        bridge.moe(x, params, CONFIG, **{"expert_map": local, **options})
