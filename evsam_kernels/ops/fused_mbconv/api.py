"""Public function, checks and registration of `fused_mbconv`."""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.checks import (
    check_activation,
    check_conv_weight,
    check_map,
    check_operand,
    check_pointwise,
    check_positive,
    check_tensors,
    conv_output_size,
)
from evsam_kernels.ops.registry import register


def _output_shape(
    x: Tensor,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str | None,
) -> tuple[int, int, int, int]:
    op = "fused_mbconv"
    check_positive(op, stride=stride)
    check_activation(op, activation)
    check_map(op, "x", x)
    batch, in_channels, height, width = x.shape
    check_conv_weight(op, "spatial_weight", spatial_weight, x, in_channels)
    mid_channels = spatial_weight.shape[0]
    check_operand(op, "spatial_bias", spatial_bias, (mid_channels,), x)
    check_pointwise(op, "point_weight", point_weight)
    check_conv_weight(op, "point_weight", point_weight, x, mid_channels)
    out_channels = point_weight.shape[0]
    check_operand(op, "point_bias", point_bias, (out_channels,), x)
    shape = (
        batch,
        out_channels,
        conv_output_size(height, stride),
        conv_output_size(width, stride),
    )
    check_operand(op, "residual", residual, shape, x)
    return shape


_operator = register(
    "fused_mbconv",
    "Tensor x, Tensor spatial_weight, Tensor? spatial_bias, "
    "Tensor point_weight, Tensor? point_bias, Tensor? residual, int stride, str? activation",
    _output_shape,
)


def fused_mbconv(
    x: Tensor,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """conv1x1(activation(conv(x) + spatial_bias)) + point_bias + residual.

    The FusedMBConv block (arXiv 2104.00298) after folding BatchNorm. Differentiable in every tensor
    argument. Computes at the dtype of `x` whatever autocast says, with float32 accumulation
    (float64 for float64). The expanded tensor is float32 too, or bfloat16 in a kernel whose matrix
    instructions take that.

    Args:
        x: `[B, C_in, H, W]`, float16, bfloat16, float32 or float64; any strides.
        spatial_weight: `[C_mid, C_in, k, k]` with k odd, dtype of `x`; padded by `k // 2`.
        spatial_bias: `[C_mid]` or None.
        point_weight: `[C_out, C_mid, 1, 1]`.
        point_bias: `[C_out]` or None.
        residual: `[B, C_out, H_out, W_out]` or None.
        stride: of the spatial convolution, so that `H_out = (H - 1) // stride + 1`.
        activation: None, "relu", "relu6", "hswish", "silu" or "gelu" (tanh approximation).
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than `x`.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("fused_mbconv", x=x, spatial_weight=spatial_weight, point_weight=point_weight)
    return _operator(
        x,
        spatial_weight,
        spatial_bias,
        point_weight,
        point_bias,
        residual,
        stride,
        activation,
        backend,
    )
