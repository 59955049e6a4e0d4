"""`python -m bench encoder`: the image encoder, whole and block by block, beside its peers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.blocks import Block, Shape, blocks
from bench.contest import Contest, Outcome, hold
from bench.contestants import CONTESTANTS, OURS, PEERS, Task
from bench.cores import physical_cores
from bench.worker import ISA_ENVIRONMENTS, Worker
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import progress
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    parser.add_argument(
        "--model",
        choices=list(VARIANTS),
        default="efficientvit-sam-l0",
        metavar="NAME",
        help=f"one of {', '.join(VARIANTS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"a comma between them: {', '.join(PEERS)} (default: those installed)",
    )
    parser.add_argument(
        "--batch",
        type=positive_integer,
        default=1,
        metavar="N",
        help="pictures at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="threads of every contestant, each on a core of its own (default: one per core)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_integer,
        default=7,
        metavar="N",
        help="turns of every contestant, at least three runs each (default: %(default)s)",
    )
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="show the change against a result kept"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and show everything; 1 where ours fails, so that times are missing."""
    peers, cores = _peers(arguments.peers), _cores(arguments.threads)
    _check_isa(arguments.isa)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise CommandError(f"--json: {arguments.json.parent} is no folder")
    old = None if arguments.compare is None else report.load(arguments.compare)
    torch.set_num_threads(len(cores))

    model = create_efficientvit_sam_model(arguments.model, pretrained=False)
    load_synthetic_weights(model)
    encoder = model.image_encoder
    side = VARIANTS[arguments.model].image_size
    shape = (arguments.batch, 3, side, side)
    dtype = _DTYPES[arguments.dtype]

    names = (OURS, *peers)
    refusals = {name: CONTESTANTS[name].refusal(dtype, arguments.isa) for name in names}
    settings = {
        **{key: getattr(arguments, key) for key in ("model", "dtype", "batch", "isa", "rounds")},
        "threads": len(cores),
        "cores": list(cores),
    }
    on = machine()
    result: dict[str, Any] = {
        "schema": report.SCHEMA,
        "machine": {**dataclasses.asdict(on), "instruction_sets": list(on.instruction_sets)},
        "versions": {name: CONTESTANTS[name].version for name in names},
        "settings": settings,
    }
    out = report.console()
    out.print(str(on))
    for part in ("settings", "versions"):
        out.print(", ".join(f"{key} {value}" for key, value in result[part].items()))

    with ExitStack() as stack:
        workers = {}
        for name in names:
            if not refusals[name]:
                workers[name] = Worker(name, cores, arguments.isa)
                stack.callback(workers[name].close)
        whole = _whole(Task(encoder, _inputs([shape]), dtype), workers, arguments.rounds)
        refused = {name: Outcome(failure=why) for name, why in refusals.items() if why}
        result |= Contest({**whole.outcomes, **refused}, whole.allowed_error).as_json()
        out.print(report.contestants_table(result), report.verdict(result), sep="")
        result["blocks"] = []
        if arguments.blocks:
            parts = blocks(encoder, shape)
            result["blocks"] = _blocks(parts, dtype, workers, arguments.rounds, whole)
            out.print(report.blocks_table(result))

    if old is not None:
        out.print(report.change_table(old, result))
        for line in report.differences(old, result):
            out.print(line)
    if arguments.json is not None:
        report.save(result, arguments.json)
        out.print(f"-> {arguments.json}")
    contests = [result, *result["blocks"]]
    return 1 if any(each["contestants"][OURS]["failure"] for each in contests) else 0


def _whole(task: Task, workers: Mapping[str, Worker], rounds: int) -> Contest:
    with progress("whole encoder", len(workers) + rounds) as advance:
        return hold(task, workers, rounds=rounds, advance=advance)


def _blocks(
    parts: list[Block],
    dtype: torch.dtype,
    workers: Mapping[str, Worker],
    rounds: int,
    whole: Contest,
) -> list[dict[str, Any]]:
    """The blocks' part of the result."""
    found = []
    with progress("blocks", len(parts) * (len(workers) + rounds)) as advance:
        for part in parts:
            task = Task(part.module, _inputs(part.shapes), dtype)
            each = hold(task, workers, rounds=rounds, advance=advance)
            share = part.count * each.ours.median_ms / whole.ours.median_ms
            found.append(
                {
                    "name": part.name,
                    "count": part.count,
                    "share": None if share != share else share,
                    **each.as_json(),
                }
            )
    return found


def _inputs(shapes: list[Shape] | tuple[Shape, ...]) -> tuple[Tensor, ...]:
    """Normally distributed values, as those of a normalised picture nearly are; always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _peers(names: str | None) -> list[str]:
    """The peers asked for, all of them usable."""
    if names is None:
        return [name for name in PEERS if not CONTESTANTS[name].missing]
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in PEERS:
            raise CommandError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
        if missing := CONTESTANTS[name].missing:
            raise CommandError(
                f"--peers: {name} needs {', '.join(missing)}: pip install {' '.join(missing)}, "
                f"or pip install -e '.[peers]' for all peers"
            )
    return chosen


def _cores(threads: int | None) -> tuple[int, ...]:
    cores = physical_cores()
    if threads is not None and threads > len(cores):
        raise CommandError(f"--threads: this process may use {len(cores)} cores, got {threads}")
    return cores[:threads]


def _check_isa(isa: str) -> None:
    flag = _FLAG_OF_ISA.get(isa)
    if flag is not None and flag not in machine().instruction_sets:
        raise CommandError(f"--isa: this processor has no {isa}")
