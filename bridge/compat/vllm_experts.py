"""fused_experts of bridge.compat.vllm, from where it is imported."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

import bridge
from bridge.checks import INT32, check, check_at_least_one
from bridge.compat import as_int32, checked_map, described, renamed
from bridge.ops.experts import check_weight
from jaxmoe.config import as_int
from jaxmoe.experts import check_activation

__all__ = ["fused_experts"]

_NAMES = {
    "x": "hidden_states",
    "experts": "topk_ids",
    "weights": "topk_weights",
    "gate_up": "w1",
    "down": "w2",
}
# What a FusedMoEQuantConfig asks for beside plain weights, each of them None where it does not. Its dtypes come first:
# with some of them vLLM's own properties assert something of the scales.
_NOT_THERE = (
    *("quant_dtype", "weight_quant_dtype", "block_shape"),
    *("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale"),
    *("w1_bias", "w2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"),
)


def _check_plain(quant_config: Any) -> None:
    if quant_config is None:
        return
    if not hasattr(quant_config, "quant_dtype"):
        got = type(quant_config).__name__
        raise ValueError(f"quant_config: expected None or a FusedMoEQuantConfig of vLLM, got {got}")
    for name in _NOT_THERE:
        value = getattr(quant_config, name, None)
        if value is not None:
            got = described(value) if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"quant_config.{name}: expected None, plain weights being all there is here, got {got}")


def _check_weights(hidden_states: torch.Tensor, w1: Any, w2: Any) -> None:
    """As they lie, before they are views that the caller has not seen."""
    check("hidden_states", hidden_states, ("T", "H"))
    width, dtype = hidden_states.shape[1], (hidden_states.dtype,)
    check("w1", w1, ("E", "2 * I", width), dtype)
    check_at_least_one("w1", w1, 0)
    if w1.shape[1] % 2:
        raise ValueError(f"w1: expected an even number of rows, gate above up, got {described(w1)}")
    check("w2", w2, (w1.shape[0], width, w1.shape[1] // 2), dtype)
    for name, weight in (("w1", w1), ("w2", w2)):
        check_weight(name, weight, hidden_states.device)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str | Enum = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    quant_config: Any = None,
) -> torch.Tensor:
    """Applies to each token the experts that it was routed to, and sums what they return by its weights.

    Four launches, or five: one or two for the plan, two for the experts, one for the sum; up to three more with ids
    that are not int32. No weight is cast or copied.

    Beside vLLM: rows are weighted and summed in float32, in the order of the slots (vLLM rounds each weighted row to
    the dtype first), to the same bits on every run; there are gradients. Not there are quantised weights, biases,
    weights that are applied to the input, padded rows of w1 and w2, and activations that are not named below.

    Args:
      hidden_states: [T, H] bfloat16, float16 or float32; contiguous, though on a GPU rows may be strided. T may be 0.
      w1: [E, 2 * I, H] of hidden_states' dtype, contiguous: of each expert that is here the gate, then the up
        projection.
      w2: [E, H, I] of hidden_states' dtype, contiguous.
      topk_weights: [T, K] bfloat16, float16 or float32.
      topk_ids: [T, K], of any integer dtype; int32 is taken as it is. An id that is negative, or not below
        global_num_experts, or without a map not below E, is dropped.
      activation: "silu", "gelu" (exact) or "gelu_tanh", as a string or a MoEActivation of vLLM.
      apply_router_weight_on_input: False.
      global_num_experts: how many ids there are, E or more; -1 for E.
      expert_map: int32 [global_num_experts], id -> local expert, -1, or a number not below E, for one that is not here.
      quant_config: None, or a FusedMoEQuantConfig of vLLM that quantises nothing.

    Returns:
      [T, H] in hidden_states' dtype, new memory. Differentiable in hidden_states, w1, w2 and topk_weights.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: vLLM 0.33, fused_moe.py; `bridge.fused_experts`.

    Example:
      >>> import torch
      >>> from bridge.compat.vllm import fused_experts
      >>> x, ids = torch.ones(2, 1), torch.tensor([[0, 1], [1, 2]])
      >>> w1, w2 = torch.full((1, 2, 1), 20.0), torch.ones(1, 1, 1)  # of expert 1, which is here
      >>> weights, here = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([-1, 0, -1], dtype=torch.int32)
      >>> fused_experts(x, w1, w2, weights, ids, global_num_experts=3, expert_map=here).tolist()
      [[300.0], [400.0]]
    """
    name: Any = getattr(activation, "value", activation)
    check_activation(name)
    if apply_router_weight_on_input is not False:
        got = repr(apply_router_weight_on_input)
        raise ValueError(f"apply_router_weight_on_input: expected False, the weights of sums, got {got}")
    _check_plain(quant_config)
    _check_weights(hidden_states, w1, w2)
    ids = as_int32(topk_ids)
    check("topk_ids", ids, (hidden_states.shape[0], "K"), INT32)
    check("topk_weights", topk_weights, ids.shape)
    num_here, num_ids = w1.shape[0], as_int(global_num_experts)
    if type(num_ids) is not int or (num_ids < num_here and num_ids != -1):
        got = repr(global_num_experts)
        raise ValueError(f"global_num_experts: expected -1 or an int from w1.shape[0]={num_here} on, got {got}")
    if expert_map is not None:
        expert_map = checked_map(expert_map, num_here if num_ids == -1 else num_ids, "global_num_experts")
    gate_up, down = w1.mT, w2.mT
    try:
        return bridge.fused_experts(
            hidden_states, ids, topk_weights, gate_up, down, expert_map=expert_map, activation=name
        )
    except ValueError as error:
        raise renamed(error, _NAMES) from None
