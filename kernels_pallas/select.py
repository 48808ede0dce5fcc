"""Selecting groups and experts by key, in registers: what routing spends its time on.

Keys are int32 that compare as the choices do (`score.encode`); Triton turns an integer maximum across a warp into one
`redux` instruction. A tile is one token's, [1, N], N a power of two.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from kernels_pallas.launch import iota
from kernels_pallas.score import EXCLUDED, decode, encode, plus_zero

MANY_GROUPS = 32


def keep_groups(key: jax.Array, n_group: int, topk_group: int, top2: bool) -> jax.Array:
    """key [1, G, size] with all keys outside the best `topk_group` of the `n_group` groups excluded."""
    top = jnp.max(key, axis=2)
    group = top
    if top2:
        at_top = key == top[:, :, None]
        again = jnp.sum(at_top, axis=2, dtype=jnp.int32) > 1
        second = jnp.where(again, top, jnp.max(jnp.where(at_top, EXCLUDED, key), axis=2))
        # The sum of two numbers is a number or, inf - inf, NaN; a second choice that is NaN makes the sum NaN.
        group = encode(plus_zero(decode(top) + decode(second)))
    group = jnp.where(iota(group.shape, 1) < n_group, group, EXCLUDED)
    kept = _best_of_many(group, topk_group) if group.shape[1] > MANY_GROUPS else _best_of_few(group, topk_group)
    return jnp.where(kept[:, :, None], key, EXCLUDED)


def _best_of_few(key: jax.Array, k: int) -> jax.Array:
    """Which of key [1, G] are among the k largest: those that fewer than k others beat, all pairs at once."""
    groups = key.shape[1]
    mine, theirs = key[:, :, None], key[:, None, :]
    beats = (theirs > mine) | ((theirs == mine) & (iota((1, groups, groups), 2) < iota((1, groups, groups), 1)))
    return jnp.sum(beats, axis=2, dtype=jnp.int32) < k


def _best_of_many(key: jax.Array, k: int) -> jax.Array:
    """The same where all pairs would be too many (a million for 1024): the k-th largest key, bit by bit."""

    def step(i: jax.Array, least: jax.Array) -> jax.Array:
        higher = least + jax.lax.shift_left(jnp.int32(1), jnp.int32(31) - i)  # the first step wraps from -2**31 to 0
        return jnp.where(jnp.sum(key >= higher, dtype=jnp.int32) >= k, higher, least)

    least = jax.lax.fori_loop(0, 32, step, jnp.int32(-(2**31)))
    equal = key == least
    room = k - jnp.sum(key > least, dtype=jnp.int32)
    return (key > least) | (equal & (jnp.cumsum(equal.astype(jnp.int32), axis=1, dtype=jnp.int32) <= room))


def top_k(key: jax.Array, k: int, num_slots: int, *, lanes: int, spare_bits: int) -> jax.Array:
    """Positions [1, num_slots] of the k largest keys [1, N] in falling order, a tie to the lower one; then zeros.

    Each key gives up its low bits to its own position, so that keys are distinct and carry their place: then minima and
    maxima alone sort each lane's keys, and a pick is one maximum over the lanes' first, after which the lane that had
    it moves up. If two neighbours in the result differ only in bits that were given up (about one token in a hundred
    with float32 scores), or do not differ at all, the exact search decides. `spare_bits` low bits are known to decide
    nothing (logits of 16 bits): where positions fit into them there is nothing to check.
    """
    n = key.shape[1]
    lanes = min(lanes, n)
    place = n - 1  # a mask: n is a power of two
    packed = (key & ~place) | (place - iota(key.shape, 1))
    columns = _split(packed.reshape(lanes, n // lanes))
    for a, b in _sorting_network(len(columns)):
        columns[a], columns[b] = jnp.maximum(columns[a], columns[b]), jnp.minimum(columns[a], columns[b])

    check = place.bit_length() > spare_bits and n > 1
    picks = min(k + check, n)
    slot = iota((1, num_slots), 1)
    found = jnp.zeros((1, num_slots), jnp.int32)
    tops: list[jax.Array] = []
    for j in range(picks):
        tops.append(jnp.max(columns[0]))
        if j < k:
            found = jnp.where(slot == j, place - (tops[j] & place), found)
        at = columns[0] == tops[j]
        left = [*columns[1:], jnp.full_like(at, EXCLUDED, dtype=jnp.int32)]
        needed = min(len(columns), picks - 1 - j)
        columns = [jnp.where(at, left[i], columns[i]) for i in range(needed)]
    if not check:
        return found
    close = [(a ^ b) & ~place == 0 for a, b in itertools.pairwise(tops)]
    if not close:
        return found
    ambiguous = close[0]
    for other in close[1:]:
        ambiguous = ambiguous | other
    return jax.lax.cond(ambiguous, lambda: _top_k_exact(key, k, num_slots), lambda: found)


def _top_k_exact(key: jax.Array, k: int, num_slots: int) -> jax.Array:
    """The same by whole keys: the largest, then the lowest position that has it, k times."""
    position, slot = iota(key.shape, 1), iota((1, num_slots), 1)

    def step(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, found = state
        top = jnp.max(key, axis=1, keepdims=True)
        at = jnp.min(jnp.where(key == top, position, key.shape[1]), axis=1, keepdims=True)
        return jnp.where(position == at, EXCLUDED, key), jnp.where(slot == j, at, found)

    return jax.lax.fori_loop(0, k, step, (key, jnp.zeros((1, num_slots), jnp.int32)))[1]


def _split(x: jax.Array) -> list[jax.Array]:
    """The columns of x [lanes, n]."""
    n = x.shape[1]
    return [c.reshape(x.shape[0]) for c in jnp.split(x, n, axis=1)] if n > 1 else [x.reshape(x.shape[0])]


def _sorting_network(n: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort: which pairs to put in order, one after another."""
    pairs = []
    for p in (1 << i for i in range(n.bit_length() - 1)):
        for k in (p >> i for i in range(p.bit_length())):
            for j in range(k % p, n - k, 2 * k):
                pairs += [
                    (i + j, i + j + k) for i in range(min(k, n - j - k)) if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
    return pairs
