"""vLLM's fused_experts, grouped_topk, moe_align_block_size, moe_permute and moe_unpermute on jaxmoe's kernels.

Signatures and results are those of vLLM 0.33 (its functions stand in vllm.model_executor.layers.fused_moe):
`from bridge.compat.vllm import moe_permute, moe_unpermute`. They run wherever jaxmoe runs, wait for no device, and
neither cast nor copy activations. Ties, and rows of the same expert, keep the order of the input, on every run.
"""

from __future__ import annotations

from typing import Any

import torch

import bridge
from bridge.compat import as_int32, check_in_place, check_matrix, checked_map, described, renamed, route_groups
from bridge.compat.vllm_experts import fused_experts
from bridge.dispatch import dispatch_rows
from bridge.ops.dispatch import unpermute_out
from bridge.ops.plan_dispatch import align_blocks, permute_maps_out
from jaxmoe.config import as_int
from jaxmoe.dispatch import check_plan_sizes

__all__ = ["fused_experts", "grouped_topk", "moe_align_block_size", "moe_permute", "moe_unpermute"]

_ROUTED = (torch.bfloat16, torch.float16, torch.float32)  # the dtypes that jaxmoe computes with
_ROUTE_NAMES = {
    "logits": "gating_output",
    "bias": "e_score_correction_bias",
    "num_experts": "gating_output.shape[1]",
    "top_k": "topk",
    "n_group": "num_expert_group",
}
_PLAN_NAMES = {"experts": "topk_ids", "align": "block_size"}
_PERMUTE_NAMES = {
    "experts": "topk_ids",
    "num_experts": "n_expert",
    "x": "hidden_states",
    "out": "permuted_hidden_states",
    "plan.rows": "topk_ids",
    "offsets": "scratch.expert_first_token_offset",
    "inverse": "scratch.inv_permuted_idx",
    "index": "scratch.permuted_idx",
}
_UNPERMUTE_NAMES = {
    "rows": "permuted_hidden_states",
    "weights": "topk_weights",
    "plan.rows": "inv_permuted_idx",
    "end": "expert_first_token_offset",
}


