"""`mbconv` as three launches of the Triton kernels of `conv_act`.

The depthwise convolution between the products needs a stencil in shared memory to be fused with
them, which Triton does not offer: the expanded tensor goes through global memory, once before and
once after it. In float16 it may exceed what that holds where the result does not; a kernel before
the others finds bounds of what lies between them, and they store it multiplied by powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import conv_act
from evsam_kernels.ops.layout import channels_last

DTYPES = HALF_AND_SINGLE

_BLOCK = 4096
_ROWS = 16


@triton.jit
def _keep_larger(at, value):
    # Floats that are not negative are ordered as their bits are, which makes the result the same in
    # whatever order blocks come.
    tl.atomic_max(at, value.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def largest_kernel(
    x,
    expand_weight,  # [F, C]
    expand_bias,  # [F]
    depth_weight,  # [F, TAPS]
    depth_bias,  # [F]
    largest,  # [5], zeros
    count,  # of x
    channels,  # C
    mid_channels,  # F
    TAPS: tl.constexpr,
    PADDED_TAPS: tl.constexpr,  # at least TAPS
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Largest magnitude of x, of sums of magnitudes of weights over a channel, and of biases."""
    block = tl.program_id(0)
    blocks_of_x = tl.cdiv(count, BLOCK)
    if block < blocks_of_x:
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        _keep_larger(largest, tl.max(tl.abs(value)))
    else:
        row = (block - blocks_of_x) * ROWS + tl.arange(0, ROWS)
        in_row = row < mid_channels
        sums = tl.zeros((ROWS,), tl.float32)
        for first in range(0, channels, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            weight = tl.load(
                expand_weight + row[:, None] * channels + column[None, :],
                mask=in_row[:, None] & (column < channels)[None, :],
                other=0.0,
            )
            sums += tl.sum(tl.abs(weight.to(tl.float32)), axis=1)
        _keep_larger(largest + 1, tl.max(sums))
        if depth_weight is not None:
            tap = tl.arange(0, PADDED_TAPS)
            weight = tl.load(
                depth_weight + row[:, None] * TAPS + tap[None, :],
                mask=in_row[:, None] & (tap < TAPS)[None, :],
                other=0.0,
            )
            sums = tl.sum(tl.abs(weight.to(tl.float32)), axis=1)
            _keep_larger(largest + 3, tl.max(sums))
        if expand_bias is not None:
            bias = tl.load(expand_bias + row, mask=in_row, other=0.0).to(tl.float32)
            _keep_larger(largest + 2, tl.max(tl.abs(bias)))
        if depth_bias is not None:
            bias = tl.load(depth_bias + row, mask=in_row, other=0.0).to(tl.float32)
            _keep_larger(largest + 4, tl.max(tl.abs(bias)))


def largest_values(
    x: Tensor,  # [B, C, H, W]
    expand_weight: Tensor,  # [F, C, 1, 1]
    expand_bias: Tensor | None,  # [F]
    depth_weight: Tensor | None,  # [F, 1, k, k]
    depth_bias: Tensor | None,  # [F]
) -> list[Tensor]:
    """Bounds, float32 `[1]`, of all values of a 1x1 convolution and of a depthwise one after it.

    No activation enlarges a magnitude.
    """
    found = torch.zeros(5, dtype=torch.int32, device=x.device)
    mid_channels, channels = expand_weight.shape[:2]
    blocks = triton.cdiv(x.numel(), _BLOCK) + triton.cdiv(mid_channels, _ROWS)
    taps = 0 if depth_weight is None else depth_weight.shape[-1] ** 2
    largest_kernel[(blocks,)](
        channels_last(x),
        expand_weight.contiguous(),
        None if expand_bias is None else expand_bias.contiguous(),
        None if depth_weight is None else depth_weight.contiguous(),
        None if depth_bias is None else depth_bias.contiguous(),
        found,
        x.numel(),
        channels,
        mid_channels,
        TAPS=taps,
        PADDED_TAPS=max(1, triton.next_power_of_2(taps)),
        BLOCK=_BLOCK,
        ROWS=_ROWS,
        COLUMNS=min(max(16, triton.next_power_of_2(channels)), 128),
        num_warps=4,
    )
    peak, expand, expand_base, depth, depth_base = found.view(torch.float32).split(1)
    expanded = torch.addcmul(expand_base, expand, peak)
    return [expanded, torch.addcmul(depth_base, depth, expanded)][
        : 1 if depth_weight is None else 2
    ]


def mbconv(
    x: Tensor,  # [B, C_in, H, W]
    expand_weight: Tensor,  # [C_mid, C_in, 1, 1]
    expand_bias: Tensor | None,  # [C_mid]
    depth_weight: Tensor,  # [C_mid, 1, k, k]
    depth_bias: Tensor | None,  # [C_mid]
    point_weight: Tensor,  # [C_out, C_mid, 1, 1]
    point_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """conv1x1(act(depthwise(act(conv1x1(x) + bias)) + bias)) + bias + residual."""
    expanded_largest, filtered_largest = None, None
    if x.dtype == torch.float16 and x.numel() > 0:
        expanded_largest, filtered_largest = largest_values(
            x, expand_weight, expand_bias, depth_weight, depth_bias
        )
    expanded = conv_act(
        x, expand_weight, expand_bias, None, activation=activation, y_largest=expanded_largest
    )
    filtered = conv_act(
        expanded,
        depth_weight,
        depth_bias,
        None,
        stride=stride,
        groups=depth_weight.shape[0],
        activation=activation,
        x_largest=expanded_largest,
        y_largest=filtered_largest,
    )
    return conv_act(filtered, point_weight, point_bias, residual, x_largest=filtered_largest)
