"""Mixture-of-Experts blocks of Hugging Face checkpoints, as parameters, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.arguments import FLOATS, check_array, check_dtype, half
from jaxmoe.config import RoutingConfig, as_int
from jaxmoe.layer import MoEParams
from jaxmoe.shared import SharedMLP

ROUTER, BIAS, SHARED = "gate.weight", "gate.e_score_correction_bias", "shared_experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FLOAT8, SCALES = jnp.dtype(jnp.float8_e4m3fn), "weight_scale_inv"
# Each float8 in float32: looked up, a weight of 2048 x 7168 takes a fifth of the time of ml_dtypes' cast.
VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def _check_config(config: Any) -> None:
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")


def _start(prefix: str) -> str:
    if not isinstance(prefix, str) or prefix.endswith("."):
        raise ValueError(f"prefix: expected a name without a dot at its end, got {prefix!r}")
    return f"{prefix}." if prefix else ""


def _mlps(config: RoutingConfig, fused: bool) -> list[tuple[str, int, int, int]]:
    """The gated MLPs of a checkpoint that become experts: (name, how many experts it is, first id, ids for each)."""
    mlps = [(f"experts.{e}", 1, e, 1) for e in range(config.num_experts)]
    if fused and config.n_shared_experts:
        mlps.append((SHARED, config.n_shared_experts, config.num_experts, config.shared_expert_replicas))
    return mlps


def _check_block_size(block_size: Any) -> None:
    fits = isinstance(block_size, (tuple, list)) and len(block_size) == 2
    if not fits or any(type(as_int(size)) is not int or size < 1 for size in block_size):
        raise ValueError(f"block_size: expected two positive ints, rows and columns, got {block_size!r}")


def _check_names(tensors: Mapping[str, Any], start: str, mlps: list[str], has_bias: bool) -> None:
    """Raises ValueError unless the block has all tensors that it needs, and no others but scales."""
    projections = [f"{start}{mlp}.{projection}" for mlp in mlps for projection in PROJECTIONS]
    wanted = [start + ROUTER, *([start + BIAS] if has_bias else []), *(f"{name}.weight" for name in projections)]
    others = {name for name in tensors if name.startswith(start)} - {*wanted, *(f"{p}.{SCALES}" for p in projections)}
    # First: a weight that is missing may be there in another format.
    for name in sorted(name for name in others if name.rpartition(".")[0] in projections):
        raise ValueError(
            f"{name}: expected no tensor of this name, only weight, and {SCALES} where that is {FLOAT8}, got one"
        )
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{name}: expected a tensor, got none")
    for name in sorted(others):
        raise ValueError(f"{name}: expected no tensor of this name in the block, got one")


def _read_weight(
    tensors: Mapping[str, Any],
    projection: str,
    shape: tuple[int | str, ...],
    dtypes: tuple[Any, ...],
    block_size: tuple[int, int],
    dequantised: Any,
) -> np.ndarray:
    """The weight of a projection, of one of `dtypes`; where it has scales, multiplied by them and in `dequantised`."""
    name, scales_name = f"{projection}.weight", f"{projection}.{SCALES}"
    value, has_scales = tensors[name], scales_name in tensors
    if isinstance(value, (jax.Array, np.ndarray)) and (value.dtype == FLOAT8) != has_scales:
        raise ValueError(
            f"{name}: expected {FLOAT8} with a tensor {SCALES} beside it, or neither, "
            f"got {value.dtype} {'with' if has_scales else 'without'} one"
        )
    check_array(name, value, shape, (FLOAT8,) if has_scales else dtypes)
    if not has_scales:
        return np.asarray(value)
    (rows, columns), scales = value.shape, tensors[scales_name]
    check_array(scales_name, scales, (-(-rows // block_size[0]), -(-columns // block_size[1])))
    weight, of_rows = VALUES[np.asarray(value).view(np.uint8)], np.arange(rows) // block_size[0]
    weight *= np.asarray(scales).astype(np.float32)[of_rows][:, np.arange(columns) // block_size[1]]
    return weight.astype(dequantised)


@overload
def load_hf_moe(
    tensors: Mapping[str, Any],
    prefix: str,
    config: RoutingConfig,
    *,
    fuse_shared_experts: Literal[True] = True,
    has_bias: bool = True,
    dtype: Any = None,
    bias_dtype: Any = jnp.float32,
    block_size: tuple[int, int] = (128, 128),
) -> MoEParams: ...


@overload
def load_hf_moe(
    tensors: Mapping[str, Any],
    prefix: str,
    config: RoutingConfig,
    *,
    fuse_shared_experts: Literal[False],
    has_bias: bool = True,
    dtype: Any = None,
    bias_dtype: Any = jnp.float32,
    block_size: tuple[int, int] = (128, 128),
) -> tuple[MoEParams, SharedMLP]: ...


def load_hf_moe(
    tensors: Mapping[str, Any],
    prefix: str,
    config: RoutingConfig,
    *,
    fuse_shared_experts: bool = True,
    has_bias: bool = True,
    dtype: Any = None,
    bias_dtype: Any = jnp.float32,
    block_size: tuple[int, int] = (128, 128),
) -> MoEParams | tuple[MoEParams, SharedMLP]:
    """The parameters of a layer from a checkpoint's tensors, named as DeepSeek-V3, GLM-4.5 and Kimi-K2 name them.

    Read are `gate.weight`, `gate.e_score_correction_bias`, `experts.{i}.*_proj.weight` and
    `shared_experts.*_proj.weight` (gate, up and down), all behind `prefix` and a dot; everything there must be one of
    these. The stacks are put together in host memory.

    A weight of an expert may also be quantised in blocks, as DeepSeek-V3 is published: float8_e4m3fn [rows, columns],
    beside `*_proj.weight_scale_inv` [ceil(rows / block_size[0]), ceil(columns / block_size[1])]. It is dequantised,

      weight[r, c] * weight_scale_inv[r // block_size[0], c // block_size[1]]

    in float32, and rounded once; one expert at a time, so that little more memory is needed than for the stacks. Some
    weights may be quantised and others plain. Other quantised formats are refused.

    Args:
      tensors: name -> array, NumPy's or JAX's, bfloat16, float16 or float32; `safetensors.numpy.load_file` gives one.
        That cannot read float8 (safetensors 0.8), but `safetensors.torch.load_file` can, and `jax.numpy.from_dlpack`
        makes arrays of its tensors (torch 2.13). Scales are bfloat16, float16 or float32, too.
      prefix: where the block is, "model.layers.3.mlp" say; "" where the names begin with the block's own.
      config: how the model routes, `RoutingConfig.from_hf` of its config or one of `jaxmoe.presets`.
      fuse_shared_experts: True: the shared MLP, n_shared_experts times as wide as an expert, becomes that many experts
        behind the routed ones. False: it is returned apart, of any width; `moe` is then called with
        `dataclasses.replace(config, n_shared_experts=0)`, and its output added.
      has_bias: whether the block has a bias; DeepSeek-V2 and Qwen3-MoE have none.
      dtype: of all but the bias; None: as they are stored, and all experts alike; bfloat16 for experts if any
        weight of theirs is quantised.
      bias_dtype: of the bias; None: as it is stored.
      block_size: rows and columns of a weight that share a scale, `weight_block_size` in config.json; blocks at the
        end may be smaller. Plain weights have none.

    Returns:
      `MoEParams`; with fuse_shared_experts=False (MoEParams, SharedMLP). Activations are not among the tensors: the
      SharedMLP's is silu, and `dataclasses.replace(shared, activation=...)` has another.

    Raises:
      ValueError: names the tensor that is missing, superfluous, or of the wrong shape or dtype; or the argument. So for
        float8_e4m3fn without scales, scales beside any other dtype, and tensors of another quantised format.

    Source: Hugging Face transformers, conversion_mapping.py and modeling_deepseek_v3.py; of the scales DeepSeek-V3,
      arXiv:2412.19437, section 3.3, and its repository's README_WEIGHTS.md and inference/fp8_cast_bf16.py.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=2, top_k=1)
      >>> tensors = {"mlp.gate.weight": jnp.ones((2, 4)), "mlp.gate.e_score_correction_bias": jnp.zeros(2)}
      >>> for i in range(2):
      ...     tensors |= {f"mlp.experts.{i}.{p}_proj.weight": jnp.ones((3, 4)) for p in ("gate", "up")}
      ...     tensors[f"mlp.experts.{i}.down_proj.weight"] = jnp.ones((4, 3))
      >>> params = jaxmoe.load_hf_moe(tensors, "mlp", config)
      >>> params.gate_up.shape, params.down.shape
      ((2, 4, 6), (2, 3, 4))
    """
    _check_config(config)
    check_dtype("dtype", dtype)
    check_dtype("bias_dtype", bias_dtype)
    start = _start(prefix)
    if not fuse_shared_experts and not config.n_shared_experts:
        raise ValueError("fuse_shared_experts: expected True for a config without shared experts, got False")
    _check_block_size(block_size)
    mlps = [name for name, *_ in _mlps(config, fused=True)]
    _check_names(tensors, start, mlps, has_bias)

    quantised = any(f"{start}{mlp}.{projection}.{SCALES}" in tensors for mlp in mlps for projection in PROJECTIONS)
    dequantised = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)

    def read(name: str, shape: tuple[int | str, ...]) -> np.ndarray:
        value = tensors[start + name]
        check_array(start + name, value, shape)
        return np.asarray(value)

    def weight(name: str, shape: tuple[int | str, ...], dtypes: tuple[Any, ...]) -> np.ndarray:
        return _read_weight(tensors, start + name, shape, dtypes, block_size, dequantised)

    router = read(ROUTER, (config.num_experts, "H"))
    hidden = router.shape[1]
    first = weight("experts.0.gate_proj", ("I", hidden), FLOATS)
    inner = first.shape[0]
    used = first.dtype if dtype is None and not quantised else dequantised
    stored = FLOATS if dtype is not None else (used,)

    def mlp(name: str, width: int | str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate = weight(f"{name}.gate_proj", (width, hidden), stored)
        up = weight(f"{name}.up_proj", gate.shape, stored)
        return gate, up, weight(f"{name}.down_proj", gate.shape[::-1], stored)

    num_ids = config.num_expert_ids if fuse_shared_experts else config.num_experts
    gate_up, down = np.empty((num_ids, hidden, 2 * inner), used), np.empty((num_ids, inner, hidden), used)
    for name, count, first_id, replicas in _mlps(config, fuse_shared_experts):
        gate_weight, up_weight, down_weight = mlp(name, count * inner)
        for i in range(count):
            part = slice(i * inner, (i + 1) * inner)
            ids = slice(first_id + i * replicas, first_id + (i + 1) * replicas)
            gate_up[ids, :, :inner], gate_up[ids, :, inner:] = gate_weight[part].T, up_weight[part].T
            down[ids] = down_weight[:, part].T
    bias = read(BIAS, (config.num_experts,)) if has_bias else None
    params = MoEParams(
        router=jnp.array(router, dtype),
        bias=None if bias is None else jnp.array(bias, bias_dtype),
        gate_up=jnp.asarray(gate_up),
        down=jnp.asarray(down),
    )
    if fuse_shared_experts:
        return params
    gate_weight, up_weight, down_weight = mlp(SHARED, "W")
    both = np.concatenate([gate_weight, up_weight], dtype=used, casting="unsafe").T  # float16 and bfloat16 may mix
    return params, SharedMLP(gate_up=jnp.array(both), down=jnp.array(down_weight.T, used))


def export_hf_moe(
    params: MoEParams, prefix: str, config: RoutingConfig, *, shared: SharedMLP | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `load_hf_moe`: the tensors of a block, as `safetensors.numpy.save_file` takes them.

    All are plain: what was loaded from a quantised checkpoint is written in the dtype that it has now, without scales.

    Args:
      params: `MoEParams`, with the shared experts behind the routed ones unless `shared` is given.
      prefix: where the block is, "model.layers.3.mlp" say; "" for none.
      config: how the model routes, shared experts included, as for `load_hf_moe`.
      shared: the shared experts, where they are kept apart.

    Returns:
      name -> array, contiguous, each in the dtype that it has in `params`.

    Raises:
      ValueError: names the argument, what was expected and what came; replicas of a shared expert that differ, too.

    Source: Hugging Face transformers, conversion_mapping.py and modeling_deepseek_v3.py.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> config = jaxmoe.RoutingConfig(num_experts=1, top_k=1)
      >>> params = jaxmoe.MoEParams(router=jnp.ones((1, 4)), gate_up=jnp.ones((1, 4, 6)), down=jnp.ones((1, 3, 4)))
      >>> for name, tensor in jaxmoe.export_hf_moe(params, "mlp", config).items():
      ...     print(name, tensor.shape)
      mlp.gate.weight (1, 4)
      mlp.experts.0.gate_proj.weight (3, 4)
      mlp.experts.0.up_proj.weight (3, 4)
      mlp.experts.0.down_proj.weight (4, 3)
    """
    _check_config(config)
    start = _start(prefix)
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    if shared is not None:
        if not isinstance(shared, SharedMLP):
            raise ValueError(f"shared: expected None or a SharedMLP, got {type(shared).__name__}")
        if not config.n_shared_experts:
            raise ValueError("shared: expected None for a config without shared experts, got a SharedMLP")
    num_ids = config.num_experts if shared is not None else config.num_expert_ids
    check_array("params.router", params.router, (config.num_experts, "H"))
    hidden = params.router.shape[1]
    check_array("params.gate_up", params.gate_up, (num_ids, hidden, "2 * I"))
    inner = half("params.gate_up", params.gate_up.shape[2])
    check_array("params.down", params.down, (num_ids, inner, hidden), (params.gate_up.dtype,))

    tensors = {ROUTER: np.asarray(params.router)}
    if params.bias is not None:
        check_array("params.bias", params.bias, (config.num_experts,))
        tensors[BIAS] = np.asarray(params.bias)

    def put(name: str, gate_up: np.ndarray, down: np.ndarray) -> None:
        """One gated MLP from [H, 2 * W] and [W, H]."""
        for projection, weight in zip(PROJECTIONS, (*np.split(gate_up, 2, axis=1), down), strict=True):
            tensors[f"{name}.{projection}.weight"] = weight.T

    gate_up, down = np.asarray(params.gate_up), np.asarray(params.down)
    for name, count, first, replicas in _mlps(config, shared is None):
        ids = first + replicas * np.arange(count)
        for which, stack in (("gate_up", gate_up), ("down", down)):
            for r in range(1, replicas):
                if stack[ids].tobytes() != stack[ids + r].tobytes():
                    raise ValueError(f"params.{which}: expected equal replicas of each shared expert, got different")
        gates, ups = np.split(gate_up[ids], 2, axis=2)
        put(name, np.concatenate([*gates, *ups], axis=1), np.concatenate(down[ids]))
    if shared is not None:
        check_array("shared.gate_up", shared.gate_up, (hidden, "2 * W"))
        check_array("shared.down", shared.down, (half("shared.gate_up", shared.gate_up.shape[1]), hidden))
        put(SHARED, np.asarray(shared.gate_up), np.asarray(shared.down))
    return {start + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
