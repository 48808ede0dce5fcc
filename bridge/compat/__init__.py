"""Drop-ins for other libraries' MoE functions: their names, arguments and results, jaxmoe's kernels underneath.

`bridge.compat.vllm` and `bridge.compat.aiter`: change the import, keep the call. What an argument asks for is done or
refused with a ValueError that names it. Neither library is needed. What the two share stands here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

import bridge
from bridge import path
from jaxmoe.config import as_constant


def described(value: Any) -> str:
    """What an error says that came."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def check_matrix(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a tensor with two axes."""
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        raise ValueError(f"{name}: expected a torch.Tensor with 2 axes, got {described(value)}")


def as_int32(topk_ids: torch.Tensor) -> torch.Tensor:
    """vLLM's ids, of any integer dtype, as the kernels take them."""
    check_matrix("topk_ids", topk_ids)
    if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
        raise ValueError(f"topk_ids: expected integers, got {described(topk_ids)}")
    if topk_ids.dtype in (torch.int64, torch.uint32, torch.uint64):  # which does not fit is no expert's, and stays so
        topk_ids = topk_ids.to(torch.int64).clamp(-1, 2**31 - 1)
    return topk_ids.to(torch.int32)  # the tensor itself where it is int32


def checked_map(expert_map: Any, count: int, counted_by: str) -> torch.Tensor:
    """The entries of the experts that there are."""
    if not isinstance(expert_map, torch.Tensor) or expert_map.dtype != torch.int32 or expert_map.ndim != 1:
        raise ValueError(f"expert_map: expected int32 [{counted_by}], got {described(expert_map)}")
    if expert_map.shape[0] < count:
        raise ValueError(f"expert_map: expected at least {counted_by}={count} ids, got {expert_map.shape[0]}")
    return expert_map[:count]


def check_in_place(written: str, **read: Any) -> None:
    """Raises ValueError where a tensor that is read asks for a derivative, which nothing written in place has."""
    path.check_no_tangents(**read)
    if torch.is_grad_enabled():
        for name, tensor in read.items():
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor without requires_grad, as {written} is written to, got one that "
                    "requires grad; use torch.no_grad()"
                )


def renamed(error: ValueError, names: Mapping[str, str]) -> ValueError:
    """The error of a function of the bridge, the argument called what the drop-in calls it."""
    name, colon, rest = str(error).partition(":")
    called = names.get(name, name)
    return ValueError(called + colon + rest.replace(f"pass {name}.", f"pass {called}."))


_made_once = functools.lru_cache(maxsize=256, typed=True)(bridge.RoutingConfig)  # its checks take longer than a call


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _config(**fields: Any) -> bridge.RoutingConfig:
    """A constant to torch.compile, which need not trace the checks."""
    return _made_once(**fields)


def route_groups(
    gating_output: torch.Tensor,
    bias: torch.Tensor | None,
    names: Mapping[str, str],
    out: bridge.Routing | None = None,
    **fields: Any,
) -> bridge.Routing:
    """`bridge.route` without the load; `fields` are the config's, `names` what the drop-in calls its arguments."""
    check_matrix("gating_output", gating_output)
    fields["num_experts"] = gating_output.shape[1]
    if torch.compiler.is_compiling():  # a number that has changed between calls has become a symbol
        fields = {name: as_constant(value) for name, value in fields.items()}
    try:
        config = _config(**fields)
        return bridge.route(gating_output, bias, config=config, return_load=False, out=out)
    except ValueError as error:
        raise renamed(error, names) from None
