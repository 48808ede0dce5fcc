"""Which of the two paths a call takes: the torch ops, native on a GPU, or DLPack and JAX's runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from bridge.native.build import target_of

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors is run as it comes, and nobody asks for their gradients.

    Then results can be allocated here and filled in place, which saves what torch does around an op that has a gradient
    (20 microseconds). Not while torch traces, and not where tangents are carried along (torch.autograd.forward_ad).
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    with_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (with_gradients and tensor.requires_grad)):
            return False
    return True


_runs_natively: dict[int, bool] = {}  # by device


def _find_out(device: int) -> bool:
    try:
        target_of(device)
        _runs_natively[device] = True
    except ValueError:  # a GPU that the kernels do not run on: jaxmoe has XLA for it
        _runs_natively[device] = False
    return _runs_natively[device]


def runs_natively(tensor: torch.Tensor) -> bool:
    """Whether this tensor lies on a GPU that the kernels run on."""
    if not tensor.is_cuda:
        return False
    device = tensor.get_device()
    natively = _runs_natively.get(device)
    return _find_out(device) if natively is None else natively


def takes_ops(tensor: Any, implementation: str | None) -> bool:
    """Whether a call on this tensor goes through the torch ops.

    With implementation=None: on a GPU that the kernels run on, and wherever torch traces (torch.compile, fake tensors).
    "native" asks for it; raises ValueError where the tensor is not on such a GPU. Every other name is a matter of JAX.
    """
    if implementation is None:
        if torch.compiler.is_compiling():
            return True
        kind = type(tensor)
        if kind not in _PLAIN:
            return isinstance(tensor, torch.Tensor)
        return runs_natively(tensor)
    if implementation != "native":
        return False
    if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
        got = f"one on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"implementation: 'native' needs tensors on a GPU, got {got}")
    target_of(tensor.get_device())  # says what is wrong
    return True
