"""Launches the C++ kernel of `upsample_add`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.native import check_inputs, dtype_name
from evsam_kernels.ops.recording import Maps, launch

DTYPES = HALF_AND_SINGLE


def upsample_add(
    maps: Sequence[Tensor],  # each [B, C, h, w]
    height: int,
    width: int,
) -> Tensor:  # [B, C, height, width]
    """Sum of the maps after bicubic resizing, in float32.

    Args:
        maps: on the CPU, float16, bfloat16 or float32, all of one dtype; any strides.
        height, width: of the result.

    Returns:
        `[B, C, height, width]` in `torch.channels_last`, dtype of the maps.

    Raises:
        TypeError: the maps have a dtype without a kernel.
        ValueError: a map is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    check_inputs("upsample_add", DTYPES, *maps)
    dense = [channels_last(x) for x in maps]
    batch, channels = dense[0].shape[:2]
    y = empty_channels_last(dense[0], (batch, channels, height, width))
    return launch(
        "upsample_add",
        {"maps": Maps(dense)},
        y,
        sizes=[(x.shape[2], x.shape[3]) for x in dense],
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        dtype=dtype_name(dense[0]),
        num_threads=torch.get_num_threads(),
    )
