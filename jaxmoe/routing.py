"""Routing: logits to weights, expert ids and load; the router's matrix product; the bias update."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import arguments, reference
from jaxmoe.arguments import Rows, base, check_array, dense
from jaxmoe.config import RoutingConfig, as_int, rule_for
from jaxmoe.implementation import check_implementation, compiled, run
from kernels_pallas.count import count_load
from kernels_pallas.route import route as route_kernel
from kernels_pallas.route_grad import route_grad
from kernels_pallas.router_logits import router_logits as router_logits_kernel
from kernels_pallas.router_logits_grad import router_logits_grad_weight as grad_weight_kernel
from kernels_pallas.router_logits_grad import router_logits_grad_x as grad_x_kernel
from kernels_pallas.rule import Rule


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      weights: float32 [T, S], S = top_k + n_shared_experts.
      experts: int32 [T, S], -1 for a token that is not valid.
      load: int32 [num_expert_ids], how many valid (token, slot) pairs chose each id; None where it was not asked for.
    """

    weights: jax.Array
    experts: jax.Array
    load: jax.Array | None


def _forward(
    static: tuple[Rule, bool, str | None], logits: Rows, bias: Any, valid: Any, out: tuple[jax.Array, ...] | None
) -> tuple[jax.Array, ...]:
    rule, return_load, implementation = static
    valid = None if valid is None else jnp.reshape(valid, (1,))

    def xla(logits: Rows, bias: Any, valid: Any, out: Any) -> tuple[jax.Array, ...]:
        del out  # the jit boundary donates it
        weights, experts = reference.route(dense(logits), bias, valid, rule)
        return (weights, experts, reference.load(experts, rule.num_ids)) if return_load else (weights, experts)

    def kernels(
        logits: Rows, bias: Any, valid: Any, out: Any, *, target: str, interpret: bool
    ) -> tuple[jax.Array, ...]:
        array, column = base(logits)
        if array.shape[0] == 0:
            return xla(logits, bias, valid, out)
        results = route_kernel(
            array,
            bias,
            valid,
            rule=rule,
            column=column,
            clear_load=return_load,
            out=out,
            target=target,
            interpret=interpret,
        )
        if not return_load:
            return results
        return *results[:2], count_load(results[1], results[2], target=target, interpret=interpret)

    return run(implementation, kernels, xla, logits, bias, valid, out, out=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(static: Any, logits: Rows, bias: Any, valid: Any, out: Any) -> tuple[jax.Array, ...]:
    return _forward(static, logits, bias, valid, out)


def _route_fwd(static: Any, logits: Rows, bias: Any, valid: Any, out: Any) -> tuple[Any, Any]:
    results = _forward(static, logits, bias, valid, out)
    return results, (logits, results[1])


def _route_bwd(static: Any, saved: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    rule, _, implementation = static
    logits, experts = saved

    def xla(logits: Rows, experts: jax.Array, grad: jax.Array) -> jax.Array:
        return reference.route_grad(dense(logits), experts, grad, rule)

    def kernels(logits: Rows, experts: jax.Array, grad: jax.Array, *, target: str, interpret: bool) -> jax.Array:
        del target
        array, column = base(logits)
        if array.shape[0] == 0:
            return xla(logits, experts, grad)
        return route_grad(array, experts, grad, rule=rule, column=column, interpret=interpret)

    return like_rows(logits, run(implementation, kernels, xla, logits, experts, cotangents[0])), None, None, None


def like_rows(x: Rows, grad: jax.Array) -> Rows:
    """The gradient [T, width] of x as a gradient of what x is: zero in the columns that a view leaves out."""
    if not isinstance(x, arguments.Columns):
        return grad
    after = x.array.shape[1] - x.first - x.width
    return arguments.Columns(jnp.pad(grad, ((0, 0), (x.first, after))), x.first, x.width)


_route.defvjp(_route_fwd, _route_bwd)

_route_jit = compiled(_route, out=4)


def route(
    logits: Rows,
    bias: jax.Array | None = None,
    *,
    config: RoutingConfig,
    num_valid_tokens: int | jax.Array | None = None,
    return_load: bool = True,
    out: Routing | tuple[Any, ...] | None = None,
    implementation: str | None = None,
) -> Routing:
    """Routes tokens to experts: biased grouped top-k, weights and load counts.

    For each token, with float32 arithmetic whatever the dtypes: score = f(logits); choice = score + bias; the best
    `topk_group` groups stay, by the sum of their two largest choices or by their largest; of the experts left the best
    `top_k` by choice are taken, in falling order; weight = score, without the bias, divided by the token's sum if
    renormalised (as exact arithmetic would, without an epsilon), times the scaling factor. Every tie, of groups and of
    experts, goes to the lower index; a NaN choice ranks below every number. Shared experts fill the last slots.

    The ids of a valid token are distinct and in range for every input, NaN and infinity included. A token's result does
    not depend on the other tokens. The weights have a gradient with respect to the logits; the bias has none.

    Args:
      logits: [T, E] bfloat16, float16 or float32, or a `Columns` view. T may be 0.
      bias: [E] of any float dtype, read as it is; None for none.
      config: what to do; `RoutingConfig` or one of `jaxmoe.presets`.
      num_valid_tokens: tokens at or past this index get ids -1, weights 0, and are not counted. An int, or an int32
        scalar on the device. None: all are valid.
      return_load: False leaves `load` out (None): then routing is one kernel, otherwise two.
      out: (weights, experts, load) to write into: donated, and deleted as JAX does with what is donated.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      Routing(weights float32 [T, S], experts int32 [T, S], load int32 [num_expert_ids]), S = top_k + n_shared_experts.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; DeepSeek-V2, arXiv:2405.04434, for groups by maximum.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=4, top_k=2, scoring_func="softmax")
      >>> routing = jaxmoe.route(jnp.array([[0.0, 2.0, 1.0, 2.0]]), config=config)
      >>> routing.experts.tolist(), routing.weights.round(5).tolist(), routing.load.tolist()
      ([[1, 3]], [[0.5, 0.5]], [0, 1, 0, 1])
    """
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    if not isinstance(return_load, bool):
        raise ValueError(f"return_load: expected a bool, got {return_load!r}")
    check_array("logits", logits, ("T", config.num_experts), columns=True)
    if bias is not None:
        check_array("bias", bias, (config.num_experts,))
    num_tokens = logits.shape[0]
    valid = None
    if num_valid_tokens is not None:
        valid = _check_num_valid(num_valid_tokens, num_tokens)
    if out is not None:
        out = _check_out(out, num_tokens, config, return_load)
        arguments.check_out(out, [logits, bias, valid])
    check_implementation(implementation, logits, bias)
    arguments.check_one_device(logits=logits, bias=bias, num_valid_tokens=num_valid_tokens, out=out)
    static = (rule_for(config, bias is not None), return_load, implementation)
    results = _route_jit(static, logits, bias, valid, out)
    return Routing(results[0], results[1], results[2] if return_load else None)


def _check_num_valid(value: Any, num_tokens: int) -> jax.Array | np.int32:
    """num_valid_tokens as an int32 scalar."""
    value = as_int(value)
    if type(value) is int:
        if not 0 <= value <= num_tokens:
            raise ValueError(f"num_valid_tokens: expected 0 to T={num_tokens}, got {value}")
        return np.int32(value)
    if getattr(value, "weak_type", False) and value.dtype == jnp.int64:  # a Python int that came through jit, under x64
        value = jnp.clip(value, 0, num_tokens).astype(jnp.int32)
    check_array("num_valid_tokens", value, (), (jnp.int32,))
    return value


def _check_out(out: Any, num_tokens: int, config: RoutingConfig, return_load: bool) -> tuple[jax.Array, ...]:
    if not isinstance(out, tuple) or len(out) != 3 or (out[2] is not None) != return_load:
        wanted = "(weights, experts, load)" if return_load else "(weights, experts, None)"
        got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
        raise ValueError(f"out: expected a Routing or tuple {wanted}, got {got}")
    shape = (num_tokens, config.num_slots)
    check_array("out.weights", out[0], shape, (jnp.float32,))
    check_array("out.experts", out[1], shape, (jnp.int32,))
    if return_load:
        check_array("out.load", out[2], (config.num_expert_ids,), (jnp.int32,))
        return tuple(out)
    return tuple(out[:2])


def _router_logits_forward(static: str | None, x: Rows, weight: jax.Array) -> jax.Array:
    def xla(x: Rows, weight: jax.Array) -> jax.Array:
        return reference.router_logits(dense(x), weight)

    def kernels(x: Rows, weight: jax.Array, *, target: str, interpret: bool) -> jax.Array:
        array, column = base(x)
        if array.shape[0] == 0:
            return xla(x, weight)
        return router_logits_kernel(array, weight, column=column, target=target, interpret=interpret)

    return run(static, kernels, xla, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _router_logits(static: str | None, x: Rows, weight: jax.Array) -> jax.Array:
    return _router_logits_forward(static, x, weight)


def _router_logits_fwd(static: str | None, x: Rows, weight: jax.Array) -> tuple[jax.Array, Any]:
    return _router_logits(static, x, weight), (x, weight)  # by name, so that it can be derived once more


def _router_logits_grad_pass(
    static: str | None, grad: jax.Array, x: Rows, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:

    def xla(grad: jax.Array, x: Rows, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return reference.router_logits_grad(grad, dense(x), weight)

    def kernels(
        grad: jax.Array, x: Rows, weight: jax.Array, *, target: str, interpret: bool
    ) -> tuple[jax.Array, jax.Array]:
        array, column = base(x)
        if array.shape[0] == 0:
            return xla(grad, x, weight)
        how: dict[str, Any] = {"target": target, "interpret": interpret}
        dx = grad_x_kernel(grad, weight, dtype=array.dtype, **how)
        view: dict[str, Any] = {"column": column, "width": weight.shape[1]}
        return dx, grad_weight_kernel(grad, array, dtype=weight.dtype, **view, **how)

    return run(static, kernels, xla, grad, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _router_logits_grad(static: str | None, grad: jax.Array, x: Rows, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(grad @ weight, grad.T @ x): the gradients of x and weight; of a view of columns that of what it shows."""
    return _router_logits_grad_pass(static, grad, x, weight)


def _router_logits_grad_fwd(static: str | None, grad: jax.Array, x: Rows, weight: jax.Array) -> tuple[Any, Any]:
    return _router_logits_grad(static, grad, x, weight), (grad, x, weight)


def _router_logits_grad_bwd(static: str | None, saved: Any, up: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """Products of the same kinds, so that it has derivatives of any order."""
    grad, x, weight = saved
    dx, dweight = _router_logits_grad(static, grad, *up)
    return _router_logits(static, up[0], weight) + _router_logits(static, x, up[1]), like_rows(x, dx), dweight


_router_logits_grad.defvjp(_router_logits_grad_fwd, _router_logits_grad_bwd)


def _router_logits_bwd(static: str | None, saved: Any, grad: jax.Array) -> tuple[Any, Any]:
    x, weight = saved
    dx, dweight = _router_logits_grad(static, grad, x, weight)
    return like_rows(x, dx), dweight


_router_logits.defvjp(_router_logits_fwd, _router_logits_bwd)
_router_logits_jit = compiled(_router_logits)


def router_logits(x: Rows, weight: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """The router's matrix product, x @ weight.T, accumulated and returned in float32.

    The kernel reads both operands in the dtypes they are stored in: a float32 router weight next to bfloat16
    activations costs no cast in memory (on "xla" that is XLA's affair). Products of two equal 16-bit dtypes run on
    tensor cores, and so do those of bfloat16 and float32, exactly: a float32 number goes as the three bfloat16 numbers
    whose sum it is (an infinity may so become NaN, in the gradients too). Every other pair is multiplied in float32
    without them.

    A token's logits are the same bit for bit on every run and whatever the other tokens hold; how many there are
    decides in which order a sum is taken.

    Args:
      x: [T, H] bfloat16, float16 or float32, or a `Columns` view. T may be 0.
      weight: [E, H] bfloat16, float16 or float32.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".

    Returns:
      float32 [T, E].

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: the gate of DeepSeek-V3's published inference code (arXiv:2412.19437), kept in float32.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> jaxmoe.router_logits(jnp.ones((1, 3), jnp.bfloat16), jnp.array([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]])).tolist()
      [[6.0, 0.5]]
    """
    check_array("x", x, ("T", "H"), columns=True)
    check_array("weight", weight, ("E", x.shape[1]))
    for axis in (0, 1):
        arguments.check_at_least_one("weight", weight, axis)
    check_implementation(implementation, x, weight)
    arguments.check_one_device(x=x, weight=weight)
    return _router_logits_jit(implementation, x, weight)


@jax.jit
def _update_bias(bias: jax.Array, load: jax.Array, rate: jax.Array) -> jax.Array:
    routed = load[: bias.shape[0]]
    # In integers: a rounded mean would move the bias of a load that is perfectly even. Divided first, load by load:
    # the sum itself may pass 2**31; that of the quotients is at most the mean, that of what is left below E**2.
    experts = jnp.int32(bias.shape[0])
    each, left = jnp.divmod(routed, experts)
    more, rest = jnp.divmod(jnp.sum(left, dtype=jnp.int32), experts)
    mean = jnp.sum(each, dtype=jnp.int32) + more
    sign = jnp.where(routed == mean, jnp.sign(rest), jnp.sign(mean - routed))
    return (bias.astype(jnp.float32) + rate * sign.astype(jnp.float32)).astype(bias.dtype)


def update_bias(bias: jax.Array, load: jax.Array, *, rate: float | jax.Array) -> jax.Array:
    """The auxiliary-loss-free balancing step: experts above the mean load lose `rate` of bias, those below gain it.

    Args:
      bias: [E] of any float dtype. Keep it in float32: bfloat16 cannot hold steps of 0.001 next to values near 1.
      load: int32 [at least E], as `route` returns it; shared experts, behind the first E, are left out of the mean.
      rate: the size of a step; DeepSeek-V3 trained with 0.001.

    Returns:
      bias + rate * sign(mean(load) - load), in bias's dtype.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> jaxmoe.update_bias(jnp.zeros(3), jnp.array([4, 1, 1], jnp.int32), rate=0.5).tolist()
      [-0.5, 0.5, 0.5]
    """
    check_array("bias", bias, ("E",))
    check_array("load", load, ("E",), (jnp.int32,))
    if load.shape[0] < bias.shape[0]:
        raise ValueError(f"load: expected at least the {bias.shape[0]} routed experts of bias, got {load.shape[0]}")
    if not isinstance(rate, (int, float)):
        check_array("rate", rate, ())
    arguments.check_one_device(bias=bias, load=load, rate=rate)
    return _update_bias(bias, load, rate)
