"""The native path on a GPU: every op against jaxmoe's reference, outputs poisoned first, in every layout of memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from kernels_pallas import route as route_kernels
from tests import cases
from tests.cases import CASES, IDS
from tests.check_dispatch import check_combine, check_dispatch
from tests.check_plan import PLAN_CASES, PLAN_IDS, PlanCase, check_plan
from tests.check_route import check_route

torch = pytest.importorskip("torch")
import bridge  # noqa: E402
from tests.gpu.tensors import DTYPES, array, plan_of, poisoned, routing, tensor  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a torch that sees the GPU"),
    pytest.mark.usefixtures("synchronized"),
]

V3 = bridge.presets["deepseek-v3"]
LAYOUTS = ["aligned", "shifted", "apart"]


def test_memory_is_poisoned() -> None:
    """conftest.py fills it."""
    for made in (torch.empty(9, device="cuda"), torch.ones(3, device="cuda").new_empty(9)):
        assert made.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_route(case: cases.Case, layout: str) -> None:
    logits, bias = case.inputs(129)
    sizes = (len(logits), case.config.num_slots)
    out = bridge.Routing(
        poisoned(*sizes, layout=layout),
        poisoned(*sizes, dtype=torch.int32, layout=layout),
        poisoned(case.config.num_expert_ids, dtype=torch.int32, layout=layout),
    )
    got = bridge.route(tensor(logits, layout), tensor(bias), config=case.config, out=out)
    assert got is out
    check_route(routing(got), logits, bias, case.config)


@pytest.mark.parametrize(
    ("case", "together"),
    [
        pytest.param(case, together, id=f"{name}, {together}")
        for case, name in zip(CASES, IDS, strict=True)
        for together in sorted({2, case.most_together})
        if 1 < together <= case.most_together
    ],
)
def test_tokens_that_share_a_warp(case: cases.Case, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the same to the bit, whatever the rest of the warp has."""
    config = route_kernels.Config(together, 1, 32)
    logits, bias = case.inputs(1001)  # an odd number: the last warp has fewer
    alone = bridge.route(tensor(logits[:333]), tensor(bias), config=case.config)
    monkeypatch.setattr(route_kernels, "config_for", lambda *args: config)
    got = bridge.route(tensor(logits), tensor(bias), config=case.config)
    check_route(routing(got), logits, bias, case.config)
    assert torch.equal(got.experts[:333], alone.experts)
    assert torch.equal(got.weights[:333].view(torch.int32), alone.weights.view(torch.int32))


@pytest.mark.parametrize("valid", [0, 1, 100, 129])
@pytest.mark.parametrize("kind", ["number", "tensor", "tensor inside another"])
def test_num_valid_tokens(valid: int, kind: str) -> None:
    logits = cases.normal(0, 129, 256)
    holder = torch.full((5,), valid, dtype=torch.int32, device="cuda")
    count = valid if kind == "number" else holder[0] if kind == "tensor" else holder[3]
    got = bridge.route(tensor(logits), config=V3, num_valid_tokens=count)
    check_route(routing(got), logits, None, V3, valid=valid)


@pytest.mark.parametrize("layout", ["aligned", "shifted"])
@pytest.mark.parametrize("case", PLAN_CASES, ids=PLAN_IDS)
def test_plan_dispatch_and_combine(case: PlanCase, layout: str) -> None:
    ids, expert_map = case.inputs(150)
    plan = bridge.plan_dispatch(
        tensor(ids, layout),
        case.num_experts,
        align=case.align,
        expert_map=tensor(expert_map, layout),
        max_rows=case.max_rows,
    )
    check_plan(plan_of(plan), ids, case.num_experts, case.align, expert_map, case.max_rows)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = cases.normal(1, len(ids), 72, dtype=dtype)
        out = poisoned(plan.slots.shape[0], 72, dtype=DTYPES[x.dtype.name], layout=layout)
        rows = bridge.dispatch(tensor(x, "apart"), plan, out=out)
        assert rows is out
        check_dispatch(array(rows), x, plan_of(plan))
        weights = cases.normal(2, *ids.shape, dtype=dtype)
        y = poisoned(len(ids), 72, dtype=out.dtype, layout=layout)
        assert bridge.combine(rows, plan, tensor(weights, layout), out=y) is y
        check_combine(array(y), array(rows), plan_of(plan), weights)


@pytest.mark.parametrize("through", ["native", "pallas"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_tokens_sum_is_the_same_among_many(dtype: str, through: str) -> None:
    """To the bit: many tokens have other tiles than few, and rows that are read apart where some are dropped."""
    drawn = np.random.default_rng(0)
    ids = np.where(drawn.random((1000, 8)) < drawn.integers(0, 3, (1000, 1)) / 2, -1, drawn.integers(0, 16, (1000, 8)))
    plan = bridge.plan_dispatch(tensor(ids.astype(np.int32)), 16)
    rows, weights = tensor(cases.normal(0, 8000, 1500, dtype=dtype)), tensor(cases.normal(1, 1000, 8, scale=0.1))
    many = bridge.combine(rows, plan, weights, implementation=through)
    assert {0, 8} < set((ids >= 0).sum(axis=1).tolist())
    for part in (slice(0, 40), slice(700, 1000)):
        some = plan._replace(rows=plan.rows[part].clone())
        few = bridge.combine(rows, some, weights[part].clone(), implementation=through)
        assert torch.equal(many[part], few)
    check_combine(array(many), array(rows), plan_of(plan), array(weights))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "bfloat16 float32", "float32 float32", "float16 bfloat16"])
