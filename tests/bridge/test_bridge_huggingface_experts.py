"""bridge.huggingface as an experts implementation: experts of every make, ids and weights in every form."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.13")
import bridge.huggingface  # noqa: E402
from bridge.ops import layer  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    apart,
    logits_of,
    make,
    make_config,
    small,
)

__all__ = ["small"]  # a fixture

# The experts interface alone: experts of transformers, by module, class, config class and its fields.
EXPERTS = {
    "concatenated": ("mixtral", "MixtralExperts", "MixtralConfig", {"num_local_experts": 5}),
    "transposed": ("aria", "AriaExperts", "AriaTextConfig", {"moe_num_experts": 5}),
    "normed": (
        "muse_spark",
        "MuseSparkExperts",
        "MuseSparkTextConfig",
        {"num_local_experts": 5, "moe_hidden_size": 32},
    ),
    "biased": (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        "OpenAIPrivacyFilterConfig",
        {"num_local_experts": 5},
    ),
    "interleaved": ("gpt_oss", "GptOssExperts", "GptOssConfig", {"num_local_experts": 5}),
    "ungated": ("nemotron_h", "NemotronHExperts", "NemotronHConfig", {"n_routed_experts": 5}),
    "gelu": ("mixtral", "MixtralExperts", "MixtralConfig", {"num_local_experts": 5, "hidden_act": "gelu"}),
}


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("tokens", [0, 1, 9], ids=lambda n: f"T{n}")
def test_experts_interface(kind: str, tokens: int) -> None:
    """Experts of every make give what they give by themselves, and add nothing for the id that means "elsewhere"."""
    module, name, config, fields = EXPERTS[kind]
    if importlib.util.find_spec(f"transformers.models.{module}") is None:
        pytest.skip(f"transformers {transformers.__version__} does not carry {module}")
    experts_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    experts = experts_class(make_config(config, **fields))
    if not hasattr(experts, "is_concatenated"):
        pytest.skip(f"{name} of transformers {transformers.__version__} is not under the experts interface")
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, weights = torch.randn(tokens, 32), torch.rand(tokens, 5)
    ids = torch.rand(tokens, 5).argsort(dim=1)
    masked, elsewhere = weights.clone(), ids.clone()
    masked[:, 1], elsewhere[:, 1] = 0, 5
    with torch.no_grad():
        experts.config._experts_implementation = "eager"
        expected, without = experts(x, ids, weights), experts(x, ids, masked)
        experts.config._experts_implementation = "jaxmoe"
        torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experts(x, elsewhere, weights), without, rtol=1e-4, atol=1e-4)
        assert tokens == 0 or (expected - experts(x, (ids + 1) % 5, weights)).abs().max() > 0.05


class OtherSilu(type(transformers.activations.ACT2FN["silu"])):  # type: ignore[misc]
    """Computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


# What experts may have as act_fn, and what the kernels call it; None: they do not know it.
ACTIVATIONS: dict[str, tuple[Any, str | None]] = {
    **{name: (transformers.activations.ACT2FN[name], "silu") for name in ("silu", "swish")},
    **{name: (transformers.activations.ACT2FN[name], "gelu") for name in ("gelu", "gelu_python")},
    **{name: (transformers.activations.ACT2FN[name], "gelu_tanh") for name in ("gelu_new", "gelu_pytorch_tanh")},
    **{name: (transformers.activations.ACT2FN[name], None) for name in ("gelu_10", "quick_gelu", "relu")},
    "a subclass": (OtherSilu(), None),
    "a function": (nn.functional.silu, "silu"),
    "gelu's": (nn.functional.gelu, "gelu"),
    "another": (torch.tanh, None),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told from the others, and goes the shortest way: few products differ by less than gelu's two forms do."""
    activation, name = ACTIVATIONS[kind]
    told: list[str | None] = []
    weighted, experts_of, product = layer.weighted, bridge.experts, bridge.grouped_matmul
    noted = lambda function, of: lambda *args, **how: told.append(of(how)) or function(*args, **how)
    monkeypatch.setattr(layer, "weighted", noted(weighted, lambda how: how.get("activation", "silu")))
    monkeypatch.setattr(bridge, "experts", noted(experts_of, lambda how: how.get("activation", "silu")))
    monkeypatch.setattr(bridge, "grouped_matmul", noted(product, lambda how: None))
    experts = mixtral_experts()
    del experts.act_fn  # a module, which a function cannot take the place of
    experts.act_fn = activation
    x, ids, weights = torch.randn(9, 32), torch.rand(9, 8).argsort(dim=1)[:, :2], torch.rand(9, 2)
    with torch.no_grad():
        experts.config._experts_implementation = "eager"
        wanted = experts(x, ids, weights)
        experts.config._experts_implementation = "jaxmoe"
        found = experts(x, ids, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))
    assert told == ([None, None] if name is None else [name])


