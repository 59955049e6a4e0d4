"""Public function, checks and registration of `mbconv`."""

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
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depth_weight: Tensor,
    depth_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str | None,
) -> tuple[int, int, int, int]:
    op = "mbconv"
    check_positive(op, stride=stride)
    check_activation(op, activation)
    check_map(op, "x", x)
    batch, in_channels, height, width = x.shape
    check_pointwise(op, "expand_weight", expand_weight)
    check_conv_weight(op, "expand_weight", expand_weight, x, in_channels)
    mid_channels = expand_weight.shape[0]
    check_operand(op, "expand_bias", expand_bias, (mid_channels,), x)
    if not (depth_weight.dim() == 4 and depth_weight.shape[0] == mid_channels):
        raise ValueError(
            f"{op}: depth_weight must have shape [{mid_channels}, 1, k, k] with k odd, "
            f"got {tuple(depth_weight.shape)}"
        )
    check_conv_weight(op, "depth_weight", depth_weight, x, mid_channels, groups=mid_channels)
    check_operand(op, "depth_bias", depth_bias, (mid_channels,), x)
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
    "mbconv",
    "Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor depth_weight, "
    "Tensor? depth_bias, Tensor point_weight, Tensor? point_bias, Tensor? residual, "
    "int stride, str? activation",
    _output_shape,
)


def mbconv(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depth_weight: Tensor,
    depth_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Expand 1x1, filter depthwise, project 1x1, add the residual; activation after the first two.

    The MBConv block (arXiv 1801.04381) after folding BatchNorm. Differentiable in every tensor
    argument. Computes at the dtype of `x` whatever autocast says, with float32 accumulation
    (float64 for float64). What lies between the convolutions is float32 too, or bfloat16 in a
    kernel whose matrix instructions take that.

    Args:
        x: `[B, C_in, H, W]`, float16, bfloat16, float32 or float64; any strides.
        expand_weight: `[C_mid, C_in, 1, 1]`, dtype of `x`.
        expand_bias: `[C_mid]` or None.
        depth_weight: `[C_mid, 1, k, k]` with k odd; padded by `k // 2`.
        depth_bias: `[C_mid]` or None.
        point_weight: `[C_out, C_mid, 1, 1]`.
        point_bias: `[C_out]` or None.
        residual: `[B, C_out, H_out, W_out]` or None.
        stride: of the depthwise convolution, so that `H_out = (H - 1) // stride + 1`.
        activation: None, "relu", "relu6", "hswish", "silu" or "gelu" (tanh approximation).
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than `x`.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors(
        "mbconv",
        x=x,
        expand_weight=expand_weight,
        depth_weight=depth_weight,
        point_weight=point_weight,
    )
    return _operator(
        x,
        expand_weight,
        expand_bias,
        depth_weight,
        depth_bias,
        point_weight,
        point_bias,
        residual,
        stride,
        activation,
        backend,
    )
