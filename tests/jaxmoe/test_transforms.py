"""vmap around what is hard to batch, second derivatives, a mesh of explicit axes, and strict promotion."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import Columns, RoutingConfig
from kernels_pallas.targets import TARGETS
from tests import oracle
from tests.cases import F32, normal
from tests.check_dispatch import check_combine, check_dispatch
from tests.check_route import check_route

I32 = jnp.int32
BATCH, TOKENS, EXPERTS = 3, 5, 12
CONFIG = RoutingConfig(num_experts=EXPERTS, top_k=3, n_group=4, topk_group=2)
LOGITS, BIAS = normal(0, BATCH, TOKENS, EXPERTS), normal(1, EXPERTS) * 0.1
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 4, (BATCH, TOKENS, 2)), I32)


def one(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], tree)


def check_routes(got: Any, logits: jax.Array, valid: list[int] | None = None) -> None:
    for i in range(BATCH):
        check_route(one(got, i), logits[i], BIAS, CONFIG, valid=valid[i] if valid else None)


def test_vmap_of_num_valid_tokens(implementation: str) -> None:
    route = functools.partial(jaxmoe.route, config=CONFIG, implementation=implementation)
    valid = [2, 5, 0]
    got = jax.vmap(lambda x, n: route(x, BIAS, num_valid_tokens=n))(LOGITS, jnp.array(valid, I32))
    check_routes(got, LOGITS, valid)
    shared = jax.vmap(lambda x, n: route(x, BIAS, num_valid_tokens=n), in_axes=(0, None))(LOGITS, jnp.int32(4))
    check_routes(shared, LOGITS, [4] * BATCH)


def test_vmap_of_grad(implementation: str) -> None:
    """Each example's gradient, as it is without vmap."""
    plans = jax.vmap(lambda ids: jaxmoe.plan_dispatch(ids, 4, implementation="xla"))(IDS)
    x, weight, up = normal(2, BATCH, TOKENS, 16), normal(3, EXPERTS, 16), normal(4, BATCH, TOKENS, 16)

    def loss(x: jax.Array, weight: jax.Array, plan: Any, up: jax.Array, implementation: str) -> jax.Array:
        on = {"implementation": implementation}
        weights = jaxmoe.route(jaxmoe.router_logits(x, weight, **on), BIAS, config=CONFIG, **on).weights[:, :2]
        return jnp.sum(jaxmoe.combine(jnp.sin(jaxmoe.dispatch(x, plan, **on)), plan, weights, **on) * up)

    grad = jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1))
    dx, dweight = jax.vmap(grad, in_axes=(0, None, 0, 0))(x, weight, plans, up)
    reference = jax.grad(functools.partial(loss, implementation="xla"), argnums=(0, 1))
    for i in range(BATCH):
        want = reference(x[i], weight, one(plans, i), up[i])
        assert all(float(jnp.abs(w).max()) > 0.01 for w in want)
        oracle.same(dx[i], np.asarray(want[0], np.float64), rtol=1e-4, atol=1e-5)
        oracle.same(dweight[i], np.asarray(want[1], np.float64), rtol=1e-4, atol=1e-5)


def test_vmap_with_columns(implementation: str) -> None:
    """The batch axis is put before the rows of the wider array."""
    on = {"implementation": implementation}
    wide = normal(2, BATCH, TOKENS, 20).at[:, :, :4].set(jnp.nan).at[:, :, 16:].set(jnp.nan)
    view, inner = Columns(wide, 4, EXPERTS), wide[:, :, 4:16]
    check_routes(jax.vmap(lambda x: jaxmoe.route(x, BIAS, config=CONFIG, **on))(view), inner)

    weight = normal(3, 6, EXPERTS)
    logits = jax.vmap(lambda x: jaxmoe.router_logits(x, weight, **on))(view)
    oracle.same(logits, np.asarray(inner, np.float64) @ np.asarray(weight, np.float64).T, rtol=1e-5, atol=1e-5)

    plans = jax.vmap(lambda ids: jaxmoe.plan_dispatch(ids, 4, implementation="xla"))(IDS)
    rows = jax.vmap(lambda x, plan: jaxmoe.dispatch(x, plan, **on))(view, plans)
    tall, weights = normal(4, *plans.slots.shape, 20).at[:, :, :4].set(jnp.nan), normal(5, *IDS.shape)
    y = jax.vmap(lambda r, plan, w: jaxmoe.combine(Columns(r, 4, 16), plan, w, **on))(tall, plans, weights)
    for i in range(BATCH):
        check_dispatch(rows[i], inner[i], one(plans, i))
        check_combine(y[i], tall[i, :, 4:], one(plans, i), weights[i])


