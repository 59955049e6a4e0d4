"""Segments one picture, by prompts or everything in it, and writes what was found."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import nn

from evsam_kernels.cli.output import write_atomically
from evsam_kernels.cli.overlay import draw
from evsam_kernels.cli.prompts import Prompts
from evsam_kernels.ops.measure_masks.reference import mask_boxes
from evsam_kernels.sam.mask_generator import EfficientViTSamAutomaticMaskGenerator
from evsam_kernels.sam.masks import (
    Rle,
    box_to_xywh,
    masks_to_rle,
    rle_to_coco,
    rle_to_mask,
)
from evsam_kernels.sam.predictor import EfficientViTSamPredictor

MASK_FORMATS = ("png", "npz", "coco")


@dataclass(frozen=True)
class FoundMask:
    """One mask.

    Attributes:
        rle: its run lengths.
        area: pixels in it.
        score: the model's own estimate of its IoU.
        details: what else is known, as COCO and SA-1B name it: `bbox`, for everything mode also
            `stability_score`, `point_coords` and `crop_box`.
    """

    rle: Rle
    area: int
    score: float
    details: dict[str, Any]

    def pixels(self) -> np.ndarray:
        """Bool `[H, W]`."""
        return rle_to_mask(self.rle)


@dataclass(frozen=True)
class Result:
    """What was found in one picture.

    Attributes:
        size: the picture's width and height.
        masks: best score first.
        milliseconds: how long each step took, by name.
    """

    size: tuple[int, int]
    masks: list[FoundMask]
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        width, height = self.size
        parts = [f"{width} x {height}"]
        parts.append("1 mask" if len(self.masks) == 1 else f"{len(self.masks)} masks")
        if self.masks:
            best = self.masks[0]
            share = 100 * best.area / (width * height)
            parts.append(f"best score {best.score:.3f} with {best.area} pixels ({share:.1f} %)")
        parts += [f"{step} {value:.0f} ms" for step, value in self.milliseconds.items()]
        return ", ".join(parts)


def segment_prompted(
    predictor: EfficientViTSamPredictor, picture: np.ndarray, prompts: Prompts, multimask: bool
) -> Result:
    """The mask that the prompts ask for, or, with `multimask`, the three the model proposes.

    A lone point may mean a part, the object or a group: of the model's three masks for it the best
    one is taken. Other prompts leave no doubt, and the model has one mask for them.

    Args:
        picture: uint8 RGB `[H, W, 3]`.

    Raises:
        PictureError: a prompt lies outside the picture.
    """
    height, width, _ = picture.shape
    prompts.check_inside(width, height)
    clock = _Clock()
    predictor.set_image(picture)
    clock.stop("encode")
    lone_point = len(prompts.coords) == 1 and prompts.box is None
    masks, scores, _ = predictor.predict(
        point_coords=prompts.coords or None,
        point_labels=prompts.labels or None,
        box=prompts.box,
        multimask_output=multimask or lone_point,
    )
    clock.stop("decode")
    predictor.reset_image()
    order = np.argsort(-scores)[: None if multimask else 1]
    chosen = torch.from_numpy(masks[order])
    found = [
        FoundMask(rle, area, score, {"bbox": box})
        for rle, area, score, box in zip(
            masks_to_rle(chosen),
            chosen.flatten(1).sum(dim=1).tolist(),
            scores[order].tolist(),
            box_to_xywh(mask_boxes(chosen)).tolist(),
            strict=True,
        )
    ]
    return Result((width, height), found, clock.milliseconds)


def everything_generator(
    model: nn.Module,
    points_per_side: int,
    pred_iou_thresh: float = 0.88,
    stability_score_thresh: float = 0.95,
) -> EfficientViTSamAutomaticMaskGenerator:
    """A generator for `segment_everything`.

    Raises:
        ValueError: a threshold is not a number from minus infinity to 1.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return EfficientViTSamAutomaticMaskGenerator(
        model,
        points_per_side=points_per_side,
        # Those of large photographs stay in memory.
        points_per_batch=16 if on_cpu else 32,
        pred_iou_thresh=pred_iou_thresh,
        stability_score_thresh=stability_score_thresh,
        output_mode="uncompressed_rle",
    )


