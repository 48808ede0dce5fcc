# ruff: noqa: E501
"""The checks of the torch ops, on CPU tensors: which argument an error names, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bridge
from bridge import path
from tests.bridge.op_inputs import CONFIG, OPS, E, H, I, M, T, normal, plan, weights

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "logits shape": (lambda: bridge.route(normal(T, 15), config=CONFIG), r"logits: expected .* \[T, 16\], got float32\[5, 15\]"),
    "bias dtype": (
        lambda: bridge.route(normal(T, 16), torch.zeros(16, dtype=torch.int32), config=CONFIG),
        r"bias: expected bfloat16 or float16 or float32 \[16\], got int32\[16\]",
    ),
    "count": (lambda: bridge.route(normal(T, 16), config=CONFIG, num_valid_tokens=6), "num_valid_tokens: expected 0 to T=5"),
    "kind of count": (lambda: bridge.route(normal(T, 16), config=CONFIG, num_valid_tokens="3"), "num_valid_tokens: expected an int"),
    "columns": (lambda: bridge.route(normal(16, T).T, config=CONFIG), r"logits: expected rows that lie apart .* strides \(1, 5\)"),
    "config": (lambda: bridge.route(normal(T, 16), config=CONFIG.json), "config: expected a RoutingConfig, got str"),
    "ids dtype": (lambda: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int64), 4), r"experts: expected int32 \[T, S\]"),
    "align": (lambda: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int32), 4, align=0), "align: expected an int from 1"),
    **{
        f"max_rows {rows}": (
            lambda rows=rows: bridge.plan_dispatch(torch.zeros(5, 2, dtype=torch.int32), 4, align=8, max_rows=rows),  # type: ignore[misc]
            rf"max_rows: expected a positive multiple of align=8, got {rows}$",
        )
        for rows in (0, 12, -8, True, 8.0)
    },
    "length": (
        lambda: OPS.align_blocks(torch.zeros(5, 2, dtype=torch.int32), 4, 8, None, False, 37),
        "length: expected 38 for 10 pairs, or more, to 1610612735, got 37",
    ),
    "names": (
        lambda: OPS.align_blocks(torch.zeros(5, 2, dtype=torch.int32), 4, 8, torch.zeros(3, dtype=torch.int32), True, 40),
        r"expert_map: expected a name for each of num_experts=4, got int32\[3\]",
    ),
    "offsets": (
        lambda: OPS.permute_maps_out(*plan(), torch.empty(E + 2, dtype=torch.int64), *(torch.empty_like(plan().slots),) * 2),
        "offsets: expected int64 of 2 to E",
    ),
    "plan": (lambda: bridge.dispatch(normal(T, H), tuple(plan())), "plan: expected a DispatchPlan, got tuple"),
    "tokens of x": (lambda: bridge.dispatch(normal(T + 1, H), plan()), r"x: expected .* \[5, H\], got float32\[6, 32\]"),
    "weights": (lambda: bridge.combine(normal(M, H), plan(), normal(T, 3)), r"weights: expected .* \[5, 4\], got float32\[5, 3\]"),
    "weights kind": (lambda: bridge.combine(normal(M, H), plan(), 1.0), "weights: expected a torch.Tensor, got float"),
    "router": (lambda: bridge.router_logits(normal(T, H), normal(16, H + 1)), r"weight: expected .* \[E, 32\]"),
    "strided weights": (
        lambda: bridge.experts(normal(M, H), normal(E, H, 4 * I)[..., ::2], normal(E, I, H), plan().group_sizes),
        "gate_up: expected a contiguous tensor or the transpose of one",
    ),
    "odd gate and up": (
        lambda: bridge.moe(
            normal(T, H), bridge.MoEParams(normal(16, H), normal(E, H, 2 * I - 1), normal(E, I, H)), CONFIG
        ),
        "params.gate_up: expected an even last axis",
    ),
    "activation": (
        lambda: bridge.experts(normal(M, H), *weights(False), plan().group_sizes, activation="relu"),
        "activation: expected one of",
    ),
    "out": (lambda: bridge.dispatch(normal(T, H), plan(), out=normal(M, H + 1)), r"out: expected float32 \[20, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' own checks, which CUDA tensors meet: the same words as jaxmoe's."""

    call, message = WRONG[name]
    planned = plan()
    monkeypatch.setitem(globals(), "plan", lambda: planned)
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: True)
    with pytest.raises(ValueError, match=message):
        call()


def test_native_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="implementation: 'native' needs tensors on a GPU, got one on cpu"):
        bridge.route(normal(T, 16), config=CONFIG, implementation="native")
