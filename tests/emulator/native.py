"""The emulator in the place of a GPU, below `bridge.native`: kernels are compiled as ever, and their PTX runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bridge.native import build, dispatch, experts, routing
from kernels_pallas import targets
from kernels_pallas.targets import Binary
from tests.emulator import machine
from tests.emulator.memory import POISON, Global

SEED = 1


class Emulator:
    """What the launches of a test share: memory, the PTX of each kernel, a record of each launch."""

    def __init__(self) -> None:
        self.memory = Global()
        self.records: list[machine.Record] = []
        self.ptx: dict[bytes, str] = {}  # by machine code
        self.edit: Callable[[str], str] = lambda text: text  # of the PTX, before it runs
        self._kept: list[torch.Tensor] = []  # so that no address is used again

    def add(self, tensor: torch.Tensor, writable: bool = True) -> torch.Tensor:
        """Registers the tensor's whole storage, which a kernel may read or also write."""
        storage = tensor.untyped_storage()
        self.memory.add(storage.data_ptr(), storage.nbytes(), tensor.element_size(), writable)
        self._kept.append(tensor)
        return tensor

    def empty(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A tensor full of poison; `offset` elements stand before it."""
        flat = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)
        flat.view(torch.uint8).fill_(POISON)
        return self.add(flat)[offset:].view(shape)

    def install(self, target: str, patch: pytest.MonkeyPatch) -> None:
        """From here on kernels on CPU tensors run in this emulator, compiled for `target`."""
        known, compile_kernel, binary = targets.TARGETS[target], targets.compile_kernel, targets.binary
        emulator = self

        def keep(kernel: targets.Lowered, compiled: Any) -> Binary:
            made = binary(kernel, compiled)
            emulator.ptx[made.code] = compiled.asm["ptx"]
            return made

        class Kernel:
            """Stands in for `driver.Kernel`."""

            def __init__(self, binary: Binary, device: int) -> None:
                text = emulator.edit(emulator.ptx[binary.code])
                self.code = machine.Code(text, binary.shared_bytes, SEED)
                assert self.code.kernel.threads == binary.threads

            def __call__(self, x: int, y: int, *arguments: int) -> None:
                emulator.records.append(machine.launch(self.code, emulator.memory, (x, y), list(arguments)))

        new_empty = torch.Tensor.new_empty

        def poisoned(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            made = new_empty(tensor, *args, **kwargs)
            made.view(-1).view(torch.uint8).fill_(POISON)
            return self.add(made)

        patch.setattr(targets, "compile_kernel", compile_kernel)
        patch.setattr(targets, "binary", keep)
        patch.setattr(build, "target_of", lambda device: known)
        patch.setattr(build, "Kernel", Kernel)
        patch.setattr(build.cache, "load", lambda key: None)
        patch.setattr(build.cache, "store", lambda key, binaries: None)
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        forget()


def forget() -> None:
    """Drops the kernels that this process knows."""
    for module in (routing, dispatch, experts):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
