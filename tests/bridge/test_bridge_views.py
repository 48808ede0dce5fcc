"""to_jax and to_torch: views of one memory, and what cannot be one refused by name."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0, 4), (4, 0), (1, 64)], ids=str)
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """The same values, shape, dtype and address there and back."""
    tensor = torch.arange(np.prod(shape, dtype=int), device=device).reshape(shape).to(dtype)
    array = bridge.to_jax(tensor)
    back = bridge.to_torch(array)
    assert array.shape == shape
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert (back.dtype, back.device) == (dtype, device)
    assert torch.equal(back, tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr() == back.data_ptr()


def test_writes_are_seen(device: torch.device) -> None:
    """One memory, not two that happen to be equal."""
    array = jnp.zeros(4)
    tensor = bridge.to_torch(array)
    tensor[1] = 5
    assert bridge.to_torch(array).tolist() == [0, 5, 0, 0]


def test_views_keep_the_memory(device: torch.device) -> None:
    """The last of the two holders frees it, not the first."""
    tensor = bridge.to_torch(jnp.arange(1000) + 1)
    array = bridge.to_jax(torch.arange(1000, dtype=torch.int32, device=device) + 1)
    gc.collect()
    assert int(tensor.sum()) == int(jnp.sum(array)) == 500500
    kept = torch.ones(8, device=device)
    storage, array = weakref.ref(kept.untyped_storage()), bridge.to_jax(kept)
    del kept
    gc.collect()
    assert storage() is not None
    del array
    gc.collect()
    assert storage() is None


def test_array_lies_where_the_tensor_does(device: torch.device) -> None:
    """Committed to its device, or JAX would move a CPU tensor to the GPU it computes on by default."""
    array = bridge.to_jax(torch.ones(3, device=device))
    assert array.committed
    assert (array + 1).devices() == array.devices()


REFUSED_TENSORS = {
    "int64": (
        lambda: torch.arange(3),
        r"expected a dtype that JAX keeps as it is, got int64; nothing is cast here, pass tensor.int\(\)",
    ),
    "float64": (lambda: torch.zeros(3, dtype=torch.float64), "expected a dtype that JAX keeps as it is, got float64"),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "expected a dtype that JAX keeps as it is, got float8"),
    "complex32": (
        lambda: torch.zeros(3, dtype=torch.complex64).chalf(),
        "expected a dtype that JAX keeps .* complex32",
    ),
    "transposed": (lambda: torch.zeros(2, 3).T, r"expected a contiguous tensor, got strides \(1, 3\)"),
    "expanded": (lambda: torch.zeros(1, 3).expand(2, 3), r"expected a contiguous tensor, got strides \(0, 1\)"),
    "columns": (lambda: torch.zeros(4, 64)[:, :16], r"expected a contiguous tensor, got strides \(64, 1\)"),
    "negated": (
        lambda: torch.zeros(1, dtype=torch.complex64).conj().imag,
        r"expected a contiguous tensor, got a view that negates another; pass tensor.resolve_neg\(\)",
    ),
    "unaligned": (
        lambda: torch.zeros(64)[1:],
        "expected an address that is a multiple of 64 bytes, got 0x.*; pass tensor.clone",
    ),
    "gradient": (lambda: torch.zeros(3, requires_grad=True), "expected one without requires_grad"),
    "meta": (
        lambda: torch.zeros(3, device="meta"),
        "expected a dense tensor on a CPU or GPU, got torch.strided on meta",
    ),
    "sparse": (lambda: torch.zeros(3, 3).to_sparse(), "expected a dense tensor on a CPU or GPU, got torch.sparse_coo"),
    "array": (lambda: np.zeros(3, np.float32), "expected a torch.Tensor, got ndarray"),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("kind", REFUSED_TENSORS)
def test_to_jax_refuses(kind: str) -> None:
    """Whatever JAX could take only by copying, casting or forgetting something."""
    make, message = REFUSED_TENSORS[kind]
    with pytest.raises(ValueError, match="^tensor: " + message):
        bridge.to_jax(make())


def test_to_jax_without_gradients() -> None:
    """Under no_grad a parameter has no gradient to lose."""
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert bridge.to_jax(parameter).unsafe_buffer_pointer() == parameter.data_ptr()


def test_64_bits_where_jax_has_them() -> None:
    """The refusal is of a cast, not of the dtype."""
    with jax.enable_x64(True):
        assert bridge.to_jax(torch.arange(3)).dtype == jnp.int64


def test_device_that_jax_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA next to a JAX without."""
    monkeypatch.setattr(bridge.views, "_seen_by_jax", lambda device: False)
    with pytest.raises(ValueError, match=r"tensor: expected a device that JAX sees, one of .*, got cpu"):
        bridge.to_jax(torch.zeros(3))


def test_memory_that_a_stream_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array whose tensor has died is let go when the stream has passed its event, no sooner and no later."""

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    class Stream:
        def record_event(self) -> Event:
            return events.setdefault(self, Event())

    events: dict[Stream, Event] = {}
    slow, fast = Stream(), Stream()
    monkeypatch.setattr(bridge.views, "_retired", bridge.views.deque())
    arrays = [jnp.zeros(3), jnp.ones(3)]
    for array, stream in zip(arrays, (slow, fast), strict=True):
        bridge.views._retire(array, stream)
    events[fast].done = True
    bridge.views._release()
    assert [array is arrays[0] for _, array in bridge.views._retired] == [True]
    events[slow].done = True
    bridge.views._release()
    assert not bridge.views._retired


def traced() -> Any:
    seen: list[Any] = []
    jax.jit(lambda x: seen.append(x) or x)(1.0)
    return seen[0]


REFUSED_ARRAYS = {
    "tracer": (traced, "expected a jax.Array with values, got .*Tracer"),
    "numpy": (lambda: np.zeros(3), "expected a jax.Array with values, got ndarray"),
    "key": (lambda: jax.random.key(0), "expected a dtype that DLPack carries, got key"),
    "float8": (lambda: jnp.zeros(3, jnp.float8_e4m3fn), "expected a dtype that DLPack carries, got float8_e4m3fn"),
}


@pytest.mark.parametrize("kind", REFUSED_ARRAYS)
def test_to_torch_refuses(kind: str) -> None:
    """What has no memory, or none that torch can read."""
    make, message = REFUSED_ARRAYS[kind]
    with pytest.raises(ValueError, match=re.compile("^array: " + message)):
        bridge.to_torch(make())
