"""Triton kernels of `conv_act`: convolution as a product of matrices, and depthwise convolution.

Layout: NHWC, so that a pixel's channels are the row of a matrix; nothing is laid out anew
(implicit GEMM: the operand's rows are addressed under the kernel as it moves over its taps). Tile:
BM output pixels times BN output channels; the sum over taps and channels stays in registers, and
bias, activation and residual are applied there. Global memory: a tile's pixels once for every BN
output channels, from L2 mostly, the weights once for every BM pixels, residual and result once.

BM need not be a power of two: a small map's tiles of 64 or 128 rows may be hardly more than fit one
round of the multiprocessors, where those of 80 or 160 fill it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from evsam_kernels.ops.checks import HALF_AND_SINGLE, conv_output_size
from evsam_kernels.ops.conv_act.tiles import candidates, tile_of
from evsam_kernels.ops.gpu import limits
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.tiling import Layer, Tile, choose

DTYPES = HALF_AND_SINGLE


@triton.jit
def tanh_approx(x):
    """tanh by the special function unit, float32: relative error 2^-11 (PTX ISA, tanh)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation called ACTIVATION of float32 `x`; finite for every finite `x`."""
    if ACTIVATION == "gelu_approx":
        # sqrt(2 / pi) (x + 0.044715 x^3)
        z = x * (0.7978845608 + 0.0356774081 * x * x)
        half = 0.5 * x
        return half + half * tanh_approx(z)
    elif ACTIVATION == "gelu":
        # 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z))
        return x / (1.0 + tl.exp(x * (-1.5957691216 - 0.0713548163 * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        return tl.minimum(
            tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL),
            6.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
    elif ACTIVATION == "hswish":
        clamped = tl.minimum(
            tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL),
            6.0,
            propagate_nan=tl.PropagateNan.ALL,
        )
        return x * (clamped / 6.0)
    else:
        return x


@triton.jit
def position(pixel, height, width):
    """Image, line and column of pixels that are numbered through all images."""
    line = pixel // width
    return line // height, line % height, pixel % width


@triton.jit
def taps_inside(top, left, height, width, DILATION: tl.constexpr, KERNEL: tl.constexpr):
    """Which taps of a kernel whose first is at (top, left) lie inside a map: a bit for each.

    `top` and `left` are int32 of one shape; the bits are int32 up to 25 taps, else int64.
    """
    if KERNEL * KERNEL <= 31:
        bits = tl.zeros_like(top)
    else:
        bits = tl.zeros_like(top).to(tl.int64)
    for tap in tl.static_range(KERNEL * KERNEL):
        y = top + (tap // KERNEL) * DILATION
        x = left + (tap % KERNEL) * DILATION
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        bits |= inside.to(bits.dtype) << tap
    return bits


@triton.jit
def add_product(a, b, part, total, step, PRECISION: tl.constexpr):
    """Add the product of `a` and `b` to `part`, and now and then `part` to `total`.

    At full float32 precision some steps' products are added up apart from the total, which makes
    the rounding error of long sums several times smaller. The sum is `part + total`.
    """
    part = tl.dot(a, b, part, input_precision=PRECISION)
    if PRECISION == "ieee" and a.dtype == tl.float32:
        enough = step % 4 == 3
        total = tl.where(enough, total + part, total)
        part = tl.where(enough, 0.0, part)
    return part, total


@triton.jit
def plus(sums, value):
    """`sums + value`, rounded once.

    Written as a sum, the compiler would have the product before it start from `value` in place of
    zero, and every one of its additions be rounded to what that is large to.
    """
    return tl.fma(sums, tl.full(sums.shape, 1.0, sums.dtype), value + tl.zeros_like(sums))


@triton.jit
def power_below(largest):
    """A power of two, at most 1, that takes magnitudes up to `largest` to what float16 holds."""
    # By its bits: kernels that agree on a power must not find it by logarithms of their own.
    exponent = (((largest / 32768.0).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, 0), 126)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_kernel(
    x,  # [B, H, W, groups * C]
    weight,  # [groups * N, KERNEL, KERNEL, C]
    bias,  # [groups * N]
    residual,  # [B, OH, OW, groups * N]
    y,  # the same
    x_largest,  # [1], float32: x is stored multiplied by power_below of that; or None
    y_largest,  # [1], likewise y is written so; or None
    pixels,  # B * OH * OW
    height,
    width,
    out_height,
    out_width,
    groups,
    channels,  # C, of one group
    out_channels,  # N, of one group
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,  # of BK channels, for each tap; 0 for all taps at once
    WHOLE_STEPS: tl.constexpr,  # whether BK divides C
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Tensors' sizes are powers of two: 80 rows are five parts of 16, which share the weights.
    PART: tl.constexpr = BM & -BM
    PARTS: tl.constexpr = BM // PART
    # Rows are pixels of the input as well, wherever in their maps these are.
    POINTWISE: tl.constexpr = KERNEL == 1 and STRIDE == 1
    APART: tl.constexpr = PRECISION == "ieee" and x.dtype.element_ty == tl.float32
    column_tiles = tl.cdiv(out_channels, BN)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    first_row = (tile // column_tiles) * BM
    column = (tile % column_tiles) * BN + tl.arange(0, BN)
    step = tl.arange(0, BK)
    in_column = column < out_channels

    all_channels = groups * channels
    # 64 bits for the tile's first line alone, which leaves registers: the others are near it.
    if POINTWISE:
        first_pixel = first_row.to(tl.int64)
    else:
        first_image, first_y, _ = position(first_row, out_height, out_width)
        first_line = first_image * height + first_y * STRIDE
        first_pixel = first_line.to(tl.int64) * width
    x_first = x + (first_pixel * all_channels + group * channels)
    x_at: tl.tuple = ()
    inside: tl.tuple = ()
    for i in tl.static_range(PARTS):
        row = first_row + i * PART + tl.arange(0, PART)
        in_row = row < pixels
        if POINTWISE:
            corner = row - first_row
            inside += (in_row.to(tl.int32),)
        else:
            image, out_y, out_x = position(row, out_height, out_width)
            top = out_y * STRIDE - (KERNEL // 2) * DILATION
            left = out_x * STRIDE - (KERNEL // 2) * DILATION
            corner = (image * height + top - first_line) * width + left
            taps = taps_inside(top, left, height, width, DILATION, KERNEL)
            inside += (tl.where(in_row, taps, tl.zeros_like(taps)),)
        x_at += (x_first + ((corner * all_channels)[:, None] + step[None, :]),)

    # One column of the operand's transpose is an output channel's weights, one after the other.
    of_channel = (group * out_channels + column) * (KERNEL * KERNEL * channels)
    weight_at = weight + of_channel[None, :] + step[:, None]

    parts = (tl.zeros((PART, BN), tl.float32),) * PARTS
    totals = parts if APART else (0.0,) * PARTS
    if CHANNEL_STEPS == 0:
        of_tap = step // channels
        offset = ((of_tap // KERNEL) * width + of_tap % KERNEL) * DILATION * all_channels
        offset -= of_tap * channels
        in_sum = step < KERNEL * KERNEL * channels
        b = tl.load(weight_at, mask=in_sum[:, None] & in_column[None, :], other=0.0)
        products: tl.tuple = ()
        for i in tl.static_range(PARTS):
            in_both = (((inside[i][:, None] >> of_tap[None, :]) & 1) != 0) & in_sum[None, :]
            a = tl.load(x_at[i] + offset[None, :], mask=in_both, other=0.0)
            products += (tl.dot(a, b, parts[i], input_precision=PRECISION),)
        parts = products
    for k in tl.range(0, KERNEL * KERNEL * CHANNEL_STEPS, num_stages=STAGES):
        tap = k // CHANNEL_STEPS
        first = (k % CHANNEL_STEPS) * BK
        moved = ((tap // KERNEL) * width + tap % KERNEL) * DILATION * all_channels + first
        in_step = first + step < channels
        in_b = in_column[None, :] if WHOLE_STEPS else in_step[:, None] & in_column[None, :]
        b = tl.load(weight_at + (tap * channels + first), mask=in_b, other=0.0)
        new_parts: tl.tuple = ()
        new_totals: tl.tuple = ()
        for i in tl.static_range(PARTS):
            in_map = (((inside[i] >> tap) & 1) != 0)[:, None]
            in_a = in_map if WHOLE_STEPS else in_map & in_step[None, :]
            a = tl.load(x_at[i] + moved, mask=in_a, other=0.0)
            part, total = add_product(a, b, parts[i], totals[i], k, PRECISION)
            new_parts += (part,)
            new_totals += (total,)
        parts, totals = new_parts, new_totals

    for i in tl.static_range(PARTS):
        total = parts[i]
        if APART:
            total += totals[i]  # Elsewhere zero, which the compiler would add all the same.
        if x_largest is not None:
            total /= power_below(tl.load(x_largest))
        if bias is not None:
            offset = tl.load(bias + group * out_channels + column, mask=in_column, other=0.0)
            total = plus(total, offset.to(tl.float32)[None, :])
        total = activate(total, ACTIVATION)
        row = first_row + i * PART
        first_at = row.to(tl.int64) * (groups * out_channels) + group * out_channels
        at = (tl.arange(0, PART) * (groups * out_channels))[:, None] + column[None, :]
        inside_map = (row + tl.arange(0, PART) < pixels)[:, None] & in_column[None, :]
        if residual is not None:
            total = plus(
                total, tl.load(residual + first_at + at, mask=inside_map, other=0.0).to(tl.float32)
            )
        if y_largest is not None:
            total *= power_below(tl.load(y_largest))
        tl.store(y + first_at + at, total.to(y.dtype.element_ty), mask=inside_map)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def depthwise_kernel(
    x,  # [B, H, W, C]
    weight,  # [C, KERNEL, KERNEL]
    bias,  # [C]
    residual,  # [B, OH, OW, C]
    y,  # the same
    x_largest,  # as for conv_kernel
    y_largest,
    pixels,  # B * OH * OW
    height,
    width,
    out_height,
    out_width,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BC)
    tile = tl.program_id(0)
    row = (tile // channel_tiles) * BM + tl.arange(0, BM)
    channel = (tile % channel_tiles) * BC + tl.arange(0, BC)
    in_row = row < pixels
    in_channel = channel < channels

    image, out_y, out_x = position(row, out_height, out_width)
    top = out_y * STRIDE - (KERNEL // 2) * DILATION
    left = out_x * STRIDE - (KERNEL // 2) * DILATION
    corner = (image.to(tl.int64) * height + top) * width + left
    x_at = x + (corner * channels)[:, None] + channel[None, :]

    total = tl.zeros((BM, BC), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        down = (tap // KERNEL) * DILATION
        along = (tap % KERNEL) * DILATION
        in_map = (top + down >= 0) & (top + down < height) & in_row
        in_map = in_map & (left + along >= 0) & (left + along < width)
        value = tl.load(
            x_at + (down * width + along) * channels,
            mask=in_map[:, None] & in_channel[None, :],
            other=0.0,
        )
        factor = tl.load(weight + channel * (KERNEL * KERNEL) + tap, mask=in_channel, other=0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)[None, :]

    if x_largest is not None:
        total /= power_below(tl.load(x_largest))
    if bias is not None:
        total += tl.load(bias + channel, mask=in_channel, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    at = (row.to(tl.int64) * channels)[:, None] + channel[None, :]
    inside_map = in_row[:, None] & in_channel[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=inside_map, other=0.0).to(tl.float32)
    if y_largest is not None:
        total *= power_below(tl.load(y_largest))
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside_map)


def activation_name(activation: str | None, dtype: torch.dtype) -> str | None:
    """What `activate` calls an activation, exact enough for results at `dtype`."""
    approximate = dtype != torch.float32 and torch.version.hip is None
    return "gelu_approx" if activation == "gelu" and approximate else activation


def conv_precision() -> str:
    """How float32 convolutions multiply, by PyTorch's setting: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def dense(tensor: Tensor | None) -> Tensor | None:
    """A map or weights in dense NHWC; None for none."""
    return None if tensor is None else channels_last(tensor)


