"""The quick search's keys on a scale: what they stand for, and when the search trusts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import quick, select
from kernels_pallas.rule import Rule

PER_ONE = 24 * 2**24  # of a choice, in steps of a key
ZERO = 9 << 26  # the key of a choice as large as the bias of expert 0


def keys_of(x: np.ndarray, bias: np.ndarray, first: float, shift: int) -> np.ndarray:
    found = quick.offsets([jnp.asarray(bias, jnp.float32)], jnp.float32(first), assembly=False)
    (key,) = quick._keys_on_scale([jnp.asarray(x, jnp.float32)], found, shift, False)
    return np.asarray(key)


@pytest.mark.parametrize("shift", [8, 9, 10, 11])
@pytest.mark.parametrize("first", [0.0, -0.3, 12.25])
def test_keys_on_scale(first: float, shift: int) -> None:
    """Off by no more than half of what SCALE_ERROR says of two, and half a unit of the scale; the low bits are free."""
    rng = np.random.default_rng(shift)
    x = np.concatenate([rng.normal(size=40_000) * 4, [-np.inf, np.inf, -1e30, 1e30, -88, 88, 0]]).astype(np.float32)
    bias = (first + rng.uniform(-1.49, 2.49, x.size)).astype(np.float32)
    key = keys_of(x, bias, first, shift)
    with np.errstate(over="ignore"):
        choice = 1 / (1 + np.exp(-x.astype(np.float64))) + (bias.astype(np.float64) - first)
    error = np.abs(key - (ZERO + PER_ONE * choice))
    assert error.max() <= 12 * quick.SCALE_ERROR + (1 << shift) / 2
    assert error.max() > (1 << shift) / 4, "a bound that says something"
    assert not (key & ((1 << shift) - 1)).any()


@pytest.mark.parametrize("shift", [8, 9, 10, 11])
def test_what_was_clamped_is_seen(shift: int) -> None:
    """A bias far below or above that of expert 0, or none, gives keys outside the limits, whatever the logit."""
    x = np.asarray([-np.inf, -100, -1, 0, 1, 100, np.inf])
    for low in (-1.5, -1.6, -1e9, -np.inf, np.nan):
        assert (keys_of(x, np.full(7, low), 0.0, shift) < quick.SCALE_LEAST).all(), low
    for high in (2.5, 2.6, 1e9, np.inf):
        assert (keys_of(x, np.full(7, high), 0.0, shift) >= quick.SCALE_MOST).all(), high
    assert (keys_of(np.full(3, np.nan), np.asarray([-2.0, 0.0, 3.0]), 0.0, shift) < quick.SCALE_LEAST).all()
    for bits in (0x7FC00000, 0x7FD00000, 0xFFC80000, 0x7FC40000, 0x7FFFFFFF):  # of a NaN
        nan = np.full(1, bits, np.uint32).view(np.float32)
        assert keys_of(nan, np.zeros(1), 0.0, shift)[0] < quick.SCALE_LEAST, hex(bits)
        assert keys_of(np.zeros(1), nan, 0.0, shift)[0] < quick.SCALE_LEAST, hex(bits)
    inside = keys_of(x, np.full(7, -0.49), 0.0, shift)
    assert (inside >= quick.SCALE_LEAST).all()
    assert (inside < quick.SCALE_MOST).all()


def search(logits: jax.Array, first: float) -> quick.Found:
    """Two of 32 experts, whose biases are all `first`."""
    rule = Rule(32, 2, 1, 1, "sigmoid", "top2", True, 1.0, 0, 1, 1.0)
    layout, possible = quick.layout_for(rule, 32, False)
    biases = quick.offsets([jnp.full(32, first)], jnp.float32(first), assembly=False)
    options = {"layout": layout, "possible": possible, "spare": False, "slots": 32, "assembly": False}
    return quick.quick_choice([logits], biases, jnp.float32(first), rule=rule, **options)


@pytest.mark.parametrize("first", [0.0, 2.0**15, 2.0**16, 2.0**17, np.inf, np.nan])
def test_a_bias_past_the_scale_is_not_trusted(first: float) -> None:
    found = search(jnp.linspace(-3, 3, 32), first)
    assert found.sure is not None
    assert found.members_sure is not None
    assert bool(found.sure) == bool(found.members_sure) == (first < 2.0**16)
    if first == 0:
        assert found.place[:2].tolist() == [31, 30]


@pytest.mark.parametrize(("bias", "sure"), [(0.0, True), (256.0, True), (4096.0, False)])
def test_what_the_bias_rounds_away_is_not_trusted(bias: float, sure: bool) -> None:
    """Scores 1.2e-4 apart: by the definition they are equal next to 4096, and the lower index comes first."""
    logits = jnp.full(32, -5.0).at[9].set(0.0).at[3].set(-4.8e-4)
    choices = jax.nn.sigmoid(logits) + jnp.float32(bias)
    assert (choices[9] == choices[3]) == (not sure)
    found = search(logits, bias)
    assert bool(found.sure) == sure
    assert bool(found.members_sure), "which two it is remains sure"
    if sure:
        assert found.place[:2].tolist() == [9, 3]


def falling(key: np.ndarray) -> np.ndarray:
    return np.argsort(-key.astype(np.int64), kind="stable")


@pytest.mark.parametrize("groups", [None, select.Groups(8, 8, 4, True), select.Groups(8, 8, 4, False)], ids=str)
@pytest.mark.parametrize(("columns", "shift"), [(8, 8), (16, 9)])
def test_what_sure_means_on_a_scale(columns: int, shift: int, groups: select.Groups | None) -> None:
    """Among keys that are close: sure picks are more than the margin apart, and all others further below than that."""
    k, count, unit, rng = 3, 300, 1 << shift, np.random.default_rng(columns)
    margin = 2 * unit
    jumps = np.where(rng.random((count, 20)) < 0.2, rng.integers(0, 5, (count, 20)), rng.integers(4, 40, (count, 20)))
    keys = np.full((count, 32 * columns), quick.SCALE_LEAST // unit + 9, np.int64)
    keys[:, :20] += 1000 + np.cumsum(jumps, axis=1)
    keys = (rng.permuted(keys, axis=1) * unit).astype(np.int32).reshape(count, 32, columns)

    def search(key: jax.Array) -> tuple[jax.Array, ...]:
        limits = {"least": quick.SCALE_LEAST, "most": quick.SCALE_MOST}
        return select.quick_top_k(
            list(key.T), k, 4, groups=groups, depth=columns, margin=margin, on_scale=True, **limits
        )

    places, sure, members = (np.asarray(found) for found in jax.jit(jax.vmap(search))(keys))
    assert (sure <= members).all()
    assert 20 < sure.sum() < members.sum() < 290, "some of each"
    for key, place, ordered in zip(keys[members], places[members], sure[members], strict=True):
        kept = key.astype(np.int64)
        if groups is not None:
            best = -np.sort(-kept.reshape(groups.runs, -1), axis=1)
            value = best[:, :2].sum(axis=1) if groups.top2 else best[:, 0]
            order = falling(value)
            stays, goes = value[order][groups.topk_group - 1 :][:2]
            assert stays - goes > (4 if groups.top2 else 1) * margin
            kept.reshape(groups.runs, -1)[order[groups.topk_group :]] = 0
        top = falling(kept.ravel())[: k + 1]
        steps = -np.diff(kept.ravel()[top])
        assert set(place[:k]) == set(top[:k])
        assert steps[-1] > margin
        if ordered:
            assert place[:k].tolist() == top[:k].tolist()
            assert (steps > margin).all()


def test_limits_on_a_scale() -> None:
    """Keys that may stand for lower or higher ones are neither picked nor part of a group's score."""
    least, most, unit = quick.SCALE_LEAST, quick.SCALE_MOST, 1 << 8

    def sure(change: dict[int, int], groups: select.Groups | None = None, k: int = 3) -> bool:
        key = least + unit * 40 * (1 + np.arange(256, dtype=np.int64))
        for at, value in change.items():
            key[at] = value
        columns = [jnp.asarray(column) for column in key.astype(np.int32).reshape(32, 8).T]
        found = select.quick_top_k(
            columns, k, 4, groups=groups, depth=8, margin=unit, least=least, most=most, on_scale=True
        )
        return bool(found[1])

    grouped, by_best = select.Groups(8, 8, 4, True), select.Groups(8, 8, 4, False)
    for groups in (None, grouped, by_best):
        assert sure({}, groups)
        assert sure({3: most - unit}, groups)
        assert not sure({3: most}, groups)
        assert sure({3: least - unit, 40: -5}, groups), "one of many in a group, and no pick"
    assert not sure({at: least - unit * 40 * (255 - at) for at in range(254)}), "the third pick"
    low = dict.fromkeys(range(31), least - unit)  # of the first group
    assert not sure(low, grouped), "its second best"
    assert sure(low, by_best), "its best counts"
    lowest = {at: least - unit * 40 * (255 - at) for at in range(160)}  # five groups, of which one stays
    assert not sure(lowest, by_best, k=1)
    assert sure({at: lowest[at] for at in range(128)}, by_best, k=1), "four"


@pytest.mark.parametrize("value", [0.0, -3.0, -np.inf, np.inf, np.nan])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_picks_exist(scoring_func: str, has_bias: bool, value: float) -> None:
    """Also where the search is not sure, since their logits are loaded before it says so: lanes 2 and 28 tie, and of 60
    experts none lies on lane 30."""
    rule = Rule(60, 4, 1, 1, scoring_func, "max", True, 1.0, 0, 1, 1.0)
    layout, possible = quick.layout_for(rule, 32, False)
    assert possible
    assert layout.columns == 2
    lane = jnp.full(32, value, jnp.float32)
    xs = [lane.at[2].set(5.0).at[28].set(5.0), lane]
    biases, first = ([jnp.zeros(32)] * 2, jnp.float32(0)) if has_bias else (None, None)
    if biases is not None and first is not None and quick.on_scale(rule, True):
        biases = quick.offsets(biases, first, assembly=False)
    options = {"layout": layout, "possible": possible, "spare": False, "slots": 32, "assembly": False}
    found = quick.quick_choice(xs, biases, first, rule=rule, **options)
    assert not found.sure
    ids = np.asarray(layout.expert(found.place))
    assert ids.min() >= 0
    assert ids.max() < 60
