"""Decoding many prompts of one image: the tasks, the contestants, and what both commands do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import evsam_kernels
from bench import command, plot, report
from bench.contestants import CONTESTANTS, OURS, Candidate, Contestant, Task
from evsam_kernels.numerics.plain import plain
from evsam_kernels.sam.mask_generator import EfficientViTSamAutomaticMaskGenerator
from evsam_kernels.sam.shared_decoder import SharedMaskDecoder

BATCHES = (1, 2, 4, 8, 16, 64)
"""Prompts that the plain decoder is given at once; 64 is the mask generators' default."""


class Prompts(nn.Module):
    """Decodes prompts of one image, `at_once` at a time."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.at_once = 1

    def forward(self, image: Tensor, pe: Tensor, tokens: Tensor, dense: Tensor) -> Tensor:
        """`[1, C, h, w]`, `[1, C, h, w]`, tokens `[B, N, C, 1]`, `[1, C, 1, 1]` -> all masks."""
        dense = dense.expand(-1, -1, *image.shape[2:])
        if isinstance(self.decoder, SharedMaskDecoder):
            self.decoder.set_image(image, pe, dense)
        masks = [
            self.decoder(image, pe, some, dense.expand(len(some), -1, -1, -1), True)[0]
            for some in tokens[..., 0].split(self.at_once)
        ]
        # A copy of 0.8 MB a prompt is no part of decoding.
        return masks[0] if len(masks) == 1 else torch.cat(masks)


class Everything(nn.Module):
    """Segments everything in a picture, `at_once` points at a time.

    Args:
        model: an EfficientViT-SAM.
        points_per_side: of the grid.
        threshold: predicted IoU from which masks are kept.
    """

    def __init__(self, model: nn.Module, points_per_side: int, threshold: float) -> None:
        super().__init__()
        self.model = model
        self.points_per_side = points_per_side
        self.threshold = threshold
        self.at_once = 1

    def forward(self, picture: Tensor) -> Tensor:
        """`[1, 3, H, W]` of whole numbers from 0 to 255 -> sum of the predicted IoU of each point's
        masks `[points]`."""
        height, width = picture.shape[2:]
        generator = EfficientViTSamAutomaticMaskGenerator(
            self.model,
            points_per_side=self.points_per_side,
            points_per_batch=self.at_once,
            pred_iou_thresh=self.threshold,
            stability_score_thresh=0.0,
            box_nms_thresh=1.0,
            output_mode="uncompressed_rle",
        )
        found = generator.generate(picture[0].permute(1, 2, 0).to(torch.uint8).numpy())
        sums = torch.zeros(self.points_per_side, self.points_per_side, dtype=picture.dtype)
        for mask in found:
            ((x, y),) = mask["point_coords"]
            column, row = (int(self.points_per_side * at) for at in (x / width, y / height))
            sums[row, column] += mask["predicted_iou"]
        return sums.flatten()


def _with_batches_of(prompts: int, module: nn.Module) -> Any:
    batched: Any = module
    batched.at_once = prompts
    return batched


def _plain(prompts: int) -> Callable[[Task], Iterator[Candidate]]:
    def candidates(task: Task) -> Iterator[Candidate]:
        module = _with_batches_of(prompts, plain(task.module))
        yield f"plain PyTorch, {prompts} at once", lambda: module(*task.inputs)

    return candidates


def _fused(description: str, **settings: Any) -> Callable[[Task], Iterator[Candidate]]:
    def candidates(task: Task) -> Iterator[Candidate]:
        module = _with_batches_of(max(BATCHES), evsam_kernels.fuse(task.module, **settings))
        yield description, lambda: module(*task.inputs)

    return candidates


def _new_image(task: Task) -> Iterator[Candidate]:
    module = _with_batches_of(max(BATCHES), evsam_kernels.fuse(task.module))
    image, *others = task.inputs
    yield "C++ kernels, and what an image's prompts share", lambda: module(image.clone(), *others)


DECODERS: dict[str, Contestant] = {
    OURS: Contestant(_fused("C++ kernels"), ("evsam_kernels",)),
    "new image": Contestant(_new_image, ("evsam_kernels",)),
    "bfloat16": Contestant(
        _fused("C++ kernels, weights and masks bfloat16", dtype=torch.bfloat16),
        ("evsam_kernels",),
    ),
    "shared": Contestant(
        _fused("PyTorch, what prompts share once", backend="reference"), ("evsam_kernels",)
    ),
    **{f"plain {prompts}": Contestant(_plain(prompts), ("torch",)) for prompts in BATCHES},
}
SHARED = tuple(name for name in DECODERS if not name.startswith("plain"))


def add_plain(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses among the plain ones."""
    parser.add_argument(
        "--plain",
        type=batches,
        default=BATCHES,
        metavar="N,N,...",
        help="prompts at once of the plain decoder, of "
        f"{', '.join(map(str, BATCHES))} (default: all of these)",
    )


def batches(text: str) -> tuple[int, ...]:
    """The value of --plain."""
    known = {str(prompts): prompts for prompts in BATCHES}
    given = [part.strip() for part in text.split(",")]
    if unknown := [part for part in given if part not in known]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    return tuple(dict.fromkeys(known[part] for part in given))


def run(
    arguments: argparse.Namespace,
    names: tuple[str, ...],
    prompts: int,
    make: Callable[[], tuple[Task, dict[str, Any]]],
) -> int:
    """Check, time and show the contestants, ours first; 1 where ours fails.

    Args:
        arguments: those of `command.add_options` and `add_plain`.
        names: keys of `DECODERS`, those that are not plain.
        prompts: how many the task has.
        make: makes the task and further settings to show.
    """
    begun = command.begin(arguments)
    task, settings = make()
    out = report.console()
    result = command.header(
        (OURS, "eager"),
        {
            "model": arguments.model,
            "rounds": arguments.rounds,
            "prompts": prompts,
            **settings,
            "threads": len(begun.cores),
            "cores": list(begun.cores),
        },
        CONTESTANTS,
    )
    command.print_header(result, out)
    names += tuple(f"plain {at_once}" for at_once in arguments.plain)
    with command.workers(names, begun.cores, among="bench.prompts:DECODERS") as workers:
        contest = command.held(task, workers, arguments.rounds, f"{prompts} prompts")
    result |= {key: contest[key] for key in ("allowed_error", "contestants")}
    out.print(report.prompts_table(result), *report.prompts_verdict(result), sep="\n")
    command.end(arguments, begun, result, out, plot.waterfall)
    return 1 if report.failures(result) else 0
