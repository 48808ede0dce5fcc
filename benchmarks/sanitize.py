"""Runs every kernel on small, ragged shapes, forward and backward: the program to put under compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe


def main() -> int:
    """Returns 0 where every result also agrees with the reference."""
    config = jaxmoe.RoutingConfig(
        num_experts=72, top_k=5, n_group=9, topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5
    )
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    tokens, width = 37, 100
    x = normal(0, tokens, width).astype(jnp.bfloat16)
    router, bias = normal(1, 72, width), normal(2, 72) * 0.1

    def layer(x: jax.Array, router: jax.Array, implementation: str) -> tuple[jax.Array, object]:
        logits = jaxmoe.router_logits(x, router, implementation=implementation)
        routing = jaxmoe.route(logits, bias, config=config, num_valid_tokens=35, implementation=implementation)
        plan = jaxmoe.plan_dispatch(routing.experts, config.num_expert_ids, align=4, implementation=implementation)
        rows = jaxmoe.dispatch(x, plan, implementation=implementation)
        y = jaxmoe.combine(rows, plan, routing.weights, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2), (routing, plan, rows)

    results = {
        name: jax.value_and_grad(layer, argnums=(0, 1), has_aux=True)(x, router, name) for name in ("pallas", "xla")
    }
    for a, b in zip(*(jax.tree.leaves(r) for r in results.values()), strict=True):
        exact = jnp.issubdtype(a.dtype, jnp.integer)
        tolerance = 0.0 if exact else 2e-2
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)
    print("every kernel ran, and agrees with the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
