"""jaxmoe.experts on tensors."""

from __future__ import annotations

from typing import Any

import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.ops import experts as ops


def experts(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> torch.Tensor:
    """Applies each expert to its group of rows: `jaxmoe.experts` on tensors.

    Args:
      rows: [M, H] bfloat16, float16 or float32, in expert order, as `dispatch` returns them.
      gate_up: [E, H, 2 * I] of rows' dtype: columns [0, I) are the gate, [I, 2 * I) the up projection.
      down: [E, I, H] of rows' dtype. Either weight may be a transposed view, `.mT`, of a contiguous tensor that lies as
        Hugging Face keeps it ([E, 2 * I, H] and [E, H, I]): nothing is copied.
      group_sizes: int32 [E], how many rows each expert has; from the plan.
      activation: "silu", "gelu" (exact) or "gelu_tanh", taken in float32.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX.

    Returns:
      [M, H] in rows' dtype; rows behind the last group are zero. Differentiable in rows, gate_up and down.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Shazeer, arXiv:2002.05202 (SwiGLU); `jaxmoe.experts`.

    Example:
      >>> import torch, bridge
      >>> rows, sizes = torch.ones(2, 1), torch.tensor([1, 1], dtype=torch.int32)
      >>> gate_up = torch.tensor([[[1.0, 2.0]], [[1.0, 4.0]]])
      >>> y = bridge.experts(rows, gate_up, torch.ones(2, 1, 1), sizes)
      >>> y / torch.nn.functional.silu(torch.tensor(1.0))
      tensor([[2.],
              [4.]])
    """
    arguments = {"rows": rows, "gate_up": gate_up, "down": down, "group_sizes": group_sizes}
    if path.takes_ops(rows, implementation):
        _check_tensors(arguments)
        if not isinstance(activation, str):
            raise ValueError(f"activation: expected a string, got {type(activation).__name__}")
        return path.at_once(ops.experts, rows, gate_up, down, group_sizes, activation)
    (arguments["gate_up"], arguments["down"]), transposed = ops.as_they_lie(gate_up, down)
    options = {"activation": activation, "transposed": transposed, "implementation": implementation}
    return call(jaxmoe.experts, arguments, options)


def grouped_matmul(
    rows: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor, *, implementation: str | None = None
) -> torch.Tensor:
    """Each group of rows times its expert's matrix: `jaxmoe.grouped_matmul` on tensors.

    Args:
      rows: [M, K] bfloat16, float16 or float32, in expert order.
      weight: [E, K, N] of rows' dtype, or a transposed view, `.mT`, of a contiguous [E, N, K].
      group_sizes: int32 [E], how many rows each expert has.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX.

    Returns:
      [M, N] in rows' dtype, accumulated in float32; rows behind the last group are zero. Differentiable in rows and
      weight.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: `jaxmoe.grouped_matmul`; Gale et al., arXiv:2211.15841 (MegaBlocks).

    Example:
      >>> import torch, bridge
      >>> rows, sizes = torch.ones(3, 2), torch.tensor([1, 2], dtype=torch.int32)
      >>> bridge.grouped_matmul(rows, torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), sizes).tolist()
      [[3.0], [7.0], [7.0]]
    """
    arguments = {"rows": rows, "weight": weight, "group_sizes": group_sizes}
    if path.takes_ops(rows, implementation):
        _check_tensors(arguments)
        return path.at_once(ops.grouped_matmul, rows, weight, group_sizes)
    (arguments["weight"],), (transposed,) = ops.as_they_lie(weight)
    return call(jaxmoe.grouped_matmul, arguments, {"transposed": transposed, "implementation": implementation})


def _check_tensors(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
