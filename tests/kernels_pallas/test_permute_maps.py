"""permute_maps in the interpreter, against the oracle's plan."""

from __future__ import annotations

import numpy as np
import pytest

from kernels_pallas.permute_maps import permute_maps
from tests import oracle
from tests.check_plan import PlanCase, drawn

CASES = {
    PlanCase("one token", 5, tokens=1): 5,
    PlanCase("one pair, one expert", 1, tokens=1, slots=1): 1,
    PlanCase("odd E; pairs are dropped at both ends", 13, ids=drawn(-3, 16)): 13,
    PlanCase("all dropped", 9, ids=lambda t, s: np.full((t, s), -1)): 9,
    PlanCase("only the first experts are asked for", 13): 5,
    PlanCase("more pairs than one program has", 6, tokens=520): 6,
}


@pytest.mark.parametrize(("case", "local"), CASES.items(), ids=lambda v: getattr(v, "why", ""))
def test_permute_maps(case: PlanCase, local: int) -> None:
    ids, _ = case.inputs()
    rows, slots, sizes = oracle.plan(np.asarray(ids), case.num_experts, 1, None)
    given = (np.asarray(a, np.int32) for a in (rows, slots, sizes))
    offsets, inverse, index = (np.asarray(a) for a in permute_maps(*given, num_local=local, interpret=True))
    assert offsets.dtype == inverse.dtype == index.dtype == np.int32
    np.testing.assert_array_equal(offsets.view(np.int64), [0, *np.cumsum(sizes)[:local]])
    pairs = ids.size
    np.testing.assert_array_equal(inverse, np.where(rows < 0, pairs - 1, rows).reshape(-1))
    np.testing.assert_array_equal(index, np.where(slots < 0, pairs, slots))
