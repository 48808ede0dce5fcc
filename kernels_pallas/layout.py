"""How routing lays a token's experts on the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.launch import iota, next_power_of_2

Load = Callable[[jax.Array, "jax.Array | None"], jax.Array]  # (expert ids, mask) -> float32


def divmod_by(x: jax.Array, power_of_2: int) -> tuple[jax.Array, jax.Array]:
    """divmod of what is not negative."""
    return x >> (power_of_2.bit_length() - 1), x & (power_of_2 - 1)


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

    def first(self) -> jax.Array:
        """Each lane's first expert [lanes]."""
        group, lane = divmod_by(iota((self.lanes,), 0), self.run)
        return group * self.size + lane * self.columns

    def count(self) -> jax.Array:
        """How many experts each lane has [lanes]; not positive if none."""
        group, lane = divmod_by(iota((self.lanes,), 0), self.run)
        return jnp.where(group < self.n_group, self.size - lane * self.columns, 0)

    def expert(self, place: jax.Array) -> jax.Array:
        """The expert at lane * next_power_of_2(columns) + column."""
        width = next_power_of_2(self.columns)
        if self.size == self.run * width:
            return place
        lane, column = divmod_by(place, width)
        group, lane = divmod_by(lane, self.run)
        return group * self.size + lane * self.columns + column

    def load(self, load_at: Load, itemsize: int) -> list[jax.Array]:
        """[lanes] for each column. A load takes as many columns as lie on an address that is a multiple of as many."""
        width = min(self.columns & -self.columns, 16 // itemsize)
        first, count, found = self.first()[:, None], self.count()[:, None], []
        for start in range(0, self.columns, width):
            column = start + iota((self.lanes, width), 1)
            tile = load_at(first + column, None if self.full else column < count)
            parts = jnp.split(tile, width, axis=1) if width > 1 else [tile]
            found += [part.reshape(self.lanes) for part in parts]
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
