"""Hugging Face blocks as parameters and back: bit for bit, and errors that name the tensor.

That the loaded layer computes what transformers' does is tested in tests/parity.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import RoutingConfig, SharedMLP
from tests.cases import BF16, F16, F32, normal

HIDDEN, INNER, PREFIX = 10, 3, "model.layers.3.mlp"
CONFIG = RoutingConfig(num_experts=5, top_k=2, routed_scaling_factor=2.5, n_shared_experts=2)
Tensors = dict[str, np.ndarray]


def tensors_for(config: RoutingConfig, dtype: Any = BF16, *, width: int | None = None) -> Tensors:
    """A block as a checkpoint holds it; the shared MLP as wide as the config says, or `width`."""
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (config.num_experts, HIDDEN)}
    mlps = {f"experts.{e}": INNER for e in range(config.num_experts)}
    if config.n_shared_experts:
        mlps["shared_experts"] = width or INNER * config.n_shared_experts
    for name, size in mlps.items():
        shapes |= {f"{name}.gate_proj.weight": (size, HIDDEN), f"{name}.up_proj.weight": (size, HIDDEN)}
        shapes[f"{name}.down_proj.weight"] = (HIDDEN, size)
    block = {name: np.asarray(normal(i, *shape, dtype=dtype)) for i, (name, shape) in enumerate(shapes.items())}
    block["gate.e_score_correction_bias"] = np.asarray(normal(99, config.num_experts))
    return {f"{PREFIX}.{name}": tensor for name, tensor in block.items()}


def assert_same_bits(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].tobytes() == tensor.tobytes(), name
        assert got[name].flags["C_CONTIGUOUS"]  # safetensors writes the buffer as it lies


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_round_trip(shared: int, dtype: Any) -> None:
    config = dataclasses.replace(CONFIG, n_shared_experts=shared)
    tensors = tensors_for(config, dtype)
    params = jaxmoe.load_hf_moe(tensors, PREFIX, config)
    assert params.gate_up.shape == (5 + shared, HIDDEN, 2 * INNER)
    assert params.bias is not None
    assert params.bias.dtype == F32
    got = jaxmoe.export_hf_moe(params, PREFIX, config)
    assert_same_bits(got, tensors)
    first, second = (f"{PREFIX}.experts.{e}.up_proj.weight" for e in range(2))
    with pytest.raises(AssertionError):
        assert_same_bits(got | {first: tensors[second]}, tensors)


@pytest.mark.parametrize("width", [INNER, 2 * INNER, 7])
def test_round_trip_with_shared_experts_apart(width: int) -> None:
    """Of any width, also one that is no multiple of an expert's."""
    tensors = tensors_for(CONFIG, width=width)
    params, shared = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG, fuse_shared_experts=False)
    assert params.gate_up.shape[0] == 5
    assert shared.gate_up.shape == (HIDDEN, 2 * width)
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, CONFIG, shared=shared), tensors)


def test_replicas() -> None:
    """Each shared expert as often as it has replicas, next to each other; exported once, and only while they agree."""
    config = dataclasses.replace(CONFIG, shared_expert_replicas=3)
    tensors = tensors_for(config)
    params = jaxmoe.load_hf_moe(tensors, PREFIX, config)
    once = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG)
    np.testing.assert_array_equal(params.down, once.down[jnp.array([0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6])])
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, config), tensors)
    apart = dataclasses.replace(params, down=params.down.at[9].multiply(2))
    with pytest.raises(ValueError, match=r"params.down: expected equal replicas"):
        jaxmoe.export_hf_moe(apart, PREFIX, config)


def test_dtypes() -> None:
    """The bias stays in float32 unless the user says otherwise; the rest as stored, or as asked."""
    tensors = tensors_for(CONFIG)
    stored = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG)
    assert {stored.router.dtype, stored.gate_up.dtype, stored.down.dtype} == {jnp.dtype(BF16)}
    wide, shared = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG, fuse_shared_experts=False, dtype=F32)
    assert {a.dtype for a in (wide.router, wide.down, shared.gate_up, shared.down)} == {jnp.dtype(F32)}
    np.testing.assert_array_equal(wide.gate_up, stored.gate_up[:5].astype(F32))
    name = f"{PREFIX}.gate.e_score_correction_bias"
    narrow = tensors | {name: tensors[name].astype(BF16)}
    for bias_dtype, want in ((F32, F32), (None, BF16), (BF16, BF16)):
        bias = jaxmoe.load_hf_moe(narrow, PREFIX, CONFIG, bias_dtype=bias_dtype).bias
        assert bias is not None
        assert bias.dtype == want
        np.testing.assert_array_equal(bias.astype(F32), narrow[name].astype(np.float32))


def test_jax_arrays_and_other_blocks() -> None:
    """Any mapping; what does not lie behind the prefix is not looked at: layers.30 is not in layers.3."""
    tensors = tensors_for(CONFIG)
    more = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    more |= {"model.layers.30.mlp.gate.weight": jnp.zeros(1), "model.layers.3.mlp_norm.weight": jnp.zeros(1)}
    assert_same_bits(jaxmoe.export_hf_moe(jaxmoe.load_hf_moe(more, PREFIX, CONFIG), PREFIX, CONFIG), tensors)
    bare = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in tensors.items()}
    assert_same_bits(jaxmoe.export_hf_moe(jaxmoe.load_hf_moe(bare, "", CONFIG), "", CONFIG), bare)


