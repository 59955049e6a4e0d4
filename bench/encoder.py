"""`python -m bench encoder`: the image encoder, whole and block by block, beside its peers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import command, plot, report
from bench.blocks import Block, Shape, blocks
from bench.contest import Outcome, hold
from bench.contestants import CONTESTANTS, OURS, Task
from bench.worker import ISA_ENVIRONMENTS, Worker
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.output import progress
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model

_FLAG_OF_ISA = {"avx2": "avx2", "avx512": "avx512bw"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "encoder",
        help="time the image encoder beside its peers",
        description="Check the fused image encoder against float64, then time it beside its "
        "peers, whole and block by block. README.md in this folder says how.",
    )
    parser.set_defaults(run=run)
    command.add_options(parser, rounds=7)
    command.add_peers(parser)
    parser.add_argument(
        "--isa",
        choices=list(ISA_ENVIRONMENTS),
        default="native",
        help="instruction set that contestants are kept to (default: all the processor has)",
    )
    parser.add_argument(
        "--blocks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time the blocks, each on its own (default: yes)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and show everything; 1 where ours fails, so that times are missing."""
    peers = command.chosen_peers(arguments.peers, arguments.device)
    names = [*command.ours(arguments.device), *peers]
    _check_isa(arguments.isa)
    begun = command.begin(arguments)
    out = report.console()
    encoder = synthetic(arguments.model).image_encoder
    side = VARIANTS[arguments.model].image_size
    shape = (arguments.batch, 3, side, side)
    dtype = command.DTYPES[arguments.dtype]
    keys = ("model", "dtype", "batch", "device", "isa", "rounds")
    result = command.header(
        names,
        {
            **{key: getattr(arguments, key) for key in keys},
            "threads": len(begun.cores),
            "cores": list(begun.cores),
        },
        CONTESTANTS,
    )
    command.print_header(result, out)
    task = Task(encoder, inputs([shape]), dtype, arguments.device)
    refusals = refused(names, task, arguments.isa)
    taking_part = [name for name in names if name not in refusals]
    with command.workers(taking_part, begun.cores, arguments.isa) as workers:
        result |= command.held(task, workers, arguments.rounds, "whole encoder")
        result["contestants"] |= {name: outcome.as_json() for name, outcome in refusals.items()}
        out.print(report.contestants_table(result), report.verdict(result), sep="")
        result["blocks"] = []
        if arguments.blocks:
            parts = blocks(encoder, shape)
            of_whole = result["contestants"][OURS]["median_ms"]
            result["blocks"] = _blocks(parts, task, workers, arguments.rounds, of_whole)
            out.print(report.blocks_table(result))
    command.end(arguments, begun, result, out, plot.waterfall)
    return 1 if any(map(report.failures, [result, *result["blocks"]])) else 0


def synthetic(name: str) -> Any:
    """A variant with synthetic weights."""
    model = create_efficientvit_sam_model(name, pretrained=False)
    load_synthetic_weights(model)
    return model


def refused(names: Iterable[str], task: Task, isa: str = "native") -> dict[str, Outcome]:
    """Those of the contestants that cannot take part, and why."""
    reasons = {name: CONTESTANTS[name].refusal(task.dtype, isa, task.device) for name in names}
    return {name: Outcome(failure=why) for name, why in reasons.items() if why}


def _blocks(
    parts: list[Block],
    whole_task: Task,
    workers: Mapping[str, Worker],
    rounds: int,
    whole_ms: float | None,
) -> list[dict[str, Any]]:
    """The blocks' part of the result."""
    found = []
    with progress("blocks", len(parts) * (len(workers) + rounds)) as advance:
        for part in parts:
            task = replace(whole_task, module=part.module, inputs=inputs(part.shapes))
            each = hold(task, workers, rounds=rounds, advance=advance)
            share = math.nan if whole_ms is None else part.count * each.ours.median_ms / whole_ms
            found.append(
                {
                    "name": part.name,
                    "count": part.count,
                    "share": None if math.isnan(share) else share,
                    **each.as_json(),
                }
            )
    return found


def inputs(shapes: list[Shape] | tuple[Shape, ...]) -> tuple[Tensor, ...]:
    """Normally distributed values, as those of a normalised picture nearly are; always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _check_isa(isa: str) -> None:
    flag = _FLAG_OF_ISA.get(isa)
    if flag is not None and flag not in machine().instruction_sets:
        raise CommandError(f"--isa: this processor has no {isa}")
