"""`evsam segment`: masks for pictures, by points and a box or for everything in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evsam_kernels.cli import models
from evsam_kernels.cli.errors import CommandError, PictureError
from evsam_kernels.cli.output import progress
from evsam_kernels.cli.pictures import collect, read
from evsam_kernels.cli.prompts import Prompts, parse_box, parse_point
from evsam_kernels.cli.results import (
    MASK_FORMATS,
    Result,
    everything_generator,
    segment_everything,
    segment_prompted,
    write_masks,
    write_overlay,
)
from evsam_kernels.sam.masks import import_optional
from evsam_kernels.sam.predictor import EfficientViTSamPredictor

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEFAULT_FOLDER = Path("evsam_output")

Segmenter = Callable[[np.ndarray], Result]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "segment",
        help="find masks in pictures",
        description="Find masks in pictures and draw them. Pictures that cannot be read are named "
        "and left out, and the exit status is 1 then.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="picture, or folder of pictures"
    )

    prompt = parser.add_argument_group(
        "what to segment", "points and a box together ask for one object; pixels from the top left"
    )
    prompt.add_argument(
        "--point",
        action="append",
        default=[],
        type=parse_point,
        metavar="X,Y",
        help="a point on the object; may be repeated",
    )
    prompt.add_argument(
        "--background-point",
        action="append",
        default=[],
        type=parse_point,
        metavar="X,Y",
        help="a point that is not on the object; may be repeated",
    )
    prompt.add_argument(
        "--box", type=parse_box, metavar="X0,Y0,X1,Y1", help="a box round the object"
    )
    prompt.add_argument(
        "--multimask",
        action="store_true",
        help="keep the three masks the model proposes for a prompt, not only the best",
    )
    prompt.add_argument("--everything", action="store_true", help="all masks in the picture")
    prompt.add_argument(
        "--points-per-side",
        type=models.positive_integer,
        default=32,
        metavar="N",
        help="everything: side of the grid of points (default: %(default)s)",
    )
    prompt.add_argument(
        "--pred-iou-thresh",
        type=float,
        default=0.88,
        metavar="P",
        help="everything: keep masks of a score above this (default: %(default)s)",
    )
    prompt.add_argument(
        "--stability-score-thresh",
        type=float,
        default=0.95,
        metavar="P",
        help="everything: keep masks at least this stable (default: %(default)s)",
    )

    output = parser.add_argument_group("output")
    target = output.add_mutually_exclusive_group()
    target.add_argument(
        "--output", type=Path, metavar="PNG", help="where to draw the masks of a single picture"
    )
    target.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"folder for <picture>_overlay.png and masks (default: {_DEFAULT_FOLDER})",
    )
    output.add_argument(
        "--masks",
        action="append",
        default=[],
        choices=MASK_FORMATS,
        help="also write the masks: a PNG each, an NPZ or COCO run lengths (JSON); may be repeated",
    )

    model = models.add_model_arguments(parser)
    model.add_argument(
        "--synthetic-weights",
        action="store_true",
        help="try the machinery without a checkpoint; the masks mean nothing",
    )
    model.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="float32",
        help="what the fused blocks compute in (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Segment every picture; 0 when all went well, 1 when any was refused."""
    prompts = Prompts(tuple(arguments.point), tuple(arguments.background_point), arguments.box)
    _check(arguments, prompts)
    found = collect(arguments.images)
    if arguments.output is not None:
        _check_output(arguments.output, found.pictures)
    refused = len(found.refused)
    for path, reason in found.refused:
        _refuse(path, reason)
    if found.pictures:
        overlays = _overlay_paths(arguments, found.pictures)
        segmenter = _segmenter(arguments, prompts)
        with progress("segmenting", len(found.pictures)) as advance:
            for path, overlay in zip(found.pictures, overlays, strict=True):
                try:
                    _segment(path, overlay, segmenter, prompts, arguments.masks, found.pictures)
                except (PictureError, OSError) as error:
                    refused += 1
                    _refuse(path, str(error))
                advance()
    if refused:
        given = len(found.pictures) + len(found.refused)
        print(f"evsam segment: refused {refused} of {given}", file=sys.stderr)
    return 1 if refused else 0


