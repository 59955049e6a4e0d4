"""Triton kernel of `layer_norm_2d`.

Layout: NHWC, so that a pixel's channels are one row. Tile: BM pixels and all their channels, which
stay in registers, so that the mean is known before anything is squared (no cancellation) at the
price of one read. Global memory: the map once, the result once. Statistics: float32; a float16 row
cannot overflow them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.layout import channels_last, empty_channels_last

DTYPES = HALF_AND_SINGLE

_ELEMENTS = 2048


@triton.jit(do_not_specialize=["pixels", "eps"])
def layer_norm_kernel(
    x,  # [pixels, channels]
    weight,  # [channels]
    bias,  # [channels]
    y,  # [pixels, channels]
    pixels,
    channels,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,  # at least channels
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.arange(0, BC)
    in_channel = channel < channels
    inside = (row < pixels)[:, None] & in_channel[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / channels
    centred = tl.where(in_channel[None, :], value - mean[:, None], 0.0)
    # Far from zero the mean is rounded by more than small differences from it: what rounding left
    # of it is taken off as well (Chan, Golub and LeVeque 1983, section 1).
    rest = tl.sum(centred, axis=1) / channels
    centred = tl.where(in_channel[None, :], centred - rest[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    result = centred * tl.rsqrt(variance + eps)[:, None]
    if weight is not None:
        factor = tl.load(weight + channel, in_channel, other=0.0).to(tl.float32)
        result *= factor[None, :]
    if bias is not None:
        result += tl.load(bias + channel, in_channel, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), inside)


def layer_norm_2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float = 1e-6,
) -> Tensor:  # [B, C, H, W]
    """(x - mean) / sqrt(variance + eps) over channels, times weight, plus bias."""
    batch, channels, height, width = x.shape
    y = empty_channels_last(x, x.shape)
    pixels = batch * height * width
    if pixels == 0:
        return y
    bc = triton.next_power_of_2(channels)
    bm = max(1, _ELEMENTS // bc)
    layer_norm_kernel[(triton.cdiv(pixels, bm),)](
        channels_last(x),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        pixels,
        channels,
        eps,
        BM=bm,
        BC=bc,
        num_warps=4,
        # Lanes that share a sum would else round its squares differently.
        enable_fp_fusion=False,
    )
    return y
