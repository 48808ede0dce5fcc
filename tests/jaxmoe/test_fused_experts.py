"""What lies behind routing as one function, with experts that are elsewhere and room for some rows alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import MoEParams, RoutingConfig
from jaxmoe.grouped_matmul import Groups
from jaxmoe.layer import weighted_experts
from kernels_pallas import grouped_matmul, grouped_matmul_grad
from tests import oracle
from tests.cases import BF16, normal
from tests.jaxmoe.test_moe import one_expert, params_for

I32 = jnp.int32
WIDTH, INNER = 16, 6
IDS = 9
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


@dataclass(frozen=True)
class Case:
    why: str
    here: tuple[int, ...] = tuple(range(IDS))  # the ids of the experts that are here, by local number
    tokens: int = 11
    slots: int = 3
    max_rows: int | None = None
    lowest: int = -1  # of the ids that are drawn; -1: dropped
    highest: int = IDS
    activation: str = "silu"


CASES = [
    Case("all experts, some pairs dropped"),
    Case("some experts, not in the order of their ids", (7, 2, 4)),
    Case("one expert", (3,)),
    Case("experts without tokens", (0, 1, 8), lowest=2, highest=7),
    Case("no tokens", (1, 2), tokens=0),
    Case("one token, one slot", (0, 7, 6), tokens=1, slots=1, lowest=0),
    Case("room for more than there is", (1, 4), max_rows=1000),
    Case("room for some rows", tuple(range(IDS)), max_rows=16),
    Case("room for some rows of some experts, rounded up", (8, 0, 5, 3), max_rows=3),
    Case("room for few rows of two experts", (2, 3), tokens=30, max_rows=8),
    Case("another activation", (6, 1, 3), activation="gelu"),
    Case("a third, room for some rows", (4, 0), max_rows=8, activation="gelu_tanh"),
]

SHOWN = (  # of the interpreted ones: the rest is left to CI
    "some experts, not in the order of their ids",
    "no tokens",
    "one token, one slot",
    "room for some rows of some experts, rounded up",
    "another activation",
)


def drawn(case: Case) -> tuple[jax.Array, ...]:
    """(x, ids, weights, gate_up, down of all experts, the gradient of the result)."""
    ids = np.random.default_rng(0).integers(case.lowest, case.highest, (case.tokens, case.slots))
    x, up = normal(1, case.tokens, WIDTH), normal(2, case.tokens, WIDTH)
    weights = normal(3, case.tokens, case.slots)
    gate_up, down = normal(4, IDS, WIDTH, 2 * INNER, scale=0.3), normal(5, IDS, INNER, WIDTH, scale=0.3)
    return x, jnp.asarray(ids, I32), weights, gate_up, down, up


def map_of(here: tuple[int, ...]) -> jax.Array:
    return jnp.full(IDS, -1, I32).at[jnp.array(here)].set(jnp.arange(len(here), dtype=I32))


def kept_pairs(case: Case, ids: jax.Array) -> np.ndarray:
    """Which (token, slot) pairs take part: of the experts here, by local number, the first `max_rows`, rounded up."""
    flat = np.asarray(ids).reshape(-1)
    local = [case.here.index(i) if i in case.here else -1 for i in flat]
    order = [pair for _, pair in sorted((e, pair) for pair, e in enumerate(local) if e >= 0)]
    keep = np.zeros(flat.size, bool)
    keep[order[: case.max_rows and -(-case.max_rows // 8) * 8]] = True
    return keep.reshape(ids.shape)


def by_formula(case: Case) -> np.ndarray:
    x, ids, weights, gate_up, down, _ = drawn(case)
    exact, want = np.asarray(x, np.float64), np.zeros((case.tokens, WIDTH))
    for t, slot in zip(*np.nonzero(kept_pairs(case, ids)), strict=True):
        e = int(ids[t, slot])
        want[t] += float(weights[t, slot]) * one_expert(exact[t], gate_up[e], down[e], case.activation)
    return want


def call(case: Case, implementation: str, **options: Any) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """(a function of x, weights, gate_up and down, these)."""
    x, ids, weights, gate_up, down, _ = drawn(case)
    here = jnp.array(case.here)
    run = lambda x, weights, gate_up, down: jaxmoe.fused_experts(
        x,
        ids,
        weights,
        gate_up,
        down,
        expert_map=map_of(case.here),
        max_rows=case.max_rows,
        activation=case.activation,
        implementation=implementation,
        **options,
    )
    return run, (x, weights, gate_up[here], down[here])


@pytest.mark.in_ci(case=lambda case: case.why not in SHOWN, implementation="interpret")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_fused_experts_against_the_formula(case: Case, implementation: str) -> None:
    """Rows behind the last group are NaN where nobody writes them, as the interpreter makes them, so nobody reads them.

    The gradients are those that JAX finds of plain products, one expert after another.
    """
    run, args = call(case, implementation)
    want = by_formula(case)
    got, pull = jax.vjp(run, *args)
    assert (got.shape, got.dtype) == ((case.tokens, WIDTH), jnp.float32)
    oracle.same(got, want, **TOLERANCE)
    if np.abs(want).max(initial=0) > 0:
        with pytest.raises(AssertionError):
            oracle.same(jnp.zeros_like(got), want, **TOLERANCE)

    _, ids, *_, up = drawn(case)
    kept, dot = kept_pairs(case, ids), functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

    def plainly(x: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        y = jnp.zeros_like(x)
        for local, expert in enumerate(case.here):
            gate, inner = jnp.split(dot(x, gate_up[local]), 2, axis=1)
            weight = jnp.sum(jnp.where(kept & (ids == expert), weights, 0.0), axis=1, keepdims=True)
            y = y + weight * dot(PLAIN[case.activation](gate) * inner, down[local])
        return y

    y, pull_plain = jax.vjp(plainly, *args)
    oracle.same(got, np.asarray(y, np.float64), **TOLERANCE)
    for found, exact in zip(pull(up), pull_plain(up), strict=True):
        oracle.same(found, np.asarray(exact, np.float64), **TOLERANCE)


@pytest.mark.parametrize("parts", [1, 3, 9])
def test_parts_add_up(parts: int, implementation: str) -> None:
    """Devices with a part of the experts each: results, and gradients of x and weights, are sums; others are slices."""
    whole = Case("")
    x, _, weights, *_, up = drawn(whole)
    want, pull = jax.vjp(*_flattened(call(whole, "xla")))
    grads = pull(up)
    total, sums, apart = np.zeros(want.shape), [np.zeros(x.shape), np.zeros(weights.shape)], []
    for part in np.split(np.arange(IDS), parts):
        y, pull = jax.vjp(*_flattened(call(Case("", tuple(map(int, part))), implementation)))
        dx, dweights, *stack = pull(up)
        total, sums = total + y, [sums[0] + dx, sums[1] + dweights]
        apart.append(stack)
    oracle.same(total.astype(np.float32), np.asarray(want, np.float64), **TOLERANCE)
    gots = [s.astype(np.float32) for s in sums] + [jnp.concatenate(of) for of in zip(*apart, strict=True)]
    for got, grad in zip(gots, grads, strict=True):
        oracle.same(got, np.asarray(grad, np.float64), **TOLERANCE)


def _flattened(made: tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]) -> list[Any]:
    return [made[0], *made[1]]


@pytest.mark.parametrize("align", [1, 4, 64])
def test_groups_that_are_filled_up(align: int, implementation: str) -> None:
    """Rows that fill groups up are zeros, those behind the last group are left: no gradient takes what lies there."""
    case = CASES[1]
    x, ids, weights, gate_up, down, up = drawn(case)
    here = jnp.array(case.here)
    plan = jaxmoe.plan_dispatch(
        ids, len(case.here), align=align, expert_map=map_of(case.here), implementation=implementation
    )
    groups = Groups(align, 9, clear=False)
    layer = lambda x, *rest: weighted_experts((implementation, "silu", groups), x, *plan, *rest, None)
    y, pull = jax.vjp(layer, x, weights, gate_up[here], down[here])
    want, pull_want = jax.vjp(*_flattened(call(case, "xla")))
    for got, exact in zip((y, *pull(up)), (want, *pull_want(up)), strict=True):
        oracle.same(got, np.asarray(exact, np.float64), **TOLERANCE)


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[11]], ids=lambda case: case.why)
def test_out_is_donated_and_filled(case: Case, implementation: str) -> None:
    run, args = call(case, implementation)
    want, out = run(*args), jnp.full((case.tokens, WIDTH), jnp.nan)
    address = out.unsafe_buffer_pointer()
    got = call(case, implementation, out=out)[0](*args)
    np.testing.assert_array_equal(got, want)
    assert out.is_deleted()
    assert got.unsafe_buffer_pointer() == address
    with pytest.raises(ValueError, match="out: expected a buffer to write to, got an array that has been donated"):
        call(case, implementation, out=out)[0](*args)


def test_out_that_is_read(implementation: str) -> None:
    """Of the same shape as what is written: refused before anything is deleted."""
    config, x = RoutingConfig(num_experts=7, top_k=3), normal(4, 7, WIDTH)
    params = params_for(config)
    with pytest.raises(ValueError, match="out: expected a buffer of its own, got an array that is also an input"):
        jaxmoe.moe(x, params, config, out=params.router, implementation=implementation)
    ids, weights = jnp.zeros((7, WIDTH), I32), normal(5, 7, WIDTH)
    stack = params.gate_up, params.down
    with pytest.raises(ValueError, match="out: expected a buffer of its own, got an array that is also an input"):
        jaxmoe.fused_experts(x, ids, weights, *stack, out=weights, implementation=implementation)
    assert not any(array.is_deleted() for array in (params.router, weights))


def test_out_of_the_layer(implementation: str) -> None:
    """With another activation, too, of which the shared experts are."""
    config = RoutingConfig(num_experts=8, top_k=3, n_shared_experts=1)
    params, x, out = params_for(config), normal(4, 7, WIDTH), jnp.full((7, WIDTH), jnp.nan)
    how = {"activation": "gelu", "implementation": implementation}
    address = out.unsafe_buffer_pointer()
    want, _ = jaxmoe.moe(x, params, config, **how)
    y, routing = jaxmoe.moe(x, params, config, out=out, **how)
    np.testing.assert_array_equal(y, want)
    assert out.is_deleted()
    assert y.unsafe_buffer_pointer() == address
    exact = np.zeros((7, WIDTH))
    for t, slot in np.ndindex(*routing.experts.shape):
        e = int(routing.experts[t, slot])
        result = one_expert(np.asarray(x[t], np.float64), params.gate_up[e], params.down[e], "gelu")
        exact[t] += float(routing.weights[t, slot]) * result
    oracle.same(y, exact, **TOLERANCE)


def test_second_derivative(implementation: str) -> None:
    """Through XLA: what nobody wrote reaches no second derivative either."""
    case = CASES[1]
    up = drawn(case)[-1]

    def second(implementation: str) -> Any:
        run, args = call(case, implementation)
        first = lambda *args: sum(
            jnp.sum(g**2) for g in jax.grad(lambda *a: jnp.sum(run(*a) * up), (0, 1, 2, 3))(*args)
        )
        return jax.grad(first, (0, 1, 2, 3))(*args)

    for got, want in zip(second(implementation), second("xla"), strict=True):
        assert jnp.isfinite(want).all()
        oracle.same(got, np.asarray(want, np.float64), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("max_rows", [None, 8])
def test_moe_with_experts_elsewhere(max_rows: int | None, implementation: str) -> None:
    """It routes among all ids, and counts all of the load; shared experts are ids like any other."""
    config = RoutingConfig(num_experts=8, top_k=3, n_group=4, topk_group=2, n_shared_experts=1)
    params, x = params_for(config), normal(4, 7, WIDTH)
    here = (8, 1, 6)
    part = MoEParams(
        router=params.router,
        bias=params.bias,
        gate_up=params.gate_up[jnp.array(here)],
        down=params.down[jnp.array(here)],
    )
    run = functools.partial(jaxmoe.moe, implementation=implementation)
    y, routing = jax.jit(lambda p, x: run(x, p, config, expert_map=map_of(here), max_rows=max_rows))(part, x)
    _, whole = jaxmoe.moe(x, params, config)
    for got, want in zip(routing, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    case = Case("", here, max_rows=max_rows)
    want, exact = np.zeros((7, WIDTH)), np.asarray(x, np.float64)
    for t, slot in zip(*np.nonzero(kept_pairs(case, routing.experts)), strict=True):
        e = int(routing.experts[t, slot])
        want[t] += float(routing.weights[t, slot]) * one_expert(exact[t], params.gate_up[e], params.down[e])
    oracle.same(y, want, **TOLERANCE)


def test_tiles_are_for_the_rows_that_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the ids are here, so a quarter of the pairs: tiles and steps are for so many rows an expert.

    Not for as many as there is room for, of which three in four are of nobody.
    """
    asked: list[int] = []
    for module in (grouped_matmul, grouped_matmul_grad):
        config_for = module.config_for

        def noted(num_rows: int, *args: Any, config_for: Any = config_for, **options: Any) -> Any:
            asked.append(num_rows)
            return config_for(num_rows, *args, **options)

        monkeypatch.setattr(module, "config_for", noted)
    ids, x = jnp.zeros((64, 2), I32), normal(0, 64, WIDTH, dtype=BF16)
    weights, here = jnp.ones((64, 2)), jnp.arange(8, dtype=I32) - 6
    gate_up, down = normal(1, 2, WIDTH, 2 * INNER, dtype=BF16), normal(2, 2, INNER, WIDTH, dtype=BF16)
    loss = lambda *args, **how: jnp.sum(jaxmoe.fused_experts(*args, **how, implementation="interpret"))
    grad = jax.grad(loss, argnums=(0, 3))
    trace = lambda **how: jax.eval_shape(functools.partial(grad, **how), x, ids, weights, gate_up, down)
    trace(expert_map=here)
    assert set(asked) == {32}
    asked.clear()
    trace(expert_map=here, max_rows=20)
    assert set(asked) == {24}
    asked.clear()
    trace()
    assert set(asked) == {128}


