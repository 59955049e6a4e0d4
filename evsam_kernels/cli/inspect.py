"""`evsam inspect`: what GPU kernels take, move and cannot beat, found without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import evsam_kernels
from evsam_kernels import simt
from evsam_kernels.cli import inspect_model, launches
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import check_report_files, write_atomically
from evsam_kernels.sam.zoo import VARIANTS
from evsam_kernels.simt import plot

_PIPED_WIDTH = 170
_CONTEXT = 2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="check and count GPU kernels without a GPU",
        description=textwrap.fill(
            "Compile GPU kernels and say what they take of a multiprocessor. Kernels that are "
            "given with a launch are run on the CPU too: every access is checked, memory traffic "
            "and bank conflicts are counted, and a lower bound follows. The exit status is 1 if a "
            "kernel is at fault. With --model, do that for every layer of a model's encoder.",
            width=80,
        ),
        epilog=launches.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="what to inspect, see below")
    parser.add_argument(
        "--arch",
        type=int,
        default=80,
        choices=simt.ARCHITECTURES,
        help="compute capability to compile for (default: 80)",
    )
    parser.add_argument(
        "--gpu",
        type=_gpu_key,
        metavar="GPU",
        help=f"whose published rates the bounds take: {', '.join(simt.GPUS)}; 'a100' is the first "
        f"of those that begin so (default: the first one of that capability)",
    )
    parser.add_argument(
        "--source", action="store_true", help="print the source with what each line does"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the bounds' terms: .png, .pdf or .svg"
    )
    group = parser.add_argument_group("a whole model instead of kernels")
    group.add_argument(
        "--model",
        choices=list(VARIANTS),
        metavar="NAME",
        help=f"the encoder of one of {', '.join(VARIANTS)}, fused for Triton",
    )
    group.add_argument(
        "--batch",
        type=positive_integer,
        default=16,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=inspect_model.DTYPES,
        default="float16",
        help="to compute at (default: %(default)s)",
    )
    group.add_argument(
        "--sample",
        type=positive_integer,
        default=6,
        metavar="N",
        help="blocks of each launch that are run and counted (default: %(default)s)",
    )


def _gpu_key(text: str) -> str:
    """A GPU's key, or what the first of several begins with."""
    found = next((key for key in simt.GPUS if key == text or key.startswith(f"{text}-")), None)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(simt.GPUS)}, got {text!r}")
    return found


@dataclass(frozen=True)
class Inspection:
    """What is known of one kernel.

    Attributes:
        kernel: its name in the PTX.
        asked: the KERNEL argument that asked for it.
        module: what it is in.
        resources: what its machine code takes.
        occupancy: how many of its blocks a multiprocessor holds; None where the block's size is
            unknown, as it is not launched.
        report: of the launch; None without one.
        bound: of the launch; None without one, or where no GPU of the architecture is known.
    """

    kernel: str
    asked: str
    module: simt.Module
    resources: simt.Resources
    occupancy: simt.Occupancy | None
    report: simt.Report | None
    bound: simt.Bound | None


