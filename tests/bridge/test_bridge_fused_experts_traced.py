"""Experts that are elsewhere and room for some rows, where torch traces or transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import bridge
from tests.bridge.calls import CONFIG
from tests.bridge.test_bridge_fused_experts import ROOM, WHOLE, by_hand, given, here, part_of_layer
from tests.jaxmoe.test_fused_experts import IDS, TOLERANCE, Case


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def test_parts_in_a_batch() -> None:
    """torch.func.vmap over maps and weights, and over ids."""
    ids, leaves, _ = given(WHOLE)
    x, weights, gate_up, down = (leaf.detach() for leaf in leaves)
    parts = ((7, 0, 4), (8, 1, 2), (3, 5, 6))
    pick = lambda stack: torch.stack([stack[list(few)] for few in parts])
    run = lambda local, *stack, **options: bridge.fused_experts(x, ids, weights, *stack, expert_map=local, **options)
    maps = torch.stack(list(map(here, parts)))
    batch = torch.func.vmap(run)(maps, pick(gate_up), pick(down))
    torch.testing.assert_close(batch.sum(0), bridge.fused_experts(x, ids, weights, gate_up, down), **TOLERANCE)
    cut = torch.func.vmap(functools.partial(run, max_rows=4))(maps, pick(gate_up), pick(down))
    for few, found in zip(parts, cut, strict=True):
        stack = gate_up[list(few)], down[list(few)]
        torch.testing.assert_close(found, by_hand(Case("", few, max_rows=4), ids, x, weights, *stack), **TOLERANCE)
    several = torch.stack([ids, ids.flip(0)])
    found = torch.func.vmap(lambda ids: bridge.fused_experts(x, ids, weights, gate_up, down, max_rows=9))(several)
    for item, wanted in zip(found, several, strict=True):
        torch.testing.assert_close(item, by_hand(Case("", max_rows=9), wanted, x, weights, gate_up, down), **TOLERANCE)


def behind(few: tuple[int, ...]) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """Behind routing, of leaves but x."""
    _, (_, _, *stack), _ = given(Case("", few))
    local = here(few)

    def run(x: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, most: Any) -> Any:
        ids = (torch.arange(3 * x.shape[0], dtype=torch.int32) % IDS).view(-1, 3)
        most = most(x.shape[0])
        return bridge.fused_experts(x, ids, weights[: x.shape[0]], gate_up, down, expert_map=local, max_rows=most)

    return run, [normal(12, 3).requires_grad_(), *stack]


def layer(few: tuple[int, ...]) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """All of it."""
    _, params, local = part_of_layer(5, few)

    def run(x: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, most: Any) -> Any:
        mine = bridge.MoEParams(router, gate_up, down, params.bias)
        return bridge.moe(x, mine, CONFIG, expert_map=local, max_rows=most(x.shape[0]))[0]

    return run, [weight.requires_grad_() for weight in (params.router, params.gate_up, params.down)]


MOST = {
    "a number": lambda tokens: 7,
    "twice the share": lambda tokens: -(-2 * tokens * 3 * 4 // IDS),
}


@pytest.mark.in_ci(make=lambda make: make is layer)
@pytest.mark.in_ci(most="a number")
@pytest.mark.parametrize(
    ("make", "most", "dynamic"),
    [(behind, "twice the share", True), (behind, "a number", None), (layer, "twice the share", None)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_graph_for_every_number_of_tokens(make: Any, most: str, dynamic: bool | None) -> None:
    """Also where the room goes with them, whether there is enough or not; gradients too."""
    run, stack = make((7, 2, 4, 8))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (5, 9, 3, 12, 2):
        x = normal(tokens, stack[1].shape[1]).requires_grad_()
        found = [function(x, *stack, MOST[most]) for function in (whole, run)]
        torch.testing.assert_close(found[0], found[1])
        got, wanted = (torch.autograd.grad(y.square().sum(), [x, *stack]) for y in found)
        assert all(gradient.any() for gradient in wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == (1 if dynamic else 2), "of five tokens, then of any number"


def test_compiled_with_rows_that_data_decides() -> None:
    """As after an exchange between ranks: how many tokens, and how many rows."""
    ids, leaves, _ = given(WHOLE)
    third = torch.arange(len(ids)) % 3 == 0
    x, weights, gate_up, down = (leaf.detach() for leaf in leaves)

    def of_some(mask: torch.Tensor, most: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        return bridge.fused_experts(x[mask], ids[mask], weights[mask], gate_up, down, max_rows=most(mask))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for most in (lambda mask: None, lambda mask: 4, lambda mask: mask.sum().item()):
            torch._dynamo.reset()
            whole = torch.compile(of_some, backend="aot_eager", fullgraph=True)
            for mask in (~third, third):
                torch.testing.assert_close(whole(mask, most), of_some(mask, most))
        with pytest.raises(ValueError, match=rf"^max_rows: {ROOM} 0$"):
            whole(third & ~third, most)


def test_fake_tensors() -> None:
    """Shapes and dtypes without values, with gradients."""
    with FakeTensorMode():
        x, weights = torch.empty(7, 16, dtype=torch.bfloat16, requires_grad=True), torch.empty(7, 3, requires_grad=True)
        ids, local = torch.empty(7, 3, dtype=torch.int32), torch.empty(IDS, dtype=torch.int32)
        lying = torch.empty(4, 12, 16, dtype=torch.bfloat16, requires_grad=True)
        down = torch.empty(4, 6, 16, dtype=torch.bfloat16, requires_grad=True)
        for most in (None, 5, 1000):
            y = bridge.fused_experts(x, ids, weights, lying.mT, down, expert_map=local, max_rows=most)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert y.grad_fn is not None
            gradients = torch.autograd.grad(y.sum(), (x, weights, lying, down))
            assert [g.shape for g in gradients] == [t.shape for t in (x, weights, lying, down)]
