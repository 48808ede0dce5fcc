"""Routing calls that are launched without the checks which say what is wrong: those that nothing can be wrong with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import bridge
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
