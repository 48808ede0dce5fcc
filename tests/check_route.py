"""The checks of one routing result, shared by the CPU and the GPU tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxmoe import Routing, RoutingConfig
from tests import oracle

RTOL = 2e-6


def check_route(got: Routing, logits: Any, bias: Any, config: RoutingConfig, valid: int | None = None) -> float:
    """Checks everything the spec promises; returns the share of tokens whose ids float32 must get exactly right."""
    tokens, k = logits.shape[0], config.top_k
    weights, ids, load = np.asarray(got.weights), np.asarray(got.experts), got.load
    assert (weights.dtype, ids.dtype) == (np.float32, np.int32)
    assert weights.shape == ids.shape == (tokens, config.num_slots)
    valid = tokens if valid is None else valid
    assert (ids[valid:] == -1).all()
    assert (weights[valid:] == 0).all()

    routed = ids[:valid, :k]
    want, decided = oracle.route(logits, bias, config)
    want, decided = want[:valid], decided[:valid]
    assert ((routed >= 0) & (routed < config.num_experts)).all()
    ordered = np.sort(routed, axis=1)
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an id twice"
    np.testing.assert_array_equal(routed[decided], want[decided])
    if valid:
        oracle.same(weights[:valid, :k], oracle.weights(logits[:valid], routed, config), rtol=RTOL, atol=1e-37)
    if config.renormalize:
        total = weights[:valid, :k].sum(axis=1, dtype=np.float64)
        scale = config.routed_scaling_factor if config.scale_weights else 1.0
        np.testing.assert_allclose(total[~np.isnan(total)], scale, rtol=2e-6)

    np.testing.assert_array_equal(ids[:valid, k:], oracle.shared_ids(valid, config))
    shared = 1.0 if config.scale_weights else 1.0 / config.routed_scaling_factor
    np.testing.assert_array_equal(weights[:valid, k:], np.float32(shared))
    if load is not None:
        assert load.dtype == np.int32
        np.testing.assert_array_equal(load, np.bincount(ids[ids >= 0], minlength=config.num_expert_ids))
    return float(decided.mean()) if valid else 1.0
