"""Mask algebra for "segment everything": run lengths, boxes, NMS, regions, crops, grids.

Same results as SAM's mask generator (Kirillov et al., arXiv 2304.02643, appendix B). Boxes are
(x0, y0, x1, y1) in pixels and name the outermost pixels inside the mask, both ends included.
"""

from __future__ import annotations

import importlib
import math
from itertools import product
from types import ModuleType
from typing import NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F

from evsam_kernels.sam.preprocess import Size


class Rle(TypedDict):
    """Uncompressed COCO run lengths of one mask.

    `size` is [height, width]; `counts` are the lengths of runs of alternately background and
    mask, down the columns, beginning with background (0 where the first pixel is in the mask).
    """

    size: list[int]
    counts: list[int]


class CocoRle(TypedDict):
    """Compressed COCO run lengths of one mask; `counts` is text, so that it can go into JSON."""

    size: list[int]
    counts: str


class Crop(NamedTuple):
    """A window (x0, y0, x1, y1), ends excluded, of the image, and the crop layer it belongs to."""

    box: tuple[int, int, int, int]
    layer: int


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import a module that only `purpose` needs.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}: pip install {package}") from error


def masks_to_rle(masks: torch.Tensor) -> list[Rle]:
    """Run lengths of bool masks `[N, H, W]`."""
    count, height, width = masks.shape
    columns = masks.transpose(1, 2).flatten(1)
    # A run starts wherever a pixel differs from the one before; before the first is background.
    starts = columns.clone()
    starts[:, 1:] ^= columns[:, :-1]
    rows, positions = (index.cpu().numpy() for index in starts.nonzero(as_tuple=True))
    ends = np.searchsorted(rows, np.arange(1, count))
    return [
        {
            "size": [height, width],
            "counts": np.diff(run_starts, prepend=0, append=height * width).tolist(),
        }
        for run_starts in np.split(positions, ends)[:count]
    ]


def rle_to_mask(rle: Rle) -> np.ndarray:
    """Bool mask `[H, W]` of run lengths.

    Raises:
        ValueError: the runs do not add up to height times width.
    """
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(
            f"rle counts must be non-negative and add up to {height} x {width} = "
            f"{height * width} pixels, got a sum of {counts.sum()}"
        )
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def rle_area(rle: Rle) -> int:
    """Number of pixels in the mask."""
    return sum(rle["counts"][1::2])


def rle_to_coco(rle: Rle) -> CocoRle:
    """Compress run lengths with pycocotools.

    Raises:
        ImportError: pycocotools is not installed.
    """
    coco_mask = import_optional("pycocotools.mask", "compressed run-length output")
    compressed = coco_mask.frPyObjects(rle, *rle["size"])
    return {"size": list(compressed["size"]), "counts": compressed["counts"].decode("ascii")}


def box_to_xywh(box: torch.Tensor) -> torch.Tensor:
    """(x0, y0, x1, y1) `[..., 4]` to (x0, y0, x1 - x0, y1 - y0), as SAM reports boxes."""
    corner, far_corner = box[..., :2], box[..., 2:]
    return torch.cat([corner, far_corner - corner], dim=-1)


