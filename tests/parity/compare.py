"""How parity tests compare, and which tokens they may compare: those whose choice rounding cannot change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxmoe import RoutingConfig

# Models, by how their names begin, whose choice has no bias.
UNBIASED = ("deepseek-v2", "qwen", "gpt-oss", "mixtral", "olmoe")
WEIGHTS_RTOL = 2e-6
LAYER_RTOL = 2e-5  # of the largest output: two matrix products in float32, summed in another order


def assert_routing(weights, experts, expected_weights, expected_experts, *, in_order: bool) -> None:
    """Equal ids and close weights: slot by slot, or, where the other side does not sort, id by id."""
    weights, experts, expected_weights, expected_experts = (
        np.asarray(a) for a in (weights, experts, expected_weights, expected_experts)
    )
    if not in_order:
        order, expected_order = np.argsort(experts, axis=1), np.argsort(expected_experts, axis=1)
        weights, experts = np.take_along_axis(weights, order, 1), np.take_along_axis(experts, order, 1)
        expected_weights = np.take_along_axis(expected_weights, expected_order, 1)
        expected_experts = np.take_along_axis(expected_experts, expected_order, 1)
    assert weights.dtype == np.float32
    assert experts.dtype == np.int32
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=WEIGHTS_RTOL, atol=0)


def check_routing(weights, experts, expected_weights, expected_experts, *, in_order: bool) -> None:
    """`assert_routing`, and proof on the same data that it rejects zeros and swapped experts."""
    weights, experts = np.asarray(weights), np.asarray(experts)
    expected = (expected_weights, expected_experts)
    assert_routing(weights, experts, *expected, in_order=in_order)
    swapped = np.concatenate([experts[:, 1::-1], experts[:, 2:]], axis=1)  # the first two, with each other's weight
    for wrong in ((np.zeros_like(weights), experts), (weights, np.zeros_like(experts)), (weights, swapped)):
        with pytest.raises(AssertionError):
            assert_routing(*wrong, *expected, in_order=in_order)


def assert_layer(y, expected) -> None:
    """Close in units of the largest output."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=LAYER_RTOL * np.abs(expected).max())


def scores64(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Scores in float64."""
    x = logits.double()
    if scoring_func == "softmax":
        return x.softmax(dim=1)
    return x.sigmoid() if scoring_func == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def decided(logits: torch.Tensor, bias: torch.Tensor | None, config: RoutingConfig) -> torch.Tensor:
    """bool [T]: tokens for which float64 choices, of groups and of experts, differ by more than float32 may blur."""
    choice = scores64(logits, config.scoring_func)
    if bias is not None:
        choice = choice + bias.double()
    gap = 4e-6 * choice.abs().amax(dim=1, keepdim=True)
    clear = torch.ones(len(choice), dtype=torch.bool)
    if config.n_group > config.topk_group:
        by_group = choice.unflatten(1, (config.n_group, -1))
        of_group = 2 if (config.group_score or ("max" if bias is None else "top2")) == "top2" else 1
        group = by_group.topk(min(of_group, by_group.shape[2]), dim=2).values.sum(dim=2)
        ranked = group.sort(dim=1, descending=True)
        last = config.topk_group
        clear &= ranked.values[:, last - 1] - ranked.values[:, last] > gap[:, 0]
        out = torch.ones_like(group, dtype=torch.bool).scatter(1, ranked.indices[:, :last], False)
        choice = by_group.masked_fill(out[:, :, None], -torch.inf).flatten(1)
    best = choice.sort(dim=1, descending=True).values[:, : config.top_k + 1]
    return clear & (best[:, :-1] - best[:, 1:] > gap).all(dim=1)


def assert_falling(experts, logits: torch.Tensor, bias: torch.Tensor | None, config: RoutingConfig) -> None:
    """The chosen experts stand in falling order of choice."""
    choice = scores64(logits, config.scoring_func)
    if bias is not None:
        choice = choice + bias.double()
    routed = torch.from_numpy(np.asarray(experts)[:, : config.top_k].astype(np.int64))
    picked = choice.gather(1, routed)
    assert bool((picked[:, :-1] >= picked[:, 1:]).all())
