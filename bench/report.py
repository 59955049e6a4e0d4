"""What a benchmark shows and keeps: tables, JSON, and the change against an earlier result.

A result is what the JSON file holds; README.md beside this file lists its keys.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.contestants import OURS, is_ours
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.output import write_atomically

SCHEMA = 1
SLOWER_BY = 1.05
"""A block that takes more than this many times the best peer's time is marked."""
_DISTURBED = 0.5
"""Share of preempted runs from which the median says more about the machine than the block."""
_WIDTH_OF_FILES = 160

Result = Mapping[str, Any]


def console() -> Console:
    """For stdout; wide where that is no terminal, so that lines are not broken."""
    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_OF_FILES, highlight=False, markup=False
    )


def contestants_table(result: Result) -> Table:
    """A line per contestant, with the memory."""
    shown = table(
        *("contestant", "median ms", "quartiles ms", "/ ours", "preempted", "peak MB", "error"),
        last="configuration",
    )
    ours = result["contestants"][OURS]["median_ms"]
    for name, outcome in result["contestants"].items():
        taken = outcome.get("peak_bytes")
        shown.add_row(
            name,
            _number(outcome["median_ms"]),
            _quartiles(outcome["samples_ms"]),
            _number(_ratio(outcome["median_ms"], ours)),
            f"{100 * outcome['preempted']:.0f} %" if outcome["samples_ms"] else "",
            "" if taken is None else f"{taken / 1e6:.0f}",
            "" if outcome["error"] is None else f"{outcome['error']:.2e}",
            outcome["failure"] or outcome["configuration"],
        )
    return shown


def prompts_table(result: Result) -> Table:
    """A line per contestant, with the time of a prompt and the memory."""
    shown = table(
        *("contestant", "ms per prompt", "quartiles ms", "/ ours", "preempted", "peak MB", "error"),
        last="configuration",
    )
    prompts = result["settings"]["prompts"]
    ours = result["contestants"][OURS]["median_ms"]
    for name, outcome in result["contestants"].items():
        taken = outcome["peak_bytes"]
        shown.add_row(
            name,
            _number(_ratio(outcome["median_ms"], prompts)),
            _quartiles([sample / prompts for sample in outcome["samples_ms"]]),
            _number(_ratio(outcome["median_ms"], ours)),
            f"{100 * outcome['preempted']:.0f} %" if outcome["samples_ms"] else "",
            "" if taken is None else f"{taken / 1e6:.0f}",
            "" if outcome["error"] is None else f"{outcome['error']:.2e}",
            outcome["failure"] or outcome["configuration"],
        )
    return shown


def summary_table(results: Sequence[Result]) -> Table:
    """Images a second of whole models: a line per result, a column per contestant."""
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    shown = table("model", "batch", *names, "published")
    for result in results:
        batch = result["settings"]["batch"]
        medians = (result["contestants"].get(name, {}).get("median_ms") for name in names)
        shown.add_row(
            result["settings"]["model"],
            str(batch),
            *("" if median is None else f"{1000 * batch / median:.4g}" for median in medians),
            f"{result['published_images_per_second']}",
        )
    return shown


def images_table(result: Result) -> Table:
    """A line per contestant, with images a second and the memory."""
    shown = table(
        *("contestant", "images/s", "median ms", "quartiles ms", "/ ours", "peak MB", "error"),
        last="configuration",
    )
    ours = result["contestants"][OURS]["median_ms"]
    for name, outcome in result["contestants"].items():
        median, taken = outcome["median_ms"], outcome.get("peak_bytes")
        shown.add_row(
            name,
            "" if median is None else f"{1000 * result['settings']['batch'] / median:.4g}",
            _number(median),
            _quartiles(outcome["samples_ms"]),
            _number(_ratio(median, ours)),
            "" if taken is None else f"{taken / 1e6:.0f}",
            "" if outcome["error"] is None else f"{outcome['error']:.2e}",
            outcome["failure"] or outcome["configuration"],
        )
    return shown


def failures(contest: Result) -> list[str]:
    """Why ours have no times; none where they do."""
    return [
        outcome["failure"]
        for name, outcome in contest["contestants"].items()
        if is_ours(name) and outcome["failure"]
    ]


