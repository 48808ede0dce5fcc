"""What JAX's functions take of the kernels for Hopper, and what comes of it there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.grouped_matmul import alignment
from kernels_pallas import grouped_matmul_grad_hopper, hopper
from kernels_pallas.hopper import BLOCK
from kernels_pallas.targets import TARGETS
from tests.cases import BF16, F16, F32, normal
from tests.kernels_pallas.on_hopper import described, launches, lowered, new_jax, on_hopper, poison, two_devices

I32 = jnp.int32


@pytest.mark.parametrize(
    ("why", "implementation", "multiprocessors", "rows", "inner", "dtype", "align"),
    [
        ("a Hopper GPU", None, 132, 2048, 512, BF16, 64),
        ("asked for", "pallas", 132, 2053, 512, F16, 64),
        ("another GPU", None, 0, 2048, 512, BF16, 1),
        ("XLA", "xla", 132, 2048, 512, BF16, 1),
        ("interpreted", "interpret", 132, 2048, 512, BF16, 1),
        ("few rows", None, 132, 2047, 512, BF16, 1),
        ("float32", None, 132, 2048, 512, F32, 1),
        ("a side without a tile", None, 132, 2048, 520, BF16, 1),
        ("down alone has none", None, 132, 2048, 192, BF16, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_alignment(
    why: str,
    implementation: str | None,
    multiprocessors: int,
    rows: int,
    inner: int,
    dtype: Any,
    align: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda: multiprocessors)
    sides: dict[str, Any] = {"width": 512, "inner": inner, "dtype": dtype}
    assert alignment(implementation, num_rows=rows, num_experts=4, **sides) == align


CONFIG = jaxmoe.RoutingConfig(num_experts=4, top_k=2)


def layer(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, router: jax.Array, implementation: str = "pallas"
) -> jax.Array:
    params = jaxmoe.MoEParams(router=router, gate_up=gate_up, down=down)
    return jaxmoe.moe(x, params, CONFIG, implementation=implementation)[0]


def gradients(*args: jax.Array, implementation: str = "pallas") -> tuple[jax.Array, ...]:
    """Of x and of every parameter; the result itself first."""
    y, backward = jax.vjp(functools.partial(layer, implementation=implementation), *args)
    return y, *backward(jnp.cos(jnp.arange(y.size, dtype=F32)).reshape(y.shape).astype(y.dtype))


def arguments(tokens: int, dtype: Any, inner: int = 512) -> list[jax.ShapeDtypeStruct]:
    shapes = (tokens, 512), (4, 512, 2 * inner), (4, inner, 512), (4, 512)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> set[tuple[bool, int]]:
    """Of the weights' gradients that the copy engine would take: (whether their groups are blocks, rows)."""
    seen: set[tuple[bool, int]] = set()

    def grouped_outer(a: jax.Array, *args: Any, aligned: bool, **options: Any) -> jax.Array:
        seen.add((aligned, a.shape[0]))
        return of_weights(a, *args, aligned=aligned, **options)

    of_weights = grouped_matmul_grad_hopper.grouped_outer
    monkeypatch.setattr(grouped_matmul_grad_hopper, "grouped_outer", grouped_outer)
    return seen


