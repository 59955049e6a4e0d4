"""The CUDA kernels of csrc/cuda: their PTX, and launching them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from evsam_kernels.simt import compile_cuda, emulation
from evsam_kernels.simt.module import Module

__all__ = ["launch"]

_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@functools.cache
def _module(source: str) -> Module:
    return compile_cuda(_SOURCES / f"{source}.cu", options=["-std=c++20"])


def launch(
    source: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Sequence[tuple[str, Tensor | int | float | None]],
) -> None:
    """Launch a kernel of `csrc/cuda/<source>.cu`.

    Args:
        source: name of the file, without `.cu`.
        kernel: as the file has it, `extern "C"`.
        grid: number of blocks along x, y and z; nothing is done where one is 0.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        arguments: name and value of each parameter, in order: a dense tensor or None for a pointer,
            an int for 32 bits, a float for float32.
    """
    emulated = emulation.current()
    assert emulated is not None
    values = [(name, 0 if value is None else value) for name, value in arguments]
    emulated.launch(_module(source), kernel, grid, threads, shared, values)
