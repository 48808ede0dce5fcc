"""A small layer for the tests of the ops: its shapes and tensors, on the CPU."""

from __future__ import annotations

import torch

import bridge

CONFIG = bridge.RoutingConfig(num_experts=16, top_k=3, n_group=4, topk_group=2, n_shared_experts=1)
T, H, I, M, E = 5, 32, 16, 20, 17
OPS = torch.ops.jaxmoe


def normal(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def plan(align: int = 1) -> bridge.DispatchPlan:
    return bridge.plan_dispatch(bridge.route(normal(T, 16), config=CONFIG).experts, E, align=align)


def weights(transposed: bool, grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    if transposed:
        return (normal(E, 2 * I, H, grad=grad) / 8).mT, (normal(E, H, I, grad=grad) / 8).mT
    return normal(E, H, 2 * I, grad=grad) / 8, normal(E, I, H, grad=grad) / 8


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()
