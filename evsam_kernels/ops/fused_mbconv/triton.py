"""Triton kernel of `fused_mbconv`: two products back to back.

Layout: NHWC. Tile: BM output pixels and all output channels; BF expanded channels at a time. The
first product is that of `conv_act`, an implicit GEMM over taps and channels; bias and activation
follow in registers, and the result, rounded to the storage type, is at once the left operand of
the 1x1 product, whose sum stays in registers over all chunks (as flash attention keeps its output,
arXiv 2205.14135). Global memory: the pixels under a tile for every chunk, from L2 mostly, the
weights once for every BM pixels, residual and result once; the expanded tensor never.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from evsam_kernels.ops.checks import HALF_AND_SINGLE, conv_output_size
from evsam_kernels.ops.conv_act.triton import (
    activate,
    activation_name,
    add_product,
    conv_act,
    conv_precision,
    dense,
    plus,
    position,
    power_below,
    taps_inside,
)
from evsam_kernels.ops.fused_mbconv.tiles import NARROW, WIDE_COLUMNS, candidates, tile_of
from evsam_kernels.ops.gpu import limits
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.tiling import Layer, Tile, choose

DTYPES = HALF_AND_SINGLE


@triton.jit
def pixels_under(
    x,  # [B, H, W, C]
    row,  # [BM], of all output pixels
    pixels,
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    channels: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BK: tl.constexpr,
):
    """Addresses `[BM, BK]` of output pixels' first taps, and which taps are inside the map."""
    image, out_y, out_x = position(row, out_height, out_width)
    top = out_y * STRIDE - KERNEL // 2
    left = out_x * STRIDE - KERNEL // 2
    corner = (image.to(tl.int64) * height + top) * width + left
    x_at = x + (corner * channels)[:, None] + tl.arange(0, BK)[None, :]
    inside = taps_inside(top, left, height, width, 1, KERNEL)
    return x_at, tl.where(row < pixels, inside, tl.zeros_like(inside))


