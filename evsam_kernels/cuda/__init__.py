"""The CUDA kernels of csrc/cuda: their images, and launching them on a GPU or in the executor."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evsam_kernels.backends import build_info
from evsam_kernels.cuda.driver import CudaDriverError, Image, installed
from evsam_kernels.simt import emulation
from evsam_kernels.simt.module import Module

__all__ = ["CudaDriverError", "launch"]

IMAGES = Path(__file__).resolve().parent / "images"
_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_CUBIN = re.compile(r"\.sm_(\d+)\.cubin")


def images(source: str) -> list[Image]:
    """What setup.py made of a source.

    Raises:
        CudaDriverError: nothing.
    """
    found = [
        Image(path, int(match[1]) if (match := _CUBIN.search(path.name)) else None)
        for path in sorted(IMAGES.glob(f"{source}.*"))
    ]
    if not found:
        built = build_info.read()
        reason = built.cuda_reason or f"there is no {source}.ptx in {IMAGES}"
        raise CudaDriverError(
            f"the CUDA kernels were not built ({reason}); reinstall with EVSAM_BUILD_CUDA=1"
        )
    return found


@functools.cache
def _module(source: str) -> Module:
    """The shipped PTX, for the executor, whose reports show the sources where these are at hand."""
    (ptx,) = (image.path for image in images(source) if image.arch is None)
    sources = {path.name: path.read_text(encoding="utf-8") for path in _SOURCES.glob("*.cu*")}
    return Module(ptx.read_text(encoding="utf-8"), sources=sources)


def launch(
    source: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Sequence[tuple[str, Tensor | int | float | None]],
) -> None:
    """Launch a kernel of `csrc/cuda/<source>.cu`, on PyTorch's current stream.

    Nothing waits for it, and CUDA graphs capture it. Where `simt.emulate` is in force it runs in
    the executor.

    Args:
        source: name of the file, without `.cu`.
        kernel: as the file has it, `extern "C"`.
        grid: number of blocks along x, y and z; nothing is done where one is 0.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        arguments: name and value of each parameter, in order: a dense tensor or None for a pointer,
            an int for 32 bits, a float for float32. Tensors are on one device.

    Raises:
        CudaDriverError: there is no image or no driver, or the driver refuses.
        FaultError: from the executor, where the kernel is at fault.
        ValueError: tensors are on several devices.
    """
    emulated = emulation.current()
    if emulated is not None:
        values = [(name, 0 if value is None else value) for name, value in arguments]
        emulated.launch(_module(source), kernel, grid, threads, shared, values)
        return
    if 0 in grid:
        return
    device = _device(kernel, arguments)
    driver = installed()
    function = driver.function(device, source, kernel, lambda: images(source))
    stream = torch.cuda.current_stream(device).cuda_stream
    driver.launch(function, grid, threads, shared, stream, _parameters(arguments))


def _device(kernel: str, arguments: Sequence[tuple[str, Tensor | int | float | None]]) -> int:
    """Number of the device that all tensors are on."""
    devices = {name: value.get_device() for name, value in arguments if isinstance(value, Tensor)}
    if len(set(devices.values())) != 1:
        raise ValueError(f"the tensors of {kernel} must be on one device, they are on {devices}")
    return next(iter(devices.values()))


def _parameters(arguments: Sequence[tuple[str, Tensor | int | float | None]]) -> bytes:
    """The arguments as a kernel finds them in memory, aligned as in C."""
    kinds = "@"
    values: list[int | float] = []
    for _, value in arguments:
        if value is None or isinstance(value, Tensor):
            kinds += "P"
            values.append(0 if value is None else value.data_ptr())
        else:
            kinds += "f" if isinstance(value, float) else "i"
            values.append(value)
    return struct.pack(kinds, *values)
