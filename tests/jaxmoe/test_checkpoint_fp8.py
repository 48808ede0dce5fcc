"""Blocks whose weights are float8 with a scale for each of their blocks, against a loop over their elements."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import RoutingConfig
from tests.cases import BF16, F16, F32, normal
from tests.jaxmoe.test_checkpoint import Tensors, assert_same_bits

PREFIX, BLOCK, F8 = "model.layers.3.mlp", (2, 3), jnp.float8_e4m3fn
HIDDEN, INNER = (
    10,
    5,
)  # ragged in both directions, for gate and down; block rows cross from one shared expert to the next
CONFIG = RoutingConfig(num_experts=3, top_k=2, n_shared_experts=2)


def dequantised(weight: Any, scales: Any, block: tuple[int, int]) -> np.ndarray:
    out = np.empty(weight.shape, np.float32)
    for r in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            out[r, c] = np.float32(weight[r, c]) * np.float32(scales[r // block[0], c // block[1]])
    return out


def quantise(shape: tuple[int, int], block: tuple[int, int], rng: np.random.Generator, scales: Any = F32) -> Any:
    """A float8 weight of any finite numbers, and scales that all differ."""
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])  # the two NaN
    blocks = [-(-size // edge) for size, edge in zip(shape, block, strict=True)]
    return rng.choice(codes, shape).view(F8), np.exp(rng.uniform(-7, -2, blocks)).astype(np.float32).astype(scales)


def blocks_for(
    config: RoutingConfig,
    hidden: int = HIDDEN,
    inner: int = INNER,
    *,
    block: tuple[int, int] = BLOCK,
    scales: Any = F32,
    width: int | None = None,
) -> tuple[Tensors, Tensors]:
    """A block as a checkpoint holds it, and the same dequantised, in float32."""
    rng = np.random.default_rng(0)
    mlps = {f"experts.{e}": inner for e in range(config.num_experts)}
    if config.n_shared_experts:
        mlps["shared_experts"] = width or inner * config.n_shared_experts
    stored = {f"{PREFIX}.gate.weight": np.asarray(normal(1, config.num_experts, hidden, dtype=BF16))}
    stored[f"{PREFIX}.gate.e_score_correction_bias"] = np.asarray(normal(2, config.num_experts))
    plain = dict(stored)
    for mlp, size in mlps.items():
        for projection, shape in (("gate", (size, hidden)), ("up", (size, hidden)), ("down", (hidden, size))):
            name = f"{PREFIX}.{mlp}.{projection}_proj.weight"
            stored[name], stored[f"{name}_scale_inv"] = quantise(shape, block, rng, scales)
            plain[name] = dequantised(stored[name], stored[f"{name}_scale_inv"], block)
    return stored, plain


def rounded(plain: Tensors, dtype: Any, router: Any = None) -> Tensors:
    """All but the bias in `dtype`; the router in its own."""
    kinds = {name: dtype if "_proj" in name else router or tensor.dtype for name, tensor in plain.items()}
    kinds[f"{PREFIX}.gate.e_score_correction_bias"] = F32
    return {name: tensor.astype(kinds[name]) for name, tensor in plain.items()}


def load(tensors: Any, config: RoutingConfig = CONFIG, **kwargs: Any) -> Any:
    return jaxmoe.load_hf_moe(tensors, PREFIX, config, **{"block_size": BLOCK} | kwargs)


@pytest.mark.parametrize("dtype", [None, BF16, F16, F32])
@pytest.mark.parametrize(("fused", "width"), [(True, None), (False, None), (False, 7)])
def test_values(fused: bool, width: int | None, dtype: Any) -> None:
    """Rounded once, to bfloat16 unless told otherwise; what is exported is plain."""
    stored, plain = blocks_for(CONFIG, width=width)
    want = rounded(plain, dtype or BF16, dtype)
    loaded = load(stored, fuse_shared_experts=fused, dtype=dtype)
    params, shared = (loaded, None) if fused else loaded
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, CONFIG, shared=shared), want)
    np.testing.assert_array_equal(params.gate_up[1, :, INNER:], want[f"{PREFIX}.experts.1.up_proj.weight"].T)
    np.testing.assert_array_equal(params.down[1], want[f"{PREFIX}.experts.1.down_proj.weight"].T)


def test_blocks_of_128() -> None:
    """The default, with ragged edges."""
    config = RoutingConfig(num_experts=1, top_k=1)
    stored, plain = blocks_for(config, 200, 130, block=(128, 128))
    assert stored[f"{PREFIX}.experts.0.gate_proj.weight_scale_inv"].shape == (2, 2)
    params = jaxmoe.load_hf_moe(stored, PREFIX, config)
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, config), rounded(plain, BF16))


@pytest.mark.parametrize("block", [(1, 1), (5, 3), [2, 3], (64, 1), (1, 64)])
def test_other_blocks(block: Any) -> None:
    config = dataclasses.replace(CONFIG, shared_expert_replicas=2)
    stored, plain = blocks_for(config, block=block)
    params = load(stored, config, block_size=block)
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, config), rounded(plain, BF16))


@pytest.mark.parametrize("scales", [BF16, F16])
def test_scales_of_16_bits(scales: Any) -> None:
    """Of Qwen3's checkpoints, say: widened, and the products not rounded to them."""
    stored, plain = blocks_for(CONFIG, scales=scales)
    got = jaxmoe.export_hf_moe(load(stored, dtype=F32), PREFIX, CONFIG)
    assert_same_bits(got, rounded(plain, F32, F32))


