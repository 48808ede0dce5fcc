"""Routing calls on short ways: without the checks that nothing can fail, and without what has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import bridge
from bridge import path
from bridge.native import guards, routing
from bridge.ops import routing as ops

CONFIG = bridge.RoutingConfig(num_experts=16, top_k=2)


class Call(NamedTuple):
    """The tensors of a call."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    weights: torch.Tensor
    experts: torch.Tensor

    def run(self) -> None:
        ops._route_out_native(self.logits, self.bias, None, None, CONFIG.json, self.weights, self.experts, None)


def usual(tokens: int = 4, dtype: torch.dtype = torch.bfloat16, bias: torch.dtype | None = torch.float32) -> Call:
    make = lambda dtype, *sides: torch.zeros(torch.Size(sides).numel() + 32, dtype=dtype)
    held = (
        make(dtype, tokens, 16),
        make(bias or dtype, 16),
        make(torch.float32, tokens, 2),
        make(torch.int32, tokens, 2),
    )
    sides = (tokens, 16), (16,), (tokens, 2), (tokens, 2)
    views = []
    for flat, sizes in zip(held, sides, strict=True):
        first = -flat.data_ptr() % 32 // flat.itemsize
        views.append(flat[first : first + torch.Size(sizes).numel()].view(sizes))
    return Call(views[0], views[1] if bias else None, views[2], views[3])


