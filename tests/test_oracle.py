"""The oracle knows which of its answers float32 must find too."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe import RoutingConfig
from tests import oracle

HIGH, LOW = 3.0000002, 3.0  # neighbours in float32, whose sigmoids are within its rounding


@pytest.mark.parametrize(
    ("why", "logits", "decided"),
    [
        ("far apart", [4, 3, 2, 1, 0, -1], True),
        ("exact ties go to the lower index", [LOW, LOW, LOW, 1, 0, -1], True),
        ("neighbours within rounding", [LOW, HIGH, 2, 1, 0, -1], False),
        ("a run of ties hides the value just below it", [LOW, HIGH, HIGH, HIGH, LOW, -1], False),
        ("close, but far below the chosen", [5, 4, LOW, HIGH, 0, -1], True),
        ("NaN ranks below every number, however close", [LOW, np.nan, np.nan, np.nan, np.nan, np.nan], True),
    ],
)
@pytest.mark.parametrize("groups", [{}, {"n_group": 6, "topk_group": 2}], ids=["no groups", "groups of one"])
def test_what_float32_must_find(why: str, logits: list[float], decided: bool, groups: dict[str, int]) -> None:
    config = RoutingConfig(num_experts=6, top_k=2, **groups)
    _, found = oracle.route(np.array([logits], np.float32), None, config)
    assert found.tolist() == [decided], why


def test_a_group_out_of_reach_decides_nothing() -> None:
    """The best of a dropped group may be as close to the chosen as it likes."""
    config = RoutingConfig(num_experts=6, top_k=2, n_group=2, topk_group=1)
    bias = np.zeros(6, np.float32)  # so that groups rank by their best two
    _, found = oracle.route(np.array([[HIGH, 2, 1, LOW, -2, -3]], np.float32), bias, config)
    assert found.tolist() == [True]