def grouped_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes tokens to experts: the best `topk` of the best `topk_group` groups. One launch.

    A group is as good as its two best biased scores together, or as its best score where there is no bias.

    Beside vLLM: scores are float32 whatever the dtype of the logits (vLLM has them in the logits' dtype outside its
    fused kernel, and more ties for it); the ids come in falling order of their choice, and every tie goes to the lower
    index; "sqrtsoftplus" is a scoring_func too.

    Args:
      hidden_states: [T, ...]; its number of tokens is checked, nothing else of it is used.
      gating_output: [T, E] bfloat16, float16 or float32, the logits; rows may be strided. T may be 0.
      topk: how many experts a token goes to, 1 to 32.
      renormalize: whether a token's weights are divided by their sum.
      num_expert_group: the experts form this many contiguous groups; must be given, as with vLLM.
      topk_group: how many groups a token may choose from; must be given.
      scoring_func: "softmax" or "sigmoid".
      routed_scaling_factor: what the weights are multiplied by at last.
      e_score_correction_bias: [E] of any of these dtypes, for the choice alone.

    Returns:
      (weights float32 [T, topk], ids int32 [T, topk]). The weights have a gradient with respect to the logits.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: vLLM 0.33, router/grouped_topk_router.py; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import torch
      >>> from bridge.compat.vllm import grouped_topk
      >>> x, logits = torch.ones(1, 8), torch.tensor([[0.0, 2.0, 1.0, 2.0]])
      >>> weights, ids = grouped_topk(x, logits, 2, True, num_expert_group=2, topk_group=2)
      >>> ids.tolist(), weights.tolist()
      ([[1, 3]], [[0.5, 0.5]])
    """
    check_matrix("gating_output", gating_output)
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.shape[:1] != gating_output.shape[:1]:
        tokens, got = gating_output.shape[0], described(hidden_states)
        raise ValueError(f"hidden_states: expected the T={tokens} tokens of gating_output, got {got}")
    routing = route_groups(
        gating_output,
        e_score_correction_bias,
        _ROUTE_NAMES,
        top_k=topk,
        n_group=num_expert_group,
        topk_group=topk_group,
        scoring_func=scoring_func,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
    return routing.weights, routing.experts


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Orders the (token, slot) pairs by expert and fills each expert up to whole blocks, for a grouped product.

    One launch, or two for many pairs; small ones more with `return_scatter_idx`, one or two with ids that are not
    int32, one with an `expert_map` that is not contiguous.

    Beside vLLM: the pairs of an expert keep the order of their flat index (vLLM's may differ from run to run), and
    `expert_ids` behind the last block in use are -1 (with `expert_map` vLLM may have the map's last entry there).

    Args:
      topk_ids: [T, K], of any integer dtype; int32 is taken as it is. An id that is negative or not below num_experts
        is left out. T may be 0.
      block_size: how many rows a block has.
      num_experts: how many experts there are in all, 1 to 2048.
      expert_map: int32 [num_experts], id -> local expert, -1 for one that is not here.
      pad_sorted_ids: whether the length of `sorted_token_ids` is rounded up to whole blocks.
      ignore_invalid_experts: whether pairs of experts that are not here are left out. Otherwise they have blocks like
        the others, whose expert is -1.
      return_scatter_idx: whether `scatter_idx` is returned too; with expert_map only under ignore_invalid_experts.

    Returns:
      (sorted_token_ids, expert_ids, num_tokens_post_padded), all int32, and scatter_idx where it was asked for.
      sorted_token_ids [L]: flat indices t * K + j, T * K in a row that holds none; L is T * K + num_experts *
      (block_size - 1), rounded up with pad_sorted_ids, or T * K * block_size where that is less and T * K is below
      num_experts. expert_ids [ceil(L / block_size)]: the expert of each block, as the map has it.
      num_tokens_post_padded [1]: how many rows the blocks in use have. scatter_idx [T * K, 1]: each pair's own flat
      index, -1 if it was left out.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: vLLM 0.33, moe_align_block_size.py and csrc/moe/moe_align_sum_kernels.cu.

    Example:
      >>> import torch
      >>> from bridge.compat.vllm import moe_align_block_size
      >>> pairs, experts, rows = moe_align_block_size(torch.tensor([[2, 0], [0, 1]]), block_size=2, num_experts=3)
      >>> pairs.tolist(), experts.tolist(), rows.tolist()
      ([1, 2, 3, 4, 0, 4, 4], [0, 1, 2, -1], [6])
    """
    ids = as_int32(topk_ids)
    block_size, num_experts = as_int(block_size), as_int(num_experts)
    try:
        check_plan_sizes(num_experts, block_size)
    except ValueError as error:
        raise renamed(error, _PLAN_NAMES) from None
    if expert_map is not None:
        expert_map = checked_map(expert_map, num_experts, "num_experts")
        if return_scatter_idx and not ignore_invalid_experts:
            raise ValueError(
                "return_scatter_idx: expected False with expert_map, unless ignore_invalid_experts is True"
            )
    named = expert_map is not None and not ignore_invalid_experts
    if named and expert_map is not None:
        expert_map = expert_map.contiguous()
    pairs = ids.numel()
    length = pairs + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    if pairs < num_experts:
        length = min(pairs * block_size, length)
    try:
        results = align_blocks(ids, num_experts, block_size, expert_map, named, length)
    except ValueError as error:
        raise renamed(error, _PLAN_NAMES) from None
    if not return_scatter_idx:
        return results
    held = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        here = expert_map[ids.clamp(0, num_experts - 1)]
        held &= (here >= 0) & (here < num_experts)
    index = torch.arange(pairs, dtype=torch.int32, device=ids.device)
    return *results, index.where(held.flatten(), -1)[:, None]


def _check_scale(a1q_scale: Any, tokens: int) -> None:
    if not isinstance(a1q_scale, torch.Tensor) or (a1q_scale.ndim > 1 and a1q_scale.shape[0] != tokens):
        raise ValueError(f"a1q_scale: expected one scale, or [T={tokens}, ...], got {described(a1q_scale)}")


