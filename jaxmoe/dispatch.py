"""Into expert order and back: the plan, dispatch and combine."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import arguments, reference
from jaxmoe.arguments import Rows, base, check_array, dense
from jaxmoe.config import MAX_EXPERTS, as_int
from jaxmoe.implementation import check_implementation, compiled, run
from jaxmoe.routing import like_rows
from kernels_pallas import combine as combine_kernels
from kernels_pallas.dispatch import dispatch as dispatch_kernel
from kernels_pallas.plan_dispatch import num_rows
from kernels_pallas.plan_dispatch import plan_dispatch as plan_kernel


class DispatchPlan(NamedTuple):
    """Where each (token, slot) pair goes when rows are put in the order of their experts.

    Attributes:
      rows: int32 [T, S], the row that each pair goes to, -1 if it is dropped.
      slots: int32 [M], the inverse: the flat index t * S + j of each row, -1 for a row that holds no token.
      group_sizes: int32 [num_experts], the rows of each expert, padding included: multiples of align.
    """

    rows: jax.Array
    slots: jax.Array
    group_sizes: jax.Array


def _plan(
    static: tuple[int, int, int | None, str | None], experts: jax.Array, expert_map: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_experts, align, max_rows, implementation = static
    xla = functools.partial(reference.plan_dispatch, num_experts=num_experts, align=align, max_rows=max_rows)

    def kernels(experts: jax.Array, expert_map: Any, *, target: str, interpret: bool) -> tuple[jax.Array, ...]:
        if experts.size == 0:
            return xla(experts, expert_map)
        return plan_kernel(
            experts,
            expert_map,
            num_experts=num_experts,
            align=align,
            max_rows=max_rows,
            target=target,
            interpret=interpret,
        )

    return run(implementation, kernels, xla, experts, expert_map)


_plan_jit = compiled(_plan)


def _check_size(name: str, value: Any, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name}: expected an int from 1 to {most}, got {value!r}")


def check_align(align: Any) -> None:
    """Raises ValueError unless groups may be of multiples of this."""
    _check_size("align", align, 2**20)


def check_plan_sizes(num_experts: Any, align: Any) -> None:
    """Raises ValueError unless a plan can be made for so many experts with this alignment."""
    _check_size("num_experts", num_experts, MAX_EXPERTS * 2)  # routed and shared
    check_align(align)


def check_max_rows(max_rows: Any, align: int) -> None:
    """Raises ValueError unless a plan with this alignment can be cut to so many rows."""
    if max_rows is not None and (type(max_rows) is not int or max_rows < 1 or max_rows % align):
        wanted = "int" if align == 1 else f"multiple of align={align}"
        raise ValueError(f"max_rows: expected a positive {wanted}, got {max_rows!r}")


MOST_ROWS = 3 * 2**29


def check_plan_rows(shape: Any, num_experts: int, align: int) -> None:
    """Raises ValueError for more pairs or rows than the plan's 32-bit numbers have room for."""
    pairs = shape[0] * shape[1]
    # What fills the rows goes up to 2**28 past the last one, masked.
    if pairs >= 2**27 or num_rows(pairs, num_experts, align) >= MOST_ROWS:
        raise ValueError(
            f"experts: expected fewer than 2**27 pairs, and than 3 * 2**29 rows after alignment, got {list(shape)}"
        )


def plan_dispatch(
    experts: jax.Array,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: jax.Array | None = None,
    max_rows: int | None = None,
    implementation: str | None = None,
) -> DispatchPlan:
    """Plans the permutation of (token, slot) pairs into expert order: a stable counting sort in one kernel or two.

    Within an expert the rows keep the order of the flat index t * S + j. The result depends on the ids alone: no
    atomics, the same bit for bit on every run.

    Args:
      experts: int32 [T, S], the ids; a negative one, or one not below the number of ids, is dropped. T may be 0; T * S
        is below 2**27.
      num_experts: how many experts there are here, 1 to 2048 (shared ids count: `config.num_expert_ids`).
      align: each expert's rows start at, and fill up to, a multiple of this.
      expert_map: int32 [number of ids], id -> local expert, -1 for one that is not here (expert parallelism).
      max_rows: M is at most this, a multiple of align: with an expert_map few of so many rows hold a token. Pairs whose
        row would lie behind are dropped, those of the last experts, and groups end there. To notice, compare with the
        sum of the load of the experts here, each rounded up to align; or count `(plan.rows < 0).sum()`, in which are
        the pairs that go elsewhere, too.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      DispatchPlan(rows [T, S], slots [M], group_sizes [num_experts]), all int32. M = T*S for align=1, otherwise
      T*S + num_experts*(align-1) rounded up to a multiple of align; or max_rows where that is less.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: vLLM's moe_permute and moe_align_block_size do this by sorting and by atomics.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> plan = jaxmoe.plan_dispatch(jnp.array([[2, 0], [0, -1]], jnp.int32), 3)
      >>> plan.rows.tolist(), plan.slots.tolist(), plan.group_sizes.tolist()
      ([[2, 0], [1, -1]], [1, 2, 0, -1], [2, 0, 1])
      >>> plan = jaxmoe.plan_dispatch(jnp.array([[2, 0], [0, -1]], jnp.int32), 3, max_rows=2)
      >>> plan.rows.tolist(), plan.slots.tolist(), plan.group_sizes.tolist()
      ([[-1, 0], [1, -1]], [1, 2], [2, 0, 0])
    """
    check_array("experts", experts, ("T", "S"), (jnp.int32,))
    arguments.check_at_least_one("experts", experts, 1)
    num_experts, align, max_rows = as_int(num_experts), as_int(align), as_int(max_rows)
    check_plan_sizes(num_experts, align)
    check_max_rows(max_rows, align)
    check_plan_rows(experts.shape, num_experts, align)
    if expert_map is not None:
        check_array("expert_map", expert_map, ("ids",), (jnp.int32,))
        arguments.check_at_least_one("expert_map", expert_map, 0)
    check_implementation(implementation, experts, expert_map)
    arguments.check_one_device(experts=experts, expert_map=expert_map)
    return DispatchPlan(*_plan_jit((num_experts, align, max_rows, implementation), experts, expert_map))


