"""Draws results: times of techniques with their errors, and layers under the roof of the peaks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from bench.contestants import is_ours
from bench.report import Result, parts, roofline

_OURS, _PEER = "tab:blue", "0.7"


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    return figure


def _title(result: Result) -> str:
    """On what, and how."""
    settings = {key: value for key, value in result["settings"].items() if key != "cores"}
    on = result["machine"]
    machine = (on.get("gpu"), on["processor"], f"torch {on['torch']}", f"commit {on['commit']}")
    lines = (filter(None, machine), (f"{key} {value}" for key, value in settings.items()))
    return "\n".join(", ".join(line) for line in lines)


def waterfall(result: Result, file: BinaryIO, file_format: str) -> None:
    """Write a figure with a bar per technique, slowest first, and its error beside it.

    A bar begins where that of the technique below ends, so that its dark part is the time that the
    step down to that saves; the column on the right has the factor over the slowest.

    Args:
        result: with contestants.
        file: where the figure goes.
        file_format: "png", "pdf" or "svg".

    Raises:
        ImportError: matplotlib is not installed.
    """
    timed = {
        name: outcome
        for name, outcome in result["contestants"].items()
        if outcome["median_ms"] is not None
    }
    ordered = sorted(timed, key=lambda name: -timed[name]["median_ms"])
    figure = _figure(9, 1.4 + 0.35 * max(1, len(ordered)), _title(result))
    panel = figure.subplots()
    if not ordered:
        panel.set_axis_off()
        panel.text(0.5, 0.5, "no times: the numerics failed", ha="center")
    slowest = timed[ordered[0]]["median_ms"] if ordered else math.nan
    for row, name in enumerate(ordered):
        median = timed[name]["median_ms"]
        after = timed[ordered[row + 1]]["median_ms"] if row + 1 < len(ordered) else median
        colour = _OURS if is_ours(name) else _PEER
        panel.barh(row, median, color=colour, alpha=0.35)
        panel.barh(row, median - after, left=after, color=colour)
        _beside(panel, row, f"{slowest / median:6.2f} x  {timed[name]['error']:.1e}")
        panel.text(median, row, f" {_short(median)}", va="center", fontsize=8)
    _beside(panel, -0.8, "faster by  error")
    panel.set_yticks(range(len(ordered)), ordered, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("median ms; dark: what the step to the next one saves", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.margins(x=0.15)
    figure.savefig(file, format=file_format, dpi=110)


def _beside(panel: Any, row: float, text: str) -> None:
    """Write to the right of a row."""
    panel.text(
        *(1.01, row, text),
        transform=panel.get_yaxis_transform(),
        va="center",
        fontsize=8,
        family="monospace",
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def bounds(
    entries: Sequence[Mapping[str, Any]], gpu: str, file: BinaryIO, file_format: str
) -> None:
    """Write a figure with a bar per entry, made of the lower bounds of its launches.

    Args:
        entries: with a name and launches.
        gpu: whose bounds they are.
        file: where the figure goes.
        file_format: "png", "pdf" or "svg".

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(9, 1.2 + 0.35 * max(1, len(entries)), f"Lower bounds, {gpu}")
    panel = figure.subplots()
    kernels = list(
        dict.fromkeys(launch["kernel"] for entry in entries for launch in entry["launches"])
    )
    for row, entry in enumerate(entries):
        reached = 0.0
        for launch in entry["launches"]:
            width = 1e6 * launch["bound_seconds"]
            colour = f"C{kernels.index(launch['kernel']) % 10}"
            panel.barh(row, width, left=reached, color=colour, edgecolor="white", linewidth=0.5)
            reached += width
        panel.text(reached, row, f" {_short(reached)}", va="center", fontsize=8)
    for index, kernel in enumerate(kernels):
        panel.barh(0, 0, color=f"C{index % 10}", label=kernel)
    panel.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set_xlabel("us; no launch takes less than its part", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    if kernels:
        figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(file, format=file_format, dpi=110)


def layers(result: Result, file: BinaryIO, file_format: str) -> None:
    """Write a figure with every layer's arithmetic intensity and speed, under the measured roof.

    Ours are dots, one colour per operation, and best peers crosses below or above them.

    Args:
        result: with layers and peaks.
        file: where the figure goes.
        file_format: "png", "pdf" or "svg".

    Raises:
        ImportError: matplotlib is not installed.
    """
    peaks = result["peaks"]
    figure = _figure(9, 6, _title(result))
    panel = figure.subplots()
    panel.set_xscale("log")
    panel.set_yscale("log")
    found = [layer for layer in parts(result) if layer["flops"]]
    ops = list(dict.fromkeys(layer["op"] for layer in found))
    for layer in found:
        colour = f"C{ops.index(layer['op']) % 10}"
        ours = roofline(layer, peaks)
        peer = roofline(layer, peaks, layer["best_peer"]) if layer["best_peer"] else None
        if ours is not None:
            panel.plot(ours.intensity, ours.flops / 1e9, "o", color=colour, ms=6)
        if peer is not None:
            panel.plot(peer.intensity, peer.flops / 1e9, "x", color=colour, ms=6)
    ridge = peaks["flops_per_second"] / peaks["bytes_per_second"]
    intensities = [layer["flops"] / layer["bytes"] for layer in found] or [ridge]
    ends = (min(ridge, *intensities) / 2, ridge, max(ridge, *intensities) * 2)
    roof = [min(peaks["flops_per_second"], at * peaks["bytes_per_second"]) / 1e9 for at in ends]
    panel.plot(ends, roof, color="black", lw=1)
    for index, op in enumerate(ops):
        panel.plot([], [], "o", color=f"C{index % 10}", label=op)
    panel.plot([], [], "x", color="0.4", label="its best peer")
    panel.plot(
        [],
        [],
        color="black",
        lw=1,
        label=f"measured peaks: {peaks['bytes_per_second'] / 1e9:.4g} GB/s, "
        f"{peaks['flops_per_second'] / 1e9:.4g} GFLOP/s",
    )
    panel.legend(fontsize=8)
    panel.set_xlabel("floating-point operations per byte that must move", fontsize=8)
    panel.set_ylabel("GFLOP/s", fontsize=8)
    panel.tick_params(labelsize=8)
    figure.savefig(file, format=file_format, dpi=110)
