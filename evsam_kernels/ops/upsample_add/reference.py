"""The formula of `upsample_add`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_add(
    maps: Sequence[Tensor],  # each [B, C, h, w]
    height: int,
    width: int,
) -> Tensor:  # [B, C, height, width]
    """Sum of the maps after bicubic resizing, align_corners False (a = -0.75, no antialiasing)."""
    resized = [F.interpolate(x, (height, width), mode="bicubic", align_corners=False) for x in maps]
    return torch.stack(resized).sum(dim=0)
