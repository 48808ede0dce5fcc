"""A DeepSeek-V3-style MoE layer in plain PyTorch, written for itself: what the demo holds jaxmoe against.

It shares no code with jaxmoe: its own top-k, plain loops over experts, the shared expert computed apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from bridge import MoEParams, RoutingConfig


class Choice(NamedTuple):
    """Where each token goes, and how narrowly."""

    ids: torch.Tensor  # int64 [T, top_k]
    weights: torch.Tensor  # [T, top_k]
    margin: torch.Tensor  # [T], the smallest difference that one of the token's choices hung on


def choose(logits: torch.Tensor, bias: torch.Tensor | None, config: RoutingConfig) -> Choice:
    """Grouped top-k on sigmoid scores plus bias; the weights are the scores, renormalised and scaled."""
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    margins = []
    if config.topk_group < config.n_group:
        groups = choice.unflatten(1, (config.n_group, -1))
        best = groups.topk(2, dim=2).values.sum(dim=2).sort(dim=1, descending=True)
        margins.append(best.values[:, config.topk_group - 1] - best.values[:, config.topk_group])
        kept = torch.zeros_like(best.values, dtype=torch.bool).scatter(1, best.indices[:, : config.topk_group], True)
        choice = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    ranked = choice.sort(dim=1, descending=True)
    margins.append(-ranked.values[:, : config.top_k + 1].diff(dim=1).max(dim=1).values)
    ids = ranked.indices[:, : config.top_k]
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(dim=1, keepdim=True) * config.routed_scaling_factor
    return Choice(ids, weights, torch.stack(margins).min(dim=0).values)


def expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """SwiGLU."""
    gate, up = (x @ gate_up).chunk(2, dim=1)
    return (silu(gate) * up) @ down


def moe(x: torch.Tensor, params: MoEParams, config: RoutingConfig) -> tuple[torch.Tensor, Choice]:
    """The whole layer: (y [T, H], the choice)."""
    choice = choose(x @ params.router.T, params.bias, config)
    y = torch.zeros_like(x)
    for i in range(config.num_experts):
        token, slot = (choice.ids == i).nonzero(as_tuple=True)
        y[token] += choice.weights[token, slot, None] * expert(x[token], params.gate_up[i], params.down[i])
    for i in range(config.num_experts, config.num_expert_ids):
        y += expert(x, params.gate_up[i], params.down[i])
    return y, choice