def _check(arguments: argparse.Namespace, prompts: Prompts) -> None:
    """Refuse combinations of options that argparse cannot."""
    if prompts and arguments.everything:
        raise CommandError("--everything takes no --point, --background-point or --box")
    if not prompts and not arguments.everything:
        raise CommandError("say what to segment: --point X,Y, --box X0,Y0,X1,Y1 or --everything")
    if arguments.multimask and arguments.everything:
        raise CommandError("--multimask goes with --point or --box, not with --everything")
    if arguments.checkpoint is None and not arguments.synthetic_weights:
        raise CommandError(
            f"weights are needed: --checkpoint FILE, the authors' checkpoint of {arguments.model}; "
            f"or --synthetic-weights to try the machinery, with masks that mean nothing"
        )
    if arguments.checkpoint is not None and arguments.synthetic_weights:
        raise CommandError("give --checkpoint or --synthetic-weights, not both")
    if "coco" in arguments.masks:
        try:
            import_optional("pycocotools.mask", "--masks coco")
        except ImportError as error:
            raise CommandError(str(error)) from error


def _check_output(output: Path, pictures: list[Path]) -> None:
    if len(pictures) > 1:
        raise CommandError(
            f"--output names one file, but there are {len(pictures)} pictures; use --output-dir"
        )
    if output.suffix.lower() != ".png":
        raise CommandError(f"--output must end in .png, got {output}")
    if output.exists() and any(output.samefile(picture) for picture in pictures):
        raise CommandError(f"--output {output} is the input picture, which is not overwritten")


def _overlay_paths(arguments: argparse.Namespace, pictures: list[Path]) -> list[Path]:
    """A file for each picture's overlay, no two the same; their folder exists afterwards."""
    if arguments.output is not None:
        paths = [arguments.output]
    else:
        folder = arguments.output_dir or _DEFAULT_FOLDER
        paths, taken = [], set()
        for picture in pictures:
            # Pictures of the same name come from several folders or differ in their suffix.
            name, count = picture.stem, 1
            while name.lower() in taken:
                count += 1
                name = f"{picture.stem}_{count}"
            taken.add(name.lower())
            paths.append(folder / f"{name}_overlay.png")
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"the output folder cannot be made: {error}") from error
    return paths


def _segmenter(arguments: argparse.Namespace, prompts: Prompts) -> Segmenter:
    """Build the model, say what it is, and return what it does with a picture."""
    model = models.fused(models.build(arguments), arguments.backend, _DTYPES[arguments.dtype])
    report = model.fusion_report
    backends = sorted({block.backend for block in report.swapped})
    weights = arguments.checkpoint or "synthetic weights"
    print(
        f"{arguments.model}, {weights}, {arguments.dtype} on {arguments.device}, "
        f"{len(report.swapped)} blocks fused ({', '.join(backends)})"
    )
    if arguments.checkpoint is None:
        print(models.SYNTHETIC_NOTICE)
    if not arguments.everything:
        predictor = EfficientViTSamPredictor(model)
        return lambda picture: segment_prompted(predictor, picture, prompts, arguments.multimask)
    try:
        generator = everything_generator(
            model,
            arguments.points_per_side,
            arguments.pred_iou_thresh,
            arguments.stability_score_thresh,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    return lambda picture: segment_everything(generator, picture)


def _segment(
    path: Path,
    overlay: Path,
    segmenter: Segmenter,
    prompts: Prompts,
    mask_formats: list[str],
    inputs: list[Path],
) -> None:
    picture = read(path)
    result = segmenter(picture)
    write_overlay(overlay, picture, result, prompts, inputs)
    name = overlay.stem.removesuffix("_overlay")
    for mask_format in dict.fromkeys(mask_formats):
        write_masks(overlay.parent, name, mask_format, path, result, inputs)
    print(f"{path}: {result} -> {overlay}", flush=True)


def _refuse(path: Path, reason: str) -> None:
    print(f"evsam segment: {path}: {reason}", file=sys.stderr, flush=True)
