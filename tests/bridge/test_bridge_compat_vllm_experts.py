"""fused_experts of bridge.compat.vllm against a loop over pairs: weights as vLLM keeps them, read where they lie."""

from __future__ import annotations

import functools
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import bridge
from bridge.compat import vllm
from tests.bridge.test_bridge_fused_experts import ACTIVATIONS, by_hand, here, on_the_cpu
from tests.bridge.test_bridge_fused_experts import given as given_views
from tests.jaxmoe import test_fused_experts as behind_routing
from tests.jaxmoe.test_fused_experts import IDS, INNER, TOLERANCE, WIDTH, Case

__all__ = ["on_the_cpu"]  # a fixture
pytestmark = pytest.mark.usefixtures("compiled_quickly")

SOME = Case("some experts, not in the order of their ids", (7, 2, 4))
ONE = Case("one expert, without a map", (0,), highest=1)
ALL = Case("without a map")
CASES = [
    *(case for case in behind_routing.CASES if case.max_rows is None and case.activation == "silu"),
    Case("ids past all experts", (7, 2, 4), lowest=-3, highest=IDS + 4),
    Case("one token", (7, 2, 4), tokens=1),
]


def given(case: Case) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(ids, leaves of autograd: x, weights, w1 and w2 as vLLM keeps them; the result's gradient)."""
    ids, (x, weights, *stack), up = given_views(case, (True, True))
    return ids, [x, weights, *(weight.detach().mT.requires_grad_() for weight in stack)], up


def fused(case: Case, ids: torch.Tensor, *leaves: torch.Tensor, **options: Any) -> torch.Tensor:
    """Called as vLLM's layers call it."""
    x, weights, w1, w2 = leaves
    if case not in (ONE, ALL):
        options = {"expert_map": here(case.here), "global_num_experts": IDS, **options}
    return vllm.fused_experts(x, w1, w2, weights, ids, **options)


def stated(case: Case, ids: torch.Tensor, *leaves: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    x, weights, w1, w2 = leaves
    return by_hand(replace(case, activation=activation), ids, x, weights, w1.mT, w2.mT)


VALUES = [(case, "silu") for case in (*CASES, ONE, ALL)]
VALUES += [(case, name) for case in (SOME, ALL, CASES[4]) for name in ("gelu", "gelu_tanh")]


@pytest.mark.parametrize(("case", "activation"), VALUES, ids=lambda value: getattr(value, "why", value))
def test_against_plain_torch(case: Case, activation: str, way: str) -> None:
    """A loop in float64: the result and every gradient, in the layout of what it is of."""
    ids, leaves, up = given(case)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = stated(case, ids, *exact, activation=activation)
    wants = torch.autograd.grad(want, exact, up.double(), allow_unused=True, materialize_grads=True)
    y = fused(case, ids, *leaves, activation=activation)
    with torch.no_grad():
        torch.testing.assert_close(fused(case, ids, *leaves, activation=activation), y.detach(), rtol=2e-6, atol=2e-6)
    for found, wanted, like in zip(
        (y, *torch.autograd.grad(y, leaves, up)), (want, *wants), (leaves[0], *leaves), strict=True
    ):
        assert (found.dtype, found.shape, found.stride()) == (like.dtype, like.shape, like.stride())
        torch.testing.assert_close(found.double(), wanted, **TOLERANCE)
        assert wanted.any() or case not in (SOME, ONE, ALL)


def test_activations_are_told_apart() -> None:
    """Two of them differ by less than the tests above allow."""
    ids, leaves, _ = given(SOME)
    exact = [leaf.detach().double() for leaf in leaves]
    wanted = {name: stated(SOME, ids, *exact, activation=name) for name in ACTIVATIONS}
    for name in ACTIVATIONS:
        y = fused(SOME, ids, *leaves, activation=name)
        errors = {other: float((y.detach() - want).abs().max()) for other, want in wanted.items()}
        assert 10 * errors.pop(name) < min(errors.values())


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, activation: str, way: str) -> None:
    """Weights of the sums keep their own: vLLM's are float32."""
    ids, (x, weights, w1, w2), up = given(SOME)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, w1, w2)]
    leaves.insert(1, weights)
    y = fused(SOME, ids, *leaves, activation=activation)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = stated(SOME, ids, *exact, activation=activation)
    gradients = torch.autograd.grad(y, leaves, up.to(dtype)), torch.autograd.grad(want, exact, up.double())
    for found, wanted, like in zip((y, *gradients[0]), (want, *gradients[1]), (x.to(dtype), *leaves), strict=True):
        assert found.dtype == like.dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03 * float(wanted.detach().abs().max()))
        assert wanted.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint32], ids=str)
