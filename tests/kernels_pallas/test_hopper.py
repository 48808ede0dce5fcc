"""Which GPUs have the kernels for Hopper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from kernels_pallas import hopper


def replaced(namespace: SimpleNamespace, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(namespace), **values})


H100 = SimpleNamespace(core_count=132, compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("why", "devices", "version", "count"),
    [
        ("one", [H100], (0, 11, 2), 132),
        ("two, of which one has fewer", [H100, replaced(H100, core_count=114)], (0, 12, 0), 114),
        ("old jax", [H100], (0, 10, 2), 0),
        ("another GPU beside it", [H100, replaced(H100, compute_capability="8.0")], (0, 12, 0), 0),
        ("nobody says how many", [SimpleNamespace(compute_capability="9.0", device_kind="")], (0, 12, 0), 0),
        ("no GPU", None, (0, 12, 0), 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multiprocessors(
    why: str, devices: list[Any] | None, version: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local_devices(backend: str) -> list[Any]:
        if devices is None:
            raise RuntimeError(f"Unknown backend {backend}")
        return devices

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert hopper.multiprocessors() == count


@pytest.mark.parametrize(("kind", "count"), [(H100.device_kind, 132), ("NVIDIA A100-SXM4-80GB", 0)])
def test_multiprocessors_of_a_device_that_is_described(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda backend: [H100])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="cuda", num_cores=None)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert hopper.multiprocessors() == count


def test_multiprocessors_of_this_machine() -> None:
    gpus = jax.local_devices() if jax.default_backend() == "gpu" else []
    expected = bool(gpus) and gpus[0].compute_capability == "9.0" and jax.__version_info__ >= hopper.OLDEST_JAX
    assert bool(hopper.multiprocessors()) == expected
