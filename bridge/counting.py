"""What a forward pass does, counted as torch dispatches it and, on a GPU, as the GPU is seen to run it.

On a GPU jaxmoe's kernels are those that the driver launched. Elsewhere the tensors are fake ones, which hold no memory
and take the way of a GPU, and each of jaxmoe's ops stands for the kernels that the function of its name is lowered to.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode

import jaxmoe
from bridge.native import driver
from bridge.native.build import shape
from bridge.native.routing import config_of
from bridge.ops.weighted_experts import LEFT
from jaxmoe import layer
from jaxmoe.command.audit import lowered

Forward = Callable[[], Any]


@dataclass
class Counts:
    """What one forward pass does, by name and number."""

    launches: dict[str, Counter[str]] = field(default_factory=dict)  # kernels, by the function of jaxmoe
    operations: Counter[str] = field(default_factory=Counter)  # the others that compute, a launch each at least
    casts: Counter[str] = field(default_factory=Counter)  # those of them that only change the dtype
    copies: Counter[str] = field(default_factory=Counter)  # those of them that only move
    allocations: int | None = None  # of memory; None where the compiler plans it
    allocated_bytes: int | None = None
    kernels: Counter[str] | None = None  # all that ran on the GPU
    transfers: Counter[str] | None = None  # the GPU's memcpy and memset

    @property
    def ours(self) -> Counter[str]:
        """jaxmoe's kernels."""
        return sum(self.launches.values(), Counter())


# jaxmoe's functions, called as the ops are. How the experts' weights lie changes nothing about the kernels.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "router_logits": jaxmoe.router_logits,
    "route": lambda logits, bias, valid, number, config, return_load: jaxmoe.route(
        logits,
        bias,
        config=config_of(config),
        num_valid_tokens=number if valid is None else valid,
        return_load=return_load,
    ),
    "plan_dispatch": lambda experts, num_experts, align, expert_map, max_rows=None: jaxmoe.plan_dispatch(
        experts, num_experts, align=align, expert_map=expert_map, max_rows=max_rows
    ),
    "dispatch": lambda x, rows, slots, clear=True: jaxmoe.dispatch(x, jaxmoe.DispatchPlan(rows, slots, slots)),
    "experts": lambda rows, gate_up, down, group_sizes, activation: jaxmoe.experts(
        rows, gate_up, down, group_sizes, activation=activation
    ),
    "combine": lambda x, rows, slots, weights: jaxmoe.combine(x, jaxmoe.DispatchPlan(rows, slots, slots), weights),
    "weighted_experts": lambda *args: (layer.weighted_fwd if args[-1] else layer.weighted_experts)(
        (None, args[-2], LEFT), *args[:-3], None
    ),
    "weighted_experts_out": lambda *args: layer.weighted_experts((None, args[-2], LEFT), *args[:-3], args[-1]),
}
# Whose a kernel is, where an op does not have a function's name.
_OF_WEIGHTED = {"gated_matmul": "experts", "grouped_matmul": "experts", "combine": "combine"}
_OWNERS = {
    "route_out": {"route": "route", "count_load": "route"},
    "weighted_experts": _OF_WEIGHTED,
    "weighted_experts_out": _OF_WEIGHTED,
}


@functools.cache
def _kernels_of(op: str, *args: Any) -> Counter[str]:
    """The kernels that one of jaxmoe's ops stands for; shapes in place of tensors."""
    is_array = [isinstance(value, jax.ShapeDtypeStruct) for value in args]

    def fn(*arrays: jax.Array) -> Any:
        left = iter(arrays)
        return _FUNCTIONS[op](*(next(left) if array else value for value, array in zip(args, is_array, strict=True)))

    return lowered(fn, *(value for value, array in zip(args, is_array, strict=True) if array))[0]


@contextlib.contextmanager
def _observed(launched: Counter[str]) -> Iterator[None]:
    """Counts what the driver launches."""
    observe = lambda name, grid: launched.update([name])
    driver.observers.append(observe)
    try:
        yield
    finally:
        driver.observers.remove(observe)


