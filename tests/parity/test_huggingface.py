"""Routing and whole layers against the modules of Hugging Face transformers, built from their config classes.

Where transformers' routers deviate from the meaning that jaxmoe promises, the tests stay where both agree:
* it divides by the sum + 1e-20 (Ernie: at least 1e-12), which changes nothing unless all chosen scores underflow;
* DeepSeek-V2 masks groups with 0, not minus infinity: the same while at least k softmax scores in reach exceed 0;
* ties, and the order of slots with `sorted=False`, are open: only tokens without near ties are used, and the slots of
  such routers are compared by id.
Hidden states and router weights are small multiples of a power of two, so every dot product is exact in float32 in any
order, and the logits must be equal bit for bit.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxmoe
from jaxmoe import RoutingConfig
from tests.parity.compare import UNBIASED, assert_falling, assert_layer, check_routing, decided

transformers = pytest.importorskip("transformers")

HIDDEN, INTERMEDIATE = 32, 16


class Model(NamedTuple):
    """A model that transformers carries: its module, config class, published routing fields, and preset."""

    module: str
    config: str
    fields: dict[str, Any]
    preset: str | None = None

    def make_config(self, **fields: Any) -> Any:
        return getattr(transformers, self.config)(
            **{"hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 4} | self.fields | fields
        )

    def make(self, endings: tuple[str, ...], *args: Any) -> Any:
        """The model's router or MoE block: of the class in its module with a name that ends so."""
        module = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        (found,) = [c for n, c in vars(module).items() if n.endswith(endings) and c.__module__ == module.__name__]
        return found(*args).eval()


