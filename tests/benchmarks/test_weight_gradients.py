"""The measurement of weights' gradients in JAX: what it compares, and that what is wrong is not timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import weight_gradients
from jaxmoe import reference
from kernels_pallas import grouped_matmul_grad_hopper as hopper


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU, with the reference for both kernels; nothing is timed."""

    def untimed(ways: Mapping[str, Callable[[], Any]], wait: Callable[[Any], Any], rounds: int) -> dict[str, float]:
        return {name: 0.001 * wait(way()).ndim for name, way in ways.items()}

    monkeypatch.setattr(weight_gradients, "grouped_outer", reference.grouped_outer)
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    monkeypatch.setattr(hopper, "grouped_outer", lambda a, b, sizes, **_: reference.grouped_outer(a, b, sizes))
    monkeypatch.setattr(weight_gradients, "in_turns", untimed)


def test_measure() -> None:
    """Few rows an expert, of which one has none; the tile that is taken is marked where there are rows enough."""
    found = weight_gradients.measure(3, 40, 256, 256)
    assert set(found) == {"triton", "hopper 128 x 256", "hopper 256 x 128"}
    assert all(way["us"] == 3.0 and way["off by"] < 0.01 for way in found.values())
    assert set(weight_gradients.ways(4096, 32, 256, 384)) == {"triton", "hopper 256 x 128 *"}


def test_other_gpus_have_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 0)
    assert set(weight_gradients.ways(4096, 32, 256, 256)) == {"triton"}


@pytest.mark.parametrize(
    ("why", "spoil"),
    [
        ("zeros", jnp.zeros_like),
        ("the next expert's", lambda right: jnp.roll(right, 1, axis=0)),
        ("one entry is not a number", lambda right: right.at[1, 2, 3].set(jnp.nan)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_gradients_are_not_timed(
    why: str, spoil: Callable[[jax.Array], jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "grouped_outer", lambda a, b, sizes, **_: spoil(reference.grouped_outer(a, b, sizes)))
    found = weight_gradients.measure(16, 8, 256, 256)
    assert found["triton"]["us"] == 3.0
    assert found["hopper 128 x 256"]["us"] is None


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(weight_gradients, "WIDTH", 256)
    monkeypatch.setattr(weight_gradients, "INNER", 128)
    monkeypatch.setattr(sys, "argv", ["", "--tokens", "16", "32", "--experts", "8", "--output", str(path)])
    weight_gradients.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["tokens"], row["left"], row["right"]) for row in rows] == [
        (tokens, *sides) for tokens in (16, 32) for sides in ((256, 256), (128, 256))
    ]
    assert "TFLOP/s, off by" in capsys.readouterr().out
