"""The whole Mixture-of-Experts layer, and what lies behind its routing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmoe import arguments
from jaxmoe.arguments import check_array
from jaxmoe.config import MAX_EXPERTS, RoutingConfig, as_int
from jaxmoe.dispatch import check_max_rows, gather, move, plan_dispatch
from jaxmoe.experts import check_activation, gated, gated_grad
from jaxmoe.grouped_matmul import Groups, alignment, no_gradient, outer, product
from jaxmoe.implementation import check_implementation, check_not_sharded, compiled
from jaxmoe.routing import Routing, route, router_logits
from kernels_pallas.plan_dispatch import num_rows as plan_rows


@jax.tree_util.register_dataclass
@dataclass(kw_only=True)
class MoEParams:
    """The parameters of one layer; a pytree.

    Attributes:
      router: [E, H], the router's weight, of any float dtype.
      bias: [E], added to the scores for the choice only; None for none.
      gate_up: [num_expert_ids, H, 2 * I]: the routed experts, then the shared ones (a replica each).
      down: [num_expert_ids, I, H].
    """

    router: jax.Array
    bias: jax.Array | None = None
    gate_up: jax.Array
    down: jax.Array


Static = tuple[str | None, str, Groups]  # implementation, activation, what is known of the plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    static: Static,
    x: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    out: Any,
) -> jax.Array:
    """dispatch, experts, combine: y [T, H]."""
    return _weighted_pass(static, x, rows, slots, group_sizes, weights, gate_up, down, out, keep=False)[0]


def _weighted_pass(static: Static, *args: Any, keep: bool) -> tuple[jax.Array, ...]:
    """(y,) of the arguments of `_weighted`, and with `keep` gate and up of every row."""
    (implementation, activation, groups), (x, rows, slots, group_sizes, weights, gate_up, down, out) = static, args
    plan = rows, slots
    hidden, *kept = gated((implementation, activation, False), x, gate_up, group_sizes, plan, keep=keep, groups=groups)
    each = product(implementation, hidden, down, group_sizes, transposed=False, groups=groups)
    return gather(implementation, each, rows, weights, out, x.dtype), *kept


def weighted_fwd(static: Static, *args: Any) -> tuple[jax.Array, Any]:
    """`_weighted` and what its derivative needs: gate and up of every row, then the arguments but for `out`."""
    y, kept = _weighted_pass(static, *args, keep=True)
    return y, (checkpoint_name(kept, "moe_gate_up"), *args[:-1])


def weighted_bwd(static: Static, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    """The gradients of the arguments, from what `weighted_fwd` kept: of all rows gate and up alone.

    In float16 the gradient of the hidden rows is rounded before a token's weight makes it smaller: it is infinite from
    65504 / weight on, which loss scales have to allow for.

    A weight's gradient, its row of the experts' result . grad, is hidden . (grad @ down.T) too, so that result is not
    needed; and the rows that went in, which the forward pass only gathered, are dispatched now.
    """
    implementation, activation, groups = static
    kept, x, rows, slots, group_sizes, weights, gate_up, down = saved
    # Or XLA, where it dispatches itself, would see that it did so before, and keep them until now.
    x, grad = jax.lax.optimization_barrier((x, grad))
    scale = jnp.zeros(slots.shape, jnp.float32)
    if 0 not in rows.shape:
        scale = jnp.where(slots >= 0, weights.astype(jnp.float32).reshape(-1)[jnp.maximum(slots, 0)], 0.0)
    end = jnp.sum(group_sizes, keepdims=True, dtype=jnp.int32)
    dout = move(implementation, grad, rows, slots, None, None, grad.dtype, end)
    dhidden = product(implementation, dout, down, group_sizes, transposed=True, groups=groups)
    dkept, hidden, dots = gated_grad((implementation, activation, False), kept, dhidden, scale, end)
    ddown = outer(implementation, hidden, dout, group_sizes, transposed=False, groups=groups)
    held = move(implementation, x, rows, slots, None, None, x.dtype, end)
    dgate_up = outer(implementation, held, dkept, group_sizes, transposed=False, groups=groups)
    dheld = product(implementation, dkept, gate_up, group_sizes, transposed=True, groups=groups)
    dx = gather(implementation, dheld, rows, None, None, x.dtype)
    dweights = jnp.zeros_like(weights)
    if 0 not in dots.shape:
        dweights = jnp.where(rows >= 0, dots[jnp.maximum(rows, 0)], 0.0).astype(weights.dtype)
    return dx, *map(no_gradient, (rows, slots, group_sizes)), dweights, dgate_up, ddown, None


_weighted.defvjp(weighted_fwd, weighted_bwd)
weighted_experts = compiled(_weighted, out=8)


def check_number_of_experts(name: str, number: int) -> None:
    """Raises ValueError for more experts than a plan can be made for."""
    if number > 2 * MAX_EXPERTS:
        raise ValueError(f"{name}: expected at most {2 * MAX_EXPERTS} experts, got {number}")


def rows_of(max_rows: Any) -> Any:
    """For how many rows there is memory: a multiple of eight, which all kernels for gradients take. None: for all."""
    return None if max_rows is None else (max_rows + 7) // 8 * 8  # plain arithmetic: torch.compile passes symbols


def expected_rows(num_pairs: int, num_ids: int, num_here: int, max_rows: int | None) -> int:
    """How many of the pairs go to the experts that are here, if all ids are chosen equally often."""
    share = num_pairs if num_here >= num_ids else -(-num_pairs * num_here // num_ids)
    return share if max_rows is None else min(share, max_rows)


def fused_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    expert_map: jax.Array | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
    out: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """What lies behind routing, as one function with one derivative: plan_dispatch, dispatch, experts, combine.

    Tokens are gathered by the first product as it reads them. With an `expert_map` it is a device's part of the layer
    under expert parallelism: the parts of all devices add up to the layer. The kernels neither compute nor read or
    write rows of experts that are elsewhere, but there is memory for them, unless `max_rows` says how much; how the
    work is cut up is chosen as if tokens chose all ids equally often.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      experts: int32 [T, S], the ids that `route` chose; a negative one, or one not below the number of ids, is dropped.
      weights: [T, S] of any float dtype.
      gate_up: [E, H, 2 * I] of x's dtype: the gate and up projections of the experts that are here.
      down: [E, I, H] of x's dtype.
      expert_map: int32 [number of ids], id -> local expert, -1, or a number not below E, for one that is not here.
      max_rows: for how many (token, slot) pairs of experts that are here there is room in what lies between, rounded up
        to a multiple of eight; some devices have room for more. Pairs that do not fit are dropped, those of the last
        experts first, as if their ids were negative: compare it with the load of the experts here. None: for all T * S.
      activation: as for `experts`: "silu", "gelu" (exact) or "gelu_tanh".
      out: [T, H] of x's dtype to write into: donated, and deleted as JAX does with what is donated. (`jax.checkpoint`
        keeps what goes in: under it there has to be a `jax.jit` around.)
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      [T, H] in x's dtype: the sum over a token's slots of weights times expert(x), in float32. Differentiable in x,
      weights, gate_up and down; kept for it is [rows, 2 * I] (see `moe`).

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: vLLM's fused_experts; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> x, ids = jnp.ones((2, 1)), jnp.array([[0, 1], [1, 2]], jnp.int32)
      >>> gate_up, down = jnp.full((1, 1, 2), 20.0), jnp.ones((1, 1, 1))  # of expert 1, which is here
      >>> here = jnp.array([-1, 0, -1], jnp.int32)
      >>> jaxmoe.fused_experts(x, ids, jnp.array([[0.25, 0.75], [1.0, 0.0]]), gate_up, down, expert_map=here).tolist()
      [[300.0], [400.0]]
    """
    check_array("x", x, ("T", "H"))
    check_array("experts", experts, (x.shape[0], "S"), (jnp.int32,))
    check_array("weights", weights, experts.shape)
    check_array("gate_up", gate_up, ("E", x.shape[1], "2 * I"), (x.dtype,))
    arguments.check_at_least_one("gate_up", gate_up, 0)
    check_number_of_experts("gate_up", gate_up.shape[0])
    inner = arguments.half("gate_up", gate_up.shape[2])
    check_array("down", down, (gate_up.shape[0], inner, x.shape[1]), (x.dtype,))
    if expert_map is not None:
        check_array("expert_map", expert_map, ("ids",), (jnp.int32,))
    max_rows = as_int(max_rows)
    check_max_rows(max_rows, 1)
    check_activation(activation)
    if out is not None:
        check_array("out", out, x.shape, (x.dtype,))
        arguments.check_out(out, [x, experts, weights, gate_up, down, expert_map])
    check_implementation(implementation, x, experts, weights, gate_up, down)
    arguments.check_one_device(
        x=x, experts=experts, weights=weights, gate_up=gate_up, down=down, expert_map=expert_map, out=out
    )
    check_not_sharded(x=x, experts=experts, weights=weights, gate_up=gate_up, down=down, expert_map=expert_map)

    num_here, max_rows = gate_up.shape[0], rows_of(max_rows)
    num_ids = num_here if expert_map is None else expert_map.size
    expected = expected_rows(experts.size, num_ids, num_here, max_rows)
    align = alignment(
        implementation, num_rows=expected, num_experts=num_here, width=x.shape[1], inner=inner, dtype=x.dtype
    )
    filled = functools.partial(plan_rows, num_experts=num_here, align=align)  # with what fills groups up
    plan = plan_dispatch(
        experts,
        num_here,
        align=align,
        expert_map=expert_map,
        max_rows=None if max_rows is None else filled(max_rows),
        implementation=implementation,
    )
    # Who looks for NaN would find it in gate and up, which are kept for the backward pass, where nobody wrote them.
    groups = Groups(align, filled(expected), clear=bool(jax.config.jax_debug_nans))  # type: ignore[attr-defined]
    return weighted_experts((implementation, activation, groups), x, *plan, weights, gate_up, down, out)


def moe(
    x: jax.Array,
    params: MoEParams,
    config: RoutingConfig,
    *,
    num_valid_tokens: int | jax.Array | None = None,
    expert_map: jax.Array | None = None,
    max_rows: int | None = None,
    activation: str = "silu",
    out: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Routing]:
    """A Mixture-of-Experts layer: router_logits, route and `fused_experts`.

    Shared experts are slots like any other, so the layer's output is scaling * sum(routed) + sum(shared). (With
    `scale_weights=False` the caller multiplies the output by the scaling factor.) No token is dropped: there is no
    capacity, unless `max_rows` sets one.

    Under expert parallelism, where devices have the same tokens and a part of the experts each, `expert_map` says
    which: the devices' results add up to the layer's (`jax.lax.psum`). Where tokens are spread too, route them where
    they are, gather, and call `fused_experts`.

    Of what lies between the two products the backward pass needs gate and up, [M, 2 * I], and else what came in, the
    plan and the weights. A policy of `jax.checkpoint` knows them as "moe_gate_up", and the router's logits as
    "moe_logits": `save_only_these_names("moe_gate_up", "moe_logits")` does no product again.

    Args:
      x: [T, H] bfloat16, float16 or float32.
      params: `MoEParams`; gate_up and down in x's dtype, with an `expert_map` those of the experts that are here.
      config: how to route.
      num_valid_tokens: tokens at or past this index come out as zeros. (A NaN in their x still reaches the router's
        gradient, through 0 * NaN: clear the padding where you train.)
      expert_map: int32 [num_expert_ids], id -> local expert, -1 for one that is not here.
      max_rows: as for `fused_experts`, with which to compare sums of routing.load.
      activation: as for `experts`: "silu", "gelu" (exact) or "gelu_tanh".
      out: [T, H] of x's dtype to write y into, as for `fused_experts`.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      (y [T, H] in x's dtype, Routing). Differentiable in x and in every parameter but the bias.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=4, top_k=2)
      >>> normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
      >>> params = jaxmoe.MoEParams(router=normal(0, 4, 8), gate_up=normal(1, 4, 8, 6), down=normal(2, 4, 3, 8))
      >>> y, routing = jaxmoe.moe(normal(3, 5, 8), params, config)
      >>> y.shape, int(routing.load.sum())
      ((5, 8), 10)
    """
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    check_array("x", x, ("T", "H"))
    check_array("params.router", params.router, (config.num_experts, x.shape[1]))
    if params.bias is not None:
        check_array("params.bias", params.bias, (config.num_experts,))
    num_here: int | str = config.num_expert_ids
    if expert_map is not None:
        check_array("expert_map", expert_map, (config.num_expert_ids,), (jnp.int32,))
        num_here = "experts here"
    check_array("params.gate_up", params.gate_up, (num_here, x.shape[1], "2 * I"), (x.dtype,))
    arguments.check_at_least_one("params.gate_up", params.gate_up, 0)
    check_number_of_experts("params.gate_up", params.gate_up.shape[0])
    inner = arguments.half("params.gate_up", params.gate_up.shape[2])
    check_array("params.down", params.down, (params.gate_up.shape[0], inner, x.shape[1]), (x.dtype,))
    check_activation(activation)
    if out is not None:
        check_array("out", out, x.shape, (x.dtype,))
        arguments.check_out(out, [x, params, num_valid_tokens, expert_map])
    arguments.check_one_device(x=x, params=params, expert_map=expert_map, out=out)
    check_not_sharded(x=x, params=params)

    logits = checkpoint_name(router_logits(x, params.router, implementation=implementation), "moe_logits")
    routing = route(
        logits, params.bias, config=config, num_valid_tokens=num_valid_tokens, implementation=implementation
    )
    y = fused_experts(
        x,
        routing.experts,
        routing.weights,
        params.gate_up,
        params.down,
        expert_map=expert_map,
        max_rows=max_rows,
        activation=activation,
        out=out,
        implementation=implementation,
    )
    return y, routing
