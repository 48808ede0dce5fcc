"""What the drop-ins share: the signatures of the originals, errors that name the argument, and no work beyond need."""

from __future__ import annotations

import doctest
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.compat import aiter, vllm
from tests.bridge import test_bridge_compat_vllm_experts as experts

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NONE = "None"
# Parameters and defaults as the originals have them: vLLM 0.33.0; aiter/ops/topk.py of ROCm/aiter, 2026.
SIGNATURES = {
    vllm.grouped_topk: {
        "hidden_states": "",
        "gating_output": "",
        "topk": "",
        "renormalize": "",
        "num_expert_group": "0",
        "topk_group": "0",
        "scoring_func": "'softmax'",
        "routed_scaling_factor": "1.0",
        "e_score_correction_bias": NONE,
    },
    vllm.moe_align_block_size: {
        "topk_ids": "",
        "block_size": "",
        "num_experts": "",
        "expert_map": NONE,
        "pad_sorted_ids": "False",
        "ignore_invalid_experts": "False",
        "return_scatter_idx": "False",
    },
    vllm.moe_permute: {
        "hidden_states": "",
        "a1q_scale": "",
        "topk_ids": "",
        "n_expert": "",
        "n_local_expert": "-1",
        "expert_map": NONE,
        "permuted_hidden_states": NONE,
        "scratch": NONE,
    },
    vllm.moe_unpermute: {
        "out": "",
        "permuted_hidden_states": "",
        "topk_weights": "",
        "inv_permuted_idx": "",
        "expert_first_token_offset": NONE,
    },
    vllm.fused_experts: experts.SIGNATURE,
    aiter.biased_grouped_topk: {
        "gating_output": "",
        "correction_bias": "",
        "topk_weights": "",
        "topk_ids": "",
        "num_expert_group": "",
        "topk_group": "",
        "need_renorm": "",
        "routed_scaling_factor": "1.0",
    },
}
NAME = lambda function: function.__name__


@pytest.mark.parametrize("function", SIGNATURES, ids=NAME)
def test_signature(function: Any) -> None:
    """A call of the original means the same here, by position and by name."""
    parameters = inspect.signature(function).parameters
    default = lambda p: "" if p.default is p.empty else repr(p.default)
    assert [(name, default(p)) for name, p in parameters.items()] == list(SIGNATURES[function].items())
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("function", SIGNATURES, ids=NAME)
def test_has_an_example(function: Any) -> None:
    assert doctest.DocTestParser().get_examples(function.__doc__ or "")
    assert function.__name__ in inspect.getmodule(function).__all__  # type: ignore[union-attr]


T, K, E, H = 5, 2, 6, 16
INT = torch.int32


def ids(*shape: int, dtype: torch.dtype = INT) -> torch.Tensor:
    return torch.arange(T * K).remainder(E).view(*(shape or (T, K))).to(dtype)


def arguments(function: Any) -> dict[str, Any]:
    """A call as it should be."""
    topk = {"num_expert_group": 2, "topk_group": 2}
    return {
        "grouped_topk": lambda: {
            "hidden_states": torch.zeros(T, H),
            "gating_output": torch.zeros(T, E),
            "topk": K,
            "renormalize": True,
            "e_score_correction_bias": torch.zeros(E),
            **topk,
        },
        "moe_align_block_size": lambda: {"topk_ids": ids(), "block_size": 4, "num_experts": E},
        "moe_permute": lambda: {
            "hidden_states": torch.zeros(T, H),
            "a1q_scale": None,
            "topk_ids": ids(),
            "n_expert": E,
        },
        "moe_unpermute": lambda: {
            "out": torch.zeros(T, H),
            "permuted_hidden_states": torch.zeros(T * K, H),
            "topk_weights": torch.zeros(T, K),
            "inv_permuted_idx": torch.arange(T * K, dtype=INT),
            "expert_first_token_offset": torch.full((E + 1,), T * K),
        },
        "fused_experts": lambda: experts.arguments(ids(), E, H),
        "biased_grouped_topk": lambda: {
            "gating_output": torch.zeros(T, E),
            "correction_bias": torch.zeros(E),
            "topk_weights": torch.zeros(T, K),
            "topk_ids": torch.zeros(T, K, dtype=INT),
            "need_renorm": True,
            **topk,
        },
    }[function.__name__]()


def tensor_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


