"""Which tile of output pixels a block of the CUDA kernel of `mbconv` computes."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

GROUP = 64
"""Hidden channels of a block."""

_STAGES, _STAGE_ROW = 3, 64
_PLACE, _SPARE = 4, 8

# What there are kernels for: warps and steps of 16 rows of each, and, by stride, what tiles of
# output pixels are multiples of.
_SPECIAL_WARPS = ((4, 4), (4, 5))
_SPECIAL_STEPS = {1: (4, 8), 2: (4, 4)}
_ANY_WARPS = ((4, 4),)


class Tile(NamedTuple):
    """What a block computes.

    Attributes:
        height, width: output pixels.
        rows: input pixels that there is room for, 16 for each step of a warp.
        warps: of the block.
        shared: bytes of shared memory.
    """

    height: int
    width: int
    rows: int
    warps: int
    shared: int


@functools.cache
def tile_of(
    dtype: torch.dtype,
    images: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    special: bool,
    groups: int,
    multiprocessors: int,
    most_shared: int,
) -> Tile:
    """The tile that takes least, by the rows that the busiest multiprocessor goes through.

    Args:
        dtype: of the maps.
        images: of the batch.
        size: height and width of the input.
        kernel, stride: of the depthwise convolution.
        special: whether there are kernels for just this stencil and activation.
        groups: of `GROUP` hidden channels.
        multiprocessors: of the GPU.
        most_shared: bytes of shared memory that a block may have.
    """
    out = tuple((extent - 1) // stride + 1 for extent in size)
    step = _SPECIAL_STEPS[stride] if special else (1, 1)

    def under(tile: int) -> int:
        return (tile - 1) * stride + kernel

    best: tuple[tuple[float, int], Tile] | None = None
    for warps, steps in _SPECIAL_WARPS if special else _ANY_WARPS:
        rows = 16 * warps * steps
        for height, width in itertools.product(
            *(range(s, -(-extent // s) * s + s, s) for s, extent in zip(step, out, strict=True))
        ):
            needed = min(under(height), size[0]) * min(under(width), size[1])
            if needed > rows:
                break
            stages = _STAGES * _STAGE_ROW * (rows + GROUP)
            expanded = under(height) * under(width) * (GROUP + _SPARE) * dtype.itemsize
            shared = max(stages, expanded) + rows * _PLACE
            shared += (2 + kernel**2) * GROUP * dtype.itemsize
            if shared > most_shared:
                break
            blocks = images * groups * -(-out[0] // height) * -(-out[1] // width)
            # The more a tile needs, the more is read.
            cost = (-(-blocks // multiprocessors) * rows, blocks * needed)
            if best is None or cost < best[0]:
                best = cost, Tile(height, width, rows, warps, shared)
    assert best is not None  # As a tile of one pixel needs kernel**2 rows.
    return best[1]