def segment_everything(
    generator: EfficientViTSamAutomaticMaskGenerator, picture: np.ndarray
) -> Result:
    """All masks in a picture.

    Args:
        generator: of `everything_generator`.
        picture: uint8 RGB `[H, W, 3]`.
    """
    clock = _Clock()
    records = generator.generate(picture)
    clock.stop("everything")
    found = [
        FoundMask(
            record["segmentation"],
            record["area"],
            record["predicted_iou"],
            {key: record[key] for key in ("bbox", "stability_score", "point_coords", "crop_box")},
        )
        for record in sorted(records, key=lambda record: -record["predicted_iou"])
    ]
    height, width, _ = picture.shape
    return Result((width, height), found, clock.milliseconds)


def write_overlay(
    path: Path,
    picture: np.ndarray,
    result: Result,
    prompts: Prompts | None,
    inputs: Sequence[Path] = (),
) -> None:
    """Write the picture with the masks and prompts drawn on it, large masks below small ones.

    Raises:
        OSError: `path` cannot be written, or is one of `inputs`.
    """
    largest_first = sorted(result.masks, key=lambda mask: -mask.area)
    image = draw(picture, (mask.pixels() for mask in largest_first), prompts)
    write_atomically(path, partial(image.save, format="PNG"), keep=inputs)


def write_masks(
    folder: Path, name: str, mask_format: str, picture: Path, result: Result, inputs: Sequence[Path]
) -> list[Path]:
    """Write the masks in one of `MASK_FORMATS` to files that begin with `name`.

    "png": a file per mask, 0 and 255. "npz": `masks` bool `[N, H, W]` and `scores` float32 `[N]`.
    "coco": JSON with compressed run lengths, laid out as in the SA-1B data set; needs pycocotools.

    Returns:
        the files written.

    Raises:
        OSError: one cannot be written, or is one of `inputs`.
    """
    if mask_format == "png":
        paths = [folder / f"{name}_mask_{index:03}.png" for index in range(len(result.masks))]
        for path, mask in zip(paths, result.masks, strict=True):
            image = Image.fromarray(mask.pixels().astype(np.uint8) * 255)
            write_atomically(path, partial(image.save, format="PNG"), keep=inputs)
        return paths
    if mask_format == "npz":
        path = folder / f"{name}_masks.npz"
        write_atomically(path, lambda file: _save_npz(file, result), keep=inputs)
    else:
        path = folder / f"{name}_masks.json"
        write_atomically(path, lambda file: _save_coco(file, picture, result), keep=inputs)
    return [path]


def _save_npz(file: BinaryIO, result: Result) -> None:
    width, height = result.size
    masks = np.zeros((len(result.masks), height, width), bool)
    for index, mask in enumerate(result.masks):
        masks[index] = mask.pixels()
    scores = np.array([mask.score for mask in result.masks], np.float32)
    np.savez_compressed(file, masks=masks, scores=scores)


def _save_coco(file: BinaryIO, picture: Path, result: Result) -> None:
    width, height = result.size
    document = {
        "image": {"file_name": picture.name, "width": width, "height": height},
        "annotations": [
            {
                "id": index,
                "segmentation": rle_to_coco(mask.rle),
                "area": mask.area,
                "predicted_iou": mask.score,
                **mask.details,
            }
            for index, mask in enumerate(result.masks)
        ],
    }
    text = TextIOWrapper(file, encoding="utf-8")
    json.dump(document, text, indent=1)
    text.detach()


class _Clock:
    """Measures steps that follow each other."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def stop(self, step: str) -> None:
        """The step that ran since the last stop, or the beginning, was `step`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.milliseconds[step] = 1000 * (now - self._start)
        self._start = now