def test_jax_arrays() -> None:
    stored, plain = blocks_for(CONFIG)
    params = load({name: jnp.asarray(tensor) for name, tensor in stored.items()})
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, CONFIG), rounded(plain, BF16))


def test_nan_stays() -> None:
    stored, _ = blocks_for(CONFIG)
    stored[f"{PREFIX}.experts.2.down_proj.weight"][4, 3] = np.nan
    np.testing.assert_array_equal(np.argwhere(np.isnan(load(stored).down)), [[2, 3, 4]])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), [(None, BF16), (BF16, F32), (F16, BF16), (F32, BF16)])
@pytest.mark.parametrize("which", ["experts.0.", "experts.1.up", "shared_experts.", "shared_experts.up", "experts."])
def test_some_weights_plain(which: str, dtype: Any, kind: Any, fused: bool) -> None:
    """Each by whether it has scales; `kind` is what the plain ones are stored in."""
    stored, plain = blocks_for(CONFIG)
    for name in [name for name in plain if name.startswith(f"{PREFIX}.{which}")]:
        plain[name] = stored[name] = plain[name].astype(kind)
        del stored[f"{name}_scale_inv"]
    assert any("scale_inv" in name for name in stored)
    loaded = load(stored, fuse_shared_experts=fused, dtype=dtype)
    params, shared = (loaded, None) if fused else loaded
    got = jaxmoe.export_hf_moe(params, PREFIX, CONFIG, shared=shared)
    assert_same_bits(got, rounded(plain, dtype or BF16, dtype))


def test_a_file(tmp_path: Any) -> None:
    """As the docstring says: NumPy's loader of safetensors 0.8 has no float8, PyTorch's has."""
    torch_files = pytest.importorskip("safetensors.torch", reason="needs safetensors and torch")
    from safetensors.numpy import save_file

    stored, plain = blocks_for(CONFIG)
    save_file(stored, tmp_path / "block.safetensors")
    tensors = torch_files.load_file(tmp_path / "block.safetensors")
    assert str(tensors[f"{PREFIX}.experts.0.up_proj.weight"].dtype) == "torch.float8_e4m3fn"
    params = load({name: jnp.from_dlpack(tensor) for name, tensor in tensors.items()})
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, CONFIG), rounded(plain, BF16))
    with pytest.raises(ValueError, match=r"gate.weight: expected an array .*, got Tensor"):
        load(tensors)
    tensors |= {name: stored[name] for name in tensors if "_proj" not in name}
    with pytest.raises(ValueError, match=r"gate_proj.weight: expected an array float8_e4m3fn \[I, 10\], got Tensor"):
        load(tensors)


