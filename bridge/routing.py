"""jaxmoe.routing on tensors."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import torch

import jaxmoe
from bridge import path
from bridge.call import call
from bridge.checks import INT32, check, check_gradients_of_out, check_layout
from bridge.ops import layer as layer_ops
from bridge.ops import routing as ops
from jaxmoe import RoutingConfig


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      weights: float32 [T, S], S = top_k + n_shared_experts.
      experts: int32 [T, S], -1 for a token that is not valid.
      load: int32 [num_expert_ids], how many valid (token, slot) pairs chose each id; None where it was not asked for.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    load: torch.Tensor | None


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: RoutingConfig,
    num_valid_tokens: int | torch.Tensor | None = None,
    return_load: bool = True,
    out: Routing | tuple[Any, ...] | None = None,
    implementation: str | None = None,
) -> Routing:
    """Routes tokens to experts: `jaxmoe.route` on tensors.

    Args:
      logits: [T, E] bfloat16, float16 or float32; rows may be strided. T may be 0.
      bias: [E] of any of these dtypes, read as it is; None for none. It gets no gradient.
      config: what to do; `RoutingConfig` or one of `bridge.presets`.
      num_valid_tokens: tokens at or past this index get ids -1, weights 0, and are not counted. An int, or an int32
        tensor without axes on the device. None: all are valid.
      return_load: False leaves `load` out (None).
      out: (weights, experts, load) to write into; the same tensors are returned. On the CPU that is a copy.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      Routing(weights float32 [T, S], experts int32 [T, S], load int32 [num_expert_ids]). The weights have a gradient
      with respect to the logits.

    Raises:
      ValueError: names the argument, what was expected and what came. Nothing has been written then.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; `jaxmoe.route` says what is computed.

    Example:
      >>> import torch, bridge
      >>> config = bridge.RoutingConfig(num_experts=4, top_k=2, scoring_func="softmax")
      >>> out = bridge.Routing(torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32), None)
      >>> routing = bridge.route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), config=config, return_load=False, out=out)
      >>> routing.experts is out.experts, out.experts.tolist(), out.weights.tolist()
      (True, [[1, 3]], [[0.5, 0.5]])
    """
    if path.takes_ops(logits, implementation):
        return _route(logits, bias, config, num_valid_tokens, return_load, out)
    arguments = {"logits": logits, "bias": bias, "num_valid_tokens": count(num_valid_tokens, "logits", logits)}
    options = {"config": config, "return_load": return_load, "implementation": implementation}
    if out is not None:
        _check_out(out, return_load)
        out = jaxmoe.Routing(*out)  # so that messages name its fields
    return Routing(*call(jaxmoe.route, arguments, options, strided=("logits",), no_gradient=("bias",), out=out))


def _route(logits: Any, bias: Any, config: Any, num_valid: Any, return_load: Any, out: Any) -> Routing:
    """`route` through the ops."""
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
    if not isinstance(return_load, bool):
        raise ValueError(f"return_load: expected a bool, got {return_load!r}")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise ValueError(f"bias: expected a torch.Tensor or None, got {type(bias).__name__}")
    bias = without_gradient(bias)
    valid, number = check_count(num_valid, "logits", logits)
    if out is None and logits.ndim == 2 and path.is_eager(logits, bias, valid):
        sizes = logits.shape[0], config.num_slots
        weights, experts = (logits.new_empty(sizes, dtype=dtype) for dtype in (torch.float32, torch.int32))
        load = logits.new_empty(config.num_expert_ids, dtype=torch.int32) if return_load else None
        ops.route_out(logits, bias, valid, number, config.json, weights, experts, load)
        return Routing(weights, experts, load)
    path.check_derivatives(logits=logits)
    if out is None:
        weights, experts, load = ops.route(logits, bias, valid, number, config.json, return_load)
        return Routing(weights, experts, load if return_load else None)
    _check_out(out, return_load)
    weights, experts, load = out
    outs = {f"out.{name}": tensor for name, tensor in zip(Routing._fields, out, strict=True)}
    for name, tensor in outs.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    check_gradients_of_out(outs, logits=logits)
    ops.route_out(logits, bias, valid, number, config.json, weights, experts, load)
    return out if type(out) is Routing else Routing(*out)


def without_gradient(bias: Any) -> Any:
    """The bias, of which nobody is to ask a gradient, though engines keep it in a Parameter: it gets none."""
    return bias.detach() if isinstance(bias, torch.Tensor) and bias.requires_grad and torch.is_grad_enabled() else bias


def _check_out(out: Any, return_load: Any) -> None:
    """Raises ValueError unless `out` has something to write to for each result; what that is the op or JAX checks."""
    if not isinstance(out, tuple) or len(out) != 3:
        wanted = "(weights, experts, load)" if return_load else "(weights, experts, None)"
        got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
        raise ValueError(f"out: expected a Routing or tuple {wanted}, got {got}")
    weights, experts, load = out
    for name, entry in (("weights", weights), ("experts", experts)):
        if entry is None:
            raise ValueError(f"out.{name}: expected a torch.Tensor, got NoneType")
    if return_load and load is None:
        raise ValueError("out.load: expected a torch.Tensor, or None with return_load=False, got NoneType")
    if load is not None and not return_load:
        raise ValueError(f"out.load: expected None with return_load=False, got {type(load).__name__}")


def _number(value: Any, name: str, tokens: Any) -> Any:
    """num_valid_tokens where it is no tensor, checked: an int, whatever integer it was."""
    if isinstance(value, np.integer):
        value = operator.index(value)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise ValueError(f"num_valid_tokens: expected an int or an int32 tensor, got {type(value).__name__}")
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2:
        got = f"{tokens.ndim} axes" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"{name}: expected a torch.Tensor with 2 axes, got {got}")
    if not 0 <= value <= tokens.shape[0]:
        raise ValueError(f"num_valid_tokens: expected 0 to T={tokens.shape[0]}, got {value}")
    return value


def check_count(value: Any, name: str, tokens: Any) -> tuple[torch.Tensor | None, Any]:
    """num_valid_tokens as the ops take it: a tensor on the device, or a number."""
    if value is None or isinstance(value, torch.Tensor):
        return value, None
    return None, _number(value, name, tokens)


def count(value: Any, name: str, tokens: Any) -> Any:
    """num_valid_tokens, a number as an int32 scalar: one compiled gradient then serves every value."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    return np.int32(_number(value, name, tokens))


