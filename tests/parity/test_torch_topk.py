"""Routing against plain-PyTorch statements of vLLM's, SGLang's and AITER's grouped top-k."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxmoe
from jaxmoe import RoutingConfig, presets
from tests.parity.compare import UNBIASED, check_routing, decided
from tests.parity.torch_topk import aiter_biased_grouped_topk, sglang_biased_grouped_topk, vllm_grouped_topk

DTYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
SMALL = RoutingConfig(
    num_experts=24, top_k=5, n_group=4, topk_group=2, group_score="top2", routed_scaling_factor=2.5, n_shared_experts=2
)


def dtype_id(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_jax(tensor: torch.Tensor | None) -> jnp.ndarray | None:
    return None if tensor is None else jnp.asarray(tensor.float().numpy(), DTYPES[tensor.dtype])


def make_inputs(
    config: RoutingConfig,
    *,
    biased: bool,
    dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
    num_tokens: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random logits and bias, of tokens without near ties."""
    generator = torch.Generator().manual_seed(0)
    bias = None
    if biased:
        size = 1 / config.num_experts if config.scoring_func == "softmax" else 0.1
        bias = (torch.randn(config.num_experts, generator=generator) * size).to(bias_dtype)
    logits = (torch.randn(12 * num_tokens, config.num_experts, generator=generator) * 1.5).to(dtype)
    logits = logits[decided(logits, bias, config)][:num_tokens]
    assert len(logits) == num_tokens
    return logits, bias


def routed_only(config: RoutingConfig) -> RoutingConfig:
    return dataclasses.replace(config, n_shared_experts=0)


def vllm(logits, bias, config):
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


# vLLM has no sqrtsoftplus in grouped_topk.
VLLM_MODELS = [name for name, config in presets.items() if config.scoring_func != "sqrtsoftplus"]


@pytest.mark.parametrize("name", VLLM_MODELS)
def test_vllm_grouped_topk_by_model(name):
    # Who swaps vLLM's op for ours must get the same experts in the same order, for every model.
    config = routed_only(presets[name])
    logits, bias = make_inputs(config, biased=not name.startswith(UNBIASED))
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config)
    check_routing(routing.weights, routing.experts, *vllm(logits, bias, config), in_order=True)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_vllm_grouped_topk_by_dtypes(dtype, bias_dtype):
    # Logits and bias are read as they are, in any pair of dtypes, and all arithmetic is in float32.
    config = routed_only(SMALL)
    # (The kernels themselves with every pair: tests/jaxmoe/test_route.py, against the implementation that runs here.)
    logits, bias = make_inputs(config, biased=True, dtype=dtype, bias_dtype=bias_dtype, num_tokens=9)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config, implementation="xla")
    check_routing(routing.weights, routing.experts, *vllm(logits, bias, config), in_order=True)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_vllm_grouped_topk_by_options(scoring_func, biased, renormalize, scale):
    # The scale counts with and without renormalisation; groups go by two with a bias and by one without.
    config = dataclasses.replace(
        routed_only(SMALL),
        scoring_func=scoring_func,
        renormalize=renormalize,
        routed_scaling_factor=scale,
        group_score=None,
    )
    logits, bias = make_inputs(config, biased=biased)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config)
    check_routing(routing.weights, routing.experts, *vllm(logits, bias, config), in_order=True)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_exact_ties_go_to_the_lower_index(scoring_func, implementation):
    # Three distinct logits: nearly every choice, of groups too, is a tie that a stable sort settles.
    config = dataclasses.replace(routed_only(SMALL), scoring_func=scoring_func)
    logits = torch.randint(0, 3, (40, config.num_experts), generator=torch.Generator().manual_seed(0)).float()
    bias = torch.zeros(config.num_experts)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config, implementation=implementation)
    assert not decided(logits, bias, config).any()
    _, expected = vllm(logits, bias, config)
    np.testing.assert_array_equal(routing.experts, expected)


def sglang(logits, bias, config, *, on_output: bool):
    return sglang_biased_grouped_topk(
        logits,
        bias,
        config.num_slots,
        config.renormalize,
        config.n_group,
        config.topk_group,
        config.n_shared_experts,
        config.routed_scaling_factor,
        on_output,
    )


SGLANG_MODELS = [name for name, config in presets.items() if config.scoring_func == "sigmoid"]


@pytest.mark.parametrize("scale_weights", [True, False], ids=["scaled-weights", "scaled-output"])
@pytest.mark.parametrize("name", SGLANG_MODELS)
def test_sglang_fused_shared_experts_by_model(name, scale_weights):
    # A shared weight is 1 beside scaled weights, 1 / factor where the layer scales its output: SGLang's two modes.
    config = dataclasses.replace(presets[name], scale_weights=scale_weights)
    logits, bias = make_inputs(config, biased=True, num_tokens=32)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config)
    check_routing(
        routing.weights, routing.experts, *sglang(logits, bias, config, on_output=scale_weights), in_order=True
    )


