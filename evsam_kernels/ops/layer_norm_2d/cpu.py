"""Launches the C++ kernel of `layer_norm_2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from evsam_kernels.ops.checks import FLOATING_DTYPES
from evsam_kernels.ops.layout import accumulation_dtype, channels_last, empty_channels_last
from evsam_kernels.ops.native import check_inputs, dtype_name
from evsam_kernels.ops.recording import launch

DTYPES = FLOATING_DTYPES


def layer_norm_2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
) -> Tensor:  # [B, C, H, W]
    """LayerNorm over the channels of every pixel; statistics in float32, or float64 for float64.

    Args:
        x: `[B, C, H, W]` on the CPU, float16, bfloat16, float32 or float64; any strides.
        weight: `[C]`, dtype of `x` or float32; or None.
        bias: `[C]`, dtype of `x` or float32; or None.
        eps: added to the variance.

    Returns:
        `[B, C, H, W]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    check_inputs("layer_norm_2d", DTYPES, x, weight, bias)
    batch, channels, height, width = x.shape
    x = channels_last(x)
    y = empty_channels_last(x, x.shape)
    # The converted vectors must stay alive until the kernel has read them.
    affine = [
        None if vector is None else vector.to(accumulation_dtype(x.dtype)).contiguous()
        for vector in (weight, bias)
    ]
    return launch(
        "layer_norm_2d",
        {"x": x},
        y,
        weight=affine[0],
        bias=affine[1],
        rows=batch * height * width,
        channels=channels,
        eps=eps,
        dtype=dtype_name(x),
        num_threads=torch.get_num_threads(),
    )
