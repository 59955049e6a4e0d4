"""Tile sizes of the Triton kernel of `fused_mbconv`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from evsam_kernels.ops.gpu import Limits


class Tile(NamedTuple):
    """A block's share, and how it is computed.

    Attributes:
        bm: pixels.
        bf: expanded channels at a time.
        bk: the part of the first sum that is loaded at once.
        warps: of a block.
        stages: of the software pipeline.
    """

    bm: int
    bf: int
    bk: int
    warps: int
    stages: int


SINGLE_TILE = Tile(64, 64, 32, 4, 2)
SMALL_TILE = Tile(64, 128, 32, 4, 3)
_LARGE = 160 << 10
"""Bytes of shared memory that the larger tiles of many output channels need."""


def tile_of(
    dtype: torch.dtype, mid_channels: int, out_channels: int, limits: Limits
) -> Tile | None:
    """The tile for so many channels; None where the sums of a block would not fit the registers.

    Counted at batch 16 on an A100 (docs/simt.md): larger tiles need less shared memory bandwidth,
    which is what binds, as long as nothing spills.
    """
    if dtype == torch.float32:
        return SINGLE_TILE if out_channels <= 64 else None
    if out_channels > 128:
        # All expanded channels at once: several chunks of them spill.
        fits = mid_channels <= 256 and limits.shared >= _LARGE
        return Tile(64, 256, 32, 8, 3) if fits and out_channels <= 256 else None
    if out_channels > 64:
        return Tile(128, 128, 32, 8, 3) if mid_channels > 64 else SMALL_TILE
    if mid_channels > 256:
        # The assembler's architectures with less shared memory spill a register of the larger one.
        return Tile(128, 256 if limits.shared >= _LARGE else 128, 32, 8, 3)
    return Tile(64, 256, 32, 4, 4) if mid_channels > 128 else SMALL_TILE