def move(
    implementation: str | None,
    x: Rows,
    rows: jax.Array,
    slots: jax.Array,
    scale: Any,
    out: Any,
    dtype: Any,
    end: jax.Array | None = None,
) -> jax.Array:
    """dispatch, times `scale` where it is given: forward of dispatch, and the gradient of combine.

    Nobody reads the rows at or past end, int32 [1].
    """

    def xla(x: Rows, rows: jax.Array, slots: jax.Array, scale: Any, out: Any, end: Any) -> jax.Array:
        del out, end
        return reference.dispatch(dense(x), rows, slots, scale, dtype)

    def kernels(
        x: Rows, rows: jax.Array, slots: jax.Array, scale: Any, out: Any, end: Any, *, target: str, interpret: bool
    ) -> jax.Array:
        array, column = base(x)
        return dispatch_kernel(
            array,
            rows,
            slots,
            scale=scale,
            end=end,
            column=column,
            width=x.shape[1],
            out=out,
            dtype=dtype,
            target=target,
            interpret=interpret,
        )

    if 0 in (rows.shape[0], slots.shape[0], x.shape[1]):  # rows that hold no token, if any
        return jnp.zeros((slots.shape[0], x.shape[1]), dtype)
    return run(implementation, kernels, xla, x, rows, slots, scale, out, end, out=4)


def gather(implementation: str | None, x: Rows, rows: jax.Array, weights: Any, out: Any, dtype: Any) -> jax.Array:
    """combine, unweighted where `weights` is None: forward of combine, and the gradient of dispatch."""

    def xla(x: Rows, rows: jax.Array, weights: Any, out: Any) -> jax.Array:
        del out
        return reference.combine(dense(x), rows, weights, dtype)

    def kernels(x: Rows, rows: jax.Array, weights: Any, out: Any, *, target: str, interpret: bool) -> jax.Array:
        array, column = base(x)
        return combine_kernels.combine(
            array,
            rows,
            weights,
            column=column,
            width=x.shape[1],
            out=out,
            dtype=dtype,
            target=target,
            interpret=interpret,
        )

    if 0 in (rows.shape[0], *x.shape):
        return jnp.zeros((rows.shape[0], x.shape[1]), dtype)
    return run(implementation, kernels, xla, x, rows, weights, out, out=3)


def _no_gradient(x: jax.Array) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(implementation: str | None, x: Rows, rows: jax.Array, slots: jax.Array, out: Any) -> jax.Array:
    return move(implementation, x, rows, slots, None, out, x.dtype)


def _dispatch_fwd(
    implementation: str | None, x: Rows, rows: jax.Array, slots: jax.Array, out: Any
) -> tuple[jax.Array, Any]:
    like = x if isinstance(x, arguments.Columns) else None
    return move(implementation, x, rows, slots, None, out, x.dtype), (like, rows, slots)


def _dispatch_bwd(implementation: str | None, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    like, rows, slots = saved
    dx = gather(implementation, grad, rows, None, None, grad.dtype)
    return dx if like is None else like_rows(like, dx), _no_gradient(rows), _no_gradient(slots), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)
_dispatch_jit = compiled(_dispatch, out=4)


