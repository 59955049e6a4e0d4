"""Triton kernel of `upsample_add`.

Layout: NHWC. Tile: BM output pixels and BC channels: of each map up to 16 pixels, which neighbours
use too and find in L1 or L2, make one of the output (Keys 1981, a = -0.75). A launch adds up to
four maps; the sum of more goes from launch to launch in float32. Global memory: every map once,
the result once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from evsam_kernels.ops.checks import HALF_AND_SINGLE
from evsam_kernels.ops.conv_act.triton import position
from evsam_kernels.ops.layout import channels_last, empty_channels_last

DTYPES = HALF_AND_SINGLE

_MAPS_AT_ONCE = 4


@triton.jit
def _tap(place, tap, size):
    """Input position number `tap` of the four round `place`, and its weight (Keys, equation 4)."""
    position = tl.floor(place) - 1.0 + tap
    t = tl.abs(place - position)
    near = (1.25 * t - 2.25) * t * t + 1.0
    far = ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0
    inside = tl.minimum(tl.maximum(position.to(tl.int32), 0), size - 1)
    return inside, tl.where(t <= 1.0, near, far)


@triton.jit
def _resized(
    x,  # [B, h, w, C]
    size_y,
    size_x,
    image,
    out_y,
    out_x,
    height,
    width,
    channel,
    channels,
    inside,
    SAME_SIZE: tl.constexpr,
):
    """Pixels (out_y, out_x) of the resized map, float32 `[BM, BC]`."""
    base = image.to(tl.int64) * size_y * size_x * channels
    if SAME_SIZE:
        at = base + (out_y * size_x + out_x).to(tl.int64) * channels
        return tl.load(x + at[:, None] + channel[None, :], inside, other=0.0).to(tl.float32)
    place_y = (out_y + 0.5) * (size_y.to(tl.float32) / height) - 0.5
    place_x = (out_x + 0.5) * (size_x.to(tl.float32) / width) - 0.5
    total = tl.zeros((out_y.shape[0], channel.shape[0]), tl.float32)
    for down in range(4):
        y, weight_y = _tap(place_y, down, size_y)
        line = tl.zeros_like(total)
        for along in tl.static_range(4):
            z, weight_x = _tap(place_x, along, size_x)
            at = base + (y * size_x + z).to(tl.int64) * channels
            value = tl.load(x + at[:, None] + channel[None, :], inside, other=0.0)
            line += value.to(tl.float32) * weight_x[:, None]
        total += line * weight_y[:, None]
    return total


@triton.jit(do_not_specialize=["pixels", "height", "width", "h0", "w0", "h1", "w1", "h2", "w2",
                               "h3", "w3"])  # fmt: skip
def upsample_add_kernel(
    # Maps [B, h, w, C], None from the first that there is not on.
    x0, h0, w0,
    x1, h1, w1,
    x2, h2, w2,
    x3, h3, w3,
    before,  # [B, height, width, C], float32: the sum of other maps; or None
    y,  # [B, height, width, C]
    pixels,  # B * height * width
    height,
    width,
    channels,
    SAME_SIZE: tl.constexpr,  # a bit for each map
    BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    channel_tiles = tl.cdiv(channels, BC)
    tile = tl.program_id(0)
    row = (tile // channel_tiles) * BM + tl.arange(0, BM)
    channel = (tile % channel_tiles) * BC + tl.arange(0, BC)
    inside = (row < pixels)[:, None] & (channel < channels)[None, :]
    row_inside = tl.minimum(row, pixels - 1)
    image, out_y, out_x = position(row_inside, height, width)
    total = _resized(
        x0, h0, w0, image, out_y, out_x, height, width, channel, channels, inside,
        SAME_SIZE & 1 != 0,
    )  # fmt: skip
    if x1 is not None:
        total += _resized(
            x1, h1, w1, image, out_y, out_x, height, width, channel, channels, inside,
            SAME_SIZE & 2 != 0,
        )  # fmt: skip
    if x2 is not None:
        total += _resized(
            x2, h2, w2, image, out_y, out_x, height, width, channel, channels, inside,
            SAME_SIZE & 4 != 0,
        )  # fmt: skip
    if x3 is not None:
        total += _resized(
            x3, h3, w3, image, out_y, out_x, height, width, channel, channels, inside,
            SAME_SIZE & 8 != 0,
        )  # fmt: skip
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    if before is not None:
        total += tl.load(before + at, inside, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), inside)


def upsample_add(
    maps: Sequence[Tensor],  # each [B, C, h, w]
    height: int,
    width: int,
) -> Tensor:  # [B, C, height, width]
    """Sum of the maps after bicubic resizing, in float32."""
    dense = [channels_last(x) for x in maps]
    batch, channels = dense[0].shape[:2]
    y = empty_channels_last(dense[0], (batch, channels, height, width))
    pixels = batch * height * width
    if pixels == 0:
        return y
    bc = min(triton.next_power_of_2(channels), 128)
    bm = 1024 // bc
    grid = (triton.cdiv(pixels, bm) * triton.cdiv(channels, bc),)
    total: Tensor | None = None
    for first in range(0, len(dense), _MAPS_AT_ONCE):
        some = dense[first : first + _MAPS_AT_ONCE]
        last = first + _MAPS_AT_ONCE >= len(dense)
        described: list[Tensor | int | None] = []
        for x in some:
            described += [x, x.shape[2], x.shape[3]]
        described += [None, 1, 1] * (_MAPS_AT_ONCE - len(some))
        same = sum(1 << i for i, x in enumerate(some) if tuple(x.shape[2:]) == (height, width))
        into = y if last else empty_channels_last(y.new_empty(0, dtype=torch.float32), y.shape)
        upsample_add_kernel[grid](
            *described,
            total,
            into,
            pixels,
            height,
            width,
            channels,
            SAME_SIZE=same,
            BM=bm,
            BC=bc,
            num_warps=4,
        )
        total = into
    return y
