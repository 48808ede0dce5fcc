"""The native path's kernels, compiled by triton and run on this machine: `tests/emulator` executes their PTX.

What it shows that the interpreter cannot: that triton's layouts, exchanges and reshapes do what the kernel says; that
no access leaves its tensor or is unaligned; that programs and warps do not depend on one another's pace. By default
some cases run; with JAXMOE_EMULATE=all every one does, and for more targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import jaxmoe
from bridge.native import dispatch, experts, routing
from jaxmoe import DispatchPlan, Routing, RoutingConfig, presets
from kernels_pallas import plan_dispatch as plan_kernels
from kernels_pallas import route as route_kernels
from tests import oracle
from tests.cases import BF16, F16, F32, Case, coarse, normal, spoiled
from tests.cases import CASES as ROUTES
from tests.check_dispatch import check_combine, check_dispatch, rounding
from tests.check_plan import PLAN_CASES, WAYS, PlanCase, blocks_length, check_blocks, check_plan, drawn
from tests.check_route import check_route
from tests.emulator.memory import Fault
from tests.emulator.native import ALL, Emulator, array, forget
from tests.jaxmoe.test_route import routings

pytest.importorskip("triton")
INT32, FLOAT32 = torch.int32, torch.float32


def some(cases: list[Any], chosen: set[str]) -> list[Any]:
    """All cases, or those whose reason begins as one of the chosen does."""
    found = [case for case in cases if ALL or any(case.why.startswith(start) for start in chosen)]
    return [pytest.param(case, id=case.why) for case in found]


def route(emulator: Emulator, case: Case, *, tokens: int | None = None, offset: int = 0, extra: int = 0) -> Routing:
    """Routes on the native path and checks the result."""
    x, bias = case.inputs(tokens)
    count, config = x.shape[0], case.config
    weights = emulator.empty(count, config.num_slots, dtype=FLOAT32, offset=offset)
    ids = emulator.empty(count, config.num_slots, dtype=INT32, offset=offset)
    load = emulator.empty(config.num_expert_ids, dtype=INT32, offset=offset)
    logits = emulator.put(x, offset, extra)
    routing.route(
        logits, None if bias is None else emulator.put(bias, offset), None, None, config.json, weights, ids, load
    )
    found = Routing(weights.numpy(), ids.numpy(), load.numpy())
    check_route(found, x, bias, config)
    return found


@pytest.mark.parametrize(
    "case",
    some(
        ROUTES,
        {
            "DeepSeek-V3",  # groups, eight columns a lane
            "Kimi-K2",  # twelve columns, no power of two
            "odd number of odd groups",  # runs of lanes without a group
            "E = 512, k = 10",  # picks carry their place in spare bits
            "E = 60: two lanes that tie",  # nothing is read past the last token for it
            "1024 groups of one",  # more groups than lanes: the exact search alone
            "many ties, softmax",
            "softmax with a bias",
            "sqrtsoftplus: DeepSeek-V4",
            "NaN and infinite logits: vLLM",
            "NaN and infinite logits, not",
            "NaN and infinities in the bias",
            "logits float16, bias bfloat16",
            "no tokens",
            # 28 columns, depth, shared experts; in CI only, since it compiles for a quarter of a minute
            *(["E = 896"] if "JAXMOE_EVERY_TARGET" in os.environ else []),
        },
    ),
)
def test_route(case: Case, emulator: Emulator) -> None:
    route(emulator, case)


SHARED = [
    (case, together)
    for case in some(
        ROUTES,
        {
            "DeepSeek-V3",  # its slots, shared experts among them, take half the lanes
            "many ties, softmax",  # the exact search, and picks that carry their place
            "softmax with a bias",
            "NaN and infinite logits, not",  # what softmax needs of each token's row
            "K = E",  # no quick search
            "one of many",  # most lanes have no slot
        },
    )
    for together in (2, 4, 8)
    for most in [case.values[0].most_together]
    if together == most or (together < most and (ALL or "JAXMOE_EVERY_TARGET" in os.environ))
]


@pytest.mark.parametrize(
    ("case", "together"), [pytest.param(*case.values, n, id=f"{case.id}, {n}") for case, n in SHARED]
)
def test_tokens_that_share_a_warp(
    case: Case, together: int, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens have it; the last warp has fewer. The same to the bit as with a warp for each."""
    alone = route(emulator, case, tokens=2 * together + 1)
    config = route_kernels.Config(together, 1, 32)
    monkeypatch.setattr(route_kernels, "config_for", lambda *args: config)
    found = route(emulator, case, tokens=2 * together + 1)
    for a, b in zip(alone, found, strict=True):
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32), strict=True)