def check_plan(plan: Any) -> None:
    """Raises ValueError unless `plan` is a DispatchPlan of arrays as `plan_dispatch` returns them."""
    if not isinstance(plan, DispatchPlan):
        raise ValueError(f"plan: expected a DispatchPlan, got {type(plan).__name__}")
    check_array("plan.rows", plan.rows, ("T", "S"), (jnp.int32,))
    check_array("plan.slots", plan.slots, ("M",), (jnp.int32,))
    check_array("plan.group_sizes", plan.group_sizes, ("num_experts",), (jnp.int32,))


def dispatch(
    x: Rows, plan: DispatchPlan, *, out: jax.Array | None = None, implementation: str | None = None
) -> jax.Array:
    """Copies tokens into expert order: row plan.rows[t, j] of the result is x[t].

    Args:
      x: [T, H] bfloat16, float16 or float32, or a `Columns` view.
      plan: what `plan_dispatch` returned.
      out: [M, H] of x's dtype to write into: donated, and deleted as JAX does with what is donated.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      [M, H] in x's dtype; rows that hold no token are zero. Differentiable in x: the gradient is a sum over the token's
      rows, gathered (no scatter-add), in float32.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> plan = jaxmoe.plan_dispatch(jnp.array([[1], [0]], jnp.int32), 2)
      >>> jaxmoe.dispatch(jnp.array([[1.0], [2.0]]), plan).tolist()
      [[2.0], [1.0]]
    """
    check_plan(plan)
    check_array("x", x, (plan.rows.shape[0], "H"), columns=True)
    if out is not None:
        check_array("out", out, (plan.slots.shape[0], x.shape[1]), (x.dtype,))
        arguments.check_out(out, [x, *plan])
    check_implementation(implementation, x, plan)
    arguments.check_one_device(x=x, plan=plan, out=out)
    return _dispatch_jit(implementation, x, plan.rows, plan.slots, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(
    implementation: str | None, x: Rows, rows: jax.Array, slots: jax.Array, weights: jax.Array, out: Any
) -> jax.Array:
    return gather(implementation, x, rows, weights, out, x.dtype)


def _combine_fwd(
    implementation: str | None, x: Rows, rows: jax.Array, slots: jax.Array, weights: jax.Array, out: Any
) -> tuple[jax.Array, Any]:
    return gather(implementation, x, rows, weights, out, x.dtype), (x, rows, slots, weights)


def _combine_bwd(implementation: str | None, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    x, rows, slots, weights = saved

    def xla(x: Rows, grad: jax.Array, rows: jax.Array) -> jax.Array:
        return reference.combine_weight_grad(dense(x), grad, rows).astype(weights.dtype)

    def kernels(x: Rows, grad: jax.Array, rows: jax.Array, *, target: str, interpret: bool) -> jax.Array:
        array, column = base(x)
        return combine_kernels.combine_weight_grad(
            array, grad, rows, column=column, dtype=weights.dtype, target=target, interpret=interpret
        )

    dx = like_rows(x, move(implementation, grad, rows, slots, weights, None, x.dtype))
    if 0 in (rows.shape[0], *x.shape):
        dweights = jnp.zeros_like(weights)
    else:
        dweights = run(implementation, kernels, xla, x, grad, rows)
    return dx, _no_gradient(rows), _no_gradient(slots), dweights, None


_combine.defvjp(_combine_fwd, _combine_bwd)
_combine_jit = compiled(_combine, out=5)


def combine(
    rows: Rows,
    plan: DispatchPlan,
    weights: jax.Array,
    *,
    out: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Brings the experts' rows back to their tokens: y[t] = sum over slots j of weights[t, j] * rows[plan.rows[t, j]].

    Args:
      rows: [M, H] bfloat16, float16 or float32, or a `Columns` view.
      plan: what `plan_dispatch` returned.
      weights: [T, S] of any float dtype. A dropped pair adds nothing, whatever its weight.
      out: [T, H] of rows' dtype to write into: donated, and deleted as JAX does with what is donated.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      [T, H] in rows' dtype; summed over j = 0, 1, ..., S-1 in that order, in float32. Differentiable in rows and in
      weights.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> plan = jaxmoe.plan_dispatch(jnp.array([[1, 0]], jnp.int32), 2)
      >>> jaxmoe.combine(jnp.array([[10.0], [1.0]]), plan, jnp.array([[0.25, 0.5]])).tolist()
      [[5.25]]
    """
    check_plan(plan)
    check_array("rows", rows, (plan.slots.shape[0], "H"), columns=True)
    check_array("weights", weights, plan.rows.shape)
    if out is not None:
        check_array("out", out, (plan.rows.shape[0], rows.shape[1]), (rows.dtype,))
        arguments.check_out(out, [rows, weights, *plan])
    check_implementation(implementation, rows, plan, weights)
    arguments.check_one_device(rows=rows, plan=plan, weights=weights, out=out)
    return _combine_jit(implementation, rows, plan.rows, plan.slots, weights, out)
