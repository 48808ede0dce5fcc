"""One memory, two frameworks: torch tensors as JAX arrays and back, in the order of torch's current stream."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch._subclasses import FakeTensor

from jaxmoe import Columns

# XLA copies what is less aligned on the CPU; on GPUs Pallas lets the compiler assume 32 bytes.
ALIGNMENT = {"cpu": 64, "cuda": 32}
CPU_MEMORY = 1  # what DLPack calls it; CUDA's pinned host memory is another kind


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A torch tensor as a JAX array: a view of the same memory.

    JAX takes its arrays for constant: do not write to the tensor while JAX may still read the array.

    Args:
      tensor: on a CPU or GPU that JAX sees too, contiguous, at an address that is a multiple of 64 bytes on the CPU and
        of 32 on a GPU (torch allocates so; slices may start elsewhere), of a dtype that JAX keeps: no int64 or float64
        unless JAX is in 64-bit mode. On a GPU the array is ready after what torch's current stream holds now.

    Returns:
      The array; it keeps the tensor's memory alive.

    Raises:
      ValueError: the tensor cannot be viewed: nothing is ever copied or cast. Also where it requires a gradient and
        gradients are enabled: JAX would not pass one back.

    Example:
      >>> import torch, bridge
      >>> tensor = torch.ones(2, 3)
      >>> array = bridge.to_jax(tensor)
      >>> array.unsafe_buffer_pointer() == tensor.data_ptr()
      True
      >>> bridge.to_jax(tensor.T)
      Traceback (most recent call last):
          ...
      ValueError: tensor: expected a contiguous tensor, got strides (1, 3) for [3, 2]; pass tensor.contiguous()
    """
    check_tensor("tensor", tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("tensor: expected one without requires_grad, got one that requires grad; pass tensor.detach()")
    return import_tensor("tensor", tensor)


def to_torch(array: jax.Array) -> torch.Tensor:
    """A JAX array as a torch tensor: a view of the same memory.

    JAX takes its arrays for constant: write to the tensor only where nobody reads the array any more.

    Args:
      array: on one device, a CPU or a GPU that torch sees too. On a GPU torch's current stream waits for the array.

    Returns:
      The tensor. It keeps the array's memory alive, on a GPU until the stream it was handed to has done what it held
      when the tensor died; as with torch's own memory, another stream's work must keep the tensor alive itself.

    Raises:
      ValueError: the array cannot be viewed.

    Example:
      >>> import jax.numpy as jnp, bridge
      >>> array = jnp.arange(3)
      >>> tensor = bridge.to_torch(array)
      >>> tensor.dtype, tensor.tolist(), tensor.data_ptr() == array.unsafe_buffer_pointer()
      (torch.int32, [0, 1, 2], True)
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise ValueError(f"array: expected a jax.Array with values, got {type(array).__name__}")
    if len(array.devices()) != 1:
        raise ValueError(f"array: expected an array on one device, got one on {len(array.devices())}")
    if jnp.issubdtype(array.dtype, jax.dtypes.extended) or not jax.dlpack.is_supported_dtype(array.dtype):
        raise ValueError(f"array: expected a dtype that DLPack carries, got {array.dtype}")
    (device,) = array.devices()
    if device.platform != "cpu" and not (device.platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available()):
        raise ValueError(f"array: expected an array on a device that torch sees, got one on {device}")
    return export_array(array)


def export_array(array: jax.Array) -> torch.Tensor:
    """The view, without the checks."""
    tensor = torch.from_dlpack(array)  # on a GPU its current stream now waits for the array; a CPU's array is ready
    if tensor.is_cuda:
        _release()
        stream = torch.cuda.current_stream(tensor.device)
        weakref.finalize(tensor.untyped_storage(), _retire, array, stream).atexit = False
    return tensor


# JAX may use an array's memory again as soon as the array dies, and does not know what torch's streams still read.
_retired: deque[tuple[torch.cuda.Event, jax.Array]] = deque()


def _retire(array: jax.Array, stream: torch.cuda.Stream) -> None:
    """Keeps the array of a tensor that has died until the stream is past all that may read it."""
    _retired.append((stream.record_event(), array))


def _release() -> None:
    for _ in range(len(_retired)):
        try:
            event, array = _retired.popleft()
        except IndexError:  # another thread was faster
            return
        if not event.query():
            _retired.append((event, array))


@functools.cache
def _seen_by_jax(device: torch.device) -> bool:
    platform = "cpu" if device.type == "cpu" else "rocm" if torch.version.hip else "cuda"
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:  # how JAX says that it has no such platform
        return False
    return device.type == "cpu" or device.index in [d.local_hardware_id for d in devices]


def _has_memory(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor):
        return False
    try:
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # how a wrapper says that it has none
        return False


def check_tensor(name: str, value: Any) -> None:
    """Raises ValueError unless JAX can hold the tensor's device and dtype."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    device = value.device
    if device.type not in ALIGNMENT or value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor on a CPU or GPU, got {value.layout} on {device}")
    if not _has_memory(value):
        raise ValueError(
            f"{name}: expected a tensor with memory of its own, got {type(value).__name__} without: one that is fake, "
            "or stands for another within torch.func or a trace"
        )
    if not _seen_by_jax(device):
        raise ValueError(f"{name}: expected a device that JAX sees, one of {jax.local_devices()}, got {device}")
    if device.type == "cpu" and value.__dlpack_device__()[0] != CPU_MEMORY:
        raise ValueError(f"{name}: expected ordinary CPU memory, got pinned memory")
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        kept = jax.dlpack.is_supported_dtype(dtype) and jax.dtypes.canonicalize_dtype(dtype) == dtype
    except TypeError:  # a dtype that numpy does not know
        kept = False
    if not kept:
        instead = f", pass {name}.int()" if dtype == "int64" else ""
        raise ValueError(
            f"{name}: expected a dtype that JAX keeps as it is, got {dtype}; nothing is cast here{instead}"
        )


def import_tensor(name: str, tensor: torch.Tensor, wanted: str = "a contiguous tensor") -> jax.Array:
    """The view of a checked tensor."""
    if tensor.is_neg():
        raise ValueError(f"{name}: expected {wanted}, got a view that negates another; pass {name}.resolve_neg()")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected {wanted}, got strides {tensor.stride()} for {list(tensor.shape)}; "
            f"pass {name}.contiguous()"
        )
    if not is_aligned(tensor):
        raise ValueError(
            f"{name}: expected an address that is a multiple of {ALIGNMENT[tensor.device.type]} bytes, "
            f"got {tensor.data_ptr():#x}; pass {name}.clone()"
        )
    return _import(tensor)


