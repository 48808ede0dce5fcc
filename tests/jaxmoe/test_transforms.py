"""vmap around what is hard to batch: counts of valid tokens, gradients, strided rows, buffers to write into."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe import Columns, RoutingConfig
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
