"""The memory layout every operation takes and returns: dense NHWC behind logical NCHW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evsam_kernels.simt.emulation import unwritten


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Element strides of a dense NHWC tensor whose logical shape is `[B, C, H, W]`."""
    _, channels, height, width = shape
    return (height * width * channels, 1, width * channels, channels)


def empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised dense NHWC tensor `[B, C, H, W]` with the dtype and device of `like`."""
    return unwritten(like.new_empty_strided(tuple(shape), channels_last_strides(shape)))


def channels_last(x: Tensor) -> Tensor:
    """Return `x` `[B, C, H, W]` in dense NHWC, copying only where its strides differ.

    `Tensor.contiguous(memory_format=torch.channels_last)` leaves the strides of dimensions of size
    one as they are; kernels and fake tensors need them exact.
    """
    if x.stride() == channels_last_strides(x.shape):
        return x
    return x.new_empty_strided(x.shape, channels_last_strides(x.shape)).copy_(x)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operation on `dtype` accumulates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