def import_rows(name: str, tensor: torch.Tensor) -> jax.Array | Columns:
    """The view of a checked tensor whose rows may lie apart: as columns of a wider array then."""
    apart = tensor.ndim == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]
    if apart and not tensor.is_contiguous() and not tensor.is_neg():
        return _import_columns(name, tensor)
    return import_tensor(name, tensor, "rows that lie apart or a contiguous tensor")


def import_leaf(name: str, value: Any, strided: bool) -> Any:
    """The view of a tensor; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return import_rows(name, value) if strided else import_tensor(name, value)


Layout = tuple[int, int, int] | None  # of columns: of the array that they are of its width, the first, how many


def layout_of(array: Any) -> Layout:
    """How the rows of what `import_leaf` returned lie; None where they follow one another."""
    return (array.array.shape[1], array.first, array.width) if isinstance(array, Columns) else None


def import_laid(name: str, tensor: torch.Tensor, layout: Layout) -> Any:
    """The view of a tensor that was viewed in this layout; where it has been moved out of it, of a copy."""
    if layout is None:
        return import_tensor(name, made_dense(tensor))
    stride, first, width = layout
    if tensor.stride() == (stride, 1) and not tensor.is_neg():
        with contextlib.suppress(ValueError):  # the same strides, but in a storage that ends with the last row
            found = import_rows(name, tensor)
            if layout_of(found) == layout:
                return found
    rows = tensor.new_empty(tensor.shape[0], stride)
    rows[:, first : first + width] = tensor
    return Columns(_import(rows), first, width)


def made_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, where JAX cannot view it: of what autograd hands over, which is not the user's to mend."""
    if tensor.is_contiguous() and is_aligned(tensor) and not tensor.is_neg():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def is_view(weight: Any) -> bool:
    """Whether a stack of weights is the transpose of what lies in memory."""
    is_stack = isinstance(weight, torch.Tensor) and weight.ndim == 3
    return is_stack and not weight.is_contiguous() and weight.mT.is_contiguous()


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether JAX takes the tensor's address."""
    return tensor.data_ptr() % ALIGNMENT[tensor.device.type] == 0


def _import(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    # torch exports from its current device only; it makes JAX's stream wait for its current stream there.
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        return jax.dlpack.from_dlpack(tensor, copy=False)


def _import_columns(name: str, tensor: torch.Tensor) -> Columns:
    """The tensor as columns of whole rows: those start `first` elements earlier, aligned and inside the storage."""
    (height, width), stride, size = tensor.shape, tensor.stride(0), tensor.element_size()
    align, offset = ALIGNMENT[tensor.device.type], int(tensor.storage_offset())
    stored = tensor.untyped_storage().nbytes() // size
    least = max(0, offset + height * stride - stored)
    first = least + (tensor.data_ptr() // size - least) % (align // size)
    if tensor.data_ptr() % size or first > min(offset, stride - width):
        raise ValueError(
            f"{name}: expected columns of rows that lie in the storage from a multiple of {align} bytes on, got "
            f"{list(tensor.shape)} with strides {tensor.stride()} at {tensor.data_ptr():#x}; pass {name}.contiguous()"
        )
    return Columns(_import(tensor.as_strided((height, stride), (stride, 1), offset - first)), first, width)
