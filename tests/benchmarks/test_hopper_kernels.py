"""The measurement of grouped products in JAX: what it compares, and that what is wrong is not timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hopper_kernels, matmuls, operation
from benchmarks.hopper_kernels import Work
from jaxmoe import reference
from kernels_pallas import grouped_matmul_grad_hopper, grouped_matmul_hopper, hopper

PRODUCT, TRANSPOSED, GRADIENT = (
    Work("product", 128, 512),
    Work("transposed", 128, 512, transposed=True),
    Work("gradient", 256, 256, gradient=True),
)
WAYS = {
    PRODUCT: {"triton *", "triton, blocks", "hopper, blocks"},
    TRANSPOSED: {"triton *", "triton, blocks", "hopper, blocks"},
    GRADIENT: {
        *("triton *", "triton, blocks"),
        *(f"hopper {tile}{blocks}" for tile in ("128 x 256", "256 x 128") for blocks in ("", ", blocks")),
    },
}


def product(rows: jax.Array, weight: jax.Array, sizes: jax.Array, transposed: bool, **_: Any) -> jax.Array:
    return reference.grouped_matmul(rows, weight, sizes, transposed=transposed)


def gradient(a: jax.Array, b: jax.Array, sizes: jax.Array, **_: Any) -> jax.Array:
    return reference.grouped_outer(a, b, sizes)


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU, with the reference for all kernels; nothing is timed."""

    def untimed(ways: Mapping[str, Callable[[], Any]], wait: Callable[[Any], Any], rounds: int) -> dict[str, float]:
        return {name: 0.001 * wait(way()).ndim for name, way in ways.items()}

    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    monkeypatch.setattr(operation, "DEVICE", "cpu")
    monkeypatch.setattr(hopper_kernels, "in_turns", untimed)
    monkeypatch.setattr(hopper_kernels, "grouped_matmul", product)
    monkeypatch.setattr(hopper_kernels, "grouped_outer", gradient)
    monkeypatch.setattr(grouped_matmul_hopper, "grouped_matmul", product)
    monkeypatch.setattr(grouped_matmul_grad_hopper, "grouped_outer", gradient)


@pytest.mark.parametrize("work", WAYS, ids=lambda work: work.name)
def test_measure(work: Work) -> None:
    """Few rows an expert, of which one has none."""
    found = hopper_kernels.measure(work, 3, 40)
    assert set(found) == WAYS[work]
    assert all(way["us"] == (3.0 if work.gradient else 2.0) and way["off by"] < 0.01 for way in found.values())


@pytest.mark.parametrize(
    ("tokens", "product", "narrow", "gradient"),
    [
        (1024, "triton", "triton", "hopper 128 x 256"),
        (2048, "hopper, blocks", "triton, blocks", "hopper 128 x 256, blocks"),
        (4096, "hopper, blocks", "hopper, blocks", "hopper 128 x 256, blocks"),
    ],
)
def test_what_the_layer_takes_is_marked(tokens: int, product: str, narrow: str, gradient: str) -> None:
    """Of 32 experts; a product with a wide result, one with a narrow result, a gradient."""
    for work, marked in (Work("wide", 128, 4096), product), (PRODUCT, narrow), (GRADIENT, gradient):
        assert [name for name in hopper_kernels.ways(work, tokens, 32) if name.endswith("*")] == [f"{marked} *"]


def test_a_tile_that_does_not_suit_is_left_out() -> None:
    found = set(hopper_kernels.ways(Work("high", 256, 384, gradient=True), 4096, 32))
    assert found == {"triton", "triton, blocks", "hopper 256 x 128", "hopper 256 x 128, blocks *"}


@pytest.mark.parametrize("spread", ["even", "uneven", "zipf"])
def test_shares_of_the_rows(spread: str) -> None:
    """Those of `bench`; of blocks, each expert has what fills it up."""
    plain, blocks = (hopper_kernels.plan_of(16, 8, align, spread) for align in (1, 64))
    assert plain.group_sizes.tolist() == matmuls.shares(spread, 128, 8).tolist()
    assert (blocks.group_sizes == -(-plain.group_sizes // 64) * 64).all()
    assert sorted(plain.slots.tolist()) == list(range(128))


def test_what_the_layer_does_not_do_is_not_marked() -> None:
    first, *others = hopper_kernels.works()
    marked = lambda work: any(name.endswith("*") for name in hopper_kernels.ways(work, 4096, 32))
    assert not marked(first)
    assert all(map(marked, others))


def test_other_gpus_have_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 0)
    assert all(set(hopper_kernels.ways(work, 64, 8)) == {"triton"} for work in WAYS)


@pytest.mark.parametrize(
    ("why", "spoil"),
    [
        ("zeros", jnp.zeros_like),
        ("the next one's", lambda right: jnp.roll(right, 1, axis=0)),
        ("one entry is not a number", lambda right: right.at[(1,) * right.ndim].set(jnp.nan)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("work", WAYS, ids=lambda work: work.name)
def test_what_is_wrong_is_not_timed(
    work: Work, why: str, spoil: Callable[[jax.Array], jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_matmul_hopper, "grouped_matmul", lambda *args, **kw: spoil(product(*args, **kw)))
    monkeypatch.setattr(grouped_matmul_grad_hopper, "grouped_outer", lambda *args, **kw: spoil(gradient(*args, **kw)))
    found = hopper_kernels.measure(work, 16, 8)
    assert {name for name, way in found.items() if way["us"]} == {"triton *", "triton, blocks"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(hopper_kernels, "WIDTH", 256)
    monkeypatch.setattr(hopper_kernels, "INNER", 128)
    spreads, plan_of = set(), hopper_kernels.plan_of
    monkeypatch.setattr(hopper_kernels, "plan_of", lambda *args: spreads.add(args[-1]) or plan_of(*args))
    monkeypatch.setattr(
        sys, "argv", ["", "--tokens", "16", "32", "--experts", "8", "--spread", "zipf", "--output", str(path)]
    )
    hopper_kernels.main()
    found = json.loads(path.read_text())
    rows = found["rows"]
    assert {found["spread"]} == spreads == {"zipf"}
    sides = [(256, 256), (128, 256), (256, 128), (256, 256), (256, 256), (128, 256)]
    assert [(row["tokens"], row["left"], row["right"]) for row in rows] == [(t, *s) for t in (16, 32) for s in sides]
    assert "TFLOP/s, off by" in capsys.readouterr().out

    command = ["", "--tokens", "16", "--experts", "8", "--works", "down", "gradient of down", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    hopper_kernels.main()
    assert [row["work"] for row in json.loads(path.read_text())["rows"]] == ["down", "gradient of down"]
