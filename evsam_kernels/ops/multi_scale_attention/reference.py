"""The formula of `multi_scale_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evsam_kernels.ops.conv_act.reference import conv_act
from evsam_kernels.ops.relu_linear_attention.reference import relu_linear_attention


def multi_scale_attention(
    x: Tensor,  # [B, C_in, H, W]
    qkv_weight: Tensor,  # [heads * 3 * dim, C_in, 1, 1]
    qkv_bias: Tensor | None,  # [heads * 3 * dim]
    depth_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, 1, k, k]
    depth_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    group_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, dim, 1, 1]
    group_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    proj_weight: Tensor,  # [C_out, heads * dim * (1 + scales), 1, 1]
    proj_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, C_out, H, W]
    """proj(attention(qkv and its aggregations at every scale)) + residual."""
    qkv = conv_act(x, qkv_weight, qkv_bias, None)
    channels = qkv.shape[1]
    scales = [qkv]
    for index, (depth_weight, group_weight) in enumerate(
        zip(depth_weights, group_weights, strict=True)
    ):
        depth_bias = depth_biases[index] if depth_biases else None
        group_bias = group_biases[index] if group_biases else None
        filtered = conv_act(qkv, depth_weight, depth_bias, None, groups=channels)
        scales.append(
            conv_act(filtered, group_weight, group_bias, None, groups=channels // head_dim)
        )
    attended = relu_linear_attention(torch.cat(scales, dim=1), head_dim, eps)
    return conv_act(attended, proj_weight, proj_bias, residual)
