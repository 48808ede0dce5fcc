"""AITER's biased_grouped_topk on jaxmoe's routing kernel, for every GPU that it runs on.

The signature is that of aiter.ops.topk (ROCm/aiter, 2026): `from bridge.compat.aiter import biased_grouped_topk`.
"""

from __future__ import annotations

import torch

import bridge
from bridge.compat import check_in_place, check_matrix, described, route_groups

__all__ = ["biased_grouped_topk"]

_NAMES = {
    "logits": "gating_output",
    "bias": "correction_bias",
    "num_experts": "gating_output.shape[1]",
    "top_k": "topk_ids.shape[1]",
    "n_group": "num_expert_group",
    "renormalize": "need_renorm",
    "out.weights": "topk_weights",
    "out.experts": "topk_ids",
}


def biased_grouped_topk(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    need_renorm: bool,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Sigmoid scores, groups by their two best biased ones, the best experts of the best groups: written in place.

    One launch; two small copies more where `topk_weights` or `topk_ids` are columns of a wider tensor, as callers have
    them that fill in shared experts behind.

    Beside AITER: the ids come in falling order of their choice, and every tie goes to the lower index; the bias keeps
    its own dtype; the factor counts whether or not the weights are renormalised (AITER's kernel for 256 experts in 8
    groups leaves it out where they are not); any number of experts to 1024, and of groups that divides it.

    Args:
      gating_output: [T, E] bfloat16, float16 or float32, the logits; rows may be strided. T may be 0. What is written
        in place has no gradient: under autograd's eye logits that ask for one are refused.
      correction_bias: [E] of any of these dtypes, whatever that of the logits. It gets no gradient.
      topk_weights: float32 [T, K] to write to; rows may be strided.
      topk_ids: int32 [T, K] to write to; K is the number of experts a token goes to. Rows may be strided.
      num_expert_group: the experts form this many contiguous groups.
      topk_group: how many groups a token may choose from.
      need_renorm: whether a token's weights are divided by their sum.
      routed_scaling_factor: what the weights are multiplied by at last.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: aiter.ops.topk.biased_grouped_topk of ROCm/aiter; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import torch
      >>> from bridge.compat.aiter import biased_grouped_topk
      >>> weights, ids = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32)
      >>> biased_grouped_topk(torch.zeros(1, 4), torch.tensor([0.0, 0.1, 0.3, 0.2]), weights, ids, 2, 1, True, 2.0)
      >>> ids.tolist(), weights.tolist()
      ([[2, 3]], [[1.0, 1.0]])
    """
    check_matrix("gating_output", gating_output)
    if not isinstance(correction_bias, torch.Tensor):
        raise ValueError(f"correction_bias: expected a torch.Tensor, got {type(correction_bias).__name__}")
    check_matrix("topk_ids", topk_ids)
    shape = (gating_output.shape[0], topk_ids.shape[1])
    for name, tensor, dtype in (("topk_weights", topk_weights, torch.float32), ("topk_ids", topk_ids, torch.int32)):
        check_matrix(name, tensor)
        if tensor.dtype != dtype or tensor.shape != shape:
            wanted = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            raise ValueError(f"{name}: expected {wanted}, got {described(tensor)}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor without requires_grad, got one that requires grad")
    check_in_place("topk_weights", gating_output=gating_output)
    in_place = topk_weights.is_contiguous() and topk_ids.is_contiguous()
    routing = route_groups(
        gating_output,
        correction_bias,
        _NAMES,
        bridge.Routing(topk_weights, topk_ids, None) if in_place else None,
        top_k=shape[1],
        n_group=num_expert_group,
        topk_group=topk_group,
        scoring_func="sigmoid",
        renormalize=need_renorm,
        routed_scaling_factor=routed_scaling_factor,
    )
    if not in_place:
        topk_weights.copy_(routing.weights)
        topk_ids.copy_(routing.experts)
