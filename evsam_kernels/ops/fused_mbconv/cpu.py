"""Launches the C++ kernel of `fused_mbconv`."""

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
    large_maps,
    native,
    packed,
)
from evsam_kernels.ops.recording import launch

DTYPES = HALF_AND_SINGLE


def fused_mbconv(
    x: Tensor,  # [B, C_in, H, W]
    spatial_weight: Tensor,  # [C_mid, C_in, k, k]
    spatial_bias: Tensor | None,  # [C_mid]
    point_weight: Tensor,  # [C_out, C_mid, 1, 1]
    point_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """conv1x1(activation(conv(x) + bias)) + bias + residual, accumulated in float32.

    3x3 convolutions with stride 1 or 2 of 32, 64, ... channels go through a Winograd transform.
    The expanded tensor is float32, or bfloat16 for bfloat16 where the CPU multiplies that.

    Args:
        x: on the CPU, float16, bfloat16 or float32; any strides.
        spatial_weight, spatial_bias, point_weight, point_bias, residual: as in the formula, dtype
            of `x`.
        stride, activation: as in the formula.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    weights = (spatial_weight, spatial_bias, point_weight, point_bias)
    check_inputs("fused_mbconv", DTYPES, x, *weights, residual)
    batch, in_channels, height, width = x.shape
    mid_channels, _, kernel, _ = spatial_weight.shape
    out_channels = point_weight.shape[0]
    large = large_maps(height, width)

    def pack(
        spatial_weight: Tensor,
        spatial_bias: Tensor | None,
        point_weight: Tensor,
        point_bias: Tensor | None,
    ) -> Any:
        return native().pack_fused_mbconv(
            spatial_weight=address(spatial_weight),
            spatial_bias=address(spatial_bias),
            point_weight=address(point_weight),
            point_bias=address(point_bias),
            in_channels=in_channels,
            mid_channels=mid_channels,
            out_channels=out_channels,
            kernel=kernel,
            stride=stride,
            large_maps=large,
            dtype=dtype_name(spatial_weight),
        )

    x, residual = channels_last(x), dense_residual(residual)
    size = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, out_channels, *size))
    return launch(
        "fused_mbconv",
        {"x": x, "residual": residual},
        y,
        packed=packed(weights, (stride, large), pack),
        batch=batch,
        height=height,
        width=width,
        activation=activation,
        num_threads=torch.get_num_threads(),
    )
