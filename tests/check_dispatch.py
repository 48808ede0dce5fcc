"""Checks of dispatch and combine, shared by the CPU and the GPU tests."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe import DispatchPlan
from tests import oracle


def rounding(dtype: Any) -> dict[str, float]:
    """What float32 accumulation and one rounding to `dtype` may change."""
    return {"rtol": max(1e-6, float(jnp.finfo(dtype).eps)), "atol": 2e-6}


def check_dispatch(got: Any, x: Any, plan: DispatchPlan) -> None:
    """Bit for bit: a copy changes nothing."""
    slots = np.asarray(plan.slots)
    assert got.dtype == x.dtype
    assert got.shape == (len(slots), x.shape[1])
    held = slots >= 0
    got, x = np.asarray(got).astype(np.float32), np.asarray(x).astype(np.float32)
    np.testing.assert_array_equal(got[held].view(np.int32), x[slots[held] // plan.rows.shape[1]].view(np.int32))
    assert not got[~held].any(), "rows that hold no token are zero"


def check_combine(got: Any, rows: Any, plan: DispatchPlan, weights: Any) -> None:
    place = np.asarray(plan.rows)
    assert got.dtype == rows.dtype
    assert got.shape == (place.shape[0], rows.shape[1])
    rows64, weights64 = np.asarray(rows).astype(np.float64), np.asarray(weights).astype(np.float64)
    want = np.zeros(got.shape)
    for j in range(place.shape[1]):
        kept = place[:, j] >= 0
        want[kept] += weights64[kept, j, None] * rows64[place[kept, j]]
    oracle.same(got, want, **rounding(rows.dtype))