@pytest.mark.parametrize("tokens", [0, 1, 64, 300])
def test_router_logits_and_gradients(tokens: int, dtypes: str, layout: str) -> None:
    x_dtype, weight_dtype = dtypes.split()
    x = cases.normal(0, tokens, 200, dtype=x_dtype)
    weight = cases.normal(1, 60, 200, dtype=weight_dtype)
    tx, tw = tensor(x, layout).detach().requires_grad_(), tensor(weight).requires_grad_()
    got = bridge.router_logits(tx, tw)
    x64, w64 = (np.asarray(a.astype(jnp.float32)).astype(np.float64) for a in (x, weight))
    np.testing.assert_allclose(array(got), x64 @ w64.T, rtol=1e-5, atol=2e-5 * np.sqrt(200))
    assert got.dtype == torch.float32
    grad = cases.normal(2, tokens, 60)
    got.backward(tensor(grad, "apart"))
    g64 = np.asarray(grad).astype(np.float64)
    for found, want, like in ((tx.grad, g64 @ w64, tx), (tw.grad, g64.T @ x64, tw)):
        assert found.dtype == like.dtype
        eps = float(jnp.finfo(str(like.dtype).removeprefix("torch.")).eps)
        np.testing.assert_allclose(np.asarray(array(found), np.float64), want, rtol=max(eps, 1e-5), atol=1e-4)


def test_backward_passes_that_keep_the_graph() -> None:
    """The last one writes over what was kept: after others, which must find it as it was, and with the same result."""
    config = bridge.RoutingConfig(num_experts=12, top_k=3)
    make = lambda seed, *shape: tensor(cases.normal(seed, *shape, dtype="bfloat16")).requires_grad_()
    leaves = make(0, 100, 64), make(1, 12, 64), make(2, 12, 64, 96), make(3, 12, 48, 64)
    x, router, gate_up, down = leaves
    y = bridge.moe(x, bridge.MoEParams(router=router, gate_up=gate_up, down=down), config)[0].float().square().sum()
    first, second, last = (torch.autograd.grad(y, leaves, retain_graph=keep) for keep in (True, True, False))
    for name, a, b, c in zip(("x", "router", "gate_up", "down"), first, second, last, strict=True):
        assert a.any(), name
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "kimi-k2", "deepseek-v4-flash", "qwen3-next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_jaxmoe(name: str, dtype: str) -> None:
    """Through route, dispatch and combine at once, against jaxmoe's derivative on the CPU."""
    config, tokens = bridge.presets[name], 50
    logits, bias = cases.normal(0, tokens, config.num_experts, dtype=dtype), cases.normal(1, config.num_experts)
    x, scale = cases.normal(2, tokens, 64, dtype=dtype), cases.normal(3, tokens, 64)

    def loss(logits: Any, x: Any) -> Any:
        got = jaxmoe.route(logits, bias, config=config, implementation="xla")
        plan = jaxmoe.plan_dispatch(got.experts, config.num_expert_ids, implementation="xla")
        rows = jaxmoe.dispatch(x, plan, implementation="xla")
        rows = rows * (1 + jnp.arange(len(rows))[:, None] % 3).astype(rows.dtype)
        y = jaxmoe.combine(rows, plan, got.weights, implementation="xla")
        return jnp.sum(y.astype(jnp.float32) * scale)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        wanted = jax.grad(loss, (0, 1))(logits, x)
    tl, tx = tensor(logits).requires_grad_(), tensor(x).requires_grad_()
    got = bridge.route(tl, tensor(bias), config=config)
    plan = bridge.plan_dispatch(got.experts, config.num_expert_ids)
    rows = bridge.dispatch(tx, plan)
    rows = rows * (1 + torch.arange(len(rows), device="cuda")[:, None] % 3).to(rows.dtype)
    y = bridge.combine(rows, plan, got.weights)
    (y.float() * tensor(scale)).sum().backward()
    for found, want in zip((tl.grad, tx.grad), wanted, strict=True):
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        size = float(np.abs(np.asarray(want, np.float32)).max())
        np.testing.assert_allclose(
            np.asarray(array(found), np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance * size
        )


SIZES = {
    "even": [40] * 6,
    "uneven, with empty ones": [0, 130, 1, 0, 69, 40],
    "one has all": [0, 0, 240, 0, 0, 0],
    "rows behind the last group": [10, 0, 33, 5, 7, 20],
    "no rows at all": [0] * 6,
    "decode: fewer rows than experts": [1, 0, 1, 0, 1, 0],
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("width", "inner"), [(128, 96), (72, 40), (33, 7)])
def test_experts_and_gradients(kind: str, dtype: str, transposed: bool, width: int, inner: int) -> None:
    """Against a loop over experts in float64, gradients by torch's autograd."""
    sizes, kept = SIZES[kind], DTYPES[dtype]
    count = 3 if kind.startswith("decode") else 240
    make = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kept).cuda()
    rows = make(0, count, width).requires_grad_()
    if transposed:
        stack = [(make(1, 6, 2 * inner, width) / 8).mT, (make(2, 6, width, inner) / 8).mT]
    else:
        stack = [make(1, 6, width, 2 * inner) / 8, make(2, 6, inner, width) / 8]
    stack = [weight.detach().requires_grad_() for weight in stack]
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    got = bridge.experts(rows, *stack, group_sizes)
    grad = make(3, count, width)
    got.backward(grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in (rows, *stack)]
    parts, first = [], 0
    for expert, size in enumerate(sizes):
        x = exact[0][first : first + size] @ exact[1][expert]
        parts.append((torch.nn.functional.silu(x[:, :inner]) * x[:, inner:]) @ exact[2][expert])
        first += size
    wanted = torch.cat([*parts, exact[0][first:] * 0])
    wanted.backward(grad.double())
    eps = 2e-2 if kept is torch.bfloat16 else 1e-5
    for found, want in ((got, wanted), *((a.grad, b.grad) for a, b in zip((rows, *stack), exact, strict=True))):
        found, want = found.detach(), want.detach()
        scale = max(float(want.abs().max()), 1e-3)
        assert found.dtype == kept
        assert float((found.double() - want).abs().max()) <= eps * scale
    assert not got[sum(sizes) :].any()
    plain = bridge.grouped_matmul(rows.detach(), stack[0].detach(), group_sizes)
    first = 0
    for expert, size in enumerate(sizes):
        want = exact[0][first : first + size].detach() @ exact[1][expert].detach()
        assert torch.allclose(plain[first : first + size].double(), want, rtol=eps, atol=eps)
        first += size


