"""The program for compute-sanitizer: its parts are right where kernels are, and it notices where not."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import sanitize_hopper
from jaxmoe import reference
from kernels_pallas import grouped_matmul_grad_hopper, grouped_matmul_hopper, hopper
from tests.kernels_pallas.on_hopper import new_jax

PARTS = 12


@new_jax
def test_kernels_that_are_launched_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is given of the first of each: a module and what the kernel reads; nothing runs."""
    seen: list[tuple[bytes, int]] = []

    def from_torch(module: bytes, args: Any, out: jax.ShapeDtypeStruct) -> jax.Array:
        seen.append((module[:4], len(args)))
        return jnp.zeros(out.shape, out.dtype)

    monkeypatch.setattr(sanitize_hopper, "from_torch", from_torch)
    monkeypatch.setattr(hopper, "launch", sanitize_hopper.launch_from_torch)
    for name, run, _ in sanitize_hopper.parts():
        if "bfloat16" in name:
            run()
    bytecode = b"ML\xefR"  # how MLIR's begins
    assert seen == [(bytecode, args) for args in (3, 3, 8, 8, 4, 4)]


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in place of the kernels."""

    def product(rows: jax.Array, weight: jax.Array, sizes: jax.Array, transposed: bool, **_: Any) -> jax.Array:
        return hopper.launch(functools.partial(reference.grouped_matmul, transposed=transposed), rows, weight, sizes)

    def outer(a: jax.Array, b: jax.Array, sizes: jax.Array, **_: Any) -> jax.Array:
        return hopper.launch(reference.grouped_outer, a, b, sizes)

    monkeypatch.setattr(grouped_matmul_hopper, "grouped_matmul", product)
    monkeypatch.setattr(grouped_matmul_grad_hopper, "grouped_outer", outer)


@pytest.mark.usefixtures("right")
def test_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    sanitize_hopper.main(lambda run, *args: run(*args))
    assert capsys.readouterr().out.count("agrees with the reference\n") == PARTS


@pytest.mark.usefixtures("right")
@pytest.mark.parametrize("spoilt", [jnp.zeros_like, lambda x: jnp.roll(x, 1, axis=0), lambda x: x.at[-1].set(jnp.nan)])
def test_what_is_wrong_stops_it(spoilt: Any) -> None:
    with pytest.raises(AssertionError, match=r"product, bfloat16: off by"):
        sanitize_hopper.main(lambda run, *args: spoilt(run(*args)))
