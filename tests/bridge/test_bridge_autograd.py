"""Gradients through the bridge, against jax.grad and against the same layer in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
import jaxmoe
from bridge import autograd
from tests.bridge.calls import CONFIG, arguments, arrays, leaves, numbers, options, tensors

Layer = Callable[..., Any]
DIFFERENTIABLE = {
    "route": ("logits",),
    "router_logits": ("x", "weight"),
    "dispatch": ("x",),
    "combine": ("rows", "weights"),
    "experts": ("rows", "gate_up", "down"),
    "fused_experts": ("x", "weights", "gate_up", "down"),
    "moe": ("x", "params"),
}
BIAS = ("bias", "params.bias")


def first(results: Any) -> Any:
    return results[0] if isinstance(results, tuple) else results


def require_grad(given: dict[str, Any], names: tuple[str, ...]) -> list[torch.Tensor]:
    """Marks the float tensors of the named arguments, all but the bias; returns them in jax's order of leaves."""
    wanted = []
    for path, tensor in jax.tree_util.tree_flatten_with_path({name: given[name] for name in names})[0]:
        if jax.tree_util.keystr(path, simple=True, separator=".") not in BIAS:
            wanted.append(tensor.requires_grad_())
    return wanted


def jax_gradients(name: str, values: dict[str, Any], weight: np.ndarray) -> list[np.ndarray]:
    given = arrays(values)

    def loss(chosen: dict[str, Any]) -> jax.Array:
        return jnp.sum(first(getattr(jaxmoe, name)(**{**given, **chosen}, **options(name))) * weight)

    gradients = jax.grad(loss)({key: given[key] for key in DIFFERENTIABLE[name]})
    named = jax.tree_util.tree_flatten_with_path(gradients)[0]
    return [np.asarray(g) for path, g in named if jax.tree_util.keystr(path, simple=True, separator=".") not in BIAS]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("tokens", [0, 5], ids=lambda n: f"T{n}")
