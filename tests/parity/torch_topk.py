"""What vLLM's, SGLang's and AITER's grouped top-k mean, stated in plain PyTorch; the other side of the parity tests.

Written from the meaning of their public functions. Ties go to the lower index here (a stable sort); theirs are open.
"""

from __future__ import annotations

import torch


def _ranking(values: torch.Tensor) -> torch.Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices


def _choose(choice: torch.Tensor, top_k: int, n_group: int, topk_group: int, members: int) -> torch.Tensor:
    """ids [T, top_k] by falling choice, inside the best groups by the sum of their `members` largest choices."""
    by_group = choice.unflatten(1, (n_group, -1))
    kept = _ranking(by_group.topk(members, dim=2).values.sum(dim=2))[:, :topk_group]
    is_kept = (kept[:, :, None] == torch.arange(n_group)).any(dim=1)
    return _ranking(by_group.where(is_kept[:, :, None], -torch.inf).flatten(1))[:, :top_k]


def _scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    return {"softmax": lambda x: x.softmax(dim=1), "sigmoid": torch.sigmoid}[scoring_func](logits.float())


def vllm_grouped_topk(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's grouped_topk: groups by their two best biased scores, or by their best score where there is no bias."""
    scores = _scores(logits, scoring_func)
    choice = scores if bias is None else scores + bias.float()
    ids = _choose(choice, top_k, n_group, topk_group, members=1 if bias is None else 2)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * routed_scaling_factor, ids.int()


def sglang_biased_grouped_topk(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's biased_grouped_topk. Its `top_k` counts the fused shared slots, which come last.

    As its CUDA kernel has it, shared expert j has a slot of its own with the id E + j. (The PyTorch fallback fills one
    slot instead, with an id drawn at random from E to E + num_fused_shared_experts: copies of one shared expert, which
    are `shared_expert_replicas` in jaxmoe and taken in turn.) A shared weight is the sum of the routed ones over the
    scaling factor, so 1 / factor where they are renormalised: the layer scales its output. That is scale_weights=False;
    with `apply_routed_scaling_factor_on_output` all are multiplied by it here: scale_weights=True. Without
    renormalisation nothing is scaled here, whatever that flag says, and a shared weight is still the token's sum over
    the factor, which is not what an unfused layer computes: there jaxmoe differs, on purpose.
    """
    scores = _scores(logits, "sigmoid")
    routed = top_k - num_fused_shared_experts
    ids = _choose(scores + bias.float(), routed, n_group, topk_group, members=2)
    weights = scores.gather(1, ids)
    total = weights.sum(dim=1, keepdim=True)
    shared = logits.shape[1] + torch.arange(num_fused_shared_experts).expand(len(ids), -1)
    ids = torch.cat([ids, shared], dim=1)
    weights = torch.cat([weights, (total / routed_scaling_factor).expand(-1, num_fused_shared_experts)], dim=1)
    if renormalize:
        weights = weights / total
        if apply_routed_scaling_factor_on_output:
            weights = weights * routed_scaling_factor
    return weights, ids.int()


def aiter_biased_grouped_topk(
    logits: torch.Tensor,
    bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    n_group: int,
    topk_group: int,
    need_renorm: bool,
    routed_scaling_factor: float = 1.0,
) -> None:
    """AITER's biased_grouped_topk, which writes into the caller's tensors; they may be columns of wider ones.

    The bias must have the logits' dtype, so callers round a float32 bias. Shared experts are fused by its callers: they
    fill further columns of the same tensors once, with the ids E.. and a fixed score (1, or 1 / factor), and pass the
    first columns here.
    """
    if bias.dtype != logits.dtype:
        raise ValueError(f"bias: expected the dtype of logits, {logits.dtype}, got {bias.dtype}")
    scores = _scores(logits, "sigmoid")
    ids = _choose(scores + bias.float(), topk_ids.shape[1], n_group, topk_group, members=2)
    weights = scores.gather(1, ids)
    if need_renorm:
        weights = weights / weights.sum(dim=1, keepdim=True)
    topk_weights.copy_(weights * routed_scaling_factor)
    topk_ids.copy_(ids)
