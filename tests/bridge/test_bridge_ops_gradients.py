"""The gradients of the torch ops: what backward passes write over, and what nobody asked a gradient for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bridge
from bridge import path
from bridge.ops import weighted_experts as ops
from tests.bridge.op_inputs import CONFIG, OPS, E, H, I, M, T, leaf, normal, plan, weights


@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (3, 4)])
def test_weighted_experts_without_pairs(tokens: int, experts: int) -> None:
    """No tokens, but rows that fill experts up; tokens whose every pair is dropped: zeros, and gradients of zero."""
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    rows, slots, sizes = bridge.plan_dispatch(ids, experts, align=4)
    assert len(slots) > 0
    leaves = [normal(tokens, H, grad=True), normal(tokens, 2, grad=True)]
    leaves += [normal(experts, H, 2 * I, grad=True), normal(experts, I, H, grad=True)]
    x, weights, gate_up, down = leaves
    y, kept = OPS.weighted_experts(x, rows, slots, sizes, weights, gate_up, down, experts, "silu", True)
    assert (y.shape, kept.shape) == ((tokens, H), (len(slots), 2 * I))
    assert not y.any()
    for tensor, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == tensor.shape
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
    return OPS.weighted_experts(x, *bridge.plan_dispatch(ids, E), normal(T, 2), *weights(False), E, "silu", True)[0]


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
