"""NVIDIA's driver, as far as loading modules and launching kernels go.

Its library comes with every NVIDIA GPU and is called with ctypes: neither the CUDA toolkit nor a
compiled extension is needed, and PyTorch's CUDA version does not matter.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "libcuda.so.1"

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_BY_DEFAULT = 48 << 10
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6  # CU_JIT_ERROR_LOG_BUFFER and its _SIZE_BYTES
_LOG_BYTES = 8192


class DriverError(RuntimeError):
    """The driver is missing or refuses something; the message says what, and what to do."""


class Pointer(int):
    """An address on the GPU, among arguments that are integers."""


class Driver:
    """The driver's library, and the modules that were loaded through it.

    Args:
        library: name or path of the shared library.

    Raises:
        DriverError: it cannot be loaded.
    """

    def __init__(self, library: str | Path = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
            self._error_string = self._library.cuGetErrorString
        except (OSError, AttributeError) as error:
            raise DriverError(
                f"NVIDIA's driver library {library} cannot be loaded ({error}); install the driver"
            ) from error
        self._functions: dict[tuple[int, Path, str], tuple[ctypes.c_void_p, int]] = {}
        self._modules: dict[tuple[int, Path], ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        device: int,
        image: Path,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: Sequence[Pointer | int | float | None],
    ) -> None:
        """Put a launch on a stream; does not wait for it.

        Args:
            device: number of the GPU, which is the thread's current one.
            image: PTX or machine code; loaded at the first launch on each device.
            kernel: its name in the image.
            grid: blocks along x, y and z.
            threads: of a block.
            shared: bytes of dynamic shared memory.
            stream: the driver's handle.
            arguments: a `Pointer`, or None for a null one, an int for 32 bits, a float for float32.

        Raises:
            DriverError: the driver refuses the image, the kernel or the launch.
        """
        self._enter(device)
        function = self._function(device, image, kernel, shared)
        values = [_c_value(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._call(
            f"launch {kernel} with {grid[0]} x {grid[1]} x {grid[2]} blocks of {threads} threads "
            f"and {shared} bytes of shared memory",
            "cuLaunchKernel",
            function,
            *(ctypes.c_uint(extent) for extent in (*grid, threads, 1, 1, shared)),
            ctypes.c_void_p(stream),
            addresses,
            None,
        )

    def _enter(self, device: int) -> None:
        """Make sure that the thread has a context: that which PyTorch uses, too."""
        context, handle = ctypes.c_void_p(), ctypes.c_int()
        self._call("tell its context", "cuCtxGetCurrent", ctypes.byref(context))
        if context.value:
            return
        purpose = f"enter device {device}"
        self._call(purpose, "cuDeviceGet", ctypes.byref(handle), device)
        self._call(purpose, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self._call(purpose, "cuCtxSetCurrent", context)

    def _function(self, device: int, image: Path, kernel: str, shared: int) -> ctypes.c_void_p:
        """The kernel on a device, allowed as much shared memory as it needs."""
        key = (device, image, kernel)
        with self._lock:
            function, allowed = self._functions.get(key, (None, _SHARED_BY_DEFAULT))
            if function is None:
                function = ctypes.c_void_p()
                self._call(
                    f"find {kernel} in {image.name}",
                    "cuModuleGetFunction",
                    ctypes.byref(function),
                    self._module(device, image),
                    kernel.encode(),
                )
            if shared > allowed:
                self._call(
                    f"give {kernel} {shared} bytes of shared memory",
                    "cuFuncSetAttribute",
                    function,
                    _MAX_DYNAMIC_SHARED,
                    shared,
                )
                allowed = shared
            self._functions[key] = function, allowed
            return function

    def _module(self, device: int, image: Path) -> ctypes.c_void_p:
        module = self._modules.get((device, image))
        if module is not None:
            return module
        module = ctypes.c_void_p()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        # Values are as wide as pointers, whatever they are.
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        self._call(
            f"load {image.name}",
            "cuModuleLoadDataEx",
            ctypes.byref(module),
            image.read_bytes() + b"\0",
            2,
            options,
            values,
            log=log,
        )
        self._modules[device, image] = module
        return module

    def _call(
        self,
        purpose: str,
        function: str,
        *arguments: object,
        log: ctypes.Array[ctypes.c_char] | None = None,
    ) -> None:
        status = getattr(self._library, function)(*arguments)
        if status == 0:
            return
        message = ctypes.c_char_p()
        self._error_string(status, ctypes.byref(message))
        said = (message.value or b"an unknown error").decode(errors="replace")
        details = log.value.decode(errors="replace").strip() if log is not None else ""
        raise DriverError(
            f"NVIDIA's driver cannot {purpose}: {said} (error {status})"
            + (f": {details}" if details else "")
            + "; choose backend='triton', or update the driver where it is older than the GPU needs"
        )


def _c_value(argument: Pointer | int | float | None) -> ctypes._SimpleCData[int | float | None]:
    if argument is None or isinstance(argument, Pointer):
        return ctypes.c_void_p(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if not -(1 << 31) <= argument < 1 << 31:
        raise ValueError(f"a kernel's integers have 32 bits, got {argument}")
    return ctypes.c_int32(argument)
