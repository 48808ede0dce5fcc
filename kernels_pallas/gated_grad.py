"""The gradient of the gated activation between the experts' two products, for every row in one launch.

From gate and up, as the forward pass kept them, and the gradient of hidden = activation(gate) * up come the gradients
of both, written over them, and hidden itself, which the gradient of the second product needs and nobody keeps.

With a scale for every row, its weight in the layer, both are those of scale * hidden; and hidden . grad, the gradient
of the scale, comes with them: it is the same as the row of the experts' result times the gradient of the layer's, but
shorter, and asks nobody to keep that row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.activation import ACTIVATIONS, SLOPES
from kernels_pallas.launch import iota, launch, load, next_power_of_2, store


@dataclass(frozen=True)
class Config:
    columns: int  # of one step
    num_warps: int


def config_for(width: int, dtype: Any, target: str) -> Config:
    """Which tile to use for rows of this width on this target ("cuda" or "rocm")."""
    del target
    columns = min(next_power_of_2(width), 4096 // jnp.dtype(dtype).itemsize)
    return Config(columns=columns, num_warps=max(1, min(8, columns // 256)))


def _kernel(*refs: Any, config: Config, width: int, activation: str, scaled: bool, has_end: bool) -> None:
    kept_ref, grad_ref, *rest = refs
    scale_ref = rest.pop(0) if scaled else None
    end_ref = rest.pop(0) if has_end else None
    dkept_ref, hidden_ref, *dots_ref = rest
    row = pl.program_id(0)

    def step(i: jax.Array, total: jax.Array, scale: Any) -> jax.Array:
        column = i * config.columns + iota((config.columns,), 0)
        inside = column < width
        read = lambda ref, at: load(ref.at[row, at], mask=inside, other=0.0).astype(jnp.float32)
        # All that is read lies in registers before any of it is written over.
        gate, up, grad = read(kept_ref, column), read(kept_ref, width + column), read(grad_ref, column)
        activated = ACTIVATIONS[activation](gate)
        dhidden = scale * grad
        put = lambda ref, at, value: store(ref.at[row, at], value.astype(ref.dtype), mask=inside)
        put(dkept_ref, column, dhidden * up * SLOPES[activation](gate))
        put(dkept_ref, width + column, dhidden * activated)
        put(hidden_ref, column, scale * (activated * up))
        return total + activated * up * grad

    def compute() -> None:
        scaled_step = functools.partial(step, scale=1.0 if scale_ref is None else scale_ref[row])
        zeros = jnp.zeros((config.columns,), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(width, config.columns), scaled_step, zeros)
        if dots_ref:
            dots_ref[0][row] = jnp.sum(total, axis=0)

    if end_ref is None:
        compute()
    else:
        pl.when(row < end_ref[0])(compute)


def gated_grad(
    kept: jax.Array,
    grad: jax.Array,
    scale: jax.Array | None,
    end: jax.Array | None = None,
    *,
    activation: str,
    config: Config | None = None,
    target: str = "cuda",
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """(dkept [M, 2 * I], hidden [M, I]) in kept's dtype and, with a scale, float32 [M]: hidden . grad before scaling.

    kept [M, 2 * I], gate and up side by side, whose buffer dkept takes over; grad [M, I]; scale float32 [M] or None.
    end int32 [1] or None: rows at or past it are neither read nor written.
    (The native path may have hidden lie over grad, too: a place is read before it is written.)
    Sides of at least one.
    """
    num_rows, width = grad.shape
    config = config or config_for(width, kept.dtype, target)
    args = [kept, grad, *([] if scale is None else [scale]), *([] if end is None else [end])]
    out_shape = [jax.ShapeDtypeStruct(kept.shape, kept.dtype), jax.ShapeDtypeStruct(grad.shape, kept.dtype)]
    if scale is not None:
        out_shape.append(jax.ShapeDtypeStruct((num_rows,), jnp.float32))
    return launch(
        functools.partial(
            _kernel,
            config=config,
            width=width,
            activation=activation,
            scaled=scale is not None,
            has_end=end is not None,
        ),
        *args,
        name="gated_grad",
        grid=(num_rows,),
        out_shape=out_shape,
        num_warps=config.num_warps,
        aliases={0: 0},
        interpret=interpret,
    )
