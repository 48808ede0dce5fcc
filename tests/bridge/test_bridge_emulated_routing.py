"""Kernels of routing and of the router's logits in the emulator (tests/emulator/native.py)."""

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
from bridge.native import dispatch, routing
from jaxmoe import Routing, RoutingConfig, presets
from kernels_pallas import route as route_kernels
from tests import oracle
from tests.cases import BF16, F16, F32, Case, coarse, normal, spoiled
from tests.cases import CASES as ROUTES
from tests.check_dispatch import check_combine, rounding
from tests.check_plan import PlanCase
from tests.check_route import check_route
from tests.emulator.memory import Fault
from tests.emulator.native import ALL, FLOAT32, INT32, Emulator, array, forget, plan, some
from tests.jaxmoe.test_route import routings

pytest.importorskip("triton")


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


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient_of_routing(scoring_func: str, emulator: Emulator) -> None:
    config = RoutingConfig(num_experts=40, top_k=5, scoring_func=scoring_func, n_shared_experts=1)
    case = Case("", config, bias=None)
    found, (x, _) = route(emulator, case), case.inputs()
    grad = normal(5, *found.weights.shape)
    _, pull = jax.vjp(lambda x: jaxmoe.route(x, config=config, implementation="xla").weights, x)
    got = routing.route_backward(emulator.put(grad), emulator.put(x), emulator.put(found.experts), config.json)
    oracle.same(got.numpy(), np.asarray(pull(grad)[0], np.float64), rtol=2e-5, atol=1e-6)


# Tokens, width, dtypes and, where not 40, experts.
LOGITS: dict[str, tuple[Any, ...]] = {
    "one token": (1, 328, BF16, BF16),
    "one token, mixed": (1, 328, BF16, F32),
    "three tokens, plain products": (3, 4104, BF16, F32),
    "slices": (5, 1032, BF16, BF16),
    "parts, in slices": (5, 520, BF16, F32),
    "parts of the tokens": (9, 520, F32, BF16),
    "large tiles": (140, 200, F16, F16),
    "more than 64 experts: slices of two steps and of one": (140, 1800, BF16, BF16, 200),
    "large tiles of parts": (140, 136, BF16, F32),
    "odd width": (70, 77, BF16, F32),
    "float32": (6, 136, F32, F32),
}


@pytest.mark.parametrize("name", LOGITS)
def test_router_logits(name: str, emulator: Emulator) -> None:
    """Every tile and way to multiply; float32 operands as exactly as float32 products are."""
    tokens, width, *dtypes, experts = LOGITS[name] if len(LOGITS[name]) == 5 else (*LOGITS[name], 40)
    x, weight = normal(0, tokens, width, dtype=dtypes[0]), normal(1, experts, width, dtype=dtypes[1])
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
