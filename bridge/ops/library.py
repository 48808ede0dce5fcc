"""How a torch op of the namespace `jaxmoe` is made.

On CUDA and ROCm tensors an op launches the Pallas kernels natively. On CPU tensors it runs jaxmoe through DLPack, which
is what makes torch.compile and opcheck work on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bridge import path
from bridge.autograd import once
from bridge.views import is_aligned, is_view, made_dense

LIBRARY = torch.library.Library("jaxmoe", "DEF")


def _slice(tensor: torch.Tensor, axis: int | None, index: int) -> torch.Tensor:
    """One of a batch. On a CPU a copy: JAX takes few addresses there, and torch's slices are not the user's to mend."""
    if axis is None:
        return tensor
    found = tensor.select(axis, index)
    if found.device.type != "cpu":
        return found
    return found.clone(memory_format=torch.preserve_format if is_view(found) else torch.contiguous_format)


def _mended(tensor: torch.Tensor) -> torch.Tensor:
    """`made_dense`, but for weights that lie transposed, which are read as they lie."""
    return tensor if is_view(tensor) and is_aligned(tensor) else made_dense(tensor)


def register_batch(name: str, op: Callable[..., Any]) -> None:
    """The rule of an op for torch.func.vmap: a call for each."""

    def rule(info: Any, axes: tuple[int | None, ...], *args: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError(f"vmap: expected at least one element along the axis that is mapped, got 0 for {op}")
        each = [
            op(*(_slice(arg, axis, i) for arg, axis in zip(args, axes, strict=True))) for i in range(info.batch_size)
        ]
        if isinstance(each[0], torch.Tensor):
            return torch.stack(each), 0
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])

    torch.library.register_vmap(f"jaxmoe::{name}", rule, lib=LIBRARY)


def where_it_runs(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU that the kernels do not run on, through JAX's runtime, as on a CPU: a drop-in asks for no path."""

    def run(first: torch.Tensor, *rest: Any) -> Any:
        if path.runs_natively(first):
            return native(first, *rest)
        with torch.no_grad():
            return plain(first, *rest)

    return run


def define(
    schema: str,
    *,
    native: Callable[..., Any],
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines jaxmoe::name and returns the op.

    Args:
      schema: of the op, name first.
      native: on CUDA and ROCm tensors.
      plain: on CPU tensors.
      fake: shapes and dtypes alone; checks the arguments like the others.
      backward: as torch.library.register_autograd takes it; None where nothing has a gradient.
      setup_context: likewise.
    """
    name = schema.partition("(")[0]

    # What a backward pass is given, from autograd or from hooks that moved what was saved, is not the user's to mend.
    mended = name.endswith("_backward") and "!" not in schema

    def without_gradient(*args: Any) -> Any:
        if mended:
            args = tuple(_mended(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        with torch.no_grad():  # autograd is above; the DLPack bridge would start a graph of its own
            return plain(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, native, "CUDA")
    LIBRARY.impl(name, without_gradient, "CPU")
    torch.library.register_fake(f"jaxmoe::{name}", fake, lib=LIBRARY)
    if backward is None:  # nothing above the kernels; those that write in place refuse what asks for a gradient
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(f"jaxmoe::{name}", once(backward), setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.jaxmoe, name).default
    if "!" not in schema:
        register_batch(name, op)
    return op
