"""A rank's part of the layer on the native path: `fused_experts` and `moe` with a map and room for some rows.

New memory holds NaN (conftest.py), which shows wherever it is read. The reference is plain torch in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import bridge  # noqa: E402
from tests.bridge.test_bridge_fused_experts import by_hand  # noqa: E402
from tests.jaxmoe.test_fused_experts import Case, kept_pairs  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU"),
    pytest.mark.usefixtures("synchronized"),
]

DEVICE = "cuda"
CONFIG = bridge.RoutingConfig(num_experts=24, top_k=4, routed_scaling_factor=2.5, n_shared_experts=1)
WIDTH, INNER, SLOTS = 256, 96, CONFIG.num_slots
HERE = (17, 3, 24, 9, 0)  # of 25 ids: the shared expert, which every token has, is in the middle
ERROR = {torch.bfloat16: 3e-2, torch.float32: 5e-5}  # of the largest value
DTYPES = pytest.mark.parametrize("dtype", ERROR, ids=str)
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 64, 1000])
ROOM = pytest.mark.parametrize("scarce", [False, True], ids=["room for all", "room for some"])
KINDS = pytest.mark.parametrize(
    ("transposed", "activation"),
    [(False, "silu"), (True, "silu"), (False, "gelu"), (True, "gelu_tanh")],
    ids=["plain", "transposed", "gelu", "gelu_tanh"],
)


def check_close(found: Any, wanted: Any, dtype: Any) -> None:
    """Within what computing in the dtype explains, on the scale of the largest value."""
    assert found.shape == wanted.shape
    scale = max(float(wanted.detach().abs().max()), 1e-3) if wanted.numel() else 0.0
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=0, atol=scale * ERROR[dtype])


def make(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def stack(dtype: Any, transposed: bool) -> list[Any]:
    """gate_up and down of the experts that are here: leaves of autograd, or views of such that lie transposed."""
    made = [make(1, len(HERE), WIDTH, 2 * INNER) / 16, make(2, len(HERE), INNER, WIDTH) / 8]
    lying = [weight.mT.contiguous().mT if transposed else weight for weight in made]
    return [weight.to(dtype).detach().requires_grad_() for weight in lying]


def room(tokens: int, scarce: bool) -> int | None:
    """Of `tokens`, that many and a few more pairs are of experts that are here, the shared one's among them."""
    return max(tokens, 1) if scarce else None


def exactly(leaves: list[Any]) -> list[Any]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def gradients(y: Any, leaves: list[Any], up: Any) -> tuple[Any, ...]:
    return torch.autograd.grad(y, leaves, up, allow_unused=True, materialize_grads=True)


def check_dropped(case: Case, ids: Any) -> None:
    """Where there is room for some alone, more pairs were left out than those whose experts are elsewhere."""
    found = ids.cpu().numpy()
    left_out = int(kept_pairs(Case("", HERE), found).sum() - kept_pairs(case, found).sum())
    assert (left_out > 0) == (case.max_rows is not None and case.tokens >= 64)


def behind_routing(tokens: int, dtype: Any, transposed: bool, seed: int = 3) -> tuple[Any, list[Any], Any]:
    """(ids, leaves: x, weights, gate_up and down; the result's gradient)."""
    ids = torch.randint(-1, CONFIG.num_expert_ids, (tokens, SLOTS), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = HERE[2]
    x, weights = make(seed + 1, tokens, WIDTH).to(dtype), make(seed + 2, tokens, SLOTS)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *stack(dtype, transposed)]
    return ids.to(DEVICE, torch.int32), leaves, make(seed + 3, tokens, WIDTH).to(dtype)


def local_map() -> Any:
    found = torch.full((CONFIG.num_expert_ids,), -1, dtype=torch.int32)
    found[list(HERE)] = torch.arange(len(HERE), dtype=torch.int32)
    return found.to(DEVICE)


def set_up(tokens: int, scarce: bool, activation: str) -> tuple[Case, dict[str, Any]]:
    """(what is here, what there is room for, the activation; the same as arguments of `fused_experts` and `moe`)."""
    case = Case("", HERE, tokens, SLOTS, room(tokens, scarce), activation=activation)
    return case, {"expert_map": local_map(), "max_rows": case.max_rows, "activation": activation}


