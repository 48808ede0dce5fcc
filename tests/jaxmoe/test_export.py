"""jax.export: functions of this package's types are serialised, and called elsewhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxmoe
from jaxmoe import RoutingConfig
from tests.cases import normal
from tests.jaxmoe.test_transforms import MOE, moe_inputs

CONFIG = RoutingConfig(num_experts=12, top_k=3)


def again(function: Any, *args: Any) -> Any:
    """What the function returns once it has been written down and read."""
    return export.deserialize(export.export(jax.jit(function))(*args).serialize()).call(*args)


def check(function: Any, *args: Any) -> None:
    got, want = again(function, *args), function(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, strict=True)


def test_layer() -> None:
    params, x = moe_inputs()
    check(lambda params, x: jaxmoe.moe(x, params, MOE), params, x)
    check(lambda params, x: jax.grad(lambda params: jnp.sum(jaxmoe.moe(x, params, MOE)[0] ** 2))(params), params, x)


def test_plan_columns_and_shared_experts() -> None:
    ids = jnp.array([[1, 0], [2, -1]], jnp.int32)
    assert again(lambda ids: jaxmoe.plan_dispatch(ids, 3, max_rows=2), ids).rows.tolist() == [[1, 0], [-1, -1]]
    plan = jaxmoe.plan_dispatch(ids, 3)
    check(lambda x, plan: (jaxmoe.dispatch(x, plan), plan), normal(0, 2, 8), plan)
    wide = normal(1, 5, 40)
    check(lambda logits: jaxmoe.route(logits, config=CONFIG), jaxmoe.Columns(wide, 9, 12))
    mlp = jaxmoe.SharedMLP(gate_up=normal(2, 8, 6), down=normal(3, 3, 8))
    for activation in ("silu", "gelu"):
        check(lambda mlp, x: mlp(x), dataclasses.replace(mlp, activation=activation), normal(4, 5, 8))


def test_columns_of_another_place_are_refused() -> None:
    wide = normal(1, 5, 40)
    read = export.deserialize(
        export.export(jax.jit(lambda x: jaxmoe.route(x, config=CONFIG)))(jaxmoe.Columns(wide, 9, 12)).serialize()
    )
    with pytest.raises(ValueError, match="same pytree structure"):
        read.call(jaxmoe.Columns(wide, 10, 12))


def test_in_a_process_that_knows_the_package_alone(tmp_path: Any) -> None:
    """The names under which types are written are known as soon as jaxmoe is imported."""
    params, x = moe_inputs()
    path = tmp_path / "layer"
    path.write_bytes(export.export(jax.jit(lambda params, x: jaxmoe.moe(x, params, MOE)))(params, x).serialize())
    code = f"""
import jax, jaxmoe
layer = jax.export.deserialize(open({str(path)!r}, "rb").read())
y, routing = jax.tree.unflatten(layer.out_tree, layer.out_avals)
print(type(routing).__name__, y.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"Routing {x.shape}\n", done.stderr
