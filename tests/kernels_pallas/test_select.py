"""Selection by key: the parts that the routing cases reach only together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import quick as quick_search
from kernels_pallas import score, select


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """These are functions of a kernel without the kernel: XLA takes minutes to compile some for a GPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 12])
@pytest.mark.parametrize("depth", [1, 2, 4, 5, 12])
def test_best_of_lane(n: int, depth: int) -> None:
    """It orders every sequence of zeros and ones, so it orders every sequence."""
    values = np.array(list(itertools.product([0, 1], repeat=n)), np.int32)
    best = select._best_of_lane([jnp.asarray(column) for column in values.T], depth)
    want = -np.sort(-values, axis=1)[:, :depth]
    np.testing.assert_array_equal(np.stack(best, axis=1), want)


def falling(key: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-key.astype(np.int64), kind="stable")[:k]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (16, 5), (64, 8), (256, 8), (1024, 32)])
def test_top_k(n: int, k: int) -> None:
    """From keys that are nearly all equal to keys far apart."""
    slots = 1 << (k - 1).bit_length()
    pick = jax.jit(lambda key: select.top_k([key], k, slots))
    for spread in (1, 300, 2**31 - 1):
        key = np.random.default_rng(n + spread).integers(-spread, spread, n).astype(np.int32)
        found = pick(jnp.asarray(key))
        np.testing.assert_array_equal(found[:k], falling(key, k))
        assert not found[k:].any()


def quick(
    key: np.ndarray, k: int, *, depth: int = 32, margin: int | None = 0, groups: select.Groups | None = None
) -> tuple[np.ndarray, bool, bool]:
    """Of key [lanes, columns], a power of two of them: a place is a position in it."""
    slots = 1 << (k - 1).bit_length()
    columns = [jnp.asarray(column) for column in key.T]
    place, sure, members = select.quick_top_k(columns, k, slots, groups=groups, depth=depth, margin=margin, least=0)
    return np.asarray(place)[:k], bool(sure), bool(members)


def kept_of_rows(by_group: np.ndarray, groups: select.Groups) -> np.ndarray:
    """by_group [runs, size] without all but the best groups, by sorting."""
    key = -np.sort(-by_group.astype(np.int64), axis=1)[:, :2].astype(np.int32)
    value = np.array(key[:, 0])
    if groups.top2:
        value = np.array(score.encode(score.decode(jnp.asarray(key)).sum(axis=1)))
    value[groups.n_group :] = score.EXCLUDED
    best, kept = falling(value, groups.topk_group), np.full_like(by_group, score.EXCLUDED)
    kept[best] = by_group[best]
    return kept


def positive(seed: int, *shape: int) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).uniform(-8, 0, shape)).astype(np.float32).view(np.int32)


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize(("columns", "k", "depth"), [(1, 4, 1), (4, 8, 4), (8, 8, 5), (16, 10, 4), (32, 16, 5)])
def test_quick_top_k(columns: int, k: int, depth: int, lanes: int) -> None:
    sure = 0
    for seed in range(40):
        key = positive(seed, lanes, columns)
        place, certain, members = quick(key, k, depth=depth)
        if certain:
            sure += 1
            np.testing.assert_array_equal(place, falling(key.ravel(), k))
        if members:
            assert set(place) == set(falling(key.ravel(), k))
        assert members >= certain
    assert sure >= 16


