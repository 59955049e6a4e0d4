"""Tile sizes of the Triton kernels of `fused_mbconv`, and a rule to choose by.

A tile's columns are expanded channels.
"""

from __future__ import annotations

import torch

from evsam_kernels.ops.gpu import Limits
from evsam_kernels.ops.tiling import Tile

SINGLE_TILE = Tile(64, 64, 32, 4, 2)
SMALL_TILE = Tile(64, 128, 32, 4, 3)
OTHER_HALF_TILES = (
    SMALL_TILE,
    Tile(64, 256, 32, 4, 4),
    Tile(128, 128, 32, 8, 3),
    Tile(64, 128, 64, 4, 3),
)
NARROW = 128
"""Output channels whose sums a block has registers for beside those of expanded channels."""

WIDE_COLUMNS = 32
"""Output channels at once where there are more: few, as the expanded ones take up registers."""

_WIDE_TILE = Tile(128, 128, 32, 4, 3)
"""The one for more output channels, but where the assembler spills registers of it."""

_MEDIUM, _LARGE, _HUGE = 96 << 10, 160 << 10, 200 << 10
"""Bytes of shared memory of GPUs that `_WIDE_TILE` fits, those that larger tiles for no more output
channels fit as well, and those whose products take operands from there (sm_90)."""


def tile_of(
    dtype: torch.dtype, mid_channels: int, out_channels: int, limits: Limits
) -> Tile | None:
    """The tile for so many channels; None where no block has the registers.

    Counted at batch 16 on an A100 (docs/simt.md): larger tiles need less shared memory bandwidth,
    which is what binds, as long as nothing spills.
    """
    if dtype == torch.float32:
        return SINGLE_TILE if out_channels <= 64 else None
    if out_channels > NARROW:
        if mid_channels > 2 * SMALL_TILE.bn:
            return None
        return _WIDE_TILE if _MEDIUM <= limits.shared < _HUGE else SMALL_TILE
    if out_channels > 64:
        return Tile(128, 128, 32, 8, 3) if mid_channels > 64 else SMALL_TILE
    if mid_channels > 256:
        # The assembler's architectures with less shared memory spill a register of the larger one.
        return Tile(128, 256 if limits.shared >= _LARGE else 128, 32, 8, 3)
    return Tile(64, 256, 32, 4, 4) if mid_channels > 128 else SMALL_TILE


def candidates(dtype: torch.dtype, out_channels: int) -> tuple[Tile, ...]:
    """Tiles worth timing beside the rule's."""
    return () if dtype == torch.float32 or out_channels > NARROW else OTHER_HALF_TILES
