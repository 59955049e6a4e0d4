"""Public function, checks and registration of `conv_act`."""

from __future__ import annotations

from torch import Tensor

from evsam_kernels.ops.checks import (
    check_activation,
    check_conv_weight,
    check_map,
    check_operand,
    check_positive,
    check_tensors,
    conv_output_size,
)
from evsam_kernels.ops.registry import register


def _output_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    activation: str | None,
) -> tuple[int, int, int, int]:
    check_positive("conv_act", stride=stride, dilation=dilation, groups=groups)
    check_activation("conv_act", activation)
    check_map("conv_act", "x", x)
    batch, in_channels, height, width = x.shape
    check_conv_weight("conv_act", "weight", weight, x, in_channels, groups)
    out_channels = weight.shape[0]
    check_operand("conv_act", "bias", bias, (out_channels,), x)
    shape = (
        batch,
        out_channels,
        conv_output_size(height, stride),
        conv_output_size(width, stride),
    )
    check_operand("conv_act", "residual", residual, shape, x)
    return shape


_operator = register(
    "conv_act",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    "int stride, int dilation, int groups, str? activation",
    _output_shape,
)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(conv(x) + bias) + residual, padded by `k // 2 * dilation` zeros on every side.

    Differentiable in every tensor argument. Computes at the dtype of `x` whatever autocast says,
    with float32 accumulation (float64 for float64).

    Args:
        x: `[B, C_in, H, W]`, float16, bfloat16, float32 or float64; any strides.
        weight: `[C_out, C_in / groups, k, k]` with k odd, dtype of `x`; BatchNorm already folded.
        bias: `[C_out]`, dtype of `x`.
        residual: `[B, C_out, H_out, W_out]`, dtype of `x`; added after the activation.
        stride: step of the window, so that `H_out = (H - 1) // stride + 1`.
        dilation: distance between the taps.
        groups: channel groups; `C_in` for a depthwise convolution.
        activation: None, "relu", "relu6", "hswish", "silu" or "gelu" (tanh approximation).
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        `[B, C_out, H_out, W_out]` in `torch.channels_last`, dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than `x`.
        ValueError: a shape, size or name is not accepted.
        evsam_kernels.BackendUnavailableError: the named backend cannot run here.
    """
    check_tensors("conv_act", x=x, weight=weight)
    return _operator(x, weight, bias, residual, stride, dilation, groups, activation, backend)
