"""bridge.compat.aiter against a plain statement of what AITER's biased_grouped_topk writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bridge import RoutingConfig, path, presets
from bridge.compat import aiter
from tests.bridge.test_bridge_compat_vllm_topk import clear_inputs
from tests.check_compat_vllm import drawn
from tests.parity.compare import check_routing
from tests.parity.torch_topk import aiter_biased_grouped_topk

pytestmark = pytest.mark.usefixtures("compiled_quickly")

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


@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
@pytest.mark.parametrize("wide", [0, 1], ids=["whole", "columns"])
def test_logits_with_a_gradient_are_refused(wide: int, takes_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in place has none; columns would be hooked into the graph by the copy to them."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    logits, bias = drawn(0, 3)(32, ODD.num_experts).float().requires_grad_(), torch.zeros(ODD.num_experts)
    weights = torch.full((32, ODD.top_k + wide), -77.0)[:, : ODD.top_k]
    ids = torch.full((32, ODD.top_k + wide), -77, dtype=torch.int32)[:, : ODD.top_k]
    run = lambda weights: aiter.biased_grouped_topk(logits, bias, weights, ids, ODD.n_group, ODD.topk_group, True)
    wanted = "^gating_output: expected a tensor without requires_grad, as topk_weights is written to"
    with pytest.raises(ValueError, match=wanted):
        run(weights)
    assert not weights.requires_grad
    with torch.no_grad(), pytest.raises(ValueError, match=r"^topk_weights: expected a tensor without requires_grad"):
        run(weights.detach().requires_grad_())
    assert (weights == -77).all()
    assert (ids == -77).all()
    with torch.no_grad():
        run(weights)
    assert not weights.requires_grad
    assert (ids >= 0).all()


@pytest.mark.parametrize("takes_ops", [False, True], ids=["DLPack", "ops"])
@pytest.mark.parametrize("wide", [0, 1], ids=["whole", "columns"])
def test_a_bias_that_is_a_parameter(wide: int, takes_ops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets no gradient, wherever the results go."""
    monkeypatch.setattr(path, "takes_ops", lambda tensor, implementation: takes_ops)
    logits, bias = drawn(0, 3)(32, ODD.num_experts).float(), torch.zeros(ODD.num_experts)
    wanted = call(aiter.biased_grouped_topk, ODD, logits, bias, wide)
    got = call(aiter.biased_grouped_topk, ODD, logits, torch.nn.Parameter(bias), wide)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, wanted, strict=True))


def test_columns_of_wider_logits(device: torch.device) -> None:
    logits, bias = clear_inputs(ODD, True, 32)
    assert bias is not None
    wide = torch.full((32, 96), torch.nan, device=device)
    wide[:, 32:77] = logits
    got = call(aiter.biased_grouped_topk, ODD, wide[:, 32:77], bias.to(device))
    check_routing(*got, *call(aiter_biased_grouped_topk, ODD, logits, bias), in_order=True)
