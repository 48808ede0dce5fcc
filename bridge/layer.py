"""jaxmoe.layer on tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

import jaxmoe
from bridge.call import call
from bridge.routing import Routing, count
from jaxmoe import RoutingConfig


class MoEParams(NamedTuple):
    """The parameters of one layer.

    Attributes:
      router: [E, H], the router's weight, of any of the float dtypes.
      gate_up: [num_expert_ids, H, 2 * I]: the routed experts, then the shared ones (a replica each).
      down: [num_expert_ids, I, H].
      bias: [E], added to the scores for the choice only; None for none.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None


def moe(
    x: torch.Tensor,
    params: MoEParams,
    config: RoutingConfig,
    *,
    num_valid_tokens: int | torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, Routing]:
    """A Mixture-of-Experts layer: `jaxmoe.moe` on tensors.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      params: `MoEParams`; gate_up and down in x's dtype.
      config: how to route.
      num_valid_tokens: tokens at or past this index come out as zeros. An int, or an int32 tensor without axes.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla". The experts'
        matrix products go through `jax.lax.ragged_dot` in each case.

    Returns:
      (y [T, H] in x's dtype, Routing). Differentiable in x and in every parameter but the bias.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; `jaxmoe.moe`.

    Example:
      >>> import torch, bridge
      >>> config = bridge.RoutingConfig(num_experts=4, top_k=2)
      >>> params = bridge.MoEParams(router=torch.randn(4, 8), gate_up=torch.randn(4, 8, 6), down=torch.randn(4, 3, 8))
      >>> y, routing = bridge.moe(torch.randn(5, 8), params, config)
      >>> y.shape, int(routing.load.sum())
      (torch.Size([5, 8]), 10)
    """
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    arguments = {
        "x": x,
        "params": jaxmoe.MoEParams(**params._asdict()),
        "num_valid_tokens": count(num_valid_tokens, "x", x),
    }
    options = {"config": config, "implementation": implementation}
    y, routing = call(jaxmoe.moe, arguments, options, no_gradient=("params.bias",))
    return y, Routing(*routing)