def test_bits_where_every_slot_counts(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM must not fuse a product with the sum, as it cannot with a warp a token: one token in a hundred shows it."""
    case = Case("", RoutingConfig(num_experts=16, top_k=4))
    alone = route(emulator, case, tokens=201)
    monkeypatch.setattr(route_kernels, "config_for", lambda *args: route_kernels.Config(8, 1, 32))
    found = route(emulator, case, tokens=201)
    np.testing.assert_array_equal(alone.weights.view(np.int32), found.weights.view(np.int32))


@settings(
    max_examples=60 if ALL else 4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(routings())
def test_any_config(emulator: Emulator, problem: tuple[RoutingConfig, int, int, bool, str]) -> None:
    config, seed, tokens, with_bias, kind = problem
    logits: Callable[[int, int], jax.Array] = {
        "normal": lambda t, e: normal(seed, t, e, scale=3.0),
        "coarse": lambda t, e: jax.numpy.round(normal(seed, t, e) * 2) / 2,
        "spoiled": lambda t, e: spoiled(seed, t, e),
    }[kind]
    route(emulator, Case("", config, bias=F32 if with_bias else None, tokens=tokens, logits=logits))


V3 = presets["deepseek-v3"]
# Every other token has ties, which the quick search leaves to the exact one.
BOTH = [
    Case("DeepSeek-V3", V3, dtype=BF16, bias_values=lambda e: jax.numpy.zeros(e),
         logits=lambda t, e: normal(1, t, e).at[1::2].set(coarse(t, e)[1::2])),
    Case("softmax, float32", RoutingConfig(num_experts=64, top_k=6, scoring_func="softmax"), bias=None,
         logits=lambda t, e: normal(1, t, e).at[1::2].set(spoiled(9, t, e)[::2])),
]  # fmt: skip


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.why)
def test_both_searches_run(case: Case, emulator: Emulator) -> None:
    """The quick one for these tokens, the exact one after it for those: told apart by how much is executed."""
    route(emulator, case, tokens=20)
    executed = emulator.records[0].by_program[2:]  # the first program clears the load, too
    assert (executed[0::2] == executed.min()).sum() >= 8
    assert (executed[1::2] > 1.2 * executed.min()).sum() >= 8


@pytest.mark.parametrize("how", [{"offset": 1}, {"extra": 3}], ids=["shifted", "strided rows"])
def test_route_anywhere_in_memory(how: dict[str, int], emulator: Emulator) -> None:
    """Kernels that count on no alignment: an access that is wider than its address allows would raise."""
    route(emulator, Case("", V3, dtype=BF16), **how)


def far_apart(emulator: Emulator, rows: np.ndarray) -> torch.Tensor:
    """Rows of bfloat16 more than 2 GiB from one another; what lies between is never touched, so it takes no memory."""
    count, width = rows.shape
    wide = torch.empty((count - 1) * (2**30 + 64) + width, dtype=torch.bfloat16).as_strided(
        (count, width), (2**30 + 64, 1)
    )
    for row, values in zip(wide, rows, strict=True):
        emulator.add(row, writable=False).copy_(torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16))
    return wide


def test_offsets_of_64_bits(emulator: Emulator) -> None:
    case = ROUTES[0]
    x, bias = case.inputs(4)
    weights, ids = (emulator.empty(4, case.config.num_slots, dtype=dtype) for dtype in (FLOAT32, INT32))
    logits = far_apart(emulator, np.asarray(x))
    routing.route(logits, emulator.put(bias), None, None, case.config.json, weights, ids, None)
    check_route(Routing(weights.numpy(), ids.numpy(), None), x, bias, case.config)

    found = plan(emulator, PlanCase("", 4, tokens=4, slots=1))
    rows, factors, out = normal(0, 4, 72, dtype=BF16), normal(1, 4, 1), emulator.empty(4, 72, dtype=torch.bfloat16)
    dispatch.combine(far_apart(emulator, np.asarray(rows)), emulator.put(found.rows), emulator.put(factors), out)
    check_combine(array(out), rows, found, factors)


def test_number_of_valid_tokens(emulator: Emulator) -> None:
    case = ROUTES[0]
    x, bias = case.inputs()
    logits, biases = emulator.put(x), emulator.put(bias)
    for valid, number in ((emulator.put(np.int32(4).reshape(1)), None), (None, 2)):
        weights, ids = (emulator.empty(6, case.config.num_slots, dtype=dtype) for dtype in (FLOAT32, INT32))
        routing.route(logits, biases, valid, number, case.config.json, weights, ids, None)
        check_route(Routing(weights.numpy(), ids.numpy(), None), x, bias, case.config, number or 4)


def plan(emulator: Emulator, case: PlanCase, tokens: int | None = None, offset: int = 0) -> DispatchPlan:
    ids, expert_map = case.inputs(tokens)
    rows = emulator.empty(*ids.shape, dtype=INT32, offset=offset)
    length = plan_kernels.num_rows(ids.size, case.num_experts, case.align, case.max_rows)
    slots = emulator.empty(length, dtype=INT32, offset=offset)
    sizes = emulator.empty(case.num_experts, dtype=INT32, offset=offset)
    here = None if expert_map is None else emulator.put(expert_map, offset)
    dispatch.plan_dispatch(emulator.put(ids, offset), case.num_experts, case.align, here, rows, slots, sizes)
    found = DispatchPlan(rows.numpy(), slots.numpy(), sizes.numpy())
    check_plan(found, ids, case.num_experts, case.align, expert_map, case.max_rows)
    return found


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> plan_kernels.Config:
    """Every way for every case, however few its pairs are."""
    config: plan_kernels.Config = WAYS[request.param]
    monkeypatch.setattr(plan_kernels, "config_for", lambda *args: config)
    return config


@pytest.mark.parametrize(
    "case",
    some(
        PLAN_CASES,
        {
            "no tokens, aligned",
            "one pair",
            "odd E",
            "more experts than pairs",
            "ids past the end",
            "all dropped, aligned",
            "aligned to 3",
            "aligned to 64",
            "expert map with -1",
            # Nothing is written behind the last row: no pair, no size, nothing that fills up.
            "cut within a group",
            "cut, aligned to 3",
            "cut to one",
            "cut, with an expert map, aligned",
            "cut, no tokens",
        },
    ),
)
def test_plan(case: PlanCase, way: plan_kernels.Config, emulator: Emulator) -> None:
    plan(emulator, case)
    plan(emulator, case, tokens=case.tokens + 70)
    assert len(emulator.records) == (2 if way.at_once else 4) * (case.tokens > 0)


@pytest.mark.parametrize(
    ("tokens", "case"),
    [
        (600, PlanCase("the two launches that many pairs take", 257, slots=9, ids=drawn(-1, 258))),
        (130, PlanCase("so many experts that a block's bits are counted in turns", 2048, slots=9, ids=drawn(-1, 2049))),
        (2000, PlanCase("chunks of which one is not full, and one without pairs", 3, slots=8, ids=drawn(-1, 4))),
        (256, PlanCase("as many pairs as one launch takes", 33, slots=16, ids=drawn(-1, 34))),
        (300, PlanCase("and with padding", 128, slots=8, align=128, ids=drawn(-1, 129))),
        (7, PlanCase("few pairs of 300 experts with padding", 300, slots=8, align=64)),
        (7, PlanCase("of so many that four warps count together on sm_90", 898, slots=8, align=16)),
        (600, PlanCase("two launches, cut", 257, slots=9, align=3, max_rows=1500, ids=drawn(-1, 258))),
        (300, PlanCase("two launches of many experts, cut", 1024, slots=9, max_rows=1000, ids=drawn(-1, 1024))),
        (300, PlanCase("one launch, cut, with padding", 128, slots=8, align=128, max_rows=1024, ids=drawn(-1, 129))),
    ],
    ids=lambda value: getattr(value, "why", ""),
)
def test_plan_as_configured(tokens: int, case: PlanCase, emulator: Emulator) -> None:
    plan(emulator, case, tokens)
    plan(emulator, case, tokens, offset=1)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (PlanCase("no tokens", 5, tokens=0, align=4), False),
        (PlanCase("one token, odd E", 5, tokens=1, align=4), False),
        (PlanCase("ids out of range", 9, align=3, ids=drawn(-3, 12)), False),
        (PlanCase("more experts than pairs", 200, tokens=7, align=64), False),
        (PlanCase("some are elsewhere", 3, align=8, expert_map=(-1, 2, -1, 0, 1, -1)), False),
        (PlanCase("experts by name", 6, align=4, expert_map=(-1, 2, -1, 0, 1, -1)), True),
    ],
    ids=lambda value: getattr(value, "why", ""),
)
def test_align_blocks(case: PlanCase, named: bool, way: plan_kernels.Config, emulator: Emulator) -> None:
    for tokens, offset in ((case.tokens, 0), (case.tokens + 70, 1)):
        ids, expert_map = case.inputs(tokens)
        length = blocks_length(ids.size, case.num_experts, case.align)
        sizes = length, -(-length // case.align), 1
        outs = [emulator.empty(size, dtype=INT32, offset=offset) for size in sizes]
        here = None if expert_map is None else emulator.put(expert_map, offset)
        dispatch.align_blocks(emulator.put(ids, offset), case.num_experts, case.align, here, named, *outs)
        found = tuple(tensor.numpy() for tensor in outs)
        check_blocks(found, ids, case.num_experts, case.align, expert_map, named=named)


@pytest.mark.parametrize(("local", "offset"), [(13, 0), (5, 1)])
def test_permute_maps(local: int, offset: int, emulator: Emulator) -> None:
    found = plan(emulator, PlanCase("", 13, ids=drawn(-3, 16)))
    pairs, ends = found.slots.size, np.cumsum(found.group_sizes)[:local]
    outs = [emulator.empty(size, dtype=INT32, offset=offset) for size in (2 * local + 2, pairs, pairs)]
    offsets = outs[0].view(torch.int64) if offset == 0 else torch.empty(local + 1, dtype=torch.int64)
    if offset:
        emulator.add(offsets)
    dispatch.permute_maps(*(emulator.put(a, offset) for a in found), offsets, *outs[1:])
    np.testing.assert_array_equal(offsets.numpy(), [0, *ends])
    np.testing.assert_array_equal(outs[1].numpy(), np.where(found.rows < 0, pairs - 1, found.rows).reshape(-1))
    np.testing.assert_array_equal(outs[2].numpy(), np.where(found.slots < 0, pairs, found.slots))


DTYPES = {"bfloat16": (BF16, 8, 0), "float32, shifted": (F32, 24, 1), "float16, odd width": (F16, 37, 0)}


@pytest.mark.parametrize("kind", DTYPES)
def test_dispatch_and_back(kind: str, emulator: Emulator) -> None:
    """Rows out and back, with dropped pairs and rows that hold nothing; then both gradients' kernels."""
    dtype, width, offset = DTYPES[kind]
    case = PlanCase("", 5, align=4, tokens=11, ids=drawn(-1, 5))
    found = plan(emulator, case)
    places, slots = emulator.put(found.rows, offset), emulator.put(found.slots, offset)
    x, rows, dy = (normal(seed, n, width, dtype=dtype) for seed, n in enumerate((11, len(found.slots), 11)))
    held = emulator.put(x, offset, extra=0 if offset else 5)
    out = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset)
    dispatch.dispatch(held, places, slots, None, out)
    check_dispatch(array(out), x, found)

    left = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset).fill_(7.0)
    dispatch.dispatch(held, places, slots, None, left, clear=False)
    empty = found.slots < 0
    assert empty.any()
    assert (array(left)[empty] == 7.0).all()
    np.testing.assert_array_equal(array(left)[~empty], array(out)[~empty])

    weights = normal(7, *found.rows.shape)
    sums = emulator.empty(11, width, dtype=held.dtype, offset=offset)
    dispatch.combine(emulator.put(rows, offset), places, emulator.put(weights, offset), sums)
    check_combine(array(sums), rows, found, weights)

    end = emulator.add(torch.tensor([0, 3, 7])[2:], writable=False)  # rows from 7 on are left out
    dispatch.combine(emulator.put(rows, offset), places, emulator.put(weights, offset), sums, end)
    check_combine(array(sums), rows, found._replace(rows=np.where(found.rows < 7, found.rows, -1)), weights)

    scaled = emulator.empty(*rows.shape, dtype=held.dtype, offset=offset)
    dispatch.dispatch(emulator.put(dy, offset), places, slots, emulator.put(weights, offset), scaled)
    holds = np.flatnonzero(found.slots >= 0)
    flat = found.slots[holds]
    want = np.zeros(rows.shape)
    want[holds] = np.asarray(dy, np.float64)[flat // 2] * np.asarray(weights, np.float64).reshape(-1)[flat][:, None]
    oracle.same(array(scaled), want, **rounding(dtype))

    products = emulator.empty(*found.rows.shape, dtype=FLOAT32, offset=offset)
    dispatch.combine_weight_grad(emulator.put(rows, offset), emulator.put(dy, offset), places, products)
    pairs = np.einsum("tsh,th->ts", np.asarray(rows, np.float64)[found.rows], np.asarray(dy, np.float64))
    oracle.same(array(products), np.where(found.rows >= 0, pairs, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient_of_routing(scoring_func: str, emulator: Emulator) -> None:
    config = RoutingConfig(num_experts=40, top_k=5, scoring_func=scoring_func, n_shared_experts=1)
    case = Case("", config, bias=None)
    found, (x, _) = route(emulator, case), case.inputs()
    grad = normal(5, *found.weights.shape)
    _, pull = jax.vjp(lambda x: jaxmoe.route(x, config=config, implementation="xla").weights, x)
    got = routing.route_backward(emulator.put(grad), emulator.put(x), emulator.put(found.experts), config.json)
    oracle.same(got.numpy(), np.asarray(pull(grad)[0], np.float64), rtol=2e-5, atol=1e-6)


LOGITS = {
    "one token": (1, 328, BF16, BF16),
    "one token, mixed": (1, 328, BF16, F32),
    "three tokens, plain products": (3, 4104, BF16, F32),
    "slices": (5, 1032, BF16, BF16),
    "parts, in slices": (5, 520, BF16, F32),
    "parts of the tokens": (9, 520, F32, BF16),
    "large tiles": (140, 200, F16, F16),
    "large tiles of parts": (140, 136, BF16, F32),
    "odd width": (70, 77, BF16, F32),
    "float32": (6, 136, F32, F32),
}


@pytest.mark.parametrize("name", LOGITS)
def test_router_logits(name: str, emulator: Emulator) -> None:
    """Every tile and way to multiply; float32 operands as exactly as float32 products are."""
    tokens, width, *dtypes = LOGITS[name]
    x, weight = normal(0, tokens, width, dtype=dtypes[0]), normal(1, 40, width, dtype=dtypes[1])
    got = routing.router_logits(emulator.put(x, extra=8 if width % 8 == 0 else 3), emulator.put(weight))
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    oracle.same(got.numpy(), want, rtol=2e-6, atol=2e-6 * width**0.5)
    with pytest.raises(AssertionError):
        oracle.same(np.roll(got.numpy(), 1, axis=1), want, rtol=2e-6, atol=2e-6 * width**0.5)


GRADIENTS = {
    "one token": (1, 40, 136, BF16, BF16),
    "parts of grad, in slices": (150, 40, 136, BF16, BF16),
    "few experts, in slices": (150, 20, 136, BF16, F32),
    "x in parts of grad, weight exactly": (70, 40, 77, BF16, F32),
    "float32, in slices": (70, 40, 136, F32, F32),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_router_logits(name: str, emulator: Emulator) -> None:
    """Every tile and way to multiply, in float32 whatever the dtypes; x has rows apart."""
    tokens, num_experts, width, *dtypes = GRADIENTS[name]
    x, weight = normal(0, tokens, width, dtype=dtypes[0]), normal(1, num_experts, width, dtype=dtypes[1])
    grad = normal(2, tokens, num_experts)
    held = emulator.put(x, extra=8 if width % 8 == 0 else 3)
    dx, dweight = routing.router_logits_backward(emulator.put(grad), held, emulator.put(weight))
    x64, w64, grad64 = (np.asarray(a, np.float64) for a in (x, weight, grad))
    for got, want, dtype in ((dx, grad64 @ w64, dtypes[0]), (dweight, grad64.T @ x64, dtypes[1])):
        bounds = {"rtol": 2e-6 if dtype == F32 else rounding(dtype)["rtol"], "atol": 2e-5}
        oracle.same(array(got), want, **bounds)
        with pytest.raises(AssertionError):
            oracle.same(np.roll(array(got), 1, axis=1), want, **bounds)


@pytest.mark.parametrize(
    ("counts", "transposed"),
    [((7, 0, 30, 1), False), ((7, 0, 30, 1), True), ((70, 0, 60, 1), False)],
    ids=["", "transposed", "enough rows for four warps together"],
)
def test_grouped_matmul(counts: tuple[int, ...], transposed: bool, emulator: Emulator) -> None:
    """Rows of several experts, of none, and behind the last group; weights in either layout, and their gradient."""
    num_rows, owner = sum(counts) + 3, np.repeat(np.arange(4), counts)
    rows, weight = normal(0, num_rows, 72, dtype=BF16), normal(1, 4, 72, 40, dtype=BF16, scale=0.1)
    laid = emulator.put(np.asarray(weight).swapaxes(1, 2)).mT if transposed else emulator.put(weight)
    held, sizes = emulator.put(rows), emulator.put(np.array(counts, np.int32))
    out = emulator.empty(num_rows, 40, dtype=torch.bfloat16)
    experts.grouped_matmul(held, laid, sizes, out)
    want, left = np.zeros((num_rows, 40)), np.asarray(rows, np.float64)[: len(owner)]
    want[: len(owner)] = np.einsum("rk,rkn->rn", left, np.asarray(weight, np.float64)[owner])
    oracle.same(array(out), want, **rounding(BF16))

    up = normal(2, num_rows, 40, dtype=BF16)
    grad = emulator.empty(*((4, 40, 72) if transposed else (4, 72, 40)), dtype=torch.bfloat16)
    experts.grouped_outer(held, emulator.put(up), sizes, grad.mT if transposed else grad)
    right, products = np.asarray(up, np.float64)[: len(owner)], np.zeros((4, 72, 40))
    np.add.at(products, owner, left[:, :, None] * right[:, None, :])
    oracle.same(array(grad.mT if transposed else grad), products, rtol=rounding(BF16)["rtol"], atol=1e-4)


WRONG = [(-2, 3, 3), (3, -20, 5), (-(2**31), 2**31 - 1, 1), (9, 9, 9), (2**30, 2**30, 7), (2**31 - 1,) * 3]


@pytest.mark.parametrize("counts", WRONG, ids=str)
def test_wrong_sizes_reach_no_other_memory(counts: tuple[int, ...], emulator: Emulator) -> None:
    """Whatever sizes say, the emulator meets no address outside, and every weight has some gradient."""
    held, up = (emulator.put(normal(i, 12, width, dtype=BF16)) for i, width in ((0, 40), (1, 48)))
    weight, sizes = emulator.put(normal(2, 3, 40, 48, dtype=BF16)), emulator.put(np.array(counts, np.int32))
    grad, slots = emulator.empty(3, 40, 48, dtype=torch.bfloat16), emulator.put(np.arange(12, dtype=np.int32))
    experts.grouped_matmul(held, weight, sizes, emulator.empty(12, 48, dtype=torch.bfloat16))
    hidden = emulator.empty(12, 24, dtype=torch.bfloat16)
    experts.gated_matmul(held, weight, sizes, "silu", hidden, slots=slots, num_slots=1)
    experts.grouped_outer(held, up, sizes, grad)
    assert not grad.isnan().any()


@pytest.mark.parametrize("last", [140, 2**30], ids=["", "more rows than there are"])
def test_products_in_parts(last: int, emulator: Emulator) -> None:
    """More tiles of an expert's rows than take turns together, in whole tiles of columns; programs that are too many.

    Of those, one that took itself for another column would write into the rows that follow.
    """
    counts = np.array([140, 0, 1, *[0] * 60, last], np.int32)  # tiles of 16 rows: 9 in parts of 5 and 4, none, 1, 9
    owner = np.repeat([0, 2, 63], [140, 1, 140])
    rows, weight = normal(0, len(owner), 16, dtype=BF16), normal(1, 64, 16, 256, dtype=BF16, scale=0.2)
    held, laid, sizes = emulator.put(rows), emulator.put(weight), emulator.put(counts)
    out, hidden = (emulator.empty(len(owner), width, dtype=torch.bfloat16) for width in (256, 128))
    experts.grouped_matmul(held, laid, sizes, out)
    experts.gated_matmul(held, laid, sizes, "silu", hidden)
    want = np.einsum("rk,rkn->rn", np.asarray(rows, np.float64), np.asarray(weight, np.float64)[owner])
    oracle.same(array(out), want, **rounding(BF16))
    gate, up = np.split(want, 2, axis=1)
    oracle.same(array(hidden), gate / (1 + np.exp(-gate)) * up, **rounding(BF16))


@pytest.mark.parametrize(
    "how", [{}, {"extra": 8}, {"extra": 3}, {"offset": 1}], ids=["", "strided", "odd stride", "shifted"]
)
def test_gated_matmul_gathers(how: dict[str, int], emulator: Emulator) -> None:
    """Tokens that the product gathers, in high tiles and low last ones, as if they had been dispatched."""
    ids = np.array([[0, 2]] * 60 + [[2, -1]] * 9 + [[3, 0]], np.int32)  # 61 rows, 0, 69 and 1, padded
    found = plan(emulator, PlanCase("", 4, align=4, tokens=70, ids=lambda t, s: ids))
    x, gate_up = normal(0, 70, 40, dtype=BF16), normal(1, 4, 40, 48, dtype=BF16, scale=0.2)
    weight, sizes = emulator.put(gate_up), emulator.put(found.group_sizes)
    slots = emulator.put(found.slots, how.get("offset", 0))
    results = []
    for held, more in (
        (emulator.put(x, **how), {"slots": slots, "num_slots": 2}),
        (emulator.put(np.where(found.slots[:, None] >= 0, np.asarray(x)[found.slots // 2], 0).astype(BF16)), {}),
    ):
        outs = [emulator.empty(len(found.slots), n, dtype=torch.bfloat16) for n in (24, 48)]
        experts.gated_matmul(held, weight, sizes, "silu", *outs, **more)
        results.append(outs)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert float(results[0][1].float().abs().max()) > 1


# The checks are worth something only if a wrong kernel fails them.
@pytest.mark.parametrize("damage", ["maximum", "order", "row", "mask"])
def test_a_wrong_kernel_is_noticed(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One instruction changed in what triton made."""
    import re

    edits: dict[str, Callable[[str], str]] = {
        "maximum": lambda text: text.replace("redux.sync.max", "redux.sync.min", 1),
        "order": lambda text: re.sub(r"\bmax\.s32(.*)", r"min.s32\1", text, count=1),
        "row": lambda text: re.sub(r"(\bmov\.u32\s+%r\d+, %)ctaid(\.x)", r"\1tid\2", text, count=1),
        "mask": lambda text: re.sub(r"@%p\d+ (st\.global)", r"\1", text, count=1),
    }
    made = Emulator()
    made.install("sm_90", monkeypatch)
    edited: list[bool] = []

    def edit(text: str) -> str:
        changed = edits[damage](text)
        edited.append(changed != text)
        return changed

    made.edit = edit
    with pytest.raises((AssertionError, Fault)):
        route(made, ROUTES[0])
    assert edited[0], "the instruction was there"
    forget()
