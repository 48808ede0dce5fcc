"""Whether tensors are like others: what torch.compile asks before it runs what it has compiled.

One call into C++ compares kind, dtype, device, sizes, strides and whether a gradient is asked for, in a tenth of the
time that Python takes to look at each. The name is private to torch: tried with 2.11 and 2.13. Where there is none,
nothing is alike, and every call is checked in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from torch._C._dynamo import guards

    TensorGuards: Any = guards.TensorGuards
except (ImportError, AttributeError):
    TensorGuards = None


def alike(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """A function that says whether as many tensors have these tensors' kinds, shapes and places, under the same modes.

    It does not look at what they hold nor where. Other numbers of tensors raise.
    """
    if TensorGuards is None:
        return None
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guard = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guard.check
    return check
