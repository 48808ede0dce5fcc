"""bridge.huggingface.patch with fuse_shared_experts: shared experts as slots, and checkpoints that still fit."""

from __future__ import annotations

import contextlib
import copy
import importlib
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.13")
from bridge.huggingface import patch, unpatch  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    DENSE_FIRST,
    FEW,
    GROUPS,
    MLA,
    ROUTED,
    assert_equal,
    assert_same_model,
    layers_of,
    logits_of,
    make,
    make_config,
    prompt,
    small,
    snapshot,
)

fold = importlib.import_module("bridge.huggingface.fold")  # the name is that of a function there

__all__ = ["small"]  # a fixture


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FEW)
def test_state_dicts_load_both_ways(family: str) -> None:
    """Checkpoints of a fused model and of a plain one are the same thing."""
    model = make(family)
    other = values(make(family, seed=7))
    with patch(model, fuse_shared_experts=True):
        fused = [layer.experts.down_proj for layer in layers_of(model)]
        model.load_state_dict(other)
        assert all(layer.experts.down_proj is object for layer, object in zip(layers_of(model), fused, strict=True))
        assert_equal(model.state_dict(), other)
        saved, logits = values(model), logits_of(model)
    assert_equal(values(model), other)  # what was loaded stays
    plain = make(family)
    plain.load_state_dict(saved)
    torch.testing.assert_close(logits_of(plain), logits, rtol=1e-4, atol=1e-4)


def test_assigned_state_dict() -> None:
    """load_state_dict(assign=True) replaces the parameters, of the stacks as of any other."""
    model = make("deepseek_v3")
    other = {name: value.double() for name, value in values(make("deepseek_v3", seed=7)).items()}
    with patch(model, fuse_shared_experts=True):
        model.load_state_dict(other, assign=True)
        assert_equal(model.state_dict(), other)
    assert_equal(values(model), other)


def test_partial_state_dicts() -> None:
    """Keys that are missing, unknown or of a wrong shape are reported as torch does; what is there is loaded."""
    model = make("deepseek_v3")
    old, other = values(model), values(make("deepseek_v3", seed=7))
    prefix = "model.layers.1.mlp."
    routed, shared = f"{prefix}experts.gate_up_proj", f"{prefix}shared_experts.up_proj.weight"
    with patch(model, fuse_shared_experts=True):
        found = model.load_state_dict({shared: other[shared]}, strict=False)
        assert set(found.missing_keys) == old.keys() - {shared}
        assert_equal(model.state_dict(), old | {shared: other[shared]})
        found = model.load_state_dict({routed: other[routed], f"{prefix}nothing": torch.ones(1)}, strict=False)
        assert set(found.missing_keys) == old.keys() - {routed}
        assert found.unexpected_keys == [f"{prefix}nothing"]
        assert_equal(model.state_dict(), old | {name: other[name] for name in (shared, routed)})
        with pytest.raises(RuntimeError, match=r"Missing key.*shared_experts\.up_proj\.weight"):
            model.load_state_dict({name: value for name, value in other.items() if name != shared})
        with pytest.raises(RuntimeError, match=rf"size mismatch for {shared}"):
            model.load_state_dict(other | {shared: other[shared][:1]})


@pytest.mark.parametrize("family", FEW)
def test_save_pretrained(family: str, tmp_path: Any) -> None:
    """A checkpoint that transformers writes of a fused model is one of the plain model."""
    model = make(family)
    expected = logits_of(model)
    with patch(model, fuse_shared_experts=True):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("family", FEW)
def test_gradients(family: str) -> None:
    """Each expert, shared ones too, gets the gradient of the plain model, and a step of an optimizer trains it."""
    model, plain = make(family), make(family)
    tokens = prompt()

    def step(model: Any) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return values(model)

    expected = step(plain)
    with patch(model, fuse_shared_experts=True):
        found = step(model)
    old = values(make(family))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert "shared_experts" not in name or (value - old[name]).abs().max() > 1e-3
    assert_equal(values(model), found)
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def loss_of(model: Any) -> torch.Tensor:
    tokens = prompt()
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("family", FEW)
def test_losses_that_are_still_held(family: str) -> None:
    """A loss that has been followed back may stay around: training goes on when shared experts are folded and back."""
    model = make(family)
    first = loss_of(model)
    first.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with patch(model, fuse_shared_experts=True):
        model.zero_grad()
        second = loss_of(model)
        second.backward()
        for layer in layers_of(model):
            for p in layer.experts.parameters():
                assert p.grad is not None
                assert p.grad.shape == p.shape
    model.zero_grad()
    third = loss_of(model)
    third.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    torch.testing.assert_close(torch.stack([second, third]), torch.stack([first, first]))