def prompts_verdict(result: Result) -> list[str]:
    """A line per question: ours against the plain decoder at its best, and at the most at once."""
    contestants = result["contestants"]
    ours = contestants[OURS]
    if ours["failure"]:
        return [f"No times are reported, as ours failed: {ours['failure']}"]
    timed = {
        name: outcome["median_ms"]
        for name, outcome in contestants.items()
        if name.startswith("plain") and outcome["median_ms"] is not None
    }
    best = min(timed, key=timed.__getitem__)
    *_, most = timed
    return [
        f"{name}{remark}: ours is {timed[name] / ours['median_ms']:.2f} times as fast, at "
        f"{ours['peak_bytes'] / contestants[name]['peak_bytes']:.2f} times the memory"
        for name, remark in ((best, ", the best"), (most, ", the most at once"))
    ]


def verdict(result: Result) -> str:
    """One line: ours against the best peer."""
    if failure := result["contestants"][OURS]["failure"]:
        return f"No times are reported, as ours failed: {failure}"
    if result["best_peer"] is None:
        return "No peer was timed."
    return f"best peer {result['best_peer']}: ours is {result['speedup']:.2f} times as fast"


def blocks_table(result: Result) -> Table:
    """A line per block, and their sum."""
    shown = table("block", "count", "ours ms", "peer ms", "peer / ours", "share", last="best peer")
    for block in result["blocks"]:
        shown.add_row(
            block["name"],
            str(block["count"]),
            _number(_ours_ms(block)),
            _number(_peer_ms(block)),
            _number(block["speedup"]),
            "" if block["share"] is None else f"{100 * block['share']:.1f} %",
            "  ".join(_remarks(block)),
        )
    ours_ms, peer_ms = _sum(result["blocks"], _ours_ms), _sum(result["blocks"], _peer_ms)
    shown.add_section()
    shown.add_row(
        "all, one by one",
        str(sum(block["count"] for block in result["blocks"])),
        _number(ours_ms),
        _number(peer_ms),
        _number(_ratio(peer_ms, ours_ms)),
    )
    return shown


def layers_table(result: Result) -> Table:
    """A line per layer of an operation, with what it reaches of the roof."""
    shown = table(
        *("layer", "count", "ours ms", "peer ms", "peer / ours", "GFLOP/s", "GB/s", "of the roof"),
        last="by, best peer",
    )
    for layer in result["layers"]:
        reached = roofline(layer, result["peaks"])
        shown.add_row(
            layer["name"],
            _count(layer["count"]),
            _number(_ours_ms(layer)),
            _number(_peer_ms(layer)),
            _number(layer["speedup"]),
            *(
                ("", "", "")
                if reached is None
                else (
                    f"{reached.flops / 1e9:.4g}",
                    f"{reached.bytes / 1e9:.4g}",
                    f"{100 * reached.share:.0f} %",
                )
            ),
            "  ".join([layer["contestants"][OURS]["configuration"], *_remarks(layer)]),
        )
    return shown


class Reached(NamedTuple):
    """Where a layer's time is under the roof of the measured peaks.

    Attributes:
        intensity: floating-point operations per byte.
        flops: per second.
        bytes: per second.
        share: of what the peaks allow in that time, of whichever of both is scarcer.
    """

    intensity: float
    flops: float
    bytes: float
    share: float


def roofline(layer: Result, peaks: Mapping[str, float], name: str = OURS) -> Reached | None:
    """What a contestant reaches of the peaks; None where it has no time."""
    outcome = layer["contestants"].get(name)
    if outcome is None or outcome["median_ms"] is None:
        return None
    seconds = outcome["median_ms"] / 1000
    flops, moved = layer["flops"] / seconds, layer["bytes"] / seconds
    share = max(flops / peaks["flops_per_second"], moved / peaks["bytes_per_second"])
    return Reached(layer["flops"] / layer["bytes"], flops, moved, share)


def _remarks(block: Result) -> Iterator[str]:
    """The best peer, and what there is to know about the times."""
    ours, best = block["contestants"][OURS], block["best_peer"]
    if ours["failure"]:
        yield ours["failure"]
    elif best is not None:
        peer = block["contestants"][best]
        yield best
        if ours["median_ms"] > SLOWER_BY * peer["median_ms"]:
            yield "OURS IS SLOWER"
        if max(ours["preempted"], peer["preempted"]) > _DISTURBED:
            yield "disturbed"


