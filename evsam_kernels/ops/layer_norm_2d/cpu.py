"""Launches the C++ kernel of `layer_norm_2d`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from evsam_kernels.ops.checks import FLOATING_DTYPES
from evsam_kernels.ops.layout import accumulation_dtype, channels_last, empty_channels_last


def _native() -> ModuleType:
    """The extension module, imported when first needed: the package works without it."""
    from evsam_kernels import _cpu

    return _cpu


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
    if x.dtype not in FLOATING_DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, FLOATING_DTYPES))}, got {x.dtype}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}; move it with .cpu()")

    batch, channels, height, width = x.shape
    x = channels_last(x)
    y = empty_channels_last(x, x.shape)
    # The converted vectors must stay alive until the kernel has read them.
    affine = [
        None if vector is None else vector.to(accumulation_dtype(x.dtype)).contiguous()
        for vector in (weight, bias)
    ]
    weight_address, bias_address = (None if v is None else v.data_ptr() for v in affine)
    _native().layer_norm_2d(
        x=x.data_ptr(),
        y=y.data_ptr(),
        weight=weight_address,
        bias=bias_address,
        rows=batch * height * width,
        channels=channels,
        eps=eps,
        dtype=str(x.dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )
    return y
