"""Launches of the plan, dispatch and combine kernels, on tensors that have been checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bridge.native.build import JAX_DTYPES, aligned, build, laid, lying, row_stride, rows_for, shape
from bridge.native.driver import Kernel
from kernels_pallas import align_blocks as align_kernels
from kernels_pallas import combine as combine_kernels
from kernels_pallas import dispatch as dispatch_kernels
from kernels_pallas import permute_maps as maps_kernels
from kernels_pallas import plan_dispatch as plan_kernels
from kernels_pallas.launch import remembered

INT32 = torch.int32


def _platform() -> str:
    return "rocm" if torch.version.hip else "cuda"


@functools.cache
def _plan(
    function: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],  # what it takes besides
    num_experts: int,
    align: int,
    map_size: int | None,
    config: plan_kernels.Config,
    is_aligned: bool,
    device: int,
) -> list[Kernel]:
    return build(
        function,
        device,
        is_aligned,
        experts=shape(INT32, 1, 1),
        expert_map=None if map_size is None else shape(INT32, map_size),
        num_experts=num_experts,
        align=align,
        **dict(static),
        config=config,
    )


def plan_dispatch(
    experts: torch.Tensor,
    num_experts: int,
    align: int,
    expert_map: torch.Tensor | None,
    rows: torch.Tensor,
    slots: torch.Tensor,
    group_sizes: torch.Tensor,
) -> None:
    """Fills rows, slots and group_sizes."""
    if experts.numel() == 0:
        slots.fill_(-1)
        group_sizes.zero_()
        return
    outs = rows, slots, group_sizes
    _launch_plan(plan_kernels.plan_dispatch, (), experts, expert_map, outs, slots, num_experts, align)


def _launch_plan(
    function: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],
    experts: torch.Tensor,
    given_map: torch.Tensor | None,
    outs: tuple[torch.Tensor, ...],
    slots: torch.Tensor,  # that one of them which has the rows, and is cleared by the first launch of two
    num_experts: int,
    align: int,
) -> None:
    num_items = experts.numel()
    config, sizes, grids, num_counts = _plan_sizes(num_items, slots.numel(), num_experts)
    ids = [experts.data_ptr()]
    if given_map is not None:
        ids.append(given_map.data_ptr())
    filled = [tensor.data_ptr() for tensor in outs]
    scratch = [experts.new_empty(num_counts)] if num_counts else []
    between = [tensor.data_ptr() for tensor in scratch]
    map_size = None if given_map is None else given_map.numel()
    is_aligned = aligned(*ids, *filled, *between)
    kernels = _plan(function, static, num_experts, align, map_size, config, is_aligned, experts.get_device())
    if not num_counts:
        kernels[0](grids[0], 1, *ids, *sizes, *filled)
        return
    cleared = slots.data_ptr()
    kernels[0](grids[0], 1, *ids, *sizes, *between, cleared)
    kernels[1](grids[1], 1, *ids, *between, cleared, *sizes, *filled)


@remembered
def _plan_sizes(
    num_items: int, rows: int, num_experts: int
) -> tuple[plan_kernels.Config, tuple[int, ...], tuple[int, ...], int]:
    """(config, the sizes of every launch, the programs of each, how many numbers lie between two of them)."""
    config = plan_kernels.config_for(num_items, num_experts, _platform())
    sizes = plan_kernels.sizes_for(num_items, rows, config)
    num_counts = 0 if config.at_once else plan_kernels.num_counts(sizes) * num_experts
    return config, tuple(sizes.values()), tuple(plan_kernels.grids_for(num_experts, sizes, config)), num_counts


def align_blocks(
    experts: torch.Tensor,
    num_experts: int,
    align: int,
    expert_map: torch.Tensor | None,
    named: bool,
    pairs: torch.Tensor,
    block_experts: torch.Tensor,
    used: torch.Tensor,
) -> None:
    """Fills pairs, block_experts and used."""
    if experts.numel() == 0:
        pairs.zero_()
        block_experts.fill_(-1)
        used.zero_()
        return
    static, outs = (("length", 1), ("named", named)), (pairs, block_experts, used)
    _launch_plan(align_kernels.align_blocks, static, experts, expert_map, outs, pairs, num_experts, align)


@functools.cache
def _maps(num_experts: int, num_local: int, is_aligned: bool, device: int) -> Kernel:
    return build(
        maps_kernels.permute_maps,
        device,
        is_aligned,
        rows=shape(INT32, 1, 1),
        slots=shape(INT32, 1),
        group_sizes=shape(INT32, num_experts),
        num_local=num_local,
    )[0]


def permute_maps(
    rows: torch.Tensor,
    slots: torch.Tensor,
    group_sizes: torch.Tensor,
    offsets: torch.Tensor,
    inverse: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Fills offsets, inverse and index."""
    num_items = slots.numel()
    if num_items == 0:
        offsets.zero_()
        return
    tensors = rows, slots, group_sizes, offsets, inverse, index
    ins, outs = ([tensor.data_ptr() for tensor in part] for part in (tensors[:3], tensors[3:]))
    kernel = _maps(group_sizes.numel(), offsets.numel() - 1, aligned(*ins, *outs), rows.get_device())
    kernel(*maps_kernels.grid_for(num_items), 1, *ins, num_items, *outs)


