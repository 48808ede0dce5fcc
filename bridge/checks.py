"""Checks of what comes to the native path: the same demands, in the same words, as jaxmoe makes of arrays."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jaxmoe.dispatch import MOST_ROWS, check_max_rows

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT32 = (torch.int32,)
FLOAT32 = (torch.float32,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_no_gradient(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError where one of the tensors asks for a gradient: what is written in place has none."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"out: expected None where {name} requires grad; use torch.no_grad()")


def check_gradients_of_out(outs: dict[str, torch.Tensor | None], **tensors: torch.Tensor | None) -> None:
    """Raises ValueError where what is written to, or one of the tensors that are read, asks for a gradient.

    To be called before the op, where torch.compile sees it: what it hands to the op has lost that.
    """
    check_no_gradient(**tensors)
    for name, tensor in outs.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor without requires_grad, got one that requires grad")


def check(name: str, tensor: Any, sizes: Sequence[Any], dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raises ValueError unless `tensor` has one of `dtypes` and these sizes; a letter stands for any."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in dtypes:
        shape = tensor.shape  # once: each time it is made
        if shape == sizes:
            return
        if len(shape) == len(sizes):
            for want, have in zip(sizes, shape, strict=True):
                if type(want) is not str and want != have:
                    break
            else:
                return
    wanted = f"{' or '.join(map(_name, dtypes))} [{', '.join(map(str, sizes))}]"
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor {wanted}, got {type(tensor).__name__}")
    raise ValueError(f"{name}: expected {wanted}, got {_name(tensor.dtype)}{list(tensor.shape)}")


def check_at_least_one(name: str, tensor: torch.Tensor, axis: int) -> None:
    """Raises ValueError where `tensor` is empty along `axis`."""
    if tensor.shape[axis] < 1:
        got = f"{_name(tensor.dtype)}{list(tensor.shape)}"
        raise ValueError(f"{name}: expected at least one element along axis {axis}, got {got}")


def most_rows(max_rows: Any, align: int) -> Any:
    """`max_rows` of a plan, checked; an int of numpy's as one, and no larger than a plan can be.

    Not by `as_int`: where it goes with the tokens, torch.compile has one graph for many of them. Of a number that it
    does not know the op that takes it checks the value.
    """
    if isinstance(max_rows, np.integer):
        max_rows = operator.index(max_rows)
    traced = torch.compiler.is_compiling() and isinstance(max_rows, int) and not isinstance(max_rows, bool)
    if not traced and not isinstance(max_rows, torch.SymInt):
        check_max_rows(max_rows, align)
        return max_rows and min(max_rows, MOST_ROWS // align * align)  # an op takes 64 bits
    return max_rows


def check_layout(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless the tensors are contiguous and lie on `device`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of the first argument, {device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for {list(tensor.shape)}; "
                f"pass {name}.contiguous()"
            )


def row_stride(name: str, tensor: torch.Tensor) -> int:
    """How far apart the rows of a matrix lie; raises ValueError unless each row is contiguous, and rows are apart."""
    height, width = tensor.shape
    apart, inner = tensor.stride()
    if inner == 1 and apart == width:  # first, since torch.compile may not know how many rows there are
        return width
    if height and ((inner != 1 and width > 1) or (apart < width and height > 1)):
        raise ValueError(
            f"{name}: expected rows that lie apart or a contiguous tensor, got strides {tensor.stride()} for "
            f"{list(tensor.shape)}; pass {name}.contiguous()"
        )
    return apart if height > 1 else width


def check_out(outs: dict[str, torch.Tensor | None], ins: dict[str, torch.Tensor | None]) -> None:
    """Raises ValueError where writing to `outs` would reach another tensor's memory or a graph of autograd."""
    check_gradients_of_out(outs, **ins)
    taken = [(name, *extent(tensor)) for name, tensor in ins.items() if tensor is not None]
    for name, tensor in outs.items():
        if tensor is None:
            continue
        begin, end = extent(tensor)
        for other, first, last in taken:
            if begin < last and first < end:
                raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")
        taken.append((name, begin, end))


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to behind its last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
