"""`python -m bench ops`: every operation on the layers of a model, beside its peers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import command, layers, operation, peaks, plot, report
from bench.contest import hold
from bench.layers import Layer
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.output import progress
from evsam_kernels.numerics.validation import available_backends
from evsam_kernels.ops.registry import OPERATIONS

AMONG = "bench.operation:PARTICIPANTS"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "ops",
        help="time every operation on the layers of a model beside its peers",
        description="Check every operation on every layer of a model's encoder against float64, "
        "then time it beside its peers, and show what it reaches of the peaks that the same run "
        "measures. README.md in this folder says how.",
    )
    parser.set_defaults(run=run)
    command.add_options(parser, rounds=3)
    command.add_peers(parser, operation.PARTICIPANTS)
    parser.add_argument(
        "--op",
        action="append",
        choices=OPERATIONS,
        metavar="NAME",
        help=f"only this, may be repeated: {', '.join(OPERATIONS)}",
    )
    parser.add_argument(
        "--layer", metavar="TEXT", help="only layers whose name has this in it, as in '32x32'"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and show every layer; 1 where ours fails on one, which then has no times."""
    peers = command.chosen_peers(arguments.peers, arguments.device, operation.PARTICIPANTS)
    chosen = chosen_layers(arguments.model, arguments.op, arguments.layer)
    if not chosen:
        raise CommandError(f"--layer: {arguments.model} has no layer with {arguments.layer!r}")
    begun = command.begin(arguments)
    dtype, out = command.DTYPES[arguments.dtype], report.console()
    names = [*command.ours(arguments.device, operation.PARTICIPANTS), *peers]
    keys = ("model", "dtype", "batch", "device", "rounds")
    settings = {
        **{key: getattr(arguments, key) for key in keys},
        "threads": len(begun.cores),
        "cores": list(begun.cores),
    }
    result = command.header(names, settings, operation.PARTICIPANTS)
    command.print_header(result, out)
    result |= measured(
        chosen,
        names,
        begun.cores,
        dtype=dtype,
        device=arguments.device,
        batch=arguments.batch,
        rounds=arguments.rounds,
    )
    out.print(report.layers_table(result))
    command.end(arguments, begun, result, out, plot.layers)
    return 1 if any(map(report.failures, result["layers"])) else 0


def chosen_layers(model: str, ops: Sequence[str] | None, text: str | None) -> list[Layer]:
    """The layers of a model, of these operations, with this text in their names."""
    return [
        replace(layer, count={model: layer.count[model]})
        for layer in layers.load()
        if model in layer.count
        and (ops is None or layer.op in ops)
        and (text is None or text in layer.name)
    ]


def measured(
    chosen: Sequence[Layer],
    names: Sequence[str],
    cores: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: str,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """The peaks, and the layers, of a result; `OURS` is checked first on each."""
    found = []
    with command.workers(dict.fromkeys([*names, "eager"]), cores, among=AMONG) as workers:
        highest = peaks.measure(workers["eager"], dtype, device)
        with progress("layers", len(chosen)) as advance:
            for layer in chosen:
                task = operation.task(layer, batch, dtype, device)
                backends = available_backends(layer.op, device, dtype)
                taking_part = {
                    name: workers[name]
                    for name in names
                    if operation.takes_part(name, layer, backends)
                    and not operation.PARTICIPANTS[name].refusal(dtype, device=device)
                }
                contest = hold(task, taking_part, rounds=rounds, advance=lambda: None)
                flops, moved = operation.work(task)
                found.append(
                    {
                        **{"op": layer.op, "name": f"{layer.op} {layer.name}"},
                        **{"count": layer.count, "flops": flops, "bytes": moved},
                        **contest.as_json(),
                    }
                )
                advance()
    return {"peaks": highest, "layers": found}
