"""jaxmoe on PyTorch tensors, on CPU and GPU, without copies: the names and meanings of jaxmoe.

Two paths, one meaning. On GPU tensors the Pallas kernels are launched natively, on torch's current stream, as torch ops
(`torch.ops.jaxmoe`): they can be captured in CUDA graphs and compiled by torch.compile, and few compilations serve
every number of tokens. `implementation=None` takes this path there, "native" insists on it.

Everywhere else, and where another implementation is asked for by name, a call goes through JAX's runtime: tensors as
views of torch's own memory (DLPack) and results as views of JAX's; what cannot be viewed is refused, never copied or
cast. On a GPU the hand-over is ordered by torch's current stream. Such a call costs about 0.9 ms of host time on a GPU
machine and cannot be captured in a CUDA graph.

Gradients flow through torch's autograd on both.

Example:
  >>> import torch, bridge
  >>> config = bridge.RoutingConfig(num_experts=4, top_k=2, scoring_func="softmax")
  >>> routing = bridge.route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), config=config)
  >>> plan = bridge.plan_dispatch(routing.experts, config.num_expert_ids)
  >>> x = torch.tensor([[3.0, 5.0]])
  >>> bridge.combine(bridge.dispatch(x, plan), plan, routing.weights)
  tensor([[3., 5.]])
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # torch is here, and misses something itself
    raise ModuleNotFoundError("bridge needs torch: pip install 'jaxmoe[torch]'", name="torch") from error

from bridge.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from bridge.experts import experts, grouped_matmul
from bridge.layer import MoEParams, fused_experts, moe
from bridge.routing import Routing, route, router_logits, update_bias
from bridge.views import to_jax, to_torch
from jaxmoe import RoutingConfig, presets

__all__ = [
    "DispatchPlan",
    "MoEParams",
    "Routing",
    "RoutingConfig",
    "combine",
    "dispatch",
    "experts",
    "fused_experts",
    "grouped_matmul",
    "moe",
    "plan_dispatch",
    "presets",
    "route",
    "router_logits",
    "to_jax",
    "to_torch",
    "update_bias",
]
