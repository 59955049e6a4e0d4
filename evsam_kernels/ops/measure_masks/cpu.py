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
# The rounding of PyTorch's two resizings and of ours, as a part of the largest logit: 8 roundings
# each, by half a unit in the last place of float32, and half as much again.
_TOLERANCE = 24 * 2.0**-24
_ROWS_COMPARED = 64

_Sums = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""For every output position the first of the input positions that it is a sum of, and weights."""


def measure_masks(
    logits: Tensor,  # [N, h, w]
    sizes: Sizes,
    threshold: float,
    offset: float,
    with_masks: bool,
) -> MeasuredMasks:
    """Counts above `threshold + offset` and `threshold - offset`, boxes and masks.

    Both resizings are one, computed a pixel at a time. Values that rounding might put on another
    side of a threshold are computed again, rounded as PyTorch rounds. Where it does so in a way
    that is not known, masks with such values are left to the reference.
    """
    logits = logits.float().contiguous()
    count, height, width = logits.shape
    if (
        min(height, width) < _TAPS
        or min(sizes.picture) < 2
        or any(frame < side for frame, side in zip(sizes.frame, (height, width), strict=True))
    ):
        # An output pixel may depend on more than three pixels along an axis, or on one alone.
        return reference.measure_masks(logits, sizes, threshold, offset, with_masks)
    masks = torch.empty(count, *sizes.image, dtype=torch.bool) if with_masks else None
    threads = torch.get_num_threads()
    rows, columns = _axes((height, width), sizes)
    counts, boxes, doubtful = native().measure_masks(
        logits=logits.numpy(),
        rows=rows,
        columns=columns,
        inner=threshold + offset,
        threshold=threshold,
        outer=threshold - offset,
        tolerance=_TOLERANCE,
        resolve=_rounding_is_known((height, width), sizes, threads),
        masks=None if masks is None else masks.view(torch.uint8).numpy(),
        num_threads=threads,
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
def _rounding_is_known(size: tuple[int, int], sizes: Sizes, threads: int) -> bool:
    """Whether the kernel rounds as PyTorch does, bit by bit, on maps of a size.

    How PyTorch rounds depends on how it was compiled and on the processor, and may depend on the
    size and the number of threads.
    """
    logits = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    rows, columns = _axes(size, sizes)
    wanted = np.unique(np.linspace(0, sizes.image[0] - 1, _ROWS_COMPARED).astype(np.int64))
    ours = native().resize_masks(logits=logits.numpy(), rows=rows, columns=columns, wanted=wanted)
    theirs = reference.upscale_masks(logits[:, None], sizes)[:, 0, wanted]
    return torch.equal(torch.from_numpy(ours), theirs)


def _axes(size: tuple[int, int], sizes: Sizes) -> tuple[tuple[_Sums, _Sums, _Sums], ...]:
    """Rows and columns."""
    return tuple(
        _axis(*lengths)
        for lengths in zip(size, sizes.frame, sizes.picture, sizes.image, strict=True)
    )


@functools.lru_cache(maxsize=64)
def _axis(size: int, frame: int, picture: int, image: int) -> tuple[_Sums, _Sums, _Sums]:
    """One axis of both resizings at once, of that to the frame and of that to the image.

    The weights are what PyTorch multiplies by, found by resizing unit vectors.
    """
    to_frame, to_image = _resized(torch.eye(size), frame), _resized(torch.eye(picture), image)
    both = to_image.double() @ to_frame[:picture].double()
    return _sums(both, _TAPS), _sums(to_frame, 2), _sums(to_image, 2)


def _sums(weights: Tensor, taps: int) -> _Sums:
    """Weights `[n, positions]`, few of which are not zero: where these begin `[n]`, `[taps, n]`."""
    used = (weights != 0).numpy()
    first = np.minimum(used.argmax(axis=1), weights.shape[1] - taps).astype(np.int32)
    taken = np.take_along_axis(weights.numpy(), first[:, None] + np.arange(taps), axis=1)
    return first, np.ascontiguousarray(taken.T, dtype=np.float32)


def _resized(vectors: Tensor, size: int) -> Tensor:
    """Bilinear weights `[size, n]` of `n` input positions, from the unit vectors `[n, n]`."""
    return torch.nn.functional.interpolate(
        vectors[None, None], (size, vectors.shape[1]), mode="bilinear", align_corners=False
    )[0, 0]
