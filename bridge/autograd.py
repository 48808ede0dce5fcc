"""Gradients: torch's autograd over the derivatives that jaxmoe's functions have.

JAX sets up and compiles a derivative once for each function, options and shapes. What the backward pass needs of a
call's inputs and results is saved as torch saves tensors: the memory is shared, and torch notices where one is written
to in between. What else it needs is saved as views of JAX's memory, which goes when the backward pass has run.
Gradients are views too, with one exception: autograd may hand over a gradient that is no dense array, as the expanded
scalar that `sum` leaves, and that is made dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from bridge.views import export_array, import_laid, import_leaf, import_tensor, layout_of, made_dense
from jaxmoe.arguments import base, dense
from jaxmoe.implementation import check_implementation

Compiled = tuple[Callable[..., Any], Callable[..., Any]]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Known:
    """Stands in a pytree for a value that is at hand elsewhere, by its index there."""

    index: int


def _is_known(value: Any) -> bool:
    return isinstance(value, Known)


def _fill(tree: Any, values: Any) -> Any:
    return jax.tree.map(lambda v: values[v.index] if _is_known(v) else v, tree, is_leaf=_is_known)


@functools.cache
def _compile(
    function: Callable[..., Any], structure: Any, options: frozenset[Any], wanted: tuple[int, ...]
) -> Compiled:
    """The function, and its derivative with respect to the leaves `wanted`.

    Returns:
      forward(leaves) -> (results, what the derivative needs); backward(that, values it knows, gradients) -> gradients.
    """

    def forward(leaves: list[Any]) -> tuple[Any, Any]:
        def run(*chosen: Any) -> tuple[list[jax.Array], Any]:
            full = dict(enumerate(leaves)) | dict(zip(wanted, chosen, strict=True))
            results, results_structure = jax.tree.flatten(
                function(**jax.tree.unflatten(structure, full.values()), **dict(options))
            )
            floats = [i for i, leaf in enumerate(results) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            rest = [Known(floats.index(i)) if i in floats else leaf for i, leaf in enumerate(results)]
            return [results[i] for i in floats], jax.tree.unflatten(results_structure, rest)

        floats, pull, rest = jax.vjp(run, *(leaves[i] for i in wanted), has_aux=True)
        results = _fill(rest, floats)
        known = [base(leaf)[0] for leaf in [*leaves, *jax.tree.leaves(results)]]
        # What a compiled function returns is a buffer of its own: an input among it would be copied.
        known_as = {id(leaf): Known(i) for i, leaf in enumerate(known) if leaf.ndim}
        return results, jax.tree.map(lambda value: known_as.get(id(value), value), pull)

    def backward(pull: Any, known: dict[int, Any], gradients: list[jax.Array]) -> list[jax.Array]:
        pull = _fill(pull, {i: base(leaf)[0] for i, leaf in known.items()})
        return [dense(gradient) for gradient in pull(gradients)]

    return jax.jit(forward), jax.jit(backward)


def run(
    function: Callable[..., Any],
    structure: Any,
    options: dict[str, Any],
    named: list[tuple[str, Any]],
    strided: Sequence[str],
    wanted: tuple[int, ...],
) -> Any:
    """The function on views of the named leaves, with a gradient to those that are `wanted`."""
    for name, value in options.items():
        if value.__hash__ is None:
            raise ValueError(f"{name}: expected a hashable value, got {type(value).__name__}")
    compiled = _compile(function, structure, frozenset(options.items()), wanted)
    check = functools.partial(check_implementation, options.get("implementation"))
    how = [(name, name in strided) for name, _ in named]
    # Autograd must not count on a gradient of what gets none.
    spared = lambda i, leaf: isinstance(leaf, torch.Tensor) and i not in wanted
    leaves = [leaf.detach() if spared(i, leaf) else leaf for i, (_, leaf) in enumerate(named)]
    results_structure, *results = _Function.apply(compiled, check, how, wanted, *leaves)
    return jax.tree.unflatten(results_structure, results)


FIRST_ALONE = "jaxmoe: expected a first derivative; through torch a gradient has none itself"


class _Gradients(torch.autograd.Function):
    """Hands gradients on, and says so where one asks for theirs."""

    @staticmethod
    def forward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(FIRST_ALONE)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for several at once."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Around a backward pass without a derivative: a second derivative is an error, not a number that leaves it out.

    torch's `once_differentiable` lets it pass where no incoming gradient has a graph, though what was saved may.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # no create_graph
            return results
        if any(isinstance(gradient, torch.Tensor) and is_batched(gradient) for gradient in gradients):
            raise RuntimeError(FIRST_ALONE)  # is_grads_batched: these cannot be marked
        several = results if isinstance(results, tuple) else (results,)
        tensors = [result for result in several if isinstance(result, torch.Tensor)]
        marked = iter(_Gradients.apply(*(tensor.detach().requires_grad_() for tensor in tensors)))
        several = tuple(next(marked) if isinstance(result, torch.Tensor) else result for result in several)
        return several if isinstance(results, tuple) else several[0]

    return run


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compiled: Compiled,
        check: Callable[..., None],
        how: list[tuple[str, bool]],
        wanted: tuple[int, ...],
        *leaves: Any,
    ) -> tuple[Any, ...]:
        forward, ctx.backward_of = compiled
        arrays = [import_leaf(name, leaf, strided) for (name, strided), leaf in zip(how, leaves, strict=True)]
        check(*arrays)  # jaxmoe will see tracers, which lie nowhere
        answer, pull = forward(arrays)
        answer, structure = jax.tree.flatten(answer)
        results = [export_array(array) for array in answer]
        known = dict(enumerate([*leaves, *results]))
        used = [value.index for value in jax.tree.leaves(pull, is_leaf=_is_known) if _is_known(value)]
        ctx.used = list(dict.fromkeys(used))
        kept, ctx.pull = jax.tree.flatten(pull)
        ctx.save_for_backward(*(known[i] for i in ctx.used), *map(export_array, kept))
        ctx.layouts = {i: layout_of(arrays[i]) for i in ctx.used if i < len(arrays)}
        ctx.names = [name for name, _ in how] + ["result"] * len(results)
        ctx.wanted, ctx.num_leaves = wanted, len(leaves)
        ctx.floats = [i for i, result in enumerate(results) if result.is_floating_point()]
        return structure, *results

    @staticmethod
    @once
    def backward(ctx: Any, _: None, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if any(map(is_batched, gradients)):
            raise ValueError(
                "gradient: expected one, got a batch of them, which JAX cannot view (is_grads_batched, "
                "jacobian(vectorize=True)); ask for one at a time"
            )
        saved = iter(ctx.saved_tensors)  # which hooks may have moved (torch.autograd.graph.saved_tensors_hooks)
        known = {i: import_laid(ctx.names[i], next(saved), ctx.layouts.get(i)) for i in ctx.used}
        pull = jax.tree.unflatten(ctx.pull, [import_tensor("saved", made_dense(tensor)) for tensor in saved])
        arrays = [import_tensor("gradient", made_dense(gradients[i])) for i in ctx.floats]
        results = dict(zip(ctx.wanted, map(export_array, ctx.backward_of(pull, known, arrays)), strict=True))
        return None, None, None, None, *(results.get(i) for i in range(ctx.num_leaves))
