"""From instructions to functions step(state, lanes), which carry one out for some threads of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator import warp
from tests.emulator.arithmetic import operation
from tests.emulator.memory import POISON, Fault, Shared
from tests.emulator.numbers import DTYPES, Array
from tests.emulator.ptx import Address, Instruction, Kernel, Operand, register_kind

Lanes = Array | None  # indices of threads in the batch; None: all of them
Step = Callable[[Any, Lanes], None]
Read = Callable[[Any, Lanes], Array]
HINTS = re.compile(r"L[12]::\w+|nc|relaxed|acquire|acq_rel|release|volatile|gpu|cta|weak|noftz")


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


class Translator:
    """Of one kernel. `seed`: of the errors of approximate functions."""

    def __init__(self, kernel: Kernel, seed: int) -> None:
        self.kernel, self.seed = kernel, seed

    def step(self, instruction: Instruction) -> Step:
        """What this instruction does, whatever its guard."""
        first = instruction.name.split(".")[0]
        special = getattr(self, f"_{first}", None)
        step = special(instruction) if special else None
        return step or self._plain(instruction)

    # Operands

    def read(self, operand: Operand, kind: str) -> Read:
        dtype = np.dtype(DTYPES[kind])
        declared = register_kind(self.kernel, operand) if isinstance(operand, str) else None
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand.startswith("%") and declared is None:
            return lambda state, lanes: state.special(operand, lanes).astype(dtype)
        if operand in ("global_smem", "__local_depot0"):
            return lambda state, lanes: np.array([Shared.BASE], dtype)
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

    # Instructions of one thread

    def _plain(self, instruction: Instruction) -> Step:
        found = operation(instruction.name, self.seed)
        result, *sources = instruction.operands
        if len(sources) != len(found.sources):
            raise NotImplementedError(instruction.text)
        reads = [self.read(source, kind) for source, kind in zip(sources, found.sources, strict=True)]
        write, function = self.write(result), found.function
        return lambda state, lanes: write(state, function(*[read(state, lanes) for read in reads]), lanes)

    def _mov(self, instruction: Instruction) -> Step | None:
        to, source = instruction.operands
        kind = instruction.name.split(".")[1]
        if isinstance(to, tuple):
            size = np.dtype(DTYPES[kind]).itemsize // len(to)
            read, writes = self.read(source, kind), [self.write(part) for part in to]

            def unpack(state: Any, lanes: Lanes) -> None:
                parts = np.ascontiguousarray(read(state, lanes))[:, None].view(f"u{size}")
                for i, write in enumerate(writes):
                    write(state, parts[:, i].copy(), lanes)

            return unpack
        if isinstance(source, tuple):
            size = np.dtype(DTYPES[kind]).itemsize // len(source)
            write, reads = self.write(to), [self.read(part, f"b{8 * size}") for part in source]

            def pack(state: Any, lanes: Lanes) -> None:
                parts = np.broadcast_arrays(*(read(state, lanes) for read in reads))
                write(state, np.stack(parts, axis=1).view(DTYPES[kind])[:, 0].copy(), lanes)

            return pack
        return None

    def _setp(self, instruction: Instruction) -> Step | None:
        """With two results: of packed halves each one's, else the second is the opposite of the first."""
        *parts, kind = instruction.name.split(".")
        to, *sources = instruction.operands
        packed = kind.endswith("x2")
        if "|" not in str(to):
            return None
        first, second = (self.write(part) for part in str(to).split("|"))
        found = operation(".".join([*parts, kind.removesuffix("x2")]), self.seed)
        if len(sources) != 2 or len(found.sources) != 2:
            raise NotImplementedError(instruction.text)
        reads = [self.read(source, "b32" if packed else kind) for source in sources]

        def compare(state: Any, lanes: Lanes) -> None:
            values = [state.whole(read(state, lanes), lanes) for read in reads]
            if not packed:
                result = found.function(*values)
                first(state, result, lanes)
                second(state, ~result, lanes)
                return
            halves = [value[:, None].view(DTYPES[kind.removesuffix("x2")]) for value in values]
            for i, write in enumerate((first, second)):
                write(state, found.function(*(np.ascontiguousarray(half[:, i]) for half in halves)), lanes)

        return compare

    # Memory

    def _ld(self, instruction: Instruction) -> Step:
        space, width, count, kind = self._access(instruction)
        to, at = instruction.operands
        writes = [self.write(part) for part in (to if isinstance(to, tuple) else (to,))]
        assert isinstance(at, Address)
        assert len(writes) == count, instruction.text
        if space == "param":
            return lambda state, lanes: writes[0](state, state.params[at.base].view(DTYPES[kind]), lanes)
        address = self.address(at, self._width(space, at))

        def load(state: Any, lanes: Lanes) -> None:
            values = state.load(space, address(state, lanes), width, count, lanes)
            for write, value in zip(writes, values, strict=True):
                write(state, value.view(DTYPES[kind]), lanes)

        return load

    def _st(self, instruction: Instruction) -> Step:
        space, _, count, kind = self._access(instruction)
        at, source = instruction.operands
        address = self.address(at, self._width(space, at))
        width = np.dtype(DTYPES[kind]).itemsize
        reads = [self.read(part, f"b{8 * width}") for part in (source if isinstance(source, tuple) else (source,))]
        assert len(reads) == count, instruction.text

        def store(state: Any, lanes: Lanes) -> None:
            to = address(state, lanes)
            words = [np.broadcast_to(read(state, lanes), to.shape) for read in reads]
            state.store(space, to, width, words, lanes)

        return store

    def _width(self, space: str, at: Operand) -> str:
        """The type of an address."""
        assert isinstance(at, Address)
        wide = space == "global" or register_kind(self.kernel, at.base) == "b64"
        return "u64" if wide else "u32"

    def _access(self, instruction: Instruction) -> tuple[str, int, int, str]:
        """(space, bytes of a word, words, type)."""
        _, *mods, kind = instruction.name.split(".")
        mods = ["shared" if mod == "shared::cta" else mod for mod in mods if not HINTS.fullmatch(mod)]
        count = 1
        if len(mods) == 2 and re.fullmatch("v[248]", mods[1]):
            count = int(mods.pop()[1])
        mods = mods or ["local"]  # the only memory that these kernels address without saying which: local checks it
        if len(mods) != 1 or mods[0] not in ("global", "shared", "param", "local"):
            raise NotImplementedError(instruction.text)
        return mods[0], np.dtype(DTYPES[kind]).itemsize, count, kind

    def _atom(self, instruction: Instruction) -> Step:
        mods = [mod for mod in instruction.name.split(".")[1:] if not HINTS.fullmatch(mod)]
        if mods not in (["global", "add", "u32"], ["global", "add", "s32"]):
            raise NotImplementedError(instruction.text)
        *to, at, value = instruction.operands
        address, read = self.address(at, "u64"), self.read(value, "u32")
        write = self.write(to[0] if to else "_")

        def add(state: Any, lanes: Lanes) -> None:
            where = address(state, lanes)
            write(state, state.memory.add_at(where, np.broadcast_to(read(state, lanes), where.shape)), lanes)

        return add

    _red = _atom

    def _cp(self, instruction: Instruction) -> Step:
        """Asynchronous copies: until it has been waited for, what is copied is poison."""
        name, operands = instruction.name, instruction.operands
        if name == "cp.async.commit_group":
            return lambda state, lanes: state.commit(lanes)
        if name in ("cp.async.wait_group", "cp.async.wait_all"):
            left = int(str(operands[0]), 0) if operands else 0
            return lambda state, lanes: state.wait(left, lanes)
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)?", name):
            raise NotImplementedError(instruction.text)
        to, source, size, *rest = operands
        count = int(str(size), 0) // 4
        at, address = self.address(to, "u32"), self.address(source, "u64")
        taken = self.read(rest[0] if rest else size, "u32")

        def copy(state: Any, lanes: Lanes) -> None:
            to, full = at(state, lanes), np.broadcast_to(taken(state, lanes), at(state, lanes).shape)
            if not np.isin(full, (0, 4 * count)).all():
                raise NotImplementedError(instruction.text)
            here, some = state.indices(lanes), np.flatnonzero(full)
            words = [np.zeros(len(here), np.uint32) for _ in range(count)]
            for word, part in zip(
                words, state.load("global", address(state, lanes)[some], 4, count, here[some]), strict=True
            ):
                word[some] = part
            poison = np.full(len(here), POISON * 0x01010101, np.uint32)
            state.store("shared", to, 4, [poison] * count, lanes)
            state.pending.append((here, state.groups[here], to, words))

        return copy

    def _matrices(self, instruction: Instruction) -> tuple[int, bool]:
        found = re.fullmatch(r"\w+\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", instruction.name)
        if not found:
            raise NotImplementedError(instruction.text)
        return int(found[1]), bool(found[2])

    def _ldmatrix(self, instruction: Instruction) -> Step:
        count, transposed = self._matrices(instruction)
        to, at = instruction.operands
        assert isinstance(to, tuple)
        address, writes = self.address(at, "u32"), [self.write(part) for part in to]

        def load(state: Any, lanes: Lanes) -> None:
            warps, rows = state.warps(lanes), address(state, lanes).reshape(-1, 32)
            matrices = []
            for m in range(count):  # eight threads say where a matrix' rows are
                who = warps[:, 8 * m : 8 * m + 8].ravel()
                words = state.load("shared", rows[:, 8 * m : 8 * m + 8].ravel(), 2, 8, who)
                matrices.append(np.stack(words, axis=-1).reshape(-1, 8, 8))
            for write, register in zip(writes, warp.from_rows(matrices, transposed), strict=True):
                write(state, register.ravel(), lanes)

        return load

    def _stmatrix(self, instruction: Instruction) -> Step:
        _, transposed = self._matrices(instruction)
        at, source = instruction.operands
        assert isinstance(source, tuple)
        address, reads = self.address(at, "u32"), [self.read(part, "b32") for part in source]

        def store(state: Any, lanes: Lanes) -> None:
            warps, rows = state.warps(lanes), address(state, lanes).reshape(-1, 32)
            registers = [state.whole(read(state, lanes), lanes).reshape(-1, 32) for read in reads]
            for m, matrix in enumerate(warp.to_rows(registers, transposed)):
                who = warps[:, 8 * m : 8 * m + 8].ravel()
                words = list(np.ascontiguousarray(matrix.reshape(-1, 8).T))
                state.store("shared", rows[:, 8 * m : 8 * m + 8].ravel(), 2, words, who)

        return store

    # Instructions of a warp, which all of its threads must execute

    def _members(self, operand: Operand) -> Step:
        read = self.read(operand, "u32")

        def check(state: Any, lanes: Lanes) -> None:
            state.warps(lanes)
            if (read(state, lanes) != 0xFFFFFFFF).any():
                raise NotImplementedError("a collective instruction of part of a warp")

        return check

    def _redux(self, instruction: Instruction) -> Step:
        _, sync, kind, dtype = instruction.name.split(".")
        if sync != "sync" or kind not in warp.REDUCTIONS or dtype not in ("s32", "u32", "b32"):
            raise NotImplementedError(instruction.text)
        to, source, members = instruction.operands
        write, read, check = self.write(to), self.read(source, dtype), self._members(members)

        def reduce(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
            values = state.whole(read(state, lanes), lanes).reshape(-1, 32)
            write(state, warp.reduction(kind, values).ravel(), lanes)

        return reduce

    def _shfl(self, instruction: Instruction) -> Step:
        _, sync, mode, dtype = instruction.name.split(".")
        to, source, by, clamp, members = instruction.operands
        if (sync, dtype) != ("sync", "b32") or mode not in ("up", "down", "bfly", "idx"):
            raise NotImplementedError(instruction.text)
        first, *second = str(to).split("|")
        write, flag = self.write(first), self.write(second[0] if second else "_")
        reads, check = [self.read(source, "b32"), self.read(by, "s32"), self.read(clamp, "s32")], self._members(members)

        def shuffle(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
            values, inside = warp.shuffle(
                mode, *(state.whole(read(state, lanes), lanes).reshape(-1, 32) for read in reads)
            )
            write(state, values.ravel(), lanes)
            flag(state, inside.ravel(), lanes)

        return shuffle

    def _vote(self, instruction: Instruction) -> Step:
        _, sync, kind, dtype = instruction.name.split(".")
        to, source, members = instruction.operands
        if sync != "sync" or (kind, dtype) not in (("ballot", "b32"), ("any", "pred"), ("all", "pred")):
            raise NotImplementedError(instruction.text)
        write, read, check = self.write(to), self.read(source, "pred"), self._members(members)

        def vote(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
            values = state.whole(read(state, lanes), lanes).reshape(-1, 32)
            write(state, warp.vote(kind, values).ravel(), lanes)

        return vote

    def _mma(self, instruction: Instruction) -> Step:
        known = {
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
            "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32": "s8",
        }
        kind = known.get(instruction.name)
        if kind is None:
            raise NotImplementedError(instruction.text)
        to, *sources = instruction.operands
        assert isinstance(to, tuple)
        writes = [self.write(part) for part in to]
        reads = [[self.read(part, "b32") for part in source] for source in sources]  # type: ignore[union-attr]

        def multiply(state: Any, lanes: Lanes) -> None:
            state.warps(lanes)
            a, b, c = ([state.whole(read(state, lanes), lanes).reshape(-1, 32) for read in matrix] for matrix in reads)
            for write, register in zip(writes, warp.product(kind, a, b, c), strict=True):
                write(state, register.ravel(), lanes)

        return multiply

    def _bar(self, instruction: Instruction) -> Step:
        if instruction.name == "bar.warp.sync":
            check = self._members(instruction.operands[0])

            def meet(state: Any, lanes: Lanes) -> None:
                check(state, lanes)
                state.warp_barrier(lanes)

            return meet
        if instruction.name not in ("bar.sync", "barrier.sync") or instruction.operands != ("0",):
            raise NotImplementedError(instruction.text)
        return lambda state, lanes: state.barrier(lanes)

    def _fence(self, instruction: Instruction) -> Step:
        raise NotImplementedError(instruction.text)


def guard(kernel: Kernel, instruction: Instruction) -> Callable[[Any, Lanes], Lanes]:
    """Which of the lanes the predicate in front of the instruction lets through; all of them without one."""
    if instruction.guard is None:
        return lambda state, lanes: lanes
    name, wanted = instruction.guard
    if register_kind(kernel, name) != "pred":
        raise Fault(instruction.text)

    def passing(state: Any, lanes: Lanes) -> Lanes:
        values = state.registers[name]
        values = (values if lanes is None else values[lanes]) == wanted
        if lanes is None:
            return None if values.all() else np.flatnonzero(values)
        return lanes[values]

    return passing
