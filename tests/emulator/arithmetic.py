"""What each instruction computes that works on one thread's registers alone.

`operation` gives a function on numpy arrays, a value a thread, with the types of what goes in and what comes out. An
instruction, or a variant of one, that is not known raises NotImplementedError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.emulator import numbers
from tests.emulator.numbers import DTYPES, Array, canonical, flush


class Operation(NamedTuple):
    """sources and result: types as PTX calls them."""

    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge}  # fmt: skip
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def operation(name: str, seed: int) -> Operation:
    """The operation of that name. `seed`: of the errors of approximate functions."""
    op, *mods = name.split(".")
    make = _MAKERS.get(op)
    made = make(op, mods, seed) if make else None
    if made is None:
        raise NotImplementedError(name)
    return made


def _size(kind: str) -> int:
    return int(np.dtype(DTYPES[kind]).itemsize)


def _is_int(kind: str) -> bool:
    return kind[0] in "usb" and kind[1:].isdigit()


def _basic(op: str, mods: list[str], seed: int) -> Operation | None:
    """Additions, subtractions, products, minima and maxima, negation, absolute values."""
    *mods, kind = mods
    count = 1 if op in ("neg", "abs") else 2
    if kind in ("s16x2", "u16x2", "f32x2"):
        return _by_halves(_basic(op, [*mods, kind.removesuffix("x2")], seed))
    if kind in ("f16", "bf16") and mods == ["rn", "f32"] and op in ("add", "sub"):  # the first is widened
        widened = _convert("cvt", ["f32", kind], seed)
        return widened and Operation(
            lambda a, b: canonical(widened.function(a) + (b if op == "add" else -b)), (kind, "f32"), "f32"
        )
    if _is_int(kind) and op != "mul" and not mods:
        functions: dict[str, Callable[..., Array]] = {
            "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
        }  # fmt: skip
        return Operation(functions[op], (kind,) * count, kind)
    if op == "mul" and _is_int(kind):
        return _product(mods, kind)
    if kind != "f32" or not set(mods) <= {"rn", "ftz", "NaN"} or ("NaN" in mods) != ("NaN" in mods and op[0] == "m"):
        return None
    floats: dict[str, Callable[..., Array]] = {
        "add": lambda a, b: canonical(a + b),
        "sub": lambda a, b: canonical(a - b),
        "mul": lambda a, b: canonical(a * b),
        "min": lambda a, b: numbers.extreme(a, b, False, "NaN" in mods),
        "max": lambda a, b: numbers.extreme(a, b, True, "NaN" in mods),
        "neg": np.negative,
        "abs": np.abs,
    }
    return Operation(_flushed(floats[op], "ftz" in mods), (kind,) * count, kind)


def _by_halves(half: Operation | None) -> Operation | None:
    """The same on two numbers in a register."""
    if half is None:
        return None
    function, dtype = half.function, DTYPES[half.result]
    whole = f"b{16 * dtype.itemsize}"

    def both(*args: Array) -> Array:
        result = function(*(np.ascontiguousarray(a)[:, None].view(dtype) for a in args))
        return np.ascontiguousarray(result).view(DTYPES[whole])[:, 0]

    return Operation(both, (whole,) * len(half.sources), whole)


def _flushed(function: Callable[..., Array], ftz: bool) -> Callable[..., Array]:
    return (lambda *args: flush(function(*map(flush, args)))) if ftz else function


def _product(mods: list[str], kind: str) -> Operation | None:
    if mods == ["lo"]:
        return Operation(np.multiply, (kind, kind), kind)
    if mods not in (["wide"], ["hi"]) or _size(kind) > 4:
        return None
    bits = 8 * _size(kind)
    wide = f"{kind[0]}{2 * bits}"
    product = lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide])
    if mods == ["wide"]:
        return Operation(product, (kind, kind), wide)
    return Operation(lambda a, b: (product(a, b) >> bits).astype(DTYPES[kind]), (kind, kind), kind)


def _mad(op: str, mods: list[str], seed: int) -> Operation | None:
    *mods, kind = mods
    product = _product(mods, kind)
    if product is None:
        return None
    return Operation(lambda a, b, c: product.function(a, b) + c, (kind, kind, product.result), product.result)


def _saturate(x: Array) -> Array:
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def _fma(op: str, mods: list[str], seed: int) -> Operation | None:
    rounding, *mods = mods
    if mods[-1] == "f32x2":
        return _by_halves(_fma(op, [rounding, *mods[:-1], "f32"], seed))
    if rounding == "rn" and mods in (["f32", "f16"], ["f32", "bf16"]):  # the product is of halves
        widen = _convert("cvt", mods, seed)
        return widen and Operation(
            lambda a, b, c: canonical(numbers.fma(widen.function(a), widen.function(b), c)),
            (mods[1], mods[1], "f32"),
            "f32",
        )
    saturated = mods[0] == "sat"
    mods = mods[saturated:]
    if rounding not in ("rn", "rm") or mods not in (["f32"], ["ftz", "f32"]):
        return None
    limit = _saturate if saturated else canonical
    function = lambda a, b, c: limit(numbers.fma(a, b, c, rounding))
    return Operation(_flushed(function, "ftz" in mods), ("f32",) * 3, "f32")


def _approximate(op: str, mods: list[str], seed: int) -> Operation | None:
    variant, *mods = mods
    if mods not in (["f32"], ["ftz", "f32"]) or variant not in ("approx", "full", "rn"):
        return None
    off = 0 if variant == "rn" else seed
    function = lambda *args: numbers.approximate(op, off, *args)
    return Operation(_flushed(function, "ftz" in mods), ("f32",) * (2 if op == "div" else 1), "f32")


def _divide(op: str, mods: list[str], seed: int) -> Operation | None:
    if len(mods) != 1 or not _is_int(mods[0]):
        return _approximate(op, mods, seed) if op == "div" else None
    kind = mods[0]

    def function(a: Array, b: Array) -> Array:
        if (b == 0).any():
            raise ZeroDivisionError(f"{op}.{kind}")
        quotient = np.trunc(a.astype(np.longdouble) / b.astype(np.longdouble)).astype(a.dtype)  # 64 bits of mantissa
        return quotient if op == "div" else a - quotient * b

    return Operation(function, (kind, kind), kind)


def _logic(op: str, mods: list[str], seed: int) -> Operation | None:
    (kind,) = mods
    if op == "not":
        return Operation(np.invert, (kind,), kind)
    return Operation(BOOLEAN[op], (kind, kind), kind)


def _shift(op: str, mods: list[str], seed: int) -> Operation | None:
    (kind,) = mods
    bits = 8 * _size(kind)

    def function(a: Array, by: Array) -> Array:
        clamped = np.minimum(by, bits - 1).astype(a.dtype)
        if op == "shr" and kind[0] == "s":
            return a >> clamped
        return np.where(by >= bits, a.dtype.type(0), a << clamped if op == "shl" else a >> clamped)

    return Operation(function, (kind, "u32"), kind)


def _funnel(op: str, mods: list[str], seed: int) -> Operation | None:
    direction, mode, kind = mods
    if kind != "b32" or direction not in "lr" or mode not in ("wrap", "clamp"):
        return None

    def function(low: Array, high: Array, by: Array) -> Array:
        by = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        shifted = both >> by if direction == "r" else (both << by) >> np.uint64(32)
        if direction == "l":  # a shift by 32 leaves the low word
            shifted = np.where(by == 32, low, shifted)
        return shifted.astype(np.uint32)

    return Operation(function, ("b32", "b32", "u32"), "b32")


def _extract(op: str, mods: list[str], seed: int) -> Operation | None:
    """bfe: a run of bits, and what lies beyond the top is the sign for s32 and s64, zero for u32."""
    (kind,) = mods
    if kind not in ("s32", "s64", "u32"):
        return None
    bits = int(kind[1:])

    def function(a: Array, start: Array, length: Array) -> Array:
        start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        shifted = a.astype(np.int64) >> np.minimum(start, 32 if kind == "u32" else bits - 1)
        lost = np.int64(64) - np.minimum(length, bits)
        if kind != "u32":
            taken = (shifted << np.minimum(lost, 63)) >> np.minimum(lost, 63)
        else:
            taken = shifted & ((np.int64(1) << np.minimum(length, 32)) - 1)
        return np.where(length == 0, 0, taken).astype(a.dtype)

    return Operation(function, (kind, "u32", "u32"), kind)


def _insert(op: str, mods: list[str], seed: int) -> Operation | None:
    if mods != ["b32"]:
        return None

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = np.minimum(start & np.uint32(255), 32), np.minimum(length & np.uint32(255), 32)
        one = np.uint64(1)
        mask = (((one << length.astype(np.uint64)) - one) << start.astype(np.uint64)).astype(np.uint32)
        put = (a.astype(np.uint64) << start.astype(np.uint64)).astype(np.uint32)
        return (b & ~mask) | (put & mask)

    return Operation(function, ("b32", "b32", "u32", "u32"), "b32")


def _count(op: str, mods: list[str], seed: int) -> Operation | None:
    (kind,) = mods
    bits = 8 * _size(kind)
    spread = lambda a: (a[:, None] >> np.arange(bits, dtype=a.dtype)) & a.dtype.type(1)
    if op == "popc":
        return Operation(lambda a: np.bitwise_count(a).astype(np.uint32), (kind,), "u32")
    if op == "clz":
        first: Callable[..., Array] = lambda a: np.where(a, spread(a)[:, ::-1].argmax(axis=1), bits).astype(np.uint32)
        return Operation(first, (kind,), "u32")
    weights = np.uint64(1) << np.arange(bits, dtype=np.uint64)[::-1]
    return Operation(lambda a: (spread(a) * weights).sum(axis=1).astype(a.dtype), (kind,), kind)


def _permute(op: str, mods: list[str], seed: int) -> Operation | None:
    if mods != ["b32"]:
        return None

    def function(a: Array, b: Array, selector: Array) -> Array:
        both, result = b.astype(np.uint64) << np.uint64(32) | a, np.zeros_like(a)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
            byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
            result = result | (byte << np.uint32(8 * i))
        return result

    return Operation(function, ("b32", "b32", "b32"), "b32")


def _lop3(op: str, mods: list[str], seed: int) -> Operation | None:
    if mods != ["b32"]:
        return None

    def function(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for row in range(8):
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            result = result | np.where((table >> np.uint32(row)) & np.uint32(1), term, np.uint32(0))
        return result

    return Operation(function, ("b32", "b32", "b32", "b32"), "b32")


def _select(op: str, mods: list[str], seed: int) -> Operation | None:
    (kind,) = mods
    choose: Callable[..., Array] = lambda a, b, p: np.where(p, a, b)
    return Operation(choose, (kind, kind, "pred"), kind)


def _compare(op: str, mods: list[str], seed: int) -> Operation | None:
    relation, *mods, kind = mods
    as_float: Callable[[Array], Array] | None = {
        "f32": flush if "ftz" in mods else lambda x: x,
        "f16": lambda x: x.astype(np.float32),
        "bf16": numbers.from_bfloat16,
    }.get(kind)
    mods = [mod for mod in mods if mod != "ftz"]
    if len(mods) > 1 or not set(mods) <= set(BOOLEAN):
        return None
    if as_float:
        unordered = lambda a, b: np.isnan(a) | np.isnan(b)
        compare: Callable[..., Array] | None = {"nan": unordered, "num": lambda a, b: ~unordered(a, b)}.get(relation)
        if compare is None and relation in ORDERED:
            ordered = ORDERED[relation]
            compare = lambda a, b: ordered(a, b) & ~unordered(a, b)  # numpy's != holds for NaN
        elif compare is None and relation.removesuffix("u") in ORDERED:
            either = ORDERED[relation.removesuffix("u")]
            compare = lambda a, b: either(a, b) | unordered(a, b)
    else:
        compare = (UNSIGNED if kind[0] == "u" and relation in UNSIGNED else ORDERED).get(relation)
        if kind[0] == "b" and relation not in ("eq", "ne"):
            return None
    if compare is None:
        return None
    found = compare
    if as_float:
        found = lambda a, b: compare(as_float(a), as_float(b))
    if not mods:
        return Operation(found, (kind, kind), "pred")
    combine = BOOLEAN[mods[0]]
    return Operation(lambda a, b, c: combine(found(a, b), c), (kind, kind, "pred"), "pred")


_ROUNDED: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(op: str, mods: list[str], seed: int) -> Operation | None:
    *mods, to, kind = mods
    known = set(mods)
    if to in ("f16x2", "bf16x2") and kind == "f32" and mods == ["rn"]:
        narrow = numbers.to_float16 if to == "f16x2" else numbers.to_bfloat16
        pair = lambda high, low: narrow(high).astype(np.uint32) << 16 | narrow(low)
        return Operation(pair, ("f32", "f32"), "b32")
    if to in ("f16", "bf16") and kind == "f32" and mods == ["rn"]:
        return Operation(numbers.to_float16 if to == "f16" else numbers.to_bfloat16, ("f32",), "b16")
    if to == "f32" and kind in ("f16", "bf16") and not mods:
        widen = numbers.from_bfloat16 if kind == "bf16" else lambda x: canonical(x.astype(np.float32))
        return Operation(widen, (kind,), "f32")
    if to == kind == "f32" and known <= {"ftz", "sat", *_ROUNDED}:
        steps: list[Callable[[Any], Any]] = [np.copy, *(_ROUNDED[mod] for mod in mods if mod in _ROUNDED)]
        if "sat" in known:
            steps.append(_saturate)

        def function(x: Array) -> Array:
            for step in steps:
                x = step(x)
            return canonical(x)

        return Operation(_flushed(function, "ftz" in known), ("f32",), "f32")
    if _is_int(to) and _is_int(kind) and not mods:
        return Operation(lambda x: x.astype(DTYPES[to]), (kind,), to)
    if to == "f32" and _is_int(kind) and mods == ["rn"]:
        return Operation(lambda x: x.astype(np.float32), (kind,), to)
    if _is_int(to) and kind == "f32" and len(mods) == 1 and mods[0] in _ROUNDED:
        return Operation(lambda x: numbers.to_integer(_ROUNDED[mods[0]](x), DTYPES[to]), (kind,), to)
    return None


def _move(op: str, mods: list[str], seed: int) -> Operation | None:
    if op == "cvta" and mods in (["to", "global", "u64"], ["local", "u64"]):
        mods = ["u64"]
    (kind,) = mods
    return Operation(np.copy, (kind,), kind)  # a copy, since registers are written in place


_MAKERS: dict[str, Callable[[str, list[str], int], Operation | None]] = {
    **dict.fromkeys(("add", "sub", "mul", "min", "max", "neg", "abs"), _basic),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("ex2", "rcp", "rsqrt", "sqrt", "lg2", "tanh", "sin", "cos"), _approximate),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("popc", "clz", "brev"), _count),
    **dict.fromkeys(("mov", "cvta"), _move),
    "mad": _mad,
    "fma": _fma,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _lop3,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
}