# What torch says of a saved tensor that has changed, what the package says, what torch says of a part run once more.
GONE = "modified by an inplace operation|^backward: expected a loss computed after|^torch.utils.checkpoint: "
LOSSES = {"a model's": loss_of, "a norm's": lambda model: layers_of(model)[-1].experts.down_proj.sum()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("when", ["before", "inside", "before and after"])
def test_losses_from_before_are_refused(when: str, loss: str, checkpointing: bool) -> None:
    """A loss cannot be followed back to parameters that have had other shapes since: no wrong gradient in silence."""
    model = make("deepseek_v3").train()
    if checkpointing:  # the parts of a model are computed once more in its backward pass
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if when != "inside":
        value = LOSSES[loss](model)
    with patch(model, fuse_shared_experts=True):
        if when == "inside":
            value = LOSSES[loss](model)
        if when == "before":
            with pytest.raises(RuntimeError, match=GONE):
                value.backward()
    if when != "before":
        with pytest.raises(RuntimeError, match=GONE):
            value.backward()
    layer = layers_of(model)[0]
    for p in [*layer.experts.parameters(), *layer.shared_experts.parameters()]:
        assert p.grad is None


@pytest.mark.parametrize("when", ["before", "inside"])
def test_activations_from_before_have_no_gradient(when: str) -> None:
    """Nor is one followed back past such parameters, whose values are no longer there."""
    layer = layers_of(make("deepseek_v3"))[0]
    x = torch.randn(1, 15, 32, requires_grad=True)
    if when == "before":
        y = layer.experts(x[0], torch.zeros(15, 1, dtype=torch.int64), torch.ones(15, 1))
    handle = patch(layer, fuse_shared_experts=True)
    if when == "inside":
        y = layer(x)
        handle.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_losses_from_before_are_refused_by_name() -> None:
    """Where torch itself has nothing to say against a loss."""
    model = make("deepseek_v3")
    layer = layers_of(model)[0]
    down = layer.experts.down_proj
    before = down.sum()
    layer.requires_grad_(False)  # for a while
    with patch(model, fuse_shared_experts=True):
        down.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"^backward: expected a loss computed after bridge\.huggingface folded"):
            before.backward()
        inside = down.sum()
        assert down.grad is None
    with pytest.raises(RuntimeError, match=r"^backward: expected a loss computed after bridge\.huggingface folded"):
        inside.backward()
    assert down.grad is None
    down.sum().backward()
    assert torch.equal(down.grad, torch.ones(8, 32, 16))


def test_model_moves_while_fused() -> None:
    """What happens to the model happens to its shared experts: dtype, freezing, copies."""
    model = make("ernie4_5_moe")
    expected = {name: value.to(torch.bfloat16) for name, value in values(model).items()}
    handle = patch(model, fuse_shared_experts=True)
    twin = copy.deepcopy(model)
    model.to(torch.bfloat16).requires_grad_(False)
    assert_equal(model.state_dict(), expected)
    handle.restore()
    assert_equal(model.state_dict(), expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits_of(twin), logits_of(copy.deepcopy(twin)))
    assert_equal(twin.state_dict(), values(make("ernie4_5_moe")))


def test_memory_of_the_shared_mlp_is_given_up() -> None:
    """Folded weights are stored once."""
    model = make("deepseek_v3")
    weight = layers_of(model)[0].shared_experts.down_proj.weight
    with patch(model, fuse_shared_experts=True):
        assert weight.untyped_storage().nbytes() == 0
        assert layers_of(model)[0].shared_experts.down_proj.weight is None
    assert layers_of(model)[0].shared_experts.down_proj.weight is weight


def deepseek_of_two_layers() -> Any:
    config = make_config("DeepseekV3Config", **ROUTED | GROUPS | MLA | DENSE_FIRST, num_hidden_layers=3)
    return transformers.DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize("after", range(4))
def test_no_memory_while_folding(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends, in the first layer or in the second: the model is as it was, and can be patched later."""
    model = deepseek_of_two_layers()
    before, expected, join, calls = snapshot(model), logits_of(model), fold._join, []

    def failing(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) > after:
            raise torch.OutOfMemoryError
        return join(*given)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(fold, "_join", failing)
        patch(model, fuse_shared_experts=True)
    assert_same_model(model, before)
    with patch(model, fuse_shared_experts=True):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after", range(8))
def test_no_memory_while_unfolding(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that are left stay patched, and whole: the model runs, and can be restored later."""
    model = deepseek_of_two_layers()
    before, expected = snapshot(model), logits_of(model)
    handle = patch(model, fuse_shared_experts=True)
    copy_dense, calls = fold.copy_dense, []

    def failing(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) > after:
            raise torch.OutOfMemoryError
        return copy_dense(tensor)

    with monkeypatch.context() as patched, contextlib.suppress(torch.OutOfMemoryError):
        patched.setattr(fold, "copy_dense", failing)
        handle.restore()
    assert len(calls) > after, "it did fail"
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    unpatch(model)
    assert_same_model(model, before)


def test_fused_model_on_meta() -> None:
    """As a whole it has gone there, the weights that are kept for it, too."""
    model = make("deepseek_v3")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with patch(model, fuse_shared_experts=True):
        model.to("meta")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def ernie(**fields: Any) -> Any:
    fields = {"moe_num_experts": 8, "moe_layer_start_index": 0} | fields
    return transformers.Ernie4_5_MoeForCausalLM(make_config("Ernie4_5_MoeConfig", **fields))


def frozen() -> Any:
    model = make("glm4_moe")
    layers_of(model)[0].experts.requires_grad_(False)
    return model


REFUSED = {
    "multiplied by a gate of its own in 'model.layers.0.mlp'": lambda: make("qwen3_next"),
    "shared experts, got none in": lambda: make("mixtral"),
    "routed ones behind a projection": lambda: make("nemotron_h_latent"),
    "without biases": lambda: ernie(use_bias=True),
    "multiple of the routed ones' width, 16, got a width of 24": lambda: transformers.NemotronHForCausalLM(
        make_config(
            "NemotronHConfig", layers_block_type=["moe"], num_hidden_layers=1, moe_shared_expert_intermediate_size=24
        )
    ),
    "requires_grad=False, got .* requires_grad=True": frozen,
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    """What is no slot of weight 1, or no expert like the others, is refused, and nothing has been changed."""
    model = REFUSED[message]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"fuse_shared_experts: expected .*{message}"):
        patch(model, fuse_shared_experts=True)
    assert_same_model(model, before)