def mixtral_experts() -> Any:
    torch.manual_seed(0)
    experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(make_config("MixtralConfig"))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    experts.config._experts_implementation = "jaxmoe"
    return experts


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [
        (torch.int64, 2**32),  # 0 as an int32
        (torch.int64, -(2**32)),
        (torch.int64, 2**63 - 1),
        (torch.uint64, 2**64 - 1),
        (torch.uint32, 2**31),
        (torch.uint16, 2**16 - 1),
        (torch.int8, -1),
        (torch.uint8, 255),
    ],
)
def test_ids_of_any_integer_dtype(dtype: torch.dtype, outside: int) -> None:
    """An id outside of the experts is dropped, however far outside."""
    experts, x, weights = mixtral_experts(), torch.randn(9, 32), torch.rand(9, 2)
    ids, elsewhere = torch.tensor([[3, 7]] * 9), torch.tensor([[3, outside]] * 9, dtype=dtype)
    with torch.no_grad():
        expected = experts(x, ids, weights * torch.tensor([1.0, 0.0]))
        assert (expected - experts(x, ids, weights)).abs().max() > 0.05
        assert torch.equal(experts(x, elsewhere, weights), expected)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_ids_and_weights_that_lie_anyhow(hidden_act: str) -> None:
    """Ids and weights may be float64, expanded, strided or anywhere in memory."""
    experts = mixtral_experts()
    experts.act_fn = transformers.activations.ACT2FN[hidden_act]
    x, wide = torch.randn(9, 32), torch.randint(8, (9, 4))
    ids, column = wide.contiguous()[:, ::2], torch.rand(9, 1)
    weights = column.expand(9, 2)
    with torch.no_grad():
        expected = experts(x, ids.int().contiguous(), weights.contiguous())
        assert expected.abs().max() > 0.05
        for other_ids in (ids, ids.int().T.contiguous().T, apart(ids), apart(ids.int())):
            assert torch.equal(experts(x, other_ids, weights), expected)
        for other_weights in (weights.contiguous().T.contiguous().T, apart(weights), weights.double()):
            assert torch.equal(experts(x, ids, other_weights), expected)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = column.to(dtype, copy=True).requires_grad_()
        experts(x, ids, leaf.expand(9, 2)).sum().backward()
        gradients.append(leaf.grad)
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
    assert torch.equal(gradients[0], gradients[1].float())


X, IDS, WEIGHTS = torch.ones(9, 32), torch.zeros(9, 2, dtype=torch.int64), torch.ones(9, 2)
WRONG_ARGUMENTS = {
    r"hidden_states: expected rows that lie apart or a contiguous tensor, got strides \(1, 9\)": (
        torch.ones(32, 9).T,
        IDS,
        WEIGHTS,
    ),
    "hidden_states: expected an address that is a multiple of 64 bytes": (apart(X), IDS, WEIGHTS),
    r"hidden_states: expected .*\[T, 32\], got float32\[9, 16\]": (torch.ones(9, 16), IDS, WEIGHTS),
    r"hidden_states: expected .*\[T, 32\], got float32\[1, 9, 32\]": (X[None], IDS, WEIGHTS),
    r"top_k_index: expected .*\[9, S\], got int64\[8, 2\]": (X, IDS[:8], WEIGHTS),
    r"top_k_index: expected .*\[9, S\], got float32\[9, 2\]": (X, WEIGHTS, WEIGHTS),
    r"top_k_weights: expected .*\[9, 2\], got float32\[9, 1\]": (X, IDS, WEIGHTS[:, :1]),
    r"top_k_weights: expected .*\[9, 2\], got int64\[9, 2\]": (X, IDS, IDS),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_arguments_are_named(message: str) -> None:
    """What the experts interface cannot take is refused in the words of its own arguments."""
    with pytest.raises(ValueError, match=f"^{message}"):
        mixtral_experts()(*WRONG_ARGUMENTS[message])


def test_experts_in_float64_are_refused() -> None:
    """By name: it is not the activations that are wrong."""
    with pytest.raises(ValueError, match=r"^self: expected parameters of .*torch\.float32, got torch\.float64$"):
        mixtral_experts().double()(X.double(), IDS, WEIGHTS)


def test_experts_interface_of_a_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing bridge.huggingface is all it takes, by each of transformers' ways to choose."""
    model = make("qwen3_moe")
    expected = logits_of(model)
    calls: list[int] = []
    combine = bridge.combine
    monkeypatch.setattr(bridge, "combine", lambda *given: calls.append(1) or combine(*given))
    model.set_experts_implementation("jaxmoe")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="jaxmoe")
    assert loaded.config._experts_implementation == "jaxmoe"
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4
