"""Runs every kernel on small, ragged shapes, forward and backward: the program to put under compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe

CONFIG = jaxmoe.RoutingConfig(
    num_experts=72, top_k=5, n_group=9, topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5
)
WIDTH, INNER = 100, 36


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def step(tokens: int, implementation: str) -> Any:
    """The layer of parts, padded to 4 rows, with the gradients of tokens and router."""
    x, router, bias = _normal(0, tokens, WIDTH).astype(jnp.bfloat16), _normal(1, 72, WIDTH), _normal(2, 72) * 0.1

    def loss(x: jax.Array, router: jax.Array) -> tuple[jax.Array, Any]:
        logits = jaxmoe.router_logits(x, router, implementation=implementation)
        valid = max(tokens - 2, 1)
        routing = jaxmoe.route(logits, bias, config=CONFIG, num_valid_tokens=valid, implementation=implementation)
        plan = jaxmoe.plan_dispatch(routing.experts, CONFIG.num_expert_ids, align=4, implementation=implementation)
        rows = jaxmoe.dispatch(x, plan, implementation=implementation)
        y = jaxmoe.combine(rows, plan, routing.weights, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2), (routing, plan, rows)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, router)


def layer(tokens: int, implementation: str) -> Any:
    """The whole layer, experts included, with the gradients of tokens and weights."""
    ids, bf16 = CONFIG.num_expert_ids, jnp.bfloat16
    gate_up, down = _normal(3, ids, WIDTH, 2 * INNER).astype(bf16) / 10, _normal(4, ids, INNER, WIDTH).astype(bf16) / 6
    router, bias = _normal(1, 72, WIDTH), _normal(2, 72) * 0.1

    def loss(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        params = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)
        y, _ = jaxmoe.moe(x, params, CONFIG, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(_normal(0, tokens, WIDTH).astype(bf16), gate_up, down)


def router_gradients() -> None:
    """The router's gradients as kernels, which torch alone takes."""
    import torch

    import bridge

    x = torch.randn(37, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(72, WIDTH, device="cuda", requires_grad=True)
    got = torch.autograd.grad(bridge.router_logits(x, weight).square().sum(), (x, weight))
    want = torch.autograd.grad((x.float() @ weight.T).square().sum(), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-1)


def main() -> int:
    """Returns 0 where every result also agrees with the reference."""
    # One token, few, and so many that router_logits and the plan take other kernels.
    for run, tokens in ((step, 1), (step, 3), (step, 37), (step, 300), (layer, 37)):
        results = [run(tokens, implementation) for implementation in ("pallas", "xla")]
        for a, b in zip(*(jax.tree.leaves(result) for result in results), strict=True):
            tolerance = 0.0 if jnp.issubdtype(a.dtype, jnp.integer) else 3e-2
            scale = max(1.0, float(np.abs(np.asarray(b, np.float64)).max(initial=0.0)))
            got, want = (np.asarray(value, np.float64) / scale for value in (a, b))
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance / 10)
        print(f"{run.__name__} of {tokens} tokens agrees with the reference", flush=True)
    router_gradients()
    print("every kernel ran, and agrees with the reference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
