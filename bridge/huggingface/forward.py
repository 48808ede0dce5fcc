"""The forward passes of a patched model: of its routers, its experts, and its layers with folded shared experts."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import bridge
from bridge import path
from bridge.checks import FLOATS, check, row_stride
from bridge.huggingface.fold import copy_dense, is_dense
from bridge.ops import layer
from bridge.views import import_rows
from jaxmoe import RoutingConfig

# What the kernels call an activation: a function of torch, as LFM2's experts have it, or a module of transformers, of
# this very type, since a subclass may compute something else.
_ACTIVATIONS: dict[Any, str] = {torch.nn.functional.silu: "silu", torch.nn.functional.gelu: "gelu"}
_ACTIVATIONS |= {
    type(ACT2FN[name]): ours
    for name, ours in {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    }.items()
}


def forward_router(
    router: Any, config: RoutingConfig, hidden_states: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, weights, ids), as transformers' routers return them. MiniMax-M2 hands its router the bias."""
    if bias is None:  # Ernie's is one module further down
        bias = getattr(getattr(router, "moe_statics", router), "e_score_correction_bias", None)
    logits = bridge.router_logits(hidden_states.reshape(-1, hidden_states.shape[-1]), router.weight)
    if (logit_bias := getattr(router, "bias", None)) is not None:  # gpt-oss
        logits = logits + logit_bias
    bias = None if bias is None else bias.view(-1)
    weights, ids, _ = bridge.route(logits, bias, config=config, return_load=False)
    return logits, weights, ids


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward pass of an experts module: what transformers' experts interface calls for "jaxmoe".

    Args:
      self: a module of a class under transformers' `use_experts_implementation`, with parameters in bfloat16, float16
        or float32.
      hidden_states: [T, H] of any float dtype; rows may be strided.
      top_k_index: [T, S] of any integer dtype; an id that is not below the number of experts, or negative, is dropped.
      top_k_weights: [T, S] bfloat16, float16, float32, or float64, which is rounded to float32.

    Returns:
      [T, H] in hidden_states' dtype. Differentiable in hidden_states, top_k_weights and the module's parameters.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: the experts interface of Hugging Face transformers 5.13 to 5.24.

    Example:
      >>> import bridge.huggingface
      >>> from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
      >>> ALL_EXPERTS_FUNCTIONS["jaxmoe"] is bridge.huggingface.experts_forward
      True
    """
    up = self.gate_up_proj if self.has_gate else self.up_proj
    up, down = (weight if self.is_transposed else weight.mT for weight in (up, self.down_proj))
    x = hidden_states.to(down.dtype)  # they differ under autocast alone
    ops = path.takes_ops(x, None)
    _check(x, top_k_index, top_k_weights, down, ops)
    ids = _dense(_int32(top_k_index, down.shape[0]), ops)
    weights = _dense(top_k_weights.float() if top_k_weights.dtype == torch.float64 else top_k_weights, ops)
    plan = bridge.plan_dispatch(ids, down.shape[0])
    normed = getattr(self, "has_post_expert_norm", False)  # transformers 5.20 brought it
    activation = _gated_by(self)
    if activation and not normed and ops:
        return layer.weighted(x, plan, weights, up, down, activation=activation).to(hidden_states.dtype)
    rows = bridge.dispatch(x, plan)
    if activation:
        rows = bridge.experts(rows, up, down, plan.group_sizes, activation=activation)
    else:
        rows = _mlp(self, rows, up, down, ids, plan)
    if normed:
        rows = self.post_expert_norm(rows)
    return bridge.combine(rows, plan, weights).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("jaxmoe", experts_forward)


_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def _check(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, down: torch.Tensor, ops: bool) -> None:
    """Raises ValueError in the words of `experts_forward`'s arguments; x are hidden_states, cast."""
    if down.dtype not in FLOATS:
        raise ValueError(f"self: expected parameters of {' or '.join(map(str, FLOATS))}, got {down.dtype}")
    check("hidden_states", x, ("T", down.shape[2]))
    check("top_k_index", ids, (x.shape[0], "S"), _IDS)
    check("top_k_weights", weights, ids.shape, (*FLOATS, torch.float64))
    if ops:
        row_stride("hidden_states", x)
    elif not is_dense(x):
        import_rows("hidden_states", x)  # raises where it cannot be viewed


def _int32(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Ids as a plan takes them; those of a patched router are such."""
    if ids.dtype in (torch.int64, torch.uint32, torch.uint64):  # a cast would wrap
        ids = ids.to(torch.int64).clamp(-1, num_experts)
    return ids.to(torch.int32)


def _dense(tensor: torch.Tensor, ops: bool) -> torch.Tensor:
    """A small tensor as the ops take it, or JAX."""
    if ops:
        return tensor.contiguous()
    return tensor if is_dense(tensor) else copy_dense(tensor)


def _gated_by(experts: Any) -> str | None:
    """The activation with which the experts are what `bridge.experts` computes; None where they are something else."""
    if experts.has_bias or not (experts.has_gate and experts.is_concatenated):
        return None
    # A class without a gate of its own has been given one by transformers.
    usual = experts._apply_gate.__module__ == use_experts_implementation.__module__
    return _ACTIVATIONS.get(type(experts.act_fn), _ACTIVATIONS.get(experts.act_fn)) if usual else None


def _mlp(
    experts: Any,
    rows: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    plan: bridge.DispatchPlan,
) -> torch.Tensor:
    """Experts of any other kind: biases, clamps, other activations, no gate."""
    biases: list[torch.Tensor] = []
    if experts.has_bias:  # one for each row; any for a row without a token
        of_row = ids.flatten().index_select(0, plan.slots.clamp(min=0)).clamp(0, down.shape[0] - 1)
        up_bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        biases = [bias.index_select(0, of_row) for bias in (up_bias, experts.down_proj_bias)]
    rows = bridge.grouped_matmul(rows, up, plan.group_sizes)
    rows = rows + biases[0] if biases else rows
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = bridge.grouped_matmul(rows, down, plan.group_sizes)
    return rows + biases[1] if biases else rows


def forward_fused(block: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """A layer whose shared experts are slots. DeepSeek-V4 hands every layer `input_ids`; these do not route by it."""
    _, weights, ids = block.gate(hidden_states)
    return block.experts(hidden_states.flatten(0, -2), ids, weights).view(hidden_states.shape)