def test_vmap_with_out_under_jit(implementation: str) -> None:
    """Each example fills its own part of the buffers; nothing of what was in them is left."""
    on = {"implementation": implementation}
    out = jaxmoe.Routing(
        jnp.full((BATCH, TOKENS, 3), jnp.nan, F32),
        jnp.full((BATCH, TOKENS, 3), -7, I32),
        jnp.full((BATCH, EXPERTS), -7, I32),
    )
    check_routes(jax.jit(jax.vmap(lambda x, o: jaxmoe.route(x, BIAS, config=CONFIG, out=o, **on)))(LOGITS, out), LOGITS)

    plans = jax.vmap(lambda ids: jaxmoe.plan_dispatch(ids, 4, implementation="xla"))(IDS)
    x, weights = normal(2, BATCH, TOKENS, 16), normal(3, *IDS.shape)
    spoiled = lambda *shape: jnp.full(shape, jnp.nan, F32)
    dispatch = jax.jit(jax.vmap(lambda x, plan, o: jaxmoe.dispatch(x, plan, out=o, **on)))
    rows = dispatch(x, plans, spoiled(*plans.slots.shape, 16))
    combine = jax.jit(jax.vmap(lambda r, plan, w, o: jaxmoe.combine(r, plan, w, out=o, **on)))
    y = combine(rows, plans, weights, spoiled(*x.shape))
    for i in range(BATCH):
        check_dispatch(rows[i], x[i], one(plans, i))
        check_combine(y[i], rows[i], one(plans, i), weights[i])


MOE = RoutingConfig(num_experts=4, top_k=2)


def moe_inputs() -> tuple[jaxmoe.MoEParams, jax.Array]:
    params = jaxmoe.MoEParams(router=normal(0, 4, 8), gate_up=normal(1, 4, 8, 6), down=normal(2, 4, 3, 8))
    return params, normal(3, TOKENS, 8)


def stated_moe(params: jaxmoe.MoEParams, x: jax.Array) -> jax.Array:
    """The layer without anything of jaxmoe."""
    score = jax.nn.sigmoid(x @ params.router.T)
    ids = jnp.argsort(-score, axis=1)[:, :2]
    weights = jnp.take_along_axis(score, ids, axis=1)
    gate, up = jnp.split(jnp.einsum("th,tkhi->tki", x, params.gate_up[ids]), 2, axis=2)
    y = jnp.einsum("tki,tkih->tkh", jax.nn.silu(gate) * up, params.down[ids])
    return jnp.sum(y * (weights / jnp.sum(weights, axis=1, keepdims=True))[:, :, None], axis=1)


@pytest.mark.in_ci(implementation="interpret")
def test_second_derivatives(implementation: str) -> None:
    """The norm of a gradient has a gradient, in each argument, as plain jnp has it."""
    given = moe_inputs()
    layer = lambda params, x: jaxmoe.moe(x, params, MOE, implementation=implementation)[0]

    def penalty(run: Any) -> Any:
        gradients = jax.grad(lambda *args: jnp.sum(jnp.sin(run(*args))), argnums=(0, 1))
        return lambda *args: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients(*args)))

    got, want = (jax.jit(jax.grad(penalty(run), argnums=(0, 1)))(*given) for run in (layer, stated_moe))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
        assert float(jnp.abs(b).max()) > 1.0


