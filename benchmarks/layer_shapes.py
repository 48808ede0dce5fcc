"""The layer that is measured: DeepSeek-V3's width and experts, as many as lie on one of eight devices."""

from __future__ import annotations

from jaxmoe import RoutingConfig

WIDTH, INNER, EXPERTS, TOP_K = 7168, 2048, 32, 8
CONFIG = RoutingConfig(num_experts=EXPERTS, top_k=TOP_K, routed_scaling_factor=2.5)
