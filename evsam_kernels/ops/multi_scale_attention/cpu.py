"""Launches the C++ kernel of `multi_scale_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
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
    """proj(attention(qkv and its aggregations at every scale)) + residual, in float32.

    The operands of the first and the last product are bfloat16 for bfloat16 where the CPU
    multiplies that.

    Args:
        x: on the CPU, float16, bfloat16 or float32; any strides.
        qkv_weight, ..., residual: as in the formula, dtype of `x`; at most 8 scales.
        head_dim, eps: as in the formula.

    Returns:
        `[B, C_out, H, W]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: `x` has a dtype without a kernel.
        ValueError: a tensor is not on the CPU, there are more than 8 scales, or EVSAM_CPU_ISA names
            no available one.
    """
    scales = len(depth_weights)
    lists = (depth_weights, depth_biases, group_weights, group_biases)
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias, *(w for ws in lists for w in ws))
    check_inputs("multi_scale_attention", DTYPES, x, *weights, residual)
    batch, in_channels, height, width = x.shape
    out_channels = proj_weight.shape[0]
    stay = qkv_weight.is_contiguous()  # The kernel reads it as it is, which saves memory.

    def pack(
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        *of_scales: Tensor,
    ) -> Any:
        remaining = iter([tensor.data_ptr() for tensor in of_scales])
        depths, depth_biases_, groups, group_biases_ = (
            [next(remaining) for _ in ws] for ws in lists
        )
        return native().pack_multi_scale_attention(
            qkv_weight=address(qkv_weight),
            qkv_bias=address(qkv_bias),
            depth_weights=depths,
            depth_biases=depth_biases_,
            group_weights=groups,
            group_biases=group_biases_,
            proj_weight=address(proj_weight),
            proj_bias=address(proj_bias),
            in_channels=in_channels,
            heads=qkv_weight.shape[0] // (3 * head_dim),
            head_dim=head_dim,
            out_channels=out_channels,
            kernels=[weight.shape[-1] for weight in depth_weights],
            dtype=dtype_name(qkv_weight),
            stay=stay,
        )

    x, residual = channels_last(x), dense_residual(residual)
    y = empty_channels_last(x, (batch, out_channels, height, width))
    return launch(
        "multi_scale_attention",
        {"x": x, "residual": residual},
        y,
        packed=packed(
            weights, (head_dim, scales, len(depth_biases), len(group_biases), stay), pack
        ),
        qkv_weight=address(qkv_weight) if stay else None,
        batch=batch,
        height=height,
        width=width,
        eps=eps,
        num_threads=torch.get_num_threads(),
    )