ROUTER, BLOCK = ("TopkRouter", "TopKRouter"), ("MoE", "V2Moe", "SparseMoeBlock")
ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_experts_per_tok": 8}
GROUPS = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "num_experts_per_tok": 8}
DEEPSEEK_V3 = GROUPS | {"n_routed_experts": 256, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
KIMI_K2 = DEEPSEEK_V3 | ONE_GROUP | {"n_routed_experts": 384, "routed_scaling_factor": 2.827}
KIMI_K3 = ONE_GROUP | {"num_local_experts": 896, "num_experts_per_tok": 16, "n_shared_experts": 2}
KIMI_K3 |= {"routed_scaling_factor": 1.0}
V2_LITE = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "topk_method": "greedy"}
V2 = V2_LITE | {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
V2 |= {"routed_scaling_factor": 16.0}
V4 = {"n_routed_experts": 256, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5}
GLM_45 = ONE_GROUP | {"n_routed_experts": 160, "routed_scaling_factor": 2.5}
QWEN3 = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
QWEN3_NEXT = {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True}
ERNIE = {"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2}
NANO = ONE_GROUP | {"n_routed_experts": 128, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5}
SUPER = NANO | {"n_routed_experts": 512, "num_experts_per_tok": 22, "routed_scaling_factor": 5.0}
RAW = {"norm_topk_prob": False}
DOTS = {"n_routed_experts": 128, "routed_scaling_factor": 2.5, "n_shared_experts": 2}

MODELS = {
    "deepseek-v3": Model("deepseek_v3", "DeepseekV3Config", DEEPSEEK_V3, "deepseek-v3"),
    "deepseek-v3.2": Model("deepseek_v32", "DeepseekV32Config", DEEPSEEK_V3, "deepseek-v3.2"),
    "deepseek-v3-raw": Model("deepseek_v3", "DeepseekV3Config", DEEPSEEK_V3 | RAW),
    "deepseek-v2": Model("deepseek_v2", "DeepseekV2Config", V2, "deepseek-v2"),
    "deepseek-v2-lite": Model("deepseek_v2", "DeepseekV2Config", V2_LITE, "deepseek-v2-lite"),
    "deepseek-v4-flash": Model("deepseek_v4", "DeepseekV4Config", V4, "deepseek-v4-flash"),
    "kimi-k2": Model("deepseek_v3", "DeepseekV3Config", KIMI_K2, "kimi-k2"),
    "kimi-k3": Model("kimi_linear", "KimiLinearConfig", KIMI_K3, "kimi-k3"),
    "glm-4.5": Model("glm4_moe", "Glm4MoeConfig", GLM_45, "glm-4.5"),
    "glm-4.5-air": Model("glm4_moe", "Glm4MoeConfig", ONE_GROUP, "glm-4.5-air"),
    "glm-4.5v": Model("glm4v_moe", "Glm4vMoeTextConfig", ONE_GROUP, "glm-4.5-air"),
    "glm-4.7-flash": Model("glm4_moe_lite", "Glm4MoeLiteConfig", {}),
    "glm-5": Model("glm_moe_dsa", "GlmMoeDsaConfig", GLM_45 | {"n_routed_experts": 256}, "glm-5"),
    "minimax-m2": Model("minimax_m2", "MiniMaxM2Config", {}, "minimax-m2"),
    "qwen3-moe": Model("qwen3_moe", "Qwen3MoeConfig", QWEN3, "qwen3-moe"),
    "qwen3-moe-raw": Model("qwen3_moe", "Qwen3MoeConfig", QWEN3 | RAW),
    "qwen3-vl": Model("qwen3_vl_moe", "Qwen3VLMoeTextConfig", QWEN3, "qwen3-moe"),
    "qwen3-next": Model("qwen3_next", "Qwen3NextConfig", QWEN3_NEXT, "qwen3-next"),
    "qwen3.5": Model("qwen3_5_moe", "Qwen3_5MoeTextConfig", {}),
    "gpt-oss-120b": Model("gpt_oss", "GptOssConfig", {}, "gpt-oss-120b"),
    "mixtral-8x7b": Model("mixtral", "MixtralConfig", {}, "mixtral-8x7b"),
    "ernie-4.5-21b": Model("ernie4_5_moe", "Ernie4_5_MoeConfig", ERNIE, "ernie-4.5-21b"),
    "qwen2-moe": Model("qwen2_moe", "Qwen2MoeConfig", {"num_experts": 60, "num_experts_per_tok": 4}),
    "qwen2-moe-renormalised": Model("qwen2_moe", "Qwen2MoeConfig", QWEN3),
    "olmoe": Model("olmoe", "OlmoeConfig", {}),
    "dots.llm1": Model("dots1", "Dots1Config", ONE_GROUP | DOTS),
    "dots.llm1-groups": Model("dots1", "Dots1Config", GROUPS | DOTS),
    "nemotron-3-nano": Model("nemotron_h", "NemotronHConfig", NANO, "nemotron-3-nano"),
    "nemotron-3-super": Model("nemotron_h", "NemotronHConfig", SUPER, "nemotron-3-super"),
}
IN_ORDER = [name for name in MODELS if name.startswith(("qwen", "gpt-oss", "mixtral", "ernie", "olmoe"))]  # these sort
BIASED = [name for name in MODELS if not name.startswith(UNBIASED)]


def on_grid(generator: torch.Generator, shape: tuple[int, ...], largest: int, unit: float) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).float() * unit


def hidden_states(generator: torch.Generator, count: int) -> torch.Tensor:
    return on_grid(generator, (count, HIDDEN), 127, 1 / 64)  # exact in bfloat16 too


class Router(NamedTuple):
    """What jaxmoe needs of a router module: the weight, what is added to the choice, what is added to the logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_bias: torch.Tensor | None


def fill_router(gate: torch.nn.Module, owner: torch.nn.Module, generator: torch.Generator, softmax: bool) -> Router:
    """Gives a router random weights and biases; `owner` is the block that may hold the bias in its place."""
    gate.weight.copy_(on_grid(generator, tuple(gate.weight.shape), 511, 1 / 1024))
    buffers = [b for m in (gate, owner) for name, b in m.state_dict().items() if name.endswith("correction_bias")]
    bias = buffers[0] if buffers else None
    if bias is not None:  # about as large as the scores differ, of both signs
        bias.copy_(torch.randn(bias.shape, generator=generator) * (1 / bias.numel() if softmax else 0.1))
    if (logit_bias := getattr(gate, "bias", None)) is not None:
        logit_bias.copy_(on_grid(generator, tuple(logit_bias.shape), 511, 1 / 1024))
    return Router(gate.weight, None if bias is None else bias.reshape(-1), logit_bias)


def to_jax(tensor: torch.Tensor | None) -> jnp.ndarray | None:
    if tensor is None:
        return None
    bfloat16 = tensor.dtype == torch.bfloat16
    return jnp.asarray(tensor.detach().float().numpy(), jnp.bfloat16 if bfloat16 else jnp.float32)


def routed_pair(model: Model, num_tokens: int, dtype: torch.dtype = torch.float32) -> Any:
    """(config, router, x, HF's logits, weights and ids) for tokens whose choice no rounding can change."""
    generator = torch.Generator().manual_seed(0)
    hf_config = model.make_config()
    config = RoutingConfig.from_hf(hf_config)
    with torch.no_grad():
        gate = model.make(ROUTER, hf_config)
        owner = torch.nn.Module()
        if model.module == "minimax_m2":  # this router is handed its bias by the block
            owner.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        router = fill_router(gate, owner, generator, config.scoring_func == "softmax")
        given = (router.bias,) if model.module == "minimax_m2" else ()
        x = hidden_states(generator, 4 * num_tokens).to(dtype)
        x = x[decided(gate(x, *given)[0], router.bias, config)][:num_tokens]
        assert len(x) == num_tokens
        return config, router, x, *gate(x, *given)


def jaxmoe_logits(router: Router, x: torch.Tensor, implementation: str) -> jnp.ndarray:
    logits = jaxmoe.router_logits(to_jax(x), to_jax(router.weight), implementation=implementation)
    return logits if router.logit_bias is None else logits + to_jax(router.logit_bias)


# The kernels are held against the reference elsewhere; here some of them are, and in CI all.
INTERPRETED = MODELS if "JAXMOE_EVERY_TARGET" in os.environ else ("deepseek-v3", "deepseek-v2", "gpt-oss-120b")


@pytest.mark.parametrize(
    ("name", "implementation", "num_tokens"),
    [*((name, "xla", 200) for name in MODELS), *((name, "interpret", 5) for name in INTERPRETED)],
)
def test_router_agrees_with_transformers(name, implementation, num_tokens):
    # The promise of issue 2: the same ids and weights as the model's own router, at its real number of experts.
    model = MODELS[name]
    config, router, x, hf_logits, hf_weights, hf_experts = routed_pair(model, num_tokens)
    assert (router.bias is not None) == (name in BIASED)  # as the docstring of jaxmoe.presets says
    logits = jaxmoe_logits(router, x, implementation)
    np.testing.assert_array_equal(logits, hf_logits.numpy())
    weights, experts, load = jaxmoe.route(logits, to_jax(router.bias), config=config, implementation=implementation)
    assert weights.shape == experts.shape == (num_tokens, config.num_slots)
    k = config.top_k
    check_routing(weights[:, :k], experts[:, :k], hf_weights.float(), hf_experts, in_order=name in IN_ORDER)
    assert_falling(experts, hf_logits, router.bias, config)
    shared = np.arange(config.num_experts, config.num_expert_ids)
    np.testing.assert_array_equal(experts[:, k:], np.broadcast_to(shared, (num_tokens, len(shared))))
    np.testing.assert_array_equal(weights[:, k:], 1.0)
    np.testing.assert_array_equal(load, np.bincount(np.ravel(experts), minlength=config.num_expert_ids))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.preset])
