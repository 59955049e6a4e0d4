"""Triton kernel of `upsample_add`.

Layout: NHWC. A launch adds up to four maps; the sum of more goes from launch to launch in float32.
Global memory: every map once, the result once.

Where the result is 1, 2 or 4 times as large as every map, a tile is a patch of 4x4 output pixels:
which input pixels it needs, and with which weights (Keys 1981, a = -0.75), is the same for all
patches. The input under it, two pixels more on every side, is resized vertically and then
horizontally in registers. For other sizes a tile is BM output pixels in a row, each made of 16
pixels of each map, which neighbours use too and find in L1 or L2, by weights of its own.
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
_PATCH = 4


@triton.jit
def _weight(t):
    """Weight of an input position `t` away (Keys, equation 4)."""
    near = (1.25 * t - 2.25) * t * t + 1.0
    far = ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0
    return tl.where(t <= 1.0, near, far)


@triton.jit
def _tap(place, tap, size):
    """Input position number `tap` of the four round `place`, and its weight."""
    position = tl.floor(place) - 1.0 + tap
    inside = tl.minimum(tl.maximum(position.to(tl.int32), 0), size - 1)
    return inside, _weight(tl.abs(place - position))


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


@triton.jit
def _between(values, SCALE: tl.constexpr, PHASE: tl.constexpr):
    """Output number PHASE of a patch from `values`, those of two positions before it and on."""
    if SCALE == 1:
        return values[PHASE]
    else:
        # Where the output lies among input positions, times twice SCALE.
        place: tl.constexpr = 2 * PHASE + 1 - SCALE
        before: tl.constexpr = place // (2 * SCALE)
        away: tl.constexpr = place / (2 * SCALE) - before
        total = values[before + 1] * _weight(away + 1.0)
        total += values[before + 2] * _weight(away)
        total += values[before + 3] * _weight(1.0 - away)
        total += values[before + 4] * _weight(2.0 - away)
        return total


@triton.jit
def _resized_patch(
    x,  # [B, h, w, C]
    size_y,
    size_x,
    image,
    patch_y,
    patch_x,
    channel,
    channels,
    SCALE: tl.constexpr,
    PATCH: tl.constexpr,
):
    """A patch of the resized map: PATCH lines of as many pixels, float32 `[BC]` each."""
    inside = channel < channels
    STEP: tl.constexpr = PATCH // SCALE  # A patch in input positions.
    AROUND: tl.constexpr = 0 if SCALE == 1 else 2
    lines = tl.tuple(())
    for i in tl.static_range(STEP + 2 * AROUND):
        y = tl.minimum(tl.maximum(patch_y * STEP + (i - AROUND), 0), size_y - 1)
        lines += (x + ((image * size_y + y) * size_x).to(tl.int64) * channels + channel,)
    columns = tl.tuple(())
    for i in tl.static_range(STEP + 2 * AROUND):
        z = tl.minimum(tl.maximum(patch_x * STEP + (i - AROUND), 0), size_x - 1)
        values = tl.tuple(())
        for line in tl.static_range(STEP + 2 * AROUND):
            value = tl.load(lines[line] + z * channels, inside, other=0.0)
            values += (value.to(tl.float32),)
        column = tl.tuple(())
        for down in tl.static_range(PATCH):
            column += (_between(values, SCALE, down),)
        columns += (column,)
    patch = tl.tuple(())
    for down in tl.static_range(PATCH):
        values = tl.tuple(())
        for i in tl.static_range(STEP + 2 * AROUND):
            values += (columns[i][down],)
        line = tl.tuple(())
        for along in tl.static_range(PATCH):
            line += (_between(values, SCALE, along),)
        patch += (line,)
    return patch


@triton.jit
def _sum(patch, other):
    """Both patches' sum."""
    total = tl.tuple(())
    for down in tl.static_range(len(patch)):
        line = tl.tuple(())
        for along in tl.static_range(len(patch)):
            line += (patch[down][along] + other[down][along],)
        total += (line,)
    return total