def test_memory() -> None:
    """One expert at a time: besides the result there is never more than a few weights of one."""
    config = RoutingConfig(num_experts=64, top_k=1)
    rng = np.random.default_rng(0)
    one, scales = quantise((64, 128), (128, 128), rng)
    tensors: Tensors = {"gate.weight": np.ones((64, 128), np.float32)}
    for mlp in range(64):
        for projection, weight in (("gate", one), ("up", one), ("down", one.T)):
            tensors[f"experts.{mlp}.{projection}_proj.weight"] = weight
            tensors[f"experts.{mlp}.{projection}_proj.weight_scale_inv"] = scales
    tracemalloc.start()
    params = jaxmoe.load_hf_moe(tensors, "", config, has_bias=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = params.gate_up.nbytes + params.down.nbytes
    assert result < peak < 1.2 * result  # all of it in float32 would be 2 * result more


WEIGHT, SCALE = "experts.1.gate_proj.weight", "experts.1.gate_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        *(
            (f"{name}_scale_inv", None, f"{name}: expected float8_e4m3fn with .* got float8_e4m3fn without one")
            for name in ("experts.0.gate_proj.weight", "experts.1.up_proj.weight", "shared_experts.down_proj.weight")
        ),
        (WEIGHT, None, f"{WEIGHT}: expected a tensor, got none"),
        *(
            (WEIGHT, np.zeros((5, 10), kind), f"{WEIGHT}: expected float8_e4m3fn .* got {np.dtype(kind).name} with one")
            for kind in (np.int8, np.uint8, BF16, F32, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float8_e4m3b11fnuz)
        ),
        (WEIGHT, np.zeros((5, 9), F8), rf"{WEIGHT}: expected float8_e4m3fn \[5, 10\], got float8_e4m3fn\[5, 9\]"),
        (WEIGHT, [1.0], rf"{WEIGHT}: expected an array float8_e4m3fn \[5, 10\], got list"),
        (SCALE, np.ones((3, 5), F32), rf"{SCALE}: expected .*float32 \[3, 4\], got float32\[3, 5\]"),
        (SCALE, np.ones((4, 3), F32), rf"{SCALE}: expected .*float32 \[3, 4\], got float32\[4, 3\]"),
        (SCALE, np.ones((), F32), rf"{SCALE}: expected .*float32 \[3, 4\], got float32\[\]"),
        (SCALE, np.ones((3, 4)), rf"{SCALE}: expected .*float32 \[3, 4\], got float64\[3, 4\]"),
        (SCALE, np.ones((3, 4), jnp.float8_e8m0fnu), rf"{SCALE}: expected .*float32 \[3, 4\], got float8_e8m0fnu\[3"),
        (SCALE, [1.0], rf"{SCALE}: expected an array .* \[3, 4\], got list"),
        ("gate.weight", np.zeros((3, 10), F8), r"gate.weight: expected bfloat16 or .*, got float8_e4m3fn\[3, 10\]"),
        ("gate.weight_scale_inv", np.ones((1, 1), F32), "gate.weight_scale_inv: expected no tensor of this name in"),
        ("experts.3.up_proj.weight_scale_inv", np.ones((3, 4), F32), "experts.3.up_proj.weight_scale_inv: expected no"),
        *(
            (f"experts.1.up_proj.{name}", np.ones(1), f"experts.1.up_proj.{name}: expected no tensor of this name, .*")
            for name in ("weight_scale", "weight_scale_2", "weight_packed", "qweight", "scales", "input_scale")
        ),
    ],
)
def test_wrong_tensor(name: str, tensor: Any, error: str) -> None:
    stored, _ = blocks_for(CONFIG)
    stored[f"{PREFIX}.{name}"] = tensor
    if tensor is None:
        del stored[f"{PREFIX}.{name}"]
    for dtype in (None, F32):
        with pytest.raises(ValueError, match=rf"^{PREFIX}.{error}"):
            load(stored, dtype=dtype)


def test_other_formats_are_named() -> None:
    """Also where they take the place of the weight; and float8 of other kinds, without scales."""
    stored, plain = blocks_for(CONFIG)
    name = f"{PREFIX}.experts.1.down_proj.weight"
    for other in ("weight_packed", "qweight"):
        there = {n: t for n, t in plain.items() if n != name} | {f"{PREFIX}.experts.1.down_proj.{other}": np.ones(1)}
        with pytest.raises(ValueError, match=rf"^{PREFIX}.experts.1.down_proj.{other}: .* only weight, and weight_sca"):
            load(there)
    del stored[f"{name}_scale_inv"]
    for kind in (jnp.float8_e5m2, jnp.float8_e4m3fnuz):
        there = stored | {name: np.zeros((10, 5), kind)}
        with pytest.raises(ValueError, match=rf"^{name}: expected bfloat16 \[10, 5\], got {np.dtype(kind).name}\["):
            load(there)


@pytest.mark.parametrize(
    "name", ["experts.0.gate_proj.weight", "experts.0.down_proj.weight", "experts.2.up_proj.weight"]
)
def test_one_dtype_for_all_experts(name: str) -> None:
    """Without `dtype` bfloat16 as soon as one weight has scales, whichever comes first."""
    stored, plain = blocks_for(CONFIG)
    for kind in (F32, F16):
        mixed = stored | {f"{PREFIX}.{name}": plain[f"{PREFIX}.{name}"].astype(kind)}
        del mixed[f"{PREFIX}.{name}_scale_inv"]
        with pytest.raises(
            ValueError, match=rf"^{PREFIX}.{name}: expected bfloat16 \[.*\], got {np.dtype(kind).name}\["
        ):
            load(mixed)


@pytest.mark.parametrize("size", [None, 128, (128,), (0, 3), (2, 3, 1), (2.0, 3), (True, 3), (-2, 3), "23", np.ones(2)])
def test_wrong_block_size(size: Any) -> None:
    for tensors in blocks_for(CONFIG):  # where nothing is quantised, too
        with pytest.raises(ValueError, match=r"^block_size: expected two positive ints, rows and columns, got"):
            load(tensors, block_size=size)
