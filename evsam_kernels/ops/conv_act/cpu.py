"""Launches the C++ kernel of `conv_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE, conv_output_size
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.native import (
    address,
    check_inputs,
    dense_residual,
    dtype_name,
    native,
    packed,
)
from evsam_kernels.ops.recording import launch

DTYPES = HALF_AND_SINGLE


def conv_act(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, k, k]
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """activation(conv(x) + bias) + residual, accumulated in float32.

    3x3 convolutions with stride 1 or 2 of 32, 64, ... channels go through a Winograd transform.

    Args:
        x: on the CPU, float16, bfloat16 or float32; any strides.
        weight, bias, residual: as in the formula, dtype of `x`.
        stride, dilation, groups, activation: as in the formula.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    check_inputs("conv_act", DTYPES, x, weight, bias, residual)
    batch, in_channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape

    def pack(weight: Tensor, bias: Tensor | None) -> Any:
        return native().pack_conv_act(
            weight=address(weight),
            bias=address(bias),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            groups=groups,
            dtype=dtype_name(weight),
        )

    x, residual = channels_last(x), dense_residual(residual)
    size = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, out_channels, *size))
    return launch(
        "conv_act",
        {"x": x, "residual": residual},
        y,
        packed=packed((weight, bias), (stride, dilation, groups), pack),
        batch=batch,
        height=height,
        width=width,
        activation=activation,
        num_threads=torch.get_num_threads(),
    )