G, A, P, U, F, B = SIGNATURES  # the functions, for the table below
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (G, {"hidden_states": tensor_of(4, H)}, r"hidden_states: expected the T=5 tokens .* got float32\[4, 16\]"),
    (G, {"hidden_states": None}, "hidden_states: .* got NoneType"),
    (G, {"gating_output": tensor_of(E)}, r"gating_output: expected a torch.Tensor with 2 axes, got float32\[6\]"),
    (G, {"gating_output": tensor_of(T, E, dtype=INT)}, "gating_output: expected bfloat16"),
    (G, {"gating_output": tensor_of(T, 1025)}, r"gating_output.shape\[1\]: expected .* 1 to 1024, got 1025"),
    (G, {"topk": 7}, "topk: expected at most the 6 experts"),
    (G, {"topk": 2.0}, "topk: expected an int"),
    (G, {"renormalize": 1}, "renormalize: expected a bool, got 1"),
    (G, {"num_expert_group": 0}, "num_expert_group: expected an int from 1"),
    (G, {"num_expert_group": 4}, "num_expert_group: expected a divisor"),
    (G, {"topk_group": 3}, "topk_group: expected an int from 1 to 2, got 3"),
    (G, {"scoring_func": "tanh"}, "scoring_func: expected one of .* got 'tanh'"),
    (G, {"routed_scaling_factor": None}, "routed_scaling_factor: expected a number"),
    (G, {"e_score_correction_bias": tensor_of(7)}, r"e_score_correction_bias: expected .*\[6\]"),
    (A, {"topk_ids": tensor_of(T, K)}, "topk_ids: expected integers, got float32"),
    (A, {"topk_ids": tensor_of(T, K, dtype=torch.bool)}, "topk_ids: expected integers, got bool"),
    (A, {"topk_ids": ids(T * K)}, "topk_ids: expected a torch.Tensor with 2 axes"),
    (A, {"topk_ids": ids().T}, "topk_ids: expected .* strides"),
    (A, {"block_size": 0}, "block_size: expected an int from 1 to .* got 0"),
    (A, {"num_experts": 0}, "num_experts: expected an int from 1 to .* got 0"),
    (A, {"expert_map": ids(T, K)}, r"expert_map: expected int32 \[num_experts\], got int32\[5, 2\]"),
    (A, {"expert_map": tensor_of(5, dtype=INT)}, "expert_map: expected at least num_experts=6 ids, got 5"),
    (A, {"expert_map": tensor_of(E)}, "expert_map: expected .* got float32"),
    (A, {"num_experts": None, "expert_map": tensor_of(E, dtype=INT)}, "num_experts: expected an int from 1 to .* None"),
    (A, {"num_experts": 6.0, "expert_map": tensor_of(E, dtype=INT)}, "num_experts: expected an int from 1 to .* 6.0"),
    (A, {"expert_map": tensor_of(E, dtype=INT), "return_scatter_idx": True}, "return_scatter_idx: expected False"),
    (P, {"hidden_states": tensor_of(4, H)}, r"hidden_states: expected .*\[5, H\]"),
    (P, {"hidden_states": tensor_of(T)}, "hidden_states: expected a torch.Tensor with 2 axes"),
    (P, {"hidden_states": tensor_of(T, 6, dtype=torch.uint8)}, "hidden_states: expected rows of whole 4-byte words"),
    (P, {"a1q_scale": tensor_of(4, 1)}, r"a1q_scale: expected one scale, or \[T=5, ...\], got float32\[4, 1\]"),
    (P, {"a1q_scale": 1.0}, "a1q_scale: .* got float"),
    (P, {"topk_ids": tensor_of(T, K)}, "topk_ids: expected integers"),
    (P, {"n_expert": 0}, "n_local_expert: expected -1 or 1 to n_expert=0"),
    (P, {"n_expert": 4096}, "n_expert: expected an int from 1 to"),
    (P, {"n_expert": "8"}, "n_expert: expected an int, got '8'"),
    (P, {"n_expert": 6.0, "n_local_expert": 3, "expert_map": tensor_of(E, dtype=INT)}, "n_expert: .* int, got 6.0"),
    (P, {"n_local_expert": "2"}, "n_local_expert: expected an int, got '2'"),
    (P, {"n_local_expert": 2.0}, "n_local_expert: expected an int, got 2.0"),
    (P, {"n_local_expert": 7}, "n_local_expert: expected -1 or 1 to n_expert=6, got 7"),
    (P, {"n_local_expert": 0}, "n_local_expert: .* got 0"),
    (P, {"expert_map": tensor_of(5, dtype=INT)}, "expert_map: expected at least n_expert=6 ids, got 5"),
    (P, {"expert_map": tensor_of(E, dtype=torch.int64)}, "expert_map: expected .* got int64"),
    (P, {"permuted_hidden_states": tensor_of(9, H)}, r"permuted_hidden_states: expected .*\[10, 16\]"),
    (
        P,
        {"permuted_hidden_states": tensor_of(10, H, dtype=torch.bfloat16)},
        "permuted_hidden_states: .* got .*bfloat16",
    ),
    (P, {"permuted_hidden_states": "out"}, "permuted_hidden_states: expected .* got str"),
    (
        P,
        {"scratch": SimpleNamespace(expert_first_token_offset=torch.zeros(4))},
        r"scratch: expected expert_first_token_offset int64 \[7\], got float32\[4\]",
    ),
    (U, {"out": None}, "out: expected a torch.Tensor with 2 axes, got NoneType"),
    (U, {"out": None, "expert_first_token_offset": None}, "out: expected a torch.Tensor with 2 axes, got NoneType"),
    (U, {"out": [[0.0]]}, "out: expected a torch.Tensor with 2 axes, got list"),
    (U, {"out": tensor_of(T, 8)}, r"out: expected .*\[5, 16\]"),
    (U, {"out": tensor_of(T, H, dtype=torch.bfloat16)}, "out: expected .* got bfloat16"),
    (U, {"permuted_hidden_states": tensor_of(T * K)}, "permuted_hidden_states: expected a torch.Tensor with 2 axes"),
    (U, {"permuted_hidden_states": tensor_of(10, H, dtype=INT)}, "permuted_hidden_states: expected bfloat16"),
    (U, {"topk_weights": tensor_of(T, K, dtype=INT)}, "topk_weights: expected bfloat16"),
    (U, {"topk_weights": tensor_of(T * K)}, "topk_weights: expected a torch.Tensor with 2 axes"),
    (U, {"inv_permuted_idx": torch.arange(T * K)}, r"inv_permuted_idx: expected int32 \[10\], got int64\[10\]"),
    (
        U,
        {"inv_permuted_idx": tensor_of(9, dtype=INT)},
        r"inv_permuted_idx: expected int32 \[10\], got int32\[9\]",
    ),
    (
        U,
        {"expert_first_token_offset": tensor_of(7, dtype=INT)},
        "expert_first_token_offset: expected int64 .* got int32",
    ),
    (U, {"expert_first_token_offset": 10}, "expert_first_token_offset: .* got int"),
    (B, {"gating_output": None}, "gating_output: .* got NoneType"),
    (B, {"correction_bias": None}, "correction_bias: expected a torch.Tensor, got NoneType"),
    (B, {"correction_bias": tensor_of(7)}, r"correction_bias: expected .*\[6\]"),
    (
        B,
        {"topk_weights": tensor_of(T, 3)},
        r"topk_weights: expected float32\[5, 2\], got float32\[5, 3\]",
    ),
    (B, {"topk_weights": tensor_of(T, K, dtype=torch.bfloat16)}, "topk_weights: expected float32.* got bfloat16"),
    (B, {"topk_ids": tensor_of(T, K, dtype=torch.int64)}, r"topk_ids: expected int32.* got int64"),
    (
        B,
        {"topk_ids": tensor_of(T, 7, dtype=INT), "topk_weights": tensor_of(T, 7)},
        r"topk_ids.shape\[1\]: .* at most the 6",
    ),
    (B, {"num_expert_group": 4}, "num_expert_group: expected a divisor"),
    (B, {"topk_group": 3}, "topk_group: expected an int from 1 to 2"),
    (B, {"need_renorm": 1}, "need_renorm: expected a bool"),
    *((F, changed, message) for changed, message in experts.WRONG),
]