@functools.cache
def _dispatch(
    x: torch.dtype,
    out: torch.dtype,
    scale: torch.dtype | None,
    num_slots: int,
    width: int,
    stride: int,
    tokens: int,
    divisor: int,
    rows: int,
    ends: bool,
    config: dispatch_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    return build(
        dispatch_kernels.dispatch,
        device,
        is_aligned,
        divisor=divisor,
        x=shape(x, tokens, stride),
        rows=shape(INT32, tokens, num_slots),
        slots=shape(INT32, rows),
        scale=None if scale is None else shape(scale, tokens, num_slots),
        end=shape(INT32, 1) if ends else None,
        width=width,
        dtype=JAX_DTYPES[out],
        config=config,
    )[0]


def dispatch(
    x: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    clear: bool = True,
    end: torch.Tensor | None = None,
) -> None:
    """Fills `out` [M, H] from x [T, H], each row times its scale [T, S] where there is one; the others if `clear`.

    Nobody reads the rows at or past `end`, int32 [1].
    """
    (num_tokens, num_slots), (num_rows, width) = rows.shape, out.shape
    if num_tokens == 0 or out.numel() == 0:
        if clear:
            out.zero_()
        return
    ins = [x.data_ptr(), rows.data_ptr(), slots.data_ptr()]
    ins += [tensor.data_ptr() for tensor in (scale, end) if tensor is not None]
    into = out.data_ptr()
    stride, tokens, divisor, distance = laid(x, num_tokens)
    dtype = JAX_DTYPES[out.dtype]
    config = dispatch_kernels.config_for(num_rows, rows.numel(), width, dtype, _platform(), clear=clear)
    kernel = _dispatch(
        x.dtype,
        out.dtype,
        None if scale is None else scale.dtype,
        num_slots,
        width,
        stride,
        tokens,
        divisor,
        rows_for(num_rows, width, out.itemsize),
        end is not None,
        config,
        aligned(*ins, into),
        x.get_device(),
    )
    (programs,) = dispatch_kernels.grid_for(num_tokens, num_rows, width, config)
    kernel(programs, 1, *ins, num_tokens, num_rows, *distance, into)


@functools.cache
def _combine(
    x: torch.dtype,
    weights: torch.dtype | None,
    num_slots: int,
    width: int,
    stride: int,
    rows: int,
    divisor: int,
    tokens: int,
    ends: bool,
    config: combine_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    return build(
        combine_kernels.combine,
        device,
        is_aligned,
        divisor=divisor,
        x=shape(x, rows, stride),
        rows=shape(INT32, tokens, num_slots),
        weights=None if weights is None else shape(weights, tokens, num_slots),
        end=shape(INT32, 2) if ends else None,
        width=width,
        config=config,
    )[0]


def combine(
    x: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    end: torch.Tensor | None = None,
) -> None:
    """Fills `out` [T, H] with the sums of rows of x [M, H], weighted where there are weights [T, S].

    Rows at or past `end`, int64 [1], are left out.
    """
    (num_tokens, num_slots), (num_rows, width) = rows.shape, x.shape
    if out.numel() == 0 or num_rows == 0:
        out.zero_()
        return
    ins = [x.data_ptr(), rows.data_ptr()]
    if weights is not None:
        ins.append(weights.data_ptr())
    into = out.data_ptr()
    is_aligned = aligned(*ins, into)
    if end is not None:
        ins.append(end.data_ptr())  # its low word, read by itself: it may lie anywhere
    dtype, of_weights = x.dtype, None if weights is None else weights.dtype
    sizes = num_tokens, num_slots, num_rows, width, row_stride(x)
    kernel, grid, distance = _planned_combine(dtype, of_weights, sizes, end is not None, is_aligned, x.get_device())
    kernel(*grid, *ins, *distance, into)


@remembered
def _planned_combine(
    dtype: torch.dtype,
    weights: torch.dtype | None,
    sizes: tuple[int, int, int, int, int],  # tokens, slots, rows, their width, and how far apart they lie
    ends: bool,
    is_aligned: bool,
    device: int,
) -> tuple[Kernel, tuple[int, int], tuple[int, ...]]:
    """The kernel, its programs, and what to pass between the addresses."""
    num_tokens, num_slots, num_rows, width, apart = sizes
    stride, many, divisor, distance = lying(apart, width, num_rows, dtype.itemsize)
    config = combine_kernels.config_for(num_tokens, num_slots, width, JAX_DTYPES[dtype], _platform())
    tokens = rows_for(num_tokens, width, dtype.itemsize)
    kernel = _combine(dtype, weights, num_slots, width, stride, many, divisor, tokens, ends, config, is_aligned, device)
    return kernel, combine_kernels.grid_for(num_tokens, width, config), distance


@functools.cache
def _weight_grad(
    x: torch.dtype,
    dy: torch.dtype,
    out: torch.dtype,
    num_slots: int,
    width: int,
    stride: int,
    rows: int,
    divisor: int,
    tokens: int,
    is_aligned: bool,
    device: int,
) -> Kernel:
    return build(
        combine_kernels.combine_weight_grad,
        device,
        is_aligned,
        divisor=divisor,
        x=shape(x, rows, stride),
        dy=shape(dy, tokens, width),
        rows=shape(INT32, tokens, num_slots),
        dtype=JAX_DTYPES[out],
    )[0]


def combine_weight_grad(x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` [T, S] with the products of the rows of x [M, H] and dy [T, H]."""
    (num_tokens, num_slots), (num_rows, width) = rows.shape, x.shape
    if 0 in (num_tokens, num_rows, width):
        out.zero_()
        return
    ins, into = [tensor.data_ptr() for tensor in (x, dy, rows)], out.data_ptr()
    stride, many, divisor, distance = laid(x, num_rows)
    kernel = _weight_grad(
        x.dtype,
        dy.dtype,
        out.dtype,
        num_slots,
        width,
        stride,
        many,
        divisor,
        rows_for(num_tokens, width, dy.itemsize),
        aligned(*ins, into),
        x.get_device(),
    )
    kernel(num_tokens, 1, *ins, *distance, into)
