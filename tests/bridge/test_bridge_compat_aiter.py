"""bridge.compat.aiter against a plain statement of what AITER's biased_grouped_topk writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bridge import RoutingConfig, presets
from bridge.compat import aiter
from tests.bridge.test_bridge_compat_vllm import compiled_quickly, drawn
from tests.bridge.test_bridge_compat_vllm_topk import clear_inputs
from tests.parity.compare import check_routing
from tests.parity.torch_topk import aiter_biased_grouped_topk

__all__ = ["compiled_quickly"]  # a fixture

ODD = RoutingConfig(num_experts=45, top_k=6, n_group=9, topk_group=4, routed_scaling_factor=2.5)


def call(
    function: object, config: RoutingConfig, logits: torch.Tensor, bias: torch.Tensor, wide: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids) that the function writes; with `wide`, to columns of tensors with so many more."""
    shape = (len(logits), config.top_k + wide)
    weights = torch.full(shape, -77.0, device=logits.device)
    ids = torch.full(shape, -77, dtype=torch.int32, device=logits.device)
    assert callable(function)
    done = function(
        logits,
        bias,
        weights[:, : config.top_k],
        ids[:, : config.top_k],
        config.n_group,
        config.topk_group,
        config.renormalize,
        config.routed_scaling_factor,
    )
    assert done is None
    assert (weights[:, config.top_k :] == -77).all()
    assert (ids[:, config.top_k :] == -77).all()
    return weights[:, : config.top_k].cpu(), ids[:, : config.top_k].cpu()


@pytest.mark.parametrize(("name", "wide"), [("deepseek-v3", 2), ("kimi-k2", 0)], ids=["columns", "whole"])
def test_by_model(name: str, wide: int, device: torch.device) -> None:
    """Written in place, also to the first columns of a tensor that holds shared experts behind."""
    config = replace(presets[name], n_shared_experts=0)
    logits, bias = clear_inputs(config, True, 32)
    assert bias is not None
    got = call(aiter.biased_grouped_topk, config, logits.to(device), bias.to(device), wide)
    check_routing(*got, *call(aiter_biased_grouped_topk, config, logits, bias), in_order=True)


DTYPES = [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True), (torch.float32, False)]


@pytest.mark.parametrize(("dtype", "renormalize"), DTYPES, ids=str)
def test_by_dtype(dtype: torch.dtype, renormalize: bool, device: torch.device) -> None:
    """The bias in the dtype of the logits, as AITER demands, and in float32, which loses nothing."""
    config = replace(ODD, renormalize=renormalize)
    logits, bias = clear_inputs(config, True, 32, dtype)
    assert bias is not None
    got = call(aiter.biased_grouped_topk, config, logits.to(device), bias.to(device))
    check_routing(*got, *call(aiter_biased_grouped_topk, config, logits.float(), bias), in_order=True)
    rounded = call(aiter.biased_grouped_topk, config, logits.to(device), bias.to(device, dtype))
    again = call(aiter.biased_grouped_topk, config, logits.to(device), bias.to(dtype).float().to(device))
    assert all(torch.equal(a, b) for a, b in zip(rounded, again, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 32], ids=lambda n: f"T{n}")
@pytest.mark.parametrize("wide", [0, 1], ids=["whole", "columns"])
def test_ties_go_to_the_lower_index(tokens: int, wide: int, device: torch.device) -> None:
    logits, bias = drawn(0, 3)(tokens, ODD.num_experts).float(), torch.zeros(ODD.num_experts)
    weights, ids = call(aiter.biased_grouped_topk, ODD, logits.to(device), bias.to(device), wide)
    expected_weights, expected = call(aiter_biased_grouped_topk, ODD, logits, bias)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


def test_columns_of_wider_logits(device: torch.device) -> None:
    logits, bias = clear_inputs(ODD, True, 32)
    assert bias is not None
    wide = torch.full((32, 96), torch.nan, device=device)
    wide[:, 32:77] = logits
    got = call(aiter.biased_grouped_topk, ODD, wide[:, 32:77], bias.to(device))
    check_routing(*got, *call(aiter_biased_grouped_topk, ODD, logits, bias), in_order=True)
