"""Checks of what a caller passes in, and the view of a wider array's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclass(frozen=True)
class Columns:
    """A view of `width` columns of a wider array [T, stride], from `first` on: rows that are strided, without a copy.

    Taken for `route`'s logits, `router_logits`' x, `dispatch`'s x and `combine`'s rows, and nowhere else. The GPU
    kernels read the columns in place; XLA may copy them.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> wide = jnp.zeros((4, 96), jnp.bfloat16)
      >>> jaxmoe.Columns(wide, first=32, width=64).shape
      (4, 64)
    """

    array: jax.Array
    first: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.array.shape[0], self.width)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return 2


jax.tree_util.register_dataclass(Columns, data_fields=["array"], meta_fields=["first", "width"])

Rows = jax.Array | Columns


def base(x: Rows) -> tuple[jax.Array, int]:
    """(the array that lies in memory, the first column to read)."""
    return (x.array, x.first) if isinstance(x, Columns) else (x, 0)


def dense(x: Rows) -> jax.Array:
    """The columns as an array of their own, for XLA."""
    return x.array[:, x.first : x.first + x.width] if isinstance(x, Columns) else x


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}"


def check_array(
    name: str, value: Any, shape: Sequence[int | str], dtypes: Sequence[Any] = FLOATS, *, columns: bool = False
) -> None:
    """Raises ValueError unless `value` is an array of one of `dtypes` with that shape; a letter stands for any size.

    Only with `columns` may it be a `Columns` view.
    """
    names = " or ".join(jnp.dtype(d).name for d in dtypes)
    wanted = f"{names} [{', '.join(map(str, shape))}]"
    if columns and isinstance(value, Columns):
        check_array(name, value.array, ("T", "stride"), dtypes)
        first, width = value.first, value.width
        if type(first) is not int or type(width) is not int or not 0 <= first <= first + width <= value.array.shape[1]:
            raise ValueError(
                f"{name}: expected columns inside {_describe(value.array)}, as ints, got {first=}, {width=}"
            )
    elif not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise ValueError(f"{name}: expected an array {wanted}, got {type(value).__name__}")
    sizes_fit = len(value.shape) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not sizes_fit or value.dtype not in [jnp.dtype(d) for d in dtypes]:
        raise ValueError(f"{name}: expected {wanted}, got {_describe(value)}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raises ValueError unless `dtype` is None or names one of FLOATS."""
    if dtype is None:
        return
    try:
        given = jnp.dtype(dtype)
        fits, got = given in [jnp.dtype(d) for d in FLOATS], given.name
    except (TypeError, ValueError, SyntaxError):  # NumPy reads a string as Python
        fits, got = False, repr(dtype)
    if not fits:
        raise ValueError(f"{name}: expected None, bfloat16, float16 or float32, got {got}")


def check_at_least_one(name: str, value: Any, axis: int) -> None:
    """Raises ValueError where `value` is empty along `axis`."""
    if value.shape[axis] < 1:
        raise ValueError(f"{name}: expected at least one element along axis {axis}, got {_describe(value)}")


def half(name: str, twice: int, axis: str = "last") -> int:
    """Half of the axis that holds gate and up side by side; raises ValueError where it is odd."""
    if twice % 2:
        raise ValueError(f"{name}: expected an even {axis} axis, gate and up side by side, got {twice}")
    return twice // 2


def check_one_device(**arrays: Any) -> None:
    """Raises ValueError where arrays that are committed to devices lie on different ones (a sharded array is fine)."""
    seen: dict[frozenset[Any], str] = {}
    for name, value in arrays.items():
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
                seen.setdefault(frozenset(leaf.devices()), name)
    if len(seen) > 1:
        (here, first), (there, second), *_ = seen.items()
        show = lambda devices: "/".join(sorted(map(str, devices)))
        raise ValueError(f"{second}: expected the device of {first}, {show(here)}, got {show(there)}")


def check_out(out: Any, arrays: Sequence[Any]) -> None:
    """Raises ValueError where `out` is nothing that JAX can write to, or is an array that is read too."""
    for leaf in jax.tree.leaves(out):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"out: expected a jax.Array to write to, got {type(leaf).__name__}")
        if not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise ValueError(
                "out: expected a buffer to write to, got an array that has been donated, or deleted, before"
            )
        if any(leaf is other for other in jax.tree.leaves(list(arrays))):
            raise ValueError("out: expected a buffer of its own, got an array that is also an input")