@pytest.mark.in_ci(implementation="interpret")
def test_derivatives_of_what_writes_to_a_given_buffer(implementation: str) -> None:
    """Second ones too, and around `jax.checkpoint` in a jit: what is written over is not kept for them."""
    (params, x), on = moe_inputs(), {"implementation": implementation}
    plan = jaxmoe.plan_dispatch(jnp.array([[0, 1], [3, 3], [2, 0]], I32), 4, implementation="xla")
    few, rows, weights = normal(4, 3, 8), normal(5, 6, 8), normal(6, 3, 2)
    logits, config = normal(7, 3, 4), RoutingConfig(num_experts=4, top_k=2)
    buffers = jnp.zeros((3, 2)), jnp.zeros((3, 2), I32), jnp.zeros(4, I32)
    calls: list[tuple[Any, jax.Array, Any]] = [
        (lambda x, out: jaxmoe.dispatch(x, plan, out=out, **on), few, jnp.zeros((6, 8))),
        (lambda x, out: jaxmoe.combine(x, plan, weights, out=out, **on), rows, jnp.zeros((3, 8))),
        (lambda x, out: jaxmoe.moe(x, params, MOE, out=out, **on)[0], x, jnp.zeros_like(x)),
        (lambda x, out: jaxmoe.route(x, config=config, out=out, **on).weights, logits, buffers),
    ]
    for run, given, buffer in calls:
        out = lambda buffer=buffer: jax.tree.map(jnp.copy, buffer)
        loss = lambda x, out, run=run: jnp.sum(jnp.sin(run(x, out)))
        first = lambda x, out, loss=loss: jnp.sum(jax.grad(loss)(x, out) ** 2)
        checkpointed = jax.jit(jax.grad(jax.checkpoint(loss)))
        for derivative in (jax.grad(loss), jax.grad(first), checkpointed):
            wanted = derivative(given, None)
            np.testing.assert_allclose(derivative(given, out()), wanted, rtol=1e-5, atol=1e-6)
            assert wanted.any()


def test_second_derivatives_of_products(implementation: str) -> None:
    """Of both operands, either layout: an empty group, and rows behind the last."""
    rows, weight, sizes = normal(0, 6, 4), normal(1, 3, 4, 5), jnp.array([2, 0, 3], I32)
    used, expert = (jnp.arange(6) < 5)[:, None], jnp.array([0, 0, 2, 2, 2, 0])
    stated = lambda rows, weight: jnp.where(used, jnp.einsum("mk,mkn->mn", rows, weight[expert]), 0.0)
    on = {"implementation": implementation}
    straight = lambda rows, weight: jaxmoe.grouped_matmul(rows, weight, sizes, **on)
    turned = lambda rows, weight: jaxmoe.grouped_matmul(rows, weight.mT, sizes, transposed=True, **on)

    def second(run: Any) -> Any:
        first = jax.grad(lambda *args: jnp.sum(jnp.sin(run(*args))), argnums=(0, 1))
        return jax.grad(lambda *args: sum(jnp.sum(g**2) for g in first(*args)), argnums=(0, 1))(rows, weight)

    want = second(stated)
    for run in (straight, turned):
        for a, b in zip(second(run), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _every(implementation: str | None, params: jaxmoe.MoEParams, x: jax.Array) -> Any:
    """A layer, and one of its parts."""
    on = {"implementation": implementation}
    y, routing = jaxmoe.moe(x, params, MOE, **on)
    plan = jaxmoe.plan_dispatch(routing.experts, 4, align=2, **on)
    rows = jaxmoe.dispatch(x, plan, **on)
    rows = jaxmoe.experts(rows, params.gate_up, params.down, plan.group_sizes, **on)
    return y, routing, jaxmoe.combine(rows, plan, routing.weights, **on)


def test_under_a_mesh_of_explicit_axes(implementation: str) -> None:
    """As jax.make_mesh makes them: nothing is sharded, so nothing is different."""
    if implementation == "interpret":
        pytest.skip("Pallas' interpreter mixes arrays of such a mesh with others")
    given, every = moe_inputs(), functools.partial(_every, implementation)
    loss = lambda params, x: jnp.sum(every(params, x)[0] * every(params, x)[2])
    run = lambda: (jax.jit(every)(*given), jax.jit(jax.grad(loss))(*given), every(*given))
    want = run()
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        got = run()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, strict=True)


