"""bridge.huggingface where others hold a patched model: its copies, replicas, hooks and wrappers, and `unpatch`."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bridge

transformers = pytest.importorskip("transformers", minversion="5.13")
from bridge.huggingface import patch, unpatch  # noqa: E402
from bridge.huggingface.modules import is_patched  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    assert_equal,
    assert_same_model,
    layers_of,
    logits_of,
    make,
    make_config,
    small,
    snapshot,
)

__all__ = ["small"]  # a fixture


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def pickled(model: Any, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(model, protocol))


COPIES = {"deepcopy": copy.deepcopy, "save": saved}
COPIES |= {f"pickle{protocol}": functools.partial(pickled, protocol=protocol) for protocol in (0, 2, 5)}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_unpatched_alone(way: str, fuse: bool) -> None:
    """A copy of a patched model ends as the plain model without a handle, and its original stays patched."""
    model = make("ernie4_5_moe")
    before, expected = snapshot(model), logits_of(model)
    handle = patch(model, fuse_shared_experts=fuse)
    patched = logits_of(model)
    twin = COPIES[way](model)
    assert [type(module).__name__ for module in twin.modules()] == [type(m).__name__ for m in model.modules()]
    assert repr(twin) == repr(model)
    assert torch.equal(logits_of(twin), patched)
    assert_equal(twin.state_dict(), before["values"])
    with pytest.raises(ValueError, match="restore it first"):
        patch(twin)
    unpatch(twin)
    unpatch(twin)
    assert [type(module) for module in twin.modules()] == [type(m) for m in make("ernie4_5_moe").modules()]
    assert torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(model), patched)
    patch(twin, fuse_shared_experts=fuse).restore()
    handle.restore()
    assert_same_model(model, before)


def test_unpatch_a_part() -> None:
    """Of a whole model, layer by layer; of a layer with folded shared experts all or nothing."""
    model = make("qwen3_moe")
    before = snapshot(model)
    patch(model)
    unpatch(model.model.layers[0])
    assert [is_patched(layer.gate) for layer in layers_of(model)] == [False, True]
    unpatch(layers_of(model)[1].gate)
    unpatch(model)
    assert_same_model(model, before)
    model = make("deepseek_v3")
    before = snapshot(model)
    handle = patch(model, fuse_shared_experts=True)
    fused, (layer,) = logits_of(model), layers_of(model)
    for part in (layer.gate, layer.experts):
        with pytest.raises(ValueError, match=r"^model: expected whole layers .*, got DeepseekV3\w+ in '' alone$"):
            unpatch(part)
        assert torch.equal(logits_of(model), fused)
    unpatch(layer)
    handle.restore()
    assert_same_model(model, before)


def test_a_patch_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the second layer, say: the first one is given back."""
    model, folded = make("ernie4_5_moe"), []
    before, fold = snapshot(model), bridge.huggingface.fold

    def fail(block: Any) -> Any:
        if folded:
            raise MemoryError
        folded.append(fold(block))
        return folded[0]

    monkeypatch.setattr(bridge.huggingface, "fold", fail)
    with pytest.raises(MemoryError):
        patch(model, fuse_shared_experts=True)
    assert folded
    assert_same_model(model, before)


def test_a_handle_that_was_used_leaves_later_patches() -> None:
    """Once restored it has nothing to do with its model."""
    model = make("mixtral")
    first = patch(model)
    first.restore()
    with patch(model):
        first.restore()
        assert is_patched(layers_of(model)[0].gate)


def test_shallow_copies() -> None:
    """A layer that is copied alone shares its experts: they are unfolded for both."""
    (layer,) = layers_of(make("deepseek_v3"))
    x = torch.randn(1, 15, 32)
    with torch.no_grad():
        expected = layer(x)
        patch(layer, fuse_shared_experts=True)
        twin = copy.copy(layer)
        assert torch.equal(twin(x), layer(x))
        unpatch(twin)
        assert torch.equal(twin(x), expected)
        assert torch.equal(layer(x), expected)
        unpatch(layer)
        assert torch.equal(layer(x), expected)


