"""Presets against the specification's table, and from_hf against published config.json files and wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxmoe
from jaxmoe import RoutingConfig
from jaxmoe.presets import from_hf

# Section 6 of the specification: E, k, n_group, topk_group, group score, scoring, renormalised, scale, shared.
TABLE = {
    "deepseek-r1": (256, 8, 8, 4, "top2", "sigmoid", True, 2.5, 1),
    "deepseek-v2": (160, 6, 8, 3, "max", "softmax", False, 16, 2),
    "deepseek-v2-lite": (64, 6, 1, 1, None, "softmax", False, 1, 2),
    "deepseek-v3": (256, 8, 8, 4, "top2", "sigmoid", True, 2.5, 1),
    "deepseek-v3.2": (256, 8, 8, 4, "top2", "sigmoid", True, 2.5, 1),
    "deepseek-v4-flash": (256, 6, 1, 1, None, "sqrtsoftplus", True, 1.5, 1),
    "ernie-4.5-21b": (64, 6, 1, 1, None, "softmax", True, 1, 2),
    "glm-4.5": (160, 8, 1, 1, None, "sigmoid", True, 2.5, 1),
    "glm-4.5-air": (128, 8, 1, 1, None, "sigmoid", True, 1, 1),
    "glm-5": (256, 8, 1, 1, None, "sigmoid", True, 2.5, 1),
    "gpt-oss-120b": (128, 4, 1, 1, None, "softmax", True, 1, 0),
    "kimi-k2": (384, 8, 1, 1, None, "sigmoid", True, 2.827, 1),
    "kimi-k2.5": (384, 8, 1, 1, None, "sigmoid", True, 2.827, 1),
    "kimi-k3": (896, 16, 1, 1, None, "sigmoid", True, 1, 2),
    "minimax-m2": (256, 8, 1, 1, None, "sigmoid", True, 1, 0),
    "mixtral-8x7b": (8, 2, 1, 1, None, "softmax", True, 1, 0),
    "nemotron-3-nano": (128, 6, 1, 1, None, "sigmoid", True, 2.5, 1),
    "nemotron-3-super": (512, 22, 1, 1, None, "sigmoid", True, 5, 1),
    "qwen3-moe": (128, 8, 1, 1, None, "softmax", True, 1, 0),
    # The table says 1 shared expert, but the model weights it by a sigmoid gate: it cannot be a slot of weight 1.
    "qwen3-next": (512, 10, 1, 1, None, "softmax", True, 1, 0),
}
FIELDS = (
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "group_score",
    "scoring_func",
    "renormalize",
    "routed_scaling_factor",
    "n_shared_experts",
)


def test_presets_are_the_models_of_the_specification():
    # A model that is missing, or one that nobody specified.
    assert sorted(jaxmoe.presets) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_preset_has_the_specified_fields(name):
    # Every field, those the table leaves out included.
    assert jaxmoe.presets[name] == RoutingConfig(**dict(zip(FIELDS, TABLE[name], strict=True)))


# The fields of published config.json files that have to do with routing, under the names they have there.
DEEPSEEK = {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_shared_experts": 1}
DEEPSEEK_V3 = DEEPSEEK | {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
KIMI_K2 = DEEPSEEK | {
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}
KIMI_K3 = {
    "model_type": "kimi_linear",
    "num_experts": 896,
    "num_experts_per_token": 16,
    "num_expert_group": 1,
    "topk_group": 1,
    "num_shared_experts": 2,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 1.0,
}
NEMOTRON = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*E",
    "n_groups": 8,  # of Mamba, not of experts
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}
DEEPSEEK_V2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_shared_experts": 2, "scoring_func": "softmax"}
PUBLISHED = [
    ("deepseek-v3", {"model_type": "deepseek_v3"} | DEEPSEEK_V3),
    ("deepseek-v3.2", {"model_type": "deepseek_v32"} | DEEPSEEK_V3),
    (
        "deepseek-v2",
        DEEPSEEK_V2
        | {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
        | {"routed_scaling_factor": 16.0, "norm_topk_prob": False},
    ),
    (
        "deepseek-v2-lite",
        DEEPSEEK_V2
        | {"n_routed_experts": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        | {"routed_scaling_factor": 1.0, "norm_topk_prob": False},
    ),
    (
        "deepseek-v4-flash",
        DEEPSEEK
        | {"model_type": "deepseek_v4", "n_routed_experts": 256, "num_experts_per_tok": 6}
        | {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    ),
    ("kimi-k2", KIMI_K2),
    ("kimi-k2.5", {"model_type": "kimi_k25", "text_config": KIMI_K2}),
    ("kimi-k3", {"model_type": "kimi_k3", "text_config": KIMI_K3}),
    (
        "glm-4.5",
        {"model_type": "glm4_moe", "n_routed_experts": 160, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1},
    ),
    ("minimax-m2", {"model_type": "minimax_m2", "num_local_experts": 256, "num_experts_per_tok": 8}),
    (
        "qwen3-moe",
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    ("gpt-oss-120b", {"model_type": "gpt_oss", "num_local_experts": 128, "num_experts_per_tok": 4}),
    ("mixtral-8x7b", {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}),
    (
        "ernie-4.5-21b",
        {"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2},
    ),
    (
        "nemotron-3-nano",
        NEMOTRON | {"n_routed_experts": 128, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5},
    ),
    (
        "nemotron-3-super",
        NEMOTRON | {"n_routed_experts": 512, "num_experts_per_tok": 22, "routed_scaling_factor": 5.0},
    ),
]


@pytest.mark.parametrize(("name", "config"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_published_config_gives_the_preset(name, config):
    # As a dict, and as an object that has attributes and nothing else.
    text = config.get("text_config")
    as_object = SimpleNamespace(**config | ({"text_config": SimpleNamespace(**text)} if text else {}))
    assert RoutingConfig.from_hf(config) == jaxmoe.presets[name]
    assert from_hf(as_object) == jaxmoe.presets[name]


V3 = {"model_type": "deepseek_v3"} | DEEPSEEK_V3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"model_type": "llama"}, r"hf_config: expected one with a model_type.*'llama'", id="dense-model"),
        pytest.param({}, "hf_config: expected one with a model_type.*None", id="no-model-type"),
        pytest.param(None, "hf_config: expected one with a model_type.*NoneType", id="none"),
        pytest.param({"model_type": ["mixtral"]}, "hf_config: expected one with a model_type", id="type-not-a-string"),
        pytest.param(
            {"model_type": "kimi_k25", "text_config": {"model_type": "llama"}}, "hf_config.*'llama'", id="nested-dense"
        ),
        pytest.param(
            {"model_type": "mixtral", "num_experts_per_tok": 2},
            "hf_config: expected a config with experts.*num_local_experts.*none of them",
            id="no-experts",
        ),
        pytest.param(V3 | {"n_routed_experts": 0}, "hf_config: .*experts.*n_routed_experts=0", id="zero-experts"),
        pytest.param(
            V3 | {"num_experts_per_tok": None}, "hf_config: .*experts.*num_experts_per_tok=None", id="no-top-k"
        ),
        pytest.param(V3 | {"num_local_experts": 64}, "hf_config: expected one value of .*256.*64", id="names-disagree"),
        pytest.param(
            V3 | {"scoring_func": "softmax"}, "hf_config.scoring_func: expected 'sigmoid' .*'softmax'", id="scoring"
        ),
        pytest.param(
            V3 | {"topk_method": "greedy"}, "hf_config.topk_method: expected 'noaux_tc' .*'greedy'", id="method"
        ),
        pytest.param(
            DEEPSEEK_V2 | {"n_routed_experts": 64, "norm_topk_prob": True},
            "hf_config.norm_topk_prob: expected False .*True",
            id="renormalise-that-the-router-ignores",
        ),
        pytest.param(
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 2.0},
            "hf_config.routed_scaling_factor: expected 1.0 .*2.0",
            id="scale-that-the-router-ignores",
        ),
        pytest.param(V3 | {"n_group": None}, "hf_config: n_group: expected an int.*None", id="null-groups"),
        pytest.param(V3 | {"n_group": 7}, "hf_config: .*n_group.*7", id="groups-that-do-not-divide"),
        pytest.param(
            V3 | {"mlp_layer_types": ["dense", "dense"]}, "hf_config.mlp_layer_types: expected", id="dense-layers"
        ),
        pytest.param(V3 | {"mlp_layer_types": 3}, "hf_config.mlp_layer_types: expected.*got 3", id="layers-no-list"),
        pytest.param(V3 | {"mlp_layer_types": "no moe"}, "hf_config.mlp_layer_types: expected", id="layers-a-string"),
        pytest.param(V3 | {"mlp_layer_types": [{}]}, "hf_config.mlp_layer_types: expected", id="layers-no-strings"),
        pytest.param(
            NEMOTRON | {"n_routed_experts": 8, "num_experts_per_tok": 2, "hybrid_override_pattern": "M-M*"},
            "hf_config.hybrid_override_pattern: expected",
            id="nemotron-without-experts",
        ),
    ],
)
def test_config_that_cannot_be_followed_is_refused(config, message):
    # Routing by a wrong reading would be silent: every doubt is an error that names hf_config.
    with pytest.raises(ValueError, match=message):
        from_hf(config)


def test_reading_a_config_does_not_import_transformers():
    # jaxmoe works where neither transformers nor torch is installed.
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "from jaxmoe.presets import from_hf\n"
        "print(from_hf({'model_type': 'mixtral', 'num_local_experts': 8, 'num_experts_per_tok': 2}).top_k)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2"


def test_presets_is_the_dict_and_the_module_stays_importable():
    # `jaxmoe.presets` is a dict although a module of that name exists.
    assert isinstance(jaxmoe.presets, dict)
    assert all(isinstance(config, RoutingConfig) for config in jaxmoe.presets.values())
    assert sys.modules["jaxmoe.presets"].presets is jaxmoe.presets
