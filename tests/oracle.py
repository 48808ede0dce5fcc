"""What the results must be, in numpy and float64, independent of the code under test."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxmoe import RoutingConfig

FLOAT32 = 2.0**-23


def score(x: np.ndarray, scoring_func: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        if scoring_func == "sigmoid":
            return 1 / (1 + np.exp(-x))
        if scoring_func == "sqrtsoftplus":
            return np.sqrt(np.logaddexp(0, x))
        e = np.exp(x - np.max(x, axis=1, keepdims=True))
        return e / np.sum(e, axis=1, keepdims=True)


def falling(values: np.ndarray) -> np.ndarray:
    """Indices from the largest to the smallest along the last axis; NaN last, ties to the lower index."""
    return np.argsort(-values, axis=-1, kind="stable")


def gap(a: np.ndarray, b: np.ndarray, units: int) -> np.ndarray:
    """Whether a > b is beyond what float32 may round away: so many units in the last place.

    An exact tie is decided too: by the tie rule.
    """
    with np.errstate(invalid="ignore"):
        close = np.abs(a - b) <= units * (FLOAT32 * np.maximum(np.abs(a), np.abs(b)) + 1e-37)
    return ~close | (a == b) | ~np.isfinite(a) | ~np.isfinite(b)


def separate(values: np.ndarray, count: int, units: int) -> np.ndarray:
    """Whether float32 must find the same `count` largest in the same order [T].

    Each of them has to be clear of the first strictly lower value: a run of exact ties may hide one just below it.
    """
    ranked = np.take_along_axis(values, falling(values), axis=1)
    clear, lower = np.ones(len(values), bool), np.full(len(values), -np.inf)
    for rank in range(values.shape[1] - 2, -1, -1):
        here, behind = ranked[:, rank], ranked[:, rank + 1]
        lower = np.where(behind < here, behind, lower)
        if rank < count:
            clear &= gap(here, lower, units)
    return clear


def route(logits: Any, bias: Any, config: RoutingConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, k], whether float32 must find the same [T])."""
    x = np.asarray(logits).astype(np.float64)
    tokens, experts = x.shape
    score_ = score(x, config.scoring_func)
    choice = score_ if bias is None else score_ + np.asarray(bias).astype(np.float64)
    units = 8
    if config.scoring_func == "softmax" and bias is None and config.group_score != "top2":
        choice = np.where(np.isnan(score_), np.nan, x)  # the same order, also where float64 underflows
        units = 0  # a logit is not computed, so not rounded
    decided = np.ones(tokens, bool)
    reach = np.ones(choice.shape, bool)
    if config.n_group > config.topk_group:
        by_group = choice.reshape(tokens, config.n_group, experts // config.n_group)
        best = -np.sort(-by_group, axis=2)  # NaN last
        top2 = (config.group_score or ("top2" if bias is not None else "max")) == "top2"
        with np.errstate(invalid="ignore"):
            group = best[:, :, : 2 if top2 else 1].sum(axis=2)
        order = falling(group)
        decided &= separate(group, config.topk_group, units)
        kept = np.zeros(group.shape, bool)
        np.put_along_axis(kept, order[:, : config.topk_group], True, axis=1)
        reach = np.repeat(kept, experts // config.n_group, axis=1)
    order = falling(choice)
    reach_first = np.argsort(~np.take_along_axis(reach, order, axis=1), axis=1, kind="stable")
    order = np.take_along_axis(order, reach_first, axis=1)
    decided &= separate(np.where(reach, choice, -np.inf), config.top_k, units)
    return order[:, : config.top_k].astype(np.int32), decided


def weights(logits: Any, ids: np.ndarray, config: RoutingConfig) -> np.ndarray:
    """[T, k] weights of given ids."""
    x = np.asarray(logits).astype(np.float64)
    z = np.take_along_axis(x, ids, axis=1)
    chosen = np.take_along_axis(score(x, config.scoring_func), ids, axis=1)
    if config.renormalize:  # ratios, by way of exponents where float64 could not hold the scores either
        softmax = config.scoring_func == "softmax"
        low = z if softmax else np.minimum(z, 0)
        top = np.max(low, axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            shift = np.where(low == top, 0.0, low - top)
            if softmax:
                chosen = np.where(np.isnan(chosen), np.nan, np.exp(shift))
            elif config.scoring_func == "sigmoid":
                chosen = np.exp(shift) / (1 + np.exp(-np.abs(z)))
            else:
                small = z < -40  # sqrt(log(1 + exp(z))) is exp(z / 2) there, to the last bit
                chosen = np.exp(shift / 2) * np.where(small, 1.0, chosen / np.exp(np.where(small, 0.0, low / 2)))
            chosen = chosen / np.sum(chosen, axis=1, keepdims=True)
    return chosen * (config.routed_scaling_factor if config.scale_weights else 1.0)


def shared_ids(tokens: int, config: RoutingConfig) -> np.ndarray:
    token, replicas = np.arange(tokens)[:, None], config.shared_expert_replicas
    return (config.num_experts + np.arange(config.n_shared_experts) * replicas + token % replicas).astype(np.int32)


def plan(
    experts: np.ndarray,
    num_experts: int,
    align: int = 1,
    expert_map: np.ndarray | None = None,
    max_rows: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, slots, group_sizes), pair by pair; then cut."""
    flat = experts.reshape(-1)
    if expert_map is not None:
        flat = np.array([expert_map[i] if 0 <= i < len(expert_map) else -1 for i in flat], np.int32)
    places = [np.flatnonzero(flat == e) for e in range(num_experts)]
    sizes = np.array([-(-len(p) // align) * align for p in places], np.int32)
    total = flat.size if align == 1 else -(-(flat.size + num_experts * (align - 1)) // align) * align
    rows, slots = np.full(flat.size, -1, np.int32), np.full(total, -1, np.int32)
    for place, first in zip(places, np.cumsum(sizes) - sizes, strict=True):
        rows[place] = first + np.arange(len(place))
        slots[first : first + len(place)] = place
    if max_rows is not None:
        rows[rows >= max_rows] = -1
        held = np.repeat(np.arange(num_experts), sizes)[:max_rows]
        sizes = np.bincount(held, minlength=num_experts).astype(np.int32)
    return rows.reshape(experts.shape), slots[:max_rows], sizes


def same(got: Any, want: np.ndarray, rtol: float, atol: float = 0.0) -> None:
    """Equal within the tolerance, NaN where NaN is wanted and nowhere else; shapes too."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