def replica_of(model: nn.Module) -> nn.Module:
    """One replica on this device, put together as nn.DataParallel does where there are devices."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, child and replicas[child])
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
    return replicas[model]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2"])
def test_replicas_run_on_their_own_weights(family: str) -> None:
    """What nn.DataParallel makes of a layer runs that, and not the layer it was made of."""
    layer = layers_of(make(family))[-1]
    x = torch.randn(1, 15, 32)
    with torch.no_grad(), patch(layer, fuse_shared_experts=family != "minimax_m2"):
        twin, expected = replica_of(layer), layer(x)
        assert torch.equal(twin(x), expected)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.zero_()
        assert torch.equal(twin(x), expected)
        assert expected.abs().max() > 0.02
        assert not layer(x).any()


def test_shallow_copies_run_on_their_own_weights() -> None:
    """copy.copy of a router, or of experts, that is given weights of its own."""
    (layer,) = layers_of(make("mixtral"))
    x = torch.randn(15, 32)
    with torch.no_grad(), patch(layer):
        gate, experts = copy.copy(layer.gate), copy.copy(layer.experts)
        gate._parameters = {"weight": nn.Parameter(-layer.gate.weight)}
        experts._parameters = {name: nn.Parameter(2 * p) for name, p in layer.experts.named_parameters()}
        logits, weights, ids = layer.gate(x)
        assert torch.equal(gate(x)[0], -logits)
        assert not torch.equal(experts(x, ids, weights), layer.experts(x, ids, weights))


def add_hook(module: nn.Module) -> Callable[[], None]:
    """A forward on top, as accelerate's add_hook_to_module puts it there, and what takes it away as that does."""
    old = module.forward

    def new_forward(module: nn.Module, *given: Any, **more: Any) -> Any:
        module.calls = getattr(module, "calls", 0) + 1
        return old(*given, **more)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)

    def remove() -> None:
        module.forward = old

    return remove


@pytest.mark.parametrize("removed", ["before", "after"])
@pytest.mark.parametrize("part", ["gate", "experts", "layer"])
def test_forwards_of_others_stay(part: str, removed: str) -> None:
    """A forward that is put on top of a patched module stays when the model is restored, and runs the plain one."""
    model = make("deepseek_v3")
    before, expected = snapshot(model), logits_of(model)
    (layer,) = layers_of(model)
    module = layer if part == "layer" else getattr(layer, part)
    handle = patch(model, fuse_shared_experts=True)
    patched = logits_of(model)
    remove = add_hook(module)
    assert torch.equal(logits_of(model), patched)
    if removed == "before":
        remove()
    handle.restore()
    assert torch.equal(logits_of(model), expected)
    assert module.calls == (1 if removed == "before" else 2)
    remove()
    assert torch.equal(logits_of(model), expected)
    del module.forward, module.calls
    assert_same_model(model, before)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_classes_of_others_stay() -> None:
    """A class that is put on top of a patched one stays, with the plain one beneath; without it all is as before."""
    model = make("mixtral")
    before, (layer,) = snapshot(model), layers_of(model)
    handle = patch(model)
    parametrize.register_parametrization(layer.gate, "weight", Twice())
    patched = logits_of(model)
    handle.restore()
    assert not is_patched(layer.gate)
    plain = logits_of(model)
    torch.testing.assert_close(plain, patched, rtol=1e-4, atol=1e-4)
    parametrize.remove_parametrizations(layer.gate, "weight", leave_parametrized=False)
    expected = logits_of(model)
    assert (plain - expected).abs().max() > 0.02
    with patch(model):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    before["objects"] = snapshot(model)["objects"]  # torch makes the parameter anew
    assert_same_model(model, before)
    assert type(layer.gate) is transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter


