"""The drop-ins where torch.compile traces them: whole, in few graphs, with numbers that it has as symbols."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridge.compat import aiter, vllm
from tests.bridge.test_bridge_compat import E, H, K, T, ids

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def step(x: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Everything that an engine calls, in its order."""
    weights, chosen = vllm.grouped_topk(x, logits, K, True, 2, 2, e_score_correction_bias=bias)
    aiter.biased_grouped_topk(logits, bias, weights, chosen, 2, 2, True)
    aligned = vllm.moe_align_block_size(chosen, 4, E)
    rows, _, offsets, inverse, index = vllm.moe_permute(x, None, chosen, E)
    vllm.moe_unpermute(out, rows, weights, inverse, offsets)
    return weights, chosen, *aligned, rows, offsets, inverse, index, out


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in inductor
def test_compiles_whole() -> None:
    """torch.compile(fullgraph=True) holds the drop-ins; after a first graph one more serves every number of tokens."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for tokens in (T, 8, 12):  # what other tests here have compiled for first
        generator = torch.Generator().manual_seed(tokens)
        given = torch.randn(tokens, H, generator=generator), torch.randn(tokens, E, generator=generator)
        with torch.no_grad():
            wanted = step(*given, torch.zeros(E), torch.empty(tokens, H))
            got = compiled(*given, torch.zeros(E), torch.empty(tokens, H))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(graphs) == 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_other_numbers(dynamic: bool | None) -> None:
    """A second model in the same process, whose sizes torch.compile has as symbols."""

    def route(logits: torch.Tensor, top_k: int, scale: float, ids: torch.Tensor, block: int) -> tuple[Any, ...]:
        weights, chosen = vllm.grouped_topk(logits, logits, top_k, True, 2, 2, routed_scaling_factor=scale)
        theirs, other = torch.empty_like(weights), torch.empty_like(chosen)
        aiter.biased_grouped_topk(logits, torch.zeros_like(logits[0]), theirs, other, 2, 2, True, scale)
        aligned = vllm.moe_align_block_size(ids, block, logits.shape[1])
        return weights, chosen, theirs, other, *aligned, *vllm.moe_permute(logits, None, ids, logits.shape[1])

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="eager", dynamic=dynamic)
    with torch.no_grad():
        for experts, top_k, scale, block in ((8, 2, 2.5, 4), (16, 2, 2.5, 4), (16, 3, 1.5, 8), (16, 3, 3.5, 8)):
            logits = torch.randn(T, experts, generator=torch.Generator().manual_seed(experts))
            given = logits, top_k, scale, ids(), block
            for a, b in zip(compiled(*given), route(*given), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
