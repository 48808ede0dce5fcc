"""What the driver is given at a launch, read as C lays it out."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from typing import Any

import pytest
import torch

from bridge.native import driver
from kernels_pallas.targets import Binary

pytest.importorskip("triton")


class FakeDriver:
    """A driver that reads what a real one would read at a launch."""

    def __init__(self, hip: bool) -> None:
        self.hip, self.seen, self.failing = hip, [], []
        self.attributes: list[Any] = []  # of each launch
        pointer, number, status = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
        cuda = ctypes.CFUNCTYPE(status, pointer, pointer, pointer, pointer)
        amd = ctypes.CFUNCTYPE(status, pointer, *[number] * 7, pointer, pointer, pointer)
        self.launch = amd(self.launch_hip) if hip else cuda(self.launch_cuda)

    def load(self, binary: Binary) -> ctypes.c_void_p:
        return ctypes.c_void_p(0xF00)

    def enter(self, device: int) -> None:
        self.seen.append("enter")

    def arguments(self, extra: int, end: int) -> bytes:
        kind, memory, size_kind, size, last = (ctypes.c_void_p * 5).from_address(extra)
        assert (kind, size_kind, last or 0) == (1, 2, end)
        return ctypes.string_at(memory, ctypes.c_size_t.from_address(size).value)

    def launch_cuda(self, config: int, function: int, parameters: int | None, extra: int) -> int:
        *sizes, stream, attributes, count = struct.unpack("@7I4xQQI4x", ctypes.string_at(config, 56))
        assert (function, parameters) == (0xF00, None)
        self.attributes.append(ctypes.string_at(attributes, 72 * count) if count else attributes)
        self.seen.append((*sizes, stream, self.arguments(extra, 0)))
        return self.failing.pop() if self.failing else 0

    def launch_hip(self, function: int, *rest: Any) -> int:
        *sizes, stream, parameters, extra = rest
        assert (function, parameters) == (0xF00, None)
        self.seen.append((*sizes, stream, self.arguments(extra, 3)))
        return self.failing.pop() if self.failing else 0

    def check(self, status: int, what: str) -> None:
        raise RuntimeError(f"{what}: {status}")


@pytest.mark.parametrize("hip", [False, True], ids=["cuda", "rocm"])
def test_what_the_driver_is_given(hip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, block, shared memory, stream and arguments, laid out as C does; what triton adds is null."""
    fake = FakeDriver(hip)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_device", lambda: 0)
    monkeypatch.setattr(driver, "_raw_stream", lambda device: 0xABCDEF0123)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    kernel = driver.Kernel(Binary("k", b"", 128, 4096, "QiiQ", "QiiQQ", ("a", "b")), 0)
    dependent = driver.Kernel(Binary("k", b"", 32, 0, "Q", "Q", (), dependent=True), 0)
    dependent(2, 1, 0x7F0000000010)
    assert fake.seen.pop()[:8] == (2, 1, 1, 32, 1, 1, 0, 0xABCDEF0123)
    if not hip:
        assert fake.attributes.pop() == struct.pack("@IIII56x", 6, 0, 1, 0), "programmatic stream serialization"
    fake.seen.pop()
    noted: list[Any] = []
    monkeypatch.setattr(driver, "observers", [lambda *launch: noted.append(launch)])
    kernel(7, 3, 0x7F0000000010, 5, 2**31 - 1, 0x7F0000000020)
    kernel(1, 1, 1, 2, 3, 4)
    first, second = fake.seen[1:]
    assert first[:8] == (7, 3, 1, 128, 1, 1, 4096, 0xABCDEF0123)
    assert first[8] == struct.pack("@QiiQQ", 0x7F0000000010, 5, 2**31 - 1, 0x7F0000000020, 0)
    assert second[8] == struct.pack("@QiiQQ", 1, 2, 3, 4, 0)
    assert noted == [("k", (7, 3)), ("k", (1, 1))]
    assert not any(fake.attributes), "none for a kernel that does not wait"
    fake.failing = [0, 201] if not hip else []
    kernel(1, 1, 1, 2, 3, 4)
    assert ("enter" in fake.seen[3:]) == (not hip), "a thread without a context gets one"
    fake.failing = [1]
    with pytest.raises(RuntimeError, match="launching k on a grid of 9 by 2: 1"):
        kernel(9, 2, 1, 2, 3, 4)
    with pytest.raises(struct.error):
        kernel(1, 1, 1, 2, 3)