@triton.jit(do_not_specialize=["height", "width", "h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3"])
def upsample_add_patch_kernel(
    # As for upsample_add_kernel; each map is SCALE times smaller than the result.
    x0, h0, w0,
    x1, h1, w1,
    x2, h2, w2,
    x3, h3, w3,
    before,
    y,
    height,
    width,
    channels,
    SCALE0: tl.constexpr,
    SCALE1: tl.constexpr,
    SCALE2: tl.constexpr,
    SCALE3: tl.constexpr,
    PATCH: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    channel_tiles = tl.cdiv(channels, BC)
    tile = tl.program_id(0)
    channel = (tile % channel_tiles) * BC + tl.arange(0, BC)
    down_map, along_map = tl.cdiv(height, PATCH), tl.cdiv(width, PATCH)
    image, patch_y, patch_x = position(tile // channel_tiles, down_map, along_map)
    total = _resized_patch(x0, h0, w0, image, patch_y, patch_x, channel, channels, SCALE0, PATCH)
    if x1 is not None:
        resized = _resized_patch(
            x1, h1, w1, image, patch_y, patch_x, channel, channels, SCALE1, PATCH
        )
        total = _sum(total, resized)
    if x2 is not None:
        resized = _resized_patch(
            x2, h2, w2, image, patch_y, patch_x, channel, channels, SCALE2, PATCH
        )
        total = _sum(total, resized)
    if x3 is not None:
        resized = _resized_patch(
            x3, h3, w3, image, patch_y, patch_x, channel, channels, SCALE3, PATCH
        )
        total = _sum(total, resized)
    for down in tl.static_range(PATCH):
        out_y = patch_y * PATCH + down
        line = ((image * height + out_y) * width).to(tl.int64) * channels + channel
        for along in tl.static_range(PATCH):
            out_x = patch_x * PATCH + along
            inside = (channel < channels) & ((out_y < height) & (out_x < width))
            value = total[down][along]
            if before is not None:
                value += tl.load(before + line + out_x * channels, inside, other=0.0)
            tl.store(y + line + out_x * channels, value.to(y.dtype.element_ty), inside)


def _scale(x: Tensor, height: int, width: int) -> int | None:
    """How many times larger than a map the result is in both directions, where a patch can be."""
    for scale in (1, 2, 4):
        if (scale * x.shape[2], scale * x.shape[3]) == (height, width):
            return scale
    return None


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
    scales = [_scale(x, height, width) for x in dense]
    total: Tensor | None = None
    for first in range(0, len(dense), _MAPS_AT_ONCE):
        some = slice(first, first + _MAPS_AT_ONCE)
        absent = _MAPS_AT_ONCE - len(dense[some])
        described: list[Tensor | int | None] = []
        for x in dense[some]:
            described += [x, x.shape[2], x.shape[3]]
        described += [None, 1, 1] * absent
        last = first + _MAPS_AT_ONCE >= len(dense)
        into = y if last else empty_channels_last(y.new_empty(0, dtype=torch.float32), y.shape)
        if None in scales[some]:
            bc = min(triton.next_power_of_2(channels), 128)
            bm = 1024 // bc
            upsample_add_kernel[(triton.cdiv(pixels, bm) * triton.cdiv(channels, bc),)](
                *described,
                total,
                into,
                pixels,
                height,
                width,
                channels,
                SAME_SIZE=sum(1 << i for i, scale in enumerate(scales[some]) if scale == 1),
                BM=bm,
                BC=bc,
                num_warps=4,
            )
        else:
            bc = min(triton.next_power_of_2(channels), 256)
            patches = batch * triton.cdiv(height, _PATCH) * triton.cdiv(width, _PATCH)
            upsample_add_patch_kernel[(patches * triton.cdiv(channels, bc),)](
                *described,
                total,
                into,
                height,
                width,
                channels,
                *scales[some],
                *[1] * absent,
                PATCH=_PATCH,
                BC=bc,
                num_warps=max(1, bc // 64),
            )
        total = into
    return y
