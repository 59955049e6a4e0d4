"""`evsam demo`: fuses a model, checks it, times it and segments a photograph with it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evsam_kernels.backends import AUTO
from evsam_kernels.cli import models
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.output import progress
from evsam_kernels.cli.pictures import PHOTOGRAPH, read
from evsam_kernels.cli.prompts import Prompts
from evsam_kernels.cli.results import (
    Result,
    everything_generator,
    segment_everything,
    segment_prompted,
    write_overlay,
)
from evsam_kernels.cli.timing import interleaved_medians
from evsam_kernels.numerics.budget import Row, budget, measure, one_thread
from evsam_kernels.numerics.validation import DTYPES, plan, summarise, validate
from evsam_kernels.sam.predictor import EfficientViTSamPredictor

_ON_THE_COFFEE = Prompts(points=((287, 150),))
_ROUND_THE_SPOON = Prompts(box=(320, 235, 412, 332))
_DTYPES = ("float32", "bfloat16", "float16")
_TIMED_ROUNDS = 7
_POINTS_PER_SIDE = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="fuse a model, check it, time it and segment a photograph",
        description="Fuse a model, check it against float64, time it and segment a photograph.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the overlays (default: %(default)s)",
    )
    models.add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show everything; 1 where a number is outside its budget."""
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output-dir cannot be made: {error}") from error
    model = models.build(arguments)
    print(f"{arguments.model}, {arguments.checkpoint or 'synthetic weights'}")
    print(machine())
    if arguments.checkpoint is None:
        print(
            f"{models.SYNTHETIC_NOTICE} With a real checkpoint: make demo "
            f"CHECKPOINT=efficientvit_sam_l0.pt, or evsam demo --checkpoint FILE"
        )
    fast = _fuse(model, arguments)
    picture = read(PHOTOGRAPH)
    pixels = model.transform(picture)[None].to(model.device)
    passed = _check_operations(arguments) and _check_encoder(model, pixels, arguments)
    if not passed:
        print("\nNumbers are outside their budget: no times and no masks are shown.")
        return 1
    _time_encoder(model, fast, pixels)
    _segment(fast, picture, arguments)
    return 0


def _fuse(model: nn.Module, arguments: argparse.Namespace) -> Any:
    _heading("Fusing")
    start = time.perf_counter()
    fast = models.fused(model, arguments.backend)
    seconds = time.perf_counter() - start
    report = fast.fusion_report
    counts = Counter((block.operation, block.backend) for block in report.swapped)
    print(f"{len(report.swapped)} blocks swapped in {seconds:.1f} s:")
    for (operation, backend), count in counts.items():
        print(f"  {count:3} {operation} on {backend}")
    print(f"{len(report.left)} modules of the prompt encoder and the mask decoder left as they are")
    return fast


def _check_operations(arguments: argparse.Namespace) -> bool:
    """The short validation, a line per operation and backend; see `evsam validate`."""
    _heading("Every operation against float64: the worst error over its budget, at most 1")
    named = None if arguments.backend == AUTO else [arguments.backend]
    steps = plan(backends=named, dtypes=_DTYPES, quick=True, device=arguments.device)
    rows: list[Row] = []
    with progress("checking operations", len(steps)) as advance:
        for found in validate(steps, arguments.device):
            rows += found
            advance()
    print(f"  {'':35}{''.join(f'{name:>10}' for name in _DTYPES)}   plain PyTorch fails at float16")
    worst = {(of.op, of.backend, of.dtype): of.worst.ratio for of in summarise(rows)}
    for op, backend in dict.fromkeys((row.op, row.backend) for row in rows):
        ratios = "".join(f"{worst[op, backend, name]:10.2f}" for name in _DTYPES)
        outputs = [
            row
            for row in rows
            if (row.op, row.backend, row.dtype, row.quantity) == (op, backend, "float16", "output")
        ]
        # Held against another yardstick: at float16 plain PyTorch overflows, or is off by half.
        unusable = sum(row.yardstick != "float16" for row in outputs)
        print(f"  {op:22} {backend:12}{ratios}   in {unusable} of {len(outputs)} cases")
    failed = [row for row in rows if not row.passed]
    for row in failed:
        print(row)
    print(f"  {len(rows)} results and gradients compared, {len(failed)} outside their budget")
    return not failed


