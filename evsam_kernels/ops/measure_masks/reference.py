"""The formula of `measure_masks`: SAM's two resizings, comparisons and boxes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    """Where mask logits go: (height, width) of the frame, the picture in its corner, the image.

    The logits are resized to the frame, the padding right of and below the picture is cut off, and
    the picture is resized to the image.
    """

    frame: tuple[int, int]
    picture: tuple[int, int]
    image: tuple[int, int]


class MeasuredMasks(NamedTuple):
    """What is known of N masks.

    Attributes:
        inner, outer: int64 `[N]`, pixels whose logit exceeds the higher and the lower threshold.
        boxes: int64 `[N, 4]`, (x0, y0, x1, y1) of the outermost pixels in the mask, both ends
            included; zeros for an empty mask.
        masks: bool `[N, H, W]`, or None where they were not asked for.
    """

    inner: Tensor
    outer: Tensor
    boxes: Tensor
    masks: Tensor | None


def upscale_masks(logits: Tensor, sizes: Sizes) -> Tensor:
    """Logits `[B, M, h, w]` -> float32 `[B, M, H, W]`, bilinear both times."""
    framed = _bilinear(logits.float(), sizes.frame)
    height, width = sizes.picture
    return _bilinear(framed[..., :height, :width], sizes.image)


def _bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def mask_boxes(masks: Tensor) -> Tensor:
    """Int64 boxes `[N, 4]` of bool masks `[N, H, W]`; zeros for an empty mask."""
    in_row, in_column = masks.any(dim=2), masks.any(dim=1)
    x0, x1 = _first_and_last(in_column)
    y0, y1 = _first_and_last(in_row)
    return torch.stack([x0, y0, x1, y1], dim=1) * in_row.any(dim=1, keepdim=True)


def _first_and_last(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first and last True of each row of `[N, L]`; any index where there is none."""
    numbers = flags.to(torch.uint8)
    return numbers.argmax(dim=1), flags.shape[1] - 1 - numbers.flip(1).argmax(dim=1)


def measure_masks(
    logits: Tensor,  # [N, h, w]
    sizes: Sizes,
    threshold: float,
    offset: float,
    with_masks: bool,
) -> MeasuredMasks:
    """Counts above `threshold + offset` and `threshold - offset`, boxes and masks."""
    upscaled = upscale_masks(logits[:, None], sizes)[:, 0]
    masks = upscaled > threshold
    return MeasuredMasks(
        inner=(upscaled > threshold + offset).flatten(1).sum(dim=1),
        outer=(upscaled > threshold - offset).flatten(1).sum(dim=1),
        boxes=mask_boxes(masks),
        masks=masks if with_masks else None,
    )
