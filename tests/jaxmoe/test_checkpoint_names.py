"""The names of other families than DeepSeek's: found from the tensors, written on request, never mixed.

That they are those of the models' own files is tested in tests/parity/test_checkpoint_families.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import RoutingConfig
from jaxmoe.checkpoint_names import NAMINGS, UNFIT
from tests.cases import BF16, F16, F32, normal
from tests.jaxmoe.test_checkpoint import Tensors, assert_same_bits
from tests.jaxmoe.test_checkpoint_fp8 import BLOCK, blocks_for, rounded

HIDDEN, INNER, PREFIX = 10, 3, "model.layers.3.mlp"
CONFIG = RoutingConfig(num_experts=3, top_k=2, n_shared_experts=2)
GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # written out: w2 is down

# family -> (the bias' name and shape, the projections of an expert, whether there are shared experts)
FAMILIES: dict[str, tuple[str | None, tuple[int, ...], dict[str, str], bool]] = {
    "deepseek": ("gate.e_score_correction_bias", (3,), GATED, True),
    "ernie": ("moe_statics.e_score_correction_bias", (1, 3), GATED, True),
    "minimax": ("e_score_correction_bias", (3,), NUMBERED, False),
    "mixtral": (None, (), NUMBERED, False),
    "kimi-linear": ("gate.e_score_correction_bias", (3,), NUMBERED, True),
    "qwen3-vl": (None, (), {}, False),
}


def params_for(config: RoutingConfig, bias: bool, dtype: Any = BF16) -> jaxmoe.MoEParams:
    return jaxmoe.MoEParams(
        router=normal(0, config.num_experts, HIDDEN, dtype=F32),
        bias=normal(1, config.num_experts) if bias else None,
        gate_up=normal(2, config.num_expert_ids, HIDDEN, 2 * INNER, dtype=dtype),
        down=normal(3, config.num_expert_ids, INNER, HIDDEN, dtype=dtype),
    )


def block_of(family: str, dtype: Any = BF16) -> tuple[Tensors, jaxmoe.MoEParams, RoutingConfig]:
    """A block with the family's names, made here from the parameters that it has to become."""
    bias, shape, projections, has_shared = FAMILIES[family]
    config = CONFIG if has_shared else dataclasses.replace(CONFIG, n_shared_experts=0)
    params = params_for(config, bias is not None, dtype)
    gate_up, down = np.asarray(params.gate_up), np.asarray(params.down)
    block = {"gate.weight": np.asarray(params.router)}
    if bias is not None:
        block[bias] = np.asarray(params.bias).reshape(shape)
    if not projections:
        block |= {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    for e in range(config.num_experts if projections else 0):
        block[f"experts.{e}.{projections['gate_proj']}.weight"] = gate_up[e, :, :INNER].T
        block[f"experts.{e}.{projections['up_proj']}.weight"] = gate_up[e, :, INNER:].T
        block[f"experts.{e}.{projections['down_proj']}.weight"] = down[e].T
    if has_shared:
        block["shared_experts.gate_proj.weight"] = np.concatenate([gate_up[3, :, :INNER], gate_up[4, :, :INNER]], 1).T
        block["shared_experts.up_proj.weight"] = np.concatenate([gate_up[3, :, INNER:], gate_up[4, :, INNER:]], 1).T
        block["shared_experts.down_proj.weight"] = np.concatenate([down[3], down[4]]).T
    return {f"{PREFIX}.{name}": np.ascontiguousarray(tensor) for name, tensor in block.items()}, params, config


def assert_same_params(got: jaxmoe.MoEParams, want: jaxmoe.MoEParams) -> None:
    for name in ("router", "bias", "gate_up", "down"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def load(tensors: Any, config: RoutingConfig, **kwargs: Any) -> Any:
    return jaxmoe.load_hf_moe(tensors, PREFIX, config, **kwargs)


def test_every_family_is_tested() -> None:
    assert FAMILIES.keys() == NAMINGS.keys()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, dtype: Any) -> None:
    """Load, export, load: each bit for bit; and no other family's names are written."""
    tensors, want, config = block_of(family, dtype)
    params = load(tensors, config, has_bias=want.bias is not None)
    assert_same_params(params, want)
    exported = jaxmoe.export_hf_moe(params, PREFIX, config, names=family)
    assert_same_bits(exported, tensors)
    assert_same_params(load(exported, config, has_bias=want.bias is not None), want)
    assert (jaxmoe.export_hf_moe(params, PREFIX, config).keys() == tensors.keys()) == (family == "deepseek")
    if config.n_shared_experts:
        routed, shared = load(tensors, config, fuse_shared_experts=False)
        assert_same_bits(jaxmoe.export_hf_moe(routed, PREFIX, config, shared=shared, names=family), tensors)


@pytest.mark.parametrize(("family", "other"), list(itertools.permutations(FAMILIES, 2)))
def test_from_one_family_to_another(family: str, other: str) -> None:
    """A block becomes one of another family, where that has names for all that there is."""
    tensors, want, config = block_of(family)
    params = load(tensors, config, has_bias=want.bias is not None)
    if config.n_shared_experts and not FAMILIES[other][3]:
        with pytest.raises(ValueError, match=rf"^config.n_shared_experts: expected 0 for names='{other}', got 2"):
            jaxmoe.export_hf_moe(params, PREFIX, config, names=other)
    elif params.bias is not None and FAMILIES[other][0] is None:
        with pytest.raises(ValueError, match=rf"^params.bias: expected None for names='{other}', got an array"):
            jaxmoe.export_hf_moe(params, PREFIX, config, names=other)
    else:
        exported = jaxmoe.export_hf_moe(params, PREFIX, config, names=other)
        assert_same_params(load(exported, config, has_bias=want.bias is not None), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(family: str) -> None:
    tensors, want, config = block_of(family)
    params = load(tensors, config, has_bias=want.bias is not None, dtype=F32, bias_dtype=F16)
    assert {a.dtype for a in (params.router, params.gate_up, params.down)} == {jnp.dtype(F32)}
    np.testing.assert_array_equal(params.gate_up, want.gate_up.astype(F32))
    assert params.bias is None or params.bias.dtype == F16


@pytest.mark.parametrize("family", ["minimax", "kimi-linear"])
def test_fp8(family: str) -> None:
    """MiniMax-M2 is published so: the scales are beside the weights under their other names, too."""
    _, _, projections, has_shared = FAMILIES[family]
    config = CONFIG if has_shared else dataclasses.replace(CONFIG, n_shared_experts=0)
    stored, plain = blocks_for(config)

    def renamed(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            for old, new in projections.items() if ".experts." in name else ():
                name = name.replace(f".{old}.", f".{new}.")
            if name.endswith("e_score_correction_bias"):
                name = f"{PREFIX}.{FAMILIES[family][0]}"
            out[name] = tensor
        return out

    quantised = renamed(stored)
    assert f"{PREFIX}.experts.0.w2.weight_scale_inv" in quantised
    params = load(quantised, config, block_size=BLOCK)
    assert_same_bits(jaxmoe.export_hf_moe(params, PREFIX, config, names=family), renamed(rounded(plain, BF16)))
    name = f"{PREFIX}.experts.1.w3.weight"
    with pytest.raises(ValueError, match=rf"^{name}: expected float8_e4m3fn with .* got float8_e4m3fn without one"):
        load({n: t for n, t in quantised.items() if n != f"{name}_scale_inv"}, config, block_size=BLOCK)
    with pytest.raises(
        ValueError, match=rf"^{PREFIX}.experts.0.w1.scale: expected no tensor of this name, only weight"
    ):
        load(quantised | {f"{PREFIX}.experts.0.w1.scale": np.ones(1)}, config, block_size=BLOCK)


@pytest.mark.parametrize(("hidden", "inner"), [(10, 3), (6, 3), (3, 3), (3, 6), (4, 1)])
def test_stacks_either_way_round(hidden: int, inner: int) -> None:
    """As published and as transformers saves them, also where one of the two would fit both ways."""
    config = RoutingConfig(num_experts=3, top_k=2)
    gate_up = np.asarray(normal(0, 3, hidden, 2 * inner))
    down = np.asarray(normal(1, 3, inner, hidden))
    for gate_up_there, down_there in ((gate_up, down), (gate_up.swapaxes(1, 2), down.swapaxes(1, 2))):
        stacks = {"experts.gate_up_proj": gate_up_there, "experts.down_proj": down_there}
        params = jaxmoe.load_hf_moe(
            {"gate.weight": np.ones((3, hidden), np.float32)} | stacks, "", config, has_bias=False
        )
        np.testing.assert_array_equal(params.gate_up, gate_up)
        np.testing.assert_array_equal(params.down, down)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("experts.down_proj", None, "expected a tensor, got none"),
        ("experts.down_proj", np.zeros((3, 4, 10), BF16), r"expected bfloat16 \[3, 3, 10\], got bfloat16\[3, 4, 10\]"),
        ("experts.down_proj", np.zeros((3, 10, 3), BF16), r"expected bfloat16 \[3, 3, 10\], got bfloat16\[3, 10, 3\]"),
        ("experts.down_proj", np.zeros((3, 3, 10), F16), r"expected bfloat16 \[3, 3, 10\], got float16\[3, 3, 10\]"),
        ("experts.gate_up_proj", np.zeros((3, 10, 5), BF16), "expected an even last axis, gate and up .*, got 5"),
        (
            "experts.gate_up_proj",
            np.zeros((2, 10, 6), BF16),
            r"expected .*\[3, rows, columns\], got bfloat16\[2, 10, 6",
        ),
        ("experts.gate_up_proj", np.zeros((3, 9, 6), BF16), r"expected .*\[3, 10, 2 \* I\], got bfloat16\[3, 9, 6\]"),
        ("experts.gate_up_proj", [1.0], r"expected an array .*\[3, rows, columns\], got list"),
        ("experts.gate_up_proj_scale_inv", np.ones(3), "expected no tensor of this name in the block, got one"),
    ],
)
def test_wrong_stack(name: str, tensor: Any, message: str) -> None:
    tensors, _, config = block_of("qwen3-vl")
    tensors[f"{PREFIX}.{name}"] = tensor
    if tensor is None:
        del tensors[f"{PREFIX}.{name}"]
    with pytest.raises(ValueError, match=rf"^{PREFIX}.{name}: {message}"):
        load(tensors, config, has_bias=False)


@pytest.mark.parametrize(
    ("gate_up", "down", "message"),
    [
        ((3, 5, 10), (3, 10, 2), r"gate_up_proj: expected an even second axis, gate and up side by side, got 5"),
        ((3, 6, 10), (3, 10, 4), r"down_proj: expected bfloat16 \[3, 10, 3\], got bfloat16\[3, 10, 4\]"),
        ((3, 6, 10), (3, 3, 10), r"gate_up_proj: expected .*\[3, 10, 2 \* I\], got bfloat16\[3, 6, 10\]"),
    ],
)
def test_wrong_stack_as_transformers_saves_it(gate_up: tuple[int, ...], down: tuple[int, ...], message: str) -> None:
    """In the shapes that the caller has."""
    tensors, _, config = block_of("qwen3-vl")
    tensors |= {
        f"{PREFIX}.experts.{name}_proj": np.zeros(of, BF16) for name, of in (("gate_up", gate_up), ("down", down))
    }
    with pytest.raises(ValueError, match=rf"^{PREFIX}.experts.{message}"):
        load(tensors, config, has_bias=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_superfluous_tensors_are_named(family: str) -> None:
    """Each; without Ernie's bias, the one tensor that tells the two apart, DeepSeek's is."""
    tensors, want, config = block_of(family)
    has_bias = want.bias is not None
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        missing = name.replace("moe_statics", "gate")
        with pytest.raises(ValueError, match=rf"^{missing}: expected a tensor, got none"):
            load(rest, config, has_bias=has_bias)
    for name in (f"{PREFIX}.norm.weight", f"{PREFIX}.experts.weight", f"{PREFIX}.gate.scale"):
        with pytest.raises(ValueError, match=rf"^{name}: expected no tensor of this name in the block, got one"):
            load(tensors | {name: np.ones(1)}, config, has_bias=has_bias)


@pytest.mark.parametrize("family", ["minimax", "mixtral", "kimi-linear"])
def test_an_expert_too_many(family: str) -> None:
    tensors, want, config = block_of(family)
    name = f"{PREFIX}.experts.3.w1.weight"
    with pytest.raises(ValueError, match=rf"^{name}: expected no tensor of this name in the block, got one"):
        load(tensors | {name: np.ones((INNER, HIDDEN), BF16)}, config, has_bias=want.bias is not None)


@pytest.mark.parametrize(
    ("family", "name", "beside"),
    [
        ("deepseek", "experts.1.w1.weight", "experts.0.down_proj.weight"),
        ("deepseek", "moe_statics.e_score_correction_bias", "gate.e_score_correction_bias"),
        ("deepseek", "e_score_correction_bias", "experts.0.down_proj.weight"),
        ("deepseek", "experts.gate_up_proj", "experts.0.down_proj.weight"),
        ("ernie", "experts.2.w3.weight_scale_inv", "experts.0.down_proj.weight"),
        ("minimax", "experts.0.up_proj.weight", "e_score_correction_bias"),
        ("minimax", "gate.e_score_correction_bias", "e_score_correction_bias"),
        ("minimax", "shared_experts.up_proj.weight", "e_score_correction_bias"),  # MiniMax-M3's names
        ("mixtral", "experts.0.down_proj.weight", "experts.0.w1.weight"),
        ("kimi-linear", "experts.2.gate_proj.weight", "experts.0.w1.weight"),
        ("qwen3-vl", "experts.2.gate_proj.weight", "experts.down_proj"),
        ("qwen3-vl", "gate.e_score_correction_bias", "experts.down_proj"),
    ],
)
def test_mixed_names(family: str, name: str, beside: str) -> None:
    """Both tensors are named, whether the other family's is one more or takes the place of its own."""
    tensors, _, config = block_of(family)
    either = "|".join(f"{PREFIX}.{a}: .* got {PREFIX}.{b} beside it" for a, b in ((name, beside), (beside, name)))
    for has_bias in (True, False):
        with pytest.raises(ValueError, match=rf"^({either})$") as caught:
            load(tensors | {f"{PREFIX}.{name}": np.ones(1)}, config, has_bias=has_bias)
        assert "expected names of one family of models" in str(caught.value)


def test_an_expert_of_another_family() -> None:
    tensors, _, config = block_of("deepseek")
    renamed = {
        name.replace("experts.2.gate_proj", "experts.2.w1").replace("experts.2.up_proj", "experts.2.w3"): tensor
        for name, tensor in tensors.items()
    }
    with pytest.raises(ValueError, match=r"experts.*: expected names of one family of models, got .*experts.* beside"):
        load(renamed, config)


def test_names_that_go_together_in_pairs_are_in_one_family() -> None:
    """Or there would be mixed names without two to show."""
    known = sorted(set().union(*(naming.parts() for naming in NAMINGS.values())))
    together = lambda parts: any(set(parts) <= naming.parts() for naming in NAMINGS.values())
    for size in range(3, len(known) + 1):
        for parts in itertools.combinations(known, size):
            assert together(parts) or not all(map(together, itertools.combinations(parts, 2))), parts


def test_what_a_family_has_not_is_refused() -> None:
    tensors, _, config = block_of("qwen3-vl")
    with pytest.raises(ValueError, match=r"^has_bias: expected False for tensors with the names of qwen3-vl, got True"):
        load(tensors, config)
    with pytest.raises(
        ValueError, match=r"^config.n_shared_experts: expected 0 for tensors with the names of qwen3-vl, "
    ):
        load(tensors, CONFIG, has_bias=False)
    tensors, _, config = block_of("minimax")
    with pytest.raises(
        ValueError, match=r"^config.n_shared_experts: expected 0 for tensors with the names of minimax, "
    ):
        load(tensors, CONFIG)
    with pytest.raises(ValueError, match=rf"^{PREFIX}.e_score_correction_bias: expected no tensor of this name in"):
        load(tensors, config, has_bias=False)
    tensors, _, config = block_of("mixtral")
    with pytest.raises(ValueError, match=rf"^{PREFIX}.e_score_correction_bias: expected a tensor, got none"):
        load(tensors, config)
    with pytest.raises(ValueError, match=rf"^{PREFIX}.shared_experts.gate_proj.weight: expected a tensor, got none"):
        load(tensors, CONFIG, has_bias=False)


@pytest.mark.parametrize("name", UNFIT)
def test_what_fits_no_layer_is_refused_by_name(name: str) -> None:
    """First of all, whatever else is there or not."""
    for family in FAMILIES:
        tensors, _, config = block_of(family)
        for there in (tensors, {}, {f"{PREFIX}.shared_expert.up_proj.weight": np.ones(1)}):
            with pytest.raises(ValueError, match=rf"^{PREFIX}.{name}: expected .*, got"):
                load(there | {f"{PREFIX}.{name}": np.ones(1)}, config)


def test_ungated_experts() -> None:
    """Nemotron's."""
    tensors, _, config = block_of("deepseek")
    ungated = {name: tensor for name, tensor in tensors.items() if "gate_proj" not in name}
    with pytest.raises(
        ValueError,
        match=r"experts.0.gate_proj.weight: expected a tensor, got none; experts without a gate fit no layer",
    ):
        load(ungated, config)
    neither = {name: tensor for name, tensor in ungated.items() if "up_proj" not in name}
    one = {name: tensor for name, tensor in tensors.items() if "experts.0.gate_proj" not in name}
    for missing in (neither, one):
        with pytest.raises(ValueError, match=r"experts.0.gate_proj.weight: expected a tensor, got none$"):
            load(missing, config)


@pytest.mark.parametrize("names", ["", "DeepSeek", "qwen", None, 3, ["deepseek"]])
def test_wrong_names(names: Any) -> None:
    _, params, config = block_of("deepseek")
    with pytest.raises(ValueError, match=r"^names: expected one of 'deepseek', 'ernie', 'minimax', .*, got"):
        jaxmoe.export_hf_moe(params, PREFIX, config, names=names)


def test_a_weight_is_read_once() -> None:
    """Of a quantised checkpoint reading one is the work."""

    class Counting(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read.append(name)
            return super().__getitem__(name)

    for stored in blocks_for(CONFIG):
        read: list[str] = []
        load(Counting(stored), CONFIG, block_size=BLOCK)
        weights = [name for name in read if name.endswith("_proj.weight")]
        assert len(weights) == len(set(weights)) == 12
