"""The routing of known models, by name and from Hugging Face configs."""

from __future__ import annotations

from typing import Any

from jaxmoe.config import RoutingConfig

presets: dict[str, RoutingConfig] = {
    "deepseek-v3": RoutingConfig(num_experts=256, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5, n_shared_experts=1),
}


def from_hf(hf_config: Any) -> RoutingConfig:
    raise NotImplementedError
