"""Grouped matmul: each expert's rows times its weight; what `experts` and its gradients are made of."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import arguments, reference
from jaxmoe.arguments import check_array
from jaxmoe.config import as_int
from jaxmoe.dispatch import check_align
from jaxmoe.implementation import check_implementation, compiled, run
from kernels_pallas import grouped_matmul_grad_hopper as outer_hopper
from kernels_pallas import grouped_matmul_hopper as matmul_hopper
from kernels_pallas import hopper
from kernels_pallas.grouped_matmul import grouped_matmul as matmul_kernel
from kernels_pallas.grouped_matmul_grad import grouped_outer as outer_kernel
from kernels_pallas.plan_dispatch import num_rows as plan_rows


class Groups(NamedTuple):
    """What is known of groups of rows when a product of them is compiled.

    Attributes:
      align: their sizes are multiples of this.
      expected: how many rows they have together, about; None: nearly all there are. It decides about tiles alone.
      clear: whether somebody reads the rows behind the last group, which are zeros then.
    """

    align: int = 1
    expected: int | None = None
    clear: bool = True


ANY = Groups()


def alignment(
    implementation: str | None, *, num_rows: int, num_experts: int, width: int, inner: int, dtype: Any
) -> int:
    """What the rows of each expert should begin at a multiple of, for the products and gradients of a layer's experts.

    64 where this machine's GPUs are Hopper's and both weights' gradients have tiles, which then take groups as they
    are: also for a forward pass alone, which may be followed by the other. With fewer rows that costs the forward pass
    more than it saves. num_rows: how many hold tokens, about.
    """
    if implementation in ("xla", "interpret") or num_rows < 512 * num_experts or not hopper.multiprocessors():
        return 1
    rows = plan_rows(num_rows, num_experts, hopper.BLOCK)
    find = functools.partial(outer_hopper.config_for, rows, num_experts, dtype=dtype)
    return hopper.BLOCK if find(left=width, right=2 * inner) and find(left=inner, right=width) else 1


def _programs(target: str, interpret: bool) -> int:
    """Those of a kernel for Hopper, if there is such a GPU, else 0."""
    return hopper.multiprocessors() if target == "cuda" and not interpret else 0


def _product_kernels(
    rows: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool,
    groups: Groups,
    target: str,
    interpret: bool,
) -> jax.Array:
    """By the copy engine on a Hopper GPU, of groups that are blocks, where there is a tile for them, else Triton's."""
    how: dict[str, Any] = {"transposed": transposed, "clear": groups.clear}
    (num_rows, depth), num_experts, width = rows.shape, weight.shape[0], weight.shape[1 if transposed else 2]
    programs = _programs(target, interpret)
    if programs and groups.align % hopper.BLOCK == 0:  # for groups that begin anywhere there is none
        tile = matmul_hopper.config_for(num_rows, num_experts, depth, width, rows.dtype, groups.expected)
        if tile:
            return matmul_hopper.grouped_matmul(rows, weight, group_sizes, **how, programs=programs, config=tile)
    return matmul_kernel(rows, weight, group_sizes, **how, expected=groups.expected, target=target, interpret=interpret)


def product(
    implementation: str | None,
    rows: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool,
    groups: Groups = ANY,
) -> jax.Array:
    """[M, N]: grouped_matmul without its derivative."""
    num_rows, width = rows.shape[0], weight.shape[1 if transposed else 2]
    if 0 in (*rows.shape, width):
        return jnp.zeros((num_rows, width), rows.dtype)
    kernels = functools.partial(_product_kernels, transposed=transposed, groups=groups)
    plain = functools.partial(reference.grouped_matmul, transposed=transposed)
    return run(implementation, kernels, plain, rows, weight, group_sizes)


def _outer_kernels(
    a: jax.Array, b: jax.Array, group_sizes: jax.Array, *, groups: Groups, target: str, interpret: bool
) -> jax.Array:
    """By the copy engine on a Hopper GPU where there is a tile for these shapes, else Triton's."""
    (num_rows, left), right, num_experts = a.shape, b.shape[1], group_sizes.shape[0]
    if programs := _programs(target, interpret):
        tile = outer_hopper.config_for(num_rows, num_experts, left, right, a.dtype, groups.expected)
        if tile:
            aligned = groups.align % hopper.BLOCK == num_rows % hopper.BLOCK == 0
            return outer_hopper.grouped_outer(a, b, group_sizes, programs=programs, aligned=aligned, config=tile)
    return outer_kernel(a, b, group_sizes, expected=groups.expected, target=target, interpret=interpret)