def test_ids_of_any_integer_dtype(dtype: torch.dtype, way: str) -> None:
    """Also where 32 bits do not hold them: they are no expert's then."""
    ids, leaves, _ = given(SOME)
    wanted = fused(SOME, ids, *leaves)
    ids = ids.where(ids >= 0, IDS)
    if dtype != torch.int16:
        ids = ids.long().where(ids < IDS, 2**32 + 7 if dtype == torch.int64 else 2**31 + 7)
    assert torch.equal(fused(SOME, ids.to(dtype), *leaves), wanted)


def test_how_many_ids_there_are(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A map's entries behind them are nobody's; kernels are told, which choose tiles by it."""
    told, function = list[Any](), bridge.fused_experts
    monkeypatch.setattr(
        bridge, "fused_experts", lambda *args, **options: told.append(options) or function(*args, **options)
    )
    ids, leaves, _ = given(SOME)
    some = functools.partial(fused, SOME)
    few = ids.where(ids < 7, -1)
    of_three = ids.where(ids < 3, -1)
    assert not torch.equal(some(ids, *leaves), some(few, *leaves))
    assert torch.equal(some(ids, *leaves, global_num_experts=7), some(few, *leaves))
    assert torch.equal(some(ids, *leaves, global_num_experts=-1), some(of_three, *leaves)), "as many as w1 has"
    assert [len(options["expert_map"]) for options in told] == [9, 9, 7, 9, 3, 9]
    told.clear()
    for number in (-1, 3, np.int64(9), 1000):  # without a map there are no experts past those of w1
        assert torch.equal(
            some(ids, *leaves, expert_map=None, global_num_experts=number), some(of_three, *leaves, expert_map=None)
        )
    assert all(options["expert_map"] is None for options in told)


class Activation(Enum):
    """vLLM's MoEActivation, of what there is here."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2_NO_MUL = "relu2_no_mul"


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU, Activation.GELU_TANH], ids=str)
def test_activation_as_an_enum(activation: Activation) -> None:
    ids, leaves, _ = given(SOME)
    assert torch.equal(
        fused(SOME, ids, *leaves, activation=activation), fused(SOME, ids, *leaves, activation=activation.value)
    )


# What vLLM 0.33 has in FUSED_MOE_UNQUANTIZED_CONFIG, as an object of attributes.
UNQUANTISED = {
    **dict.fromkeys(("quant_dtype", "weight_quant_dtype", "block_shape", "ocp_mx_scheme")),
    **dict.fromkeys(("w1_scale", "w2_scale", "w1_zp", "w2_zp", "w1_bias", "w2_bias", "a1_scale", "a2_scale")),
    **dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "g1_alphas", "g2_alphas")),
    **dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False),
    **dict.fromkeys(("is_quantized", "per_act_token_quant", "is_scale_transposed"), False),
    "is_scale_swizzled": True,
    "mx_alignment": 0,
}


def config(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**UNQUANTISED, **changed})


class OfPrecision(SimpleNamespace):
    """vLLM's, of MXFP4: `w1_scale` is no tensor then, which its property asserts."""

    quant_dtype, weight_quant_dtype = None, "mxfp4"

    @property
    def w1_scale(self) -> torch.Tensor:
        raise AssertionError


