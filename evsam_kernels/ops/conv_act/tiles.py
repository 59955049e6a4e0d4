"""Tile sizes of the Triton kernel of `conv_act`, and a rule to choose by: what they must cost."""

from __future__ import annotations

import torch

from evsam_kernels.ops.gpu import Limits
from evsam_kernels.ops.tiling import Tile

HALF_TILES = (
    Tile(128, 128, 32, 4, 4),
    Tile(64, 128, 32, 4, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(128, 64, 32, 4, 4),
    Tile(256, 32, 32, 4, 3),
    Tile(64, 32, 32, 4, 4),
)
SINGLE_TILES = (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3))
OTHER_HALF_TILES = (
    Tile(128, 128, 64, 4, 2),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(80, 128, 32, 4, 4),
    Tile(80, 128, 64, 4, 3),
    Tile(160, 128, 32, 4, 4),
)
"""Which the rule leaves out: it cannot tell deeper steps from those, nor does it know that rows in
parts of 16 or 32 are too few for the tensor cores of compute capability 9.0."""


def tile_of(dtype: torch.dtype, rows: int, columns: int, limits: Limits) -> Tile:
    """The tile for a product of `rows` and `columns` on a GPU with such limits."""

    def cost(tile: Tile) -> float:
        blocks = -(-rows // tile.bm) * -(-columns // tile.bn)
        # Per channel of the sum, in cycles of an A100's multiprocessor: 1,024 multiplications, and
        # 128 bytes of shared memory, through which both operands go four times (written once and
        # read by the warps that share them).
        multiplied = tile.bm * tile.bn / 1024
        moved = 4 * 2 * (tile.bm + tile.bn) / 128
        return -(-blocks // limits.multiprocessors) * max(multiplied, moved)

    # Of equal ones the first, which is the largest.
    return min(SINGLE_TILES if dtype == torch.float32 else HALF_TILES, key=cost)


def candidates(dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles worth timing."""
    return SINGLE_TILES if dtype == torch.float32 else HALF_TILES + OTHER_HALF_TILES
