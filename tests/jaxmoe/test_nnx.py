"""jaxmoe.nnx.MoE: the same numbers as jaxmoe.moe, under the transforms of Flax NNX and of JAX."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError

import jaxmoe
from jaxmoe import RoutingConfig, SharedMLP
from jaxmoe.nnx import BalancingBias, GatedMLP, Load, MoE
from tests import oracle
from tests.cases import BF16, F32, normal

I32 = jnp.int32
HIDDEN, INNER = 8, 6
CONFIG = RoutingConfig(num_experts=6, top_k=2, routed_scaling_factor=2.5, n_shared_experts=1)
ALONE = dataclasses.replace(CONFIG, n_shared_experts=0)
X = normal(0, 2, 5, HIDDEN)
ROWS = np.asarray(X).reshape(10, HIDDEN)


def make(config: RoutingConfig = CONFIG, **options: Any) -> MoE:
    return MoE(config, HIDDEN, INNER, **options, rngs=nnx.Rngs(0))


def loss_of(moe: MoE, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(moe(x)[0]))


def test_the_module_is_the_function() -> None:
    """The load is kept, in the shape that the routing has."""
    moe = make()
    y, routing = moe(X)
    want, chosen = jaxmoe.moe(ROWS, moe.params(), CONFIG)
    np.testing.assert_array_equal(y, want.reshape(X.shape))
    assert np.abs(want).max() > 0.1
    np.testing.assert_array_equal(routing.experts, chosen.experts)
    assert chosen.load is not None
    np.testing.assert_array_equal(moe.load[...], chosen.load)
    assert int(moe.load[...].sum()) == 10 * 3
    np.testing.assert_allclose(moe.logits(X), ROWS @ np.asarray(moe.router[...]).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_shared_experts_apart_are_those_fused(activation: str) -> None:
    """scaling * routed + shared either way, whoever scales; padding stays zero."""
    fused = jaxmoe.MoEParams(
        router=normal(1, 6, HIDDEN),
        bias=normal(2, 6, scale=0.1),
        gate_up=normal(3, 7, HIDDEN, 2 * INNER),
        down=normal(4, 7, INNER, HIDDEN),
    )
    alone = dataclasses.replace(fused, gate_up=fused.gate_up[:6], down=fused.down[:6])
    shared = SharedMLP(gate_up=fused.gate_up[6], down=fused.down[6], activation=activation)
    layer = functools.partial(jaxmoe.moe, ROWS, fused, CONFIG, num_valid_tokens=8)
    want = np.asarray(layer(activation=activation)[0], np.float64)
    atol = 1e-5 * float(np.abs(want).max())
    for params, config, apart in ((fused, CONFIG, None), (alone, ALONE, shared)):
        for scale_weights in (True, False):
            config = dataclasses.replace(config, scale_weights=scale_weights)
            moe = MoE.from_params(params, config, shared=apart, activation=activation)
            y = np.asarray(moe(X, num_valid_tokens=8)[0]).reshape(10, HIDDEN)
            oracle.same(y, want, rtol=0, atol=atol)
            assert not y[8:].any()
            with pytest.raises(AssertionError):
                oracle.same(y / 2.5, want, rtol=0, atol=atol)
    with pytest.raises(AssertionError):
        oracle.same(np.asarray(layer(activation="gelu")[0]), want, rtol=0, atol=atol)


def test_activation_of_all_experts() -> None:
    moe = make(ALONE, shared_intermediate_size=5, activation="gelu")
    assert moe.shared is not None
    shared = moe.shared.params()
    assert shared.activation == "gelu"
    want, _ = jaxmoe.moe(ROWS, moe.params(), ALONE, activation="gelu")
    np.testing.assert_allclose(moe(X)[0].reshape(10, HIDDEN), want + shared(ROWS), rtol=1e-5, atol=1e-6)


def module() -> MoE:
    return make(ALONE, shared_intermediate_size=5, track_load=False)


@functools.cache
def gradients() -> Any:
    """Of every nnx.Param of `module()`, by jax.grad, without rematerialisation."""
    graph, params, rest = nnx.split(module(), nnx.Param, ...)
    return nnx.to_pure_dict(jax.jit(jax.grad(lambda params: loss_of(nnx.merge(graph, params, rest), X)))(params))


def assert_gradients(got: Any) -> None:
    want = gradients()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert len(jax.tree.leaves(want)) == 5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        oracle.same(a, np.asarray(b, np.float64), rtol=1e-4, atol=1e-5)
        assert np.abs(b).max() > 1e-3


def test_training_moves_the_parameters_and_not_the_bias() -> None:
    """Under nnx.jit, nnx.grad and nnx.remat, which carry the load; an optimiser of nnx.Param leaves the bias alone."""
    moe = make(ALONE, shared_intermediate_size=5)
    optimizer = nnx.Optimizer(moe, optax.sgd(1.0), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(moe, nnx.Param))

    @nnx.jit
    def step(moe: MoE, optimizer: nnx.Optimizer[MoE], x: jax.Array) -> None:
        optimizer.update(moe, nnx.grad(nnx.remat(loss_of))(moe, x))
        moe.update_bias(rate=0.5)

    step(moe, optimizer, X)
    after = nnx.to_pure_dict(nnx.state(moe, nnx.Param))
    assert_gradients(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after))
    load = np.asarray(moe.load[...])
    assert load.sum() == 10 * 2
    assert moe.bias is not None
    moved = 0.5 * np.sign(20 - 6 * load)
    np.testing.assert_array_equal(moe.bias[...], moved)
    moe.update_bias(jnp.array([9, 0, 0, 0, 0, 0], jnp.int32), rate=1.0)
    np.testing.assert_array_equal(moe.bias[...], moved + np.array([-1, 1, 1, 1, 1, 1]))
    assert {type(v) for _, v in nnx.iter_graph(moe) if isinstance(v, nnx.Variable)} >= {nnx.Param, BalancingBias, Load}


def test_checkpoint_around_the_call() -> None:
    """jax.checkpoint over a closure: for a module that keeps no load, and so changes nothing."""
    graph, params, rest = nnx.split(module(), nnx.Param, ...)

    @jax.jit
    @jax.grad
    def grad(params: nnx.State) -> jax.Array:
        moe = nnx.merge(graph, params, rest)
        return jax.checkpoint(lambda x: loss_of(moe, x))(X)

    assert_gradients(nnx.to_pure_dict(grad(params)))


def test_dtypes() -> None:
    """Parameters in one dtype, computing in another; bias and load keep theirs."""
    moe = make(ALONE, dtype=BF16, param_dtype=F32, shared_intermediate_size=5)
    y, routing = nnx.eval_shape(lambda moe, x: moe(x), moe, X)
    assert (y.shape, y.dtype, routing.weights.dtype) == (X.shape, BF16, F32)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(moe, nnx.Param))} == {jnp.dtype(F32)}
    small = nnx.eval_shape(lambda: make(param_dtype=BF16))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(small, nnx.Param))} == {jnp.dtype(BF16)}
    assert small.bias is not None
    assert (small.bias.dtype, small.load.dtype) == (F32, jnp.int32)
    assert moe.params(BF16).down.dtype == BF16
    assert nnx.eval_shape(lambda moe, x: moe(x), small, X)[0].dtype == F32  # as x


def numpy_params(dtype: Any = F32) -> tuple[jaxmoe.MoEParams, SharedMLP]:
    """Of ALONE, with shared experts apart of width 5; NumPy arrays."""
    array = lambda seed, *shape: np.array(normal(seed, *shape)).astype(dtype)
    params = jaxmoe.MoEParams(
        router=array(1, 6, HIDDEN),
        bias=array(2, 6),
        gate_up=array(3, 6, HIDDEN, 2 * INNER),
        down=array(4, 6, INNER, HIDDEN),
    )
    return params, SharedMLP(gate_up=array(5, HIDDEN, 10), down=array(6, 5, HIDDEN))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_numpy_arrays_are_copied(dtype: Any) -> None:
    """Whoever writes, the other keeps what it had; read-only arrays do too, and every dtype stays."""
    params, shared = numpy_params(dtype)
    given = jax.tree.leaves((params, shared))
    want = [array.copy() for array in given]

    def held(moe: MoE) -> list[Any]:
        assert moe.shared is not None
        return jax.tree.leaves((moe.params(), moe.shared.params()))

    moe = MoE.from_params(params, ALONE, shared=shared)
    assert not any(np.shares_memory(a, b) for a, b in zip(held(moe), given, strict=True))
    moe.update_bias(jnp.array([9, 0, 0, 0, 0, 0], jnp.int32), rate=1.0)
    for array, before in zip(given, want, strict=True):
        np.testing.assert_array_equal(array, before)
        array.flags.writeable = False
    again = MoE.from_params(params, ALONE, shared=shared)
    again.update_bias(jnp.array([9, 0, 0, 0, 0, 0], jnp.int32), rate=1.0)
    assert moe.bias is not None
    np.testing.assert_array_equal(held(again)[1], moe.bias[...])
    assert np.abs(np.asarray(moe.bias[...] - params.bias, np.float32)).min() > 0.5
    for array in given:
        array.flags.writeable = True
        array[...] = 0
    for name, got, before in zip(("router", "bias", *"1234"), held(moe), want, strict=True):
        assert (type(got), got.dtype) == (type(moe.load[...]), before.dtype)
        if name != "bias":
            np.testing.assert_array_equal(got, before)


def test_padding_reaches_no_gradient_but_the_routers() -> None:
    """NaN in the padding's x, and in what comes back to it: the other weights learn as from padding of zeros."""
    moe = module()
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(params: nnx.State, x: jax.Array, up: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params, rest)(x, num_valid_tokens=7)[0] * up)

    up = normal(1, 10, HIDDEN)
    want, want_dx = grads(params, jnp.asarray(ROWS).at[7:].set(0), up.at[7:].set(0))
    got, dx = grads(params, jnp.asarray(ROWS).at[7:].set(jnp.nan), up.at[7:].set(jnp.nan))
    np.testing.assert_array_equal(dx, want_dx)
    for name in ("gate_up", "down"):
        for of, expected in ((got[name], want[name]), (got["shared"][name], want["shared"][name])):
            np.testing.assert_array_equal(of[...], expected[...])
            assert np.abs(expected[...]).max() > 0.01


