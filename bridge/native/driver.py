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

# The fastest way to ask, and private: torch.cuda.current_stream makes an object for every call.
_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)

_BUFFER_POINTER, _BUFFER_SIZE = 1, 2  # the same numbers in CUDA and HIP, but for where the list ends
_MAX_DYNAMIC_SHARED = 8
_DEFAULT_SHARED = 48 * 1024  # more must be asked for on CUDA
_NO_CONTEXT = 201  # a thread's first CUDA call
_RELAXED = 2

# Called with the kernel's name and grid at every launch: see `jaxmoe audit`.
observers: list[Callable[[str, tuple[int, int]], None]] = []


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
        self.launch = self._function(
            "hipModuleLaunchKernel", "cuLaunchKernel", c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p
        )

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
        self._launch, self._threads, self._shared = self._driver.launch, binary.threads, binary.shared_bytes
        layout = struct.Struct("@" + binary.arguments.replace("P", "Q"))
        self._null = (0,) * (len(binary.arguments) - len(binary.arguments.rstrip("P")))
        self._count = len(binary.arguments)
        self._pack_into = layout.pack_into
        self._buffer = ctypes.create_string_buffer(layout.size)
        self._size = c_size_t(layout.size)
        end = 3 if self._driver.hip else 0
        self._extra = (c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(self._buffer), _BUFFER_SIZE, ctypes.addressof(self._size), end
        )
        self._lock = threading.Lock()  # of the buffer, which the driver reads before it returns

    def __call__(self, x: int, y: int, *arguments: int) -> None:
        """Launches x by y programs on torch's current stream of the kernel's device.

        Args:
          x: the grid's first side, not 0.
          y: its second.
          arguments: addresses and numbers, in the order of the kernel's own.
        """
        device = self.device
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                return self(x, y, *arguments)
        for observe in observers:
            observe(self.name, (x, y))
        missing = self._count - len(arguments)
        if missing:
            arguments += self._null[:missing]
        with self._lock:
            self._pack_into(self._buffer, 0, *arguments)
            status = self._launch(
                self._function, x, y, 1, self._threads, 1, 1, self._shared, _raw_stream(device), None, self._extra
            )
            if status == _NO_CONTEXT and not self._driver.hip:
                self._driver.enter(device)
                status = self._launch(
                    self._function, x, y, 1, self._threads, 1, 1, self._shared, _raw_stream(device), None, self._extra
                )
        if status:
            self._driver.check(status, f"launching {self.name} on a grid of {x} by {y}")
        return None