@pytest.mark.in_ci(columns=64)
@pytest.mark.parametrize("groups", [None, select.Groups(2, 2, 1, False), select.Groups(8, 8, 4, False)], ids=str)
@pytest.mark.parametrize("margin", [5, 96])
@pytest.mark.parametrize("columns", [2, 16, 64])
def test_what_sure_means(columns: int, margin: int, groups: select.Groups | None) -> None:
    """Among keys that are close: sure picks are more than the margin apart, and all others further below than that."""
    k, count, rng = 3, 400, np.random.default_rng(columns + margin)
    step = margin + 32 * columns  # more than what a key gives up
    size = (count, 14)
    jumps = np.where(
        rng.random(size) < 0.3, rng.integers(0, margin + 2 * columns, size), rng.integers(0, 4 * step, size)
    )
    keys = np.full((count, 32 * columns), 0x3E000000, np.int32)
    keys[:, : size[1]] = 0x3F000000 + np.cumsum(jumps, axis=1)
    keys = rng.permuted(keys, axis=1).reshape(count, 32, columns)

    def search(key: jax.Array) -> tuple[jax.Array, ...]:
        return select.quick_top_k(list(key.T), k, 4, groups=groups, depth=columns, margin=margin, least=0)

    places, sure, members = (np.asarray(found) for found in jax.jit(jax.vmap(search))(keys))
    assert (sure <= members).all()
    assert 20 < sure.sum() < members.sum() < 380, "some of each"
    for key, place in zip(keys[members], places[members], strict=True):
        kept = key.astype(np.int64)
        if groups is not None:
            by_group = kept.reshape(groups.runs, -1)
            order = falling(by_group.max(axis=1), groups.runs)
            stays, goes = by_group[order].max(axis=1)[groups.topk_group - 1 :][:2]
            assert stays - goes > margin
            by_group[order[groups.topk_group :]] = 0
        top = falling(kept.ravel(), k + 1)
        assert set(place[:k]) == set(top[:k])
        assert np.diff(kept.ravel()[top])[-1] < -margin
    if groups is None:
        for key, place in zip(keys[sure], places[sure], strict=True):
            top = falling(key.ravel(), k + 1)
            assert place[:k].tolist() == top[:k].tolist()
            assert (np.diff(key.ravel()[top].astype(np.int64)) < -margin).all()


def test_what_is_not_sure() -> None:
    """A tie, a difference within the margin, too many on a lane, and what is no number or negative.

    Where only the order of the picks is open, they are sure to be the picks.
    """
    base = 0x3F000000 + (np.arange(128, dtype=np.int32).reshape(32, 4) << 14)
    assert quick(base, 4)[1]
    assert quick(base, 4)[0].tolist() == [127, 126, 125, 124]

    def changed(**values: int) -> np.ndarray:
        key = base.copy()
        for at, value in values.items():
            key.ravel()[int(at[1:])] = value
        return key

    top = int(base.max())
    nothing, members, order = (False, False), (False, True), (True, True)

    def sure(*args: Any, **kwargs: Any) -> tuple[bool, bool]:
        return quick(*args, **kwargs)[1:]

    assert sure(changed(_2=top), 4) == members  # as large as the first
    assert set(quick(changed(_2=top), 4)[0]) == {2, 127, 126, 125}
    assert sure(changed(_3=top), 4) == nothing  # and in its column: keys that nothing tells apart
    assert sure(changed(_1=int(base.ravel()[125])), 4) == nothing  # the last pick and the one after it
    assert sure(changed(_3=int(base.ravel()[100])), 4) == order  # further down
    assert sure(base, 4, margin=1 << 14) == nothing  # all are too close, the last pick and the next, too
    assert sure(np.where(base < base.ravel()[124], base >> 1, base), 4, margin=1 << 14) == members
    assert sure(base, 4, depth=3) == nothing
    assert sure(np.where(base < base.ravel()[124], base >> 1, base), 4, depth=3, margin=1 << 14) == nothing
    assert sure(base, 2, depth=3) == order
    assert sure(base, 3, depth=3) == nothing  # the next might be the lane's
    assert sure(changed(_3=0x7FC00000), 4) == nothing
    assert sure(changed(_3=score.INFINITY), 4) == nothing
    assert sure(changed(_3=-5), 4) == order
    assert sure(np.where(base < base.ravel()[125], -5, base), 4) == nothing


