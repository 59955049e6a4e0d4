"""What the subcommands share: options, what is checked beforehand, what is left behind."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console

from bench import report, revision
from bench.contest import hold
from bench.contestants import CONTESTANTS, Contestant, Task, is_ours
from bench.cores import physical_cores
from bench.worker import Worker
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.machine import machine
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import check_report_files, progress, write_atomically
from evsam_kernels.sam.zoo import VARIANTS

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEVICES = ("cpu", "cuda")

Draw = Callable[[report.Result, BinaryIO, str], None]


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options that every command has."""
    parser.add_argument(
        "--model",
        choices=list(VARIANTS),
        default="efficientvit-sam-l0",
        metavar="NAME",
        help=f"one of {', '.join(VARIANTS)} (default: %(default)s)",
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
        default=rounds,
        metavar="N",
        help="turns of every contestant, at least three runs each (default: %(default)s)",
    )
    _add_files(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="keep its times as a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    parser.add_argument(
        "--compare",
        metavar="FILE|REVISION",
        help="show the change against a result kept, or against what this command measures of a "
        "git revision first",
    )


def add_peers(
    parser: argparse.ArgumentParser, among: Mapping[str, Contestant] = CONTESTANTS
) -> None:
    """The options of commands with peers: which, at what dtype, on what device, how many."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"a comma between them: {', '.join(_peers(among))} (default: those installed)",
    )
    parser.add_argument(
        "--batch",
        type=positive_integer,
        default=1,
        metavar="N",
        help="pictures at a time (default: %(default)s)",
    )


def without_files(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, less those that say what to leave behind or to compare with."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_files(parser)
    return parser.parse_known_args(argv)[1]


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is known before anything runs.

    Attributes:
        cores: that contestants run on.
        before: the result to compare with; None for none.
    """

    cores: tuple[int, ...]
    before: report.Result | None


def begin(arguments: argparse.Namespace) -> Begun:
    """Check what every command is given, and measure the revision to compare with.

    Raises:
        CommandError: something cannot be had; the message names the option.
    """
    device = getattr(arguments, "device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: PyTorch finds no GPU; give --device cpu")
    cores = physical_cores()
    if arguments.threads is not None and arguments.threads > len(cores):
        raise CommandError(
            f"--threads: this process may use {len(cores)} cores, got {arguments.threads}"
        )
    check_report_files(arguments.json, arguments.plot)
    if arguments.csv is not None and not arguments.csv.parent.is_dir():
        raise CommandError(f"--csv {arguments.csv}: there is no folder {arguments.csv.parent}")
    before = None
    if arguments.compare is not None:
        if Path(arguments.compare).exists():
            before = report.load(Path(arguments.compare))
        else:
            before = revision.measure(arguments.compare, without_files(arguments.argv))
    cores = cores[: arguments.threads]
    torch.set_num_threads(len(cores))
    return Begun(cores, before)


def header(
    names: Iterable[str], settings: Mapping[str, Any], among: Mapping[str, Contestant]
) -> dict[str, Any]:
    """The beginning of a result: on what it is measured, and how."""
    on = machine()
    return {
        "schema": report.SCHEMA,
        "machine": {**dataclasses.asdict(on), "instruction_sets": list(on.instruction_sets)},
        "versions": {name: among[name].version for name in names},
        "settings": dict(settings),
    }


def print_header(result: report.Result, out: Console) -> None:
    """Say on what the result is measured, and how."""
    out.print(str(machine()))
    for part in ("settings", "versions"):
        out.print(", ".join(f"{key} {value}" for key, value in result[part].items()))


@contextmanager
def workers(
    names: Iterable[str], cores: tuple[int, ...], isa: str = "native", *, among: str | None = None
) -> Iterator[dict[str, Worker]]:
    """A process for each contestant, by its name; all end with the context."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            source = {} if among is None else {"among": among}
            found[name] = Worker(name, cores, isa, **source)
            stack.callback(found[name].close)
        yield found


def held(
    task: Task, workers: Mapping[str, Worker], rounds: int, description: str
) -> dict[str, Any]:
    """A contest's part of a result, with the memory that each takes."""
    with progress(description, len(workers) + rounds) as advance:
        contest = hold(task, workers, rounds=rounds, advance=advance)
    found = contest.as_json()
    for name, outcome in contest.outcomes.items():
        taken = workers[name].memory() if outcome.samples_ms else None
        found["contestants"][name]["peak_bytes"] = taken
    return found


def end(
    arguments: argparse.Namespace, begun: Begun, result: report.Result, out: Console, draw: Draw
) -> None:
    """Compare the result and write it, as the options say.

    Raises:
        CommandError: a file cannot be written.
    """
    if begun.before is not None:
        out.print(report.change_table(begun.before, result))
        for line in report.differences(begun.before, result):
            out.print(line)
    if arguments.json is not None:
        report.save(result, arguments.json)
    try:
        if arguments.csv is not None:
            text = report.as_csv(result)
            write_atomically(arguments.csv, lambda file: file.write(text.encode()))
        if arguments.plot is not None:
            file_format = arguments.plot.suffix[1:].lower()
            write_atomically(arguments.plot, lambda file: draw(result, file, file_format))
    except OSError as error:
        raise CommandError(str(error)) from error
    for path in (arguments.json, arguments.csv, arguments.plot):
        if path is not None:
            out.print(f"-> {path}")


def ours(device: str, among: Mapping[str, Contestant] = CONTESTANTS) -> list[str]:
    """The contestants on a device that are no peers; the first is what a user gets."""
    return [name for name in among if is_ours(name) and device in among[name].devices]


def _peers(among: Mapping[str, Contestant]) -> list[str]:
    return [name for name in among if not is_ours(name)]


def chosen_peers(
    names: str | None, device: str, among: Mapping[str, Contestant] = CONTESTANTS
) -> list[str]:
    """The peers asked for, all of them usable; those installed for the device where None.

    Raises:
        CommandError: a name is none, or its packages are not installed.
    """
    peers = _peers(among)
    if names is None:
        return [name for name in peers if not among[name].missing and device in among[name].devices]
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in peers:
            raise CommandError(f"--peers: {name!r} is none of {', '.join(peers)}")
        if missing := among[name].missing:
            raise CommandError(
                f"--peers: {name} needs {', '.join(missing)}: pip install {' '.join(missing)}, "
                f"or pip install -e '.[peers]' for all peers on the CPU"
            )
    return chosen
