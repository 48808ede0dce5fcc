"""The memory that an emulated launch sees, and the checks that a GPU does not make.

Global memory is that of this process, in the ranges that were registered and nowhere else. Programs run in no order and
warps at no common pace, so what one reads or overwrites of another's is an error, unless a barrier stands between.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tests.emulator.numbers import Array

POISON = 0xA5
NOBODY, SEVERAL, ATOMICALLY = -1, -2, -3


class Fault(AssertionError):
    """The kernel did what it must not."""


class Marks:
    """Who has written and who has read each cell since the last barrier."""

    def __init__(self, cells: int) -> None:
        self.writer = np.full(cells, NOBODY, np.int32)
        self.reader = np.full(cells, NOBODY, np.int32)

    def read(self, cells: Array, who: Array) -> None:
        who = np.broadcast_to(who, cells.shape)
        writer, reader = self.writer[cells], self.reader[cells]
        wrong = (writer != NOBODY) & (writer != who)
        if wrong.any():
            at = wrong.argmax()
            raise Fault(f"{who.flat[at]} reads what {writer.flat[at]} wrote")
        self.reader[cells] = np.where((reader == NOBODY) | (reader == who), who, SEVERAL)
        self.reader[cells[self.reader[cells] != who]] = SEVERAL  # of several at once one would remain

    def write(self, cells: Array, who: Array, changed: Array) -> None:
        who = np.broadcast_to(who, cells.shape)
        for kind, other in (("wrote", self.writer[cells]), ("read", self.reader[cells])):
            wrong = (other != NOBODY) & (other != who) & changed
            if wrong.any():
                at = wrong.argmax()
                raise Fault(f"{who.flat[at]} overwrites what {other.flat[at]} {kind}")
        self.writer[cells] = who

    def change(self, cells: Array, who: Array) -> None:
        """Atomically, as others may at the same time; but nobody may read or write them besides."""
        who = np.broadcast_to(who, cells.shape)
        for kind, other in (("wrote", self.writer[cells]), ("read", self.reader[cells])):
            wrong = (other != NOBODY) & (other != who) & (other != ATOMICALLY)
            if wrong.any():
                at = wrong.argmax()
                raise Fault(f"{who.flat[at]} changes what {other.flat[at]} {kind}")
        self.writer[cells] = ATOMICALLY

    def clear(self, cells: Any = slice(None)) -> None:
        self.writer[cells] = self.reader[cells] = NOBODY


class Range:
    """Some bytes of this process."""

    def __init__(self, start: int, size: int, cell: int, writable: bool) -> None:
        self.start, self.stop, self.cell, self.writable = start, start + size, cell, writable
        self.base = start // 16 * 16
        length = -(-(self.stop - self.base) // 16) * 16
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.base))
        self.views = {width: whole.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.marks = Marks(-(-size // cell))
        self.used = False


class Global:
    """The registered ranges, as one launch sees them."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def add(self, start: int, size: int, cell: int, writable: bool = True) -> None:
        """Registers `size` bytes; `cell`: those of an element. A range registered again replaces what it overlaps."""
        stop = start + size
        self.ranges = [r for r in self.ranges if r.stop <= start or stop <= r.start]
        if size:
            self.ranges.append(Range(start, size, cell, writable))

    def new_launch(self) -> None:
        for r in self.ranges:
            if r.used:
                r.marks.clear()
                r.used = False

    def parts(self, addresses: Array, size: int) -> list[tuple[Range, Any]]:
        """Which range each access lies in: (range, indices of the accesses)."""
        if (addresses % size).any():
            raise Fault(f"address {int(addresses[(addresses % size).argmax()]):#x} is no multiple of {size}")
        found: list[tuple[Range, Any]] = []
        left = np.arange(len(addresses))
        for r in self.ranges:
            here = addresses[left]
            inside = (here >= r.start) & (here + np.uint64(size) <= r.stop)
            if inside.any():
                r.used = True
                found.append((r, left[inside]))
                left = left[~inside]
        if not len(left):
            return found
        address = int(addresses[left[0]])
        near = min(self.ranges, key=lambda r: min(abs(address - r.start), abs(address - r.stop)), default=None)
        where = near and f"; the nearest tensor lies at {near.start - address:+d} to {near.stop - address:+d} bytes"
        raise Fault(f"{size} bytes at {address:#x} are in no tensor{where}; {len(left)} accesses like this")

    def _cells(self, r: Range, addresses: Array, size: int) -> Array:
        first = ((addresses - np.uint64(r.start)) // np.uint64(r.cell)).astype(np.int64)
        return first[:, None] + np.arange(-(-size // r.cell))

    def load(self, addresses: Array, width: int, count: int, who: Array) -> list[Array]:
        """`count` words of `width` bytes at each address; `who`: the program of each."""
        words = [np.empty(len(addresses), f"u{width}") for _ in range(count)]
        for r, at in self.parts(addresses, width * count):
            here = addresses[at]
            r.marks.read(self._cells(r, here, width * count), who[at, None])
            index = ((here - np.uint64(r.base)) // np.uint64(width)).astype(np.int64)
            for i, word in enumerate(words):
                word[at] = r.views[width][index + i]
        return words

    def store(self, addresses: Array, width: int, words: list[Array], who: Array) -> None:
        size = width * len(words)
        for r, at in self.parts(addresses, size):
            if not r.writable:
                raise Fault("writes to an argument that is only to be read")
            here, view = addresses[at], r.views[width]
            index = ((here - np.uint64(r.base)) // np.uint64(width)).astype(np.int64)[:, None] + np.arange(len(words))
            values = np.stack([word[at] for word in words], axis=1)
            changed = (view[index] != values).any(axis=1, keepdims=True)
            r.marks.write(self._cells(r, here, size), who[at, None], changed)
            view[index] = values
            if (view[index] != values).any():
                raise Fault("threads write different values to one place")

    def add_at(self, addresses: Array, values: Array) -> Array:
        """Atomic additions, one after another; returns what each found."""
        width, found = values.dtype.itemsize, np.empty_like(values)
        for r, at in self.parts(addresses, width):
            if not r.writable:
                raise Fault("adds to an argument that is only to be read")
            view = r.views[width]
            index = ((addresses[at] - np.uint64(r.base)) // np.uint64(width)).astype(np.int64)
            order = np.argsort(index, kind="stable")
            place, value = index[order], values[at][order]
            before = np.cumsum(value, dtype=value.dtype) - value
            first = np.searchsorted(place, place)
            found[at[order]] = view[place] + before - before[first]
            np.add.at(view, index, values[at])
        return found


class Shared:
    """Shared memory of all programs of a batch, a copy each; or the local memory of their threads."""

    BASE = 1024  # where it begins: not at 0, which would hide an address that is missing

    def __init__(self, size: int, programs: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        whole = np.full(self.stride * programs, POISON, np.uint8)
        self.views = {width: whole.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.marks = Marks(len(whole))

    def index(self, addresses: Array, size: int, program: Array) -> Array:
        """The first byte of each access, of all programs' memory."""
        if (addresses % size).any():
            raise Fault(f"address {int(addresses[(addresses % size).argmax()]):#x} is no multiple of {size}")
        offset = addresses.astype(np.int64) - self.BASE
        wrong = (offset < 0) | (offset + size > self.size)
        if wrong.any():
            raise Fault(f"{size} bytes at {int(offset[wrong.argmax()])} of the {self.size} that there are")
        return offset + program * self.stride

    def load(self, addresses: Array, width: int, count: int, program: Array, who: Array) -> list[Array]:
        first = self.index(addresses, width * count, program)
        self.marks.read(first[:, None] + np.arange(width * count), who[:, None])
        return [self.views[width][first // width + i] for i in range(count)]

    def store(self, addresses: Array, width: int, words: list[Array], program: Array, who: Array) -> None:
        size = width * len(words)
        first = self.index(addresses, size, program)
        index, view = first[:, None] // width + np.arange(len(words)), self.views[width]
        values = np.stack(words, axis=1)
        changed = (view[index] != values).any(axis=1, keepdims=True)
        self.marks.write(first[:, None] + np.arange(size), who[:, None], changed)
        view[index] = values
        if (view[index] != values).any():
            raise Fault("threads write different values to one place")

    def change(self, kind: str, addresses: Array, values: Array, program: Array, who: Array) -> None:
        """Atomic additions, or unions of bits, of words of 32 bits."""
        first = self.index(addresses, 4, program)
        self.marks.change(first[:, None] + np.arange(4), who[:, None])
        {"add": np.add, "or": np.bitwise_or}[kind].at(self.views[4], first // 4, values)

    def barrier(self, programs: Array) -> None:
        """Whatever these programs did before is past."""
        writer, reader = (marks.reshape(-1, max(self.stride, 1)) for marks in (self.marks.writer, self.marks.reader))
        if self.stride:
            writer[programs] = reader[programs] = NOBODY
