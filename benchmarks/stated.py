"""The operations in plain torch: what every result is checked against, and what is timed as "torch eager"."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.operation import expect
from bridge import DispatchPlan, RoutingConfig

Tensor = torch.Tensor

_SCORES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=1),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def _choices(
    logits: Tensor,
    bias: Tensor | None,
    config: RoutingConfig,
    dtype: torch.dtype,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scores, what the experts are chosen by: minus infinity outside the groups that are kept).

    Of groups that are as good as equal, those of the `chosen` experts are kept.
    """
    logits = logits.to(dtype)
    scores = _SCORES[config.scoring_func](logits)
    choice = scores if bias is None else scores + bias
    if config.n_group > 1:
        groups = choice.unflatten(1, (config.n_group, -1))
        by_sum = (config.group_score or ("top2" if bias is not None else "max")) == "top2"
        best = groups.topk(2, dim=2, sorted=False).values.sum(dim=2) if by_sum else groups.amax(dim=2)
        if chosen is not None:
            best = best + torch.zeros_like(best).scatter_(1, chosen // groups.shape[2], 1e-6)
        kept = best.topk(config.topk_group, dim=1, sorted=False).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(dropped[:, :, None], -torch.inf).flatten(1)
    return scores, choice


def _weigh(scores: Tensor, ids: Tensor, config: RoutingConfig) -> Tensor:
    weights = scores.gather(1, ids)
    if config.renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * config.routed_scaling_factor


def route(logits: Tensor, bias: Tensor | None, config: RoutingConfig) -> tuple[Tensor, Tensor]:
    """(weights float32, ids int32), the ids in no order."""
    scores, choice = _choices(logits, bias, config, torch.float32)
    ids = choice.topk(config.top_k, dim=1, sorted=False).indices
    return _weigh(scores, ids, config), ids.int()


def check_routing(
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    config: RoutingConfig,
    *,
    rtol: float = 1e-5,
    least: float = 0.999,
) -> None:
    """Checks against float64: distinct ids whose choices are the largest, and their weights.

    Equal choices may be told apart in any way. A share of `least` of the tokens must be right.
    """
    ids = ids.long()
    expect(ids.shape == (len(logits), config.top_k), f"ids of shape {list(ids.shape)}")
    expect(((ids >= 0) & (ids < config.num_experts)).all(), "ids out of range")
    scores, choice = _choices(logits, bias, config, torch.float64, ids)
    ordered = ids.sort(dim=1).values
    expect((ordered[:, 1:] != ordered[:, :-1]).all(), "an expert twice for one token")
    chosen = choice.gather(1, ids).sort(dim=1, descending=True).values
    right = torch.isclose(chosen, choice.topk(config.top_k, dim=1).values, rtol=1e-5, atol=1e-6).all(dim=1)
    close = torch.isclose(weights.double(), _weigh(scores, ids, config), rtol=rtol, atol=0).all(dim=1)
    for what, tokens in (("experts", right), ("weights", close)):
        share = int(tokens.sum()) / len(logits)  # a mean of ones is not always 1 on a GPU
        expect(share >= least, f"{what} right for {share:.2%} of {len(logits)} tokens")


def plan(experts: Tensor, num_experts: int, align: int, num_rows: int) -> DispatchPlan:
    """What `bridge.plan_dispatch` must return, by a stable sort."""
    flat = experts.flatten().long()
    key = flat.where((flat >= 0) & (flat < num_experts), num_experts)
    counts = key.bincount(minlength=num_experts + 1)[:num_experts]
    padded = (counts + align - 1) // align * align
    order = key.argsort(stable=True)[: int(counts.sum())]
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(len(order), device=flat.device) + shift[key[order]]
    rows, slots = torch.full_like(flat, -1), flat.new_full((num_rows,), -1)
    rows[order] = place
    slots[place] = order
    return DispatchPlan(rows.reshape(experts.shape).int(), slots.int(), padded.int())


def check_plan(got: DispatchPlan, experts: Tensor, num_experts: int, align: int = 1) -> None:
    """Checks a plan: exactly."""
    want = plan(experts, num_experts, align, got.slots.numel())
    for name, a, b in zip(got._fields, got, want, strict=True):
        expect(torch.equal(a, b), f"{name} of the plan")


def check_rows(rows: Tensor, x: Tensor, plan: DispatchPlan) -> None:
    """Checks dispatched rows: exactly; those that hold no token are zero."""
    for got, slots in zip(rows.split(1 << 16), plan.slots.split(1 << 16), strict=True):  # a few at a time
        want = x[slots.clamp(min=0) // plan.rows.shape[1]].masked_fill((slots < 0)[:, None], 0)
        expect(torch.equal(got, want), "dispatched rows")


def combine(rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """The weighted sums of a token's rows, in float32."""
    total = torch.zeros(len(weights), rows.shape[1], device=rows.device)
    for j, places in enumerate(plan.rows.long().unbind(1)):
        here = (places >= 0)[:, None]
        total += torch.where(here, weights[:, j, None].float() * rows[places.clamp(min=0)].float(), 0.0)
    return total


def check_close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    """Checks by the size of the difference over that of what is wanted."""
    error = relative_error(got, want)
    expect(error < limit, f"{what}, relative error {error:.1e}")  # never where it is NaN


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over that of what is wanted; zero where both are nothing but zeros."""
    want = want.float()
    off, size = float((got.float() - want).norm()), float(want.norm())
    return off / size if size else (0.0 if off == 0 else float("inf"))


def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """torch's own grouped product: each group of rows times its matrix; offsets int32 [E], where each group ends."""
    function: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(rows, weight, offs=offsets)


def grouped_matmul(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """The same, a group at a time, in float32."""
    groups = rows[: int(sizes.sum())].split(sizes.tolist())
    return torch.cat([group.float() @ matrix.float() for group, matrix in zip(groups, weight, strict=True)])


def experts_loop(rows: Tensor, gate_up: Tensor, down: Tensor, sizes: Tensor) -> Tensor:
    """Each expert on its group of rows, in float32."""
    results = []
    for group, first, second in zip(rows[: int(sizes.sum())].split(sizes.tolist()), gate_up, down, strict=True):
        gate, up = (group.float() @ first.float()).chunk(2, dim=1)
        results.append((F.silu(gate) * up) @ second.float())
    return torch.cat(results)


def experts(rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """Each expert on its group of rows, by torch's grouped product."""
    gate, up = grouped_mm(rows, gate_up, offsets).chunk(2, dim=1)
    return grouped_mm(F.silu(gate) * up, down, offsets)


def layer(
    x: Tensor, router: Tensor, bias: Tensor | None, gate_up: Tensor, down: Tensor, config: RoutingConfig
) -> Tensor:
    """A whole layer: a router in float32, a sort, torch's grouped product, and sums in float32."""
    weights, ids = route(F.linear(x.float(), router.float()), bias, config)
    in_order, order = ids.flatten().sort()
    counts = torch.histc(in_order.float(), bins=config.num_experts, min=0, max=config.num_experts - 1)
    rows = experts(x[order // config.top_k], gate_up, down, counts.cumsum(0, dtype=torch.int32))
    rows = rows * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return rows[back].unflatten(0, (-1, config.top_k)).sum(dim=1).to(x.dtype)


def layer_loop(
    x: Tensor, router: Tensor, bias: Tensor | None, gate_up: Tensor, down: Tensor, config: RoutingConfig
) -> Tensor:
    """The same, an expert at a time, in float32."""
    weights, ids = route(F.linear(x.float(), router.float()), bias, config)
    where = plan(ids, config.num_experts, 1, ids.numel())
    rows = experts_loop(x[where.slots.long() // config.top_k], gate_up, down, where.group_sizes)
    return combine(rows, where, weights)
