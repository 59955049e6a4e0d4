"""What a benchmark shows and keeps: tables, JSON, and the change against an earlier result."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.contest import Contest, Outcome
from bench.contestants import OURS
from evsam_kernels.cli.output import write_atomically

SLOWER_BY = 1.05
"""A block that takes this many times the best peer's time is marked."""
_WIDTH_OF_FILES = 160


def console() -> Console:
    """For stdout; wide where that is no terminal, so that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES, highlight=False)


def contestants_table(contest: Contest) -> Table:
    """A line per contestant."""
    table = Table("contestant", "configuration")
    for heading in ("median ms", "quartiles ms", "times ours", "error"):
        table.add_column(heading, justify="right")
    ours = contest.ours.median_ms
    for name, outcome in contest.outcomes.items():
        table.add_row(
            name,
            outcome.configuration or outcome.failure,
            _number(outcome.median_ms),
            _quartiles(outcome),
            _number(outcome.median_ms / ours),
            "" if outcome.error != outcome.error else f"{outcome.error:.2e}",
        )
    return table


def verdict(contest: Contest) -> str:
    """One line: ours against the best peer."""
    if contest.ours.failure:
        return f"NOT REPORTED: {contest.ours.failure}"
    if contest.best_peer is None:
        return "No peer was timed."
    return f"best peer {contest.best_peer}: ours is {contest.speedup:.2f} times as fast"


def blocks_table(result: Mapping[str, Any]) -> Table:
    """A line per block; `result` is what `as_json` gives."""
    table = Table("block")
    for heading in ("count", "ours ms", "best peer ms"):
        table.add_column(heading, justify="right")
    table.add_column("best peer")
    for heading in ("peer / ours", "share of ours"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for block in result["blocks"]:
        ours, peer = block["contestants"][OURS], block["best_peer"]
        peers_ms = block["contestants"][peer]["median_ms"] if peer else None
        ratio = peers_ms / ours["median_ms"] if peers_ms and ours["median_ms"] else None
        mark = ours["failure"] or ("SLOWER" if ratio and ratio * SLOWER_BY < 1 else "")
        table.add_row(
            block["name"],
            str(block["count"]),
            _number(ours["median_ms"]),
            _number(peers_ms),
            peer or "",
            _number(ratio),
            "" if block["share"] is None else f"{100 * block['share']:.1f} %",
            mark,
        )
    return table


def as_json(outcome: Outcome) -> dict[str, Any]:
    """One contestant's figures; None where there are none."""
    return {
        "configuration": outcome.configuration,
        "median_ms": outcome.median_ms if outcome.samples_ms else None,
        "samples_ms": outcome.samples_ms,
        "error": outcome.error if outcome.error == outcome.error else None,
        "failure": outcome.failure,
    }


def contest_as_json(contest: Contest) -> dict[str, Any]:
    """All contestants' figures."""
    return {
        "allowed_error": contest.allowed_error,
        "best_peer": contest.best_peer,
        "contestants": {name: as_json(outcome) for name, outcome in contest.outcomes.items()},
    }


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON."""
    text = json.dumps(result, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _number(value: float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _quartiles(outcome: Outcome) -> str:
    if not outcome.samples_ms:
        return ""
    ordered = sorted(outcome.samples_ms)
    quarter = (len(ordered) - 1) // 4
    return f"{_number(ordered[quarter])} .. {_number(ordered[-1 - quarter])}"
