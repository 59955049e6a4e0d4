"""`evsam validate`: every operation, backend and dtype held against its error budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import evsam_kernels
from evsam_kernels import backends, simt
from evsam_kernels.cli import validate_model
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import Machine, machine
from evsam_kernels.cli.output import check_report_files, progress, write_atomically
from evsam_kernels.numerics import plot
from evsam_kernels.numerics.budget import Row
from evsam_kernels.numerics.validation import DTYPES, Step, badness, plan, summarise, validate
from evsam_kernels.ops.registry import OPERATIONS
from evsam_kernels.sam.zoo import VARIANTS

_MODEL_DTYPES = ("float16", "bfloat16")
_CLOSEST_SHOWN = 5
_FAILED_SHOWN = 20
_PIPED_WIDTH = 150


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "validate",
        help="hold every operation against its error budget",
        description="Compute every operation on every backend that can run here, at every dtype, "
        "and its gradients, and compare with float64. The budget for the error is twice that of "
        "the same computation in plain PyTorch at the same dtype, and one rounding. The exit "
        "status is 1 if anything exceeds its budget.",
    )
    parser.set_defaults(run=run)
    restrict = parser.add_argument_group("what to validate", "each may be repeated")
    for option, choices in (
        ("--op", OPERATIONS),
        ("--backend", tuple(backends.BACKENDS)),
        ("--dtype", tuple(DTYPES)),
    ):
        restrict.add_argument(
            option,
            action="append",
            choices=choices,
            metavar="NAME",
            help=f"only this: {', '.join(choices)}",
        )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the layers of the models, which are large"
    )
    parser.add_argument(
        "--model",
        choices=list(VARIANTS),
        metavar="NAME",
        help="instead of operations a whole image encoder, on a photograph, and the masks of a "
        f"point behind it, at {' and '.join(_MODEL_DTYPES)}: one of {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="the model's weights; else made up ones"
    )
    parser.add_argument(
        "--executor",
        choices=["simt"],
        help="run the kernels for GPUs on the CPU, with every access checked",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to compute, as PyTorch names it (default: cpu)"
    )
    parser.add_argument("--verbose", action="store_true", help="print every single comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw errors and budgets: .png, .pdf or .svg"
    )


def run(arguments: argparse.Namespace) -> int:
    """Validate and report; 0 when everything is within its budget, else 1."""
    device = _device(arguments.device)
    check_report_files(arguments.json, arguments.plot)
    if arguments.executor is not None:
        _check_executor(device)
    rows = (_operations if arguments.model is None else _model)(arguments, device)

    print_rows(rows, verbose=arguments.verbose)
    on = machine()
    print(on)
    try:
        if arguments.json is not None:
            text = json.dumps(as_json(rows, on, device), indent=1, allow_nan=False) + "\n"
            write_atomically(arguments.json, lambda file: file.write(text.encode()))
        if arguments.plot is not None:
            file_format = arguments.plot.suffix[1:].lower()
            write_atomically(
                arguments.plot, lambda file: plot.draw(rows, str(on), file, file_format)
            )
    except OSError as error:
        raise CommandError(str(error)) from error
    return 0 if all(row.passed for row in rows) else 1


def _check_executor(device: torch.device) -> None:
    if device.type != "cpu":
        raise CommandError(f"--executor simt runs on the CPU; leave out --device {device}")
    try:
        with simt.emulate():
            pass
    except ImportError as error:
        raise CommandError(f"--executor simt: {error}") from error


def _operations(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    if arguments.checkpoint is not None:
        raise CommandError("--checkpoint is for a whole model: name it with --model")
    with nullcontext() if arguments.executor is None else simt.emulate():
        steps = _plan(arguments, device)
        rows: list[Row] = []
        with progress("validating", len(steps)) as advance:
            for found in validate(steps, device):
                rows += found
                advance()
    return rows


def _model(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    if arguments.op or arguments.quick:
        option = "--op" if arguments.op else "--quick"
        raise CommandError(f"{option} chooses among operations; leave it out with --model")
    backend, *others = dict.fromkeys(arguments.backend or [backends.AUTO])
    if others:
        raise CommandError(f"--backend: a model takes one, got {backend}, {', '.join(others)}")
    dtypes = list(dict.fromkeys(arguments.dtype or _MODEL_DTYPES))
    emulated = arguments.executor is not None
    return validate_model.run(
        arguments.model, arguments.checkpoint, device, backend, dtypes, emulated
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # PyTorch reports an unknown device or one that is not there by several exceptions.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: {str(error).strip().splitlines()[0]}") from error
    return device


def _plan(arguments: argparse.Namespace, device: torch.device) -> list[Step]:
    """What there is to do.

    Raises:
        CommandError: a backend asked for cannot run here, or none has a kernel to validate.
    """
    for name in arguments.backend or ():
        try:
            backends.require(name, device.type)
        except (ValueError, backends.BackendUnavailableError) as error:
            raise CommandError(f"--backend {name}: {error}") from error
    emulated = [name for name, backend in backends.BACKENDS.items() if backend.emulated]
    steps = plan(
        arguments.op and list(dict.fromkeys(arguments.op)),
        arguments.backend or (emulated if arguments.executor else None),
        arguments.dtype and list(dict.fromkeys(arguments.dtype)),
        quick=arguments.quick,
        device=device,
    )
    if not steps:
        raise CommandError(
            f"no kernel of {', '.join(arguments.backend)} for {', '.join(arguments.op)}; "
            f"'evsam info' lists the kernels"
        )
    return steps


def as_json(rows: Sequence[Row], on: Machine, device: torch.device) -> dict[str, Any]:
    """The report for programs: machine, package, device and rows; null for what is not finite."""
    return {
        "package_version": evsam_kernels.__version__,
        "machine": dataclasses.asdict(on),
        "device": str(device),
        "passed": all(row.passed for row in rows),
        "rows": [
            _finite({**dataclasses.asdict(row), "ratio": row.ratio, "passed": row.passed})
            for row in rows
        ],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_rows(rows: Sequence[Row], *, verbose: bool = False) -> None:
    """Print the worst row of every operation, backend and dtype, and the failures.

    With `verbose`, every row too.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    table = Table(title="Error over budget; more than 1 fails")
    for heading in ("operation", "backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    table.add_column("checks", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("at")
    table.add_column("result", no_wrap=True)
    for summary in summarise(rows):
        table.add_row(
            summary.op,
            summary.backend,
            summary.dtype,
            str(summary.count),
            _ratio(summary.worst),
            f"{summary.worst.case}, {summary.worst.quantity}",
            Text(f"{summary.failed} failed", "bold red") if summary.failed else "passed",
        )
    console.print(table)

    worst_first = sorted(rows, key=badness, reverse=True)
    failed = [row for row in worst_first if not row.passed]
    if verbose:
        _print_rows(console, "Every comparison", rows)
    elif not failed:
        _print_rows(console, "Closest to their budgets", worst_first[:_CLOSEST_SHOWN])
    shown = failed if verbose else failed[:_FAILED_SHOWN]
    for row in shown:
        console.print(Text(str(row)))
    if len(shown) < len(failed):
        console.print(f"... and {len(failed) - len(shown)} more, with --verbose or --json FILE")
    replaced = sum(row.yardstick.startswith("float32 rounded") for row in rows)
    if replaced:
        console.print(
            f"{replaced} results are held against float32 rounded to their dtype, as plain PyTorch "
            f"overflows or has an error of one half at the dtype itself."
        )
    console.print(f"{len(rows)} comparisons, {len(failed)} failed.", highlight=False)


def _print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A table of single comparisons, each in the norm that comes closer to its budget."""
    table = Table(title=title)
    for heading in ("operation", "backend", "dtype", "case", "result of"):
        table.add_column(heading)
    for heading in ("ours", "plain", "budget", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        norm = row.ours.closer_norm(row.budget)
        table.add_row(
            row.op,
            row.backend,
            row.dtype,
            row.case,
            row.quantity,
            *(f"{getattr(errors, norm):.1e}" for errors in (row.ours, row.plain, row.budget)),
            Text(_ratio(row), "" if row.passed else "bold red"),
        )
    console.print(table)


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}" if math.isfinite(row.ratio) else "-"
