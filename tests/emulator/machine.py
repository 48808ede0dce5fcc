"""Launching a kernel: all threads of some programs at once, in numpy, each at its own place in the code.

The threads whose next instruction comes first in the code go on, until their ways meet or part. So all that reach an
instruction together have waited for one another, as the collective instructions need; those check that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.memory import POISON, Fault, Global, Shared
from tests.emulator.numbers import DTYPES, Array
from tests.emulator.operands import Lanes, Read
from tests.emulator.ptx import Instruction, Kernel, parse
from tests.emulator.translate import Translator, guard

MOST_LANES = 1 << 15  # of a batch
MOST_SHARED = 1 << 24  # bytes of a batch


class Code:
    """A kernel, ready to run. `seed`: of the errors of approximate functions."""

    def __init__(self, text: str, shared_bytes: int, seed: int = 1) -> None:
        self.kernel: Kernel = parse(text)
        self.shared_bytes = shared_bytes
        self._check_wait()
        translator = Translator(self.kernel, seed)
        self.guards = [guard(self.kernel, instruction) for instruction in self.kernel.code]
        self.jumps = [self._jump(instruction) for instruction in self.kernel.code]
        self.steps = [
            None if jump is not None else translator.step(instruction)
            for instruction, jump in zip(self.kernel.code, self.jumps, strict=True)
        ]
        self.meeting = set(self.kernel.labels.values())

    def _check_wait(self) -> None:
        """A kernel that waits for the launch before does so before it touches memory that others share."""
        names = [instruction.name for instruction in self.kernel.code]
        if "griddepcontrol.wait" in names:
            for name in names[: names.index("griddepcontrol.wait")]:
                if re.match(r"(ld|st|atom|red|bra|cp)\b(?!\.param)", name):
                    raise Fault(f"{name} before the wait for the launch before")

    def _jump(self, instruction: Instruction) -> int | None:
        """Where a branch leads; None for any other instruction."""
        if instruction.name in ("bra", "bra.uni"):
            return self.kernel.labels[str(instruction.operands[0])]
        return len(self.kernel.code) if instruction.name in ("ret", "exit") else None


@dataclass
class Record:
    """What was executed: by each program, and of each instruction, in instructions of a warp."""

    name: str
    by_program: Array
    by_instruction: Array
    code: list[Instruction] = field(repr=False)


class _Registers(dict[str, Array]):
    """By name; what has never been written is poison."""

    def __init__(self, kernel: Kernel, lanes: int) -> None:
        super().__init__()
        self.kernel, self.lanes = kernel, lanes

    def __missing__(self, name: str) -> Array:
        kind = self.kernel.registers.get(name) or self.kernel.registers[name.rstrip("0123456789")]
        dtype = np.dtype(DTYPES[kind])
        poison = np.full(self.lanes * dtype.itemsize, 1 if kind == "pred" else POISON, np.uint8)
        self[name] = poison.view(dtype)
        return self[name]


class State:
    """A batch of programs while it runs."""

    def __init__(self, code: Code, memory: Global, params: dict[str, Array], grid: tuple[int, int], ids: Array) -> None:
        threads = code.kernel.threads
        self.memory, self.params, self.grid, self.threads = memory, params, grid, threads
        self.lanes = len(ids) * threads
        self.registers = _Registers(code.kernel, self.lanes)
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(ids))
        self.member = np.repeat(np.arange(len(ids)), threads)  # which program of the batch
        self.program = ids.astype(np.int32)[self.member]
        self.everyone = np.arange(self.lanes)
        # Threads of one warp must not rely on one another either, where the program is one warp.
        self.who = (self.thread // np.uint32(1 if threads == 32 else 32)).astype(np.int32)
        self.shared = Shared(code.kernel.shared_bytes + code.shared_bytes, len(ids))
        self.local = Shared(code.kernel.local_bytes, self.lanes)
        self.groups = np.zeros(self.lanes, np.int64)  # of asynchronous copies, so far
        self.pending: list[tuple[Array, Array, Array, list[Array]]] = []

    def indices(self, lanes: Lanes) -> Array:
        return self.everyone if lanes is None else lanes

    def whole(self, values: Array, lanes: Lanes) -> Array:
        """A value for each of the lanes, also where all have the same."""
        return np.ascontiguousarray(np.broadcast_to(values, self.indices(lanes).shape))

    def special(self, name: str, lanes: Lanes) -> Array:
        x, y = self.grid
        values: dict[str, Any] = {
            "%tid.x": lambda: self.thread,
            "%laneid": lambda: self.thread % 32,
            "%ctaid.x": lambda: self.program % x,
            "%ctaid.y": lambda: self.program // x,
            "%ctaid.z": lambda: np.zeros(self.lanes, np.int32),
            "%ntid.x": lambda: np.full(self.lanes, self.threads),
            "%nctaid.x": lambda: np.full(self.lanes, x),
            "%nctaid.y": lambda: np.full(self.lanes, y),
        }
        if name not in values:
            raise NotImplementedError(f"operand {name}")
        found: Array = values[name]()
        return found if lanes is None else found[lanes]

    def load(self, space: str, addresses: Array, width: int, count: int, lanes: Lanes) -> list[Array]:
        here = self.indices(lanes)
        if space == "global":
            return self.memory.load(addresses, width, count, self.program[here])
        if space == "local":
            return self.local.load(addresses, width, count, here, self.who[here])
        return self.shared.load(addresses, width, count, self.member[here], self.who[here])

    def store(self, space: str, addresses: Array, width: int, words: list[Array], lanes: Lanes) -> None:
        here = self.indices(lanes)
        if space == "global":
            self.memory.store(addresses, width, words, self.program[here])
        elif space == "local":
            self.local.store(addresses, width, words, here, self.who[here])
        else:
            self.shared.store(addresses, width, words, self.member[here], self.who[here])

    def commit(self, lanes: Lanes) -> None:
        self.groups[self.indices(lanes)] += 1

    def wait(self, left: int, lanes: Lanes) -> None:
        """Asynchronous copies arrive, but for those of the last `left` groups."""
        waiting = np.zeros(self.lanes, bool)
        waiting[self.indices(lanes)] = True
        pending, self.pending = self.pending, []
        for here, group, to, words in pending:
            done = waiting[here] & (group < self.groups[here] - left)
            if done.any():
                self.store("shared", to[done], 4, [word[done] for word in words], here[done])
            if not done.all():
                self.pending.append((here[~done], group[~done], to[~done], [word[~done] for word in words]))

    def by_warp(self, read: Read, lanes: Lanes) -> Array:
        """[warps, 32] of what is read."""
        return self.whole(read(self, lanes), lanes).reshape(-1, 32)

    def warps(self, lanes: Lanes, together: int = 32) -> Array:
        """[warps, 32], the lanes by warp; of each `together` threads all must be there."""
        here = self.indices(lanes)
        whole = here[::together, None] // together * together + np.arange(together)
        if len(here) % together or not np.array_equal(here.reshape(-1, together), whole):
            raise Fault("a collective instruction that some threads of the warp do not reach")
        return here.reshape(-1, 32)

    def warp_barrier(self, lanes: Lanes) -> None:
        if self.threads == 32:
            self.shared.barrier(np.unique(self.member[self.indices(lanes)]))

    def barrier(self, lanes: Lanes) -> None:
        programs, counts = np.unique(self.member[self.indices(lanes)], return_counts=True)
        if (counts != self.threads).any():
            raise Fault("a barrier that some threads of the program do not reach")
        self.shared.barrier(programs)


def launch(code: Code, memory: Global, grid: tuple[int, int], arguments: list[int]) -> Record:
    """Runs the grid. `arguments`: in the order of the kernel's parameters; those that are left out are 0."""
    kernel = code.kernel
    values = arguments + [0] * (len(kernel.params) - len(arguments))
    params = {}
    for (name, kind), value in zip(kernel.params.items(), values, strict=True):
        dtype = np.dtype(DTYPES[kind])
        params[name] = np.array([value % 256**dtype.itemsize], np.uint64).astype(f"u{dtype.itemsize}")
    programs = np.arange(grid[0] * grid[1])
    record = Record(kernel.name, np.zeros(len(programs), int), np.zeros(len(kernel.code), int), kernel.code)
    memory.new_launch()
    size = max(1, min(MOST_LANES // kernel.threads, MOST_SHARED // max(kernel.shared_bytes + code.shared_bytes, 1)))
    with np.errstate(all="ignore"):
        for start in range(0, len(programs), size):
            ids = programs[start : start + size]
            _run(code, State(code, memory, params, grid, ids), record)
    return record


def _run(code: Code, state: State, record: Record) -> None:
    end, places = len(code.kernel.code), np.zeros(state.lanes, np.int64)
    while (at := int(places.min())) < end:
        here = np.flatnonzero(places == at)
        lanes: Lanes = None if len(here) == state.lanes else here
        first, at = at, _run_block(code, state, at, lanes, places)
        warps = np.unique(here // 32)
        record.by_instruction[first:at] += len(warps)
        np.add.at(record.by_program, state.program[warps * 32], at - first)


def _run_block(code: Code, state: State, at: int, lanes: Lanes, places: Array) -> int:
    """Up to and including the next branch, or the next label; returns where that is and notes where the lanes are."""
    here = state.indices(lanes)
    while True:
        step, passing, jump = code.steps[at], code.guards[at](state, lanes), code.jumps[at]
        if step is not None:
            if passing is None or len(passing):
                try:
                    step(state, passing)
                except Exception as error:
                    some = state.indices(passing)[0]
                    error.add_note(
                        f"{code.kernel.name}, instruction {at}: {code.kernel.code[at].text}, {len(here)} threads, the "
                        f"first of them {state.thread[some]} of program {state.program[some]}"
                    )
                    raise
            at += 1
            if at in code.meeting:
                places[here] = at
                return at
        else:
            places[here] = at + 1
            places[state.indices(passing)] = jump
            return at + 1