def test_config_class_gives_the_preset(name):
    # A preset that differs from the model's own config would route wrongly for whoever picks it by name.
    model = MODELS[name]
    assert RoutingConfig.from_hf(model.make_config()) == jaxmoe.presets[model.preset]
    assert RoutingConfig.from_hf(model.make_config().to_dict()) == jaxmoe.presets[model.preset]


REQUIRED = {"n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_experts_per_tok"}
REQUIRED |= {"num_experts_per_token", "moe_k", "model_type"}


# (dots.llm1 has none: without its numbers of experts there is no model.)
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("dots")])
def test_absent_fields_have_the_defaults_of_the_config_class(name):
    # A config.json that leaves a field out means transformers' default for it.
    config = getattr(transformers, MODELS[name].config)(num_experts_per_tok=4)
    least = {field: value for field, value in config.to_dict().items() if field in REQUIRED}
    assert RoutingConfig.from_hf(least) == RoutingConfig.from_hf(config)


def test_config_without_a_number_of_shared_experts() -> None:
    with pytest.raises(ValueError, match="hf_config: n_shared_experts: expected an int from 0 to 32, got None"):
        RoutingConfig.from_hf(transformers.Dots1Config(n_routed_experts=8, num_experts_per_tok=4))


def test_text_config_of_a_multimodal_model():
    # Kimi-K2.5 is published as a wrapper around kimi_k2: transformers 5.17 keeps that name, 5.24 reads deepseek_v3.
    text = MODELS["kimi-k2"].fields | {"hidden_size": HIDDEN}
    config = transformers.AutoConfig.for_model("kimi_k25", text_config=text | {"model_type": "kimi_k2"})
    assert config.text_config.model_type in ("kimi_k2", "deepseek_v3")
    assert RoutingConfig.from_hf(config) == jaxmoe.presets["kimi-k2.5"]
    for model_type in ("kimi_k2", "deepseek_v3"):
        published = {"model_type": "kimi_k25", "text_config": text | {"model_type": model_type}}
        assert RoutingConfig.from_hf(published) == jaxmoe.presets["kimi-k2.5"]


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "kimi-k3", "ernie-4.5-21b"])
def test_router_agrees_on_bfloat16_hidden_states(name):
    # These routers compute logits in float32 from bfloat16 activations and float32 weights: so does router_logits.
    model = MODELS[name]
    config, router, x, hf_logits, hf_weights, hf_experts = routed_pair(model, 50, torch.bfloat16)
    logits = jaxmoe_logits(router, x, "xla")
    np.testing.assert_array_equal(logits, hf_logits.numpy())
    weights, experts, _ = jaxmoe.route(logits, to_jax(router.bias), config=config)
    k = config.top_k
    if name == "ernie-4.5-21b":  # it returns weights in the activations' dtype
        rounded = np.asarray(weights[:, :k].astype(jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(experts[:, :k], hf_experts)
        np.testing.assert_allclose(rounded, hf_weights.float(), rtol=2**-7)  # the neighbour at most
        return
    check_routing(weights[:, :k], experts[:, :k], hf_weights, hf_experts, in_order=name in IN_ORDER)


@pytest.mark.parametrize("name", BIASED)
def test_bias_of_the_parity_test_matters(name):
    # With a bias too small to change a choice, parity would prove nothing about it.
    config, _, _, hf_logits, _, hf_experts = routed_pair(MODELS[name], 50)
    unbiased = jaxmoe.route(to_jax(hf_logits), config=config).experts[:, : config.top_k]
    assert (np.sort(unbiased, axis=1) != np.sort(hf_experts.numpy(), axis=1)).any(axis=1).mean() > 0.5


# Whole layers, small: 16 experts of which 4, in 4 groups of which 2 where the model has groups.
SMALL: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "deepseek-v3.2": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "deepseek-v2": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "deepseek-v2-lite": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "deepseek-v4-flash": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "kimi-k3": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "glm-4.5": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "glm-5": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "minimax-m2": {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": INTERMEDIATE},
    "qwen3-moe": {"num_experts": 16, "num_experts_per_tok": 4},
    "qwen2-moe": {"num_experts": 16, "num_experts_per_tok": 4, "shared_expert_intermediate_size": INTERMEDIATE},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": INTERMEDIATE},
    "dots.llm1": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "qwen3-next": {"num_experts": 16, "num_experts_per_tok": 4, "shared_expert_intermediate_size": INTERMEDIATE},
    "mixtral-8x7b": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": INTERMEDIATE},
    "ernie-4.5-21b": {"moe_num_experts": 16, "moe_k": 4},
}


def split_shared(mlp: torch.nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A gated MLP of width count * I as `count` experts of width I: (gate_up [count, 2I, H], down [count, H, I])."""
    gate = mlp.gate_proj.weight.unflatten(0, (count, -1))
    up = mlp.up_proj.weight.unflatten(0, (count, -1))
    return torch.cat([gate, up], dim=1), mlp.down_proj.weight.unflatten(1, (count, -1)).transpose(0, 1)


@pytest.mark.parametrize("name", SMALL)
def test_layer_agrees_with_transformers(name):
    # Router, experts and shared experts together: weights converted once, one call, the same output.
    # gpt-oss (biases, clamps) and Nemotron (no gate) have experts that jaxmoe.experts does not compute.
    model, generator = MODELS[name], torch.Generator().manual_seed(1)
    extra = {} if "intermediate_size" in SMALL[name] else {"moe_intermediate_size": INTERMEDIATE}
    hf_config = model.make_config(**SMALL[name], **extra)
    config = RoutingConfig.from_hf(hf_config)
    layer = (len(hf_config.mlp_layer_types) - 1,) if name == "deepseek-v4-flash" else ()
    with torch.no_grad():
        block = model.make(BLOCK, hf_config, *layer)
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        router = fill_router(block.gate, block, generator, config.scoring_func == "softmax")
        x = hidden_states(generator, 80)
        x = x[decided(x @ router.weight.T, router.bias, config)][:32]
        assert len(x) == 32
        expected = block(x[None])[0]
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        if config.n_shared_experts:
            shared = split_shared(block.shared_experts, config.n_shared_experts)
            gate_up, down = torch.cat([gate_up, shared[0]]), torch.cat([down, shared[1]])
        if name in ("qwen2-moe", "qwen3-next"):  # its gated shared expert is not a slot: the model adds it
            expected = expected - torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    params = jaxmoe.MoEParams(
        router=to_jax(router.weight),
        bias=to_jax(router.bias),
        gate_up=to_jax(gate_up).transpose(0, 2, 1),
        down=to_jax(down).transpose(0, 2, 1),
    )
    y, _ = jaxmoe.moe(to_jax(x), params, config)
    assert_layer(y, expected)
    swapped = jaxmoe.MoEParams(
        router=params.router, bias=params.bias, gate_up=params.gate_up, down=jnp.roll(params.down, 1, axis=0)
    )
    for wrong in (jnp.zeros_like(y), jaxmoe.moe(to_jax(x), swapped, config)[0]):
        with pytest.raises(AssertionError):
            assert_layer(wrong, expected)
