"""From instructions to functions step(state, lanes), which carry one out for some threads of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.arithmetic import operation
from tests.emulator.collective import Collective
from tests.emulator.memory import POISON, Fault
from tests.emulator.numbers import DTYPES
from tests.emulator.operands import Lanes, Step
from tests.emulator.ptx import Address, Instruction, Kernel, Operand, register_kind

POLICY = np.array([0x12F0_0000_1000_0000], np.uint64)  # what createpolicy makes, and nothing else
HINTS = re.compile(r"L[12]::\w+|nc|relaxed|acquire|acq_rel|release|volatile|gpu|cta|weak|noftz")


class Translator(Collective):
    """Of one kernel."""

    def step(self, instruction: Instruction) -> Step:
        """What this instruction does, whatever its guard."""
        first = instruction.name.split(".")[0]
        special = getattr(self, f"_{first}", None)
        step = special(instruction) if special else None
        return step or self._plain(instruction)

    # Instructions of one thread

    def _plain(self, instruction: Instruction) -> Step:
        found = operation(instruction.name, self.seed)
        result, *sources = instruction.operands
        if re.fullmatch(r"(min|max)\b.*\.f32", instruction.name) and len(sources) == 3:
            pair = found.function
            found = found._replace(function=lambda a, b, c: pair(pair(a, b), c), sources=found.sources * 2)
            found = found._replace(sources=found.sources[:3])
        if len(sources) != len(found.sources):
            raise NotImplementedError(instruction.text)
        reads = [self.read(source, kind) for source, kind in zip(sources, found.sources, strict=True)]
        write, function = self.write(result), found.function
        return lambda state, lanes: write(state, function(*[read(state, lanes) for read in reads]), lanes)

    def _griddepcontrol(self, instruction: Instruction) -> Step:
        """What orders launches; here one ends before the next begins, and `machine.Code` looks at the place."""
        return lambda state, lanes: None

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

    def _createpolicy(self, instruction: Instruction) -> Step:
        """How long the cache keeps what is accessed under it: which changes no result."""
        to, *share = instruction.operands
        if instruction.name != "createpolicy.fractional.L2::evict_first.b64" or share != ["1.0"]:
            raise NotImplementedError(instruction.text)
        write = self.write(to)
        return lambda state, lanes: write(state, POLICY, lanes)

    def _under_policy(self, instruction: Instruction) -> tuple[tuple[Operand, ...], Step]:
        """The operands of an access without its policy, and the check that this is one."""
        if "L2::cache_hint" not in instruction.name:
            return instruction.operands, lambda state, lanes: None
        *operands, policy = instruction.operands
        read = self.read(policy, "b64")

        def check(state: Any, lanes: Lanes) -> None:
            if (read(state, lanes) != POLICY.view(np.uint64)).any():
                raise Fault(f"{instruction.text} under no policy")

        return tuple(operands), check

    def _ld(self, instruction: Instruction) -> Step:
        space, width, count, kind = self._access(instruction)
        (to, at), check = self._under_policy(instruction)
        writes = [self.write(part) for part in (to if isinstance(to, tuple) else (to,))]
        assert isinstance(at, Address)
        assert len(writes) == count, instruction.text
        if space == "param":
            return lambda state, lanes: writes[0](state, state.params[at.base].view(DTYPES[kind]), lanes)
        address = self.address(at, self._width(space, at))

        def load(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
            values = state.load(space, address(state, lanes), width, count, lanes)
            for write, value in zip(writes, values, strict=True):
                write(state, value.view(DTYPES[kind]), lanes)

        return load

    def _st(self, instruction: Instruction) -> Step:
        space, _, count, kind = self._access(instruction)
        (at, source), check = self._under_policy(instruction)
        address = self.address(at, self._width(space, at))
        width = np.dtype(DTYPES[kind]).itemsize
        reads = [self.read(part, f"b{8 * width}") for part in (source if isinstance(source, tuple) else (source,))]
        assert len(reads) == count, instruction.text

        def store(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
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
        name, *mods = [mod for mod in instruction.name.split(".") if not HINTS.fullmatch(mod)]
        if name == "red" and mods in (["shared", "add", "u32"], ["shared", "or", "b32"]):
            return self._shared_atom(instruction, mods[1])
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

    def _shared_atom(self, instruction: Instruction, kind: str) -> Step:
        at, value = instruction.operands
        address, read = self.address(at, "u32"), self.read(value, "u32")

        def change(state: Any, lanes: Lanes) -> None:
            where, here = address(state, lanes), state.indices(lanes)
            values = np.broadcast_to(read(state, lanes), where.shape)
            state.shared.change(kind, where, values, state.member[here], state.who[here])

        return change

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
