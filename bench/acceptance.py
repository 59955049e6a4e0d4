"""`python -m bench acceptance`: what an owner of a GPU should run once, into one folder."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import command, emulated, layers, measured, report
from bench.operation import PARTICIPANTS
from bench.sections import Found, Section, Stand, numerics, self_checks
from evsam_kernels import simt
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.output import write_atomically
from evsam_kernels.sam.masks import import_optional
from evsam_kernels.sam.zoo import VARIANTS

_EMULATED = "a100-40gb"
"""What the executor stands in for, and bounds are of."""
_BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_DTYPE = {"cpu": torch.float32, "cuda": torch.float16}
_BATCHES = (1, 16)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "acceptance",
        help="check and time everything on a GPU once, into one folder",
        description="Hold every kernel against float64 on the device, see whether the self-check "
        "of first calls works, time operations, encoders and whole models of all variants beside "
        "their peers, and write report.md, JSON and plots. Sections are written as they end. The "
        "exit status is 1 where something is wrong. README.md in this folder says more.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="made where it is missing"
    )
    parser.add_argument(
        "--device",
        choices=command.DEVICES,
        help="(default: cuda where there is one, else cpu; --executor needs none)",
    )
    parser.add_argument(
        "--executor",
        choices=["simt"],
        help="run the GPU kernels on the CPU, checked and counted: bounds take the place of times",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one layer of each operation, the smallest model, one picture: to see that all works",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do everything that can be done; 1 where something is wrong, else 0.

    Raises:
        CommandError: the arguments or the folder cannot be used.
    """
    stand = stand_of(arguments)
    try:
        import_optional("matplotlib", "acceptance")
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        raise CommandError(f"--output {arguments.output}: {error}") from error
    account = Account(arguments.output, " ".join(["python -m bench", *arguments.argv]))
    todo = [numerics(stand), self_checks(stand)]
    todo += emulated.sections(stand) if stand.gpu else measured.sections(stand)
    for index, section in enumerate(todo):
        account.write([later.title for later in todo[index:]])
        print(f"{section.title} ...", file=sys.stderr)
        account.add(section)
    account.write([])
    out = report.console()
    for problem in account.problems:
        out.print(problem)
    out.print(f"-> {account.report}")
    return 1 if account.problems else 0


def stand_of(arguments: argparse.Namespace) -> Stand:
    """Where and how much is to be tried.

    Raises:
        CommandError: that is not possible.
    """
    emulating = arguments.executor is not None
    if emulating and not arguments.quick:
        raise CommandError("--executor simt: it would take days without --quick; add that")
    if emulating and arguments.device == "cuda":
        raise CommandError("--executor simt: it runs on the CPU; leave --device cuda out")
    has_gpu = torch.cuda.is_available()
    device = arguments.device or ("cuda" if has_gpu and not emulating else "cpu")
    if device == "cuda" and not has_gpu:
        raise CommandError(
            "--device cuda: PyTorch finds no GPU; --executor simt --quick needs none"
        )
    kind = "cuda" if emulating else device
    cores = command.physical_cores()
    torch.set_num_threads(len(cores))
    return Stand(
        device=device,
        gpu=simt.GPUS[_EMULATED] if emulating else None,
        backends=_BACKENDS[kind],
        dtype=_DTYPE[kind],
        models=tuple(VARIANTS)[:1] if arguments.quick else tuple(VARIANTS),
        layers=tuple(smallest(layers.load()) if arguments.quick else layers.load()),
        batches=_BATCHES[:1] if arguments.quick else _BATCHES,
        quick=arguments.quick,
        cores=cores,
        rounds=1 if arguments.quick else 5,
        peers=tuple(command.chosen_peers(None, device, PARTICIPANTS)),
    )


def smallest(of: list[layers.Layer]) -> Iterator[layers.Layer]:
    """The layer of each operation with the fewest values in its operands."""
    for op in dict.fromkeys(layer.op for layer in of):
        yield min((layer for layer in of if layer.op == op), key=layers.values_of)


@dataclass(frozen=True)
class Written:
    """A section that has ended.

    Attributes:
        section: which.
        found: what it has found.
        seconds: that it took.
        plot: name of its figure; "" for none.
    """

    section: Section
    found: Found
    seconds: float
    plot: str


class Account:
    """The folder: a JSON file and a figure per section, and the report of those that have ended.

    Args:
        folder: where.
        command_line: that was given.
    """

    def __init__(self, folder: Path, command_line: str) -> None:
        self._folder = folder
        self._command_line = command_line
        self._written: list[Written] = []

    @property
    def report(self) -> Path:
        """The report's file."""
        return self._folder / "report.md"

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        return [problem for written in self._written for problem in written.found.problems]

    def add(self, section: Section) -> None:
        """Do a section and write its files; an error in it is one of the problems.

        Raises:
            CommandError: the folder cannot be written.
        """
        began = time.monotonic()
        try:
            found = section.find()
        # Whatever goes wrong in a section must not cost the owner of a GPU the others.
        except Exception as error:
            said = f"{section.name}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
            found = Found({"failure": traceback.format_exc()}, problems=[said])
        seconds = time.monotonic() - began
        result = {**found.result, "problems": list(found.problems), "seconds": seconds}
        plot = f"{section.name}.png" if found.draw else ""
        self._write(f"{section.name}.json", json.dumps(finite(result), indent=1, allow_nan=False))
        if found.draw is not None:
            draw = found.draw
            write_atomically(self._folder / plot, lambda file: draw(file, "png"))
        self._written.append(Written(section, found, seconds, plot))

    def write(self, missing: list[str]) -> None:
        """Write the report of what has ended.

        Args:
            missing: titles of what has not.
        """
        self._write("report.md", "\n".join(self._lines(missing)))

    def _lines(self, missing: list[str]) -> Iterator[str]:
        yield from ("# Acceptance report", "", str(machine()), "", f"`{self._command_line}`", "")
        if self.problems:
            yield from ("## Wrong", "", *(f"- {problem}" for problem in self.problems), "")
        elif not missing:
            yield from ("Nothing is wrong.", "")
        if missing:
            yield from ("## Not done yet", "", *(f"- {title}" for title in missing), "")
        whole = [written.found.result for written in self._written]
        if timed := [result for result in whole if "published_images_per_second" in result]:
            yield from ("## Images per second, from pictures to masks", "")
            yield from (report.as_markdown(report.summary_table(timed)), "")
        for written in self._written:
            yield from (f"## {written.section.title}", "")
            for shown in written.found.tables:
                yield from (report.as_markdown(shown), "")
            for remark in written.found.remarks:
                yield from (remark, "")
            for problem in written.found.problems:
                yield from (f"**{problem}**", "")
            if written.plot:
                yield from (f"![{written.section.title}]({written.plot})", "")
            yield from (f"{written.section.name}.json; {written.seconds:.0f} s", "")

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self._folder / name, lambda file: file.write(f"{text}\n".encode()))
        except OSError as error:
            raise CommandError(f"--output: {error}") from error


def finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and value - value != 0 else value