@pytest.mark.parametrize("function", SIGNATURES, ids=NAME)
def test_the_table_begins_with_right_arguments(function: Any) -> None:
    function(**arguments(function))


@pytest.mark.parametrize(
    ("function", "changed", "message"), WRONG, ids=[f"{f.__name__}: {', '.join(changed)}" for f, changed, _ in WRONG]
)
def test_wrong_argument(function: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        function(**{**arguments(function), **changed})


def test_nothing_is_written_to_out_of_a_wrong_call() -> None:
    weights, chosen = torch.full((T, K), -77.0), torch.full((T, K), -77, dtype=INT)
    changed = {"topk_weights": weights, "topk_ids": chosen, "topk_group": 3}
    with pytest.raises(ValueError, match="topk_group"):
        aiter.biased_grouped_topk(**{**arguments(aiter.biased_grouped_topk), **changed})
    assert (weights == -77).all()
    assert (chosen == -77).all()


@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "no offsets"])
@pytest.mark.parametrize("name", ["permuted_hidden_states", "topk_weights"])
def test_out_with_gradients_is_refused(name: str, offsets: bool) -> None:
    """vLLM would drop the gradient in silence."""
    given = arguments(vllm.moe_unpermute)
    if not offsets:
        given["expert_first_token_offset"] = None
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor without requires_grad, as out is written to"):
        vllm.moe_unpermute(**given)
    with torch.no_grad():
        vllm.moe_unpermute(**given)


