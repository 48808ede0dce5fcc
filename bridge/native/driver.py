"""The CUDA and HIP driver: loading machine code and launching it on torch's current stream.

Through ctypes, and nothing of triton's run time: its launchers are made by a C compiler at first use. A launch packs
the arguments into the kernel's own buffer and makes one call. Tried with CUDA 13; on ROCm never run.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import torch

from kernels_pallas.targets import Binary

# The fastest ways to ask, and private: torch.cuda.current_stream makes an object for every call.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_MAX_DYNAMIC_SHARED = 8
_DEFAULT_SHARED = 48 * 1024  # more must be asked for on CUDA
_NO_CONTEXT = 201  # a thread's first CUDA call
_RELAXED = 2

# Called with the kernel's name and grid at every launch: see `jaxmoe audit`.
observers: list[Callable[[str, tuple[int, int]], None]] = []

# How a launch lies in memory: the grid, the block and the shared memory as CUDA's launch configuration begins, then
# the stream and attributes, one or none; then the kernel's arguments.
_LAUNCH = "7I4xQQI4x"
# CUDA's attribute "programmatic stream serialization", allowed: what `targets.Lowered.waiting` makes kernels for.
_DEPENDENT = ctypes.create_string_buffer(struct.pack("@I4xI60x", 6, 1))
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2  # the same numbers in CUDA and HIP, but for where the list ends


class Driver:
    """The functions that are called, with their argument types."""

    def __init__(self, hip: bool) -> None:
        self.hip = hip
        self._library = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")
        self._load = self._function("hipModuleLoadData", "cuModuleLoadData", c_void_p, c_char_p)
        self._get = self._function("hipModuleGetFunction", "cuModuleGetFunction", c_void_p, c_void_p, c_char_p)
        self._capture_mode = self._function(
            "hipThreadExchangeStreamCaptureMode", "cuThreadExchangeStreamCaptureMode", c_void_p
        )
        # CUDA's takes everything by address; HIP has that too, but only since ROCm 6.4.
        self.launch = self._library.hipModuleLaunchKernel if hip else self._library.cuLaunchKernelEx

    def _function(self, hip: str, cuda: str, *types: Any) -> Any:
        function = getattr(self._library, hip if self.hip else cuda)
        function.argtypes, function.restype = types, c_int
        return function

    def check(self, status: int, what: str) -> None:
        """Raises RuntimeError unless the driver said that all is well."""
        if status == 0:
            return
        if self.hip:
            self._library.hipGetErrorString.restype = c_char_p
            message = self._library.hipGetErrorString(status)
        else:
            text = c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            message = text.value
        raise RuntimeError(f"{what}: {'HIP' if self.hip else 'CUDA'} error {status}: {(message or b'?').decode()}")

    def enter(self, device: int) -> None:
        """Makes the device's context, the one torch uses, this thread's; a thread that has done nothing has none."""
        if self.hip:
            return
        handle, context = c_int(), c_void_p()
        self.check(self._library.cuDeviceGet(byref(handle), c_int(device)), f"device {device}")
        self.check(self._library.cuDevicePrimaryCtxRetain(byref(context), handle), f"the context of device {device}")
        self.check(self._library.cuCtxSetCurrent(context), f"the context of device {device}")

    def load(self, binary: Binary) -> c_void_p:
        """The function, on the current device. Its code stays loaded as long as the process lives."""
        module, function = c_void_p(), c_void_p()
        mode = c_int(_RELAXED)  # loading is allowed while a graph is captured, but not by default
        self._capture_mode(byref(mode))
        try:
            self.check(self._load(byref(module), binary.code), f"loading {binary.name}")
            self.check(self._get(byref(function), module, binary.name.encode()), f"finding {binary.name}")
            if binary.shared_bytes > _DEFAULT_SHARED and not self.hip:
                allow = self._library.cuFuncSetAttribute
                allow.argtypes = [c_void_p, c_int, c_int]
                self.check(allow(function, _MAX_DYNAMIC_SHARED, binary.shared_bytes), f"memory for {binary.name}")
        finally:
            self._capture_mode(byref(mode))
        return function


@functools.cache
def driver() -> Driver:
    """The driver that torch was built for."""
    return Driver(torch.version.hip is not None)


class Kernel:
    """A kernel on one device; calling it launches it."""

    def __init__(self, binary: Binary, device: int) -> None:
        self.name, self.device, self._driver = binary.name, device, driver()
        with torch.cuda.device(device):
            self._driver.enter(device)
            self._function = self._driver.load(binary)
        self._block = (1, binary.threads, 1, 1, binary.shared_bytes)
        layout, whole = struct.Struct("@" + _LAUNCH + binary.own), struct.Struct("@" + _LAUNCH + binary.arguments)
        first, size = struct.calcsize("@" + _LAUNCH), whole.size - struct.calcsize("@" + _LAUNCH)
        self._pack_into = layout.pack_into
        self._memory = ctypes.create_string_buffer(whole.size)  # what follows the kernel's own arguments stays null
        self._size = c_size_t(size)
        start, end = ctypes.addressof(self._memory), 3 if self._driver.hip else 0
        self._extra = (c_void_p * 5)(_BUFFER_POINTER, start + first, _BUFFER_SIZE, ctypes.addressof(self._size), end)
        launch, extra = self._driver.launch, c_void_p(ctypes.addressof(self._extra))
        cuda = functools.partial(launch, c_void_p(start), self._function, None, extra)
        self._launch: Callable[[], int] = self._launch_hip if self._driver.hip else cuda
        self._attributes = (ctypes.addressof(_DEPENDENT), 1) if binary.dependent else (0, 0)
        self._lock = threading.Lock()  # of the memory, which the driver reads before it returns

    def __call__(self, x: int, y: int, *arguments: int) -> None:
        """Launches x by y programs on torch's current stream of the kernel's device.

        Args:
          x: the grid's first side, not 0.
          y: its second.
          arguments: addresses and numbers, in the order of the kernel's own.
        """
        device = self.device
        if _current_device() != device:
            with torch.cuda.device(device):
                return self(x, y, *arguments)
        if observers:
            for observe in observers:
                observe(self.name, (x, y))
        with self._lock:
            self._pack_into(self._memory, 0, x, y, *self._block, _raw_stream(device), *self._attributes, *arguments)
            status = self._launch()
            if status == _NO_CONTEXT:
                self._driver.enter(device)
                status = self._launch()
        if status:
            self._driver.check(status, f"launching {self.name} on a grid of {x} by {y}")
        return None

    def _launch_hip(self) -> int:
        x, y, z, *block, shared, stream, _, _ = struct.unpack_from("@" + _LAUNCH, self._memory)
        numbers = map(c_uint, (x, y, z, *block, shared))
        return self._driver.launch(self._function, *numbers, c_void_p(stream), None, self._extra)