@pytest.mark.parametrize(("dtype", "scale_weights"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_sglang_by_dtype_in_the_kernels(dtype, scale_weights):
    # The kernels themselves, shared slots included.
    config = dataclasses.replace(SMALL, scale_weights=scale_weights)
    logits, bias = make_inputs(config, biased=True, dtype=dtype, num_tokens=9)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config, implementation="interpret")
    check_routing(
        routing.weights, routing.experts, *sglang(logits, bias, config, on_output=scale_weights), in_order=True
    )


def test_sglang_replicas_of_one_shared_expert():
    # SGLang's fallback draws one of n copies at random; ours takes them in turn, with the same weight.
    one = dataclasses.replace(SMALL, n_shared_experts=1, scale_weights=False)
    logits, bias = make_inputs(one, biased=True, num_tokens=8)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=dataclasses.replace(one, shared_expert_replicas=3))
    weights, ids = sglang(logits, bias, one, on_output=False)
    ids[:, -1] = one.num_experts + torch.arange(8) % 3
    check_routing(routing.weights, routing.experts, weights, ids, in_order=True)


def test_sglang_does_not_scale_raw_weights():
    # Without renormalisation SGLang leaves the routed weights alone in both modes: that is scale_weights=False.
    config = dataclasses.replace(routed_only(SMALL), renormalize=False, scale_weights=False)
    logits, bias = make_inputs(config, biased=True)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config)
    for on_output in (True, False):
        check_routing(
            routing.weights, routing.experts, *sglang(logits, bias, config, on_output=on_output), in_order=True
        )


def aiter(logits, bias, config):
    """As vLLM calls it for fused shared experts: their columns filled beforehand, the first ones passed."""
    weights = torch.full(
        (len(logits), config.num_slots), 1.0 if config.scale_weights else 1 / config.routed_scaling_factor
    )
    ids = torch.arange(-config.top_k, config.n_shared_experts).add(config.num_experts).int().repeat(len(logits), 1)
    scale = config.routed_scaling_factor if config.scale_weights else 1.0
    k = config.top_k
    aiter_biased_grouped_topk(
        logits, bias, weights[:, :k], ids[:, :k], config.n_group, config.topk_group, config.renormalize, scale
    )
    return weights, ids


@pytest.mark.parametrize("scale_weights", [True, False], ids=["scaled-weights", "scaled-output"])
@pytest.mark.parametrize("name", SGLANG_MODELS)
def test_aiter_biased_grouped_topk_by_model(name, scale_weights):
    # AITER's score for shared experts is a constant that its caller fills in: 1, or 1 / factor.
    config = dataclasses.replace(presets[name], scale_weights=scale_weights)
    logits, bias = make_inputs(config, biased=True, num_tokens=32)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config)
    check_routing(routing.weights, routing.experts, *aiter(logits, bias, config), in_order=True)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize(
    ("implementation", "dtype"), [*(("xla", dtype) for dtype in DTYPES), ("interpret", torch.float16)], ids=str
)
def test_aiter_biased_grouped_topk_by_dtype(implementation, dtype, renormalize):
    # The bias in the logits' dtype, as AITER demands; shared weights of 1 with and without renormalisation.
    config = dataclasses.replace(SMALL, renormalize=renormalize)
    logits, bias = make_inputs(config, biased=True, dtype=dtype, bias_dtype=dtype, num_tokens=9)
    routing = jaxmoe.route(to_jax(logits), to_jax(bias), config=config, implementation=implementation)
    check_routing(routing.weights, routing.experts, *aiter(logits, bias, config), in_order=True)


def test_aiter_needs_the_bias_in_the_dtype_of_the_logits():
    # So its callers round a float32 bias, and choose other experts than the model meant: ours reads it as it is.
    config = dataclasses.replace(SMALL, n_shared_experts=0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, config.num_experts, generator=generator).bfloat16()
    bias = 8 + torch.randn(config.num_experts, generator=generator) * 0.01  # bfloat16 has steps of 1/16 near 8
    logits = logits[decided(logits, bias, config)]
    with pytest.raises(ValueError, match=r"bias: expected the dtype of logits, torch\.bfloat16, got torch\.float32"):
        aiter(logits, bias, config)
    experts = np.asarray(jaxmoe.route(to_jax(logits), to_jax(bias), config=config).experts)
    np.testing.assert_array_equal(experts, vllm(logits, bias, config)[1])
    assert (experts != aiter(logits, bias.bfloat16(), config)[1].numpy()).any()