def test_parameters_do_not_share_memory_with_the_tensors() -> None:
    tensors = {name: np.array(tensor) for name, tensor in tensors_for(CONFIG, F32).items()}
    params = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG)
    before = [np.array(a) for a in (params.router, params.bias, params.gate_up, params.down)]
    for tensor in tensors.values():
        tensor[...] = 0
    for a, b in zip(before, (params.router, params.bias, params.gate_up, params.down), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_bias() -> None:
    tensors = tensors_for(CONFIG)
    del tensors[f"{PREFIX}.gate.e_score_correction_bias"]
    params = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG, has_bias=False)
    assert params.bias is None
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, CONFIG), tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("gate.e_score_correction_bias", None, "expected a tensor, got none"),
        ("gate.weight", None, "expected a tensor, got none"),
        ("experts.4.up_proj.weight", None, "expected a tensor, got none"),
        ("shared_experts.down_proj.weight", None, "expected a tensor, got none"),
        ("experts.5.up_proj.weight", np.zeros((3, 10)), "expected no tensor of this name"),
        ("gate.weight_scale_inv", np.zeros(1), "expected no tensor of this name"),
        ("gate.weight", np.zeros((6, 10), np.float32), r"expected .*\[5, H\], got float32\[6, 10\]"),
        ("gate.e_score_correction_bias", np.zeros(4, np.float32), r"expected .*\[5\], got float32\[4\]"),
        ("experts.0.gate_proj.weight", np.zeros((3, 9), np.float32), r"expected .*\[I, 10\], got float32\[3, 9\]"),
        ("experts.1.gate_proj.weight", np.zeros((4, 10), BF16), r"expected bfloat16 \[3, 10\], got bfloat16\[4, 10\]"),
        ("experts.1.up_proj.weight", np.zeros((3, 10), F16), r"expected bfloat16 \[3, 10\], got float16\[3, 10\]"),
        ("experts.2.down_proj.weight", np.zeros((3, 10), BF16), r"expected bfloat16 \[10, 3\], got bfloat16\[3, 10\]"),
        ("experts.2.down_proj.weight", np.zeros((10, 3)), r"expected bfloat16 \[10, 3\], got float64\[10, 3\]"),
        ("shared_experts.gate_proj.weight", np.zeros((5, 10), BF16), r"expected bfloat16 \[6, 10\], got bfloat16\[5"),
        ("experts.3.up_proj.weight", [1.0], r"expected an array bfloat16 \[3, 10\], got list"),
    ],
)
def test_wrong_tensor(name: str, tensor: Any, message: str) -> None:
    """The error names it."""
    tensors = tensors_for(CONFIG) | {f"{PREFIX}.{name}": tensor}
    if tensor is None:
        del tensors[f"{PREFIX}.{name}"]
    with pytest.raises(ValueError, match=rf"^{PREFIX}.{name}: {message}"):
        jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG)


def test_wrong_arguments() -> None:
    tensors, alone = tensors_for(CONFIG), dataclasses.replace(CONFIG, n_shared_experts=0)
    load: Any = jaxmoe.load_hf_moe
    for kwargs, message in (
        ({"config": {}}, "config: expected a RoutingConfig, got dict"),
        ({"prefix": f"{PREFIX}."}, "prefix: expected a name without a dot at its end"),
        ({"dtype": jnp.int32}, "dtype: expected None, bfloat16, float16 or float32, got int32"),
        ({"bias_dtype": jnp.int32}, "bias_dtype: expected None, bfloat16"),
        ({"dtype": "foo"}, "^dtype: expected None, bfloat16, float16 or float32, got 'foo'"),
        ({"dtype": 3}, "^dtype: expected None, bfloat16, float16 or float32, got 3"),
        ({"dtype": "f4,,"}, "^dtype: expected None, bfloat16, float16 or float32, got 'f4,,'"),
        ({"bias_dtype": np.zeros(2)}, "^bias_dtype: expected None, bfloat16, float16 or float32, got array"),
        ({"config": alone, "fuse_shared_experts": False}, "fuse_shared_experts: expected True for a config without"),
        ({"config": alone}, r"shared_experts.down_proj.weight: expected no tensor"),
        ({"has_bias": False}, r"e_score_correction_bias: expected no tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**{"tensors": tensors, "prefix": PREFIX, "config": CONFIG} | kwargs)

    params, shared = jaxmoe.load_hf_moe(tensors, PREFIX, CONFIG, fuse_shared_experts=False)
    wider = SharedMLP(gate_up=shared.gate_up, down=shared.down[:-1])
    odd = SharedMLP(gate_up=shared.gate_up[:, 1:], down=shared.down[1:])
    uneven = dataclasses.replace(params, gate_up=params.gate_up[..., 1:], down=params.down[:, 1:])
    for args, given, message in (
        ((params, PREFIX, CONFIG), None, r"params.gate_up: expected .*\[7, 10, 2 \* I\], got bfloat16\[5, 10, 6\]"),
        (({}, PREFIX, CONFIG), None, "params: expected MoEParams, got dict"),
        ((params, PREFIX, alone), shared, "shared: expected None for a config without shared experts"),
        ((params, PREFIX, CONFIG), params, "shared: expected None or a SharedMLP, got MoEParams"),
        ((params, PREFIX, CONFIG), wider, r"shared.down: expected .*\[6, 10\], got bfloat16\[5, 10\]"),
        ((uneven, PREFIX, CONFIG), shared, "^params.gate_up: expected an even last axis, gate and up .*, got 5"),
        ((params, PREFIX, CONFIG), odd, "^shared.gate_up: expected an even last axis, gate and up .*, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxmoe.export_hf_moe(*args, shared=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gate_up: expected an even last axis, gate and up side by side, got 11"):
        odd(jnp.zeros((1, HIDDEN), BF16))
