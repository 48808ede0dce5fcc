"""bridge.huggingface where models are used: training, checkpoints, compiled, in part, under autocast."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bridge
from bridge.ops import layer as layer_ops

transformers = pytest.importorskip("transformers", minversion="5.13")
from bridge.huggingface import patch, unpatch  # noqa: E402
from bridge.huggingface.modules import is_patched  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    apart,
    assert_same_model,
    layers_of,
    logits_of,
    make,
    make_config,
    prompt,
    small,
    snapshot,
)

__all__ = ["small"]  # a fixture

# One for each way a router or its experts differ: groups, a bias from the block, biases and clamps, no gate, a shared
# expert with a gate, choice by token id.
KINDS = ["deepseek_v3", "minimax_m2", "gpt_oss", "nemotron_h", "qwen3_next", "deepseek_v4"]


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    model.train()
    model.zero_grad()
    tokens = prompt()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", KINDS)
def test_gradients(family: str) -> None:
    """Training sees the same gradients, those of routers and experts too, also with gradient checkpointing."""
    model = make(family)
    expected = gradients(model)
    routers = [name for name in expected if name.endswith(("gate.weight", "router.weight"))]
    assert routers
    assert all(expected[name].abs().max() > 1e-3 for name in routers)
    with patch(model):
        found = gradients(model)
        # Older versions have the older name alone; newer ones warn of it.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        again = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5)


class Ops(TorchDispatchMode):
    """The names of torch's ops that run outside of the bridge's own functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False
        for name in ("router_logits", "route", "plan_dispatch", "dispatch", "experts", "combine"):
            monkeypatch.setattr(bridge, name, functools.partial(self.enter, getattr(bridge, name)))
        monkeypatch.setattr(layer_ops, "weighted", functools.partial(self.enter, layer_ops.weighted))

    def enter(self, function: Any, *given: Any, **more: Any) -> Any:
        self.inside = True
        result = function(*given, **more)
        self.inside = False
        return result

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "glm4_moe"])
def test_nothing_is_cast_or_copied(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 activations, and a float32 router, all that torch itself does in a layer is make views."""
    model = make(family, torch.bfloat16)
    (*_, layer) = layers_of(model)
    layer.gate.weight.data = layer.gate.weight.data.float()
    x = torch.randn(2, 15, 32, dtype=torch.bfloat16)
    with torch.no_grad(), patch(model, fuse_shared_experts=family != "minimax_m2"), Ops(monkeypatch) as ops:
        layer(x)
    assert set(ops.names) <= {"view", "_unsafe_view", "transpose", "detach", "alias"}


def test_parameters_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the model's own weight and bias, in the dtypes they are stored in."""
    model = make("deepseek_v3", torch.bfloat16)
    gate = layers_of(model)[0].gate
    seen: list[torch.Tensor] = []
    router_logits, route = bridge.router_logits, bridge.route
    monkeypatch.setattr(bridge, "router_logits", lambda x, weight: seen.append(weight) or router_logits(x, weight))
    monkeypatch.setattr(bridge, "route", lambda x, bias, **more: seen.append(bias) or route(x, bias, **more))
    with patch(model):
        logits_of(model)
    assert seen[0] is gate.weight
    assert seen[1].data_ptr() == gate.e_score_correction_bias.data_ptr()
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}


