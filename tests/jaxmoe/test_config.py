"""RoutingConfig: what it takes, and what it refuses by name."""

from __future__ import annotations

import enum
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from jaxmoe import RoutingConfig, presets


def test_is_frozen_and_hashable() -> None:
    config = RoutingConfig(num_experts=8, top_k=2)
    assert {config: 1}[RoutingConfig(num_experts=8, top_k=2)] == 1
    with pytest.raises(AttributeError):
        config.top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        RoutingConfig(8, 2)  # type: ignore[misc]


def test_ids_and_slots() -> None:
    config = RoutingConfig(num_experts=8, top_k=2, n_shared_experts=2, shared_expert_replicas=3)
    assert (config.num_slots, config.num_expert_ids) == (4, 14)


class Scoring(str, enum.Enum):  # noqa: UP042
    """As programs that have their options in enums may pass it."""

    SOFTMAX = "softmax"


def test_json() -> None:
    """As json writes it, and back."""
    odd = RoutingConfig(num_experts=8, top_k=2, routed_scaling_factor=-1e-7, group_score="max", renormalize=False)
    for config in [*presets.values(), odd, RoutingConfig(num_experts=1, top_k=1, routed_scaling_factor=3)]:
        values = [getattr(config, field.name) for field in fields(config)]
        assert config.json == json.dumps(values, separators=(",", ":"))
        assert RoutingConfig.from_json(config.json) == config
    named = RoutingConfig(num_experts=8, top_k=2, scoring_func=Scoring.SOFTMAX)
    assert RoutingConfig.from_json(named.json) == named == RoutingConfig(num_experts=8, top_k=2, scoring_func="softmax")
    for text in ("[1]", "{}", "3"):
        with pytest.raises(ValueError, match=r"text: expected the json of a RoutingConfig, a list of 11 fields, got"):
            RoutingConfig.from_json(text)


def test_numbers_of_numpy() -> None:
    """They come from arrays of a checkpoint or a sweep; what is kept are Python's."""
    config = RoutingConfig(num_experts=np.int64(8), top_k=np.int32(2), routed_scaling_factor=np.float64(2.5))
    assert config.json == RoutingConfig(num_experts=8, top_k=2, routed_scaling_factor=2.5).json
    assert (type(config.num_experts), type(config.routed_scaling_factor)) == (int, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an int from 1 to 1024, got 0"),
        ({"num_experts": 1025}, "num_experts: expected an int from 1 to 1024, got 1025"),
        ({"num_experts": True}, "num_experts: expected an int from 1 to 1024, got True"),
        ({"num_experts": np.float32(8)}, "num_experts: expected an int from 1 to 1024, got .*8.0"),
        ({"top_k": np.int8(33), "num_experts": 64}, "top_k: expected an int from 1 to 32, got 33"),
        ({"num_experts": 8.0}, "num_experts: expected an int from 1 to 1024, got 8.0"),
        ({"top_k": 0}, "top_k: expected an int from 1 to 32, got 0"),
        ({"top_k": 33, "num_experts": 64}, "top_k: expected an int from 1 to 32, got 33"),
        ({"top_k": 9}, "top_k: expected at most the 8 experts of topk_group=1 groups, got 9"),
        ({"top_k": 3, "n_group": 4}, "top_k: expected at most the 2 experts of topk_group=1 groups, got 3"),
        ({"n_group": 3}, "n_group: expected a divisor of num_experts=8, got 3"),
        ({"n_group": 2, "topk_group": 3}, "topk_group: expected an int from 1 to 2, got 3"),
        ({"scoring_func": "relu"}, "scoring_func: expected one of .*, got 'relu'"),
        ({"group_score": "mean"}, "group_score: expected None or one of .*, got 'mean'"),
        ({"renormalize": 1}, "renormalize: expected a bool, got 1"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor: expected a number from 1e-37 to 1e37 in size, got 0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: expected a number from"),
        (
            {"routed_scaling_factor": "2"},
            "routed_scaling_factor: expected a number from 1e-37 to 1e37 in size, got '2'",
        ),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor: expected a number from"),
        (
            {"n_shared_experts": 2, "shared_expert_replicas": 1024},
            "shared_expert_replicas: expected at most 2048 expert ids",
        ),
        ({"n_shared_experts": -1}, "n_shared_experts: expected an int from 0 to 32, got -1"),
        ({"shared_expert_replicas": 0}, "shared_expert_replicas: expected an int from 1 to 1024, got 0"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingConfig(**{"num_experts": 8, "top_k": 2, **changes})