def run(arguments: argparse.Namespace) -> int:
    """Inspect and report; 0 where no kernel is at fault, else 1."""
    check_report_files(arguments.json, arguments.plot)
    key = arguments.gpu or next(
        (gpu.key for gpu in simt.GPUS.values() if gpu.arch == arguments.arch), None
    )
    gpu = simt.GPUS[key] if key else None
    if bool(arguments.kernels) == bool(arguments.model):
        raise CommandError("give either kernels or --model NAME")
    if arguments.model:
        if gpu is None:
            raise CommandError(f"--arch {arguments.arch}: no GPU of it is known; give --gpu")
        if arguments.plot or arguments.source:
            raise CommandError("--plot and --source take kernels, not --model")
        inspect_model.run(
            *(arguments.model, arguments.batch, arguments.dtype, gpu, arguments.sample),
            arguments.json,
        )
        return 0
    try:
        asked = [launches.parse(text) for text in arguments.kernels]
        if arguments.plot and not any(kernel.launch for kernel in asked):
            raise CommandError("--plot draws the bounds of launches, and no KERNEL has one")
        inspections = [
            inspection for kernel in asked for inspection in inspect(kernel, arguments.arch, gpu)
        ]
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise CommandError(str(error)) from error

    print_inspections(inspections, arguments.arch, source=arguments.source)
    try:
        if arguments.json is not None:
            text = json.dumps(as_json(inspections, arguments.arch), indent=1) + "\n"
            write_atomically(arguments.json, lambda file: file.write(text.encode()))
        if arguments.plot is not None:
            bounds = [(found.kernel, found.bound) for found in inspections if found.bound]
            file_format = arguments.plot.suffix[1:].lower()
            write_atomically(arguments.plot, lambda file: plot.draw(bounds, file, file_format))
    except OSError as error:
        raise CommandError(str(error)) from error
    return 1 if any(found.report and found.report.faults for found in inspections) else 0


def inspect(kernel: launches.KernelArgument, arch: int, gpu: simt.Gpu | None) -> list[Inspection]:
    """Compile what a KERNEL argument names, and launch it where that says how.

    Raises:
        ValueError: there is no such kernel, or it cannot be launched like that.
        RuntimeError, ImportError, OSError: it cannot be compiled here.
    """
    prepared = launches.prepare(kernel, arch)
    resources = simt.resources(prepared.module, arch)
    if prepared.launch is None:
        return [
            _inspect_unlaunched(kernel, prepared.module, found, resources[found.name], arch)
            for found in prepared.module.kernels
            if prepared.function in ("", found.name)
        ]
    grid, block, shared, args = prepared.launch
    report = prepared.module.launch(prepared.function, grid, block, shared, args)
    return [
        Inspection(
            prepared.function,
            kernel.text,
            prepared.module,
            resources[prepared.function],
            _occupancy(resources[prepared.function], arch, report.block, shared),
            report,
            simt.bound(report, gpu) if gpu else None,
        )
    ]


def _inspect_unlaunched(
    kernel: launches.KernelArgument,
    module: simt.Module,
    found: simt.Kernel,
    resources: simt.Resources,
    arch: int,
) -> Inspection:
    block = found.required_block
    occupancy = _occupancy(resources, arch, block, 0) if block else None
    return Inspection(found.name, kernel.text, module, resources, occupancy, None, None)


def _occupancy(
    resources: simt.Resources, arch: int, block: Sequence[int], dynamic_shared: int
) -> simt.Occupancy:
    return simt.occupancy(
        arch,
        threads=math.prod(block),
        registers=resources.registers,
        shared=resources.shared + dynamic_shared,
        barriers=resources.barriers or 0,
    )


