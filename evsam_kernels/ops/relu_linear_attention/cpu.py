"""Launches the C++ kernel of `relu_linear_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.native import check_inputs, dtype_name
from evsam_kernels.ops.recording import launch

DTYPES = HALF_AND_SINGLE


def relu_linear_attention(
    qkv: Tensor,  # [B, heads * 3 * head_dim, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, heads * head_dim, H, W]
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps) of every head, in float32.

    Args:
        qkv: on the CPU, float16, bfloat16 or float32; any strides.
        head_dim, eps: as in the formula.

    Returns:
        `[B, heads * head_dim, H, W]` in `torch.channels_last`, dtype of `qkv`.

    Raises:
        TypeError: `qkv` has a dtype without a kernel.
        ValueError: it is not on the CPU, or EVSAM_CPU_ISA names no available one.
    """
    check_inputs("relu_linear_attention", DTYPES, qkv)
    batch, channels, height, width = qkv.shape
    qkv = channels_last(qkv)
    y = empty_channels_last(qkv, (batch, channels // 3, height, width))
    return launch(
        "relu_linear_attention",
        {"qkv": qkv},
        y,
        batch=batch,
        tokens=height * width,
        heads=channels // (3 * head_dim),
        head_dim=head_dim,
        eps=eps,
        dtype=dtype_name(qkv),
        num_threads=torch.get_num_threads(),
    )
