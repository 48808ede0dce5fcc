"""Launches of the grouped matmul kernels, on tensors that have been checked.

A weight is [E, K, N], or a transposed view of one that lies in memory as [E, N, K].
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bridge.native import build as building
from bridge.native.build import JAX_DTYPES, aligned, build, lying, row_stride, rows_for, shape
from bridge.native.driver import Kernel
from jaxmoe.grouped_matmul import ANY, Groups
from kernels_pallas import gated_grad as gated_kernels
from kernels_pallas import grouped_matmul as kernels
from kernels_pallas import grouped_matmul_grad as grad_kernels
from kernels_pallas.launch import remembered

INT32 = torch.int32


def _platform() -> str:
    return "rocm" if torch.version.hip else "cuda"


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether [E, K, N] lies in memory as [E, N, K]."""
    return not weight.is_contiguous()


@functools.cache
def _matmul(
    dtype: torch.dtype,
    sizes: tuple[int, ...],  # of the weight as it lies in memory
    activation: str | None,
    keep: bool,
    transposed: bool,
    rows: int,
    gathered: tuple[int, int, int, int] | None,  # the stride, tokens and divisor of `laid`, and slots a token
    clear: bool,
    config: kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    depth = sizes[2 if transposed else 1]
    arrays: dict[str, Any] = {"rows": shape(dtype, rows, depth)}
    static: dict[str, Any] = {"transposed": transposed, "clear": clear, "config": config}
    function: Any = kernels.grouped_matmul
    if activation is None:
        arrays["weight"] = shape(dtype, *sizes)
    else:
        arrays["gate_up"] = shape(dtype, *sizes)
        static |= {"activation": activation, "keep": keep}
        function = kernels.gated_matmul
    arrays["group_sizes"] = shape(INT32, sizes[0])
    if gathered:
        stride, tokens, static["divisor"], static["num_slots"] = gathered
        arrays |= {"rows": shape(dtype, tokens, stride), "slots": shape(INT32, rows)}
    return build(function, device, is_aligned, **arrays, **static)[0]


@remembered
def _planned(
    dtype: torch.dtype,
    sizes: tuple[int, ...],  # of the weight, [E, K, N]
    activation: str | None,
    keep: bool,
    transposed: bool,
    num_rows: int,
    gathered: tuple[int, int, int] | None,  # tokens, how far apart they lie, and slots a token
    groups: Groups,
    is_aligned: bool,
    device: int,
) -> tuple[Kernel, int, tuple[int, ...]]:
    """The kernel, its programs, and what to pass behind the number of rows."""
    num_experts, depth, columns = sizes
    width = columns if activation is None else columns // 2
    config = kernels.config_for(
        groups.expected or num_rows,
        num_experts,
        depth,
        width,
        JAX_DTYPES[dtype],
        _platform(),
        gated=activation is not None,
        room=building.target_of(device).shared_bytes,
    )
    lies: tuple[int, int, int, int] | None = None
    distance: tuple[int, ...] = ()
    if gathered:
        num_tokens, apart, num_slots = gathered
        stride, tokens, divisor, distance = lying(apart, depth, num_tokens, dtype.itemsize)
        lies = stride, tokens, divisor, num_slots
    in_memory = (num_experts, columns, depth) if transposed else (num_experts, depth, columns)
    rows = rows_for(num_rows, max(depth, columns if keep else width), dtype.itemsize)
    kernel = _matmul(
        dtype, in_memory, activation, keep, transposed, rows, lies, groups.clear, config, is_aligned, device
    )
    (programs,) = kernels.grid_for(num_rows, num_experts, width, config)
    return kernel, programs, distance


def _run(
    rows: torch.Tensor,
    weight: torch.Tensor,
    group_sizes: torch.Tensor,
    activation: str | None,
    *outs: torch.Tensor,
    groups: Groups,
    slots: torch.Tensor | None = None,
    num_slots: int = 0,
) -> None:
    (num_rows, width), (num_tokens, depth) = outs[0].shape, rows.shape
    if 0 in (num_rows, width, num_tokens, depth):
        for out in outs:
            out.zero_()
        return
    ins, into = [tensor.data_ptr() for tensor in (rows, weight, group_sizes)], [out.data_ptr() for out in outs]
    gathered = None
    if slots is not None:
        ins.append(slots.data_ptr())
        gathered = num_tokens, row_stride(rows), num_slots
    is_aligned, device = aligned(*ins, *into), rows.get_device()
    sizes, keep, transposed = weight.shape, len(outs) > 1, is_transposed(weight)
    kernel, programs, distance = _planned(
        rows.dtype, sizes, activation, keep, transposed, num_rows, gathered, groups, is_aligned, device
    )
    kernel(programs, 1, *ins, num_rows, *distance, *into)


def grouped_matmul(
    rows: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor, out: torch.Tensor, *, groups: Groups = ANY
) -> None:
    """Fills `out` [M, N] with each group of rows [M, K] times its weight."""
    _run(rows, weight, group_sizes, None, out, groups=groups)


def gated_matmul(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    group_sizes: torch.Tensor,
    activation: str,
    *outs: torch.Tensor,
    slots: torch.Tensor | None = None,
    num_slots: int = 0,
    groups: Groups = ANY,
) -> None:
    """Fills the first of `outs`, [M, I], with activation(gate) * up, and a second with gate and up side by side.

    With a plan's slots [M] `rows` are the tokens [T, H], which may lie apart: row i is token slots[i] // num_slots.
    """
    _run(rows, gate_up, group_sizes, activation, *outs, groups=groups, slots=slots, num_slots=num_slots)


@functools.cache
def _gated_grad(
    dtype: torch.dtype,
    width: int,
    scaled: bool,
    ends: bool,
    activation: str,
    rows: int,
    is_aligned: bool,
    device: int,
) -> Kernel:
    kept, grad = shape(dtype, rows, 2 * width), shape(dtype, rows, width)
    arrays: dict[str, Any] = {"kept": kept, "grad": grad, "scale": shape(torch.float32, rows) if scaled else None}
    arrays["end"] = shape(INT32, 1) if ends else None
    return build(gated_kernels.gated_grad, device, is_aligned, **arrays, activation=activation)[0]


def gated_grad(
    kept: torch.Tensor,
    grad: torch.Tensor,
    activation: str,
    dkept: torch.Tensor,
    hidden: torch.Tensor,
    scale: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> None:
    """Fills `dkept` [M, 2 * I] and `hidden` [M, I] from gate and up, both times `scale` [M].

    `dkept` may be `kept`, and `hidden` may be `grad`: all that is read of a place is read before it is written.

    With a scale, float32, also fills `dots` float32 [M] with hidden . grad before it is scaled. Rows at or past `end`,
    int32 [1], hold nothing.
    """
    num_rows, width = grad.shape
    if 0 in grad.shape:
        if dots is not None:
            dots.zero_()
        return
    ins = [tensor.data_ptr() for tensor in (kept, grad, scale, end) if tensor is not None]
    outs = [tensor.data_ptr() for tensor in (dkept, hidden, *([] if dots is None else [dots]))]
    rows = rows_for(num_rows, 2 * width, kept.itemsize)
    is_aligned, device = aligned(*ins, *outs), kept.get_device()
    kernel = _gated_grad(kept.dtype, width, scale is not None, end is not None, activation, rows, is_aligned, device)
    kernel(num_rows, 1, *ins, *outs)


@functools.cache
def _outer(
    dtype: torch.dtype,
    experts: int,
    left: int,
    right: int,
    rows: int,
    config: grad_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    arrays: dict[str, Any] = {
        "a": shape(dtype, rows, left),
        "b": shape(dtype, rows, right),
        "group_sizes": shape(INT32, experts),
    }
    return build(grad_kernels.grouped_outer, device, is_aligned, **arrays, config=config)[0]


def grouped_outer(
    a: torch.Tensor, b: torch.Tensor, group_sizes: torch.Tensor, out: torch.Tensor, *, groups: Groups = ANY
) -> None:
    """Fills `out` [E, A, B], or a transposed view of [E, B, A], with each expert's a.T @ b."""
    if is_transposed(out):
        a, b, out = b, a, out.mT
    (num_rows, left), right, num_experts = a.shape, b.shape[1], group_sizes.shape[0]
    if 0 in (num_rows, left, right):
        out.zero_()
        return
    config = grad_kernels.config_for(
        groups.expected or num_rows, num_experts, left, right, JAX_DTYPES[a.dtype], _platform()
    )
    ins, into = [tensor.data_ptr() for tensor in (a, b, group_sizes)], out.data_ptr()
    rows = rows_for(num_rows, max(left, right), a.itemsize)
    kernel = _outer(a.dtype, num_experts, left, right, rows, config, aligned(*ins, into), a.get_device())
    (programs,) = grad_kernels.grid_for(num_experts, left, right, config)
    kernel(programs, 1, *ins, num_rows, into)
