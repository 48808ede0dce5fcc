"""jaxmoe.dispatch on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import INT32, check, check_gradients_of_out, most_rows
from bridge.ops import dispatch as ops
from bridge.ops import plan_dispatch as plan_ops
from jaxmoe.config import as_int
from jaxmoe.dispatch import check_plan_sizes


class DispatchPlan(NamedTuple):
    """Where each (token, slot) pair goes when rows are put in the order of their experts.

    Attributes:
      rows: int32 [T, S], the row that each pair goes to, -1 if it is dropped.
      slots: int32 [M], the inverse: the flat index t * S + j of each row, -1 for a row that holds no token.
      group_sizes: int32 [num_experts], the rows of each expert, padding included: multiples of align.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    group_sizes: torch.Tensor


def plan_dispatch(
    experts: torch.Tensor,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: torch.Tensor | None = None,
    max_rows: int | None = None,
    implementation: str | None = None,
) -> DispatchPlan:
    """Plans the permutation of (token, slot) pairs into expert order: `jaxmoe.plan_dispatch` on tensors.

    Args:
      experts: int32 [T, S], the ids; a negative one, or one not below the number of ids, is dropped. T may be 0.
      num_experts: how many experts there are here (shared ids count: `config.num_expert_ids`).
      align: each expert's rows start at, and fill up to, a multiple of this.
      expert_map: int32 [number of ids], id -> local expert, -1 for one that is not here (expert parallelism).
      max_rows: M is at most this, a multiple of align; pairs whose row would lie behind are dropped, those of the last
        experts. `jaxmoe.plan_dispatch` says how to notice.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      DispatchPlan(rows [T, S], slots [M], group_sizes [num_experts]), all int32. M = T*S for align=1, otherwise
      T*S + num_experts*(align-1) rounded up to a multiple of align; or max_rows where that is less.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: `jaxmoe.plan_dispatch`, a stable counting sort.

    Example:
      >>> import torch, bridge
      >>> plan = bridge.plan_dispatch(torch.tensor([[2, 0], [0, -1]], dtype=torch.int32), 3)
      >>> plan.rows.tolist(), plan.slots.tolist(), plan.group_sizes.tolist()
      ([[2, 0], [1, -1]], [1, 2, 0, -1], [2, 0, 1])
    """
    num_experts, align = as_int(num_experts), as_int(align)
    if path.takes_ops(experts, implementation):
        check_plan_sizes(num_experts, align)
        max_rows = most_rows(max_rows, align)
        if expert_map is not None:
            check("expert_map", expert_map, ("ids",), INT32)
        return DispatchPlan(*plan_ops.plan_dispatch(experts, num_experts, align, expert_map, max_rows))
    options = {"num_experts": num_experts, "align": align, "max_rows": max_rows, "implementation": implementation}
    return DispatchPlan(*call(jaxmoe.plan_dispatch, {"experts": experts, "expert_map": expert_map}, options))


def _check_plan(plan: Any) -> None:
    """What the schema of an op would say in its own words."""
    if not isinstance(plan, DispatchPlan):
        raise ValueError(f"plan: expected a DispatchPlan, got {type(plan).__name__}")
    for name, tensor in zip(plan._fields, plan, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"plan.{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _jax_plan(plan: Any) -> jaxmoe.DispatchPlan:
    if not isinstance(plan, DispatchPlan):
        raise ValueError(f"plan: expected a DispatchPlan, got {type(plan).__name__}")
    return jaxmoe.DispatchPlan(*tuple[Any, ...](plan))  # tensors, until `call` has imported them


def dispatch(
    x: torch.Tensor, plan: DispatchPlan, *, out: torch.Tensor | None = None, implementation: str | None = None
) -> torch.Tensor:
    """Copies tokens into expert order: row plan.rows[t, j] of the result is x[t]. `jaxmoe.dispatch` on tensors.

    Args:
      x: [T, H] bfloat16, float16 or float32; rows may be strided.
      plan: what `plan_dispatch` returned.
      out: [M, H] of x's dtype to write into; the same tensor is returned. On the CPU that is a copy.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      [M, H] in x's dtype; rows that hold no token are zero. Differentiable in x.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: `jaxmoe.dispatch`.

    Example:
      >>> import torch, bridge
      >>> plan = bridge.plan_dispatch(torch.tensor([[1], [0]], dtype=torch.int32), 2)
      >>> bridge.dispatch(torch.tensor([[1.0], [2.0]]), plan).tolist()
      [[2.0], [1.0]]
    """
    return dispatch_rows(x, plan, out=out, implementation=implementation)


def dispatch_rows(
    x: torch.Tensor,
    plan: DispatchPlan,
    *,
    out: torch.Tensor | None = None,
    clear: bool = True,
    implementation: str | None = None,
) -> torch.Tensor:
    """`dispatch`; without `clear`, rows that hold no token may hold anything, and cost nothing on the native path."""
    if path.takes_ops(x, implementation):
        _check_plan(plan)
        if out is None:
            return path.at_once(ops.dispatch, x, plan.rows, plan.slots, clear)
        _check_tensor("out", out)
        check_gradients_of_out({"out": out}, x=x)
        path.check_no_tangents(x=x)
        ops.dispatch_out(x, plan.rows, plan.slots, out, clear)
        return out
    arguments = {"x": x, "plan": _jax_plan(plan)}
    return call(jaxmoe.dispatch, arguments, {"implementation": implementation}, strided=("x",), out=out)


def combine(
    rows: torch.Tensor,
    plan: DispatchPlan,
    weights: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Brings the experts' rows back to their tokens: y[t] = sum over slots j of weights[t, j] * rows[plan.rows[t, j]].

    Args:
      rows: [M, H] bfloat16, float16 or float32; rows may be strided.
      plan: what `plan_dispatch` returned.
      weights: [T, S] of any float dtype among these. A dropped pair adds nothing, whatever its weight.
      out: [T, H] of rows' dtype to write into; the same tensor is returned. On the CPU that is a copy.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      [T, H] in rows' dtype; summed in the order of the slots, in float32. Differentiable in rows and weights.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: `jaxmoe.combine`.

    Example:
      >>> import torch, bridge
      >>> plan = bridge.plan_dispatch(torch.tensor([[1, 0]], dtype=torch.int32), 2)
      >>> bridge.combine(torch.tensor([[10.0], [1.0]]), plan, torch.tensor([[0.25, 0.5]]))
      tensor([[5.2500]])
    """
    if path.takes_ops(rows, implementation):
        _check_plan(plan)
        _check_tensor("weights", weights)
        if out is None:
            return path.at_once(ops.combine, rows, plan.rows, plan.slots, weights)
        _check_tensor("out", out)
        check_gradients_of_out({"out": out}, rows=rows, weights=weights)
        path.check_no_tangents(rows=rows, weights=weights)
        ops.combine_out(rows, plan.rows, plan.slots, weights, out)
        return out
    arguments = {"rows": rows, "plan": _jax_plan(plan), "weights": weights}
    return call(jaxmoe.combine, arguments, {"implementation": implementation}, strided=("rows",), out=out)
