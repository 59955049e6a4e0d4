"""Launches the C++ kernel of `measure_masks`."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evsam_kernels.ops.measure_masks import reference
from evsam_kernels.ops.measure_masks.reference import MeasuredMasks, Sizes
from evsam_kernels.ops.native import native

DTYPES = (torch.float32,)

_TAPS = 3
# The rounding of PyTorch's two resizings and of ours, as a part of the largest logit that a pixel
# is made of: 8 roundings each, by half a unit in the last place of float32, and half as much again.
_TOLERANCE = 24 * 2.0**-24


def measure_masks(
    logits: Tensor,  # [N, h, w]
    sizes: Sizes,
    threshold: float,
    offset: float,
    with_masks: bool,
) -> MeasuredMasks:
    """Counts above `threshold + offset` and `threshold - offset`, boxes and masks.

    Both resizings are one, computed a pixel at a time. Masks that hold a value which rounding might
    put on another side of a threshold than the reference's rounding does are left to the reference.
    """
    logits = logits.float().contiguous()
    count, height, width = logits.shape
    if min(height, width) < _TAPS or any(
        frame < side for frame, side in zip(sizes.frame, (height, width), strict=True)
    ):
        # An output pixel may depend on more than three pixels along an axis.
        return reference.measure_masks(logits, sizes, threshold, offset, with_masks)
    masks = torch.empty(count, *sizes.image, dtype=torch.bool) if with_masks else None
    row_first, row_weights = _axis(height, sizes.frame[0], sizes.picture[0], sizes.image[0])
    column_first, column_weights = _axis(width, sizes.frame[1], sizes.picture[1], sizes.image[1])
    counts, boxes, doubtful = native().measure_masks(
        logits=logits.numpy(),
        row_first=row_first,
        row_weights=row_weights,
        column_first=column_first,
        column_weights=column_weights,
        inner=threshold + offset,
        threshold=threshold,
        outer=threshold - offset,
        tolerance=_TOLERANCE,
        masks=None if masks is None else masks.view(torch.uint8).numpy(),
        num_threads=torch.get_num_threads(),
    )
    inner, outer = torch.from_numpy(counts).unbind(dim=1)
    found = MeasuredMasks(inner, outer, torch.from_numpy(boxes), masks)
    for index in np.flatnonzero(doubtful):
        one = slice(index, index + 1)
        exact = reference.measure_masks(logits[one], sizes, threshold, offset, with_masks)
        for ours, theirs in zip(found, exact, strict=True):
            if ours is not None and theirs is not None:
                ours[one] = theirs
    return found


@functools.lru_cache(maxsize=64)
def _axis(
    size: int, frame: int, picture: int, image: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """One axis of both resizings: the first of three input positions `[image]` and weights.

    The weights `[3, image]` are what PyTorch multiplies by, found by resizing unit vectors.
    """
    weights = _resized(torch.eye(size), frame)[:picture].double()
    weights = _resized(torch.eye(picture), image).double() @ weights
    used = (weights != 0).numpy()
    first = np.minimum(used.argmax(axis=1), size - _TAPS).astype(np.int32)
    columns = first[:, None] + np.arange(_TAPS)
    taken = np.take_along_axis(weights.numpy(), columns, axis=1)
    return first, np.ascontiguousarray(taken.T, dtype=np.float32)


def _resized(vectors: Tensor, size: int) -> Tensor:
    """Bilinear weights `[size, n]` of `n` input positions, from the unit vectors `[n, n]`."""
    return torch.nn.functional.interpolate(
        vectors[None, None], (size, vectors.shape[1]), mode="bilinear", align_corners=False
    )[0, 0]
