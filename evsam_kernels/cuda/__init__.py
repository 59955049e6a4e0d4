"""The CUDA kernels of csrc/cuda, compiled when the package was built, and launching them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evsam_kernels.cuda.driver import Driver, DriverError, Pointer
from evsam_kernels.simt import emulation
from evsam_kernels.simt.module import Module

__all__ = ["images", "launch"]

FOLDER = Path(__file__).parent / "images"


def images(source: str = "*") -> dict[str, Path]:
    """What was compiled of `csrc/cuda/<source>.cu`, or of all: files by name."""
    return {path.name: path for path in sorted(FOLDER.glob(f"{source}.*"))}


@functools.cache
def _module(source: str) -> Module:
    """The kernels for the executor."""
    return Module((FOLDER / f"{source}.ptx").read_text(encoding="utf-8"))


@functools.cache
def _driver() -> Driver:
    return Driver()


def image_for(source: str, capability: tuple[int, int]) -> Path:
    """The file that a GPU takes: machine code for it where there is some, else PTX.

    Machine code runs on compute capabilities with the same first number and at least the second.
    """
    major, minor = capability
    found = images(source)
    for lower in range(minor, -1, -1):
        cubin = found.get(f"{source}.sm_{major}{lower}.cubin")
        if cubin is not None:
            return cubin
    return found[f"{source}.ptx"]


def launch(
    source: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Sequence[tuple[str, Tensor | int | float | None]],
) -> None:
    """Launch a kernel of `csrc/cuda/<source>.cu` on PyTorch's current stream, or in the executor.

    Args:
        source: name of the file, without `.cu`.
        kernel: as the file has it, `extern "C"`.
        grid: number of blocks along x, y and z; nothing is done where one is 0.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        arguments: name and value of each parameter, in order: a dense tensor or None for a pointer,
            an int for 32 bits, a float for float32. All tensors are on the same device.

    Raises:
        evsam_kernels.cuda.driver.DriverError: there is no driver, the GPU is too old, or the driver
            refuses the kernel or the launch.
    """
    if 0 in grid:
        return
    emulated = emulation.current()
    if emulated is not None:
        values = [(name, 0 if value is None else value) for name, value in arguments]
        emulated.launch(_module(source), kernel, grid, threads, shared, values)
        return
    device = next(value.device for _, value in arguments if isinstance(value, Tensor))
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise DriverError(
            f"the CUDA kernels need a GPU of compute capability 8.0, {device} has "
            f"{capability[0]}.{capability[1]}; choose backend='triton' or 'reference'"
        )
    with torch.cuda.device(device):
        _driver().launch(
            device.index,
            image_for(source, capability),
            kernel,
            grid,
            threads,
            shared,
            torch.cuda.current_stream(device).cuda_stream,
            [_raw(value) for _, value in arguments],
        )


def _raw(value: Tensor | int | float | None) -> Pointer | int | float | None:
    return Pointer(value.data_ptr()) if isinstance(value, Tensor) else value
