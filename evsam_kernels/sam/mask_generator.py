"""Segment everything: masks for a grid of points over an image, filtered and without duplicates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from evsam_kernels.ops.measure_masks.api import measure_masks
from evsam_kernels.ops.measure_masks.reference import mask_boxes
from evsam_kernels.sam.masks import (
    CocoRle,
    Crop,
    Rle,
    box_nms,
    box_to_xywh,
    boxes_at_crop_edge,
    crop_windows,
    import_optional,
    layer_point_grids,
    masks_to_rle,
    remove_small_regions,
    rle_area,
    rle_to_coco,
    rle_to_mask,
    uncrop_masks,
)
from evsam_kernels.sam.predictor import EfficientViTSamPredictor
from evsam_kernels.sam.preprocess import ImageInput, Size, as_image_array

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


class EfficientViTSamAutomaticMaskGenerator:
    """Finds the masks of everything in an image, with SAM's procedure and SAM's parameters.

    Every grid point is a prompt for three masks. Those of low predicted IoU or low stability go,
    then those whose box overlaps a better mask's; the same on crops of the image if asked, where
    masks cut off by the crop go too and masks of smaller crops win over duplicates.

    Args:
        model: an EfficientViT-SAM, fused or not, as the predictor takes.
        points_per_side: points along each side of the grid; None where `point_grids` is given.
        points_per_batch: points decoded at once. Bounds the memory: at most this many masks are
            held at full size at a time.
        pred_iou_thresh: keep masks of a predicted IoU above this; off at 0 or below.
        stability_score_thresh: keep masks at least this stable; off at 0 or below.
        stability_score_offset: how far the mask threshold is moved to measure stability.
        box_nms_thresh: box IoU above which two masks of a crop are duplicates.
        crop_n_layers: layers of crops to segment besides the image; layer i has 4**i crops.
        crop_nms_thresh: box IoU above which masks of two crops are duplicates.
        crop_overlap_ratio: overlap of crops of the first layer, as a part of the short side.
        crop_n_points_downscale_factor: how much coarser the grid is with each layer.
        point_grids: own points in place of `points_per_side`: per layer, the image's included,
            (x, y) in the unit square, `[N, 2]`.
        min_mask_region_area: fill holes and drop islands of fewer pixels; needs scipy.
        output_mode: what `segmentation` is: "binary_mask", "uncompressed_rle" or "coco_rle", the
            last of which needs pycocotools.

    Raises:
        TypeError, ValueError: an unusable argument.
        ImportError: scipy or pycocotools is needed and not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        _require_integer("points_per_batch", points_per_batch, minimum=1)
        _require_integer("crop_n_layers", crop_n_layers, minimum=0)
        _require_integer(
            "crop_n_points_downscale_factor", crop_n_points_downscale_factor, minimum=1
        )
        _require_real("pred_iou_thresh", pred_iou_thresh, -math.inf, 1)
        _require_real("stability_score_thresh", stability_score_thresh, -math.inf, 1)
        _require_real("stability_score_offset", stability_score_offset, 0, math.inf)
        _require_real("box_nms_thresh", box_nms_thresh, 0, 1)
        _require_real("crop_nms_thresh", crop_nms_thresh, 0, 1)
        _require_real("crop_overlap_ratio", crop_overlap_ratio, 0, 1)
        _require_real("min_mask_region_area", min_mask_region_area, 0, math.inf)
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {_OUTPUT_MODES}, got {output_mode!r}")
        if (points_per_side is None) == (point_grids is None):
            raise ValueError(
                "give exactly one of points_per_side and point_grids: with own point_grids, pass "
                "points_per_side=None"
            )
        if points_per_side is not None:
            _require_integer("points_per_side", points_per_side, minimum=1)
            self.point_grids = layer_point_grids(
                points_per_side, crop_n_layers, crop_n_points_downscale_factor
            )
        elif point_grids is not None:
            self.point_grids = _checked_grids(point_grids, crop_n_layers)
        if output_mode == "coco_rle":
            import_optional("pycocotools.mask", 'output_mode="coco_rle"')
        if min_mask_region_area > 0:
            import_optional("scipy.ndimage", "min_mask_region_area")

        self.predictor = EfficientViTSamPredictor(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    @torch.no_grad()
    def generate(self, image: ImageInput, progress: bool = False) -> list[dict[str, Any]]:
        """Find all masks of an image.

        Args:
            image: uint8 RGB `[H, W, 3]`, or a PIL image.
            progress: show a progress bar over batches of points; needs rich.

        Returns:
            one dict per mask, none where nothing passes the filters:
            segmentation: bool `[H, W]`, or run lengths {"size": [H, W], "counts": ...}.
            area: pixels in the mask.
            bbox: its box [x, y, width, height], in pixels.
            predicted_iou: the model's own estimate of the mask's quality.
            point_coords: [[x, y]], the grid point that gave the mask.
            stability_score: IoU of the masks at the threshold moved either way by
                `stability_score_offset`; 0 where both are empty.
            crop_box: [x, y, width, height] of the crop in which the mask was found.

        Raises:
            TypeError, ValueError: see `as_image_array`.
            ImportError: `progress` without rich.
        """
        pixels = as_image_array(image)
        im_size = pixels.shape[0], pixels.shape[1]
        crops = crop_windows(im_size, self.crop_n_layers, self.crop_overlap_ratio)
        n_batches = sum(
            math.ceil(len(self.point_grids[crop.layer]) / self.points_per_batch) for crop in crops
        )
        with _progress_bar(n_batches, progress) as advance:
            found = _Candidates.join([self._segment_crop(pixels, crop, advance) for crop in crops])
        if len(crops) > 1:
            extent = (found.crop_boxes[:, 2:] - found.crop_boxes[:, :2]).prod(dim=1)
            found = found[box_nms(found.boxes, 1 / extent, self.crop_nms_thresh)]
        if self.min_mask_region_area > 0:
            found = self._without_small_regions(found)
        return [
            {
                "segmentation": self._encode(rle),
                "area": rle_area(rle),
                "bbox": box_to_xywh(box).tolist(),
                "predicted_iou": iou.item(),
                "point_coords": [point.tolist()],
                "stability_score": stability.item(),
                "crop_box": box_to_xywh(crop_box).tolist(),
            }
            for rle, box, iou, point, stability, crop_box in zip(
                found.rles,
                found.boxes,
                found.predicted_ious,
                found.points,
                found.stability,
                found.crop_boxes,
                strict=True,
            )
        ]

    def _segment_crop(
        self, pixels: np.ndarray, crop: Crop, advance: Callable[[], None]
    ) -> _Candidates:
        x0, y0, x1, y1 = crop.box
        im_size = pixels.shape[0], pixels.shape[1]
        points = self.point_grids[crop.layer] * np.array([x1 - x0, y1 - y0])
        parts = []
        self.predictor.set_image(pixels[y0:y1, x0:x1])
        try:
            for start in range(0, len(points), self.points_per_batch):
                batch = points[start : start + self.points_per_batch]
                parts.append(self._segment_points(batch, crop, im_size))
                advance()
        finally:
            self.predictor.reset_image()
        found = _Candidates.join(parts)
        return found[box_nms(found.boxes, found.predicted_ious, self.box_nms_thresh)]

    def _segment_points(self, points: np.ndarray, crop: Crop, im_size: Size) -> _Candidates:
        """Masks, of the image, that points `[N, 2]` of a crop give and that pass the filters."""
        coords = torch.from_numpy(self.predictor.apply_coords(points))[:, None]
        labels = torch.ones(len(points), 1, dtype=torch.int32)
        # Before the masks are upscaled: what is dropped here costs nothing more.
        threshold = self.pred_iou_thresh if self.pred_iou_thresh > 0 else -math.inf
        low_res, ious = self.predictor.decode_above(threshold, coords, labels)
        origins = torch.from_numpy(points) + torch.tensor(crop.box[:2])
        kept = ious.float() > threshold
        ious, origins = ious[kept].float().cpu(), origins[kept.nonzero()[:, 0].cpu()]
        return _Candidates.join(
            [
                self._measure(some, some_ious, some_origins, crop, im_size)
                for some, some_ious, some_origins in zip(
                    *(x.split(self.points_per_batch) for x in (low_res, ious, origins)),
                    strict=True,
                )
            ]
        )

    def _measure(
        self,
        low_res: torch.Tensor,
        ious: torch.Tensor,
        points: torch.Tensor,
        crop: Crop,
        im_size: Size,
    ) -> _Candidates:
        """Upscale logits `[N, 256, 256]` and describe the masks that are stable and whole."""
        measured = measure_masks(
            low_res,
            self.predictor.mask_sizes(),
            threshold=self.predictor.model.mask_threshold,
            offset=self.stability_score_offset,
        )
        masks = measured.masks
        assert masks is not None  # As they are asked for by default.
        stability = measured.inner / measured.outer.clamp(min=1)
        x0, y0, _, _ = crop.box
        boxes = measured.boxes + torch.tensor([x0, y0, x0, y0], device=low_res.device)
        kept = ~boxes_at_crop_edge(boxes, crop, im_size)
        if self.stability_score_thresh > 0:
            kept &= stability >= self.stability_score_thresh
        on_cpu = kept.cpu()
        return _Candidates(
            rles=masks_to_rle(uncrop_masks(masks[kept], crop, im_size)),
            boxes=boxes.cpu()[on_cpu],
            predicted_ious=ious[on_cpu],
            stability=stability.cpu()[on_cpu],
            points=points[on_cpu],
            crop_boxes=torch.tensor([crop.box]).repeat(int(on_cpu.sum()), 1),
        )

    def _without_small_regions(self, found: _Candidates) -> _Candidates:
        """Clean every mask; of those that are duplicates now, prefer one that needed no change."""
        boxes = found.boxes.clone()
        rles = list(found.rles)
        untouched = torch.ones(len(rles))
        for index, rle in enumerate(rles):
            mask, changed = remove_small_regions(rle_to_mask(rle), self.min_mask_region_area)
            if changed:
                cleaned = torch.from_numpy(mask)[None]
                rles[index] = masks_to_rle(cleaned)[0]
                boxes[index] = mask_boxes(cleaned)[0]
                untouched[index] = 0
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        cleaned_found = _Candidates(
            rles, boxes, found.predicted_ious, found.stability, found.points, found.crop_boxes
        )
        return cleaned_found[box_nms(boxes, untouched, threshold)]

    def _encode(self, rle: Rle) -> np.ndarray | Rle | CocoRle:
        if self.output_mode == "binary_mask":
            return rle_to_mask(rle)
        return rle_to_coco(rle) if self.output_mode == "coco_rle" else rle


@dataclass(frozen=True)
class _Candidates:
    """What is known of N masks; tensors are on the CPU."""

    rles: list[Rle]
    boxes: torch.Tensor  # int64 [N, 4], x0 y0 x1 y1 in the image
    predicted_ious: torch.Tensor  # float32 [N]
    stability: torch.Tensor  # float32 [N]
    points: torch.Tensor  # float64 [N, 2], in the image
    crop_boxes: torch.Tensor  # int64 [N, 4], x0 y0 x1 y1

    def __getitem__(self, index: torch.Tensor) -> _Candidates:
        """Those at int64 positions `index`, in that order."""
        return _Candidates(
            [self.rles[position] for position in index.tolist()],
            *(getattr(self, field.name)[index] for field in fields(self)[1:]),
        )

    @staticmethod
    def join(parts: Sequence[_Candidates]) -> _Candidates:
        """All candidates of one or more parts, in order."""
        return _Candidates(
            [rle for part in parts for rle in part.rles],
            *(
                torch.cat([getattr(part, field.name) for part in parts])
                for field in fields(_Candidates)[1:]
            ),
        )


@contextmanager
def _progress_bar(total: int, enabled: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` steps."""
    if not enabled:
        yield lambda: None
        return
    rich_progress = import_optional("rich.progress", "progress=True")
    with rich_progress.Progress() as bar:
        task = bar.add_task("segmenting", total=total)
        yield lambda: bar.advance(task)


def _require_integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _require_real(name: str, value: object, minimum: float, maximum: float) -> None:
    if not (isinstance(value, Real) and minimum <= float(value) <= maximum):
        raise ValueError(f"{name} must be a number from {minimum} to {maximum}, got {value!r}")


def _checked_grids(point_grids: Sequence[np.ndarray], n_layers: int) -> list[np.ndarray]:
    if len(point_grids) <= n_layers:
        raise ValueError(
            f"point_grids must have a grid for the image and for each of crop_n_layers={n_layers} "
            f"layers, got {len(point_grids)}"
        )
    grids = [np.asarray(grid, dtype=np.float64) for grid in point_grids]
    for index, grid in enumerate(grids):
        if grid.ndim != 2 or grid.shape[1] != 2 or len(grid) == 0:
            raise ValueError(
                f"point_grids[{index}] must have shape [N, 2] with at least one point, got "
                f"{list(grid.shape)}"
            )
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError(
                f"point_grids[{index}] must hold (x, y) from 0 to 1, parts of the width and height"
            )
    return grids
