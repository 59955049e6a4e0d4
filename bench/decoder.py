"""`python -m bench decoder`: the mask decoder beside the plain one at every batch size."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bench import command, prompts
from bench.contestants import Task
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import create_efficientvit_sam_model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "decoder",
        help="time the mask decoder beside the plain one",
        description="Check the mask decoder on many prompts of one image against float64, then "
        "time it beside plain PyTorch at several batch sizes. README.md in this folder says how.",
    )
    parser.set_defaults(run=run)
    command.add_options(parser, rounds=2)
    prompts.add_plain(parser)
    parser.add_argument(
        "--prompts",
        type=positive_integer,
        default=64,
        metavar="N",
        help="prompts of the image (default: %(default)s)",
    )
    parser.add_argument(
        "--points",
        type=positive_integer,
        default=1,
        metavar="N",
        help="points of a prompt (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and show everything; 1 where ours fails, so that times are missing."""

    def make() -> tuple[Task, dict[str, Any]]:
        model = create_efficientvit_sam_model(arguments.model, pretrained=False)
        load_synthetic_weights(model)
        generator = torch.Generator().manual_seed(0)
        coords = 1024 * torch.rand(arguments.prompts, arguments.points, 2, generator=generator)
        labels = torch.ones(arguments.prompts, arguments.points, dtype=torch.int32)
        with torch.no_grad():
            tokens, dense = model.prompt_encoder(points=(coords, labels))
            pe = model.prompt_encoder.get_dense_pe()
        # What the LayerNorm at the end of an encoder gives.
        image = torch.randn(1, 256, *pe.shape[2:], generator=generator)
        inputs = image, pe, tokens[..., None], dense[:1, :, :1, :1]
        decoder = prompts.Prompts(model.mask_decoder)
        return Task(decoder.eval(), inputs, torch.float32), {"points": arguments.points}

    return prompts.run(arguments, prompts.SHARED, arguments.prompts, make)
