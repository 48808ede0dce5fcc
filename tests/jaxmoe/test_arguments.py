"""Arguments that a function cannot use are refused by name, on whatever implementation, before anything is written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import Columns, MoEParams, RoutingConfig
from tests.cases import F32, normal
from tests.check_dispatch import check_dispatch
from tests.check_route import check_route

I32 = jnp.int32
CONFIG = RoutingConfig(num_experts=4, top_k=2)
LOGITS, BIAS, WIDE = normal(0, 3, 4), normal(1, 4), normal(2, 3, 9)
PARAMS = MoEParams(router=normal(3, 4, 8), gate_up=normal(4, 4, 8, 6), down=normal(5, 4, 3, 8))
ROWS, GATE_UP, DOWN, SIZES = normal(0, 3, 8), PARAMS.gate_up, PARAMS.down, jnp.array([3, 0, 0, 0], I32)


def route(logits: Any = LOGITS, bias: Any = None, **options: Any) -> Any:
    return jaxmoe.route(logits, bias, config=CONFIG, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(WIDE, 6, 4), r"columns inside float32\[3, 9\], as ints, got first=6, width=4"),
        (Columns(WIDE, -1, 4), r"columns inside float32\[3, 9\], as ints, got first=-1, width=4"),
        (Columns(WIDE, 1.0, 4), r"columns inside float32\[3, 9\], as ints, got first=1.0, width=4"),
        (Columns(WIDE, 1, 4.0), r"columns inside float32\[3, 9\], as ints, got first=1, width=4.0"),
        (Columns(WIDE, True, 4), r"columns inside float32\[3, 9\], as ints, got first=True, width=4"),
        (Columns(WIDE[0], 1, 4), r"bfloat16 or float16 or float32 \[T, stride\], got float32\[9\]"),
        (Columns(WIDE.astype(I32), 1, 4), r"bfloat16 or float16 or float32 \[T, stride\], got int32\[3, 9\]"),
        (Columns([[0.0] * 9], 1, 4), r"an array bfloat16 or float16 or float32 \[T, stride\], got list"),
        (Columns(Columns(WIDE, 0, 6), 1, 4), r"an array bfloat16 or float16 or float32 \[T, stride\], got Columns"),
        (Columns(WIDE, 1, 5), r"bfloat16 or float16 or float32 \[T, 4\], got float32\[3, 5\]"),
    ],
)
def test_wrong_columns(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"logits: expected {message}"):
        route(columns)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda view: route(bias=view), "bias"),
        (lambda view: route(num_valid_tokens=view), "num_valid_tokens"),
        (lambda view: route(out=(view, view, view)), "out.weights"),
        (lambda view: jaxmoe.update_bias(view, SIZES, rate=1.0), "bias"),
        (lambda view: jaxmoe.update_bias(BIAS, view, rate=1.0), "load"),
        (lambda view: jaxmoe.update_bias(BIAS, SIZES, rate=view), "rate"),
        (lambda view: jaxmoe.experts(view, GATE_UP, DOWN, SIZES), "rows"),
        (lambda view: jaxmoe.experts(ROWS, view, DOWN, SIZES), "gate_up"),
        (lambda view: jaxmoe.experts(ROWS, GATE_UP, view, SIZES), "down"),
        (lambda view: jaxmoe.experts(ROWS, GATE_UP, DOWN, view), "group_sizes"),
        (lambda view: jaxmoe.moe(view, PARAMS, CONFIG), "x"),
        (lambda view: jaxmoe.moe(ROWS, MoEParams(router=view, gate_up=GATE_UP, down=DOWN), CONFIG), "params.router"),
    ],
)
def test_columns_where_an_array_is_read(call: Any, name: str) -> None:
    """Only logits, x and rows may be strided; the other arguments are read whole."""
    with pytest.raises(ValueError, match=rf"^{name}: expected an array .*, got Columns"):
        call(Columns(normal(0, 3, 20), 0, 8))


def test_numpy_is_read_but_not_written_to() -> None:
    """JAX cannot write to numpy's memory: the caller would find the array as it was."""
    logits = np.asarray(LOGITS)
    check_route(route(logits, np.asarray(BIAS), num_valid_tokens=np.int32(3)), LOGITS, BIAS, CONFIG)
    check_route(route(Columns(np.asarray(WIDE), 2, 4)), WIDE[:, 2:6], None, CONFIG)
    arrays = (jnp.zeros((3, 2)), jnp.zeros((3, 2), I32), jnp.zeros(4, I32))
    for index in range(3):
        out = [*arrays]
        out[index] = np.asarray(arrays[index])
        with pytest.raises(ValueError, match=r"out: expected a jax.Array to write to, got ndarray"):
            route(logits, out=tuple(out))
    assert not any(array.is_deleted() for array in arrays)


def test_out_may_be_traced() -> None:
    plan = jaxmoe.plan_dispatch(jnp.array([[1], [0], [1]], I32), 2)
    filled = jax.jit(lambda x, out: jaxmoe.dispatch(x, plan, out=out))(ROWS, jnp.full((3, 8), jnp.nan, F32))
    check_dispatch(filled, ROWS, plan)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (jax.random.split(jax.random.key(0), (3, 4)), r"key<fry>\[3, 4\]"),
        (jax.ShapeDtypeStruct((3, 4), F32), "ShapeDtypeStruct"),
        ([[0.0] * 4] * 3, "list"),
        (np.zeros((3, 4)), r"float64\[3, 4\]"),
    ],
    ids=["random keys", "a shape", "lists", "float64"],
)
def test_what_is_no_array_of_numbers(value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"logits: expected .*bfloat16 or float16 or float32 \[T, 4\], got {kind}"):
        route(value)


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="needs the torch package")
    tensor = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"logits: expected an array .* \[T, 4\], got Tensor"):
        route(tensor)
    with pytest.raises(ValueError, match=r"logits: expected an array .* \[T, stride\], got Tensor"):
        route(Columns(tensor, 0, 4))
