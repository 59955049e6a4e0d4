"""Tile sizes of the Triton kernel of `conv_act`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A block's share of a product, and how it is computed.

    Attributes:
        bm, bn, bk: rows, columns and the part of the sum that is loaded at once.
        warps: of a block.
        stages: of the software pipeline.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, rows: int, columns: int, channels: int, kernel: int) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3) if columns > 32 else Tile(64, 32, 32, 4, 3)
    bn = 128 if columns > 64 else 64 if columns > 32 else 32
    bk = 32 if channels > 16 else 16
    return Tile(128 if rows >= 128 else 64, bn, bk, 4, 4)