def twice(run: Callable[[], list[Any]]) -> list[Any]:
    """What it returns, which is the same to the bit on another run, in other memory."""
    first = run()
    between = [torch.empty_like(tensor) for tensor in first]
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)
    del between
    return first


@KINDS
@ROOM
@DTYPES
@TOKENS
def test_fused_experts(tokens: int, dtype: Any, scarce: bool, transposed: bool, activation: str) -> None:
    """Values and every gradient, in the layout of what it is of; without gradients, and in `out`, the same values."""
    case, how = set_up(tokens, scarce, activation)
    ids, leaves, up = behind_routing(tokens, dtype, transposed)
    check_dropped(case, ids)

    def fused(**out: Any) -> Any:
        x, weights, *experts = leaves
        return bridge.fused_experts(x, ids, weights, *experts, **how, **out)

    def run() -> list[Any]:
        y = fused()
        return [y.detach(), *torch.autograd.grad(y, leaves, up)]

    y, *found = twice(run)
    with torch.no_grad():
        assert torch.equal(fused(), y)
        out = torch.full_like(y, torch.nan)
        assert fused(out=out) is out
        assert torch.equal(out, y)
    exact = exactly(leaves)
    want = by_hand(case, ids, *exact)
    check_close(y, want, dtype)
    assert y.dtype == dtype
    for gradient, wanted, leaf in zip(found, gradients(want, exact, up.double()), leaves, strict=True):
        check_close(gradient, wanted, dtype)
        assert gradient.dtype == leaf.dtype
        assert gradient.stride() == leaf.stride() or not tokens
        assert wanted.any() == (tokens > 0)


def layer_inputs(tokens: int, dtype: Any, transposed: bool, seed: int = 3) -> tuple[list[Any], Any, Any]:
    """(leaves: x, router, gate_up and down; the bias; the result's gradient)."""
    x, router = make(seed, tokens, WIDTH).to(dtype), (make(seed + 1, CONFIG.num_experts, WIDTH) / 16).to(dtype)
    leaves = [x.requires_grad_(), router.requires_grad_(), *stack(dtype, transposed)]
    return leaves, make(seed + 2, CONFIG.num_experts) / 8, make(seed + 3, tokens, WIDTH).to(dtype)


def weights_by_formula(x: Any, router: Any, ids: Any) -> Any:
    """Of the choice that was made: scores that sum to the factor, and 1 for the shared expert."""
    scores = (x @ router.T).sigmoid().gather(1, ids[:, : CONFIG.top_k].long())
    weights = CONFIG.routed_scaling_factor * scores / scores.sum(1, keepdim=True)
    return torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)


@KINDS
@ROOM
@DTYPES
@TOKENS
def test_moe(tokens: int, dtype: Any, scarce: bool, transposed: bool, activation: str) -> None:
    """It routes among all ids, whose load it counts, and computes those that are here."""
    case, how = set_up(tokens, scarce, activation)
    leaves, bias, up = layer_inputs(tokens, dtype, transposed)

    def layer(**out: Any) -> tuple[Any, bridge.Routing]:
        x, router, *experts = leaves
        return bridge.moe(x, bridge.MoEParams(router, *experts, bias), CONFIG, **how, **out)

    def run() -> list[Any]:
        y, routing = layer()
        parts = [part.detach() for part in routing]
        return [y.detach(), *parts, *torch.autograd.grad(y, leaves, up)]

    y, weights, ids, load, *found = twice(run)
    with torch.no_grad():
        assert torch.equal(layer()[0], y)
        out = torch.full_like(y, torch.nan)
        filled, routing = layer(out=out)
        assert filled is out
        assert all(torch.equal(a, b) for a, b in zip((out, *routing), (y, weights, ids, load), strict=True))
    routed = bridge.route(bridge.router_logits(*(leaf.detach() for leaf in leaves[:2])), bias, config=CONFIG)
    for part, wanted in zip((weights, ids, load), routed, strict=True):
        assert torch.equal(part, wanted)
    assert int(load.sum()) == tokens * SLOTS
    check_dropped(case, ids)
    exact = exactly(leaves)
    by_formula = weights_by_formula(*exact[:2], ids)
    check_close(weights, by_formula, torch.float32)
    want = by_hand(case, ids, exact[0], by_formula, *exact[2:])
    check_close(y, want, dtype)
    assert y.dtype == dtype
    for gradient, wanted, leaf in zip(found, gradients(want, exact, up.double()), leaves, strict=True):
        check_close(gradient, wanted, dtype)
        assert gradient.dtype == leaf.dtype
        assert gradient.stride() == leaf.stride() or not tokens


