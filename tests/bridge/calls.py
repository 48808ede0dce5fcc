"""One small call of each function of the bridge, on numpy values, and what it takes to compare it with jaxmoe."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
import jaxmoe

CONFIG = bridge.RoutingConfig(num_experts=8, top_k=2, n_group=2, routed_scaling_factor=2.5, n_shared_experts=1)
TOKENS, WIDTH, INNER = 5, 32, 16
FUNCTIONS = (
    *("route", "router_logits", "plan_dispatch", "dispatch", "combine", "experts", "fused_experts", "moe"),
    "update_bias",
)
HERE = (8, 1, 6, 3, 0, 5)  # of CONFIG's ids, those of the experts that `fused_experts` has, the shared one first
WITH_OUT = ("route", "dispatch", "combine", "fused_experts", "moe")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def arguments(name: str, tokens: int = TOKENS, config: bridge.RoutingConfig = CONFIG) -> dict[str, Any]:
    """The array arguments of a function, in numpy; a plan as a tuple."""
    pairs = tokens * config.num_slots
    ids = np.asarray(jaxmoe.route(jnp.asarray(numbers(tokens, config.num_experts)), config=config).experts)
    plan = tuple(np.asarray(a) for a in jaxmoe.plan_dispatch(jnp.asarray(ids), config.num_expert_ids))
    gate_up = numbers(config.num_expert_ids, WIDTH, 2 * INNER, seed=1) / 8
    down = numbers(config.num_expert_ids, INNER, WIDTH, seed=2) / 8
    bias = numbers(config.num_experts, seed=3)
    router = numbers(config.num_experts, WIDTH, seed=4)
    expert_map = np.full(config.num_expert_ids, -1, np.int32)
    expert_map[list(HERE)] = np.arange(len(HERE))
    return {
        "route": {"logits": numbers(tokens, config.num_experts), "bias": bias},
        "router_logits": {"x": numbers(tokens, WIDTH), "weight": router},
        "plan_dispatch": {"experts": ids},
        "dispatch": {"x": numbers(tokens, WIDTH), "plan": plan},
        "combine": {"rows": numbers(pairs, WIDTH), "plan": plan, "weights": numbers(tokens, config.num_slots, seed=5)},
        "experts": {"rows": numbers(pairs, WIDTH), "gate_up": gate_up, "down": down, "group_sizes": plan[2]},
        "fused_experts": {
            "x": numbers(tokens, WIDTH),
            "experts": ids,
            "weights": numbers(tokens, config.num_slots, seed=5),
            "gate_up": gate_up[list(HERE)],
            "down": down[list(HERE)],
            "expert_map": expert_map,
        },
        "moe": {
            "x": numbers(tokens, WIDTH),
            "params": {"router": router, "bias": bias, "gate_up": gate_up, "down": down},
        },
        "update_bias": {"bias": bias, "load": np.arange(config.num_expert_ids, dtype=np.int32)},
    }[name]


def options(name: str, implementation: str | None = None, config: bridge.RoutingConfig = CONFIG) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "route": {"config": config, "num_valid_tokens": None},
        "plan_dispatch": {"num_experts": config.num_expert_ids, "align": 4},
        "fused_experts": {"max_rows": 8},  # of 11 pairs of experts that are here
        "moe": {"config": config},
        "update_bias": {"rate": 0.25},
    }.get(name, {})
    if name == "experts":  # it has no kernel to choose
        return extra
    return extra if name == "update_bias" else {**extra, "implementation": implementation}


def tensors(tree: Any, device: torch.device) -> Any:
    """Numpy to what the bridge takes; each tensor allocated by torch, so aligned."""
    if isinstance(tree, dict) and "router" in tree:
        return bridge.MoEParams(**{name: tensors(value, device) for name, value in tree.items()})
    if isinstance(tree, dict):
        return {name: tensors(value, device) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return bridge.DispatchPlan(*(tensors(value, device) for value in tree))
    return torch.tensor(tree, device=device)


def arrays(tree: Any) -> Any:
    """Numpy to what jaxmoe takes."""
    if isinstance(tree, dict) and "router" in tree:
        return jaxmoe.MoEParams(**{name: arrays(value) for name, value in tree.items()})
    if isinstance(tree, dict):
        return {name: arrays(value) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return jaxmoe.DispatchPlan(*(arrays(value) for value in tree))
    return jnp.array(tree)


def leaves(tree: Any) -> list[Any]:
    """The tensors or arrays in any of the trees above, a jaxmoe.Columns as the array that it views."""
    return jax.tree.leaves(tree)


def filled(name: str, results: Any) -> Any:
    """Of a function's results those that `out` takes."""
    return results[0] if name == "moe" else results


def same(tensor: torch.Tensor, array: jax.Array) -> None:
    """Exactly: shape, dtype, every value, NaN included."""
    assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name
    np.testing.assert_array_equal(tensor.float().cpu().numpy(), np.asarray(array.astype(jnp.float32)), strict=True)