class Recorder(TorchDispatchMode):
    """Counts what torch dispatches while it is entered: what computes, not views.

    Allocations are those of results: what an op needs besides does not show.
    """

    COPIES = ("aten::_to_copy", "aten::clone", "aten::copy_", "aten::copy", "aten::_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.sizes: list[int] = []  # of what was allocated, in bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if func.namespace == "prim":  # asks for a tensor's device and the like
            return func(*args, **kwargs)
        if func.namespace == "jaxmoe":
            result = self._run_ours(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        is_new = [out.alias_info is None and schema.name != "aten::_unsafe_view" for out in schema.returns]
        results = (result,) if len(is_new) == 1 else result or ()
        made = jax.tree.leaves([value for value, new in zip(results, is_new, strict=True) if new])
        self.sizes += [value.nbytes for value in made if isinstance(value, torch.Tensor) and value.nbytes]
        if func.namespace != "jaxmoe" and (schema.is_mutable or any(is_new)):
            self._count(schema.name, args, result)
        return result

    def _run_ours(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = func._schema.name.removeprefix("jaxmoe::")
        launched = Counter[str]()
        with _observed(launched):
            result = func(*args, **kwargs)
        if not args[0].is_cuda:
            arrays = (shape(value.dtype, *value.shape) if isinstance(value, torch.Tensor) else value for value in args)
            launched.update(_kernels_of(op, *arrays))
        for kernel, number in launched.items():
            owner = _OWNERS[op][kernel] if op in _OWNERS else op
            self.counts.launches.setdefault(owner, Counter())[kernel] += number
        return result

    def _count(self, op: str, args: tuple[Any, ...], result: Any) -> None:
        if op.startswith(("aten::empty", "aten::new_empty")):
            return
        self.counts.operations[op] += 1
        if op not in self.COPIES:
            return
        source = args[1 if op in ("aten::copy_", "aten::copy") else 0].dtype
        target = result.dtype if isinstance(result, torch.Tensor) else source
        if target == source:
            self.counts.copies[f"{op} {_name(source)}"] += 1
        else:
            self.counts.casts[f"{op} {_name(source)} to {_name(target)}"] += 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _profile(run: Forward) -> tuple[Counter[str], Counter[str]]:
    """(kernels, memcpy and memset) that `run` has the GPU do, as torch.profiler sees them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    of = lambda *kinds: Counter(event["name"] for event in events if event.get("cat") in kinds)
    return of("kernel"), of("gpu_memcpy", "gpu_memset")


@functools.cache
def can_profile() -> bool:
    """Whether torch.profiler sees what the GPU runs: CUPTI may be missing, or closed to this user."""
    if ProfilerActivity.CUDA not in supported_activities():
        return False
    return any(_profile(lambda: torch.zeros(8, device="cuda").add_(1)))


def _allocated(run: Forward) -> tuple[int, int]:
    """How many allocations `run` asks torch for on the GPU, and how many bytes."""
    stats = lambda: (torch.cuda.memory_stats()[f"{what}.all.allocated"] for what in ("allocation", "requested_bytes"))
    before = tuple(stats())
    run()
    number, size = (after - least for after, least in zip(stats(), before, strict=True))
    return number, size


def count(make: Callable[[str], Forward], device: str) -> Counts:
    """Counts what a forward pass does, without gradients.

    Args:
      make: gives the forward pass on a device.
      device: "cuda" to run it there; "meta" to count on fake tensors.
    """
    gc.collect()  # a patched layer refers to itself: the last one's memory would stay
    with torch.no_grad(), FakeTensorMode() if device == "meta" else contextlib.nullcontext():
        run = make(device)
        for _ in range(2 if device == "cuda" else 0):  # kernels are compiled, libraries take their workspaces
            run()
        with Recorder() as recorder:
            run()
        counts, sizes = recorder.counts, recorder.sizes
        counts.allocations, counts.allocated_bytes = len(sizes), sum(sizes)
        if device == "cuda":
            counts.allocations, counts.allocated_bytes = _allocated(run)
            if can_profile():
                counts.kernels, counts.transfers = _profile(run)
    return counts
