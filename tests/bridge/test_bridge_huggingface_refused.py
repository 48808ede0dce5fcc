"""Models that bridge.huggingface.patch refuses, and a transformers that is too old for it."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from torch import nn

import bridge

transformers = pytest.importorskip("transformers", minversion="5.13")
from bridge.huggingface import patch  # noqa: E402
from bridge.huggingface.modules import is_patched  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    layers_of,
    make,
    make_config,
    small,
)

__all__ = ["small"]  # a fixture


class Router(transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter):
    """A router that somebody changed."""


def with_own_router() -> Any:
    model = make("mixtral")
    layers_of(model)[0].gate.__class__ = Router
    return model


def with_gate(family: str, attribute: str, value: Any) -> Any:
    model = make(family)
    setattr(layers_of(model)[-1].gate, attribute, value)
    return model


def with_double_bias() -> Any:
    model = make("minimax_m2")
    layers_of(model)[0].e_score_correction_bias = layers_of(model)[0].e_score_correction_bias.double()
    return model


def granite() -> Any:
    return transformers.GraniteMoeForCausalLM(make_config("GraniteMoeConfig", num_local_experts=4))


def dense() -> Any:
    return transformers.LlamaForCausalLM(make_config("LlamaConfig"))


def without_experts() -> Any:
    return transformers.Qwen3MoeForCausalLM(make_config("Qwen3MoeConfig", num_experts=4, mlp_only_layers=[0, 1]))


REFUSED = {
    "model_type of .*'deepseek_v3'.*, got GraniteMoeConfig with 'granitemoe'": granite,
    "model_type of .*'deepseek_v3'.*, got LlamaConfig with 'llama'": dense,
    "with MoE layers, got Qwen3MoeForCausalLM without any": without_experts,
    "with MoE layers, got Linear without any": lambda: nn.Linear(2, 2),
    "modules of transformers.models, got .*Router in 'model.layers.0.mlp'; patch .*_implementation": with_own_router,
    "parameters of .*, got torch.float64 in 'model.layers.0.mlp.gate.weight'": lambda: make("mixtral", torch.float64),
    "parameters of .*, got torch.float64 in 'model.layers.0.mlp.e_score_correction_bias'": with_double_bias,
    # What a router holds that jaxmoe cannot do.
    "an int from 1 to 32, got 0 in 'model.layers.0.mlp'": lambda: with_gate("mixtral", "top_k", 0),
    "'SqrtSoftplus.*, got 'Tanh' in 'model.layers.1.mlp'": lambda: with_gate("deepseek_v4", "score_fn", nn.Tanh()),
    "'greedy', .*, got 'any' in 'model.layers.1.mlp'": lambda: with_gate("deepseek_v2", "topk_method", "any"),
    "at most 1e-06, got 0.1 in 'model.layers.1.mlp'": lambda: with_gate("ernie4_5_moe", "norm_min", 0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """A model that would be computed wrongly, or not at all, is refused whole."""
    model = REFUSED[message]()
    with pytest.raises(ValueError, match=f"^model: .*expected .*{message}"):
        patch(model)
    assert not any(is_patched(module) for module in model.modules())


def test_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By version, before a model is touched."""
    monkeypatch.setattr("transformers.__version__", "5.12.1")
    with pytest.raises(ImportError, match=r"^transformers: expected version 5\.13\.0 or newer, got 5\.12\.1$"):
        runpy.run_path(str(bridge.huggingface.__file__))
