"""How every function of the bridge runs: views of the tensors in, the jaxmoe function, views of its results out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch

from bridge import autograd, path
from bridge.views import ALIGNMENT, check_tensor, export_array, import_leaf, import_tensor, is_aligned

Named = list[tuple[str, Any]]


@path.untraced
def call(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    options: dict[str, Any],
    *,
    strided: Sequence[str] = (),
    no_gradient: Sequence[str] = (),
    out: Any = None,
) -> Any:
    """function(**arguments, **options) on views.

    Args:
      function: of jaxmoe; checks shapes and dtypes.
      arguments: pytrees of tensors, and of numpy scalars.
      options: whatever else it takes; hashable where gradients are asked for.
      strided: the arguments whose rows may lie apart.
      no_gradient: the arguments that get none.
      out: a pytree of tensors that the function can take as `out`, for what it returns first; or None.

    Returns:
      What the function returns, tensors in place of arrays, of `out` where it is given; `out` itself if it is for all.
    """
    named, structure = _named(arguments)
    outs, out_structure = _named({} if out is None else {"out": out})
    device = _check(named + outs)
    path.check_no_tangents(**dict(named))
    if device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a call through DLPack cannot be captured in a CUDA graph")
    with _jax_device(device):  # or what is made of shapes alone, as with no tokens, would lie on JAX's first device
        return _call(function, named, structure, outs, out_structure, options, strided, no_gradient, out)


def _jax_device(device: torch.device | None) -> Any:
    if device is None:
        return contextlib.nullcontext()
    platform = "cpu" if device.type == "cpu" else "rocm" if torch.version.hip else "cuda"
    devices = jax.local_devices(backend=platform)
    return jax.default_device(next((d for d in devices if d.local_hardware_id == device.index), devices[0]))


def _call(
    function: Callable[..., Any],
    named: Named,
    structure: Any,
    outs: Named,
    out_structure: Any,
    options: dict[str, Any],
    strided: Sequence[str],
    no_gradient: Sequence[str],
    out: Any,
) -> Any:
    wanted = tuple(
        index
        for index, (name, value) in enumerate(named)
        if isinstance(value, torch.Tensor) and value.requires_grad and name not in no_gradient
    )
    if wanted and torch.is_grad_enabled():
        if outs:
            raise ValueError(f"out: expected None where {named[wanted[0]][0]} requires grad; use torch.no_grad()")
        return autograd.run(function, structure, options, named, strided, wanted)

    leaves = [import_leaf(name, value, name in strided) for name, value in named]
    _check_outs(outs, named)
    out_leaves = [import_tensor(name, value) for name, value in outs]
    results = function(
        **jax.tree.unflatten(structure, leaves), **options, **jax.tree.unflatten(out_structure, out_leaves)
    )
    if out is None:
        return jax.tree.map(export_array, results)
    found, result_structure = jax.tree.flatten(results)
    for (name, tensor), result in zip(outs, found[: len(outs)], strict=True):
        _settle(name, tensor, result)
    if len(found) == len(outs):
        return out
    filled = [*(tensor for _, tensor in outs), *map(export_array, found[len(outs) :])]
    return jax.tree.unflatten(result_structure, filled)


def _named(tree: Any) -> tuple[Named, Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves], structure


def _check(named: Named) -> torch.device | None:
    """The device that all tensors share; None where there is no tensor, which jaxmoe then complains of."""
    first: tuple[str, torch.device] | None = None
    for name, value in named:
        if name == "num_valid_tokens" and isinstance(value, np.int32):
            continue
        check_tensor(name, value)
        first = first or (name, value.device)
        if value.device != first[1]:
            raise ValueError(f"{name}: expected the device of {first[0]}, {first[1]}, got {value.device}")
    return first[1] if first else None


def _check_outs(outs: Named, named: Named) -> None:
    """Raises ValueError where writing would reach other than the memory of `out`, or a graph of autograd."""
    taken = [(name, _extent(value)) for name, value in named if isinstance(value, torch.Tensor)]
    for name, tensor in outs:
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor without requires_grad, got one that requires grad")
        if not (tensor.is_contiguous() and is_aligned(tensor)):
            raise ValueError(
                f"{name}: expected a contiguous tensor from a multiple of {ALIGNMENT[tensor.device.type]} bytes on, "
                f"got strides {tensor.stride()} for {list(tensor.shape)} at {tensor.data_ptr():#x}"
            )
        begin, end = _extent(tensor)
        for other, (first, last) in taken:
            if begin < last and first < end:
                raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")
        taken.append((name, (begin, end)))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _settle(name: str, tensor: torch.Tensor, result: jax.Array) -> None:
    """Makes sure that the result lies in `tensor`: on a GPU JAX wrote it there, on the CPU this is the one copy."""
    view = torch.from_dlpack(result)  # torch's current stream now waits for it
    if tensor.device.type == "cpu":
        tensor.copy_(view)  # JAX does not take over memory that it did not allocate
    elif view.data_ptr() != tensor.data_ptr():
        raise RuntimeError(f"{name}: JAX did not write to the tensor it was given")
    else:
        torch.autograd.graph.increment_version(tensor)  # so that autograd sees the write
