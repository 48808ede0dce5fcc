"""From instructions to functions step(state, lanes): those that a warp, or several, must execute as one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.emulator import warp
from tests.emulator.numbers import Array
from tests.emulator.operands import Lanes, Operands, Read, Step
from tests.emulator.ptx import Instruction, Operand


class Collective(Operands):
    """The part of `translate.Translator` for them."""

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
            registers = [state.by_warp(read, lanes) for read in reads]
            for m, matrix in enumerate(warp.to_rows(registers, transposed)):
                who = warps[:, 8 * m : 8 * m + 8].ravel()
                words = list(np.ascontiguousarray(matrix.reshape(-1, 8).T))
                state.store("shared", rows[:, 8 * m : 8 * m + 8].ravel(), 2, words, who)

        return store

    def _members(self, operand: Operand) -> Step:
        read = self.read(operand, "u32")

        def check(state: Any, lanes: Lanes) -> None:
            state.warps(lanes)
            if (read(state, lanes) != 0xFFFFFFFF).any():
                raise NotImplementedError("a collective instruction of part of a warp")

        return check

    def _redux(self, instruction: Instruction) -> Step:
        _, sync, kind, *mods, dtype = instruction.name.split(".")
        known = warp.REDUCTIONS if dtype != "f32" else ("min", "max")
        if sync != "sync" or kind not in known or mods not in ([], ["NaN"] * (dtype == "f32")):
            raise NotImplementedError(instruction.text)
        to, source, members = instruction.operands
        write, read, check = self.write(to), self.read(source, dtype), self._members(members)

        def reduce(state: Any, lanes: Lanes) -> None:
            check(state, lanes)
            values = state.by_warp(read, lanes)
            write(state, warp.reduction(kind, bool(mods), values).ravel(), lanes)

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
            values, inside = warp.shuffle(mode, *(state.by_warp(read, lanes) for read in reads))
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
            values = state.by_warp(read, lanes)
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
            a, b, c = ([state.by_warp(read, lanes) for read in matrix] for matrix in reads)
            total = warp.add_product(kind, warp.left(kind, a), warp.right(kind, b), c, saturate=kind == "s8")
            for write, register in zip(writes, total, strict=True):
                write(state, register.ravel(), lanes)

        return multiply

    def _wgmma(self, instruction: Instruction) -> Step | None:
        """Products of four warps. They are done at once, so that one is not waited for would go unseen."""
        name, operands = instruction.name, instruction.operands
        if name in ("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned"):
            return lambda state, lanes: state.warps(lanes, 128)
        shape = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.(b?f16)\.\2|32\.s32\.(s8)\.s8)"
        found = re.fullmatch(shape, name)
        if not found:
            raise NotImplementedError(instruction.text)
        columns, kind = int(found[1]), found[2] or found[3]
        to, a, b, keep, *numbers = operands
        from_memory = not isinstance(a, tuple)
        signs, turned = numbers[:2], [number != "0" for number in numbers[2:]]
        if (kind == "s8" and numbers) or (kind != "s8" and (signs != ["1", "1"] or len(turned) != 1 + from_memory)):
            raise NotImplementedError(instruction.text)
        turned = turned or [False, False]
        assert isinstance(to, tuple)
        assert len(to) == columns // 2, instruction.text
        sums, writes = [self.read(part, "b32") for part in to], [self.write(part) for part in to]
        at_b, kept = self.read(b, "b64"), self.read(keep, "pred")
        at_a = self.read(a, "b64") if from_memory else None
        registers = [self.read(part, "b32") for part in a] if isinstance(a, tuple) else []

        def multiply(state: Any, lanes: Lanes) -> None:
            state.warps(lanes, 128)
            if at_a:
                rows = self._tile(state, lanes, at_a, kind, 64, turned[0])
                first = np.arange(len(rows)) % 4 * 16  # a warp has 16 of them
                left = np.take_along_axis(rows, first[:, None, None] + np.arange(16)[:, None], axis=1)
            else:
                left = warp.left(kind, [state.by_warp(read, lanes) for read in registers])
            right = self._tile(state, lanes, at_b, kind, columns, turned[-1]).swapaxes(1, 2)
            start = [np.where(state.by_warp(kept, lanes), state.by_warp(read, lanes), np.uint32(0)) for read in sums]
            for i in range(0, len(to), 4):
                part = right[:, :, 2 * i : 2 * i + 8]
                for write, register in zip(
                    writes[i : i + 4], warp.add_product(kind, left, part, start[i : i + 4]), strict=True
                ):
                    write(state, register.ravel(), lanes)

        return multiply

    def _tile(self, state: Any, lanes: Lanes, at: Read, kind: str, rows: int, turned: bool) -> Array:
        """[warps, rows, depth] of the matrix in shared memory that a descriptor tells, 32 bytes deep."""
        descriptor = state.by_warp(at, lanes)[:, 0].astype(np.int64)
        field = lambda low: (descriptor >> low & 0x3FFF)[:, None, None] * 16
        start, leading, stride = field(0), field(16), field(32)
        (swizzle,) = np.unique(descriptor >> 62 & 3)
        width = (0, 128, 64, 32)[swizzle]
        if (descriptor >> 49 & 7).any() or (turned and not width):
            raise NotImplementedError("a matrix descriptor of another kind")
        depth = 32 if kind == "s8" else 16
        if turned:  # neighbours in a column: lines of `width` bytes, one for each step in depth
            chunk, step = np.arange(rows // 8)[None, None, :], np.arange(depth)[None, :, None]
            line = chunk * 16 // width * leading + step // 8 * stride + step % 8 * width + chunk * 16 % width
        else:
            row, chunk = np.arange(rows)[None, :, None], np.arange(2)[None, None, :]
            line = row // 8 * stride + (row % 8 * width + chunk * 16 if width else chunk * leading + row % 8 * 16)
        address = start + line
        address = address ^ (address >> 7 & width // 16 - 1) << 4 if width else address
        who = np.repeat(state.warps(lanes)[:, 0], address[0].size)
        words = state.load("shared", address.ravel().astype(np.uint32), 4, 4, who)
        tile = warp.elements(words, kind).reshape(*address.shape[:2], -1)
        return tile.swapaxes(1, 2) if turned else tile

    def _fence(self, instruction: Instruction) -> Step:
        if instruction.name != "fence.proxy.async.shared::cta":
            raise NotImplementedError(instruction.text)
        return lambda state, lanes: None

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