def print_inspections(
    inspections: Sequence[Inspection], arch: int, *, source: bool = False
) -> None:
    """Print a table of the kernels, the faults and bounds of those launched, and their source."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, highlight=False)
    table = Table(title=f"Kernels on sm_{arch}")
    table.add_column("kernel")
    for heading in (
        *("registers", "spilled\nbytes", "shared\nbytes", "occupancy"),
        *("sectors\n/ ideal", "wavefronts\n/ ideal", "faults", "bound, us\nat least"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by")
    for found in inspections:
        table.add_row(*_cells(found))
    console.print(table)
    for found in inspections:
        if found.report and found.report.faults:
            console.print(Text(f"\n{found.kernel}\n{found.report}"))
        if found.bound:
            console.print(Text(f"{found.kernel}: {found.bound}"))
        if source:
            _print_source(console, found)


def _cells(found: Inspection) -> list[str | Text]:
    """A row of the table; "-" for what is unknown without a launch."""
    resources, report, bound = found.resources, found.report, found.bound
    faults: str | Text = "-"
    if report is not None:
        count = sum(fault.count for fault in report.faults)
        faults = Text(str(count), "bold red") if count else "0"
    return [
        found.kernel,
        str(resources.registers),
        str(max(resources.spill_stores or 0, resources.spill_loads or 0)),
        str(resources.shared + (report.shared if report else 0)),
        f"{found.occupancy.fraction:.0%}, {found.occupancy.limited_by}" if found.occupancy else "-",
        _ratio(report, "sectors"),
        _ratio(report, "wavefronts"),
        faults,
        f"{1e6 * bound.seconds:.3g}" if bound else "-",
        bound.binding.limit if bound and bound.binding else "-",
    ]


def _ratio(report: simt.Report | None, counter: str) -> str:
    if report is None:
        return "-"
    counted, ideal = (int(report.counters[name].sum()) for name in (counter, f"ideal_{counter}"))
    return f"{counted} / {ideal}" if counted else "0"


def _print_source(console: Console, found: Inspection) -> None:
    """The lines that do something, with what they do and the lines round them."""
    if found.report is None:
        return
    by_file: dict[str, dict[int, simt.Line]] = {}
    for line in found.report.by_line:
        by_file.setdefault(line.file, {})[line.line] = line
    for file, lines in by_file.items():
        text = found.module.sources.get(file, "").splitlines()
        if not text:
            continue
        console.print(Text(f"\n{file}, {found.kernel}", "bold"))
        console.print(Text(f"{'warps':>10} {'sectors':>17} {'wavefronts':>17} {'line':>6}", "dim"))
        shown = sorted(
            {near for line in lines for near in range(line - _CONTEXT, line + _CONTEXT + 1)}
            & set(range(1, len(text) + 1))
        )
        previous = 0
        for number in shown:
            if previous and number > previous + 1:
                console.print(Text(f"{'...':>53}", "dim"))
            previous = number
            counters = lines[number].counters if number in lines else {}
            console.print(
                Text(
                    f"{counters.get('warp_executions') or '':>10} "
                    f"{_share(counters, 'sectors'):>17} {_share(counters, 'wavefronts'):>17} "
                    f"{number:>6} | {text[number - 1]}"
                ),
                soft_wrap=True,
            )


def _share(counters: Mapping[str, int], name: str) -> str:
    return f"{counters[name]} / {counters[f'ideal_{name}']}" if counters.get(name) else ""


def as_json(inspections: Sequence[Inspection], arch: int) -> dict[str, Any]:
    """The report for programs: package, architecture, and every kernel with all that is known."""
    return {
        "package_version": evsam_kernels.__version__,
        "arch": arch,
        "kernels": [_kernel_as_json(found) for found in inspections],
    }


def _kernel_as_json(found: Inspection) -> dict[str, Any]:
    report, bound, occupancy = found.report, found.bound, found.occupancy
    entry: dict[str, Any] = {
        "kernel": found.kernel,
        "asked": found.asked,
        "resources": dataclasses.asdict(found.resources),
        "occupancy": occupancy
        and {
            **dataclasses.asdict(occupancy),
            "fraction": occupancy.fraction,
        },
        "launch": None,
        "bound": None,
    }
    if report is not None:
        entry["launch"] = {
            "grid": list(report.grid),
            "block": list(report.block),
            "dynamic_shared": report.shared,
            "faults": [dataclasses.asdict(fault) for fault in report.faults],
            "counters": {name: int(counts.sum()) for name, counts in report.counters.items()},
            "unique_bytes": {
                name: {"read": read, "written": written}
                for name, (read, written) in report.unique_bytes.items()
            },
            "by_line": [dataclasses.asdict(line) for line in report.by_line],
        }
    if bound is not None:
        entry["bound"] = {
            "gpu": bound.gpu.key,
            "seconds_at_least": bound.seconds,
            "bound_by": bound.binding and bound.binding.limit,
            "terms": [
                {
                    "limit": term.limit,
                    "seconds_at_least": term.seconds,
                    "amount": term.amount,
                    **dataclasses.asdict(term.rate),
                }
                for term in bound.terms
            ],
            "uncounted": list(bound.uncounted),
        }
    return entry