@pytest.mark.parametrize("found", [config(), SimpleNamespace(quant_dtype=None)], ids=["vLLM 0.33", "of one attribute"])
def test_config_that_quantises_nothing(found: Any) -> None:
    ids, leaves, _ = given(SOME)
    assert torch.equal(fused(SOME, ids, *leaves, quant_config=found), fused(SOME, ids, *leaves))


def test_nothing_that_goes_in_is_written_to(way: str) -> None:
    ids, leaves, up = given(SOME)
    local = here(SOME.here)
    before = [tensor.clone() for tensor in (ids, local, *leaves)]
    y = fused(SOME, ids, *leaves, expert_map=local)
    torch.autograd.grad(y, leaves, up)
    assert y.data_ptr() not in [tensor.data_ptr() for tensor in (ids, *leaves)]
    for tensor, old in zip((ids, local, *leaves), before, strict=True):
        assert torch.equal(tensor, old)


def test_weights_are_passed_on_as_views(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Of vLLM's memory, whatever torch would call a copy."""
    function, told = bridge.fused_experts, list[torch.Tensor]()
    monkeypatch.setattr(bridge, "fused_experts", lambda *args, **how: told.extend(args[3:5]) or function(*args, **how))
    ids, leaves, _ = given(SOME)
    fused(SOME, ids, *leaves)
    for found, weight in zip(told, leaves[2:], strict=True):
        assert (found.data_ptr(), found.dtype) == (weight.data_ptr(), weight.dtype)
        assert (found.shape, found.stride()) == (weight.mT.shape, weight.mT.stride())


def test_rows_that_lie_apart(way: str) -> None:
    """The kernels read them; on the way through JAX they are refused by name, as vLLM refuses them."""
    ids, (x, *rest), _ = given(SOME)
    wide = torch.full((len(x), 2 * WIDTH), torch.nan)
    wide[:, WIDTH:] = x.detach()
    run = lambda x: fused(SOME, ids, x, *(leaf.detach() for leaf in rest))
    if way == "dlpack":
        with pytest.raises(ValueError, match=r"^hidden_states: expected a contiguous .*pass hidden_states.contiguous"):
            run(wide[:, WIDTH:])
        return
    torch.testing.assert_close(run(wide[:, WIDTH:]), run(x.detach()), rtol=2e-6, atol=2e-6)


def test_one_graph_for_every_number_of_tokens() -> None:
    """torch.compile(fullgraph=True), of the checks too; gradients as well."""
    _, (_, _, *stack), _ = given(SOME)
    local, unquantised = here(SOME.here), config()

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *stack: torch.Tensor) -> torch.Tensor:
        return vllm.fused_experts(x, *stack, weights, ids, Activation.GELU, False, IDS, local, unquantised)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (5, 9, 3, 12):
        ids, (x, weights, *_), up = given(replace(SOME, tokens=tokens))
        leaves = [x, weights, *stack]
        found = [function(x, weights, ids.long(), *stack) for function in (whole, run)]
        torch.testing.assert_close(*found)
        got, wanted = (torch.autograd.grad(y, leaves, up) for y in found)
        assert all(gradient.any() for gradient in wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "of five tokens, then of any number"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fake_tensors(activation: str) -> None:
    """Shapes and dtypes without values, with gradients."""
    with FakeTensorMode():
        empty = functools.partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)
        x, w1, w2 = empty(7, WIDTH), empty(4, 2 * INNER, WIDTH), empty(4, WIDTH, INNER)
        weights, ids = torch.empty(7, 3, requires_grad=True), torch.empty(7, 3, dtype=torch.int64)
        local = torch.empty(IDS, dtype=torch.int32)
        y = vllm.fused_experts(x, w1, w2, weights, ids, activation, global_num_experts=IDS, expert_map=local)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        leaves = (x, w1, w2, weights)
        found = torch.autograd.grad(y.sum(), leaves)
        assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in leaves]


