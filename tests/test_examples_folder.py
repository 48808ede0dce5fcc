"""The programs in examples/ run, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.devices import run_on_cpus

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> Any:
    """What `main` of an example returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "nnx_block",
        "functional",
        "torch_module",
        "expert_parallel",
    }


def test_nnx_block() -> None:
    """The loss falls well below that of a guess, and the bias has moved by steps of its rate."""
    losses, bias, load = run("nnx_block")
    assert abs(losses[0] - np.log(16)) < 1.0
    assert np.mean(losses[-5:]) < losses[0] - 0.5
    steps = np.asarray(bias) / 0.001
    np.testing.assert_allclose(steps, np.round(steps), atol=0.01)
    assert np.abs(steps).max() >= 1
    assert int(load.sum()) == 16 * 16 * 3


def test_functional() -> None:
    """The loss falls; every buffer of the step before was donated."""
    losses, params, given = run("functional")
    assert losses[-1] < 0.7 * losses[0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert np.abs(params.bias).max() >= 0.001


APART = """
import runpy, sys
import jax, numpy as np
apart, alone = runpy.run_path(sys.argv[1])["main"]()
for got, want in zip(*map(jax.tree.leaves, (apart, alone)), strict=True):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)
    assert scale == 0 or np.abs(np.roll(want, 1, axis=0) - want).max() > 0.01 * scale
print("devices of the gradient:", len(apart[2][0].gate_up.devices()))
"""


@pytest.mark.parametrize("devices", [1, 4])
def test_expert_parallel(devices: int) -> None:
    """The output, the load and every gradient, of experts that lie apart and of all in one place."""
    printed = run_on_cpus(devices, APART, str(EXAMPLES / "expert_parallel.py"))
    assert f"devices of the gradient: {devices}\n" in printed


def test_torch_module() -> None:
    """The same output and gradients, as no zeros nor another expert's would be."""
    pytest.importorskip("torch", reason="needs the torch package")
    before, after = run("torch_module")
    assert before.keys() == after.keys() == {"y", "x", "router", "gate_up", "down"}
    for name, want in before.items():
        scale = float(want.abs().max())
        np.testing.assert_allclose(after[name].cpu(), want.cpu(), rtol=0, atol=2e-5 * scale, err_msg=name)
        for wrong in (0 * want, want.roll(1, dims=0)):
            assert float((wrong - want).abs().max()) > 1e-2 * scale
