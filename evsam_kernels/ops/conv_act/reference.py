"""The formula of `conv_act`, and the activations every convolution block uses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hswish": F.hardswish,
    "silu": F.silu,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
}


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
    """activation(conv(x) + bias) + residual, zero-padded so that stride 1 keeps the size."""
    padding = weight.shape[-1] // 2 * dilation
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual
