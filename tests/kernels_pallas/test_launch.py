"""Kernels that are passed their sizes do what kernels do that have them built in."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.count import count_load
from kernels_pallas.dispatch import dispatch
from kernels_pallas.launch import iota, launch, load, runtime_sizes, store
from kernels_pallas.plan_dispatch import plan_dispatch
from kernels_pallas.route import route
from kernels_pallas.router_logits import router_logits
from kernels_pallas.router_logits_grad import router_logits_grad_weight, router_logits_grad_x
from kernels_pallas.rule import Rule
from kernels_pallas.targets import Lowered, lower, target_for

RULE = Rule(12, 3, 1, 1, "sigmoid", "top2", True, 1.0, 0, 1, 1.0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


IDS = jnp.asarray(np.random.default_rng(0).integers(-1, 9, (37, 3)), jnp.int32)
PLAN = plan_dispatch(IDS, None, num_experts=9, align=4, interpret=True)
CALLS: dict[str, tuple[Callable[[], Any], list[tuple[str, ...]]]] = {
    "plan": (
        lambda: plan_dispatch(IDS, None, num_experts=9, align=4, interpret=True),
        [],  # as many launches as its config has
    ),
    "dispatch": (
        lambda: dispatch(normal(1, 37, 40), PLAN[0], PLAN[1], interpret=True),
        [("num_tokens", "num_rows")],
    ),
    "load": (
        lambda: count_load(jnp.maximum(IDS, 0), jnp.zeros(9, jnp.int32), interpret=True),
        [("num_items",)],
    ),
    "route": (
        lambda: route(normal(2, 5, 12), None, 3, rule=RULE, interpret=True),
        [("num_tokens", "num_valid_tokens")],
    ),
    "router": (lambda: router_logits(normal(3, 37, 40), normal(4, 12, 40), interpret=True), []),
    "router, gradient of x": (
        lambda: router_logits_grad_x(normal(5, 37, 12), normal(4, 12, 40), dtype=jnp.float32, interpret=True),
        [("num_tokens",)],
    ),
    "router, gradient of weight": (
        lambda: router_logits_grad_weight(normal(5, 37, 12), normal(3, 37, 40), dtype=jnp.float32, interpret=True),
        [("num_tokens", "steps"), ("num_tokens", "slices")],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_sizes_at_run_time(name: str) -> None:
    call, sizes = CALLS[name]
    built_in = call()
    with runtime_sizes() as launched:
        passed = call()
    assert all(names for _, names in launched)
    assert not sizes or [names for _, names in launched] == sizes
    for a, b in zip(jax.tree.leaves(built_in), jax.tree.leaves(passed), strict=True):
        np.testing.assert_array_equal(a, b)


def _shifted(x: jax.Array) -> Any:
    def kernel(x_ref: Any, out_ref: Any, *, by: Any) -> None:
        at = iota((32,), 0)
        store(out_ref.at[at], load(x_ref.at[at + by]))

    shape = jax.ShapeDtypeStruct((32,), jnp.float32)
    return launch(kernel, x, name="shifted", grid=(1,), out_shape=[shape], num_warps=1, sizes={"by": 3})


ROOT = Path(__file__).parents[2]
SHIFTED = "from typing import Any\nfrom kernels_pallas.launch import iota, launch, load, store\n" + inspect.getsource(
    _shifted
)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_size_becomes_a_number(target: str) -> None:
    (kernel,) = lower(_shifted, jax.ShapeDtypeStruct((64,), jnp.float32), target=target, sizes_at_run_time=True)
    assert kernel.sizes == ("by",)
    assert "%arg1: i32" in kernel.ttir
    assert "divisibility" in kernel.ttir
    assert "divisibility" not in kernel.unaligned().ttir
    (built_in,) = lower(_shifted, jax.ShapeDtypeStruct((64,), jnp.float32), target=target)
    assert built_in.sizes == ()
    assert "%arg1: !tt.ptr<f32>" in built_in.ttir, "jax must not have remembered the other"


def test_another_way_to_write_a_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later jax may read the array otherwise: then nothing is guessed."""
    from kernels_pallas import targets

    decode = targets._decode
    monkeypatch.setattr(targets, "_decode", lambda code: decode(code).replace("tt.addptr %arg1", "tt.advance %arg1"))
    with pytest.raises(RuntimeError, match="writes the size %arg1 otherwise than expected"):
        lower(_shifted, jax.ShapeDtypeStruct((64,), jnp.float32), target="sm_90", sizes_at_run_time=True)


def test_pointers_without_a_hint_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not mark pointers"):
        Lowered("k", "module {}", (1, 1, 1), 1, 1).unaligned()


def test_targets_of_other_devices() -> None:
    """A newer CUDA device is taken for the nearest kind that jax knows; others are refused by name."""
    hopper, ada = target_for("sm_90"), target_for("sm_89", 100_000)
    assert (hopper.arch, ada.arch, ada.shared_bytes) == (90, 89, 100_000)
    assert ada.device_kind == target_for("sm_80").device_kind
    for name in ("sm_75", "gfx90a", "gfx1100"):
        with pytest.raises(ValueError, match=f"target: expected one of .* got '{name}'"):
            target_for(name)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="before jax 0.11 Pallas itself starts every backend")
def test_lowering_starts_no_backend() -> None:
    """JAX would take most of a GPU's memory from a torch user who never called it, or break a capture under way."""
    program = (
        "import jax, jax.numpy as jnp\n"
        "from jax._src import xla_bridge\n"
        f"{SHIFTED}"
        "from kernels_pallas.targets import lower\n"
        "assert not xla_bridge.backends_are_initialized(), 'started by an import'\n"
        "lower(_shifted, jax.ShapeDtypeStruct((64,), jnp.float32), target='sm_90', sizes_at_run_time=True)\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
