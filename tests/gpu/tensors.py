"""Arrays as tensors on the GPU, in every layout of memory, and back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import bridge
import jaxmoe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}


def tensor(array: Any, layout: str = "aligned") -> Any:
    """The values on the GPU: from an aligned address, from an odd one, or with rows that lie apart."""
    if array is None:
        return None
    array = np.asarray(array)
    dtype = DTYPES[array.dtype.name]
    values = torch.tensor(array.astype(np.float32 if dtype.is_floating_point else np.int32)).to(dtype)
    if layout == "shifted":
        memory = torch.zeros(values.numel() + 1, dtype=dtype, device="cuda")
        memory[1:].view(values.shape).copy_(values)
        return memory[1:].view(values.shape)
    if layout == "apart" and values.ndim == 2:
        memory = torch.full((values.shape[0], values.shape[1] + 7), 77, dtype=dtype, device="cuda")
        memory[:, 3:-4] = values
        return memory[:, 3:-4]
    return values.cuda()


def array(tensor: Any) -> Any:
    if tensor is None:
        return None
    values = tensor.detach().float() if tensor.is_floating_point() else tensor
    return jnp.asarray(values.cpu().numpy()).astype(str(tensor.dtype).removeprefix("torch."))


def routing(got: bridge.Routing) -> jaxmoe.Routing:
    return jaxmoe.Routing(*map(array, got))


def plan_of(plan: bridge.DispatchPlan) -> jaxmoe.DispatchPlan:
    return jaxmoe.DispatchPlan(*map(array, plan))


def poisoned(*shape: int, dtype: Any = torch.float32, layout: str = "aligned") -> Any:
    offset = int(layout == "shifted")
    count = int(np.prod(shape))
    value = float("nan") if dtype.is_floating_point else -77
    return torch.full((count + offset,), value, dtype=dtype, device="cuda")[offset:].view(shape)
