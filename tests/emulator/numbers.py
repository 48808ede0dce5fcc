"""Numbers as a GPU computes them: roundings, NaN, and functions that are only approximately right.

What the PTX manual leaves open is chosen here, by a seed: an approximate function is off by any error that the manual
allows, always the same for the same argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{8 * size}": np.dtype(f"{letter}{size}") for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
       for size in (1, 2, 4, 8)},
    "bf16": np.dtype("u2"),
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
}  # fmt: skip
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # the one that arithmetic gives


def canonical(x: Array) -> Array:
    """float32 with the GPU's NaN for every NaN."""
    nan = np.isnan(x)
    return np.where(nan, NAN, x) if nan.any() else x


def flush(x: Array) -> Array:
    """Denormal numbers to zero of the same sign."""
    small = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, and where that is inexact its last bit is set: rounding again then gives what one would."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    inexact = (error != 0) & np.isfinite(total) & ((total.view(np.uint64) & 1) == 0)
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, towards), total) if inexact.any() else total


def down(x: Array) -> Array:
    """float64 to float32, rounded towards minus infinity."""
    near = x.astype(np.float32)
    return np.where(near.astype(np.float64) > x, np.nextafter(near, np.float32(-np.inf)), near)


def fma(a: Array, b: Array, c: Array, rounding: str = "rn") -> Array:
    """a * b + c, rounded once."""
    wide = _sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    return down(wide) if rounding == "rm" else wide.astype(np.float32)


def to_bfloat16(x: Array) -> Array:
    """The bits, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float16(x: Array) -> Array:
    """The bits."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_integer(x: Array, dtype: Any) -> Array:
    """What is integral already, clamped to what the type can hold; NaN is 0."""
    info = np.iinfo(dtype)
    inside = np.clip(np.nan_to_num(x.astype(np.float64)), float(info.min), float(info.max))
    result = inside.astype(dtype)
    return np.where(x >= float(info.max), dtype.type(info.max), result)


def extreme(a: Array, b: Array, largest: bool, propagate: bool = False) -> Array:
    """Minimum or maximum: a number if there is one (unless NaN shall propagate), and -0.0 is below 0.0."""
    same = a == b
    bits = a.view(np.uint32) & b.view(np.uint32) if largest else a.view(np.uint32) | b.view(np.uint32)
    chosen = (np.fmax if largest else np.fmin)(a, b)
    chosen = np.where(same, bits.view(np.float32), chosen)
    return np.where(np.isnan(a) | np.isnan(b), NAN, chosen) if propagate else canonical(chosen)


# Largest relative errors, from the manual's tables.
APPROXIMATE: dict[str, tuple[Callable[..., Array], float]] = {
    "ex2": (np.exp2, 2**-22.5),
    "rcp": (np.reciprocal, 2**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2**-22.9),
    "sqrt": (np.sqrt, 2**-23),
    "lg2": (np.log2, 2**-22),
    "tanh": (np.tanh, 2**-10.987),
    "sin": (np.sin, 2**-20.9),
    "cos": (np.cos, 2**-20.9),
    "div": (np.divide, 2**-22),
}


def approximate(name: str, seed: int, *args: Array) -> Array:
    """One of `APPROXIMATE` on float32, off by up to its largest error, then rounded; seed 0: rounded alone."""
    function, error = APPROXIMATE[name]
    # rsqrt(-0.0) is -inf and so is its reciprocal: signs of zeros survive float64.
    wide = function(*(x.astype(np.float64) for x in args))
    if seed:
        mixed: Any = np.uint32(seed * 0x9E3779B1 & 0xFFFFFFFF)
        for x in args:
            mixed = (mixed ^ x.view(np.uint32)) * np.uint32(0x85EBCA6B)
            mixed = mixed ^ (mixed >> np.uint32(15))
        part = mixed.astype(np.float64) / 2.0**31 - 1.0
        exact = np.isin(wide, (0.0, 1.0)) if name == "ex2" else wide == 0
        wide = np.where(exact, wide, wide * (1.0 + part * error))
    return canonical(wide.astype(np.float32))
