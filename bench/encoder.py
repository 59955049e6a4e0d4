"""`python -m bench encoder`: the image encoder, whole and block by block, beside its peers."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.blocks import blocks
from bench.contest import contest
from bench.contestants import CONTESTANTS, OURS, PEERS, Task
from bench.cores import physical_cores
from bench.worker import Settings, Worker
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import progress
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("encoder", help="time the image encoder", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", choices=list(VARIANTS), default="efficientvit-sam-l0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", type=lambda text: [n for n in text.split(",") if n])
    parser.add_argument("--batch", type=positive_integer, default=1)
    parser.add_argument("--threads", type=positive_integer)
    parser.add_argument("--rounds", type=positive_integer, default=7)
    parser.add_argument("--isa", choices=["native", "avx2", "avx512"], default="native")
    parser.add_argument("--blocks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    """Time and show everything; 1 where the numbers of ours are outside their budget."""
    model = create_efficientvit_sam_model(arguments.model, pretrained=False)
    load_synthetic_weights(model)
    side = VARIANTS[arguments.model].image_size
    return compare(model.image_encoder, (arguments.batch, 3, side, side), arguments)


def compare(encoder: Any, shape: tuple[int, ...], arguments: argparse.Namespace) -> int:
    """`run` for any encoder and input shape."""
    dtype = getattr(torch, arguments.dtype)
    cores = physical_cores()
    cores = cores[: arguments.threads or len(cores)]
    torch.set_num_threads(len(cores))
    peers = arguments.peers
    if peers is None:
        peers = [name for name in PEERS if not CONTESTANTS[name].missing]
    out = report.console()
    out.print(str(machine()))
    result: dict[str, Any] = {
        "machine": dataclasses.asdict(machine()),
        "versions": {name: CONTESTANTS[name].version for name in (OURS, *peers)},
    }
    torch.manual_seed(0)
    with ExitStack() as stack:
        workers = {}
        for name in (OURS, *peers):
            workers[name] = Worker(name, Settings(cores, arguments.isa))
            stack.callback(workers[name].close)
        steps = len(workers) + arguments.rounds
        task = Task(encoder, (torch.randn(shape),), dtype, len(cores))
        with progress("encoder", steps) as advance:
            whole = contest(workers, task, rounds=arguments.rounds, advance=advance)
        out.print(report.contestants_table(whole))
        out.print(report.verdict(whole))
        result |= report.contest_as_json(whole)
        result["blocks"] = []
        if arguments.blocks:
            parts = blocks(encoder, shape)
            with progress("blocks", len(parts) * steps) as advance:
                for part in parts:
                    inputs = tuple(map(torch.randn, part.shapes))
                    task = Task(part.module, inputs, dtype, len(cores))
                    each = contest(workers, task, rounds=arguments.rounds, advance=advance)
                    share = part.count * each.ours.median_ms / whole.ours.median_ms
                    result["blocks"].append(
                        {
                            "name": part.name,
                            "count": part.count,
                            "share": share if share == share else None,
                            **report.contest_as_json(each),
                        }
                    )
            out.print(report.blocks_table(result))
    if arguments.json:
        report.save(result, arguments.json)
    return 1 if whole.ours.failure else 0