def conv_act(
    x: Tensor,  # [B, C_in, H, W]
    weight: Tensor,  # [C_out, C_in / groups, k, k]
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H_out, W_out]
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    x_largest: Tensor | None = None,  # [1]
    y_largest: Tensor | None = None,  # [1]
) -> Tensor:  # [B, C_out, H_out, W_out]
    """activation(conv(x) + bias) + residual, accumulated in float32.

    float32 products are rounded to TF32 where `torch.backends.cudnn.allow_tf32` says so.

    Blocks of several convolutions pass `x_largest` and `y_largest`, float32 bounds of all values of
    the input and of the result, where these may exceed what float16 holds: such a map is stored
    multiplied by a power of two, that of `power_below`.
    """
    batch, in_channels, height, width = x.shape
    out_channels, group_channels, kernel, _ = weight.shape
    size = (conv_output_size(height, stride), conv_output_size(width, stride))
    y = empty_channels_last(x, (batch, out_channels, *size))
    pixels = batch * size[0] * size[1]
    if pixels == 0:
        return y
    maps: tuple[Any, ...] = (
        channels_last(x),
        channels_last(weight),
        None if bias is None else bias.contiguous(),
        dense(residual),
        y,
        x_largest,
        y_largest,
        pixels,
        height,
        width,
        *size,
    )
    shape = {
        "KERNEL": kernel,
        "STRIDE": stride,
        "DILATION": dilation,
        "ACTIVATION": activation_name(activation, x.dtype),
    }
    if groups == in_channels == out_channels and groups > 1:
        bm, bc = 32, min(triton.next_power_of_2(out_channels), 64)
        grid = (triton.cdiv(pixels, bm) * triton.cdiv(out_channels, bc),)
        depthwise_kernel[grid](*maps, out_channels, **shape, BM=bm, BC=bc, num_warps=4)
        return y
    columns = out_channels // groups
    terms = kernel * kernel * group_channels

    def launch(tile: Tile) -> None:
        # Few enough channels for all taps of a kernel to be one step of the sum.
        at_once = kernel > 1 and terms <= 2 * tile.bk
        bk = max(16, triton.next_power_of_2(terms)) if at_once else tile.bk
        conv_kernel[(triton.cdiv(pixels, tile.bm) * triton.cdiv(columns, tile.bn), groups)](
            *maps,
            groups,
            group_channels,
            columns,
            **shape,
            PRECISION=conv_precision(),
            CHANNEL_STEPS=0 if at_once else triton.cdiv(group_channels, bk),
            WHOLE_STEPS=group_channels % bk == 0,
            BM=tile.bm,
            BN=tile.bn,
            BK=bk,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )

    tile = tile_of(x.dtype, pixels, columns, limits(x))
    if groups == 1:
        layer = Layer("conv_act", x.dtype, (in_channels, columns), kernel, stride, pixels)
        tile = choose(layer, tile, candidates(x.dtype), x, launch, TritonError)
    launch(tile)
    return y