@pytest.mark.parametrize("slots", [8, 32])
def test_in_order(slots: int) -> None:
    """Every order of four keys, ties among them; a tie goes to the lower place; slots that hold no pick are zeros."""
    place = jnp.zeros(slots, jnp.int32).at[:8].set(jnp.asarray([9, 2, 7, 4, 7, 0, 1, 1]))
    others = jnp.zeros(slots, jnp.int32).at[4:8].set(jnp.asarray([2**31 - 1, 0, 1, 1]))
    again = jax.jit(lambda values: select.in_order(place, others.at[:4].set(values), 4))
    for values in itertools.product([-5, 0, score.NAN_KEY, 2**31 - 1], repeat=4):
        found = again(jnp.asarray(values, jnp.int32))
        want = sorted(range(4), key=lambda i: (-values[i], place[i]))
        assert found[:4].tolist() == [int(place[i]) for i in want]
        assert not found[4:].any()


def test_in_order_of_many() -> None:
    """Of more than 16, pick by pick."""
    place = np.random.default_rng(0).permutation(64)[:32].astype(np.int32)
    key = np.random.default_rng(1).integers(-3, 3, 32).astype(np.int32)
    found = np.asarray(select.in_order(jnp.asarray(place), jnp.asarray(key), 20))
    want = sorted(range(20), key=lambda i: (-key[i], place[i]))
    assert found.tolist() == [*place[want], *[0] * 12]


@pytest.mark.in_ci(lanes=64)
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("spread", [2, 2**31 - 1])
@pytest.mark.parametrize("top2", [True, False])
@pytest.mark.parametrize(("runs", "n_group", "topk_group"), [(1, 1, 1), (8, 8, 4), (8, 5, 2), (32, 32, 3)])
def test_exact_search_on_lanes(runs: int, n_group: int, topk_group: int, top2: bool, spread: int, lanes: int) -> None:
    """Groups on one lane or on several, from keys that are nearly all equal to keys far apart, against a sort."""
    k, columns, groups = 3, 4, select.Groups(runs, n_group, topk_group, top2)
    for seed in range(2):
        key = np.random.default_rng(seed).integers(-spread, spread, (lanes, columns)).astype(np.int32)
        if top2:  # numbers, whose sums count
            numbers = np.round(positive(seed, lanes, columns).view(np.float32), 1 if spread == 2 else 6)
            key = np.array(score.encode(jnp.asarray(numbers)))
        key.reshape(runs, -1)[n_group:] = score.EXCLUDED
        kept = kept_of_rows(key.reshape(runs, -1), groups)
        got = select.keep_groups([jnp.asarray(column) for column in key.T], groups)
        np.testing.assert_array_equal(np.stack(got, axis=1).reshape(runs, -1), kept)
        assert (kept != score.EXCLUDED).any(axis=1).sum() == topk_group
        found = select.top_k(got, k, 4)
        np.testing.assert_array_equal(found, [*falling(kept.ravel(), k), 0])


def test_low_bits_that_decide_are_not_spare() -> None:
    """What margin=None promises matters: with a false promise the result is wrong."""
    key = np.arange(64, dtype=np.int32).reshape(32, 2)
    assert quick(key, 4, margin=None)[0].tolist() != [63, 62, 61, 60]
    assert quick(key << 6, 4, margin=None)[0].tolist() == [63, 62, 61, 60]
    tied = np.full((32, 2), 1 << 20, np.int32)
    place, sure, _ = quick(tied, 4, margin=None)
    assert sure
    assert place.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("top2", [True, False])
@pytest.mark.parametrize(("runs", "n_group", "topk_group"), [(8, 8, 4), (8, 5, 2), (4, 3, 1), (32, 32, 3)])
def test_quick_groups(runs: int, n_group: int, topk_group: int, top2: bool) -> None:
    groups, sure = select.Groups(runs, n_group, topk_group, top2), 0
    for seed in range(40):
        key = positive(seed, 32, 4)
        by_group = key.reshape(runs, -1)
        by_group[n_group:] = score.EXCLUDED
        kept = kept_of_rows(by_group, groups)
        place, certain, members = quick(key, 4, groups=groups)
        if certain:
            sure += 1
            np.testing.assert_array_equal(place, falling(kept.ravel(), 4))
        if members:
            assert set(place) == set(falling(kept.ravel(), 4))
    assert sure >= 30


