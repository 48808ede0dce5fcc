"""Routing, on the reference and on the interpreted kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmoe
from jaxmoe import RoutingConfig
from tests import cases, oracle
from tests.cases import CASES, IDS, SMALL, normal
from tests.check_route import check_route
from tests.devices import run_on_cpus


@pytest.mark.in_ci(case=lambda case: case.why in cases.INTERPRETED_IN_CI, implementation="interpret")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_route(case: cases.Case, implementation: str, tokens: int | None) -> None:
    if implementation == "interpret" and case.why in cases.SLOW_INTERPRETED:
        tokens = 1
    logits, bias = case.inputs(tokens)
    got = jaxmoe.route(logits, bias, config=case.config, implementation=implementation)
    decided = check_route(got, logits, bias, case.config)
    assert decided >= 0.8, "the case says too little about ids"


def test_checks_reject_wrong_results(implementation: str) -> None:
    """Zeros, swapped experts, a dropped bias, unscaled weights, a wrong load: each is caught."""
    case = next(c for c in CASES if c.config is SMALL and c.bias is not None and c.logits is None and c.tokens > 1)
    logits, bias = case.inputs()
    got = jaxmoe.route(logits, bias, config=SMALL, implementation=implementation)
    wrong = {
        "zero weights": got._replace(weights=jnp.zeros_like(got.weights)),
        "zero ids": got._replace(experts=jnp.zeros_like(got.experts)),
        "swapped experts": got._replace(experts=got.experts[:, jnp.array([1, 0, 2, 3])]),
        "swapped weights": got._replace(weights=got.weights[:, jnp.array([1, 0, 2, 3])]),
        "weights off by 1e-5": got._replace(weights=got.weights * (1 + 1e-5)),
        "another load": got._replace(load=got.load.at[0].add(1)),
        "no bias": jaxmoe.route(logits, config=SMALL, implementation=implementation),
        "shifted ids": got._replace(experts=got.experts + 1),
    }
    for name, result in wrong.items():
        with pytest.raises(AssertionError):
            check_route(result, logits, bias, SMALL)
            pytest.fail(f"not caught: {name}", pytrace=False)


@pytest.mark.parametrize("shift", [-20.0, -17.0])
def test_choices_that_float32_makes_equal(shift: float, implementation: str) -> None:
    """A bias of 12 swallows scores of 1e-9 to 1e-7: ties by index, though scores and float64 sums differ."""
    config = RoutingConfig(num_experts=24, top_k=4, n_group=4, topk_group=2)
    logits = shift + 0.5 * normal(1, 5, 24)
    got = jaxmoe.route(logits, jnp.full(24, 12.0), config=config, implementation=implementation)
    np.testing.assert_array_equal(got.experts, np.tile(np.arange(4), (5, 1)))


def test_sums_that_overflow_float32(implementation: str) -> None:
    """Groups whose two best add up to infinity tie: the lower ones stay. (In float64, the oracle's, they do not.)"""
    config = RoutingConfig(num_experts=24, top_k=4, n_group=4, topk_group=2)
    bias = jnp.asarray(np.random.default_rng(18).uniform(0, 3e38, 24), jnp.float32)
    got = jaxmoe.route(normal(1, 3, 24), bias, config=config, implementation=implementation)
    best = np.argsort(-np.asarray(bias, np.float64)[:12], kind="stable")[:4]
    np.testing.assert_array_equal(got.experts, np.tile(best, (3, 1)))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("valid", [0, 1, 4, 6])
def test_num_valid_tokens(valid: int, on_device: bool, implementation: str) -> None:
    config = RoutingConfig(num_experts=12, top_k=3, n_shared_experts=1)
    logits = cases.spoiled(0, 6, 12) if valid == 4 else normal(0, 6, 12)  # padding is often NaN
    count = jnp.int32(valid) if on_device else valid
    got = jaxmoe.route(logits, config=config, num_valid_tokens=count, implementation=implementation)
    check_route(got, logits, None, config, valid=valid)


def test_num_valid_tokens_of_numpy_and_under_x64() -> None:
    """numpy's integers are integers, and under x64 a Python int that jit has made an array of 64 bits."""
    logits, route = normal(0, 6, 12), functools.partial(jaxmoe.route, config=RoutingConfig(num_experts=12, top_k=3))
    want = route(logits, num_valid_tokens=4).experts
    np.testing.assert_array_equal(route(logits, num_valid_tokens=np.ones(4, np.int64).sum()).experts, want)
    with jax.enable_x64(True):
        got = jax.jit(lambda number: route(logits, num_valid_tokens=number).experts)(4)
        np.testing.assert_array_equal(got, want)
        many = jax.jit(lambda number: route(logits, num_valid_tokens=number).experts)(2**32 + 1)
        np.testing.assert_array_equal(many, route(logits).experts)
        with pytest.raises(ValueError, match=r"num_valid_tokens: expected int32 \[\], got int64\[\]"):
            route(logits, num_valid_tokens=jnp.int64(4))


def test_strided_rows_read_in_place(implementation: str) -> None:
    """FlashInfer #4713: strided logits were read as if contiguous."""
    wide = normal(0, 5, 40).at[:, :8].set(jnp.nan).at[:, 32:].set(jnp.nan)
    view = jaxmoe.Columns(wide, first=8, width=24)
    got = jaxmoe.route(view, normal(1, 24), config=SMALL, implementation=implementation)
    check_route(got, wide[:, 8:32], normal(1, 24), SMALL)


def test_a_token_alone_or_in_a_batch(implementation: str) -> None:
    logits, bias = normal(0, 7, 24), normal(1, 24)
    route = functools.partial(jaxmoe.route, config=SMALL, implementation=implementation, return_load=False)
    whole = route(logits, bias)
    for token in range(7):
        alone = route(logits[token : token + 1], bias)
        np.testing.assert_array_equal(alone.weights[0].view(np.int32), whole.weights[token].view(np.int32))
        np.testing.assert_array_equal(alone.experts[0], whole.experts[token])


def test_without_load(implementation: str) -> None:
    logits = normal(0, 3, 24)
    got = jaxmoe.route(logits, config=SMALL, return_load=False, implementation=implementation)
    assert got.load is None
    check_route(got, logits, None, SMALL)


def test_out_is_donated_and_filled(implementation: str) -> None:
    logits, bias = normal(0, 5, 24), normal(1, 24)
    out = jaxmoe.Routing(
        jnp.full((5, 4), jnp.nan, jnp.float32), jnp.full((5, 4), -7, jnp.int32), jnp.full((24,), -7, jnp.int32)
    )
    addresses = [o.unsafe_buffer_pointer() for o in out]
    got = jaxmoe.route(logits, bias, config=SMALL, out=out, implementation=implementation)
    check_route(got, logits, bias, SMALL)
    assert all(o.is_deleted() for o in out)
    assert [g.unsafe_buffer_pointer() for g in got] == addresses


def test_vmap_and_jit(implementation: str) -> None:
    logits, bias = normal(0, 3, 4, 24), normal(1, 24)
    route = functools.partial(jaxmoe.route, config=SMALL, implementation=implementation)
    mapped = jax.jit(jax.vmap(route, in_axes=(0, None)))(logits, bias)
    for i in range(3):
        one = route(logits[i], bias)
        for a, b in zip(mapped, one, strict=True):
            np.testing.assert_array_equal(a[i], b)


def dense_weights(x: jax.Array, ids: jax.Array, config: RoutingConfig) -> jax.Array:
    """The weights as a textbook would write them, for autodiff."""
    score = {
        "sigmoid": jax.nn.sigmoid,
        "softmax": functools.partial(jax.nn.softmax, axis=1),
        "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    }[config.scoring_func](x)
    chosen = jnp.take_along_axis(score, ids, axis=1)
    if config.renormalize:
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    return chosen * config.routed_scaling_factor


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient(scoring_func: str, renormalize: bool, implementation: str) -> None:
    config = RoutingConfig(
        num_experts=12, top_k=3, scoring_func=scoring_func, renormalize=renormalize, routed_scaling_factor=2.5,
        n_shared_experts=1,
    )  # fmt: skip
    logits, bias, upstream = normal(0, 4, 12).at[3].set(jnp.nan), normal(1, 12) * 0.1, normal(2, 4, 4)

    def loss(logits: jax.Array, bias: jax.Array) -> jax.Array:
        got = jaxmoe.route(logits, bias, config=config, num_valid_tokens=3, implementation=implementation)
        return jnp.sum(got.weights * upstream)

    dlogits, dbias = jax.grad(loss, argnums=(0, 1))(logits, bias)
    ids = jaxmoe.route(logits, bias, config=config, implementation="xla").experts[:3, :3]
    want = jax.grad(lambda x: jnp.sum(dense_weights(x, ids, config) * upstream[:3, :3]))(logits[:3])
    oracle.same(dlogits[:3], np.asarray(want, np.float64), rtol=2e-5, atol=1e-6)
    assert float(jnp.abs(want).max()) > 0.01
    assert not dlogits[3].any(), "a token past num_valid_tokens"
    assert not dbias.any()
    with pytest.raises(AssertionError):
        oracle.same(jnp.zeros_like(want), np.asarray(want, np.float64), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_gradient_where_scores_underflow(scoring_func: str, renormalize: bool, implementation: str) -> None:
    """Finite where the scores are 0, next to an expert that is masked with -inf; exact where weights are ratios."""
    config = RoutingConfig(num_experts=9, top_k=4, scoring_func=scoring_func, renormalize=renormalize)
    logits = jnp.full((1, 9), -250.0, jnp.float32).at[0, 8].set(-jnp.inf)
    loss = lambda x: jnp.sum(jaxmoe.route(x, config=config, implementation=implementation).weights[:, 0])
    got = jax.grad(loss)(logits)[0]
    assert jnp.isfinite(got).all()
    if renormalize:
        slope = 0.5 if scoring_func == "sqrtsoftplus" else 1.0
        oracle.same(got[:4], slope * np.array([3, -1, -1, -1]) / 16, rtol=1e-5)


def test_gradient_reaches_a_view(implementation: str) -> None:
    wide, config = normal(0, 3, 20), RoutingConfig(num_experts=12, top_k=3)
    route = functools.partial(jaxmoe.route, config=config, implementation=implementation)
    upstream = normal(1, 3, 3)
    got = jax.grad(lambda w: jnp.sum(route(jaxmoe.Columns(w, 4, 12)).weights * upstream))(wide)
    want = jax.grad(lambda x: jnp.sum(route(x).weights * upstream))(wide[:, 4:16])
    np.testing.assert_array_equal(got[:, 4:16], want)
    assert not got[:, :4].any()
    assert not got[:, 16:].any()


def test_under_x64(implementation: str) -> None:
    """64-bit mode must not widen an index or a count."""
    with jax.enable_x64(True):
        logits = normal(0, 3, 24)
        check_route(jaxmoe.route(logits, config=SMALL, implementation=implementation), logits, None, SMALL)


@st.composite
def routings(draw: st.DrawFn) -> tuple[RoutingConfig, int, int, bool, str]:
    size, n_group = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    topk_group = draw(st.integers(1, n_group))
    config = RoutingConfig(
        num_experts=size * n_group,
        top_k=draw(st.integers(1, min(6, topk_group * size))),
        n_group=n_group,
        topk_group=topk_group,
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax", "sqrtsoftplus"])),
        group_score=draw(st.sampled_from([None, "top2", "max"])),
        renormalize=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        scale_weights=draw(st.booleans()),
        n_shared_experts=draw(st.integers(0, 2)),
        shared_expert_replicas=draw(st.integers(1, 3)),
    )
    return (
        config,
        draw(st.integers(0, 2**31)),
        draw(st.integers(1, 5)),
        draw(st.booleans()),
        draw(st.sampled_from(["normal", "coarse", "spoiled"])),
    )


@pytest.mark.in_ci(implementation="interpret")  # each of its configs is compiled
@settings(
    max_examples=cases.EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(routings())
def test_any_config_against_the_oracle(implementation: str, problem: tuple[RoutingConfig, int, int, bool, str]) -> None:
    config, seed, tokens, with_bias, kind = problem
    x = {
        "normal": lambda: normal(seed, tokens, config.num_experts, scale=3.0),
        "coarse": lambda: jnp.round(normal(seed, tokens, config.num_experts) * 2) / 2,
        "spoiled": lambda: cases.spoiled(seed, tokens, config.num_experts),
    }[kind]()
    bias = normal(seed + 1, config.num_experts, scale=0.3) if with_bias else None
    check_route(jaxmoe.route(x, bias, config=config, implementation=implementation), x, bias, config)


def bad(**changes: object) -> dict[str, object]:
    return {"logits": normal(0, 3, 24), "bias": normal(1, 24), "config": SMALL, **changes}


I32 = jnp.int32
OUT = (jnp.zeros((3, 4)), jnp.zeros((3, 4), I32), jnp.zeros(24, I32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(logits=normal(0, 3, 25)), r"logits: expected .*\[T, 24\], got float32\[3, 25\]"),
        (bad(logits=normal(0, 24)), r"logits: expected .*, got float32\[24\]"),
        (bad(logits=jnp.zeros((3, 24), I32)), r"logits: expected bfloat16 or float16 or float32"),
        (bad(logits=None), r"logits: expected an array .*, got NoneType"),
        (bad(logits=jaxmoe.Columns(normal(0, 3, 30), 10, 24)), r"logits: expected columns inside float32\[3, 30\]"),
        (bad(bias=normal(0, 23)), r"bias: expected .*\[24\], got float32\[23\]"),
        (bad(bias=jnp.zeros(24, I32)), r"bias: expected bfloat16 or float16 or float32 \[24\], got int32\[24\]"),
        (bad(config="deepseek-v3"), r"config: expected a RoutingConfig, got str"),
        (bad(return_load="no"), r"return_load: expected a bool, got 'no'"),
        (bad(num_valid_tokens=4), r"num_valid_tokens: expected 0 to T=3, got 4"),
        (bad(num_valid_tokens=-1), r"num_valid_tokens: expected 0 to T=3, got -1"),
        (bad(num_valid_tokens=np.int64(4)), r"num_valid_tokens: expected 0 to T=3, got 4"),
        (bad(num_valid_tokens=jnp.zeros(3, I32)), r"num_valid_tokens: expected int32 \[\], got int32\[3\]"),
        (bad(num_valid_tokens=2.0), r"num_valid_tokens: expected an array int32 \[\], got float"),
        (bad(out=jnp.zeros((3, 4))), r"out: expected a Routing or tuple \(weights, experts, load\)"),
        (bad(out=(*OUT[:2], None)), r"out: expected a Routing or tuple \(weights, experts, load\)"),
        (bad(out=(jnp.zeros((3, 5)), *OUT[1:])), r"out.weights: expected float32 \[3, 4\], got float32\[3, 5\]"),
        (bad(out=(OUT[0], OUT[0], OUT[2])), r"out.experts: expected int32 \[3, 4\], got float32\[3, 4\]"),
        (bad(out=(*OUT[:2], jnp.zeros(25, I32))), r"out.load: expected int32 \[24\], got int32\[25\]"),
        (bad(implementation="cuda"), r"implementation: expected None or one of .*, got 'cuda'"),
        (bad(implementation="pallas"), r"implementation: 'pallas' needs arrays on a GPU, got one on cpu"),
    ],
)
def test_wrong_input(arguments: dict[str, object], message: str) -> None:
    if "pallas" in message and jax.default_backend() == "gpu":
        pytest.skip("the arrays lie on a GPU here")
    arguments = dict(arguments)
    logits, bias = arguments.pop("logits"), arguments.pop("bias")
    with pytest.raises(ValueError, match=message):
        jaxmoe.route(logits, bias, **arguments)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(OUT)), "nothing is written or donated"


def test_out_must_not_be_an_input() -> None:
    config = RoutingConfig(num_experts=4, top_k=4)
    logits = normal(0, 3, 4)
    with pytest.raises(ValueError, match="out: expected a buffer of its own"):
        jaxmoe.route(logits, config=config, out=(logits, jnp.zeros((3, 4), I32), jnp.zeros(4, I32)))


def test_pallas_under_jit_on_the_cpu_is_an_error() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("needs a machine whose default device is the CPU")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        jax.jit(functools.partial(jaxmoe.route, config=SMALL, implementation="pallas"))(normal(0, 3, 24))


MAX = 2**31 - 1


@pytest.mark.parametrize(
    "load",
    [
        [2**30, 2**30, 2**30, 0],  # of 2**31 pairs and more
        [MAX, MAX, 0],
        [MAX] * 13,
        [MAX] * 13 + [MAX - 1],
        [MAX - 1] * 255 + [MAX],
        [MAX, *range(4, 258)],
        [4, 1, 1],
        [2, 1, 1, 0],  # the mean is a load
        [2**30 + 1, 2**30, 2**30, 2**30 - 1],
        [MAX],
        [0] * 7,
    ],
)
@pytest.mark.parametrize("x64", [False, True])
def test_update_bias_at_any_load(load: list[int], x64: bool) -> None:
    """Against Python's integers, which do not overflow."""
    want = [(sum(load) > n * len(load)) - (sum(load) < n * len(load)) for n in load]
    with jax.enable_x64(x64):
        got = jaxmoe.update_bias(jnp.zeros(len(load), jnp.float32), jnp.array([*load, MAX], I32), rate=1.0)
    assert (got.dtype, got.tolist()) == (jnp.float32, want)


@pytest.mark.parametrize("experts", [3, 60, 896, 1024])
def test_update_bias_at_drawn_loads(experts: int) -> None:
    """Near their mean and its ties, up to what int32 holds."""
    draw = np.random.default_rng(experts)
    for middle in (5, 2**21, 2**30, MAX - 8):
        load = middle + draw.integers(-4, 5, experts)
        want = np.sign(load.sum() - experts * load)  # in int64
        got = jaxmoe.update_bias(jnp.zeros(experts), jnp.asarray(load, I32), rate=1.0)
        np.testing.assert_array_equal(got, want)
        assert len(set(want.tolist())) > 1


def test_update_bias_on_two_devices() -> None:
    """A rate that lies elsewhere is named, as are bias and load."""
    program = """if True:
        import jax, jax.numpy as jnp, jaxmoe
        here, there = jax.devices()
        arrays = {"bias": jnp.zeros(3), "load": jnp.arange(3, dtype=jnp.int32), "rate": jnp.float32(0.5)}
        for name in ("load", "rate"):
            placed = {key: jax.device_put(array, there if key == name else here) for key, array in arrays.items()}
            try:
                jaxmoe.update_bias(placed["bias"], placed["load"], rate=placed["rate"])
            except ValueError as error:
                print(str(error).replace(str(here), "here").replace(str(there), "there"))
        print(jaxmoe.update_bias(**arrays).tolist())
    """
    printed = run_on_cpus(2, program)
    named = [f"{name}: expected the device of bias, here, got there" for name in ("load", "rate")]
    assert printed.splitlines() == [*named, "[0.5, 0.0, -0.5]"]