def outer(
    implementation: str | None,
    a: jax.Array,
    b: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool,
    groups: Groups = ANY,
) -> jax.Array:
    """[E, A, B], or [E, B, A] where `transposed`: each expert's a.T @ b, the gradient of a weight."""
    if transposed:
        a, b = b, a
    if 0 in (*a.shape, *b.shape):
        return jnp.zeros((group_sizes.shape[0], a.shape[1], b.shape[1]), a.dtype)
    kernels = functools.partial(_outer_kernels, groups=groups)
    return run(implementation, kernels, reference.grouped_outer, a, b, group_sizes)


def no_gradient(group_sizes: jax.Array) -> Any:
    """The gradient of integers."""
    return np.zeros(group_sizes.shape, jax.dtypes.float0)


_Static = tuple[str | None, bool, Groups]  # implementation, transposed, what is known of the groups


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(static: _Static, rows: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    implementation, transposed, groups = static
    return product(implementation, rows, weight, group_sizes, transposed=transposed, groups=groups)


def _fwd(static: _Static, rows: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _grouped_matmul(static, rows, weight, group_sizes), (rows, weight, group_sizes)


def _bwd(static: _Static, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    (implementation, transposed, groups), (rows, weight, group_sizes) = static, saved
    drows = product(implementation, grad, weight, group_sizes, transposed=not transposed, groups=groups)
    dweight = outer(implementation, rows, grad, group_sizes, transposed=transposed, groups=groups)
    return drows, dweight, no_gradient(group_sizes)


_grouped_matmul.defvjp(_fwd, _bwd)
_grouped_matmul_jit = compiled(_grouped_matmul)


def grouped_matmul(
    rows: jax.Array,
    weight: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    align: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies each group of rows by the weight of its expert: expert e has the next group_sizes[e] rows.

    One kernel, whatever the sizes: a group may be empty, hold all rows, begin and end anywhere. Sums are float32 and
    rounded once; of float32 operands every bit counts (no TF32).

    Args:
      rows: [M, K] bfloat16, float16 or float32, in expert order, as `dispatch` returns them. M may be 0.
      weight: [E, K, N] of rows' dtype; [E, N, K] with `transposed`.
      group_sizes: int32 [E], how many rows each expert has: not negative, their sum at most M.
      transposed: whether each weight lies as N lines of K, as Hugging Face transformers and torch.nn.Linear have it. It
        is read as it lies, never copied.
      align: what group_sizes are multiples of, as a plan with this `align` has them. With multiples of 64, M being one,
        too, Hopper GPUs take the copy engine where there are many rows (docs/limits.md), which is faster. It is taken
        on trust: if it is not so, what comes out there may be anything.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      [M, N] in rows' dtype; rows behind the last group are zero. Differentiable in rows and in weight.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Gale et al., MegaBlocks, arXiv:2211.15841; `jax.lax.ragged_dot` means the same.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> rows, weight = jnp.ones((4, 2)), jnp.array([[[1.0], [2.0]], [[10.0], [20.0]]])
      >>> jaxmoe.grouped_matmul(rows, weight, jnp.array([1, 2], jnp.int32)).tolist()
      [[3.0], [30.0], [30.0], [0.0]]
    """
    if type(transposed) is not bool:
        raise ValueError(f"transposed: expected a bool, got {transposed!r}")
    align = as_int(align)
    check_align(align)
    check_array("rows", rows, ("M", "K"))
    depth = rows.shape[1]
    check_array("weight", weight, ("E", "N", depth) if transposed else ("E", depth, "N"), (rows.dtype,))
    arguments.check_at_least_one("weight", weight, 0)
    check_array("group_sizes", group_sizes, (weight.shape[0],), (jnp.int32,))
    check_implementation(implementation, rows, weight, group_sizes)
    arguments.check_one_device(rows=rows, weight=weight, group_sizes=group_sizes)
    return _grouped_matmul_jit((implementation, transposed, Groups(align)), rows, weight, group_sizes)
