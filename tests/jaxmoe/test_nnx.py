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

import jaxmoe
from jaxmoe import RoutingConfig, SharedMLP
from jaxmoe.nnx import BalancingBias, Load, MoE
from tests import oracle
from tests.cases import BF16, F32, normal

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


def test_shared_experts_apart_are_those_fused() -> None:
    """scaling * routed + shared either way, whoever scales; padding stays zero."""
    fused = jaxmoe.MoEParams(
        router=normal(1, 6, HIDDEN),
        bias=normal(2, 6, scale=0.1),
        gate_up=normal(3, 7, HIDDEN, 2 * INNER),
        down=normal(4, 7, INNER, HIDDEN),
    )
    alone = dataclasses.replace(fused, gate_up=fused.gate_up[:6], down=fused.down[:6])
    shared = SharedMLP(gate_up=fused.gate_up[6], down=fused.down[6])
    want = np.asarray(jaxmoe.moe(ROWS, fused, CONFIG, num_valid_tokens=8)[0], np.float64)
    atol = 1e-5 * float(np.abs(want).max())
    for params, config, apart in ((fused, CONFIG, None), (alone, ALONE, shared)):
        for scale_weights in (True, False):
            config = dataclasses.replace(config, scale_weights=scale_weights)
            moe = MoE.from_params(params, config, shared=apart)
            y = np.asarray(moe(X, num_valid_tokens=8)[0]).reshape(10, HIDDEN)
            oracle.same(y, want, rtol=0, atol=atol)
            assert not y[8:].any()
            with pytest.raises(AssertionError):
                oracle.same(y / 2.5, want, rtol=0, atol=atol)


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


def test_initial_weights() -> None:
    """Rows of unit variance come out of each product with about unit variance."""
    moe = MoE(dataclasses.replace(CONFIG, num_experts=64), 64, 32, rngs=nnx.Rngs(0))
    for weight, inputs in ((moe.router[...], 64), (moe.gate_up[...], 64), (moe.down[...], 32)):
        np.testing.assert_allclose(np.std(weight), inputs**-0.5, rtol=0.05)
    assert not np.array_equal(moe.down[0], moe.down[1])


def test_wrong_input() -> None:
    moe = make(use_bias=False, track_load=False)
    params = make().params()
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
        (lambda: make()(normal(0, 3, 9)), r"params.router: expected .*\[6, 9\]"),
        (lambda: MoE.from_params({}, CONFIG), "params: expected MoEParams, got dict"),  # type: ignore[arg-type]
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
