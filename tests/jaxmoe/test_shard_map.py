"""Under shard_map, on two devices that XLA makes of one CPU: each device routes its own tokens."""

from __future__ import annotations

from tests.devices import run_on_cpus

PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import jaxmoe
from tests.cases import normal
from tests.jaxmoe.test_moe import CONFIG, params_for

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
params, x, up = params_for(CONFIG), normal(4, 10, 16), normal(5, 10, 16)


def layer(implementation, params, x):
    y, routing = jaxmoe.moe(x, params, CONFIG, implementation=implementation)
    return y, jax.lax.psum(routing.load, "data")


def run(implementation, check_vma):
    local = functools.partial(layer, implementation)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()), check_vma=check_vma
    )
    y, load = jax.jit(sharded)(params, x)
    grads = jax.jit(jax.grad(lambda p, x: jnp.sum(sharded(p, x)[0] * up), argnums=(0, 1)))(params, x)
    return y, load, grads


y, routing = jaxmoe.moe(x, params, CONFIG)
grads = jax.grad(lambda p, x: jnp.sum(jaxmoe.moe(x, p, CONFIG)[0] * up), argnums=(0, 1))(params, x)
for implementation, check_vma in ((None, True), (None, False), ("interpret", False)):
    got_y, got_load, got_grads = run(implementation, check_vma)
    np.testing.assert_array_equal(got_load, routing.load)
    np.testing.assert_allclose(got_y, y, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    print("agrees:", implementation, check_vma)

# What is the same on all devices (x) next to what is not (the plan): each device moves the same tokens elsewhere.
experts = jnp.asarray(np.random.default_rng(0).integers(0, 3, (10, 2)), jnp.int32)
x, up = normal(6, 5, 16), normal(7, 20, 16)


def moved(x, experts, max_rows=None):
    return jaxmoe.dispatch(x, jaxmoe.plan_dispatch(experts, 3, max_rows=max_rows))


sharded = jax.shard_map(moved, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
apart = lambda x: jnp.concatenate([moved(x, experts[:5]), moved(x, experts[5:])])
np.testing.assert_array_equal(jax.jit(sharded)(x, experts), apart(x))
got = jax.jit(jax.grad(lambda x: jnp.sum(sharded(x, experts) * up)))(x)
np.testing.assert_allclose(got, jax.grad(lambda x: jnp.sum(apart(x) * up))(x), rtol=1e-5, atol=1e-5)
cut = functools.partial(moved, max_rows=6)
sharded = jax.shard_map(cut, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
parts = [moved(x, part)[:6] for part in (experts[:5], experts[5:])]
np.testing.assert_array_equal(jax.jit(sharded)(x, experts), jnp.concatenate(parts))
print("agrees: the same next to what varies")

# A mesh whose axes are explicit, as make_mesh makes them: under shard_map, and what is sharded outside it.
mesh = jax.make_mesh((2,), ("data",))
with jax.set_mesh(mesh):
    sharded = jax.shard_map(moved, in_specs=(P(), P("data")), out_specs=P("data"))
    apiece = jax.device_put(experts, jax.NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(sharded)(x, apiece), apart(x))
    held = jax.device_put(normal(7, 10, 4), jax.NamedSharding(mesh, P("data")))
    try:
        jaxmoe.route(held, config=jaxmoe.RoutingConfig(num_experts=4, top_k=2))
    except ValueError as error:
        print("agrees:", error)
    stack = jax.device_put(normal(8, 4, 4, 2), jax.NamedSharding(mesh, P("data")))
    try:
        jaxmoe.fused_experts(normal(7, 10, 4), experts, jnp.ones((10, 2)), stack, normal(9, 4, 1, 4))
    except ValueError as error:
        print("agrees:", error)
    # One axis by hand, the other left explicit.
mesh = jax.make_mesh((2, 1), ("data", "model"))
with jax.set_mesh(mesh):
    sharded = jax.shard_map(moved, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"})
    apiece = jax.device_put(experts, jax.NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(sharded)(x, apiece), apart(x))
    print("agrees: explicit")
"""


def test_shard_map() -> None:
    """With shard_map's own checks and without; the interpreter of Pallas itself runs only without them."""
    printed = run_on_cpus(2, PROGRAM)
    assert printed.count("agrees:") == 7
    assert "gate_up: expected an array that is not sharded over the mesh's explicit axes ('data',)" in printed
    assert "logits: expected an array that is not sharded over the mesh's explicit axes ('data',)" in printed
