"""What is asked of the CUDA driver: the functions of libcuda.so.1, by name, without a link to it.

ctypes and not an extension module: that would be one more thing to build, and a wheel made without
a C++ compiler could not launch. The arguments of a launch are packed by one call of `struct`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libcuda.so.1"
OLDEST = (8, 0)
"""Compute capability that the PTX is for."""

# From cuda.h, where these are part of the driver's binary interface.
_NO_DEVICE = 100
_NO_IMAGE_FOR_DEVICE = 209
_MAJOR, _MINOR = 75, 76
_MAX_DYNAMIC_SHARED = 8
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_PARAMETERS_END, _PARAMETERS, _PARAMETERS_BYTES = 0, 1, 2
_CAPTURE_RELAXED = 2
_LOG_BYTES = 8192
_UNASKED_SHARED = 48 * 1024
"""Dynamic shared memory that a kernel gets without having asked for more."""

_UPDATE = "update the NVIDIA driver"


class CudaDriverError(RuntimeError):
    """The CUDA driver is missing or refuses something; the message says what, and what to do."""


class Image(NamedTuple):
    """What a driver can load: a cubin, or PTX where `arch` is None.

    Attributes:
        path: of the file.
        arch: compute capability that a cubin is for, 86 for 8.6; it runs on that and on later ones
            with the same first digit.
    """

    path: Path
    arch: int | None


class Function(NamedTuple):
    """A kernel on a device.

    Attributes:
        name: as the source has it.
        handle: the driver's.
        context: the one it was loaded in.
    """

    name: str
    handle: int
    context: int


def suitable(images: Sequence[Image], capability: tuple[int, int]) -> list[Image]:
    """The images worth trying on a device: the closest cubin first, PTX last."""
    major, minor = capability
    cubins = [
        image
        for image in images
        if image.arch is not None and image.arch // 10 == major and image.arch % 10 <= minor
    ]
    cubins.sort(key=lambda image: image.arch or 0, reverse=True)
    return [*cubins[:1], *(image for image in images if image.arch is None)]


class Driver:
    """A loaded driver, and what was loaded into its devices. Threads may share it.

    Args:
        library: name or path of the shared library.

    Raises:
        CudaDriverError: it cannot be loaded, lacks a function, or finds no device.
    """

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
            self._launch = self._library.cuLaunchKernel
            self._push = self._library.cuCtxPushCurrent_v2
            self._pop = self._library.cuCtxPopCurrent_v2
        except (OSError, AttributeError) as error:
            raise CudaDriverError(
                f"the CUDA driver cannot be used: {error}; install the NVIDIA driver, in a "
                "container start it with the NVIDIA runtime"
            ) from None
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        self._launch.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]
        self._push.argtypes = [pointer]
        self._popped = ctypes.c_void_p()
        self._lock = threading.RLock()
        self._contexts: dict[int, int] = {}
        self._functions: dict[tuple[int, str, str], Function] = {}
        self._modules: dict[tuple[int, str], ctypes.c_void_p] = {}
        self._shared: dict[int, int] = {}
        self._call("cuInit", 0, doing="start the CUDA driver", remedy="nvidia-smi tells more")

    def capability(self, device: int) -> tuple[int, int]:
        """Compute capability of a device."""
        handle, values = self._device(device), []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._call(
                *("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle),
                doing=f"ask what device {device} is",
            )
            values.append(value.value)
        return values[0], values[1]

    def function(
        self, device: int, source: str, name: str, images: Callable[[], Sequence[Image]]
    ) -> Function:
        """The kernel `name` of a source, loaded into the device's primary context when first asked.

        Args:
            device: its number, as PyTorch counts.
            source: what its images are kept under.
            name: of the kernel.
            images: finds the source's images.

        Raises:
            CudaDriverError: the device is too old, the driver refuses every image, or there is no
                such kernel in it.
        """
        function = self._functions.get((device, source, name))
        if function is not None:
            return function
        with self._lock:
            context = self._context(device)
            with self._current(context):
                module = self._modules.get((device, source))
                if module is None:
                    module = self._load(device, images())
                    self._modules[device, source] = module
                handle = ctypes.c_void_p()
                self._call(
                    *("cuModuleGetFunction", ctypes.byref(handle), module, name.encode()),
                    doing=f"find the kernel {name} in {source}",
                    remedy="reinstall evsam-kernels: its images are of other sources",
                )
            function = Function(name, handle.value or 0, context)
            self._functions[device, source, name] = function
        return function

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        parameters: bytes,
    ) -> None:
        """Launch a kernel; returns before it has run.

        Args:
            function: the kernel.
            grid: number of blocks along x, y and z.
            threads: of a block.
            shared: bytes of dynamic shared memory of a block.
            stream: handle of the stream.
            parameters: as the kernel finds them in memory, aligned as in C.

        Raises:
            CudaDriverError: the driver refuses.
        """
        size = ctypes.c_size_t(len(parameters))
        extra = (ctypes.c_void_p * 5)(
            _PARAMETERS,
            ctypes.cast(ctypes.c_char_p(parameters), ctypes.c_void_p),
            _PARAMETERS_BYTES,
            ctypes.addressof(size),
            _PARAMETERS_END,
        )
        what = f"launch {function.name}, grid {grid}, {threads} threads, {shared} bytes shared"
        with self._current(function.context):
            if shared > _UNASKED_SHARED and shared > self._shared.get(function.handle, 0):
                with self._lock:
                    self._call(
                        "cuFuncSetAttribute",
                        *(ctypes.c_void_p(function.handle), _MAX_DYNAMIC_SHARED, shared),
                        doing=what,
                        remedy="this GPU has less shared memory: choose backend='triton'",
                    )
                    self._shared[function.handle] = shared
            status = self._launch(
                function.handle, *grid, threads, 1, 1, shared, stream, None, extra
            )
        if status:
            raise self._error(
                status, what, "choose another backend, and report this as a defect with this line"
            )

    @contextmanager
    def _current(self, context: int) -> Iterator[None]:
        """Have calls of this thread go to `context`, whatever device PyTorch has chosen."""
        status = self._push(context)
        if status:
            raise self._error(status, "enter the context of PyTorch", _UPDATE)
        try:
            yield
        finally:
            self._pop(ctypes.byref(self._popped))

    def _load(self, device: int, images: Sequence[Image]) -> ctypes.c_void_p:
        """Load the first image that the device takes."""
        capability = self.capability(device)
        if capability < OLDEST:
            raise CudaDriverError(
                f"device {device} has compute capability {capability[0]}.{capability[1]}, the CUDA "
                f"kernels need {OLDEST[0]}.{OLDEST[1]}; choose backend='reference'"
            )
        candidates = suitable(images, capability)
        module = ctypes.c_void_p()
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        # A first use may come while a CUDA graph is captured, which loading has no part in.
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            for image in candidates:
                log = ctypes.create_string_buffer(_LOG_BYTES)
                status = self._library.cuModuleLoadDataEx(
                    ctypes.byref(module),
                    ctypes.c_char_p(image.path.read_bytes()),
                    2,
                    (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES),
                    (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES),
                )
                if status != _NO_IMAGE_FOR_DEVICE:
                    break
        finally:
            self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        if status:
            said = log.value.decode(errors="replace").strip()
            what = f"load {image.path.name} into device {device}" + (said and f" ({said})")
            raise self._error(status, what, _UPDATE)
        return module

    def _device(self, device: int) -> ctypes.c_int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device, doing=f"find device {device}")
        return handle

    def _context(self, device: int) -> int:
        """The primary context of a device, which is PyTorch's; kept for good, as PyTorch does."""
        if device not in self._contexts:
            context = ctypes.c_void_p()
            self._call(
                *("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(device)),
                doing=f"enter device {device}",
            )
            self._contexts[device] = context.value or 0
        return self._contexts[device]

    def _call(
        self, name: str, *arguments: object, doing: str, remedy: str = "nvidia-smi tells more"
    ) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise self._error(status, doing, remedy)

    def _error(self, status: int, doing: str, remedy: str) -> CudaDriverError:
        said = []
        for ask in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            if ask(status, ctypes.byref(text)) == 0 and text.value:
                said.append(text.value.decode())
        return CudaDriverError(f"cannot {doing}: {': '.join(said) or status}; {remedy}")


_loading = threading.Lock()


@functools.cache
def _loaded(library: str) -> Driver:
    return Driver(library)


def installed() -> Driver:
    """The driver of this machine, loaded when first needed.

    Raises:
        CudaDriverError: there is none that works.
    """
    with _loading:
        return _loaded(LIBRARY)