# For tests/bridge/test_bridge_compat.py, where all drop-ins are held to the same.

SIGNATURE = {
    "hidden_states": "",
    "w1": "",
    "w2": "",
    "topk_weights": "",
    "topk_ids": "",
    "activation": "'silu'",
    "apply_router_weight_on_input": "False",
    "global_num_experts": "-1",
    "expert_map": "None",
    "quant_config": "None",
}
zeros, ints = torch.zeros, functools.partial(torch.zeros, dtype=torch.int32)


def arguments(ids: torch.Tensor, experts: int, width: int) -> dict[str, Any]:
    """A call as it should be."""
    return {
        "hidden_states": zeros(len(ids), width),
        "w1": zeros(experts, 2 * INNER, width),
        "w2": zeros(experts, width, INNER),
        "topk_weights": zeros(ids.shape),
        "topk_ids": ids,
    }


NO_BIAS = "expected None, plain weights being all there is here, got"
# For T=5 tokens, two of E=6 experts each, and H=16.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_states": zeros(5)}, r"hidden_states: expected bfloat16 .* \[T, H\], got float32\[5\]"),
    ({"hidden_states": ints(5, 16)}, r"hidden_states: expected bfloat16 .* \[T, H\], got int32\[5, 16\]"),
    ({"hidden_states": None}, "hidden_states: expected a torch.Tensor .* got NoneType"),
    ({"hidden_states": zeros(81)[1:].view(5, 16)}, r"hidden_states: .* pass hidden_states.clone\(\)"),
    ({"w1": zeros(6, 16, 12)}, r"w1: expected float32 \[E, 2 \* I, 16\], got float32\[6, 16, 12\]"),
    ({"w1": zeros(6, 12, 16).half()}, r"w1: expected float32 \[E, 2 \* I, 16\], got float16\[6, 12, 16\]"),
    ({"w1": zeros(6, 12, 16).to(torch.float8_e4m3fn)}, r"w1: expected float32 .*, got float8_e4m3fn\[6, 12, 16\]"),
    ({"w1": zeros(6, 13, 16)}, r"w1: expected an even number of rows, gate above up, got float32\[6, 13, 16\]"),
    ({"w1": zeros(0, 12, 16)}, r"w1: expected at least one element along axis 0, got float32\[0, 12, 16\]"),
    ({"w1": zeros(6, 12, 32)[:, :, ::2]}, r"w1: .*, got strides \(384, 32, 2\) for \[6, 12, 16\]; pass w1.contiguous"),
    ({"w1": zeros(6, 24, 16)[:, :12]}, r"w1: .* strides \(384, 16, 1\) for \[6, 12, 16\]; pass w1.contiguous\(\)"),
    ({"w1": zeros(6, 12, 16, device="meta")}, "w1: expected the device of the first argument, cpu, got meta"),
    ({"w1": zeros(4096, 12, 16), "w2": zeros(4096, 16, 6)}, "w1: expected at most 2048 experts, got 4096"),
    ({"w2": zeros(6, 6, 16)}, r"w2: expected float32 \[6, 16, 6\], got float32\[6, 6, 16\]"),
    ({"w2": zeros(5, 16, 6)}, r"w2: expected float32 \[6, 16, 6\], got float32\[5, 16, 6\]"),
    ({"w2": zeros(6, 16, 6).bfloat16()}, r"w2: expected float32 \[6, 16, 6\], got bfloat16"),
    ({"w2": zeros(6, 16, 12)[:, :, ::2]}, r"w2: .*, got strides \(192, 12, 2\) for \[6, 16, 6\]; pass w2.contiguous"),
    ({"w2": None}, r"w2: expected a torch.Tensor float32 \[6, 16, 6\], got NoneType"),
    ({"topk_weights": zeros(5, 3)}, r"topk_weights: expected .* \[5, 2\], got float32\[5, 3\]"),
    ({"topk_weights": ints(5, 2)}, r"topk_weights: expected bfloat16 .* \[5, 2\], got int32\[5, 2\]"),
    ({"topk_weights": zeros(2, 5).T}, r"topk_weights: .* strides .*; pass topk_weights.contiguous\(\)"),
    ({"topk_ids": zeros(5, 2)}, r"topk_ids: expected integers, got float32\[5, 2\]"),
    ({"topk_ids": ints(10)}, "topk_ids: expected a torch.Tensor with 2 axes"),
    ({"topk_ids": ints(4, 2)}, r"topk_ids: expected int32 \[5, K\], got int32\[4, 2\]"),
    ({"topk_ids": ints(2, 5).T}, r"topk_ids: .* strides .*; pass topk_ids.contiguous\(\)"),
    ({"topk_ids": ints(5, 0), "topk_weights": zeros(5, 0)}, "topk_ids: expected at least one element along axis 1"),
    ({"activation": "swigluoai"}, r"activation: expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'swigluoai'"),
    ({"activation": Activation.RELU2_NO_MUL}, "activation: expected one of .*, got 'relu2_no_mul'"),
    ({"activation": None}, "activation: expected one of .*, got None"),
    ({"activation": ["silu"]}, r"activation: expected one of .*, got \['silu'\]"),
    ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input: expected False, .* got True"),
    ({"global_num_experts": 5}, r"global_num_experts: expected -1 or an int from w1.shape\[0\]=6 on, got 5"),
    ({"global_num_experts": 0}, "global_num_experts: expected .*, got 0"),
    ({"global_num_experts": 6.0}, "global_num_experts: expected .*, got 6.0"),
    ({"global_num_experts": None}, "global_num_experts: expected .*, got None"),
    ({"global_num_experts": True}, "global_num_experts: expected .*, got True"),
    ({"expert_map": ints(5)}, "expert_map: expected at least global_num_experts=6 ids, got 5"),
    (
        {"expert_map": ints(8), "global_num_experts": 9},
        "expert_map: expected at least global_num_experts=9 ids, got 8",
    ),
    ({"expert_map": zeros(6)}, r"expert_map: expected int32 \[global_num_experts\], got float32\[6\]"),
    ({"expert_map": ints(12)[::2]}, r"expert_map: .* strides \(2,\) for \[6\]; pass expert_map.contiguous\(\)"),
    ({"quant_config": "fp8"}, "quant_config: expected None or a FusedMoEQuantConfig of vLLM, got str"),
    ({"quant_config": config(quant_dtype=torch.int8)}, rf"quant_config.quant_dtype: {NO_BIAS} torch.int8"),
    ({"quant_config": config(weight_quant_dtype="int4")}, rf"quant_config.weight_quant_dtype: {NO_BIAS} 'int4'"),
    ({"quant_config": OfPrecision()}, rf"quant_config.weight_quant_dtype: {NO_BIAS} 'mxfp4'"),
    ({"quant_config": config(block_shape=[128, 128])}, rf"quant_config.block_shape: {NO_BIAS} \[128, 128\]"),
    ({"quant_config": config(gemm1_clamp_limit=7.0)}, rf"quant_config.gemm1_clamp_limit: {NO_BIAS} 7.0"),
    *(
        ({"quant_config": config(**{name: zeros(6, 1)})}, rf"quant_config.{name}: {NO_BIAS} float32\[6, 1\]")
        for name in ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "w1_bias", "w2_bias")
    ),
    ({"quant_config": config(gemm1_alpha=1.702)}, rf"quant_config.gemm1_alpha: {NO_BIAS} 1.702"),
    ({"quant_config": config(gemm1_beta=1.0)}, rf"quant_config.gemm1_beta: {NO_BIAS} 1.0"),
]
