"""The formula of `layer_norm_2d`."""

from __future__ import annotations

from torch import Tensor


def layer_norm_2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float = 1e-5,
) -> Tensor:  # [B, C, H, W]
    """(x - mean) / sqrt(variance + eps) * weight + bias over the channels, biased variance."""
    centred = x - x.mean(dim=1, keepdim=True)
    y = centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.view(1, -1, 1, 1)
    return y if bias is None else y + bias.view(1, -1, 1, 1)