class Seen(NamedTuple):
    """What became of the calls."""

    launches: list[tuple[int, ...]]
    checked: list[str]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Kernels only note their arguments here, and the checks that they were made."""
    found = Seen([], [])
    check = ops._check_route_out

    def checking(*args: Any) -> None:
        check(*args)
        found.checked.append("checked")

    monkeypatch.setattr(ops, "_check_route_out", checking)
    monkeypatch.setattr(routing, "_route", lambda *key: lambda *arguments: found.launches.append(arguments))
    monkeypatch.setattr(routing, "_known", {})
    return found


@pytest.mark.parametrize("bias", [torch.float32, None], ids=["bias", "no bias"])
def test_the_second_call_is_not_checked(bias: torch.dtype | None, seen: Seen) -> None:
    call, other = usual(bias=bias), usual(bias=bias)
    versions = [tensor._version for tensor in call[2:]]
    for each in (call, other, call):
        each.run()
    assert len(seen.checked) == 1
    first, second, third = seen.launches
    assert first == third, "the same launch, checked or not"
    addresses = {tensor.data_ptr() for tensor in other if tensor is not None}
    assert {value for value in second if value > 2**20} == addresses
    assert [tensor._version - before for tensor, before in zip(call[2:], versions, strict=True)] == [2, 2]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(tensor.numel() + 33, dtype=tensor.dtype)
    first = -flat.data_ptr() % 32 // flat.itemsize + 1
    return flat[first : first + tensor.numel()].view(tensor.shape)


CHECKED: dict[str, Callable[[Call], Call]] = {
    "another number of tokens": lambda call: usual(5),
    "another dtype of logits": lambda call: usual(dtype=torch.float32),
    "another dtype of the bias": lambda call: usual(bias=torch.bfloat16),
    "no bias": lambda call: call._replace(bias=None),
    "logits that begin elsewhere": lambda call: call._replace(logits=shifted(call.logits)),
    "a bias that begins elsewhere": lambda call: call._replace(bias=shifted(torch.zeros(16))),
    "weights that begin elsewhere": lambda call: call._replace(weights=shifted(call.weights)),
    "experts that begin elsewhere": lambda call: call._replace(experts=shifted(call.experts)),
    "rows that lie apart": lambda call: call._replace(logits=torch.zeros(4, 32, dtype=torch.bfloat16)[:, :16]),
    "tensors of inference mode": lambda call: usual(),
}


@pytest.mark.parametrize("what", CHECKED)
def test_another_call_is_checked(what: str, seen: Seen) -> None:
    call = usual()
    call.run()
    with torch.inference_mode("inference" in what):
        CHECKED[what](call).run()
    assert len(seen.checked) == len(seen.launches) == 2


def test_a_bias_where_there_was_none(seen: Seen) -> None:
    for bias in (None, torch.float32, None, torch.float32):
        usual(bias=bias).run()
    assert len(seen.checked) == 2
    assert [len(launch) for launch in seen.launches] == [6, 7, 6, 7]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(tensor.shape[0], 2 * tensor.shape[1])[:, ::2]


WRONG: dict[str, tuple[Callable[[Call], Call], str]] = {
    "logits without axes": (
        lambda call: call._replace(logits=torch.zeros((), dtype=torch.bfloat16)),
        r"logits: expected .* got bfloat16\[\]",
    ),
    "another number of experts": (
        lambda call: call._replace(logits=torch.zeros(4, 17, dtype=torch.bfloat16)),
        r"logits: expected .*\['?T'?, 16\], got bfloat16\[4, 17\]",
    ),
    "another dtype of weights": (
        lambda call: call._replace(weights=torch.zeros(4, 2, dtype=torch.bfloat16)),
        r"out.weights: expected float32 \[4, 2\], got bfloat16",
    ),
    "another dtype of experts": (
        lambda call: call._replace(experts=torch.zeros(4, 2, dtype=torch.int64)),
        r"out.experts: expected int32 \[4, 2\], got int64",
    ),
    "fewer rows of experts": (
        lambda call: call._replace(experts=call.experts[:3]),
        r"out.experts: expected int32 \[4, 2\], got int32\[3, 2\]",
    ),
    "strided weights": (lambda call: call._replace(weights=strided(call.weights)), "out.weights: expected a contig"),
    "strided experts": (lambda call: call._replace(experts=strided(call.experts)), "out.experts: expected a contig"),
    "a bias of another size": (lambda call: call._replace(bias=torch.zeros(17)), r"bias: expected .*\[16\]"),
    "a strided bias": (lambda call: call._replace(bias=torch.zeros(32)[::2]), "bias: expected a contiguous"),
    "another device": (
        lambda call: call._replace(weights=torch.empty(4, 2, device="meta")),
        "out.weights: expected the device",
    ),
    "experts in the place of weights": (
        lambda call: call._replace(experts=call.weights.view(torch.int32)),
        "out.experts: expected memory of its own, got a tensor that overlaps out.weights",
    ),
    "weights in the place of logits": (
        lambda call: call._replace(weights=call.logits.view(torch.float32).view(-1)[:8].view(4, 2)),
        "out.weights: expected memory of its own, got a tensor that overlaps logits",
    ),
    "experts behind the middle of logits": (
        lambda call: call._replace(experts=call.logits.view(torch.int32).view(-1)[16:24].view(4, 2)),
        "out.experts: expected memory of its own, got a tensor that overlaps logits",
    ),
    "weights in the place of the bias": (
        lambda call: call._replace(weights=call.bias[:8].view(4, 2) if call.bias is not None else call.weights),
        "out.weights: expected memory of its own, got a tensor that overlaps bias",
    ),
    "experts in the place of the bias": (
        lambda call: call._replace(
            experts=call.bias.view(torch.int32)[8:].view(4, 2) if call.bias is not None else call.experts
        ),
        "out.experts: expected memory of its own, got a tensor that overlaps bias",
    ),
    "weights that ask for a gradient": (
        lambda call: call._replace(weights=call.weights.detach().requires_grad_()),
        "out.weights: expected a tensor without requires_grad",
    ),
    "logits that ask for a gradient": (
        lambda call: call._replace(logits=call.logits.detach().requires_grad_()),
        "out: expected None where logits requires grad",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("gradients", [True, False], ids=["", "no_grad"])
def test_a_wrong_call_is_refused(what: str, gradients: bool, seen: Seen) -> None:
    change, message = WRONG[what]
    call = usual()
    with torch.set_grad_enabled(gradients):
        call.run()
        if what == "logits that ask for a gradient" and not gradients:
            change(call).run()  # there is none to ask for
            assert len(seen.launches) == 2
            return
        with pytest.raises(ValueError, match=message):
            change(call).run()
    assert len(seen.launches) == 1


def test_tokens_that_share_programs(seen: Seen) -> None:
    """Two a program from 513 on: the grid that is remembered is that of the call."""
    call = usual(700)
    for _ in range(2):
        call.run()
    assert len(seen.checked) == 1
    first, second = seen.launches
    assert first == second
    assert first[:2] == (350, 1)


def test_few_ways_are_remembered(seen: Seen) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for bias in (torch.bfloat16, torch.float16, torch.float32):
            usual(dtype=dtype, bias=bias).run()
    ((known),) = routing._known.values()
    assert len(known) == 4
    usual(2000).run()
    assert list(routing._known) == [(CONFIG.json, (4, 16))], "and only of as many tokens as a decoding step has"


def test_without_torchs_guards_everything_is_checked(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "TensorGuards", None)
    for _ in range(3):
        usual().run()
    assert len(seen.checked) == len(seen.launches) == 3


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which op each call of `bridge.route` on CPU tensors is, through the ops as on a GPU."""
    names: list[str] = []
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    for name in ("route", "route_out"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: names.append(name) or op(*args))
    return names


def test_results_are_allocated_and_filled(called: list[str]) -> None:
    """Where nobody asks for gradients; they are those of the op that has one."""
    logits, bias = torch.randn(5, 16), torch.randn(16)
    for options in ({}, {"return_load": False}, {"num_valid_tokens": 3}):
        got = bridge.route(logits, bias, config=CONFIG, **options)
        want = bridge.route(logits.clone().requires_grad_(), bias, config=CONFIG, **options)
        assert want.weights.requires_grad
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
    assert called == ["route_out", "route"] * 3


def test_where_a_graph_is_kept_the_other_op_runs(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, bias = torch.randn(5, 16), torch.randn(16)
    asking = logits.clone().requires_grad_()
    bridge.route(asking, bias, config=CONFIG).weights.sum().backward()
    assert asking.grad is not None
    with monkeypatch.context() as patch:  # tangents are carried along
        patch.setattr(torch.autograd.forward_ad, "_current_level", 0)
        bridge.route(logits, bias, config=CONFIG)
    assert called == ["route"] * 2
    with torch.no_grad():
        bridge.route(asking, bias, config=CONFIG)
    assert called[2:] == ["route_out"]
    parameter = torch.nn.Parameter(bias)  # as vLLM keeps it: it gets no gradient
    routing = bridge.route(logits, parameter, config=CONFIG)
    assert not routing.weights.requires_grad
    bridge.route(logits, parameter, config=CONFIG, out=routing)
    assert called[3:] == ["route_out"] * 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    bridge.route(logits, bias, config=CONFIG)
    assert called[5:] == ["route"]


def test_a_layer_whose_bias_is_a_parameter(called: list[str]) -> None:
    """It gets no gradient, so nothing is kept for one."""
    make = lambda *sides: torch.randn(*sides)
    params = bridge.MoEParams(make(16, 8), make(16, 8, 12), make(16, 6, 8), torch.nn.Parameter(make(16)))
    y, routing = bridge.moe(make(5, 8), params, CONFIG)
    assert not y.requires_grad
    assert not routing.weights.requires_grad


def test_what_is_wrong_is_said_of_the_arguments(called: list[str]) -> None:
    for logits, message in (
        (torch.zeros(()), r"logits: expected .*\[T, 16\], got float32\[\]"),
        (torch.zeros(3), r"logits: expected .*\[T, 16\], got float32\[3\]"),
        (torch.zeros(3, 15), r"logits: expected .*\[T, 16\], got float32\[3, 15\]"),
        (torch.zeros(3, 16, dtype=torch.int32), r"logits: expected .*\[T, 16\], got int32\[3, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge.route(logits, config=CONFIG)
    with pytest.raises(ValueError, match=r"bias: expected .*\[16\], got float32\[15\]"):
        bridge.route(torch.zeros(3, 16), torch.zeros(15), config=CONFIG)
