"""The torch ops of the plan: of dispatch and combine, and as vLLM's blocks and maps."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version

import jaxmoe
from bridge.call import call
from bridge.checks import INT32, check, check_at_least_one, check_layout, check_out
from bridge.native import dispatch as native
from bridge.ops.library import define, where_it_runs
from jaxmoe.dispatch import MOST_ROWS, check_max_rows, check_plan_rows, check_plan_sizes
from kernels_pallas.plan_dispatch import num_rows

Tensor = torch.Tensor


def _check_ids(experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: Any = None) -> None:
    check("experts", experts, ("T", "S"), INT32)
    check_layout(experts.device, experts=experts, expert_map=expert_map)
    check_plan_sizes(num_experts, align)
    if expert_map is not None:
        check("expert_map", expert_map, ("ids",), INT32)
    check_sizes(experts, num_experts, align, expert_map, max_rows)


def check_sizes(experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: Any = None) -> None:
    """Raises ValueError unless there is a plan of this size; all the rest has been checked."""
    check_at_least_one("experts", experts, 1)
    if not isinstance(max_rows, torch.SymInt):  # of which the op is told the value, when it runs
        check_max_rows(max_rows, align)
    if expert_map is not None:
        check_at_least_one("expert_map", expert_map, 0)
    check_plan_rows(experts.shape, num_experts, align)


def _plan_fake(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(experts, num_experts, align, expert_map, max_rows)
    return empty_plan(experts, num_experts, align, max_rows)


def empty_plan(experts: Tensor, num_experts: int, align: int, max_rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Room for rows, slots and group sizes."""
    rows = num_rows(experts.shape[0] * experts.shape[1], num_experts, align)
    if max_rows is not None:
        rows = torch.sym_min(rows, max_rows)  # not min, which would make torch.compile guard on the tokens
    return experts.new_empty(experts.shape), experts.new_empty(rows), experts.new_empty(num_experts)


def _plan_native(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    outs = _plan_fake(experts, num_experts, align, expert_map, max_rows)
    native.plan_dispatch(experts, num_experts, align, expert_map, *outs)
    return outs


def _plan_plain(
    experts: Tensor, num_experts: int, align: int, expert_map: Tensor | None, max_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_ids(experts, num_experts, align, expert_map, max_rows)
    options = {"num_experts": num_experts, "align": align, "max_rows": max_rows}
    return tuple(call(jaxmoe.plan_dispatch, {"experts": experts, "expert_map": expert_map}, options))


plan_dispatch = define(
    "plan_dispatch(Tensor experts, int num_experts, int align, Tensor? expert_map, SymInt? max_rows=None)"
    " -> (Tensor, Tensor, Tensor)",
    native=_plan_native,
    plain=_plan_plain,
    fake=_plan_fake,
)


def _check_named(experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool) -> None:
    _check_ids(experts, num_experts, block_size, expert_map)
    if named and (expert_map is None or expert_map.shape[0] < num_experts):
        got = "None" if expert_map is None else f"int32[{expert_map.shape[0]}]"
        raise ValueError(f"expert_map: expected a name for each of num_experts={num_experts}, got {got}")


def _align_fake(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    return _align_empty(experts, block_size, length)


def _align_empty(experts: Tensor, block_size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return experts.new_empty(length), experts.new_empty(-(-length // block_size)), experts.new_empty(1)


def _check_length(length: int, pairs: int, num_experts: int, block_size: int) -> None:
    """Every row in use has a place. Not for the fake, where it would make torch.compile guard on the tokens."""
    least = min(pairs * block_size, pairs + num_experts * (block_size - 1))
    if not least <= length < MOST_ROWS:
        raise ValueError(f"length: expected {least} for {pairs} pairs, or more, to {MOST_ROWS - 1}, got {length}")


def _align_native(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    _check_length(length, experts.numel(), num_experts, block_size)
    outs = _align_empty(experts, block_size, length)
    native.align_blocks(experts, num_experts, block_size, expert_map, named, *outs)
    return outs


def _align_plain(
    experts: Tensor, num_experts: int, block_size: int, expert_map: Tensor | None, named: bool, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_named(experts, num_experts, block_size, expert_map, named)
    _check_length(length, experts.numel(), num_experts, block_size)
    pairs, block_experts, used = _align_empty(experts, block_size, length)
    _, slots, sizes = _plan_plain(experts, num_experts, block_size, None if named else expert_map)
    pairs.fill_(experts.numel())
    pairs[: len(slots)] = slots[:length].where(slots[:length] >= 0, experts.numel())
    end = sizes.cumsum(0)
    begin = torch.arange(len(block_experts), device=experts.device) * block_size
    expert = torch.searchsorted(end, begin, right=True).clamp(max=num_experts - 1)
    name = expert if not named or expert_map is None else expert_map[expert]
    block_experts.copy_(name.where(begin < end[-1], -1))
    return pairs, block_experts, used.copy_(end[-1:])


align_blocks = define(
    "align_blocks(Tensor experts, int num_experts, int block_size, Tensor? expert_map, bool named, SymInt length)"
    " -> (Tensor, Tensor, Tensor)",
    native=where_it_runs(_align_native, _align_plain),
    plain=_align_plain,
    fake=_align_fake,
)


def _check_maps(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    check("rows", rows, ("T", "S"), INT32)
    pairs = rows.shape[0] * rows.shape[1]
    for name, tensor in (("slots", slots), ("inverse", inverse), ("index", index)):
        check(name, tensor, (pairs,), INT32)
    check("group_sizes", group_sizes, ("E",), INT32)
    check("offsets", offsets, ("local + 1",), (torch.int64,))
    given = {"slots": slots, "group_sizes": group_sizes, "offsets": offsets, "inverse": inverse, "index": index}
    check_layout(rows.device, rows=rows, **given)
    if not 2 <= offsets.shape[0] <= group_sizes.shape[0] + 1:
        raise ValueError(f"offsets: expected int64 of 2 to E + 1 = {group_sizes.shape[0] + 1}, got {offsets.shape[0]}")


def _check_maps_apart(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps(rows, slots, group_sizes, offsets, inverse, index)
    outs: dict[str, Tensor | None] = {"offsets": offsets, "inverse": inverse, "index": index}
    check_out(outs, {"rows": rows, "slots": slots, "group_sizes": group_sizes})


def _permute_maps_native(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps_apart(rows, slots, group_sizes, offsets, inverse, index)
    native.permute_maps(rows, slots, group_sizes, offsets, inverse, index)
    increment_version([offsets, inverse, index])


def _permute_maps_plain(
    rows: Tensor, slots: Tensor, group_sizes: Tensor, offsets: Tensor, inverse: Tensor, index: Tensor
) -> None:
    _check_maps_apart(rows, slots, group_sizes, offsets, inverse, index)
    pairs = slots.numel()
    offsets[:1] = 0
    torch.cumsum(group_sizes[: len(offsets) - 1], 0, out=offsets[1:])
    inverse.copy_(rows.flatten().where(rows.flatten() >= 0, pairs - 1))
    index.copy_(slots.where(slots >= 0, pairs))


permute_maps_out = define(
    "permute_maps_out(Tensor rows, Tensor slots, Tensor group_sizes, Tensor(a!) offsets, Tensor(b!) inverse,"
    " Tensor(c!) index) -> ()",
    native=where_it_runs(_permute_maps_native, _permute_maps_plain),
    plain=_permute_maps_plain,
    fake=_check_maps,
)
