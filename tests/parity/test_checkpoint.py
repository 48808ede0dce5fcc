"""A DeepSeek-V3 and a GLM-4.5 block of transformers, saved and loaded; and the loss that transformers has too."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxmoe
from jaxmoe import RoutingConfig
from tests.parity.compare import assert_layer, decided

transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402  (it comes with transformers)

FIELDS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
FIELDS |= {"vocab_size": 8, "first_k_dense_replace": 0, "n_routed_experts": 16, "num_experts_per_tok": 4}
FIELDS |= {"moe_intermediate_size": 16, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "intermediate_size": 8}
GROUPS = {"n_group": 4, "topk_group": 2}
PREFIX = "model.layers.0.mlp"


@pytest.mark.parametrize(("model", "more"), [("DeepseekV3", GROUPS), ("Glm4Moe", {"n_group": 1, "topk_group": 1})])
def test_loaded_block_agrees_with_transformers(model: str, more: dict[str, Any], tmp_path: Any) -> None:
    """As a user has it: a model saved by transformers, loaded by name; fused and apart, and exported again."""
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{model}Config")(**FIELDS, **more)
    module = getattr(transformers, f"{model}ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
        block = module.model.layers[0].mlp
        block.gate.e_score_correction_bias.normal_(std=0.1)
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = RoutingConfig.from_hf(hf_config)
    with torch.no_grad():
        x = torch.randn(80, 32)
        x = x[decided(x @ block.gate.weight.T, block.gate.e_score_correction_bias, config)][:32]
        assert len(x) == 32
        expected = block(x[None])[0]

    rows = jnp.asarray(x.numpy())
    fused = jaxmoe.load_hf_moe(tensors, PREFIX, config)
    params, shared = jaxmoe.load_hf_moe(tensors, PREFIX, config, fuse_shared_experts=False)
    y = jaxmoe.moe(rows, fused, config)[0]
    routed = jaxmoe.moe(rows, params, dataclasses.replace(config, n_shared_experts=0))[0]
    assert_layer(y, expected)
    assert_layer(routed + shared(rows), expected)
    for wrong in (jnp.zeros_like(y), routed, y[::-1]):
        with pytest.raises(AssertionError):
            assert_layer(wrong, expected)

    block_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    for exported in (
        jaxmoe.export_hf_moe(fused, PREFIX, config),
        jaxmoe.export_hf_moe(params, PREFIX, config, shared=shared),
    ):
        save_file(exported, tmp_path / "exported.safetensors")
        back = load_file(tmp_path / "exported.safetensors")
        assert back.keys() == block_tensors.keys()
        assert all(back[name].tobytes() == tensor.tobytes() for name, tensor in block_tensors.items())


def test_safetensors_of_bfloat16(tmp_path: Any) -> None:
    config = RoutingConfig(num_experts=2, top_k=1)
    params = jaxmoe.MoEParams(
        router=jnp.ones((2, 4), jnp.bfloat16),
        gate_up=jnp.arange(48, dtype=jnp.bfloat16).reshape(2, 4, 6),
        down=jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4),
    )
    save_file(jaxmoe.export_hf_moe(params, "", config), tmp_path / "block.safetensors")
    back = jaxmoe.load_hf_moe(load_file(tmp_path / "block.safetensors"), "", config, has_bias=False)
    assert back.gate_up.dtype == back.down.dtype == back.router.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back.gate_up.astype(jnp.float32), params.gate_up.astype(jnp.float32))
    np.testing.assert_array_equal(back.down.astype(jnp.float32), params.down.astype(jnp.float32))


@pytest.mark.parametrize("valid", [24, 17])
def test_switch_loss_agrees_with_transformers(valid: int) -> None:
    """Value and gradient, of softmax scores; padding by transformers' attention mask."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(0)
    config = RoutingConfig(num_experts=8, top_k=2, scoring_func="softmax")
    logits = torch.randn(24, 8, requires_grad=True)
    mask = (torch.arange(24) < valid).reshape(3, 8)
    expected = load_balancing_loss_func((logits,), 8, 2, mask)
    expected.backward()

    x = jnp.asarray(logits.detach().numpy())
    routing = jaxmoe.route(x, config=config, num_valid_tokens=valid)
    loss, grad = jax.value_and_grad(lambda x: jaxmoe.switch_loss(x, routing, config))(x)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, logits.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert np.abs(grad).max() > 1e-3
