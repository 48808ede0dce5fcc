"""Mixture-of-Experts blocks of Hugging Face checkpoints, as parameters, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.arguments import FLOATS, check_array, check_dtype, half
from jaxmoe.checkpoint_names import FLOAT8, NAMINGS, ROUTER, SCALES, SHARED, STACKS, check_names, find_naming
from jaxmoe.config import RoutingConfig, as_int
from jaxmoe.layer import MoEParams
from jaxmoe.shared import SharedMLP

# Each float8 in float32: looked up, a weight of 2048 x 7168 takes a fifth of the time of ml_dtypes' cast.
VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def _check_config(config: Any) -> None:
    if not isinstance(config, RoutingConfig):
        raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")


def _start(prefix: str) -> str:
    if not isinstance(prefix, str) or prefix.endswith("."):
        raise ValueError(f"prefix: expected a name without a dot at its end, got {prefix!r}")
    return f"{prefix}." if prefix else ""


def _check_block_size(block_size: Any) -> None:
    fits = isinstance(block_size, (tuple, list)) and len(block_size) == 2
    if not fits or any(type(as_int(size)) is not int or size < 1 for size in block_size):
        raise ValueError(f"block_size: expected two positive ints, rows and columns, got {block_size!r}")


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
    """The parameters of a layer from a checkpoint's tensors, as they are named in the files that are published.

    Read are, behind `prefix` and a dot, `gate.weight` and what one family of models names

      family         bias                                   routed experts, gate, up and down    shared experts
      "deepseek"     gate.e_score_correction_bias           experts.{i}.{gate,up,down}_proj      shared_experts.*_proj
      "ernie"        moe_statics.e_score_correction_bias    experts.{i}.{gate,up,down}_proj      shared_experts.*_proj
      "minimax"      e_score_correction_bias                experts.{i}.{w1,w3,w2}
      "mixtral"                                             experts.{i}.{w1,w3,w2}
      "kimi-linear"  gate.e_score_correction_bias           experts.{i}.{w1,w3,w2}               shared_experts.*_proj
      "qwen3-vl"                                            experts.{gate_up,down}_proj, stacks

    (with `.weight` behind projections, but not behind stacks; Ernie's bias is [1, E]; the stacks are [E, H, 2 * I] and
    [E, I, H], as Qwen3-VL is published, or [E, 2 * I, H] and [E, H, I], as transformers saves it, and Qwen3.5 is
    published). GLM-4.5, Kimi-K2, dots.llm1, OLMoE and Qwen3-MoE have DeepSeek's names. Which names they are is found
    from the tensors; everything behind the prefix must be one of them. What is returned is put together on the host.

    Refused are blocks whose tensors say that they compute something else: of gpt-oss (biases), Nemotron (no gate),
    DeepSeek-V4 (clamps) and Kimi-K3 (a projection around the routed experts), and a shared expert with a gate of its
    own (`shared_expert_gate`, Qwen2-MoE, Qwen3-Next, Qwen3.5). Without `shared_expert.*` and
    `shared_expert_gate.weight` in `tensors` the rest of such a block is read; add the shared expert to the layer's
    output yourself. What no tensor says is not noticed: another activation, or clamps (GLM-5-Next's).

    A projection's `weight` may also be quantised in blocks, as DeepSeek-V3 and MiniMax-M2 are published: float8_e4m3fn
    [rows, columns], beside `weight_scale_inv` [ceil(rows / block_size[0]), ceil(columns / block_size[1])]. It is
    dequantised,

      weight[r, c] * weight_scale_inv[r // block_size[0], c // block_size[1]]

    in float32, and rounded once; one expert at a time, so that little more memory is needed than for the stacks. Some
    weights may be quantised and others plain. Other quantised formats are refused.

    Args:
      tensors: name -> array, NumPy's or JAX's, bfloat16, float16 or float32; `safetensors.numpy.load_file` gives one.
        That cannot read float8 (safetensors 0.8), but `safetensors.torch.load_file` can, and `jax.numpy.from_dlpack`
        makes arrays of its tensors (torch 2.13). Scales are bfloat16, float16 or float32, too.
      prefix: where the block is, "model.layers.3.mlp" say, or "model.layers.3.block_sparse_moe" of Mixtral, MiniMax
        and Kimi Linear; "" where the names begin with the block's own.
      config: how the model routes, `RoutingConfig.from_hf` of its config or one of `jaxmoe.presets`.
      fuse_shared_experts: True: the shared MLP, n_shared_experts times as wide as an expert, becomes that many experts
        behind the routed ones. False: it is returned apart, of any width; `moe` is then called with
        `dataclasses.replace(config, n_shared_experts=0)`, and its output added.
      has_bias: whether the block has a bias; DeepSeek-V2, Mixtral, OLMoE and Qwen's have none.
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
        float8_e4m3fn without scales, scales beside any other dtype, tensors of another quantised format, names of two
        families, and tensors that say that the block is none of this kind.

    Source: Hugging Face transformers 5.24, conversion_mapping.py (what published names become) and the models'
      modeling_*.py; of Kimi-K3, MiniMax-M2's scales and Qwen's stacks public loaders; of DeepSeek-V3's scales
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
    naming = find_naming(tensors, start, config, has_bias)
    check_names(tensors, start, naming, config, has_bias)

    def read(name: str, shape: tuple[int | str, ...], dtypes: tuple[Any, ...] = FLOATS) -> np.ndarray:
        check_array(start + name, tensors[start + name], shape, dtypes)
        return np.asarray(tensors[start + name])

    router = read(ROUTER, (config.num_experts, "H"))
    bias = None
    if has_bias and naming.bias is not None:
        shape = tuple(config.num_experts if size == -1 else size for size in naming.bias_shape)
        bias = jnp.array(read(naming.bias, shape).reshape(-1), bias_dtype)
    hidden = router.shape[1]

    def params(gate_up: jax.Array, down: jax.Array) -> MoEParams:
        return MoEParams(router=jnp.array(router, dtype), bias=bias, gate_up=gate_up, down=down)

    if naming.stacked:
        gate_up, down = (read(name, (config.num_experts, "rows", "columns")) for name in STACKS)
        # Models have both either way round. Which is never open, as 2 * I and I are not both H; a mixture may be taken
        # for one of them.
        turned = (gate_up.shape[2], down.shape[1]) == (hidden, hidden)

        sides = lambda rows, columns: (config.num_experts, *((columns, rows) if turned else (rows, columns)))
        check_array(start + STACKS[0], gate_up, sides(hidden, "2 * I"))
        inner = half(start + STACKS[0], gate_up.shape[1 if turned else 2], "second" if turned else "last")
        stored = FLOATS if dtype is not None else (gate_up.dtype,)
        check_array(start + STACKS[1], down, sides(inner, hidden), stored)
        if turned:
            gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
        return params(jnp.array(gate_up, dtype), jnp.array(down, dtype))

    projections = [projection for mlp in naming.mlps(config, fused=True) for projection in mlp.projections]
    quantised = any(f"{start}{projection}.{SCALES}" in tensors for projection in projections)
    dequantised = jnp.dtype(jnp.bfloat16 if dtype is None else dtype)

    def weight(name: str, shape: tuple[int | str, ...], dtypes: tuple[Any, ...]) -> np.ndarray:
        return _read_weight(tensors, start + name, shape, dtypes, block_size, dequantised)

    mlps = naming.mlps(config, fuse_shared_experts)
    stored = (dequantised,) if dtype is None and quantised else FLOATS
    first = weight(mlps[0].projections[0], ("I", hidden), stored)  # which says what all others have to be
    inner, used = first.shape[0], first.dtype if dtype is None else dequantised
    stored = FLOATS if dtype is not None else (used,)

    def gated(
        projections: tuple[str, str, str], width: int | str, gate: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gate (unless it has been read), up and down of an MLP."""
        if gate is None:
            gate = weight(projections[0], (width, hidden), stored)
        up = weight(projections[1], gate.shape, stored)
        return gate, up, weight(projections[2], gate.shape[::-1], stored)

    num_ids = config.num_expert_ids if fuse_shared_experts else config.num_experts
    gate_up, down = np.empty((num_ids, hidden, 2 * inner), used), np.empty((num_ids, inner, hidden), used)
    for mlp in mlps:
        gates, ups, downs = gated(mlp.projections, mlp.num_experts * inner, first if mlp is mlps[0] else None)
        for i in range(mlp.num_experts):
            part = slice(i * inner, (i + 1) * inner)
            ids = slice(mlp.first_id + i * mlp.replicas, mlp.first_id + (i + 1) * mlp.replicas)
            gate_up[ids, :, :inner], gate_up[ids, :, inner:] = gates[part].T, ups[part].T
            down[ids] = downs[:, part].T
    routed = params(jnp.asarray(gate_up), jnp.asarray(down))
    if fuse_shared_experts:
        return routed
    gates, ups, downs = gated(SHARED, "W")
    both = np.concatenate([gates, ups], dtype=used, casting="unsafe").T  # float16 and bfloat16 may mix
    return routed, SharedMLP(gate_up=jnp.array(both), down=jnp.array(downs.T, used))


def export_hf_moe(
    params: MoEParams,
    prefix: str,
    config: RoutingConfig,
    *,
    shared: SharedMLP | None = None,
    names: str = "deepseek",
) -> dict[str, np.ndarray]:
    """The inverse of `load_hf_moe`: the tensors of a block, as `safetensors.numpy.save_file` takes them.

    All are plain: what was loaded from a quantised checkpoint is written in the dtype that it has now, without scales.

    Args:
      params: `MoEParams`, with the shared experts behind the routed ones unless `shared` is given.
      prefix: where the block is, "model.layers.3.mlp" say; "" for none.
      config: how the model routes, shared experts included, as for `load_hf_moe`.
      shared: the shared experts, where they are kept apart.
      names: the family whose names are written, of those that `load_hf_moe` lists: "deepseek", "mixtral", ...

    Returns:
      name -> array, contiguous, each in the dtype that it has in `params`; stacks as Qwen3-VL is published.

    Raises:
      ValueError: names the argument, what was expected and what came; replicas of a shared expert that differ, too, and
        a bias or shared experts where the family has no name for them.

    Source: Hugging Face transformers 5.24, conversion_mapping.py and the models' modeling_*.py.

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
      >>> sorted(jaxmoe.export_hf_moe(params, "mlp", config, names="mixtral"))[:2]
      ['mlp.experts.0.w1.weight', 'mlp.experts.0.w2.weight']
    """
    _check_config(config)
    start = _start(prefix)
    if not isinstance(names, str) or names not in NAMINGS:
        raise ValueError(f"names: expected one of {', '.join(map(repr, NAMINGS))}, got {names!r}")
    naming = NAMINGS[names]
    if not isinstance(params, MoEParams):
        raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
    if shared is not None:
        if not isinstance(shared, SharedMLP):
            raise ValueError(f"shared: expected None or a SharedMLP, got {type(shared).__name__}")
        if not config.n_shared_experts:
            raise ValueError("shared: expected None for a config without shared experts, got a SharedMLP")
    if config.n_shared_experts and not naming.has_shared:
        raise ValueError(f"config.n_shared_experts: expected 0 for {names=}, got {config.n_shared_experts}")
    num_ids = config.num_experts if shared is not None else config.num_expert_ids
    check_array("params.router", params.router, (config.num_experts, "H"))
    hidden = params.router.shape[1]
    check_array("params.gate_up", params.gate_up, (num_ids, hidden, "2 * I"))
    inner = half("params.gate_up", params.gate_up.shape[2])
    check_array("params.down", params.down, (num_ids, inner, hidden), (params.gate_up.dtype,))

    tensors = {ROUTER: np.asarray(params.router)}
    if params.bias is not None:
        if naming.bias is None:
            raise ValueError(f"params.bias: expected None for {names=}, got an array")
        check_array("params.bias", params.bias, (config.num_experts,))
        tensors[naming.bias] = np.asarray(params.bias).reshape(naming.bias_shape)

    def put(projections: tuple[str, str, str], gate_up: np.ndarray, down: np.ndarray) -> None:
        """One gated MLP from [H, 2 * W] and [W, H]."""
        for projection, weight in zip(projections, (*np.split(gate_up, 2, axis=1), down), strict=True):
            tensors[f"{projection}.weight"] = weight.T

    gate_up, down = np.asarray(params.gate_up), np.asarray(params.down)
    if naming.stacked:
        tensors |= dict(zip(STACKS, (gate_up, down), strict=True))
    for mlp in naming.mlps(config, shared is None):
        ids = mlp.first_id + mlp.replicas * np.arange(mlp.num_experts)
        for which, stack in (("gate_up", gate_up), ("down", down)):
            for r in range(1, mlp.replicas):
                if stack[ids].tobytes() != stack[ids + r].tobytes():
                    raise ValueError(f"params.{which}: expected equal replicas of each shared expert, got different")
        gates, ups = np.split(gate_up[ids], 2, axis=2)
        put(mlp.projections, np.concatenate([*gates, *ups], axis=1), np.concatenate(down[ids]))
    if shared is not None:
        check_array("shared.gate_up", shared.gate_up, (hidden, "2 * W"))
        check_array("shared.down", shared.down, (half("shared.gate_up", shared.gate_up.shape[1]), hidden))
        put(SHARED, np.asarray(shared.gate_up), np.asarray(shared.down))
    return {start + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
