"""jaxmoe: Mixture-of-Experts routing, dispatch and combine as Pallas GPU kernels, for JAX. See the README."""

from jaxmoe.arguments import Columns
from jaxmoe.config import RoutingConfig
from jaxmoe.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from jaxmoe.experts import experts
from jaxmoe.grouped_matmul import grouped_matmul
from jaxmoe.layer import MoEParams, moe
from jaxmoe.presets import presets
from jaxmoe.routing import Routing, route, router_logits, update_bias

__version__ = "0.1.0"

__all__ = [
    "Columns",
    "DispatchPlan",
    "MoEParams",
    "Routing",
    "RoutingConfig",
    "combine",
    "dispatch",
    "experts",
    "grouped_matmul",
    "moe",
    "plan_dispatch",
    "presets",
    "route",
    "router_logits",
    "update_bias",
]