@triton.jit
def expand(
    x_at,  # of `pixels_under`, as `inside`
    inside,
    weight,  # [F, KERNEL, KERNEL, C]
    bias,  # [F]
    first_mid,
    width: tl.constexpr,
    channels: tl.constexpr,
    mid_channels: tl.constexpr,
    KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BF: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Expanded channels from `first_mid` on, float32 `[BM, BF]`; zero beyond the last."""
    BM: tl.constexpr = x_at.shape[0]
    BK: tl.constexpr = x_at.shape[1]
    CHANNEL_STEPS: tl.constexpr = (channels + BK - 1) // BK
    step = tl.arange(0, BK)
    mid = first_mid + tl.arange(0, BF)
    in_mid = mid < mid_channels
    weight_at = weight + (mid * (KERNEL * KERNEL * channels))[None, :] + step[:, None]
    part = tl.zeros((BM, BF), tl.float32)
    total = 0.0 if PRECISION != "ieee" or weight.dtype.element_ty != tl.float32 else part
    for k in tl.range(0, KERNEL * KERNEL * CHANNEL_STEPS, num_stages=STAGES):
        tap = k // CHANNEL_STEPS
        first = (k % CHANNEL_STEPS) * BK
        moved = ((tap // KERNEL) * width + tap % KERNEL) * channels + first
        in_map = ((inside >> tap) & 1) != 0
        b_at = weight_at + (tap * channels + first)
        if channels % BK == 0:
            a = tl.load(x_at + moved, mask=in_map[:, None], other=0.0)
            if mid_channels % BF == 0:
                b = tl.load(b_at)
            else:
                b = tl.load(b_at, mask=in_mid[None, :], other=0.0)
        else:
            in_step = first + step < channels
            a = tl.load(x_at + moved, mask=in_map[:, None] & in_step[None, :], other=0.0)
            b = tl.load(b_at, mask=in_step[:, None] & in_mid[None, :], other=0.0)
        part, total = add_product(a, b, part, total, k, PRECISION)
    if PRECISION == "ieee" and weight.dtype.element_ty == tl.float32:
        part += total  # Elsewhere zero, which the compiler would add all the same.
    if bias is not None:
        offset = tl.load(bias + mid, mask=in_mid, other=0.0)
        part = plus(part, offset.to(tl.float32)[None, :])
    return activate(part, ACTIVATION)


@triton.jit
def load_point(
    point_weight,  # [N, F]
    mid,
    column,
    mid_channels: tl.constexpr,
    out_channels: tl.constexpr,
    WHOLE: tl.constexpr,  # whether all of `mid` and `column` are inside
):
    """Weights `[BF, BN]` of the 1x1 product; zero beyond the last."""
    point_at = point_weight + column[None, :] * mid_channels + mid[:, None]
    if WHOLE:
        return tl.load(point_at)
    else:
        inside = (mid < mid_channels)[:, None] & (column < out_channels)[None, :]
        return tl.load(point_at, mask=inside, other=0.0)


@triton.jit
def finish(
    total,  # [BM, BN]
    point_bias,
    residual,
    y,
    row,
    column,
    pixels,
    out_channels: tl.constexpr,
):
    """Add bias and residual to sums, and write them."""
    in_column = column < out_channels
    if point_bias is not None:
        offset = tl.load(point_bias + column, mask=in_column, other=0.0)
        total = plus(total, offset.to(tl.float32)[None, :])
    at = (row.to(tl.int64) * out_channels)[:, None] + column[None, :]
    inside = (row < pixels)[:, None] & in_column[None, :]
    if residual is not None:
        total = plus(total, tl.load(residual + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def fused_mbconv_kernel(
    x,  # [B, H, W, C]
    spatial_weight,  # [F, KERNEL, KERNEL, C]
    spatial_bias,  # [F]
    point_weight,  # [N, F]
    point_bias,  # [N]
    residual,  # [B, OH, OW, N]
    y,  # the same
    pixels,  # B * OH * OW
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    # Constants, so that addresses differ by constants too, which need no registers.
    channels: tl.constexpr,  # C
    mid_channels: tl.constexpr,  # F
    out_channels: tl.constexpr,  # N
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,  # at least N
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    x_at, inside = pixels_under(
        x, row, pixels, height, width, out_height, out_width, channels, KERNEL, STRIDE, BK
    )
    # `total` is the sum times `scale`, which keeps what is rounded to float16 from overflowing.
    scale = 1.0
    total = tl.zeros((BM, BN), tl.float32)
    for first_mid in tl.range(0, mid_channels, BF, num_stages=1):
        expanded = expand(
            x_at, inside, spatial_weight, spatial_bias, first_mid, width, channels, mid_channels,
            KERNEL, ACTIVATION, PRECISION, BF, STAGES,
        )  # fmt: skip
        point = load_point(
            point_weight, first_mid + tl.arange(0, BF), column, mid_channels, out_channels,
            mid_channels % BF == 0 and out_channels == BN,
        )  # fmt: skip
        if x.dtype.element_ty == tl.float16:
            peak = tl.max(tl.abs(expanded)) * scale
            if peak > 32768.0:
                smaller = tl.exp2(-tl.ceil(tl.log2(peak / 32768.0)))
                scale *= smaller
                total *= smaller
            expanded *= scale
        total = tl.dot(expanded.to(x.dtype.element_ty), point, total, input_precision=PRECISION)
    if x.dtype.element_ty == tl.float16:
        total /= scale
    finish(total, point_bias, residual, y, row, column, pixels, out_channels)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value` at a dtype, multiplied by a power of two that it fits with, and that power."""
    if dtype == tl.float16:
        scale = power_below(tl.max(tl.abs(value)))
        return (value * scale).to(dtype), scale
    else:
        return value.to(dtype), 1.0


@triton.jit(do_not_specialize=["pixels"])
def fused_mbconv_wide_kernel(
    # As for fused_mbconv_kernel; F is at most 2 * BF, N any number of BN.
    x,
    spatial_weight,
    spatial_bias,
    point_weight,
    point_bias,
    residual,
    y,
    pixels,
    height: tl.constexpr,
    width: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    channels: tl.constexpr,
    mid_channels: tl.constexpr,
    out_channels: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    mid = tl.arange(0, BF)
    x_at, inside = pixels_under(
        x, row, pixels, height, width, out_height, out_width, channels, KERNEL, STRIDE, BK
    )
    # Both halves of the expanded channels, rounded, take half the registers that their sums take.
    first, first_scale = rounded(
        expand(
            x_at, inside, spatial_weight, spatial_bias, 0, width, channels, mid_channels,
            KERNEL, ACTIVATION, PRECISION, BF, STAGES,
        ),
        x.dtype.element_ty,
    )  # fmt: skip
    if mid_channels > BF:
        second, second_scale = rounded(
            expand(
                x_at, inside, spatial_weight, spatial_bias, BF, width, channels, mid_channels,
                KERNEL, ACTIVATION, PRECISION, BF, STAGES,
            ),
            x.dtype.element_ty,
        )  # fmt: skip
    WHOLE: tl.constexpr = mid_channels % BF == 0 and out_channels % BN == 0
    for first_column in tl.range(0, out_channels, BN, num_stages=1):
        column = first_column + tl.arange(0, BN)
        point = load_point(point_weight, mid, column, mid_channels, out_channels, WHOLE)
        total = tl.dot(first, point, input_precision=PRECISION)
        if mid_channels > BF:
            total *= second_scale / first_scale
            point = load_point(point_weight, BF + mid, column, mid_channels, out_channels, WHOLE)
            total = tl.dot(second, point, total, input_precision=PRECISION)
            total /= second_scale
        else:
            total /= first_scale
        finish(total, point_bias, residual, y, row, column, pixels, out_channels)


def fused_mbconv(
    x: Tensor,  # [B, C_in, H, W]
    spatial_weight: Tensor,  # [C_mid, C_in, k, k]
    spatial_bias: Tensor | None,  # [C_mid]
    point_weight: Tensor,  # [C_out, C_mid, 1, 1]
    point_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    activation: str | None = None,
) -> Tensor:  # [B, C_out, H_out, W_out]
    """conv1x1(activation(conv(x) + bias)) + bias + residual, accumulated in float32.

    float32 products are rounded to TF32 where `torch.backends.cudnn.allow_tf32` says so. With more
    output channels than a block has registers for, the expanded tensor goes through global memory.
    """
    batch, channels, height, width = x.shape
    mid_channels, _, kernel, _ = spatial_weight.shape
    out_channels = point_weight.shape[0]
    by_rule = tile_of(x.dtype, mid_channels, out_channels, limits(x))
    if by_rule is None:
        expanded = conv_act(x, spatial_weight, spatial_bias, None, stride, activation=activation)
        return conv_act(expanded, point_weight, point_bias, residual)
    size = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, out_channels, *size))
    pixels = batch * size[0] * size[1]
    if pixels == 0:
        return y
    wide = out_channels > NARROW
    operands = (
        channels_last(x),
        channels_last(spatial_weight),
        None if spatial_bias is None else spatial_bias.contiguous(),
        point_weight.contiguous(),
        None if point_bias is None else point_bias.contiguous(),
        dense(residual),
        y,
        pixels,
        height,
        width,
        *size,
        channels,
        mid_channels,
        out_channels,
    )

    def launch(tile: Tile) -> None:
        (fused_mbconv_wide_kernel if wide else fused_mbconv_kernel)[
            (triton.cdiv(pixels, tile.bm),)
        ](
            *operands,
            KERNEL=kernel,
            STRIDE=stride,
            ACTIVATION=activation_name(activation, x.dtype),
            PRECISION=conv_precision(),
            BM=tile.bm,
            BF=tile.bn,
            BN=WIDE_COLUMNS if wide else max(16, triton.next_power_of_2(out_channels)),
            BK=tile.bk,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )

    all_channels = (channels, mid_channels, out_channels)
    layer = Layer("fused_mbconv", x.dtype, all_channels, kernel, stride, pixels)
    others = candidates(x.dtype, out_channels)
    launch(choose(layer, by_rule, others, x, launch, TritonError))
    return y