def _sum(blocks: Sequence[Result], milliseconds: Callable[[Result], float | None]) -> float | None:
    """Over all blocks, each as often as it occurs; None where one has no time."""
    total = 0.0
    for block in blocks:
        if (value := milliseconds(block)) is None:
            return None
        total += block["count"] * value
    return total


def change_table(old: Result, new: Result) -> Table:
    """A line per contestant, and per block of ours, that both results have times of."""
    shown = table("", "before ms", "now ms", "change")
    before, now = dict(_medians(old)), dict(_medians(new))
    for name in now:
        if name in before:
            change = f"{100 * (now[name] / before[name] - 1):+.1f} %"
            shown.add_row(name, _number(before[name]), _number(now[name]), change)
    return shown


def differences(old: Result, new: Result) -> list[str]:
    """What else differs between two results, so that their times cannot simply be compared."""
    return [
        f"{part}, {key}: {old[part][key]} before, {new[part][key]} now"
        for part in ("settings", "machine", "versions")
        for key in new[part]
        if key in old[part] and old[part][key] != new[part][key]
    ]


def save(result: Result, path: Path) -> None:
    """Write a result.

    Raises:
        CommandError: the file cannot be written.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise CommandError(f"--json: {error}") from error


def load(path: Path) -> Result:
    """Read an earlier result.

    Raises:
        CommandError: the file cannot be read or is none.
    """
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--compare: {path} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise CommandError(
            f'--compare: {path} is no result of this benchmark, which has "schema": {SCHEMA}'
        )
    return result


def table(first: str, *numbers: str, last: str | None = None) -> Table:
    """A table with words in its first and last column and numbers in between."""
    table = Table(first, box=box.SIMPLE_HEAD)
    for heading in numbers:
        table.add_column(heading, justify="right")
    if last is not None:
        table.add_column(last)
    return table


def parts(result: Result) -> list[Result]:
    """The blocks or the layers that were timed one by one."""
    found: list[Result] = result.get("blocks") or result.get("layers") or []
    return found


def _medians(result: Result) -> Iterator[tuple[str, float]]:
    for name, outcome in result.get("contestants", {}).items():
        if outcome["median_ms"] is not None:
            yield name, outcome["median_ms"]
    for part in parts(result):
        if (median := _ours_ms(part)) is not None:
            yield part["name"], median


_COLUMNS = ("configuration", "median_ms", "preempted", "error", "peak_bytes", "failure")


def _count(count: int | Mapping[str, int]) -> str:
    """How often a part occurs, in each variant where that differs: "l0 4, l1 6"."""
    if isinstance(count, int):
        return str(count)
    return ", ".join(f"{name.rpartition('-')[2]} {times}" for name, times in count.items())


def as_markdown(shown: Table) -> str:
    """A table in Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in shown.columns]
    right = [column.justify == "right" for column in shown.columns]
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    rule = "|" + "|".join("---:" if to_the_right else "---" for to_the_right in right) + "|"
    return "\n".join([head, rule, *rows])


def as_csv(result: Result) -> str:
    """A line per contestant, of the whole and of every part; what is missing is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "count", "contestant", *_COLUMNS))
    whole = [{"name": "", **result}] if "contestants" in result else []
    for part in [*whole, *parts(result)]:
        for name, outcome in part["contestants"].items():
            values = (outcome.get(column) for column in _COLUMNS)
            writer.writerow((part["name"], _count(part.get("count", 1)), name, *values))
    return text.getvalue()


def _ours_ms(block: Result) -> float | None:
    median: float | None = block["contestants"][OURS]["median_ms"]
    return median


def _peer_ms(block: Result) -> float | None:
    if block["best_peer"] is None:
        return None
    median: float = block["contestants"][block["best_peer"]]["median_ms"]
    return median


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or by is None else value / by


def _number(value: float | None) -> str:
    """Three digits at least."""
    if value is None:
        return ""
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 1}f}"


def _quartiles(samples: list[float]) -> str:
    if not samples:
        return ""
    ordered = sorted(samples)
    quarter = (len(ordered) - 1) // 4
    return f"{_number(ordered[quarter])} - {_number(ordered[-1 - quarter])}"
