"""Instructions that a warp executes as one: exchanges, reductions, and products of small matrices on tensor cores.

Everything here works on arrays [warps, 32]. Where an element of a matrix lies is as the PTX manual draws it.
"""

from __future__ import annotations

import functools

import numpy as np

from tests.emulator.numbers import Array, canonical, extreme, from_bfloat16

LANE = np.arange(32)
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}  # fmt: skip


def reduction(kind: str, propagate: bool, values: Array) -> Array:
    """redux.sync, for every thread. `propagate`: of float32, whether any NaN is the result."""
    if values.dtype == np.float32:
        pair = lambda a, b: extreme(a, b, kind == "max", propagate)
        return np.repeat(functools.reduce(pair, values.T)[:, None], 32, axis=1)
    result = REDUCTIONS[kind].reduce(values, axis=1, dtype=values.dtype)
    return np.repeat(result[:, None], 32, axis=1)


def shuffle(mode: str, values: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """shfl.sync: (what each thread gets, whether it came from a thread in range)."""
    segment, bound, by = (clamp >> 8) & 31, clamp & 31, by & 31
    first, last = LANE & segment, (LANE & segment) | (bound & ~segment)
    source = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by, "idx": first | (by & ~segment)}[mode]
    inside: Array = np.less_equal(last, source) if mode == "up" else np.less_equal(source, last)
    return np.take_along_axis(values, np.where(inside, source, LANE), axis=1), inside


def vote(kind: str, values: Array) -> Array:
    """vote.sync: ballot gives bits, the others predicates."""
    if kind == "ballot":
        bits = (values.astype(np.uint64) << LANE.astype(np.uint64)).sum(axis=1).astype(np.uint32)
        return np.repeat(bits[:, None], 32, axis=1)
    result = {"all": values.all(axis=1), "any": values.any(axis=1)}[kind]
    return np.repeat(result[:, None], 32, axis=1)


def elements(words: list[Array], kind: str) -> Array:
    """[..., elements]: what words of 32 bits hold, one after another."""
    packed = np.stack(words, axis=-1)
    if kind == "s8":
        return packed.view(np.int8).astype(np.int64)
    halves = packed.view(np.uint16)
    wide = from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16)
    return wide.astype(np.float64)


GROUP, PLACE = (LANE >> 2)[:, None], (LANE & 3)[:, None]


def left(kind: str, registers: list[Array]) -> Array:
    """The first matrix [warps, 16, depth] of a product: 32 of s8, 16 of bf16 or f16."""
    run = 4 if kind == "s8" else 2  # elements in a register
    register, element = np.divmod(np.arange(4 * run)[None, :], run)
    values = elements(registers, kind)
    matrix = np.zeros((len(values), 16, 8 * run), values.dtype)
    matrix[:, GROUP + 8 * (register & 1), PLACE * run + element + 4 * run * (register >> 1)] = values
    return matrix


def right(kind: str, registers: list[Array]) -> Array:
    """The second matrix [warps, depth, 8]."""
    run = 4 if kind == "s8" else 2
    register, element = np.divmod(np.arange(2 * run)[None, :], run)
    values = elements(registers, kind)
    matrix = np.zeros((len(values), 8 * run, 8), values.dtype)
    matrix[:, PLACE * run + element + 4 * run * register, GROUP] = values
    return matrix


def add_product(kind: str, a: Array, b: Array, c: list[Array], saturate: bool = False) -> list[Array]:
    """Registers of a * b + c, summed in wider numbers and rounded once."""
    total, results = a @ b, []
    for i, start in enumerate(c):
        part = total[:, (LANE >> 2) + 8 * (i >> 1), (LANE & 3) * 2 + (i & 1)]
        if kind == "s8":
            whole = part + start.view(np.int32)
            whole = np.clip(whole, -(2**31), 2**31 - 1) if saturate else whole
            results.append(whole.astype(np.int32).view(np.uint32))
        else:
            results.append(canonical((part + start.view(np.float32)).astype(np.float32)).view(np.uint32))
    return results


def from_rows(rows: list[Array], transposed: bool) -> list[Array]:
    """ldmatrix: rows [warps, 8 rows, 8 halves] of each matrix -> the register of each thread."""
    registers = []
    for matrix in rows:
        matrix = matrix.swapaxes(1, 2) if transposed else matrix
        pair = np.ascontiguousarray(matrix).reshape(-1, 32, 2)
        registers.append(pair.view(np.uint32)[..., 0])
    return registers


def to_rows(registers: list[Array], transposed: bool) -> list[Array]:
    """stmatrix: the reverse of `from_rows`."""
    matrices = [np.ascontiguousarray(r)[..., None].view(np.uint16).reshape(-1, 8, 8) for r in registers]
    return [m.swapaxes(1, 2) if transposed else m for m in matrices]