def test_where_the_load_cannot_be_kept() -> None:
    """As the docstring says, for each: what Flax says to it, and that track_load=False helps."""
    call = lambda moe, x: moe(x)[0]
    for transformed, error, message in (
        (lambda moe: jax.jit(lambda x: moe(x)[0])(X), TraceContextError, "Cannot mutate Load"),
        (lambda moe: jax.checkpoint(lambda x: moe(x)[0])(X), TraceContextError, "Cannot mutate Load"),
        (lambda moe: nnx.jit(lambda x: moe(x)[0])(X), TraceContextError, "Cannot mutate Load"),
        (lambda moe: nnx.vmap(call, in_axes=(None, 0))(moe, X), ValueError, "load.*got axis spec None"),
    ):
        with pytest.raises(error, match=message):
            transformed(make())
        moe = make(track_load=False)
        np.testing.assert_allclose(transformed(moe), moe(X)[0], rtol=1e-5, atol=1e-6)
    moe = make()
    jax.jit(call)(moe, X)
    assert not moe.load[...].any()
    nnx.jit(call)(moe, X)
    assert moe.load[...].sum() == 10 * 3


def test_load_of_one_device() -> None:
    """Under shard_map it is refused to be kept as that of all; an axis that the module itself lies along is fine."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    specs: dict[str, Any] = {"mesh": mesh, "in_specs": (replicated, split), "out_specs": split}
    run = nnx.shard_map(lambda moe, x: moe(x)[0], **specs)
    message = r"track_load: expected False under shard_map over \['data'\], where the load is that of one device"
    with pytest.raises(ValueError, match=message):
        run(make(), X)
    moe = make(track_load=False)
    np.testing.assert_allclose(run(moe, X), moe(X)[0], rtol=1e-5, atol=1e-6)

    moe = make()
    own = nnx.shard_map(lambda moe, x: moe(x)[0], **specs | {"in_specs": (split, split)})
    want = jax.lax.map(lambda x: x, moe(X)[0])
    loads = moe.load[...]
    moe.load[...] = jnp.zeros_like(loads)
    np.testing.assert_allclose(own(moe, X), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(moe.load[...], loads)


def test_parts_under_expert_parallelism() -> None:
    """A module with a part of the experts, as shard_map makes them: the parts add up, the load is that of all ids."""
    whole = make()
    want, routing = whole(X)
    total = jnp.zeros(X.shape)
    for first, count in ((0, 3), (3, 3), (6, 1)):  # the last has the shared expert
        part = nnx.clone(whole)
        part.gate_up = nnx.Param(whole.gate_up[...][first : first + count])
        part.down = nnx.Param(whole.down[...][first : first + count])
        local = jnp.arange(7, dtype=I32) - first
        here = jnp.where((local >= 0) & (local < count), local, -1)
        y, found = part(X, expert_map=here)
        total = total + y
        np.testing.assert_array_equal(found.load, routing.load)
    oracle.same(total, np.asarray(want, np.float64), rtol=1e-5, atol=1e-5)
    assert jnp.abs(want - y).max() > 0.1
    few, _ = part(X, expert_map=here, max_rows=8)  # of ten rows of the shared expert
    np.testing.assert_allclose(few.reshape(10, -1)[:8], y.reshape(10, -1)[:8], rtol=1e-5, atol=1e-6)
    assert not few.reshape(10, -1)[8:].any()


def test_initialisers() -> None:
    """They are called as Flax's are, and what they say of sharding stays with the parameter."""
    asked = []

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any, value: float = 0.0) -> jax.Array:
        asked.append((shape, dtype))
        return jnp.full(shape, value, dtype)

    first, second, third = (functools.partial(init, value=value) for value in (1.0, 2.0, 3.0))
    moe = make(router_init=first, gate_up_init=second, down_init=third, param_dtype=BF16)
    assert asked == [((6, HIDDEN), BF16), ((7, HIDDEN, 2 * INNER), BF16), ((7, INNER, HIDDEN), BF16)]
    assert [float(w[...].mean()) for w in (moe.router, moe.gate_up, moe.down)] == [1.0, 2.0, 3.0]
    names = ("expert", "embed", "mlp")
    with jax.set_mesh(jax.make_mesh((1, 1, 1), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)):
        moe = make(gate_up_init=nnx.with_partitioning(init, names))
        assert moe.gate_up[...].sharding.spec == jax.sharding.PartitionSpec(*names)
        assert np.isfinite(moe(X)[0]).all()
    mlp = GatedMLP(HIDDEN, 4, gate_up_init=second, down_init=third, rngs=nnx.Rngs(0))
    assert [float(w[...].mean()) for w in (mlp.gate_up, mlp.down)] == [2.0, 3.0]
    assert [shape for shape, _ in asked[-2:]] == [(HIDDEN, 8), (4, HIDDEN)]
    moe = make(ALONE, shared_intermediate_size=4)
    moe.shared = mlp
    assert np.isfinite(moe(X)[0]).all()