def test_weights_are_made_dense_once() -> None:
    """Weights that no kernel reads in place are brought to that form, as the same objects, to be written to."""
    model = make("deepseek_v3")
    expected = logits_of(model)
    (layer,) = layers_of(model)
    old, gate = layer.gate.weight, layer.gate
    gate.weight.data = gate.weight.data.T.contiguous().T
    apart = torch.zeros(8 + 1)
    apart[1:] = gate.e_score_correction_bias
    gate.e_score_correction_bias = apart[1:]  # 4 bytes off
    bias, before = gate.e_score_correction_bias, snapshot(model)
    with patch(model):
        assert gate.weight is old
        assert gate.e_score_correction_bias is bias
        assert old.is_contiguous()
        where = old.data_ptr()
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            old.copy_(old.flip(0))
            bias.copy_(bias.flip(0))
        other = logits_of(model)
        assert (other - expected).abs().max() > 0.02
        assert gate.weight.data_ptr() == where
    torch.testing.assert_close(logits_of(model), other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        old.copy_(old.flip(0))
        bias.copy_(bias.flip(0))
    assert_same_model(model, before)


def test_no_tokens_and_one() -> None:
    """Empty and single batches, as serving has them; with an odd number of experts, all of them chosen."""
    torch.manual_seed(0)
    config = make_config("MixtralConfig", num_local_experts=5, num_experts_per_tok=5)
    model = transformers.MixtralForCausalLM(config).eval()
    layer, x = layers_of(model)[0], torch.randn(1, 1, 32)
    nn.init.normal_(layer.gate.weight)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        expected = layer(x)
        assert expected.abs().max() > 0.05
        with patch(model):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
            assert layer(torch.ones(1, 0, 32)).shape == (1, 0, 32)
            layer.experts.down_proj.data = layer.experts.down_proj.data.roll(1, 0)
            assert (layer(x) - expected).abs().max() > 0.02


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in inductor
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_compiles_whole(family: str) -> None:
    """torch.compile takes a patched model in one graph, whatever the number of tokens."""
    model = make(family)
    graphs: list[Any] = []
    torch.compiler.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    with torch.no_grad(), patch(model, fuse_shared_experts=family == "deepseek_v3"):
        for length in (15, 9):
            tokens = torch.arange(2 * length).view(2, length)
            expected = model(input_ids=tokens, use_cache=False).logits
            found = compiled(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_handle() -> None:
    """A patch can be restored once, twice, and by leaving its block, also by an error; then it can be made again."""
    model = make("mixtral")
    before = snapshot(model)
    handle = patch(model)
    with pytest.raises(ValueError, match=r"expected modules with the forward of their class.*restore it first"):
        patch(model)
    handle.restore()
    handle.restore()
    assert_same_model(model, before)
    with pytest.raises(KeyError), patch(model):
        raise KeyError
    assert_same_model(model, before)
    handle = patch(model)
    unpatch(model)
    newer = patch(model)
    handle.restore()
    assert is_patched(layers_of(model)[0].experts), "by another patch"
    newer.restore()
    assert_same_model(model, before)


def test_handle_is_entered_once() -> None:
    """Leaving a block restores the model, so that another block on the same handle would run without jaxmoe."""
    model = make("mixtral")
    handle = patch(model)
    with handle:
        with pytest.raises(RuntimeError, match=r"^Patch: expected a new one for each block, got one .* entered"):
            handle.__enter__()
        assert is_patched(layers_of(model)[0].gate)
    with pytest.raises(RuntimeError, match=r"^Patch: expected a new one for each block, got one .* restored"), handle:
        pass
    with patch(model):
        assert is_patched(layers_of(model)[0].gate)


# What a router holds and how it routes by that, whatever its config says.
HELD = [
    ("mixtral", "top_k", 4),
    ("qwen3_moe", "norm_topk_prob", True),
    ("deepseek_v3", "routed_scaling_factor", 1.0),
    ("deepseek_v3", "num_group", 2),
    ("deepseek_v3", "topk_group", 1),
    ("deepseek_v4", "score_fn", nn.Sigmoid()),
]


@pytest.mark.parametrize(("family", "attribute", "value"), HELD)
def test_routers_route_as_they_are_set(family: str, attribute: str, value: Any) -> None:
    """What is set on a router after it was made holds for the patched model, too."""
    model = make(family)
    gate, before = layers_of(model)[-1].gate, logits_of(model)
    assert hasattr(gate, attribute)
    setattr(gate, attribute, value)
    expected = logits_of(model)
    assert (expected - before).abs().max() > 0.02
    with patch(model):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_a_router_that_is_set_to_have_no_groups() -> None:
    """DeepSeek-V2's method decides whether its groups count."""
    model = make("deepseek_v2")
    gate = layers_of(model)[0].gate
    gate.top_k = 4  # all experts of the groups that a token may choose from
    limited = logits_of(model)
    gate.topk_method = "greedy"
    expected = logits_of(model)
    assert (expected - limited).abs().max() > 0.02
    with patch(model):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["num_experts_per_tok", "num_local_experts"])
def test_config_changed_after_routers_were_made(field: str) -> None:
    """Routers have read their config by then: it changes nothing, patched or not."""
    model = make("mixtral")
    expected = logits_of(model)
    setattr(model.config, field, 4)
    assert torch.equal(logits_of(model), expected)
    with patch(model):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["model", "experts", "router"])
def test_assigned_checkpoint_is_made_dense(part: str) -> None:
    """load_state_dict(assign=True) takes over tensors as they lie in a file: the next call still reads them."""
    model = make("ernie4_5_moe")
    layer = layers_of(model)[0]
    module = {"model": model, "experts": layer.experts, "router": layer.gate}[part]
    values = {name: apart(value * 1.5) for name, value in module.state_dict().items()}
    with patch(model):
        module.load_state_dict(values, assign=True)
        found = logits_of(model)
        assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(found, logits_of(model), rtol=1e-4, atol=1e-4)


def test_inference_mode() -> None:
    """A model that is patched and restored in inference mode can be trained as before; one that is made there runs."""
    model = make("deepseek_v3")
    expected = gradients(model)
    gate = layers_of(model)[0].gate
    gate.weight.data = gate.weight.data.T.contiguous().T
    with torch.inference_mode():
        with patch(model, fuse_shared_experts=True):
            logits_of(model)
        made_there = make("deepseek_v3")
    assert all(gradient is not None for gradient in expected.values())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    plain = logits_of(made_there)
    with patch(made_there, fuse_shared_experts=True):
        torch.testing.assert_close(logits_of(made_there), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(made_there), plain)


def test_copies_of_a_patched_model() -> None:
    """A deep copy and a pickle of a patched model are patched models of their own."""
    model = make("minimax_m2")
    with patch(model):
        expected = logits_of(model)
        file = io.BytesIO()
        torch.save(model, file)
        twins = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(logits_of(twin), expected)


def test_part_of_a_model() -> None:
    """One layer can be patched; the others stay as they are."""
    model = make("qwen3_moe")
    expected = logits_of(model)
    with patch(model.model.layers[1]):
        assert [is_patched(layer.gate) for layer in layers_of(model)] == [False, True]
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    """Under autocast activations and weights may differ in dtype."""
    model = make("deepseek_v3")
    expected = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model)
        with patch(model):
            found = logits_of(model)
            experts = layers_of(model)[0].experts
            x, ids = torch.randn(3, 32, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int32)
            assert experts(x, ids, torch.ones(3, 1)).dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 1.5 * (rounded - expected).abs().mean()