def test_equals_jax(name: str, tokens: int, device: torch.device) -> None:
    """torch's autograd gives what jax.grad gives."""
    values = arguments(name, tokens)
    given = tensors(values, device)
    wanted = require_grad(given, DIFFERENTIABLE[name])
    result = first(getattr(bridge, name)(**given, **options(name)))
    weight = numbers(*result.shape, seed=9)
    gradients = torch.autograd.grad(result, wanted, torch.tensor(weight, device=device))
    for gradient, tensor, array in zip(gradients, wanted, jax_gradients(name, values, weight), strict=True):
        assert (gradient.dtype, gradient.shape, gradient.device) == (tensor.dtype, tensor.shape, device)
        np.testing.assert_allclose(gradient.cpu().numpy(), array, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_same_results_with_gradients(name: str, device: torch.device) -> None:
    """Training must see what evaluation sees."""
    given = tensors(arguments(name), device)
    with torch.no_grad():
        evaluated = leaves(getattr(bridge, name)(**given, **options(name)))
    require_grad(given, DIFFERENTIABLE[name])
    trained = leaves(getattr(bridge, name)(**given, **options(name)))
    for a, b in zip(evaluated, trained, strict=True):
        assert b.requires_grad == b.is_floating_point()
        torch.testing.assert_close(a, b.detach(), rtol=2e-6, atol=1e-6)


def plain_moe(x: torch.Tensor, params: bridge.MoEParams) -> torch.Tensor:
    """CONFIG's layer with nothing of jaxmoe's, dense over the experts."""
    scores = torch.sigmoid(x @ params.router.T)
    choice = (scores + params.bias).detach().reshape(len(x), CONFIG.n_group, -1)
    best = choice.topk(2, dim=2).values.sum(2).argmax(1)
    allowed = torch.nn.functional.one_hot(best, CONFIG.n_group).bool()[:, :, None]
    ids = choice.masked_fill(~allowed, -torch.inf).flatten(1).topk(CONFIG.top_k).indices
    weights = scores.gather(1, ids)
    weights = CONFIG.routed_scaling_factor * weights / weights.sum(1, keepdim=True)
    hidden = torch.einsum("th,ehi->eti", x, params.gate_up)
    gate, up = hidden.chunk(2, dim=2)
    every = torch.einsum("eti,eih->teh", torch.nn.functional.silu(gate) * up, params.down)
    routed = (every.gather(1, ids[:, :, None].expand(-1, -1, x.shape[1])) * weights[:, :, None]).sum(1)
    return routed + every[:, CONFIG.num_experts :].sum(1)


def test_layer_equals_plain_torch(device: torch.device) -> None:
    """The layer and each of its gradients, in one call and step by step, against an implementation of torch's own."""
    values = arguments("moe")
    weight = torch.tensor(numbers(5, 32, seed=9), device=device)

    def steps(x: torch.Tensor, params: bridge.MoEParams) -> torch.Tensor:
        routing = bridge.route(bridge.router_logits(x, params.router), params.bias, config=CONFIG)
        plan = bridge.plan_dispatch(routing.experts, CONFIG.num_expert_ids)
        rows = bridge.experts(bridge.dispatch(x, plan), params.gate_up, params.down, plan.group_sizes)
        return bridge.combine(rows, plan, routing.weights)

    found = []
    for layer in (plain_moe, steps, lambda x, params: bridge.moe(x, params, CONFIG)[0]):
        given = tensors(values, device)
        wanted = require_grad(given, ("x", "params"))
        y = layer(**given)
        found.append([y.detach(), *torch.autograd.grad((y * weight).sum(), wanted)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_gradient_of_columns(device: torch.device) -> None:
    """Strided rows get a gradient of their own shape, and the wider tensor zeros elsewhere."""
    values = arguments("combine")
    wide = torch.zeros(15, 96, device=device)
    wide[:, 32:64] = torch.tensor(values["rows"])
    wide.requires_grad_()
    given = tensors(values, device)
    weight = torch.tensor(numbers(5, 32, seed=9), device=device)
    y = bridge.combine(wide[:, 32:64], given["plan"], given["weights"])
    (gradient,) = torch.autograd.grad(y, wide, weight)
    dense = given["rows"].requires_grad_()
    (wanted,) = torch.autograd.grad(bridge.combine(dense, given["plan"], given["weights"]), dense, weight)
    assert torch.equal(gradient[:, 32:64], wanted)
    assert not gradient[:, :32].any()
    assert not gradient[:, 64:].any()


def test_any_gradient_is_taken(device: torch.device) -> None:
    """Autograd hands over expanded, transposed, unaligned and negated gradients; those are not the user's to mend."""
    x = torch.tensor(numbers(5, 32), device=device, requires_grad=True)
    plan = tensors(arguments("dispatch")["plan"], device)
    counts = (plan.rows >= 0).sum(1, keepdim=True).float()
    whole = torch.ones(15 * 32 + 1, device=device)
    expanded, transposed = torch.ones((), device=device).expand(15, 32), torch.ones(32, 15, device=device).T
    negated = torch._neg_view(torch.full((15, 32), -1.0, device=device))
    for gradient in (expanded, transposed, whole[1:].view(15, 32), negated):
        (found,) = torch.autograd.grad(bridge.dispatch(x, plan), x, gradient)
        assert torch.equal(found, counts.expand(5, 32))


def test_dense_gradients_are_views(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero copies on the way back too: JAX reads autograd's gradient and torch gets JAX's."""
    x = torch.tensor(numbers(5, 32), device=device, requires_grad=True)
    plan = tensors(arguments("dispatch")["plan"], device)
    y = bridge.dispatch(x, plan)
    seen: dict[str, list[int]] = {"import_tensor": [], "export_array": []}

    def watch(name: str) -> None:
        function = getattr(autograd, name)

        def watched(*given: Any) -> Any:
            result = function(*given)
            seen[name] += [v.unsafe_buffer_pointer() for v in (*given, result) if isinstance(v, jax.Array)]
            return result

        monkeypatch.setattr(autograd, name, watched)

    watch("import_tensor")
    watch("export_array")
    gradient = torch.ones_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert seen == {"import_tensor": [gradient.data_ptr()], "export_array": [found.data_ptr()]}


def test_saves_what_torch_would(device: torch.device) -> None:
    """What the backward pass needs of inputs and results is the caller's memory, not a copy that JAX keeps."""
    given = tensors(arguments("combine"), device)
    require_grad(given, ("rows", "weights"))
    y = bridge.combine(**given)
    saved = {tensor.data_ptr() for tensor in y.grad_fn.saved_tensors}
    assert saved == {t.data_ptr() for t in (given["rows"], given["weights"], given["plan"].rows, given["plan"].slots)}
    assert len(y.grad_fn.saved_tensors) == 4
    logits = torch.tensor(numbers(5, 8), device=device, requires_grad=True)
    routing = bridge.route(logits, config=CONFIG)
    node = routing.weights.grad_fn
    assert {t.data_ptr() for t in node.saved_tensors} == {logits.data_ptr(), routing.experts.data_ptr()}
    assert len(node.saved_tensors) == 2


@pytest.mark.parametrize("written", ["input", "result"])
def test_write_in_between_is_noticed(written: str, device: torch.device) -> None:
    """A gradient from overwritten values would be wrong in silence."""
    logits = torch.tensor(numbers(5, 8), device=device, requires_grad=True)
    routing = bridge.route(logits, config=CONFIG)
    with torch.no_grad():
        (logits if written == "input" else routing.experts).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        routing.weights.sum().backward()


def test_out_counts_as_a_write(device: torch.device) -> None:
    """`out` is written to by JAX; torch's check of saved tensors must notice that as well."""
    plan = tensors(arguments("dispatch")["plan"], device)
    out, scale = torch.ones(15, 32, device=device), torch.ones(15, 32, device=device, requires_grad=True)
    product = out * scale
    bridge.dispatch(torch.tensor(numbers(5, 32), device=device), plan, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_derivative_without_gradients(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Under no_grad, and where nothing requires a gradient, no derivative is set up."""
    monkeypatch.setattr(autograd, "_compile", lambda *_: pytest.fail("a derivative was set up"))
    logits = torch.tensor(numbers(5, 8), device=device, requires_grad=True)
    with torch.no_grad():
        assert not bridge.route(logits, config=CONFIG).weights.requires_grad
    with torch.inference_mode():
        assert not bridge.route(logits, config=CONFIG).weights.requires_grad
    assert not bridge.route(logits.detach(), config=CONFIG).weights.requires_grad


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the same shapes share one compilation, whatever num_valid_tokens is; else training would crawl."""
    traced: list[Any] = []
    route = jaxmoe.route

    def counted(**given: Any) -> Any:
        traced.append(given)
        return route(**given)

    monkeypatch.setattr(jaxmoe, "route", counted)
    for count in (1, 2, 3):
        logits = torch.tensor(numbers(5, 8, seed=count), requires_grad=True)
        bridge.route(logits, config=CONFIG, num_valid_tokens=count).weights.sum().backward()
        assert not logits.grad[count:].any()
    assert len(traced) == 1


def test_bias_gets_no_gradient(device: torch.device) -> None:
    """The bias only steers the choice; a graph that ends in it would promise a gradient that never comes."""
    logits, bias = torch.tensor(numbers(5, 8), device=device), torch.zeros(8, device=device, requires_grad=True)
    load = torch.ones(9, dtype=torch.int32, device=device)
    assert not bridge.route(logits, bias, config=CONFIG).weights.requires_grad
    assert not bridge.update_bias(bias, load, rate=0.1).requires_grad
    bridge.route(logits.requires_grad_(), bias, config=CONFIG).weights.square().sum().backward()
    assert bias.grad is None
    assert logits.grad.any()


def test_one_of_several_results(device: torch.device) -> None:
    """A layer whose output is not used, only its routing, still has a gradient."""
    given = tensors(arguments("moe"), device)
    given["x"].requires_grad_()
    _, routing = bridge.moe(**given, config=CONFIG)
    assert not routing.experts.requires_grad
    routing.weights.square().sum().backward()
    assert given["x"].grad.any()