@pytest.mark.parametrize("config", [V3, bridge.presets["qwen3-moe"]], ids=["V3", "Qwen3"])
def test_moe_is_the_layer(config: bridge.RoutingConfig) -> None:
    """The op of the whole layer against jaxmoe's on the CPU, gradients too."""
    count, make = config.num_expert_ids, lambda seed, *shape: cases.normal(seed, *shape, scale=0.25)
    x, router, bias = make(0, 50, 64), make(1, config.num_experts, 64), make(2, config.num_experts)
    gate_up, down = make(3, count, 64, 48), make(4, count, 24, 64)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        arrays = [jnp.asarray(np.asarray(a)) for a in (x, router, gate_up, down)]

        def loss(x: Any, router: Any, gate_up: Any, down: Any) -> Any:
            params = jaxmoe.MoEParams(router=router, bias=jnp.asarray(np.asarray(bias)), gate_up=gate_up, down=down)
            y, got = jaxmoe.moe(x, params, config, implementation="xla")
            return jnp.sum(y * y), (y, got)

        gradients, (y, got) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    tensors = [tensor(a).requires_grad_() for a in (x, router, gate_up, down)]
    params = bridge.MoEParams(tensors[1], tensors[2], tensors[3], tensor(bias))
    ty, found = bridge.moe(tensors[0], params, config)
    np.testing.assert_array_equal(array(found.experts), got.experts)
    np.testing.assert_array_equal(array(found.load), got.load)
    np.testing.assert_allclose(array(ty), y, rtol=1e-4, atol=1e-5)
    (ty * ty).sum().backward()
    for a, b in zip(tensors, gradients, strict=True):
        np.testing.assert_allclose(array(a.grad), b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
    load = torch.arange(count, dtype=torch.int32, device="cuda")
    moved = bridge.update_bias(tensor(bias), load, rate=0.25)
    np.testing.assert_array_equal(array(moved), jaxmoe.update_bias(bias, jnp.arange(count, dtype=jnp.int32), rate=0.25))


def test_offsets_past_2_31_elements() -> None:
    """37,450 tokens x 8 rows x 7168: a kernel of its own, with 64-bit offsets."""
    tokens, width = 37_450, 7168
    ids = torch.randint(0, 256, (tokens, 8), dtype=torch.int32, device="cuda")
    plan = bridge.plan_dispatch(ids, 256)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    rows = bridge.dispatch(x, plan)
    assert rows.numel() > 2**31
    last = plan.slots[-3:].long()
    assert torch.equal(rows[-3:], x[last // 8])
    weights = torch.rand(tokens, 8, device="cuda")
    y = bridge.combine(rows, plan, weights)
    for token in (0, 17, tokens - 1):
        want = sum(weights[token, j].double() * rows[plan.rows[token, j].long()].double() for j in range(8))
        assert torch.allclose(y[token].double(), want, rtol=1e-2, atol=1e-2)