@pytest.mark.parametrize("groups", [1, 2, 8, 32, 64, 1024])
@pytest.mark.parametrize("spread", [2, 2**31 - 1])
def test_best_groups(groups: int, spread: int) -> None:
    """Both ways to find the best groups agree with a stable sort, ties included."""
    key = np.random.default_rng(groups).integers(-spread, spread, groups).astype(np.int32)
    for k in {1, max(1, groups // 3), groups}:
        want = np.zeros(groups, bool)
        want[falling(key, k)] = True
        for best in (select._best_of_few, select._best_of_many):
            if groups > 64 and best is select._best_of_few:
                continue
            np.testing.assert_array_equal(best(jnp.asarray(key), k), want)


def test_keys_order_as_numbers_do() -> None:
    """NaN of either sign below everything, -0.0 (made 0.0) equal to 0.0; decode gives the number back."""
    values = np.array([np.nan, -np.nan, -np.inf, -3e38, -1.0, -1e-37, 0.0, 1e-37, 1.0, 3e38, np.inf], np.float32)
    key = np.asarray(score.encode(score.plus_zero(jnp.asarray(values))))
    assert key.dtype == np.int32
    assert key[2] > key[0] == key[1] == score.NAN_KEY > score.EXCLUDED
    assert (np.diff(key[2:].astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(score.decode(jnp.asarray(key)), values)
    assert score.encode(score.plus_zero(jnp.float32(-0.0))) == score.encode(jnp.float32(0.0))


@pytest.mark.parametrize("spare", [True, False])
def test_keys_of_logits(spare: bool) -> None:
    """They order as the logits do, also compiled; a lane with a NaN or an infinity says so; spare bits are 0."""
    keys_of = jax.jit(functools.partial(quick_search._keys_of_logits, spare=spare))
    values = jnp.asarray([-3e38, -2.5, -1e-30, -0.0, 0.0, 1e-30, 2.5, 3e38]).astype(jnp.bfloat16).astype(jnp.float32)
    (key,) = keys_of([values])
    assert (np.diff(np.asarray(key, np.int64)) > 0).tolist() == [True, True, True, False, True, True, True]
    assert key[3] == key[4]
    assert not spare or not (np.asarray(key) & 0x1FFF).any()
    bad = jnp.asarray([1.0, np.nan, -np.nan, np.inf, -np.inf], jnp.float32)
    assert (np.asarray(keys_of([jnp.ones(5), bad])[0]) == select.UNKNOWN).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
def test_quick_score(scoring_func: str) -> None:
    """Off by less than half of quick_search.MARGIN, in steps of 2**-24."""
    x = np.linspace(-80, 80, 40001, dtype=np.float32)
    wide = x.astype(np.float64)
    want = 1 / (1 + np.exp(-wide)) if scoring_func == "sigmoid" else np.sqrt(np.logaddexp(0, wide))
    error = np.abs(np.asarray(score.quick_score(jnp.asarray(x), scoring_func)) / want - 1)
    assert error.max() < 0.5 * quick_search.MARGIN * 2.0**-24
    exact = np.abs(np.asarray(score.score(jnp.asarray(x), scoring_func)) / want - 1)
    assert exact.max() < 4e-7


def test_log1p_ratio() -> None:
    u = np.linspace(0, 1, 100001, dtype=np.float32)[1:]
    want = np.log1p(u.astype(np.float64)) / u
    assert np.abs(np.asarray(score.log1p_ratio(jnp.asarray(u))) / want - 1).max() < 2.0**-22
    assert score.log1p_ratio(jnp.float32(0.0)) == 1.0
