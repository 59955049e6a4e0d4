"""`python -m bench everything`: the automatic mask generator, fused and plain."""

from __future__ import annotations

import argparse
import importlib.resources
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import command, prompts
from bench.contestants import OURS, Task
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.sam.predictor import EfficientViTSamPredictor
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import create_efficientvit_sam_model

_KEPT = 0.25
"""Share of the masks that the threshold keeps; SAM's own would keep none of untrained weights."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "everything",
        help="time the automatic mask generator, fused and plain",
        description="Check the masks that are found in a photograph against float64, then time "
        "the generator, fused and plain. README.md in this folder says how.",
    )
    parser.set_defaults(run=run)
    command.add_options(parser, rounds=2)
    prompts.add_plain(parser)
    parser.add_argument(
        "--points-per-side",
        type=positive_integer,
        default=8,
        metavar="N",
        help="points of the grid along a side (default: %(default)s; the generator's own is 32)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and show everything; 1 where ours fails, so that times are missing."""
    side = arguments.points_per_side

    def make() -> tuple[Task, dict[str, Any]]:
        model = create_efficientvit_sam_model(arguments.model, pretrained=False)
        load_synthetic_weights(model)
        photograph = importlib.resources.files("evsam_kernels.cli") / "photograph" / "coffee.jpg"
        with photograph.open("rb") as file:
            pixels = np.array(Image.open(file).convert("RGB"))
        threshold = _threshold(model, pixels, side)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        task = Task(prompts.Everything(model, side, threshold).eval(), (picture,), torch.float32)
        return task, {"threshold": threshold, "picture": list(pixels.shape[:2])}

    return prompts.run(arguments, (OURS, "bfloat16"), side**2, make)


def _threshold(model: Any, pixels: np.ndarray, side: int) -> float:
    """A predicted IoU that a share of the masks exceeds, halfway between two of them."""
    predictor = EfficientViTSamPredictor(model)
    predictor.set_image(pixels)
    centres = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 1, 2)
    coords = torch.from_numpy(predictor.apply_coords(grid * pixels.shape[1::-1]))
    labels = torch.ones(len(coords), 1, dtype=torch.int32)
    scores = [
        predictor.decode_prompts(*batch)[1].flatten()
        for batch in zip(coords.split(1), labels.split(1), strict=True)
    ]
    ordered = torch.cat(scores).sort(descending=True).values
    count = max(1, int(_KEPT * len(ordered)))
    threshold: float = ordered[count - 1 : count + 1].mean().item()
    return threshold