class Wrapper(nn.Module):
    """What PEFT puts around experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> Any:
        return self.inner(*given)


class Odd(nn.Parameter):
    """A parameter that holds something else, as those of quantized models do."""


def replace_down(layer: Any) -> None:
    layer.experts.down_proj = Odd(layer.experts.down_proj.data)


def wrap_experts(layer: Any) -> None:
    layer.experts = Wrapper(layer.experts)


UNKNOWN = {
    "Odd in 'model.layers.1.mlp.experts.down_proj'": replace_down,
    "Wrapper in 'model.layers.1.mlp.experts'; take it away first": wrap_experts,
}
EXPECTED = "expected parameters that are neither sharded nor of another kind than torch.nn.Parameter, got"


def test_fusing_refuses_parameters_of_another_kind() -> None:
    """Data of a subclass is not what it seems; nothing has been changed."""
    model = make("deepseek_v3")
    replace_down(layers_of(model)[0])
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=f"^fuse_shared_experts: {EXPECTED} Odd in 'model.layers.1.mlp.experts.down_proj'"
    ):
        patch(model, fuse_shared_experts=True)
    assert_same_model(model, before)


@pytest.mark.parametrize("got", UNKNOWN)
def test_restore_refuses_what_it_cannot_unfold(got: str) -> None:
    """By name, before anything has changed; it can be tried again."""
    model = make("deepseek_v3")
    before, (layer,) = snapshot(model), layers_of(model)
    handle = patch(model, fuse_shared_experts=True)
    fused, experts, down = logits_of(model), layer.experts, layer.experts.down_proj
    UNKNOWN[got](layer)
    with pytest.raises(ValueError, match=f"^model: {EXPECTED} {got}"):
        handle.restore()
    assert torch.equal(logits_of(model), fused)
    layer.experts, experts.down_proj = experts, down
    handle.restore()
    assert_same_model(model, before)


def test_state_dicts_refuse_wrapped_experts_while_folded() -> None:
    """Whatever is around them would be saved in shapes that fit no plain model."""
    model = make("deepseek_v3")
    values = model.state_dict()
    patch(model, fuse_shared_experts=True)
    wrap_experts(layers_of(model)[0])
    message = "^state_dict: expected bare experts .*, got Wrapper around those of DeepseekV3MoE$"
    with pytest.raises(ValueError, match=message):
        model.state_dict()
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(values)


# Models whose routers RoutingConfig.from_hf does not know, and whose experts run all the same.
ALONE = {
    "Phimoe": {"num_local_experts": 8},
    "GraniteMoe": {"num_local_experts": 8},
}
INTERFACE = 'run the experts alone, by experts_implementation="jaxmoe"'


@pytest.mark.parametrize("name", ALONE)
def test_other_families_run_their_experts_alone(name: str) -> None:
    """The error names the way that works for them, and it does."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(make_config(f"{name}Config", **ALONE[name])).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    expected = logits_of(model)
    with pytest.raises(ValueError, match=f"^model: hf_config: expected .*, got {name}Config with .*; {INTERFACE}"):
        patch(model)
    model.set_experts_implementation("jaxmoe")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.down_proj.data = module.down_proj.data.roll(1, 0)
    assert (logits_of(model) - expected).abs().max() > 0.02


def test_wrapped_experts_are_named() -> None:
    """A layer is not passed over in silence."""
    model = make("mixtral")
    wrap_experts(layers_of(model)[0])
    got = f"got {__name__}.Wrapper around the experts in 'model.layers.0.mlp'; patch before .*, or {INTERFACE}"
    with pytest.raises(ValueError, match=f"^model: expected modules of transformers.models, {got}"):
        patch(model)


def test_experts_without_a_router_are_named() -> None:
    """A part of a model that has experts has no lack of them."""
    got = f"got MixtralExperts without any that has a router; {INTERFACE}"
    with pytest.raises(ValueError, match=f"^model: expected a transformers model with MoE layers, {got}"):
        patch(layers_of(make("mixtral"))[0].experts)


def plain_forward(*given: Any) -> None:
    """A forward of somebody."""


def test_forwards_of_others_are_named() -> None:
    """Who has replaced a forward, whatever name functools.wraps gave it, and what to do."""
    for put in (lambda m: setattr(m, "forward", functools.wraps(m.forward)(plain_forward)), add_hook):
        model = make("mixtral")
        put(layers_of(model)[0].experts)
        got = f"got one of {__name__} on the MixtralExperts in 'model.layers.0.mlp'; restore it first, or {INTERFACE}"
        with pytest.raises(ValueError, match=f"^model: expected modules with the forward of their class, {got}"):
            patch(model)
