"""Argument checks shared by the operations; every message names the argument and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evsam_kernels.ops.conv_act.reference import ACTIVATIONS

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of the kernels that accumulate in float32."""

FLOATING_DTYPES = (*HALF_AND_SINGLE, torch.float64)


def check_tensors(op: str, **arguments: object) -> None:
    """Check that every argument is a tensor, before the dispatcher turns it away less clearly."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_map(op: str, name: str, x: Tensor) -> None:
    """Check a feature map: floating `[B, C, H, W]`, at least one channel and one pixel."""
    if x.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
            f"convert it with .to(dtype)"
        )
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape [B, C, H, W], got {tuple(x.shape)}")
    if not (x.shape[1] > 0 and x.shape[2] > 0 and x.shape[3] > 0):
        raise ValueError(
            f"{op}: {name} must have at least one channel, row and column, got {tuple(x.shape)}"
        )


def check_operand(
    op: str,
    name: str,
    operand: Tensor | None,
    shape: Sequence[int],
    like: Tensor,
    *,
    or_float32: bool = False,
) -> None:
    """Check that an optional operand has exactly `shape` and lives where `like` lives.

    Its dtype must be that of `like`, or, with `or_float32`, float32.
    """
    if operand is None:
        return
    if tuple(operand.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(operand.shape)}")
    if operand.dtype != like.dtype and not (or_float32 and operand.dtype == torch.float32):
        accepted = f"{like.dtype} or torch.float32" if or_float32 else f"{like.dtype}"
        raise TypeError(
            f"{op}: {name} must have dtype {accepted}, as the input has, got {operand.dtype}"
        )
    if operand.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device}, as the input is, got {operand.device}"
        )


def check_conv_weight(
    op: str, name: str, weight: Tensor, like: Tensor, in_channels: int, groups: int = 1
) -> None:
    """Check a convolution weight `[out_channels, in_channels / groups, k, k]` with odd k."""
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3]
    if not (square and weight.shape[2] % 2 == 1 and weight.shape[0] > 0):
        raise ValueError(
            f"{op}: {name} must have shape [out_channels, in_channels / groups, k, k] with k odd, "
            f"got {tuple(weight.shape)}"
        )
    if not (in_channels % groups == 0 and weight.shape[0] % groups == 0):
        raise ValueError(
            f"{op}: groups must divide the {in_channels} input and the {weight.shape[0]} output "
            f"channels of {name}, got {groups}"
        )
    out_channels, _, kernel_size, _ = weight.shape
    expected = (out_channels, in_channels // groups, kernel_size, kernel_size)
    check_operand(op, name, weight, expected, like)


def check_pointwise(op: str, name: str, weight: Tensor) -> None:
    """Check that a convolution weight is 1x1."""
    if not (weight.dim() == 4 and weight.shape[2] == 1 and weight.shape[3] == 1):
        raise ValueError(
            f"{op}: {name} must have shape [out_channels, in_channels, 1, 1], "
            f"got {tuple(weight.shape)}"
        )


def check_positive(op: str, **values: int) -> None:
    """Check that integer arguments are at least one."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_activation(op: str, activation: str | None) -> None:
    """Check that `activation` is the name of a supported activation, or None."""
    if not (activation is None or activation in ACTIVATIONS):
        raise ValueError(
            f"{op}: activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"got {activation!r}"
        )


def conv_output_size(size: int, stride: int) -> int:
    """Output height or width of an odd-kernel convolution padded by half its kernel."""
    return (size - 1) // stride + 1
