"""Launches the C++ kernel of `mbconv`."""

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


def mbconv(
    x: Tensor,  # [B, C_in, H, W]
    expand_weight: Tensor,  # [C_mid, C_in, 1, 1]
    expand_bias: Tensor | None,  # [C_mid]
    depth_weight: Tensor,  # [C_mid, 1, k, k]
    depth_bias: Tensor | None,  # [C_mid]
    point_weight: Tensor,  # [C_out, C_mid, 1, 1]
    point_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """Expand 1x1, filter depthwise, project 1x1, add the residual; accumulated in float32.

    What lies between the convolutions is float32, or bfloat16 for bfloat16 where the CPU multiplies
    that.

    Args:
        x: on the CPU, float16, bfloat16 or float32; any strides.
        expand_weight, expand_bias, depth_weight, depth_bias, point_weight, point_bias, residual: as
            in the formula, dtype of `x`.
        stride, activation: as in the formula.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    weights = (expand_weight, expand_bias, depth_weight, depth_bias, point_weight, point_bias)
    check_inputs("mbconv", DTYPES, x, *weights, residual)
    batch, in_channels, height, width = x.shape
    mid_channels, _, kernel, _ = depth_weight.shape
    out_channels = point_weight.shape[0]
    # The kernel reads these as they are, which saves memory.
    pointwise = (expand_weight, point_weight)
    stay = all(weight.is_contiguous() for weight in pointwise)

    def pack(
        expand_weight: Tensor,
        expand_bias: Tensor | None,
        depth_weight: Tensor,
        depth_bias: Tensor | None,
        point_weight: Tensor,
        point_bias: Tensor | None,
    ) -> Any:
        return native().pack_mbconv(
            expand_weight=address(expand_weight),
            expand_bias=address(expand_bias),
            depth_weight=address(depth_weight),
            depth_bias=address(depth_bias),
            point_weight=address(point_weight),
            point_bias=address(point_bias),
            in_channels=in_channels,
            mid_channels=mid_channels,
            out_channels=out_channels,
            kernel=kernel,
            stride=stride,
            dtype=dtype_name(expand_weight),
            stay=stay,
        )

    x, residual = channels_last(x), dense_residual(residual)
    size = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, out_channels, *size))
    return launch(
        "mbconv",
        {"x": x, "residual": residual},
        y,
        packed=packed(weights, (stride, stay), pack),
        expand_weight=address(expand_weight) if stay else None,
        point_weight=address(point_weight) if stay else None,
        batch=batch,
        height=height,
        width=width,
        activation=activation,
        num_threads=torch.get_num_threads(),
    )
