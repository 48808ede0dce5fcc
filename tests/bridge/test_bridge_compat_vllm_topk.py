"""grouped_topk of bridge.compat.vllm against a plain statement of what vLLM's returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bridge import RoutingConfig, presets
from bridge.compat import vllm
from tests.check_compat_vllm import drawn
from tests.parity.compare import UNBIASED, check_routing, decided
from tests.parity.torch_topk import vllm_grouped_topk

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SMALL = RoutingConfig(num_experts=24, top_k=5, n_group=4, topk_group=2, routed_scaling_factor=2.5)


def routed(config: RoutingConfig, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Called as vLLM's router calls it."""
    return vllm.grouped_topk(
        hidden_states=logits.new_zeros(len(logits), 3),
        gating_output=logits,
        topk=config.top_k,
        renormalize=config.renormalize,
        num_expert_group=config.n_group,
        topk_group=config.topk_group,
        scoring_func=config.scoring_func,
        routed_scaling_factor=config.routed_scaling_factor,
        e_score_correction_bias=bias,
    )


def stated(config: RoutingConfig, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return vllm_grouped_topk(
        logits,
        config.top_k,
        config.renormalize,
        config.n_group,
        config.topk_group,
        config.scoring_func,
        config.routed_scaling_factor,
        bias,
    )


def clear_inputs(config: RoutingConfig, biased: bool, count: int, dtype: torch.dtype = torch.float32) -> Any:
    """(logits, bias) of tokens without near ties, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    size = 1 / config.num_experts if config.scoring_func == "softmax" else 0.1
    bias = torch.randn(config.num_experts, generator=generator) * size if biased else None
    logits = (torch.randn(12 * count, config.num_experts, generator=generator) * 1.5).to(dtype)
    logits = logits[decided(logits, bias, config)][:count].clone()
    assert len(logits) == count
    return logits, bias


MODELS = ["deepseek-v3", "deepseek-v2", "kimi-k2", "qwen3-moe"]


@pytest.mark.parametrize("name", MODELS)
def test_grouped_topk_by_model(name: str, device: torch.device) -> None:
    config = replace(presets[name], n_shared_experts=0)
    logits, bias = clear_inputs(config, not name.startswith(UNBIASED), 32)
    weights, ids = routed(config, logits.to(device), None if bias is None else bias.to(device))
    check_routing(weights.cpu(), ids.cpu(), *stated(config, logits, bias), in_order=True)


# Every two of the options in each combination.
OPTIONS = [("sigmoid", True, True), ("sigmoid", False, False), ("softmax", True, False), ("softmax", False, True)]


@pytest.mark.parametrize(("scoring_func", "biased", "renormalize"), OPTIONS)
def test_grouped_topk_by_options(scoring_func: str, biased: bool, renormalize: bool, device: torch.device) -> None:
    config = replace(SMALL, scoring_func=scoring_func, renormalize=renormalize)
    logits, bias = clear_inputs(config, biased, 32)
    weights, ids = routed(config, logits.to(device), None if bias is None else bias.to(device))
    check_routing(weights.cpu(), ids.cpu(), *stated(config, logits, bias), in_order=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grouped_topk_by_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Scores are float32 from logits of any dtype."""
    logits, bias = clear_inputs(SMALL, True, 32, dtype)
    weights, ids = routed(SMALL, logits.to(device), bias.to(device))
    check_routing(weights.cpu(), ids.cpu(), *stated(SMALL, logits, bias), in_order=True)


@pytest.mark.parametrize("tokens", [0, 1, 32], ids=lambda n: f"T{n}")
@pytest.mark.parametrize("config", [SMALL, RoutingConfig(num_experts=13, top_k=13)], ids=["groups", "K = E, odd"])
def test_grouped_topk_ties_go_to_the_lower_index(config: RoutingConfig, tokens: int, device: torch.device) -> None:
    logits = drawn(0, 3)(tokens, config.num_experts).float()
    weights, ids = routed(config, logits.to(device), torch.zeros(config.num_experts, device=device))
    expected_weights, expected = stated(config, logits, torch.zeros(config.num_experts))
    assert weights.dtype == torch.float32
    assert torch.equal(ids.cpu(), expected)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=2e-6, atol=0)


def test_grouped_topk_has_a_gradient(device: torch.device) -> None:
    logits, _ = clear_inputs(SMALL, False, 9)
    ours, theirs = (logits.clone().to(d).requires_grad_() for d in (device, "cpu"))
    weight = torch.rand(9, SMALL.top_k, generator=torch.Generator().manual_seed(5))
    (routed(SMALL, ours, None)[0] * weight.to(device)).sum().backward()
    (stated(SMALL, theirs, None)[0] * weight).sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-7)
    assert theirs.grad.any()
