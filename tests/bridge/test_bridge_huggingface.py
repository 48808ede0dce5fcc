"""bridge.huggingface: whole models of every family, small and random, against themselves before they are patched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import pytest
import torch
from torch import nn

import bridge

transformers = pytest.importorskip("transformers", minversion="5.13")
from bridge.huggingface import patch  # noqa: E402

VOCABULARY = 64
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
BASE |= {"vocab_size": VOCABULARY, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
BASE |= NO_TOKENS
ROUTED = {"n_routed_experts": 8}
# One routing for all that can have it: JAX compiles a routing once.
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
GATED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
GATED_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"layers_block_type": ["moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
V4 = {"num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 16, "q_lora_rank": 16}
V4 |= INDEXER | {"mlp_layer_types": ["hash_moe", "moe"]}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
ONE_LAYER = {"num_hidden_layers": 1}
DENSE_FIRST = {"first_k_dense_replace": 1}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}


def make_config(name: str, **fields: Any) -> Any:
    return getattr(transformers, name)(**{**BASE, **fields})


def multimodal(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return getattr(transformers, name)(text_config={**BASE, **text}, vision_config=vision, **NO_TOKENS)


# Every model type of RoutingConfig.from_hf: the model's class, and what makes its config.
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        lambda: make_config(
            "DeepseekV2Config",
            **ROUTED | GROUPS | MLA | DENSE_FIRST,
            topk_method="group_limited_greedy",
            n_shared_experts=2,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        lambda: make_config("DeepseekV3Config", **ROUTED | GROUPS | MLA | DENSE_FIRST),
    ),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        lambda: make_config("DeepseekV32Config", **ROUTED | GROUPS | MLA | INDEXER | SPARSE),
    ),
    "deepseek_v4": ("DeepseekV4ForCausalLM", lambda: make_config("DeepseekV4Config", **ROUTED | V4, swiglu_limit=0.5)),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        lambda: multimodal(
            "Kimi_K25Config",
            {"model_type": "kimi_k2"} | ROUTED | GROUPS | MLA | DENSE_FIRST,
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        ),
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        lambda: make_config(
            "KimiLinearConfig",
            **GROUPS | MLA | HYBRID | SPARSE,
            num_local_experts=8,
            n_shared_experts=2,
            linear_head_dim=8,
            linear_num_heads=2,
        ),
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", lambda: make_config("Glm4MoeConfig", **ROUTED | GROUPS | DENSE_FIRST)),
    "glm4_moe_lite": (
        "Glm4MoeLiteForCausalLM",
        lambda: make_config("Glm4MoeLiteConfig", **ROUTED | GROUPS | MLA | SPARSE),
    ),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        lambda: multimodal("Glm4vMoeConfig", ROUTED | GROUPS | DENSE_FIRST | ROPE_3D, VISION),
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        lambda: make_config("GlmMoeDsaConfig", **ROUTED | GROUPS | MLA | INDEXER | SPARSE),
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", lambda: make_config("MiniMaxM2Config", **ONE_LAYER, num_local_experts=8)),
    "dots1": (
        "Dots1ForCausalLM",
        lambda: make_config("Dots1Config", **ROUTED | GROUPS | DENSE_FIRST, n_shared_experts=2),
    ),
    "olmoe": ("OlmoeForCausalLM", lambda: make_config("OlmoeConfig", num_experts=8)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        lambda: make_config("Qwen2MoeConfig", num_experts=8, shared_expert_intermediate_size=16),
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda: make_config("Qwen3MoeConfig", num_experts=8)),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        lambda: multimodal("Qwen3VLMoeConfig", {"num_experts": 8}, VISION | {"deepstack_visual_indexes": [0]}),
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        lambda: make_config(
            "Qwen3NextConfig", **HYBRID | GATED_DELTA, num_experts=8, shared_expert_intermediate_size=16
        ),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        lambda: make_config(
            "Qwen3_5MoeTextConfig", **HYBRID | GATED_DELTA, num_experts=8, shared_expert_intermediate_size=16
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda: make_config("GptOssConfig", **ONE_LAYER, num_local_experts=8, swiglu_limit=0.5),
    ),
    "mixtral": ("MixtralForCausalLM", lambda: make_config("MixtralConfig", **ONE_LAYER, num_local_experts=8)),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        lambda: make_config("Ernie4_5_MoeConfig", moe_num_experts=8, moe_num_shared_experts=2, moe_layer_start_index=0),
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        lambda: make_config("NemotronHConfig", **ROUTED | GROUPS | MAMBA, moe_shared_expert_intermediate_size=32),
    ),
    "nemotron_h_latent": (
        "NemotronHForCausalLM",
        lambda: make_config("NemotronHConfig", **ROUTED | GROUPS | MAMBA, moe_latent_size=32),
    ),
}


def model_class(family: str) -> Any:
    """None where this version of transformers does not carry the family."""
    found = [getattr(module, FAMILIES[family][0], None) for module in (transformers, transformers.models)]
    return next((cls for cls in found if cls is not None), None)


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A small random model in which routing and every expert matters."""
    _, config = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(family)(config()).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("correction_bias"):
                tensor.normal_(std=0.05)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.rand(len(tensor), 8).argsort(dim=1)[:, : tensor.shape[1]])
            elif tensor.is_floating_point() and tensor.ndim > 1 and "inv_freq" not in name:
                tensor.normal_(std=0.2)
    return model.to(dtype)