def test_arrays_sharded_over_explicit_axes_are_named() -> None:
    """The first try at expert parallelism, for one."""
    params, x = moe_inputs()
    routing = jaxmoe.route(normal(0, 5, 4), config=MOE)
    mlp = jaxmoe.SharedMLP(gate_up=normal(1, 8, 6), down=normal(2, 3, 8))
    mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = lambda array: jax.device_put(array, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("ep")))
    with jax.set_mesh(mesh):
        for name in ("router", "gate_up", "down"):
            sharded = dataclasses.replace(params, **{name: split(getattr(params, name))})
            with pytest.raises(ValueError, match=rf"params\.{name}: expected an array that is not sharded"):
                jaxmoe.moe(x, sharded, MOE)
        losses = (jaxmoe.switch_loss, functools.partial(jaxmoe.sequence_balance_loss, sequence_length=5))
        for loss in losses:
            loss(normal(0, 5, 4), routing, MOE)
            with pytest.raises(ValueError, match="logits: expected an array that is not sharded"):
                loss(split(normal(0, 5, 4)), routing, MOE)
            with pytest.raises(ValueError, match=r"routing\.experts: expected an array that is not sharded"):
                loss(normal(0, 5, 4), routing._replace(experts=split(routing.experts)), MOE)
        np.testing.assert_array_equal(mlp(split(x)), mlp(x))  # plain jnp, which knows shardings


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_lowers_for_gpus_under_a_mesh_of_explicit_axes(target: str) -> None:
    """Pallas' Triton backend drops an axis of what a kernel adds up, but not of its sharding, where types have one."""
    kind, platform = TARGETS[target].device_kind, TARGETS[target].platform
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=None)
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=explicit, abstract_device=device)
    shapes = jax.tree.map(np.asarray, moe_inputs())  # of arrays, jax would ask where they lie
    loss = lambda params, x: sum(jnp.sum(y * y) for y in _every(None, params, x)[::2])
    with jax.sharding.use_abstract_mesh(mesh):
        for function in (functools.partial(_every, None), jax.grad(loss, argnums=(0, 1))):
            text = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
            assert {"route", "plan_dispatch", "dispatch", "combine"} <= set(re.findall(r'name = "(\w+)"', text))


@pytest.mark.in_ci(names=lambda names: len(names) < 2, implementation="interpret")
@pytest.mark.parametrize("names", [(), ("moe_gate_up",), ("moe_logits",), ("moe_gate_up", "moe_logits")])
def test_what_checkpoint_policies_can_keep(
    names: tuple[str, ...], implementation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names that `moe` and `experts` give; the gradients are the same whatever is kept."""
    (params, x), on = moe_inputs(), {"implementation": implementation}
    keeping = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    rows, pairs = ({"moe_gate_up": f"[{m},6]", "moe_logits": "[5,4]"} for m in (10, 5))

    def kept(function: Any) -> set[str]:
        """The shapes of what is kept beside the arguments, and the sizes."""
        jax.ad_checkpoint.print_saved_residuals(keeping(function), params, x)
        lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
        return {line.removeprefix("f32").partition(" ")[0] for line in lines if line.startswith("f32")}

    layer = lambda params, x: jaxmoe.moe(x, params, MOE, **on)[0]
    assert kept(layer) == {rows[name] for name in names}
    sizes = jnp.array([2, 0, 3, 0], I32)
    assert kept(lambda params, x: jaxmoe.experts(x, params.gate_up, params.down, sizes, **on)) == {
        pairs[name] for name in names if name == "moe_gate_up"
    }
    gradient = lambda f: jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2), argnums=(0, 1)))(params, x)
    for a, b in zip(*(jax.tree.leaves(gradient(f)) for f in (layer, keeping(layer))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_strict_promotion(implementation: str) -> None:
    """Users who forbid jax to promote dtypes and ranks by itself can still call this."""
    params, x = moe_inputs()
    mixed = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    mixed = dataclasses.replace(mixed, router=params.router, bias=jnp.zeros(4))
    config = RoutingConfig(num_experts=4, top_k=1, n_group=2, topk_group=1)
    layer = lambda: jaxmoe.moe(x.astype(jnp.bfloat16), mixed, config, implementation=implementation)[0]
    want = layer()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for wide in (False, True):
            with jax.enable_x64(wide):
                jax.clear_caches()  # or nothing is traced again
                np.testing.assert_array_equal(layer().astype(F32), want.astype(F32))
