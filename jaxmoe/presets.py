"""The routing of known models, by name and from Hugging Face configs.

A preset says how a model's routed experts are chosen and weighted. Which of them also take a bias: all but DeepSeek-V2,
Qwen3, gpt-oss and Mixtral.

Three things that a `RoutingConfig` does not say:

* The shared expert of Qwen3-Next (and Qwen3.5) is multiplied by a sigmoid gate of its own. A fused shared slot has the
  weight 1, so it would be wrong: these presets have no shared slot, and the model adds its shared expert itself.
* The first layers of DeepSeek-V4 choose experts by token id, from a table; a preset describes its other layers.
* gpt-oss adds a bias to the logits, not to the choice: pass `router_logits(x, weight) + bias` as logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxmoe.config import RoutingConfig

_sigmoid = RoutingConfig
_softmax = functools.partial(RoutingConfig, scoring_func="softmax")

_deepseek_v3 = _sigmoid(
    num_experts=256, top_k=8, n_group=8, topk_group=4, group_score="top2", routed_scaling_factor=2.5, n_shared_experts=1
)
_kimi_k2 = _sigmoid(num_experts=384, top_k=8, routed_scaling_factor=2.827, n_shared_experts=1)

presets: dict[str, RoutingConfig] = {
    "deepseek-v2": _softmax(
        num_experts=160,
        top_k=6,
        n_group=8,
        topk_group=3,
        group_score="max",
        renormalize=False,
        routed_scaling_factor=16.0,
        n_shared_experts=2,
    ),
    "deepseek-v2-lite": _softmax(num_experts=64, top_k=6, renormalize=False, n_shared_experts=2),
    "deepseek-v3": _deepseek_v3,
    "deepseek-r1": _deepseek_v3,
    "deepseek-v3.2": _deepseek_v3,
    "deepseek-v4-flash": RoutingConfig(
        num_experts=256, top_k=6, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5, n_shared_experts=1
    ),
    "kimi-k2": _kimi_k2,
    "kimi-k2.5": _kimi_k2,
    "kimi-k3": _sigmoid(num_experts=896, top_k=16, n_shared_experts=2),
    "glm-4.5": _sigmoid(num_experts=160, top_k=8, routed_scaling_factor=2.5, n_shared_experts=1),
    "glm-4.5-air": _sigmoid(num_experts=128, top_k=8, n_shared_experts=1),
    "glm-5": _sigmoid(num_experts=256, top_k=8, routed_scaling_factor=2.5, n_shared_experts=1),
    "minimax-m2": _sigmoid(num_experts=256, top_k=8),
    "qwen3-moe": _softmax(num_experts=128, top_k=8),
    "qwen3-next": _softmax(num_experts=512, top_k=10),
    "gpt-oss-120b": _softmax(num_experts=128, top_k=4),
    "mixtral-8x7b": _softmax(num_experts=8, top_k=2),
    "ernie-4.5-21b": _softmax(num_experts=64, top_k=6, n_shared_experts=2),
    "nemotron-3-nano": _sigmoid(num_experts=128, top_k=6, routed_scaling_factor=2.5, n_shared_experts=1),
    "nemotron-3-super": _sigmoid(num_experts=512, top_k=22, routed_scaling_factor=5.0, n_shared_experts=1),
}

# What Hugging Face configs call the fields of a RoutingConfig.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_k"),
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "topk_method": ("topk_method",),
    "scoring_func": ("scoring_func", "moe_router_activation_func"),
    "renormalize": ("norm_topk_prob", "moe_renormalize"),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
}
_REQUIRED = ("num_experts", "top_k")

# DeepSeek's names for how groups are scored; "greedy" has no groups, whatever n_group says.
_GROUP_SCORES = {"noaux_tc": "top2", "group_limited_greedy": "max", "greedy": None}

# Fields that list the kinds of a model's layers, and the kinds that choose experts by score.
_LAYER_KINDS = {
    "mlp_layer_types": ("sparse", "moe"),
    "layers_block_type": ("moe",),
    "hybrid_override_pattern": ("E",),
}


class _Router(NamedTuple):
    """How the router of a model type reads its config; all values as transformers 5.23 has them."""

    choices: dict[str, tuple[Any, ...]]  # what it can do, first what it does where the config is silent
    defaults: dict[str, Any]  # fields that may have any value, with the one where the config is silent


def _grouped(**defaults: Any) -> _Router:
    """DeepSeek-V3's router."""
    return _Router(
        {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        {"n_group": 1, "topk_group": 1, "renormalize": True, "routed_scaling_factor": 1.0, "n_shared_experts": 1}
        | defaults,
    )


def _ungrouped(*scoring_funcs: str, **defaults: Any) -> _Router:
    """A router without groups that renormalises, does not scale, and has no shared expert, but for `defaults`."""
    choices = {
        "scoring_func": scoring_funcs,
        "n_group": (1,),
        "topk_group": (1,),
        "topk_method": ("noaux_tc", "greedy"),
        "renormalize": (True,),
        "routed_scaling_factor": (1.0,),
        "n_shared_experts": (0,),
    }
    return _Router({field: values for field, values in choices.items() if field not in defaults}, defaults)


_DEEPSEEK_V3 = _grouped(n_group=8, topk_group=4, routed_scaling_factor=2.5)

_ROUTERS: dict[str, _Router] = {
    # transformers ignores norm_topk_prob here, DeepSeek's own code drops the scaling with it: no model sets it.
    "deepseek_v2": _Router(
        {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"), "renormalize": (False,)},
        {"n_group": None, "topk_group": None, "routed_scaling_factor": 1.0, "n_shared_experts": 2},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "deepseek_v4": _ungrouped("sqrtsoftplus", "sigmoid", "softmax", routed_scaling_factor=1.5, n_shared_experts=1),
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": _grouped(routed_scaling_factor=2.446),
    "dots1": _grouped(renormalize=False, n_shared_experts=None),
    "glm4_moe": _grouped(),
    "glm4_moe_lite": _grouped(routed_scaling_factor=1.8),
    "glm4v_moe_text": _grouped(),
    "glm_moe_dsa": _grouped(routed_scaling_factor=2.5),
    "minimax_m2": _ungrouped("sigmoid"),
    "olmoe": _ungrouped("softmax", renormalize=False),
    "qwen2_moe": _ungrouped("softmax", renormalize=False),
    "qwen3_moe": _ungrouped("softmax", renormalize=False),
    "qwen3_vl_moe_text": _ungrouped("softmax"),
    "qwen3_next": _ungrouped("softmax", renormalize=True),
    "qwen3_5_moe_text": _ungrouped("softmax"),
    "gpt_oss": _ungrouped("softmax"),
    "mixtral": _ungrouped("softmax"),
    "ernie4_5_moe": _ungrouped("softmax", n_shared_experts=2),
    "nemotron_h": _grouped(),
}

_ABSENT = object()


def from_hf(hf_config: Any) -> RoutingConfig:
    """The routing of a Hugging Face model.

    Args:
      hf_config: a transformers config object, anything else with its attributes, or the dict of a config.json. The
        routing of a multimodal model is in its `text_config`. Fields that are absent have transformers' defaults, but
        the number of experts and how many a token goes to must be there.

    Returns:
      RoutingConfig. `n_shared_experts` counts experts that are simply added (see this module's docstring);
      `group_score` is set where there are groups.

    Raises:
      ValueError: names `hf_config`, what was expected and what came: for a model type that is not known, a config
        without experts, two names of one field that disagree, and a value that the model's router does not follow.

    Source: the routers and config classes of Hugging Face transformers 5.23.

    Example:
      >>> from jaxmoe.presets import from_hf
      >>> from_hf({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}).scoring_func
      'softmax'
    """
    get = hf_config.get if isinstance(hf_config, Mapping) else functools.partial(getattr, hf_config)
    if (text_config := get("text_config", None)) is not None:
        return from_hf(text_config)
    model_type = get("model_type", None)
    if not isinstance(model_type, str) or model_type not in _ROUTERS:
        got = f"{type(hf_config).__name__} with {model_type!r}"
        raise ValueError(f"hf_config: expected one with a model_type of {sorted(_ROUTERS)}, got {got}")
    for name, kinds in _LAYER_KINDS.items():
        layers = get(name, None)
        if layers is not None and not (isinstance(layers, Iterable) and any(layer in kinds for layer in layers)):
            raise ValueError(f"hf_config.{name}: expected a layer that routes to experts ({kinds}), got {layers!r}")
    fields = {field: _read(get, field, model_type) for field in _NAMES}
    group_score = _GROUP_SCORES[fields.pop("topk_method")]
    if group_score is None:
        fields |= {"n_group": 1, "topk_group": 1}
    if fields["n_group"] != 1:
        fields["group_score"] = group_score
    try:
        return RoutingConfig(**fields)
    except ValueError as error:
        raise ValueError(f"hf_config: {error}") from error


def _read(get: Any, field: str, model_type: str) -> Any:
    """One field of a config, under whichever of its names it is there."""
    names, router = _NAMES[field], _ROUTERS[model_type]
    found = {name: value for name in names if (value := get(name, _ABSENT)) is not _ABSENT}
    name, value = next(iter(found.items()), (names[0], _ABSENT))
    if any(other != value for other in found.values()):
        raise ValueError(f"hf_config: expected one value of {' and '.join(found)}, got {found}")
    if field in _REQUIRED:
        if value is _ABSENT or not value:
            got = "none of them" if value is _ABSENT else f"{name}={value!r}"
            raise ValueError(f"hf_config: expected a config with experts ({' or '.join(names)}), got {got}")
        return value
    if field in router.choices:
        choices = router.choices[field]
        if value is not _ABSENT and value not in choices:
            expected = " or ".join(map(repr, choices))
            raise ValueError(f"hf_config.{name}: expected {expected} for {model_type!r}, got {value!r}")
        return choices[0] if value is _ABSENT else value
    return router.defaults[field] if value is _ABSENT else value