def test_nothing_that_nobody_wrote_is_kept_for_who_looks_for_nan(implementation: str) -> None:
    """jax_debug_nans looks at what the forward pass keeps, too."""
    run, args = call(CASES[1], implementation)
    with jax.debug_nans(True):
        got = jax.vjp(run, *args)[1](drawn(CASES[1])[-1])
    for g, want in zip(got, jax.vjp(run, *args)[1](drawn(CASES[1])[-1]), strict=True):
        np.testing.assert_array_equal(g, want)


TOKENS = jnp.zeros((11, WIDTH))


def wrong(**changed: Any) -> None:
    x, ids, weights, gate_up, down, _ = drawn(CASES[0])
    given = {"x": x, "experts": ids, "weights": weights, "gate_up": gate_up, "down": down}
    jaxmoe.fused_experts(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((11, 16), I32)}, r"x: expected bfloat16 or float16 or float32 \[T, H\], got int32"),
        ({"experts": jnp.zeros((10, 3), I32)}, r"experts: expected int32 \[11, S\], got int32\[10, 3\]"),
        ({"weights": jnp.zeros((11, 2))}, r"weights: expected .* \[11, 3\], got float32\[11, 2\]"),
        ({"gate_up": jnp.zeros((9, 15, 12))}, r"gate_up: expected float32 \[E, 16, 2 \* I\], got float32\[9, 15, 12\]"),
        ({"gate_up": jnp.zeros((0, 16, 12))}, r"gate_up: expected at least one element along axis 0"),
        ({"gate_up": jnp.zeros((2049, 16, 2))}, r"gate_up: expected at most 2048 experts, got 2049"),
        ({"gate_up": jnp.zeros((9, 16, 13))}, r"gate_up: expected an even last axis"),
        ({"down": jnp.zeros((8, 6, 16))}, r"down: expected float32 \[9, 6, 16\], got float32\[8, 6, 16\]"),
        ({"expert_map": [0, 1]}, r"expert_map: expected an array int32 \[ids\], got list"),
        ({"max_rows": 0}, r"max_rows: expected a positive int, got 0"),
        ({"max_rows": 2.5}, r"max_rows: expected a positive int, got 2.5"),
        ({"max_rows": True}, r"max_rows: expected a positive int, got True"),
        ({"implementation": "fast"}, r"implementation: expected None or one of"),
        ({"activation": "relu"}, r"activation: expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'"),
        ({"activation": None}, r"activation: expected one of .*, got None"),
        ({"out": jnp.zeros((11, 15))}, r"out: expected float32 \[11, 16\], got float32\[11, 15\]"),
        ({"out": jnp.zeros((11, 16), BF16)}, r"out: expected float32 \[11, 16\], got bfloat16\[11, 16\]"),
        ({"out": np.zeros((11, 16), np.float32)}, r"out: expected a jax.Array to write to, got ndarray"),
        ({"out": TOKENS, "x": TOKENS}, r"out: expected a buffer of its own, got an array that is also an input"),
    ],
)
def test_wrong_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(**changed)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"expert_map": jnp.zeros(8, I32)}, r"expert_map: expected int32 \[9\], got int32\[8\]"),
        ({}, {"max_rows": -1}, r"max_rows: expected a positive int, got -1"),
        (
            {"down": jnp.zeros((4, 6, 16))},
            {"expert_map": jnp.zeros(9, I32)},
            r"params.down: expected float32 \[9, 6, 16\]",
        ),
        ({}, {"activation": "relu"}, r"activation: expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'"),
        ({}, {"out": jnp.zeros((4, 16))}, r"out: expected float32 \[3, 16\], got float32\[4, 16\]"),
        ({}, {"out": np.zeros((3, 16), np.float32)}, r"out: expected a jax.Array to write to, got ndarray"),
        ({"gate_up": jnp.zeros((4, 16, 12))}, {}, r"params.gate_up: expected float32 \[9, 16, 2 \* I\]"),
    ],
)
def test_wrong_input_to_moe(changed: dict[str, Any], options: dict[str, Any], message: str) -> None:
    config = RoutingConfig(num_experts=8, top_k=3, n_shared_experts=1)
    params = params_for(config)
    for name, value in changed.items():
        setattr(params, name, value)
    with pytest.raises(ValueError, match=message):
        jaxmoe.moe(normal(0, 3, 16), params, config, **options)