@new_jax
@pytest.mark.parametrize(
    ("why", "multiprocessors", "target", "tokens", "dtype", "inner", "found", "blocks"),
    [
        ("all but the first product", 132, "sm_90", 2048, BF16, 512, 5, True),
        ("weights' gradients alone, of few rows", 132, "sm_90", 1024, BF16, 512, 2, True),
        ("the same of too few rows for blocks", 132, "sm_90", 512, BF16, 512, 2, False),
        ("the gradient of hidden rows is too narrow", 132, "sm_90", 2048, BF16, 256, 4, True),
        ("another GPU", 0, "sm_80", 2048, BF16, 512, 0, None),
        ("AMD's", 132, "gfx942", 2048, BF16, 512, 0, None),
        ("float32", 132, "sm_90", 2048, F32, 512, 0, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("traced_anew")
def test_what_the_layer_takes(
    why: str,
    multiprocessors: int,
    target: str,
    tokens: int,
    dtype: Any,
    inner: int,
    found: int,
    blocks: bool | None,
    groups: set[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six products, of which the first gathers tokens."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: multiprocessors)
    with described(target):
        text = lowered(gradients, *arguments(tokens, dtype, inner), platform=TARGETS[target].platform)
    assert launches(text)[0] == found
    if found:  # else they may have been traced, for a platform that is not lowered for
        assert groups == {(blocks, tokens * 2 + (4 * BLOCK if blocks else 0))}, "with what can be filled up"


@new_jax
@pytest.mark.parametrize(
    ("ids", "max_rows", "found", "seen"),
    [
        (8, None, 5, (True, 8192 + 4 * BLOCK)),
        (8, 5000, 5, (True, 5312)),
        (8, 3000, 2, (True, 3264)),
        (32, None, 2, (False, 8192)),
        (128, None, 0, None),
    ],
    ids=["half are here", "room for some", "too little room for products", "an eighth are here", "few are here"],
)
@pytest.mark.usefixtures("traced_anew")
def test_what_a_part_of_the_layer_takes(
    ids: int,
    max_rows: int | None,
    found: int,
    seen: tuple[bool, int] | None,
    groups: set[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the rows that are expected here, not by those that there is memory for."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)

    def part(x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
        here = jnp.arange(ids, dtype=I32) - 4
        chosen = jnp.zeros(weights.shape, I32)
        how: dict[str, Any] = {"expert_map": here, "max_rows": max_rows, "implementation": "pallas"}
        return jnp.sum(jaxmoe.fused_experts(x, chosen, weights, gate_up, down, **how).astype(F32) ** 2)

    args = [*arguments(4096, BF16)[:3], jax.ShapeDtypeStruct((4096, 2), F32)]
    with described("sm_90"):
        text = lowered(jax.grad(part, argnums=(0, 1, 2, 3)), *args)
    assert launches(text)[0] == found
    assert groups == ({seen} if seen else set())


def shapes_of(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Of rows and weights, and the sizes of four groups."""
    return [*(jax.ShapeDtypeStruct(shape, BF16) for shape in shapes), jax.ShapeDtypeStruct((4,), I32)]


@new_jax
@pytest.mark.parametrize(
    ("why", "rows", "align", "found", "seen"),
    [
        ("anywhere", 4096, 1, (1, 1), (False, 4096)),
        ("blocks", 4096, 64, (2, 0), (True, 4096)),
        ("of two", 4096, 128, (2, 0), (True, 4096)),
        ("halves of blocks", 4096, 32, (1, 1), (False, 4096)),
        ("blocks and a row more", 4104, 64, (1, 1), (False, 4104)),
        ("few rows", 1984, 64, (1, 1), (True, 1984)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("traced_anew")
def test_what_grouped_matmul_takes(
    why: str,
    rows: int,
    align: int,
    found: tuple[int, int],
    seen: tuple[bool, int],
    transposed: bool,
    groups: set[tuple[bool, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights' gradients have a kernel for groups that begin anywhere, products have none."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    product = functools.partial(jaxmoe.grouped_matmul, transposed=transposed, align=align, implementation="pallas")
    loss = lambda *args: jnp.sum(product(*args))
    with described("sm_90"):
        text = lowered(jax.grad(loss, argnums=(0, 1)), *shapes_of((rows, 512), (4, 512, 512)))
    assert launches(text) == found  # nobody asks for the product itself
    assert groups == {seen}


@new_jax
@pytest.mark.parametrize(("align", "found"), [(1, (2, 5)), (64, (5, 2))], ids=["anywhere", "blocks"])
@pytest.mark.usefixtures("traced_anew")
def test_what_experts_take(
    align: int, found: tuple[int, int], groups: set[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gated product, and the activation's gradient, are Triton's."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)

    def run(*args: jax.Array) -> tuple[jax.Array, ...]:
        experts = functools.partial(jaxmoe.experts, align=align, implementation="pallas")
        y, backward = jax.vjp(lambda *of: experts(*of, args[-1]), *args[:-1])
        return y, *backward(y)

    with described("sm_90"):
        text = lowered(run, *shapes_of((4096, 512), (4, 512, 1024), (4, 512, 512)))
    assert launches(text) == found
    assert groups == {(align == 64, 4096)}


@on_hopper
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_blocks_on_hopper(transposed: bool) -> None:
    """`grouped_matmul` and `experts` by the copy engine are those of XLA in float32, gradients included."""
    sizes = jnp.array([1984, 0, 64, 2048], I32)
    rows, weight = normal(0, 4160, 512, dtype=BF16), normal(1, 4, 512, 512, dtype=BF16, scale=0.05)
    gate_up, down = (normal(i, 4, 512, n, dtype=BF16, scale=0.05) for i, n in ((2, 1024), (3, 512)))
    if transposed:
        gate_up = gate_up.swapaxes(1, 2)
    calls: list[tuple[Any, tuple[jax.Array, ...], int]] = [
        (jaxmoe.grouped_matmul, (rows, weight), 3),
        (jaxmoe.experts, (rows, gate_up, down), 5),
    ]
    for function, args, found in calls:

        def run(*args: jax.Array, function: Any = function, **how: Any) -> tuple[jax.Array, ...]:
            y, backward = jax.vjp(lambda *of: function(*of, sizes, transposed=transposed, **how), *args)
            return y, *backward(jnp.sin(jnp.arange(y.size, dtype=F32)).reshape(y.shape).astype(y.dtype))

        engine = jax.jit(functools.partial(run, align=64, implementation="pallas"))
        assert launches(engine.lower(*args).as_text())[0] == found
        poison()
        got = engine(*args)
        want = jax.jit(functools.partial(run, implementation="xla"))(*(a.astype(F32) for a in args))
        for a, b in zip(got, want, strict=True):
            exact = np.asarray(b, np.float64)
            off = lambda x, exact=exact: np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)
            assert off(a) < float(jnp.finfo(BF16).eps)
            assert off(jnp.roll(a, 64 if a.ndim == 2 else 1, axis=0)) > 0.5
            assert off(jnp.zeros_like(a)) > 0.5


@new_jax
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.usefixtures("traced_anew")
def test_layer_under_shard_map(check_vma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens split among two devices, which share the parameters."""
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    mesh = two_devices()
    split, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs: dict[str, Any] = {"in_specs": (split, same, same, same), "out_specs": split}

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jax.shard_map(layer, mesh=mesh, check_vma=check_vma, **specs)(*args))

    with jax.sharding.use_abstract_mesh(mesh):
        assert launches(lowered(jax.grad(loss, argnums=(0, 1, 2)), *arguments(4096, BF16)))[0] == 4  # without `down`


@new_jax
@pytest.mark.usefixtures("traced_anew")
def test_layer_under_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    args = arguments(2048, BF16)
    args[0] = jax.ShapeDtypeStruct((3, *args[0].shape), BF16)
    with described("sm_90"):
        text = lowered(jax.vmap(gradients, in_axes=(0, None, None, None)), *args)
    assert launches(text)[0] == 5


@on_hopper
@pytest.mark.parametrize(
    ("tokens", "found"),
    [(2048, 5), (2047, 5), (1024, 2), (512, 2)],
    ids=["", "odd", "weights' gradients alone", "of groups that begin anywhere"],
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_layer_on_hopper(tokens: int, found: int, dtype: Any) -> None:
    """The layer and its gradients are those of XLA's layer in float32."""
    assert launches(lowered(gradients, *arguments(tokens, dtype)))[0] == found
    args = [normal(i, *a.shape, dtype=dtype, scale=0.05) for i, a in enumerate(arguments(tokens, dtype))]
    args[0] *= 20
    poison()
    got = jax.jit(gradients)(*args)
    want = jax.jit(functools.partial(gradients, implementation="xla"))(*(a.astype(F32) for a in args))
    for a, b in zip(got, want, strict=True):
        exact = np.asarray(b, np.float64)
        off = lambda x, exact=exact: np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)
        assert off(a) < float(jnp.finfo(dtype).eps)
        assert off(jnp.roll(a, 1, axis=0)) > 0.5
        assert off(jnp.zeros_like(a)) > 0.5