def router_logits(x: torch.Tensor, weight: torch.Tensor, *, implementation: str | None = None) -> torch.Tensor:
    """The router's matrix product, x @ weight.T, in float32: `jaxmoe.router_logits` on tensors.

    Args:
      x: [T, H] bfloat16, float16 or float32; rows may be strided. T may be 0.
      weight: [E, H] bfloat16, float16 or float32, whatever x's dtype.
      implementation: "native" or None on a GPU; "pallas", "interpret" or "xla" through JAX (None off a GPU: "xla").

    Returns:
      float32 [T, E]. Differentiable in both.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: the gate of DeepSeek-V3's published inference code (arXiv:2412.19437), kept in float32.

    Example:
      >>> import torch, bridge
      >>> bridge.router_logits(torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[1.0, 2.0], [0.5, 0.0]]))
      tensor([[3.0000, 0.5000]])
    """
    if path.takes_ops(x, implementation):
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
        return path.at_once(ops.router_logits, x, weight)
    arguments = {"x": x, "weight": weight}
    return call(jaxmoe.router_logits, arguments, {"implementation": implementation}, strided=("x",))


def update_bias(bias: torch.Tensor, load: torch.Tensor, *, rate: float) -> torch.Tensor:
    """The auxiliary-loss-free balancing step: `jaxmoe.update_bias` on tensors.

    Args:
      bias: [E] bfloat16, float16 or float32; float32 holds small steps best.
      load: int32 [at least E], as `route` returns it.
      rate: the size of a step; DeepSeek-V3 trained with 0.001.

    Returns:
      bias + rate * sign(mean(load) - load) over the first E, in bias's dtype: a new tensor, without a gradient.

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import torch, bridge
      >>> bridge.update_bias(torch.zeros(3), torch.tensor([4, 1, 1], dtype=torch.int32), rate=0.5)
      tensor([-0.5000,  0.5000,  0.5000])
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise ValueError(f"rate: expected a number, got {type(rate).__name__}")
    if path.takes_ops(bias, None):
        check("bias", bias, ("E",))
        check("load", load, ("E",), INT32)
        if load.shape[0] < bias.shape[0]:
            raise ValueError(f"load: expected at least the {bias.shape[0]} routed experts of bias, got {load.shape[0]}")
        check_layout(bias.device, bias=bias, load=load)
        return layer_ops.update_bias(bias.detach(), load, float(rate))
    return call(jaxmoe.update_bias, {"bias": bias, "load": load}, {"rate": rate}, no_gradient=("bias",))