def box_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression.

    Goes through boxes from the highest score to the lowest, those of equal score in the order
    given, and drops each whose IoU with one already kept exceeds `iou_threshold`. IoU is in
    float32 and boxes have no area beyond their corners, so that two boxes of no area never
    suppress each other (their IoU is 0 / 0). That is what torchvision's `nms` does on the CPU.

    Args:
        boxes: `[N, 4]`, (x0, y0, x1, y1).
        scores: `[N]`.

    Returns:
        int64 indices of the boxes kept, from the highest score to the lowest.
    """
    boxes = boxes.float()
    extent = boxes[:, 2:] - boxes[:, :2]
    areas = extent[:, 0] * extent[:, 1]
    remaining = scores.sort(descending=True, stable=True).indices
    kept = []
    while remaining.numel():
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[remaining, :2])
        high = torch.minimum(boxes[best, 2:], boxes[remaining, 2:])
        overlap = (high - low).clamp(min=0)
        intersection = overlap[:, 0] * overlap[:, 1]
        iou = intersection / (areas[best] + areas[remaining] - intersection)
        # In float64, lest the threshold be rounded to float32 before it is compared with.
        remaining = remaining[~(iou.double() > iou_threshold)]
    return torch.stack(kept) if kept else remaining


def remove_small_regions(mask: np.ndarray, min_area: float) -> tuple[np.ndarray, bool]:
    """Fill holes of fewer than `min_area` pixels, then drop islands of fewer, 8-connected.

    Where every island is that small the largest stays, the first in reading order among equals.

    Args:
        mask: bool `[H, W]`; left unchanged.

    Returns:
        the new mask, and whether anything changed.

    Raises:
        ImportError: scipy is not installed.
    """
    holes, areas = _connected_regions(~mask)
    fill = areas < min_area
    fill[0] = False
    filled = mask | fill[holes]

    islands, areas = _connected_regions(filled)
    drop = areas < min_area
    drop[0] = False
    if len(areas) > 1 and drop[1:].all():
        drop[1 + areas[1:].argmax()] = False
    changed = bool(fill.any() or (areas[1:] < min_area).any())
    return filled & ~drop[islands], changed


def _connected_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels `[H, W]` of a mask's regions, from 1 in reading order, and pixels per label."""
    ndimage = import_optional("scipy.ndimage", "min_mask_region_area")
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return labels, np.bincount(labels.ravel(), minlength=count + 1)


def point_grid(points_per_side: int) -> np.ndarray:
    """Float64 points (x, y) `[points_per_side**2, 2]` in the unit square, row after row."""
    margin = 1 / (2 * points_per_side)
    ticks = np.linspace(margin, 1 - margin, points_per_side)
    x, y = np.meshgrid(ticks, ticks)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def layer_point_grids(points_per_side: int, n_layers: int, downscale: int) -> list[np.ndarray]:
    """Grids for the image and `n_layers` crop layers, each `downscale` times coarser.

    Raises:
        ValueError: a layer would have no points.
    """
    if points_per_side // downscale**n_layers < 1:
        raise ValueError(
            f"crop_n_points_downscale_factor {downscale} leaves no points in crop layer "
            f"{n_layers} of points_per_side {points_per_side}; use a smaller factor or fewer layers"
        )
    return [point_grid(points_per_side // downscale**layer) for layer in range(n_layers + 1)]


def crop_windows(im_size: Size, n_layers: int, overlap_ratio: float) -> list[Crop]:
    """The image itself, then for layer i = 1.. a grid of 2**i by 2**i overlapping windows.

    Windows of layer 1 overlap by `overlap_ratio` of the image's short side, those of later layers
    by proportionally less. Windows without pixels, which images of a few pixels produce, are left
    out.
    """
    height, width = im_size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(im_size) * (2 / per_side))
        crop_width = math.ceil((overlap * (per_side - 1) + width) / per_side)
        crop_height = math.ceil((overlap * (per_side - 1) + height) / per_side)
        for column, row in product(range(per_side), repeat=2):
            x0, y0 = column * (crop_width - overlap), row * (crop_height - overlap)
            x1, y1 = min(x0 + crop_width, width), min(y0 + crop_height, height)
            if x0 < x1 and y0 < y1:
                crops.append(Crop((x0, y0, x1, y1), layer))
    return crops


def boxes_at_crop_edge(
    boxes: torch.Tensor, crop: Crop, im_size: Size, tolerance: float = 20.0
) -> torch.Tensor:
    """Which boxes the crop probably cuts off: bool `[N]`.

    Those with a side within `tolerance` pixels of the crop's but not of the image's.

    Args:
        boxes: `[N, 4]` in the image's coordinates.
    """
    crop_sides = torch.tensor(crop.box, device=boxes.device)
    image_sides = torch.tensor((0, 0, im_size[1], im_size[0]), device=boxes.device)
    at_crop = (boxes - crop_sides).abs() <= tolerance
    at_image = (boxes - image_sides).abs() <= tolerance
    return (at_crop & ~at_image).any(dim=1)


def uncrop_masks(masks: torch.Tensor, crop: Crop, im_size: Size) -> torch.Tensor:
    """Bool masks `[N, h, w]` of a crop as masks `[N, H, W]` of the image."""
    x0, y0, x1, y1 = crop.box
    height, width = im_size
    if masks.shape[1:] == (height, width):
        return masks
    return F.pad(masks, (x0, width - x1, y0, height - y1), value=False)