def prompt() -> torch.Tensor:
    """As many tokens wherever a number of tokens does not matter: JAX compiles for each."""
    return torch.randint(1, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=prompt().to(model.device)).logits


def tokens_of(model: Any) -> torch.Tensor:
    tokens = prompt().view(1, -1).to(model.device)
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a model is: its values by name, its objects, its forwards and its config."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "experts": model.config._experts_implementation,
    }


def assert_same_model(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values, expected = after.pop("values"), before["values"]
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert after == {key: value for key, value in before.items() if key != "values"}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(getattr(module, "experts", None), "is_concatenated")]


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, an element behind where JAX takes them on a CPU."""
    found = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert found.data_ptr() % 64
    return found


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Products as small as these only wait for further threads, and take longer to compile well than to run."""
    threads, optimise_little = torch.get_num_threads(), jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    torch.set_num_threads(threads)
    jax.config.update("jax_disable_most_optimizations", optimise_little)


def carried(families: Iterable[str]) -> list[Any]:
    """Parameters of a test."""
    reason = f"transformers {transformers.__version__} does not carry it"
    return [
        pytest.param(family, marks=pytest.mark.skipif(model_class(family) is None, reason=reason))
        for family in families
    ]


@dataclass(frozen=True)
class Plain:
    """A model as transformers has it, and what it computes."""

    family: str
    model: Any
    before: dict[str, Any]
    logits: torch.Tensor
    tokens: torch.Tensor


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Plain:
    model = make(request.param)
    return Plain(request.param, model, snapshot(model), logits_of(model), tokens_of(model))


@pytest.mark.parametrize("plain", carried(FAMILIES), indirect=True)
def test_same_logits_and_tokens(plain: Plain) -> None:
    """The promise: the same model, and after `restore` the very same one."""
    model = plain.model
    with patch(model):
        torch.testing.assert_close(logits_of(model), plain.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens_of(model), plain.tokens)
        assert model.state_dict().keys() == plain.before["values"].keys()
        for layer in layers_of(model):  # the tolerance sees one wrong expert
            layer.experts.down_proj.data = layer.experts.down_proj.data.roll(1, 0)
        assert (logits_of(model) - plain.logits).abs().max() > 0.02
        model.load_state_dict(plain.before["values"])
    assert_same_model(model, plain.before)
    assert torch.equal(logits_of(model), plain.logits)


# How many experts the shared ones of a family's test model are.
SHARED = {"deepseek_v2": 2, "deepseek_v3": 1, "deepseek_v32": 1, "deepseek_v4": 1, "kimi_k25": 1, "kimi_linear": 2}
SHARED |= {
    "glm4_moe": 1,
    "glm4_moe_lite": 1,
    "glm4v_moe": 1,
    "glm_moe_dsa": 1,
    "ernie4_5_moe": 2,
    "nemotron_h": 2,
    "dots1": 2,
}
FEW = ["deepseek_v3", "ernie4_5_moe", "nemotron_h"]  # one shared expert, two, two without a gate


@pytest.mark.parametrize("plain", carried(SHARED), indirect=True)
def test_same_with_shared_experts_fused(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared experts in the same top-k give the same model, and the same objects afterwards."""
    model, size = plain.model, sum(p.numel() for p in plain.model.parameters())
    configs: list[bridge.RoutingConfig] = []
    route = bridge.route
    monkeypatch.setattr(
        bridge, "route", lambda *given, config, **more: configs.append(config) or route(*given, config=config, **more)
    )
    with patch(model, fuse_shared_experts=True):
        torch.testing.assert_close(logits_of(model), plain.logits, rtol=1e-4, atol=1e-4)
        assert plain.family not in FEW or torch.equal(tokens_of(model), plain.tokens)
        assert {config.n_shared_experts for config in configs} == {SHARED[plain.family]}
        assert_equal(model.state_dict(), plain.before["values"])
        for layer in layers_of(model):  # the last expert is a shared one
            layer.experts.down_proj.data[-1] = 0
        assert (logits_of(model) - plain.logits).abs().max() > 0.02
        model.load_state_dict(plain.before["values"])
        assert sum(p.numel() for p in model.parameters()) == size
    assert_same_model(model, plain.before)
    assert torch.equal(logits_of(model), plain.logits)


@pytest.mark.parametrize("family", carried(FAMILIES))
def test_bfloat16(family: str) -> None:
    """No further from the exact logits than transformers, whose routers round; one wrong expert is far."""
    model = make(family, torch.bfloat16)
    exact = logits_of(copy.deepcopy(model).float())
    error = lambda: (logits_of(model).float() - exact).abs().median()
    expected = error()
    with patch(model):
        assert error() < 1.15 * expected
        for layer in layers_of(model):
            layer.experts.down_proj.data = layer.experts.down_proj.data.roll(1, 0)
        assert error() > 1.5 * expected


@pytest.mark.parametrize("plain", carried(FAMILIES), indirect=True)
def test_recorded_router_logits(plain: Plain) -> None:
    """What transformers' hooks record at the routers, for the balancing loss, is what they recorded before."""
    model, tokens = plain.model, prompt()
    record = lambda: model.base_model(input_ids=tokens, output_router_logits=True)
    with torch.no_grad():
        expected = getattr(record(), "router_logits", None)
        with patch(model):
            found = getattr(record(), "router_logits", None)
    if expected is None:
        assert found is None
        pytest.skip(f"transformers {transformers.__version__} records none in this family")
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
