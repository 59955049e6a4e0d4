"""The formula of `fused_mbconv`."""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.conv_act.reference import conv_act


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
    """conv1x1(activation(conv(x) + bias)) + bias + residual."""
    expanded = conv_act(x, spatial_weight, spatial_bias, None, stride=stride, activation=activation)
    return conv_act(expanded, point_weight, point_bias, residual)