class Operations(TorchDispatchMode):
    """Notes what torch computes, by name: no views, no questions, no memory."""

    FREE = (
        "empty",
        "empty_like",
        "flatten",
        "is_pinned",
        "new_empty",
        "reshape",
        "select",
        "slice",
        "transpose",
        "unsqueeze",
        "view",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function.name().split("::")
        name = name.split(".")[0]
        if space == "aten" and name not in self.FREE and name.strip("_") not in ("detach", "alias", "unsafe_view"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


HERE = {"expert_map": torch.arange(E, dtype=INT)}
WORK: list[tuple[Any, dict[str, Any], list[str]]] = [
    (G, {}, []),
    (A, {}, []),
    (A, HERE, []),
    (A, {"return_scatter_idx": True}, ["ge", "lt", "bitwise_and", "arange", "scalar_tensor", "where"]),
    (A, {"topk_ids": ids(dtype=torch.int64)}, ["clamp", "_to_copy"]),
    (P, {}, []),
    (P, HERE, []),
    (P, {"hidden_states": tensor_of(T, H, dtype=torch.uint8)}, []),
    (P, {"a1q_scale": tensor_of(T, 1)}, ["floor_divide", "index"]),
    (U, {}, []),
    (U, {"expert_first_token_offset": None}, []),
    (F, {}, []),
    (F, HERE, []),
    (F, {"activation": "gelu"}, []),
    (F, {name: arguments(F)[name].bfloat16() for name in ("hidden_states", "w1", "w2")}, []),
    (F, {"topk_ids": ids(dtype=torch.int64)}, ["clamp", "_to_copy"]),
    (B, {}, []),
]


@pytest.mark.parametrize(("function", "changed", "wanted"), WORK, ids=[f"{f.__name__} {list(c)}" for f, c, _ in WORK])
def test_torch_does_no_more_than_it_must(
    function: Any, changed: dict[str, Any], wanted: list[str], through_dlpack: None
) -> None:
    """Each of these is a launch or a few on a GPU; of activations none, but the copy to `out` that a CPU needs."""
    given = {**arguments(function), **changed}
    with torch.no_grad(), Operations() as operations:
        function(**given)
    copies = ["copy_"] * {U: int(given.get("expert_first_token_offset") is None), B: 2}.get(function, 0)
    assert sorted(name for name in operations.names) == sorted(wanted + copies)


def parts(result: Any) -> tuple[Any, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result or ()


@pytest.mark.parametrize("function", SIGNATURES, ids=NAME)
def test_inference_mode(function: Any) -> None:
    """Engines run under it, with tensors made there."""
    wanted = function(**arguments(function))
    with torch.inference_mode():
        got = function(**arguments(function))
    assert type(got) is type(wanted)
    for a, b in zip(parts(got), parts(wanted), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("function", SIGNATURES, ids=NAME)
def test_meta_tensors(function: Any) -> None:
    """Shapes and dtypes alone."""
    meta = lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value
    wanted = function(**arguments(function))
    found = function(**{name: meta(value) for name, value in arguments(function).items()})
    for a, b in zip(parts(found), parts(wanted), strict=True):
        assert (a is None and b is None) or (a.is_meta and a.shape == b.shape and a.dtype == b.dtype)
