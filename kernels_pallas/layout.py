"""How routing lays a token's experts on the lanes of a warp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.launch import divmod_by, iota, next_power_of_2

Load = Callable[[jax.Array, "jax.Array | None"], jax.Array]  # (expert ids, mask) -> float32


LoadRows = Callable[[jax.Array, jax.Array, "jax.Array | None"], jax.Array]  # (rows, expert ids, mask)


def load_flat(load_at: LoadRows, row: jax.Array, expert: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The same without axes: of two Triton would put those on the lanes where it thinks more lies together."""
    flat = load_at(row.reshape(-1), expert.reshape(-1), None if mask is None else mask.reshape(-1))
    return flat.reshape(expert.shape)


@dataclass(frozen=True)
class Layout:
    """A token's experts on the lanes of a warp: each group on a run of lanes, neighbours in the columns of a lane."""

    lanes: int
    n_group: int
    size: int  # of a group

    @property
    def runs(self) -> int:
        return next_power_of_2(self.n_group)

    @property
    def run(self) -> int:
        return self.lanes // self.runs

    @property
    def columns(self) -> int:
        return -(-self.size // self.run)

    @property
    def full(self) -> bool:
        return self.n_group == self.runs and self.columns * self.run == self.size

    def count(self) -> jax.Array:
        """How many experts each lane has [lanes]; not positive if none."""
        group, lane = divmod_by(iota((self.lanes,), 0), self.run)
        return jnp.where(group < self.n_group, self.size - lane * self.columns, 0)

    def expert(self, place: jax.Array) -> jax.Array:
        """The expert at lane * next_power_of_2(columns) + column; the last one where none is.

        Two lanes that tie add up to a lane that may have none.
        """
        width = next_power_of_2(self.columns)
        if self.size != self.run * width:
            lane, column = divmod_by(place, width)
            group, lane = divmod_by(lane, self.run)
            place = group * self.size + lane * self.columns + column
        return place if self.full else jnp.minimum(place, self.n_group * self.size - 1)

    def load(self, load_at: LoadRows, itemsize: int, rows: int) -> list[jax.Array]:
        """[rows, lanes] for each column; load_at(row, expert, mask) takes them from memory, all of one shape.

        A load takes as many columns as lie on an address that is a multiple of as many. Its tile has them next to the
        lanes, or, where that is one at a time, has no axes at all: Triton then gives each row a warp, and each lane its
        columns, whatever comes after.
        """
        width = min(self.columns & -self.columns, 16 // itemsize)
        tile, found = (rows, self.lanes * width), []
        # div and rem, not shifts: Triton's analysis follows them, and finds out what is contiguous.
        divmod_of = lambda x, y: (jax.lax.div(x, jnp.full_like(x, y)), jax.lax.rem(x, jnp.full_like(x, y)))
        lane, column = divmod_of(iota(tile, 1), width)
        group, lane = divmod_of(lane, self.run)
        for start in range(0, self.columns, width):
            member = lane * self.columns + (start + column)
            mask = None if self.full else (group < self.n_group) & (member < self.size)
            whole = self.full and width == self.columns
            expert = iota(tile, 1) if whole else group * self.size + member
            load_tile = load_at if width > 1 else functools.partial(load_flat, load_at)
            values = load_tile(iota(tile, 0), expert, mask).reshape(rows, self.lanes, width)
            parts = jnp.split(values, width, axis=2) if width > 1 else [values]
            found += [part.reshape(rows, self.lanes) for part in parts]
        return found

    def mask(self, columns: list[jax.Array], other: Any) -> list[jax.Array]:
        """`columns` with `other` where there is no expert."""
        if self.full:
            return columns
        count = self.count()
        return [jnp.where(c < count, column, other) for c, column in enumerate(columns)]

    def depth(self, picks: int, groups: int) -> int:
        """How many of a lane's experts to sort: so many that one token in 2000 needs to know of more.

        Once all that were sorted are picked, nobody knows what comes behind them, so it matters whether `depth` of all
        picks but the last share a lane. `sets` is how many sets of that many are expected to, if `picks` are random
        among the experts of this many groups. A bias, which makes some experts likely, can triple it.
        """
        experts, depth, sets = self.size * groups, 1, picks - 1.0
        while depth < self.columns and 2000 * sets > 1:
            sets *= (picks - 1 - depth) / (depth + 1) * (self.columns - depth) / max(experts - depth, 1)
            depth += 1
        return depth
