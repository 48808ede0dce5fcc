"""jaxmoe.experts on tensors."""

from __future__ import annotations

import torch

import jaxmoe
from bridge.call import call


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
      down: [E, I, H] of rows' dtype.
      group_sizes: int32 [E], how many rows each expert has; from the plan.
      activation: "silu", "gelu" (exact) or "gelu_tanh", taken in float32.
      implementation: "xla" or None.

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
    return call(jaxmoe.experts, arguments, {"activation": activation, "implementation": implementation})
