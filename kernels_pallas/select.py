"""Selecting groups and experts by key, in registers: what routing spends its time on.

Keys are int32 that compare as the choices do; Triton turns an integer maximum across a warp into one `redux`
instruction. `keep_groups` and `top_k` are exact for every key. `quick_top_k` costs a third, and says whether it can be
trusted; where the set of picks can, but not their order, these have to be ordered, else the exact search has to follow.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.launch import divmod_by, iota, next_power_of_2
from kernels_pallas.score import EXCLUDED, INFINITY, decode, encode, float_bits, plus_zero

MANY_GROUPS = 32
UNKNOWN = 2**31 - 1  # a key above every number: the quick search cannot answer
# A pick may be this many times smaller than what was rounded on the way to it: see `route.SUM_MARGIN`.
RANGE = 12.0


def _best_of_few(key: jax.Array, k: int) -> jax.Array:
    """Which of key [G] are among the k largest: those that fewer than k others beat, all pairs at once."""
    mine, theirs = key[:, None], key[None, :]
    pairs = (key.shape[0], key.shape[0])
    beats = (theirs > mine) | ((theirs == mine) & (iota(pairs, 1) < iota(pairs, 0)))
    return jnp.sum(beats, axis=1, dtype=jnp.int32) < k


def _best_of_many(key: jax.Array, k: int) -> jax.Array:
    """The same where all pairs would be too many (a million for 1024): the k-th largest key, bit by bit."""

    def step(i: jax.Array, least: jax.Array) -> jax.Array:
        higher = least + jax.lax.shift_left(jnp.int32(1), jnp.int32(31) - i)  # the first step wraps from -2**31 to 0
        return jnp.where(jnp.sum(key >= higher, dtype=jnp.int32) >= k, higher, least)

    least = jax.lax.fori_loop(0, 32, step, jnp.int32(-(2**31)))
    equal = key == least
    room = k - jnp.sum(key > least, dtype=jnp.int32)
    return (key > least) | (equal & (jnp.cumsum(equal.astype(jnp.int32), dtype=jnp.int32) <= room))


def top_k(
    keys: Sequence[jax.Array],
    k: int,
    num_slots: int,
    places: Sequence[jax.Array] | None = None,
    period: int | None = None,
) -> jax.Array:
    """Places [num_slots] of the k largest keys in falling order, a tie to the lower one; then zeros.

    keys: [lanes] for each column. places: the same, distinct where a key is not EXCLUDED; by default, as for
    `quick_top_k`, lane * next_power_of_2(columns) + column. period: a power of two, after which it all comes again.
    """
    slot = iota((num_slots,), 0) & ((period or num_slots) - 1)
    if places is None:
        width = next_power_of_2(len(keys))
        places = [iota(key.shape, 0) * width + c for c, key in enumerate(keys)]

    def step(j: jax.Array, state: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        keys, found = state
        top = jnp.max(functools.reduce(jnp.maximum, keys))
        ties = [jnp.where(key == top, place, 2**31 - 1) for key, place in zip(keys, places, strict=True)]
        at = jnp.min(functools.reduce(jnp.minimum, ties))
        keys = [jnp.where(place == at, EXCLUDED, key) for key, place in zip(keys, places, strict=True)]
        return keys, jnp.where(slot == j, at, found)

    return jax.lax.fori_loop(0, k, step, (list(keys), jnp.zeros((num_slots,), jnp.int32)))[1]


def in_order(place: jax.Array, key: jax.Array, k: int, period: int | None = None) -> jax.Array:
    """The first k places [N], which are distinct, by falling key [N], a tie to the lower place; then zeros.

    period: a power of two; every run of so many is one by itself.
    """
    index, period = iota(key.shape, 0), period or key.shape[0]
    run, slot = divmod_by(index, period)
    if k > 16:
        assert period == key.shape[0], f"runs of {period}, for more picks than half a warp"
        return top_k([jnp.where(slot < k, key, EXCLUDED)], k, key.shape[0], [place])

    def of(j: int, values: jax.Array) -> jax.Array:
        starts = range(0, key.shape[0], period)
        found = [jnp.sum(jnp.where(index == start + j, values, 0), dtype=jnp.int32) for start in starts]
        return by_run(found, run)

    # Each place's rank by comparing it with all: more instructions than pick by pick, but none that waits for the last.
    rank, places = jnp.zeros_like(place), [of(j, place) for j in range(k)]
    for j in range(k):
        theirs = of(j, key)
        rank += ((theirs > key) | ((theirs == key) & (places[j] < place))).astype(jnp.int32)
    found = jnp.zeros_like(place)
    for j in range(k):
        found = jnp.where(slot == of(j, rank), places[j], found)
    return found


@dataclass(frozen=True)
class Groups:
    """Lanes in `runs` equal runs, a group each: the first `n_group` count, and the best `topk_group` of them stay."""

    runs: int
    n_group: int
    topk_group: int
    top2: bool  # a group's score is the sum of its two largest choices (their bits are the keys), else its largest key


def keep_groups(keys: Sequence[jax.Array], groups: Groups) -> list[jax.Array]:
    """keys [lanes] for each column, with all keys outside the best groups excluded."""
    lanes, shape = keys[0].shape[0], (groups.runs, keys[0].shape[0] // groups.runs)

    def best(columns: Sequence[jax.Array]) -> jax.Array:
        return jnp.max(functools.reduce(jnp.maximum, columns).reshape(shape), axis=1)

    def spread(of_group: jax.Array) -> jax.Array:
        return jnp.broadcast_to(of_group[:, None], shape).reshape(lanes)

    group = top = best(keys)
    if groups.top2:
        at_top = [key == spread(top) for key in keys]
        count = functools.reduce(jnp.add, [at.astype(jnp.int32) for at in at_top])
        second = best([jnp.where(at, EXCLUDED, key) for at, key in zip(at_top, keys, strict=True)])
        second = jnp.where(jnp.sum(count.reshape(shape), axis=1, dtype=jnp.int32) > 1, top, second)
        # The sum of two numbers is a number or, inf - inf, NaN; a second choice that is NaN makes the sum NaN.
        group = encode(plus_zero(decode(top) + decode(second)))
    group = jnp.where(iota(group.shape, 0) < groups.n_group, group, EXCLUDED)
    best_groups = _best_of_many if groups.runs > MANY_GROUPS else _best_of_few
    kept = spread(best_groups(group, groups.topk_group).astype(jnp.int32)) > 0
    return [jnp.where(kept, key, EXCLUDED) for key in keys]


def quick_top_k(
    keys: Sequence[jax.Array],
    k: int,
    num_slots: int,
    *,
    groups: Groups | None,
    depth: int,
    margin: int | jax.Array | None,
    least: int,
    most: int = INFINITY,
    summed: jax.Array | None = None,
    on_scale: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places [num_slots] of the k largest keys in falling order; whether that is sure; whether the set of them is.

    keys: a tensor [lanes] for each column; the place of a key is lane * next_power_of_2(columns) + column.

    A key gives up its low bits to its column, so that a lane's keys are distinct and carry it. Minima and maxima alone
    then sort each lane's keys; a pick is one maximum over the lanes' first, and the lane that had it moves up. Which
    that was, a sum over the lanes tells, and whether there were two. Where groups compare their best, their lanes are
    told apart by bits too; where bits are free (with `margin` None the low ones are known to decide nothing), all are.

    It is not sure where two keys that had to be told apart differ by no more than `margin` and what was given up. If
    both are picks, the set may be sure all the same, unless their bits and columns are equal. Nor is it sure where
    `depth` picks fall on one lane, since only so many of each are sorted (with `margin` None, before the last pick), or
    where a pick, or the score of a group that stays, is below `least`, or `most` or above, as infinities and NaN are.

    `on_scale`: keys are numbers of a fixed step, not bits of floats, and low bits enough for a place are free; so a
    margin is worth what it is. One below `least` or from `most` on may stand for any that is lower, or higher.

    `summed`: keys are the bits of sums that, as the caller defines them, are rounded at up to this much more than the
    largest pick. `margin` steps of a pick hold that rounding unless the pick is far smaller: then it is not sure.
    """
    lanes, width = keys[0].shape[0], next_power_of_2(len(keys))
    lane, by_bits = iota((lanes,), 0), margin is None or on_scale
    apart = lanes if by_bits else lanes // groups.runs if groups is not None else 1  # neighbours that bits tell apart
    mask = apart * width - 1
    last = mask - (lane & (apart - 1)) * width
    cleared = keys if by_bits else [key & ~mask for key in keys]
    if on_scale:  # lanes come in when most columns have gone
        columns = _best_of_lane([key + (width - 1 - c) for c, key in enumerate(cleared)], depth)
        columns = [key + (last - (width - 1)) for key in columns]
    else:
        columns = _best_of_lane([key | (last - c) for c, key in enumerate(cleared)], depth)

    gap: Any = 0  # up to which keys may be as they are for want of bits alone
    if margin is not None and on_scale:
        gap = margin + mask
    elif margin is not None:
        # What is left of a key is a multiple of mask + 1: a difference counts for no more than the one below it.
        gap = mask - (-margin // (mask + 1)) * (mask + 1)
    highest, lowest, signs = [], [], []  # sure: they are within limits, and nothing in signs is negative
    # A group without two keys within limits has a score beyond them (`_group_scores`); so if the best is within, every
    # group has two such keys, and no key is beyond.
    pairs = on_scale and groups is not None and groups.top2
    ordered = None  # whether the picks' order is sure, too
    if groups is not None:
        score = _group_scores(columns, groups, (least, most) if on_scale else None)
        tops, _ = _picks([score], groups.topk_group + 1, end=EXCLUDED)
        kept, dropped = tops[-2:]
        columns[0] = jnp.where(score >= kept, columns[0], EXCLUDED)
        highest, lowest = [tops[0]], [] if pairs else [kept]
        if margin is not None:  # a sum is off by twice as much as its terms, twice over for rounding; it holds a number
            times = 1 if not groups.top2 else 2 if on_scale else 4  # half a sum on the scale
            signs.append(kept - dropped - times * gap - groups.runs)

    # Behind a lane's last: nothing if it had no more, else what is found out.
    close = on_scale or gap > 0  # keys that differ may have to be told apart
    end = EXCLUDED if depth >= len(keys) else None if close else UNKNOWN
    tops, owners = _picks(columns, k + close, end)
    if not pairs:
        highest.append(tops[0])
    if not close:
        highest.append(tops[-1])  # what is behind a lane's last
    if not (pairs and groups and 2 * groups.topk_group >= k):
        lowest.append(tops[k - 1] if on_scale else tops[-1])
    sure = functools.reduce(jnp.maximum, highest) < most
    if lowest:
        low = functools.reduce(jnp.minimum, lowest)
        sure = sure & (low >= least)
    if close:
        # The last key of a lane that ran out is picked again and again: then the last of these differences is 0.
        *apart_by, after_last = (a - b for a, b in itertools.pairwise(tops))
        signs.append(after_last - (gap + 1))
        if on_scale and apart_by:
            ordered = functools.reduce(jnp.minimum, apart_by) > gap
        elif apart_by:
            # Signs, not the least: the difference of a positive and a negative key may be 2**31 and more, and wraps.
            ordered = functools.reduce(operator.or_, (by - (gap + 1) for by in apart_by)) >= 0
    if signs:
        sure = sure & (functools.reduce(operator.or_, signs) >= 0)
    if summed is not None:
        sure = sure & (RANGE * _float(low) >= _float(tops[0]) + summed)
    slot = iota((num_slots,), 0)
    found = mask - (_by_slot(tops[:k], slot) & mask)
    if not by_bits:
        owners = owners[:k]
        sure = sure & (functools.reduce(jnp.maximum, owners) < 2 * lanes)
        found = (_by_slot(owners, slot) & (lanes - 1)) * width + (found & (width - 1))
    return found, sure if ordered is None else sure & ordered, sure


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _group_scores(columns: Sequence[jax.Array], groups: Groups, limits: tuple[int, int] | None) -> jax.Array:
    """The score of each lane's group [lanes]: distinct keys, since they carry the group's number.

    limits: `least` and `most` of keys on a scale, whose score is half a sum.
    """
    lanes, runs = columns[0].shape[0], groups.runs
    first = columns[0].reshape(runs, lanes // runs)
    score = jnp.max(first, axis=1, keepdims=True)
    if groups.top2:
        below = columns[1].reshape(first.shape) if len(columns) > 1 else jnp.full_like(first, EXCLUDED)
        second = jnp.max(jnp.where(first == score, below, first), axis=1, keepdims=True)
        if limits is None:
            score = jnp.where(second < 0, UNKNOWN, float_bits(_float(score) + _float(second)))
        else:
            half = jax.lax.shift_right_logical(score + second, jnp.int32(1))
            score = jnp.where((second < limits[0]) | (score >= limits[1]), UNKNOWN, half)
    group = iota((runs, 1), 0)
    score = (score & -runs) | (runs - 1 - group)
    if groups.n_group < runs:
        score = jnp.where(group < groups.n_group, score, EXCLUDED)
    return jnp.broadcast_to(score, first.shape).reshape(lanes)


def _picks(columns: Sequence[jax.Array], count: int, end: int | None) -> tuple[list[jax.Array], list[jax.Array]]:
    """The `count` largest of all lanes' keys, each lane's sorted; behind its last comes `end`, or that key again.

    With each comes the number of the lane that had it and the number of lanes, summed over all that had it.
    """
    tops: list[jax.Array] = []
    owners: list[jax.Array] = []
    lanes = columns[0].shape[0]
    for left in reversed(range(count)):
        tops.append(jnp.max(columns[0]))
        at = columns[0] == tops[-1]
        owners.append(jnp.sum(jnp.where(at, lanes + iota((lanes,), 0), 0), dtype=jnp.int32))
        under = [*columns[1:], columns[-1] if end is None else jnp.full_like(columns[0], end)]
        columns = [jnp.where(at, u, c) for u, c in zip(under[:left], columns, strict=False)]
    return tops, owners


def by_run(values: Sequence[jax.Array], run: int | jax.Array) -> jax.Array:
    """values[r] where run is r."""
    return functools.reduce(
        lambda found, at: jnp.where(run == at[0], at[1], found), enumerate(values[1:], 1), values[0]
    )


def _by_slot(values: Sequence[jax.Array], slot: jax.Array) -> jax.Array:
    """values[s] where slot is s, chosen by the low bits of s: beyond them all they come again (tokens share a warp)."""
    values, bit = list(values), 1
    while len(values) > 1:
        pairs = itertools.zip_longest(values[::2], values[1::2], fillvalue=values[-1])
        values = [jnp.where(slot & bit != 0, b, a) for a, b in pairs]
        bit *= 2
    return jnp.broadcast_to(values[0], slot.shape)


def _best_of_lane(columns: Sequence[jax.Array], depth: int) -> list[jax.Array]:
    """Each lane's `depth` largest in falling order, one column after another."""
    runs = [_sorted(list(columns[i : i + 4]))[:depth] for i in range(0, len(columns), 4)]
    while len(runs) > 1:
        odd = runs[-1:] if len(runs) % 2 else []
        runs = [_merged(a, b, depth) for a, b in zip(runs[::2], runs[1::2], strict=False)] + odd
    return runs[0]


def _sort_pairs(columns: list[jax.Array], pairs: Sequence[tuple[int, int]]) -> list[jax.Array]:
    for a, b in pairs:
        columns[a], columns[b] = jnp.maximum(columns[a], columns[b]), jnp.minimum(columns[a], columns[b])
    return columns


def _sorted(columns: list[jax.Array]) -> list[jax.Array]:
    """Up to four columns in falling order."""
    return _sort_pairs(columns, [(a, b) for a, b in ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)) if b < len(columns)])


def _merged(a: Sequence[jax.Array], b: Sequence[jax.Array], depth: int) -> list[jax.Array]:
    """The `depth` largest of two falling runs, in falling order: a bitonic merge.

    The larger of the i-th of one run and the i-th from the end of the other are the largest, first falling, then
    rising. To make them a power of two, think of infinities in front: comparing with these changes nothing.
    """
    n = min(depth, len(a) + len(b))
    pairs = [(a[i : i + 1], b[n - 1 - i : n - i]) for i in range(n)]
    best = [functools.reduce(jnp.maximum, [*x, *y]) for x, y in pairs]
    size = next_power_of_2(n)
    front, steps = size - n, [size >> s for s in range(1, size.bit_length())]
    return _sort_pairs(
        best, [(i - front, i + step - front) for step in steps for i in range(front, size) if not i & step]
    )
