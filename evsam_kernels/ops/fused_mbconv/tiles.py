"""Tile sizes of the Triton kernel of `fused_mbconv`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A block's share, and how it is computed."""

    bm: int
    bf: int
    bk: int
    warps: int
    stages: int


def tile_of(
    dtype: torch.dtype, channels: int, mid_channels: int, out_channels: int
) -> Tile | None:
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3) if out_channels <= 64 else None
    if out_channels > 256:
        return None
    if out_channels > 128:
        return Tile(64, 64, 32, 8, 3)
    return Tile(64, 128, 32, 4, 3)
