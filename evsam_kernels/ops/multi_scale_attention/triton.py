"""`multi_scale_attention` as a handful of launches of Triton kernels.

qkv and the projection are products of `conv_act`; attention is that of `relu_linear_attention`,
once for each scale, into its place among the projection's input. Of a scale's aggregation the
depthwise convolution and the grouped product are one kernel: BM pixels of one group, whose
filtered channels go from registers into the product. Global memory: qkv is written once and read
twice, each scale's aggregation written and read once.

In float16 what lies between may exceed the range where the result does not; it is stored
multiplied by powers of two, from bounds that are found first (see `mbconv`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import conv_act, conv_precision, plus, position, power_below
from evsam_kernels.ops.layout import channels_last, empty_channels_last
from evsam_kernels.ops.mbconv.triton import largest_values
from evsam_kernels.ops.relu_linear_attention.triton import attend

DTYPES = HALF_AND_SINGLE


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def aggregate_kernel(
    qkv,  # [B, H, W, groups * dim]
    depth_weight,  # [groups * dim, KERNEL, KERNEL]
    depth_bias,  # [groups * dim]
    group_weight,  # [groups * dim, dim]
    group_bias,  # [groups * dim]
    y,  # [B, H, W, groups * dim]
    qkv_largest,  # [1], float32: qkv is stored multiplied by power_below of that; or None
    y_largest,  # [1], likewise y is written so; or None
    pixels,  # B * H * W
    height,
    width,
    groups,
    dim,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    D: tl.constexpr,  # at least dim
):
    group = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, D)
    in_row = row < pixels
    in_column = column < dim
    channel = group * dim + column
    channels = groups * dim
    _, y_of, x = position(row, height, width)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    filtered = tl.zeros((BM, D), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        down = tap // KERNEL - KERNEL // 2
        along = tap % KERNEL - KERNEL // 2
        in_map = in_row & (y_of + down >= 0) & (y_of + down < height)
        in_map = in_map & (x + along >= 0) & (x + along < width)
        value = tl.load(
            qkv + at + (down * width + along) * channels,
            mask=in_map[:, None] & in_column[None, :],
            other=0.0,
        )
        factor = tl.load(
            depth_weight + channel * (KERNEL * KERNEL) + tap, mask=in_column, other=0.0
        )
        filtered += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    if qkv_largest is not None:
        filtered /= power_below(tl.load(qkv_largest))
    if depth_bias is not None:
        filtered += tl.load(depth_bias + channel, mask=in_column, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(
        group_weight + channel[None, :] * dim + column[:, None],
        mask=in_column[None, :] & in_column[:, None],
        other=0.0,
    )
    # TF32 rounds like float16 and has float32's range.
    total = tl.dot(filtered, weight.to(tl.float32), input_precision=PRECISION)
    if group_bias is not None:
        offset = tl.load(group_bias + channel, mask=in_column, other=0.0)
        total = plus(total, offset.to(tl.float32)[None, :])
    if y_largest is not None:
        total *= power_below(tl.load(y_largest))
    inside = in_row[:, None] & in_column[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def _aggregate(
    qkv: Tensor,
    depth_weight: Tensor,
    depth_bias: Tensor | None,
    group_weight: Tensor,
    group_bias: Tensor | None,
    qkv_largest: Tensor | None,
    y_largest: Tensor | None,
) -> Tensor:
    """The aggregation of one scale `[B, heads * 3 * dim, H, W]`."""
    batch, channels, height, width = qkv.shape
    dim = group_weight.shape[1]
    pixels = batch * height * width
    padded = max(16, triton.next_power_of_2(dim))
    block = max(16, 2048 // padded)
    y = empty_channels_last(qkv, qkv.shape)
    aggregate_kernel[(triton.cdiv(pixels, block), channels // dim)](
        qkv,
        depth_weight.contiguous(),
        None if depth_bias is None else depth_bias.contiguous(),
        group_weight.contiguous(),
        None if group_bias is None else group_bias.contiguous(),
        y,
        qkv_largest,
        y_largest,
        pixels,
        height,
        width,
        channels // dim,
        dim,
        KERNEL=depth_weight.shape[-1],
        PRECISION=conv_precision() if qkv.dtype == torch.float32 else "tf32",
        BM=block,
        D=padded,
        num_warps=4,
    )
    return y


def multi_scale_attention(
    x: Tensor,  # [B, C_in, H, W]
    qkv_weight: Tensor,  # [heads * 3 * dim, C_in, 1, 1]
    qkv_bias: Tensor | None,  # [heads * 3 * dim]
    depth_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, 1, k, k]
    depth_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    group_weights: Sequence[Tensor],  # per scale [heads * 3 * dim, dim, 1, 1]
    group_biases: Sequence[Tensor],  # per scale [heads * 3 * dim], or empty
    proj_weight: Tensor,  # [C_out, heads * dim * (1 + scales), 1, 1]
    proj_bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [B, C_out, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, C_out, H, W]
    """proj(attention(qkv and its aggregations at every scale)) + residual, sums in float32."""
    batch, _, height, width = x.shape
    attended_channels = qkv_weight.shape[0] // 3
    scales = len(depth_weights)
    if batch == 0:
        return conv_act(
            x.new_empty(0, proj_weight.shape[1], height, width), proj_weight, proj_bias, residual
        )
    x = channels_last(x)
    depth_bias: list[Tensor | None] = [*depth_biases] or [None] * scales
    group_bias: list[Tensor | None] = [*group_biases] or [None] * scales
    largest: list[Tensor | None] = [None] * (1 + scales)
    every: Tensor | None = None
    if x.dtype == torch.float16:
        largest, every = _largest(
            x, qkv_weight, qkv_bias, depth_weights, depth_bias, group_weights, group_bias
        )
    qkv = conv_act(x, qkv_weight, qkv_bias, None, y_largest=largest[0])
    shape = (batch, attended_channels * (1 + scales), height, width)
    attended = empty_channels_last(x, shape)
    attend(qkv, head_dim, eps, attended, 0, largest[0], every)
    for scale in range(scales):
        aggregated = _aggregate(
            qkv,
            depth_weights[scale],
            depth_bias[scale],
            group_weights[scale],
            group_bias[scale],
            largest[0],
            largest[1 + scale],
        )
        first = attended_channels * (1 + scale)
        attend(aggregated, head_dim, eps, attended, first, largest[1 + scale], every)
    return conv_act(attended, proj_weight, proj_bias, residual, x_largest=every)


def _largest(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    depth_weights: Sequence[Tensor],
    depth_biases: Sequence[Tensor | None],
    group_weights: Sequence[Tensor],
    group_biases: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], Tensor]:
    """Bounds, float32 `[1]`, of qkv and each scale's aggregation, and of all of them."""
    bounds: list[Tensor] = []
    if not depth_weights:
        bounds += largest_values(x, qkv_weight, qkv_bias, None, None)
    for depth_weight, depth_bias, group_weight, group_bias in zip(
        depth_weights, depth_biases, group_weights, group_biases, strict=True
    ):
        of_qkv, filtered = largest_values(x, qkv_weight, qkv_bias, depth_weight, depth_bias)
        bounds = bounds or [of_qkv]
        of_row = group_weight.abs().sum(dim=(1, 2, 3), dtype=torch.float32).amax()
        base = 0.0 if group_bias is None else group_bias.abs().amax().float()
        bounds.append(of_row * filtered + base)
    return list(bounds), torch.stack(bounds).amax(dim=0)