def captured(run: Callable[[], list[Any]]) -> tuple[Any, list[Any]]:
    """(a graph of it, where its results lie), after a first run on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX, which others use, has other threads
        return graph, run()


@ROOM
@pytest.mark.parametrize("kind", ["inference", "into out", "training"])
@pytest.mark.parametrize("name", ["fused_experts", "moe"])
def test_captured_and_replayed(name: str, kind: str, scarce: bool) -> None:
    """On other inputs, another map among them, to the bits of a call without a graph; results poisoned in between.

    An engine gives the memory of the result: here at an odd address.
    """
    tokens, dtype, trained = 64, torch.bfloat16, kind == "training"
    most = room(tokens, scarce)
    memory = torch.full((tokens * WIDTH + 1,), torch.nan, dtype=dtype, device=DEVICE)
    to: dict[str, Any] = {"out": memory[1:].view(tokens, WIDTH)} if kind == "into out" else {}

    def inputs(seed: int) -> tuple[list[Any], list[Any]]:
        """(leaves, what else goes in: the last is the result's gradient, the first the map)."""
        local = local_map().roll(seed)
        if name == "moe":
            leaves, bias, up = layer_inputs(tokens, dtype, True, 10 * seed)
            return leaves, [local, bias, up]
        ids, leaves, up = behind_routing(tokens, dtype, True, 10 * seed)
        return leaves, [local, ids, up]

    def run(leaves: list[Any], others: list[Any]) -> list[Any]:
        x, second, *experts = leaves
        local, given, up = others
        how = {"expert_map": local, "max_rows": most, "activation": "gelu", **to}
        with torch.set_grad_enabled(trained):
            if name == "moe":
                y, routing = bridge.moe(x, bridge.MoEParams(second, *experts, given), CONFIG, **how)
                results = [y, *routing]
            else:
                results = [bridge.fused_experts(x, given, second, *experts, **how)]
        found = list(torch.autograd.grad(results[0], leaves, up)) if trained else []
        return [*(part.detach() for part in results), *found]

    given = inputs(0)
    graph, results = captured(lambda: run(*given))
    poison = torch.empty(2**20, device=DEVICE)  # what the capture freed must not be what it needs
    seen = []
    for seed in (1, 2, 1):
        fresh = inputs(seed)
        with torch.no_grad():
            for tensor, value in zip((*given[0], *given[1]), (*fresh[0], *fresh[1]), strict=True):
                tensor.copy_(value)
            poison.fill_(float("nan"))
            for part in results:
                part.fill_(-77)
        graph.replay()
        torch.cuda.synchronize()
        kept = [part.clone() for part in results]  # the next call may write to the same memory
        for found, wanted in zip(kept, run(*fresh), strict=True):
            assert torch.equal(found, wanted)
            assert found.any()
        seen.append(kept[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in inductor
@pytest.mark.parametrize("mode", ["enable_grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["fused_experts", "moe"])
def test_compiled(name: str, mode: str) -> None:
    """In one graph, the bits of the eager call, which takes the ops' own kernels where nobody asks for a gradient."""
    torch._dynamo.reset()
    how = {"expert_map": local_map(), "max_rows": room(64, True)}
    if name == "moe":
        (x, second, *experts), bias, up = layer_inputs(64, torch.bfloat16, True, 5)
    else:
        ids, (x, second, *experts), up = behind_routing(64, torch.bfloat16, True, 5)

    def run(x: Any, second: Any, gate_up: Any, down: Any) -> Any:
        if name == "moe":
            return bridge.moe(x, bridge.MoEParams(second, gate_up, down, bias), CONFIG, **how)[0]
        return bridge.fused_experts(x, ids, second, gate_up, down, **how)

    leaves = [x, second, *experts]
    with getattr(torch, mode)():
        want, got = run(*leaves), torch.compile(run, fullgraph=True)(*leaves)
        assert want.any()
        assert torch.equal(got, want)
    if mode == "enable_grad":
        for a, b in zip(gradients(got, leaves, up), gradients(want, leaves, up), strict=True):
            assert torch.equal(a, b)
