"""The emulator in the place of a GPU, below `bridge.native`: kernels are compiled as ever, and their PTX runs here.

What it shows that the interpreter cannot: that triton's layouts, exchanges and reshapes do what the kernel says; that
no access leaves its tensor or is unaligned; that programs and warps do not depend on one another's pace. By default
some cases run; with JAXMOE_EMULATE=all every one does, and for more targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch

from bridge.native import build, dispatch, experts, routing
from jaxmoe import DispatchPlan
from kernels_pallas import plan_dispatch as plan_kernels
from kernels_pallas import targets
from kernels_pallas.targets import Binary
from tests.check_plan import PlanCase, check_plan
from tests.emulator import machine
from tests.emulator.memory import POISON, Global

SEED = 1
INT32, FLOAT32 = torch.int32, torch.float32
ALL = os.environ.get("JAXMOE_EMULATE") == "all"  # every case, on every target
TARGETS = ["sm_90", "sm_80"] if ALL else ["sm_90"]
_built: dict[str, list[Binary]] = {}  # by key, as on disk: most of a test's time is compiling
_ptx: dict[bytes, str] = {}  # by machine code


class Emulator:
    """What the launches of a test share: memory, and a record of each launch."""

    def __init__(self) -> None:
        self.memory = Global()
        self.records: list[machine.Record] = []
        self.edit: Callable[[str], str] = lambda text: text  # of the PTX, before it runs
        self.kept: list[torch.Tensor] = []  # all of them, so that no address is used again

    def add(self, tensor: torch.Tensor, writable: bool = True) -> torch.Tensor:
        """Registers what the tensor spans, which a kernel may read or also write."""
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = sum((side - 1) * stride for side, stride in steps) + 1 if tensor.numel() else 0
        self.memory.add(tensor.data_ptr(), span * tensor.itemsize, tensor.itemsize, writable)
        self.kept.append(tensor)
        return tensor

    def empty(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A tensor full of poison; `offset` elements stand before it."""
        flat = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)
        flat.view(torch.uint8).fill_(POISON)
        return self.add(flat[offset:].view(shape))

    def put(self, array: Any, offset: int = 0, extra: int = 0) -> torch.Tensor:
        """An array as a tensor only to be read; `extra` columns of NaN lie between its rows."""
        values = np.asarray(array)
        dtype = getattr(torch, values.dtype.name)
        bits = values.view(f"i{values.itemsize}") if values.dtype.kind == "V" else values
        if extra:
            wide = torch.full((values.shape[0], values.shape[1] + extra), torch.nan, dtype=dtype)
            tensor = wide[:, : values.shape[1]]
        else:
            tensor = torch.empty(values.size + offset, dtype=dtype)[offset:].view(values.shape)
        tensor.copy_(torch.from_numpy(bits.copy()).view(dtype))
        return self.add(tensor, writable=False)

    def install(self, target: str, patch: pytest.MonkeyPatch) -> None:
        """From here on kernels on CPU tensors run in this emulator, compiled for `target`."""
        known, binary = targets.TARGETS[target], targets.binary
        emulator = self

        def keep(kernel: targets.Lowered, compiled: Any) -> Binary:
            made = binary(kernel, compiled)
            _ptx[made.code] = compiled.asm["ptx"]
            return made

        class Kernel:
            """Stands in for `driver.Kernel`."""

            def __init__(self, binary: Binary, device: int) -> None:
                text = emulator.edit(_ptx[binary.code])
                self.code = machine.Code(text, binary.shared_bytes, SEED)
                assert self.code.kernel.threads == binary.threads
                self.own = binary.own

            def __call__(self, x: int, y: int, *arguments: int) -> None:
                assert len(arguments) == len(self.own)
                emulator.records.append(machine.launch(self.code, emulator.memory, (x, y), list(arguments)))

        def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def made(*args: Any, **kwargs: Any) -> torch.Tensor:
                tensor = make(*args, **kwargs)
                tensor.untyped_storage().fill_(POISON)
                return self.add(tensor)

            return made

        patch.setattr(targets, "binary", keep)
        patch.setattr(build, "target_of", lambda device: known)
        patch.setattr(build, "Kernel", Kernel)
        patch.setattr(build.cache, "load", _built.get)
        patch.setattr(build.cache, "store", _built.__setitem__)
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        forget()


def array(tensor: torch.Tensor) -> Any:
    """A tensor as an array, bfloat16 too."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return tensor.numpy()


def forget() -> None:
    """Drops the kernels that this process knows."""
    for module in (routing, dispatch, experts):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    routing._known.clear()


def some(cases: list[Any], chosen: set[str]) -> list[Any]:
    """All cases, or those whose reason begins as one of the chosen does."""
    found = [case for case in cases if ALL or any(case.why.startswith(start) for start in chosen)]
    return [pytest.param(case, id=case.why) for case in found]


def plan(emulator: Emulator, case: PlanCase, tokens: int | None = None, offset: int = 0) -> DispatchPlan:
    """Plans on the native path and checks the result."""
    ids, expert_map = case.inputs(tokens)
    rows = emulator.empty(*ids.shape, dtype=INT32, offset=offset)
    length = plan_kernels.num_rows(ids.size, case.num_experts, case.align, case.max_rows)
    slots = emulator.empty(length, dtype=INT32, offset=offset)
    sizes = emulator.empty(case.num_experts, dtype=INT32, offset=offset)
    here = None if expert_map is None else emulator.put(expert_map, offset)
    dispatch.plan_dispatch(emulator.put(ids, offset), case.num_experts, case.align, here, rows, slots, sizes)
    found = DispatchPlan(rows.numpy(), slots.numpy(), sizes.numpy())
    check_plan(found, ids, case.num_experts, case.align, expert_map, case.max_rows)
    return found