def _check_encoder(model: Any, pixels: Tensor, arguments: argparse.Namespace) -> bool:
    """Hold the fused encoder's embeddings against those of the unfused one and of float64."""
    _heading("The image encoder against float64, relative error of the embeddings")
    encoder = model.image_encoder

    def unfused(dtype: torch.dtype) -> Tensor:
        embeddings: Tensor = copy.deepcopy(encoder).to(dtype)(pixels.to(dtype))
        return embeddings

    passed = True
    with progress("checking the encoder", 1 + len(_DTYPES)) as advance, torch.no_grad():
        with one_thread():
            oracle = unfused(torch.float64)
        advance()
        for name in _DTYPES:
            dtype = DTYPES[name]
            ours = measure(models.fused(encoder, arguments.backend, dtype)(pixels), oracle)
            line = f"  {name:9} fused {ours.frobenius:.2e}"
            if dtype == torch.float16 and pixels.device.type == "cpu":
                # PyTorch's own float16 convolutions take minutes on a CPU.
                within = math.isfinite(ours.frobenius)
                line += "  unfused not run (slow on a CPU), so only held to be finite"
            else:
                plain = measure(unfused(dtype), oracle)
                allowed = budget(plain, dtype)
                within = ours.within(allowed)
                line += f"  unfused {plain.frobenius:.2e}  allowed {allowed.frobenius:.2e}"
            print(f"{line}  {'passed' if within else 'FAILED'}")
            passed &= within
            advance()
    return passed


def _time_encoder(model: Any, fast: Any, pixels: Tensor) -> None:
    _heading(f"Time of the image encoder, one picture, float32, median of {_TIMED_ROUNDS}")

    def encode(encoder: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                encoder(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize()

        return run

    with progress("timing unfused and fused in turn", 1 + _TIMED_ROUNDS) as advance:
        medians = interleaved_medians(
            {"unfused": encode(model.image_encoder), "fused": encode(fast.image_encoder)},
            rounds=_TIMED_ROUNDS,
            advance=advance,
        )
    for name, seconds in medians.items():
        print(f"  {name:8} {1000 * seconds:7.1f} ms")
    ratio = medians["unfused"] / medians["fused"]
    faster = "faster" if ratio >= 1 else "SLOWER"
    print(f"  unfused / fused = {ratio:.2f}: fused is {faster}")


def _segment(fast: Any, picture: np.ndarray, arguments: argparse.Namespace) -> None:
    _heading(f"Masks of {PHOTOGRAPH.name}")
    predictor = EfficientViTSamPredictor(fast)
    found = {
        "a point on the coffee": segment_prompted(predictor, picture, _ON_THE_COFFEE, False),
        "a box round the spoon": segment_prompted(predictor, picture, _ROUND_THE_SPOON, False),
    }
    for prompt, result in found.items():
        print(f"  {prompt}: {result}")
    masks = [mask for result in found.values() for mask in result.masks]
    both = Result(found["a point on the coffee"].size, masks, {})
    prompts = dataclasses.replace(_ON_THE_COFFEE, box=_ROUND_THE_SPOON.box)
    _show(arguments.output_dir / "coffee_prompts.png", picture, both, prompts)
    if arguments.checkpoint is None:
        print(models.SYNTHETIC_NOTICE)
        return
    everything = segment_everything(everything_generator(fast, _POINTS_PER_SIDE), picture)
    print(f"  everything, {_POINTS_PER_SIDE} x {_POINTS_PER_SIDE} points: {everything}")
    _show(arguments.output_dir / "coffee_everything.png", picture, everything, None)


def _show(path: Path, picture: np.ndarray, result: Result, prompts: Prompts | None) -> None:
    try:
        write_overlay(path, picture, result, prompts)
    except OSError as error:
        raise CommandError(str(error)) from error
    print(f"  -> {path}")


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)
