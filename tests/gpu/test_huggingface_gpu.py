"""Patched transformers models on a GPU: natively, with the promises that tests/bridge makes of them on a CPU."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from bridge.huggingface import patch  # noqa: E402
from bridge.native import driver  # noqa: E402
from tests.bridge.test_bridge_huggingface import (  # noqa: E402
    FAMILIES,
    FEW,
    assert_same_model,
    carried,
    layers_of,
    logits_of,
    make,
    snapshot,
    tokens_of,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU")


@pytest.mark.parametrize("family", carried(FAMILIES))
def test_same_logits_and_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: the logits within rounding, the same 64 greedy tokens, then the very same model; all of it native."""
    model = make(family).cuda()
    before, logits, tokens = snapshot(model), logits_of(model), tokens_of(model)
    launched: list[str] = []
    with patch(model):
        monkeypatch.setattr(driver, "observers", [lambda name, grid: launched.append(name)])
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-4)
        assert {"route", "plan_dispatch", "combine"} <= set(launched)
        assert ("gated_matmul" in launched) != ("dispatch" in launched), "tokens are gathered, but for other experts"
        assert torch.equal(tokens_of(model), tokens)
        for layer in layers_of(model):
            layer.experts.down_proj.data = layer.experts.down_proj.data.roll(1, 0)
        assert (logits_of(model) - logits).abs().max() > 0.02
        model.load_state_dict(before["values"])
    assert_same_model(model, before)
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("family", carried(FEW))
def test_shared_experts_fused(family: str) -> None:
    model = make(family).cuda()
    before, logits, tokens = snapshot(model), logits_of(model), tokens_of(model)
    with patch(model, fuse_shared_experts=True):
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens_of(model), tokens)
    assert_same_model(model, before)


@pytest.mark.parametrize("family", carried(["deepseek_v3", "qwen3_moe", "gpt_oss"]))
def test_bfloat16_and_gradients(family: str) -> None:
    """No further from the exact logits than transformers; gradients reach the parameters that they reach unpatched."""
    model = make(family, torch.bfloat16).cuda()
    exact = logits_of(copy.deepcopy(model).float())
    error = lambda: float((logits_of(model).float() - exact).abs().median())
    expected = error()
    with patch(model):
        assert error() < 1.2 * expected
    model = model.float()
    x = torch.randint(1, 30, (2, 15), generator=torch.Generator().manual_seed(1)).cuda()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=x).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    with patch(model):
        found = gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * max(scale, 1e-6), msg=name)


def test_captured_in_a_graph() -> None:
    """A patched layer, replayed with other inputs."""
    model = make("deepseek_v3").cuda()
    with patch(model):
        (block, *_) = layers_of(model)
        x = torch.randn(1, 9, model.config.hidden_size, device="cuda")
        with torch.no_grad():
            block(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = block(x)
            for _ in range(3):
                x.normal_()
                y.fill_(float("nan"))
                graph.replay()
                torch.testing.assert_close(y, block(x))