def _as_words(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or where it is quantised a view of it as float32, to be moved bit for bit."""
    if tensor.dtype in _ROUTED:
        return tensor
    try:
        return tensor.view(torch.float32)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected rows of whole 4-byte words, got {described(tensor)}: {error}") from None


def _permute_buffers(plan: bridge.DispatchPlan, n_local: int, scratch: Any) -> tuple[torch.Tensor, ...]:
    """Where the offsets, the inverse map and the map go; vLLM has no buffers for no pairs."""
    pairs = plan.slots.shape[0]
    if scratch is None or pairs == 0:
        offsets = plan.slots.new_empty(n_local + 1, dtype=torch.int64)
        return offsets, torch.empty_like(plan.slots), torch.empty_like(plan.slots)
    scratch.reserve(pairs)
    return scratch.expert_first_token_offset, scratch.inv_permuted_idx[:pairs], scratch.permuted_idx[:pairs]


def moe_permute(
    hidden_states: torch.Tensor,
    a1q_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    n_expert: int,
    n_local_expert: int = -1,
    expert_map: torch.Tensor | None = None,
    permuted_hidden_states: torch.Tensor | None = None,
    scratch: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies tokens into the order of their experts, for a grouped product.

    Three launches, or four: one or two for the plan, one for the rows, one for offsets and index maps; three more for
    scales, one or two for ids that are not int32.

    As in vLLM, rows that hold no token are not written, what they hold is open: pass the offsets to `moe_unpermute`.
    (Where hidden_states ask for a gradient they are zero.) Beside vLLM: every pair that has no row, its expert being
    elsewhere or its id out of range, points to the last of them, T * K - 1, in `inv_permuted_idx` (vLLM gives each of
    those rows to one of them). Rows need not be multiples of 16 bytes.

    Args:
      hidden_states: [T, H] bfloat16, float16 or float32; rows may be strided. Quantised ones, of any other dtype, are
        moved bit for bit; their rows must be multiples of 4 bytes, and where they ask for a gradient they are refused.
        T may be 0.
      a1q_scale: scales of the tokens. With two axes or more, [T, ...], they are permuted as the tokens are, at the end
        with repetitions of the last token's; fewer axes are one scale for all and come back as they are. None for none.
      topk_ids: [T, K], of any integer dtype; int32 is taken as it is.
      n_expert: how many experts there are in all.
      n_local_expert: how many are here; -1 for all.
      expert_map: int32 [n_expert], id -> local expert, -1 for one that is not here.
      permuted_hidden_states: [T * K, H] of hidden_states' dtype to write into; it is returned then.
      scratch: a MoEPermuteScratch of vLLM for these experts; the offsets and index maps are written to its buffers.

    Returns:
      (permuted_hidden_states [T * K, H]; a1q_scale; expert_first_token_offset int64 [n_local_expert + 1], where each
      expert's rows begin and, last, how many rows they are; inv_permuted_idx int32 [T * K], the row of each pair;
      permuted_idx int32 [T * K], the flat index t * K + j of each row, T * K for a row that holds no token).
      The first is differentiable in hidden_states of the three dtypes.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: vLLM 0.33, moe_permute_unpermute.py.

    Example:
      >>> import torch
      >>> from bridge.compat.vllm import moe_permute
      >>> x, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [0, 1]])
      >>> rows, _, offsets, inverse, index = moe_permute(x, None, ids, n_expert=3)
      >>> rows.flatten().tolist(), offsets.tolist(), inverse.tolist(), index.tolist()
      ([1.0, 2.0, 2.0, 1.0], [0, 2, 3, 4], [3, 0, 1, 2], [1, 2, 3, 0])
    """
    check_matrix("hidden_states", hidden_states)
    if hidden_states.requires_grad and hidden_states.dtype not in _ROUTED and torch.is_grad_enabled():
        got = described(hidden_states)
        raise ValueError(
            f"hidden_states: expected bfloat16 or float16 or float32 where it requires grad, got {got}; use "
            "torch.no_grad()"
        )
    ids = as_int32(topk_ids)
    out = permuted_hidden_states
    if isinstance(out, torch.Tensor):
        if out.dtype != hidden_states.dtype:
            raise ValueError(f"permuted_hidden_states: expected {hidden_states.dtype}, got {described(out)}")
        if out.requires_grad:  # which a view as words does not show
            raise ValueError(
                "permuted_hidden_states: expected a tensor without requires_grad, got one that requires grad"
            )
        out = _as_words("permuted_hidden_states", out)
    n_expert, n_local_expert = as_int(n_expert), as_int(n_local_expert)
    for name, value in (("n_expert", n_expert), ("n_local_expert", n_local_expert)):
        if type(value) is not int:
            raise ValueError(f"{name}: expected an int, got {value!r}")
    n_local = n_expert if n_local_expert == -1 else n_local_expert
    if not 1 <= n_local <= n_expert:
        raise ValueError(f"n_local_expert: expected -1 or 1 to n_expert={n_expert}, got {n_local_expert}")
    if expert_map is not None:
        expert_map = checked_map(expert_map, n_expert, "n_expert")
    if a1q_scale is not None:
        _check_scale(a1q_scale, ids.shape[0])
    if scratch is not None:
        offsets = scratch.expert_first_token_offset
        if offsets.shape != (n_local + 1,) or offsets.dtype != torch.int64:
            got = described(offsets)
            raise ValueError(f"scratch: expected expert_first_token_offset int64 [{n_local + 1}], got {got}")
    try:
        plan = bridge.plan_dispatch(ids, n_expert if expert_map is None else n_local, expert_map=expert_map)
        offsets, inverse, index = _permute_buffers(plan, n_local, scratch)
        trained = hidden_states.requires_grad and torch.is_grad_enabled()  # 0 * NaN would reach what scales the rows
        rows = dispatch_rows(_as_words("hidden_states", hidden_states), plan, out=out, clear=trained)
        permute_maps_out(*plan, offsets, inverse, index)  # last: before the rows, 64 tokens took 8.6 us for 6.1
    except ValueError as error:
        raise renamed(error, _PERMUTE_NAMES) from None

    if a1q_scale is not None and a1q_scale.ndim > 1:
        a1q_scale = a1q_scale[plan.slots // ids.shape[1]]  # -1 is the last token
    if permuted_hidden_states is not None:
        rows = permuted_hidden_states
    elif rows.dtype != hidden_states.dtype:  # a view has no gradient
        rows = rows.view(hidden_states.dtype)
    return rows, a1q_scale, offsets, inverse, index


def moe_unpermute(
    out: torch.Tensor,
    permuted_hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    inv_permuted_idx: torch.Tensor,
    expert_first_token_offset: torch.Tensor | None = None,
) -> None:
    """Sums each token's rows by its weights into `out`; what moe_permute, here or of vLLM, has permuted.

    One launch. The sum goes over the slots in order, in float32. No gradient: under autograd's eye it is refused, as
    everything that writes in place.

    Args:
      out: [T, H] of permuted_hidden_states' dtype, written in place.
      permuted_hidden_states: [M, H] bfloat16, float16 or float32, rows may be strided; or contiguous [T, K, H].
      topk_weights: [T, K] of any of these dtypes.
      inv_permuted_idx: int32 [T * K], the row of each pair, below M; a negative one adds nothing.
      expert_first_token_offset: int64 [n_local_expert + 1]; rows at or past its last entry hold no token and add
        nothing. None: every row holds one.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: vLLM 0.33, moe_permute_unpermute.py.

    Example:
      >>> import torch
      >>> from bridge.compat.vllm import moe_permute, moe_unpermute
      >>> x, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [0, 1]])
      >>> rows, _, offsets, inverse, _ = moe_permute(x, None, ids, n_expert=3)
      >>> out, weights = torch.empty(2, 1), torch.tensor([[0.5, 1.0], [2.0, 1.0]])
      >>> moe_unpermute(out, rows, weights, inverse, offsets)
      >>> out.tolist()
      [[1.5], [6.0]]
    """
    check_matrix("out", out)  # None would be a result of its own to `combine`
    check_matrix("topk_weights", topk_weights)
    rows, index, offsets = permuted_hidden_states, inv_permuted_idx, expert_first_token_offset
    pairs = topk_weights.numel()
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int32 or index.numel() != pairs:
        raise ValueError(f"inv_permuted_idx: expected int32 [{pairs}], got {described(index)}")
    if isinstance(rows, torch.Tensor) and rows.ndim == 3 and rows.is_contiguous():
        rows = rows.flatten(0, 1)
    check_matrix("permuted_hidden_states", rows)
    if offsets is not None:
        if not isinstance(offsets, torch.Tensor) or offsets.dtype != torch.int64 or offsets.ndim != 1:
            got = described(offsets)
            raise ValueError(f"expert_first_token_offset: expected int64 [n_local_expert + 1], got {got}")
    check_in_place("out", permuted_hidden_states=rows, topk_weights=topk_weights)
    try:
        if offsets is not None:
            index = index.reshape(topk_weights.shape).contiguous()
            unpermute_out(rows, index, topk_weights, offsets[-1:], out)
            return
        unused = index.new_empty(rows.shape[0])  # `combine` sums by the plan's rows alone
        plan = bridge.DispatchPlan(index.reshape(topk_weights.shape), unused, unused)
        bridge.combine(rows, plan, topk_weights, out=out)
    except ValueError as error:
        raise renamed(error, _UNPERMUTE_NAMES) from None
