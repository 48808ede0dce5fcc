"""What stands in an instruction: registers, numbers and addresses, as functions that read or write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.memory import Shared
from tests.emulator.numbers import DTYPES, Array
from tests.emulator.ptx import Address, Kernel, Operand, register_kind

Lanes = Array | None  # indices of threads in the batch; None: all of them
Step = Callable[[Any, Lanes], None]
Read = Callable[[Any, Lanes], Array]


def number(text: str, kind: str) -> Array:
    """A number in an instruction, as an array of one."""
    dtype = np.dtype(DTYPES[kind])
    if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        value = int(found[1], 16)
    elif found := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        value = int(found[1], 0)
    else:
        raise NotImplementedError(f"operand {text}")
    if kind == "pred":
        return np.array([value != 0])
    return np.array([value % 256**dtype.itemsize], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)


class Operands:
    """Of one kernel. `seed`: of the errors of approximate functions."""

    def __init__(self, kernel: Kernel, seed: int) -> None:
        self.kernel, self.seed = kernel, seed

    def read(self, operand: Operand, kind: str) -> Read:
        dtype = np.dtype(DTYPES[kind])
        declared = register_kind(self.kernel, operand) if isinstance(operand, str) else None
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand.startswith("%") and declared is None:
            return lambda state, lanes: state.special(operand, lanes).astype(dtype)
        if operand == "__local_depot0":
            return lambda state, lanes: np.array([Shared.BASE], dtype)
        if operand == "global_smem" or operand in self.kernel.shared:
            # What is asked for at the launch lies behind the variables, which may yet be declared.
            where = lambda: self.kernel.shared.get(operand, self.kernel.shared_bytes)
            return lambda state, lanes: np.array([Shared.BASE + where()], dtype)
        if declared is None:
            value = number(operand, kind)
            return lambda state, lanes: value
        narrower = np.dtype(DTYPES[declared]).itemsize - dtype.itemsize
        if narrower < 0:
            raise NotImplementedError(f"{operand} read as {kind}")

        def read(state: Any, lanes: Lanes) -> Array:
            values = state.registers[operand]
            values = values if lanes is None else values[lanes]
            return values.astype(f"u{dtype.itemsize}").view(dtype) if narrower else values.view(dtype)

        return read

    def write(self, register: Operand) -> Callable[[Any, Array, Lanes], None]:
        if register == "_":
            return lambda state, values, lanes: None
        declared = register_kind(self.kernel, register) if isinstance(register, str) else None
        if declared is None:
            raise NotImplementedError(f"result {register}")
        dtype = np.dtype(DTYPES[declared])

        def write(state: Any, values: Array, lanes: Lanes) -> None:
            if values.dtype.itemsize > dtype.itemsize:
                raise NotImplementedError(f"{values.dtype} into {register}")
            if values.dtype.itemsize < dtype.itemsize:  # extended, by the sign if it has one
                values = values.astype(f"{values.dtype.kind}{dtype.itemsize}")
            values = values.view(dtype)
            if lanes is not None:
                state.registers[register][lanes] = values
            else:
                full = len(values) == state.lanes
                state.registers[register] = values if full else np.repeat(values, state.lanes)

        return write

    def address(self, operand: Operand, kind: str) -> Read:
        assert isinstance(operand, Address)
        base, offset = self.read(operand.base, kind), operand.offset

        def read(state: Any, lanes: Lanes) -> Array:
            values = base(state, lanes)
            values = values + values.dtype.type(offset) if offset >= 0 else values - values.dtype.type(-offset)
            return np.broadcast_to(values, (state.lanes if lanes is None else len(lanes),))

        return read
