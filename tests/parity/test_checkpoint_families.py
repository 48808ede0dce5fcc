"""Checkpoints as transformers writes them, under the names that the models are published with, loaded and run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxmoe
from jaxmoe import RoutingConfig
from jaxmoe.checkpoint_names import NAMINGS
from tests.parity.compare import assert_layer, decided

transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402  (it comes with transformers)

# The widths of an expert, of a dense layer and of the model differ, so that nothing transposed or mixed up would fit.
HIDDEN, TOKENS = 32, 32
SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"head_dim": 16, "vocab_size": 8, "intermediate_size": 24, "moe_intermediate_size": 12, "pad_token_id": 0}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
PLAIN = {"num_experts": 8, "num_experts_per_tok": 3}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 0, "n_shared_experts": 2}
SPARSE = {"mlp_layer_types": ["sparse"], "n_group": 1, "topk_group": 1}
GATED = PLAIN | {"shared_expert_intermediate_size": 20, "layer_types": ["full_attention"]}
ERNIE = {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 0}
VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 2}
VISION |= {"out_hidden_size": HIDDEN, "deepstack_visual_indexes": [], "num_position_embeddings": 4}


class Family(NamedTuple):
    """A model that transformers carries, where its block is in the file, and whose names it has there."""

    model: str
    fields: dict[str, Any]
    prefix: str = "model.layers.0.mlp"
    names: str = "deepseek"

    def build(self) -> Any:
        """The model, with random parameters and biases."""
        torch.manual_seed(0)
        kind, fields = "ForCausalLM", SMALL | self.fields
        if self.model == "Qwen3VLMoe":
            kind, fields = "ForConditionalGeneration", {"text_config": fields, "vision_config": VISION}
        model = getattr(transformers, f"{self.model}{kind}")(getattr(transformers, f"{self.model}Config")(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
            if (bias := bias_of(model)) is not None:  # about as large as the scores differ
                bias.normal_(std=0.1 if RoutingConfig.from_hf(model.config).scoring_func == "sigmoid" else 0.02)
        return model.eval()


SPARSE_MOE = "model.layers.0.block_sparse_moe"
FAMILIES = {
    "deepseek-v2": Family("DeepseekV2", ROUTED),
    "dots.llm1": Family("Dots1", ROUTED | {"n_group": 1, "topk_group": 1}),
    "glm-5": Family("GlmMoeDsa", ROUTED | SPARSE),
    "olmoe": Family("Olmoe", PLAIN),
    "qwen3-moe": Family("Qwen3Moe", PLAIN),
    "ernie-4.5": Family("Ernie4_5_Moe", ERNIE, names="ernie"),
    "minimax-m2": Family("MiniMaxM2", LOCAL, SPARSE_MOE, "minimax"),
    "mixtral": Family("Mixtral", LOCAL, SPARSE_MOE, "mixtral"),
    "kimi-linear": Family(
        "KimiLinear",
        LOCAL | SPARSE | {"n_shared_experts": 2, "layer_types": ["full_attention"]},
        SPARSE_MOE,
        "kimi-linear",
    ),
    "qwen3-vl": Family("Qwen3VLMoe", PLAIN, "model.language_model.layers.0.mlp", "qwen3-vl"),
}


def block_of(model: Any) -> Any:
    """The MoE block, whatever the model calls it."""
    (block,) = (m for m in model.modules() if hasattr(m, "experts") and isinstance(m.experts, torch.nn.Module))
    return block


def bias_of(model: Any) -> torch.Tensor | None:
    return next((t for name, t in block_of(model).state_dict().items() if name.endswith("correction_bias")), None)


def saved(model: Any, path: Path) -> dict[str, np.ndarray]:
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def inputs(model: Any, config: RoutingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose choice no rounding changes, and what transformers' block gives for them."""
    block, bias = block_of(model), bias_of(model)
    gate = getattr(block, "gate", None)
    with torch.no_grad():
        x = torch.randn(6 * TOKENS, HIDDEN)
        x = x[decided(x @ gate.weight.T, None if bias is None else bias.reshape(-1), config)][:TOKENS]
        assert len(x) == TOKENS
        y = block(x[None])
        return x, (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_block_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    """As a user has it: the file is read by name, the layer runs, and what is exported is the file again."""
    family = FAMILIES[name]
    model = family.build()
    config, has_bias = RoutingConfig.from_hf(model.config), bias_of(model) is not None
    tensors = saved(model, tmp_path)
    x, expected = inputs(model, config)
    rows = jnp.asarray(x.numpy())
    params = jaxmoe.load_hf_moe(tensors, family.prefix, config, has_bias=has_bias)
    run = jax.jit(lambda params: jaxmoe.moe(rows, params, config)[0])
    y = run(params)
    assert_layer(y, expected)
    gate, up = jnp.split(params.gate_up, 2, axis=2)
    for wrong in (
        run(dataclasses.replace(params, gate_up=jnp.concatenate([up, gate], axis=2))),
        run(dataclasses.replace(params, gate_up=params.gate_up[::-1], down=params.down[::-1])),
        *([run(dataclasses.replace(params, bias=-params.bias))] if params.bias is not None else []),
    ):
        with pytest.raises(AssertionError):
            assert_layer(wrong, expected)

    exported = jaxmoe.export_hf_moe(params, family.prefix, config, names=family.names)
    block = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{family.prefix}.")}
    assert exported.keys() == block.keys()
    if not NAMINGS[family.names].stacked:  # which transformers writes the other way round than it is published
        assert all(exported[key].shape == tensor.shape for key, tensor in block.items())
        assert all(exported[key].tobytes() == tensor.tobytes() for key, tensor in block.items())
    back = jaxmoe.load_hf_moe(exported, family.prefix, config, has_bias=has_bias)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)

    # And transformers reads what was exported as what it was.
    save_file(tensors | exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    for key, tensor in block_of(model).state_dict().items():
        torch.testing.assert_close(block_of(again).state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Qwen2Moe", "Qwen3Next"])
def test_shared_expert_with_a_gate_of_its_own(name: str, tmp_path: Path) -> None:
    """Refused by name; without it the rest is loaded, and the sum is the model's, as the message says."""
    model = Family(name, GATED).build()
    config, prefix = RoutingConfig.from_hf(model.config), "model.layers.0.mlp"
    tensors = saved(model, tmp_path)
    with pytest.raises(
        ValueError, match=rf"^{prefix}.shared_expert_gate.weight: expected shared experts that are simply"
    ):
        jaxmoe.load_hf_moe(tensors, prefix, config, has_bias=False)
    x, expected = inputs(model, config)
    rest = {key: tensor for key, tensor in tensors.items() if ".shared_expert" not in key}
    params = jaxmoe.load_hf_moe(rest, prefix, config, has_bias=False)
    gate, up, down, own = (
        jnp.asarray(tensors[f"{prefix}.{part}.weight"].T)
        for part in (*(f"shared_expert.{p}_proj" for p in ("gate", "up", "down")), "shared_expert_gate")
    )
    rows = jnp.asarray(x.numpy())
    shared = jaxmoe.SharedMLP(gate_up=jnp.concatenate([gate, up], axis=1), down=down)
    y = jaxmoe.moe(rows, params, config)[0]
    assert_layer(y + jax.nn.sigmoid(rows @ own) * shared(rows), expected)
    with pytest.raises(AssertionError):
        assert_layer(y + shared(rows), expected)


HASHED, SCORED = ({"mlp_layer_types": [kind]} for kind in ("hash_moe", "moe"))
REFUSED = {
    "gpt-oss": (Family("GptOss", LOCAL), "experts.gate_up_proj_bias: expected experts without biases and clamps, got"),
    "nemotron": (
        Family("NemotronH", ROUTED | {"layers_block_type": ["moe"]}, "backbone.layers.0.mixer"),
        "experts.0.gate_proj.weight: expected a tensor, got none; experts without a gate fit no layer here",
    ),
    "deepseek-v4": (
        Family("DeepseekV4", LOCAL | SCORED, "model.layers.0.ffn"),
        "gate.bias: expected the bias under another name, got it as DeepSeek-V4 has it, whose experts clamp",
    ),
    "deepseek-v4-by-token": (
        Family("DeepseekV4", LOCAL | HASHED, "model.layers.0.ffn"),
        "gate.tid2eid: expected no tensor of this name, got one as DeepSeek-V4 has it, whose experts clamp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_layer_is_refused(name: str, tmp_path: Path) -> None:
    family, message = REFUSED[name]
    tensors = saved(family.build(), tmp_path)
    with pytest.raises(ValueError, match=rf"^{family.prefix}.{message}"):
        jaxmoe.load_hf_moe(tensors, family.prefix, RoutingConfig(num_experts=8, top_k=3))