def test_initial_weights() -> None:
    """Rows of unit variance come out of each product with about unit variance."""
    moe = MoE(dataclasses.replace(CONFIG, num_experts=64), 64, 32, rngs=nnx.Rngs(0))
    assert moe.router.shape == (64, 64)
    for weight, inputs in ((moe.router[...], 64), (moe.gate_up[...], 64), (moe.down[...], 32)):
        np.testing.assert_allclose(np.std(weight), inputs**-0.5, rtol=0.05)
    assert not np.array_equal(moe.down[0], moe.down[1])


def test_wrong_input() -> None:
    moe = make(use_bias=False, track_load=False)
    params, (alone, shared) = make().params(), numpy_params()
    from_params: Any = MoE.from_params
    for call, message in (
        (lambda: make(dict), "config: expected a RoutingConfig, got type"),
        (
            lambda: make(dataclasses.replace(CONFIG, shared_expert_replicas=2)),
            "shared_expert_replicas: expected 1, got 2",
        ),
        (
            lambda: make(shared_intermediate_size=4),
            "shared_intermediate_size: expected None next to n_shared_experts=1",
        ),
        (lambda: make(ALONE, shared_intermediate_size=0), "shared_intermediate_size: expected a positive int, got 0"),
        (lambda: MoE(CONFIG, 0, 4, rngs=nnx.Rngs(0)), "hidden_size: expected a positive int, got 0"),
        (lambda: MoE(CONFIG, 4, 4.0, rngs=nnx.Rngs(0)), "intermediate_size: expected a positive int, got 4.0"),  # type: ignore[arg-type]
        (lambda: moe.update_bias(rate=0.1), "update_bias: expected a module with use_bias=True"),
        (lambda: make(track_load=False).update_bias(rate=0.1), "load: expected an array where track_load=False"),
        (lambda: make(implementation="cuda"), "implementation: expected None or one of .*, got 'cuda'"),
        (lambda: make(activation="relu"), r"activation: expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'"),
        (
            lambda: GatedMLP(8, 4, activation="relu", rngs=nnx.Rngs(0)),
            r"activation: expected one of \('silu', 'gelu', 'gelu_tanh'\), got 'relu'",
        ),
        (
            lambda: dataclasses.replace(make(ALONE, shared_intermediate_size=4).shared.params(), activation=7)(ROWS),  # type: ignore[union-attr]
            "activation: expected one of .*, got 7",
        ),
        (
            lambda: from_params(alone, ALONE, shared=shared, activation="gelu"),
            "shared.activation: expected activation='gelu', got 'silu'",
        ),
        (lambda: make(use_bias="no"), "use_bias: expected a bool, got 'no'"),
        (lambda: make(track_load=1), "track_load: expected a bool, got 1"),
        (lambda: make(dtype="foo"), "dtype: expected None, bfloat16, float16 or float32, got 'foo'"),
        (lambda: make(param_dtype=jnp.int32), "param_dtype: expected None, bfloat16, .*, got int32"),
        (lambda: make()(normal(0, 3, 9)), r"x: expected an array \[..., 8\], got float32\[3, 9\]"),
        (lambda: make()(normal(0, 3, 0)), r"x: expected an array \[..., 8\], got float32\[3, 0\]"),
        (lambda: make()(jnp.float32(1)), r"x: expected an array \[..., 8\], got float32\[\]"),
        (lambda: make()([[0.0] * 8]), r"x: expected an array \[..., 8\], got list"),  # type: ignore[arg-type]
        *(
            (
                lambda x=x: make(dtype=F32)(x),  # type: ignore[misc]
                f"x: expected bfloat16, float16, float32 or float64, got {x.dtype}",
            )
            for x in (jnp.ones((2, 8), dtype) for dtype in (I32, bool, jnp.complex64, jnp.float8_e4m3fn))
        ),
        (lambda: make().logits(normal(0, 9)), r"x: expected an array \[..., 8\], got float32\[9\]"),
        (lambda: from_params({}, CONFIG), "params: expected MoEParams, got dict"),
        (lambda: from_params(alone, ALONE, shared=(1, 2)), "shared: expected None or a SharedMLP, got tuple"),
        (
            lambda: from_params(alone, ALONE, shared=SharedMLP(gate_up=shared.gate_up, down=shared.down.tolist())),  # type: ignore[arg-type]
            r"shared.down: expected an array .* \[W, 8\], got list",
        ),
        (
            lambda: from_params(dataclasses.replace(alone, gate_up=alone.gate_up[..., 1:]), ALONE),
            "params.gate_up: expected an even last axis, gate and up side by side, got 11",
        ),
        (lambda: from_params(*numpy_params(np.float64)[:1], ALONE), "params.gate_up: expected .*, got float64"),
        (lambda: MoE.from_params(params, ALONE), r"params.gate_up: expected .*\[6, 8, 12\], got float32\[7, 8, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_flax_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import jaxmoe` does not need it; jaxmoe.nnx says what is missing."""
    code = "import sys; sys.modules['flax'] = None; import jaxmoe"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "jaxmoe.nnx")
    with pytest.raises(ImportError, match=r"jaxmoe.nnx needs flax: pip install"):
        importlib.import_module("jaxmoe.nnx")
