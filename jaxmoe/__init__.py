"""jaxmoe: Mixture-of-Experts routing, dispatch and combine as Pallas GPU kernels, for JAX. See the README."""

import jaxmoe.serialized as _serialized  # noqa: F401
from jaxmoe.arguments import Columns
from jaxmoe.checkpoint import export_hf_moe, load_hf_moe
from jaxmoe.config import RoutingConfig
from jaxmoe.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from jaxmoe.experts import experts
from jaxmoe.grouped_matmul import grouped_matmul
from jaxmoe.layer import MoEParams, fused_experts, moe
from jaxmoe.losses import sequence_balance_loss, switch_loss
from jaxmoe.presets import presets
from jaxmoe.routing import Routing, route, router_logits, update_bias
from jaxmoe.shared import SharedMLP

__version__ = "0.1.0"

__all__ = [
    "Columns",
    "DispatchPlan",
    "MoEParams",
    "Routing",
    "RoutingConfig",
    "SharedMLP",
    "combine",
    "dispatch",
    "experts",
    "export_hf_moe",
    "fused_experts",
    "grouped_matmul",
    "load_hf_moe",
    "moe",
    "plan_dispatch",
    "presets",
    "route",
    "router_logits",
    "sequence_balance_loss",
    "switch_loss",
    "update_bias",
]
