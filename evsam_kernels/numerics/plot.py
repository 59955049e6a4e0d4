"""Draws a validation report: errors of every backend and of plain PyTorch beside the budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

from evsam_kernels.numerics.budget import Row

_COLOURS = (0, 2, 1, 4, 5, 6)
"""Of matplotlib's cycle, without the budget's red."""


def draw(rows: Sequence[Row], subtitle: str, file: BinaryIO, file_format: str) -> None:
    """Write a figure with one panel per operation and dtype.

    A panel orders its comparisons by their budgets and shows, of each, the norm that comes closer
    to the budget. Dots below the budget's line pass; crosses at 1 are failures without an error to
    show, such as NaN.

    Args:
        rows: what was compared.
        subtitle: printed above the panels.
        file: where the figure goes.
        file_format: "png", "pdf" or "svg".

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(2 + 4 * len(dtypes), 1.5 + 2.2 * len(ops)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Relative error against float64, comparisons ordered by budget\n{subtitle}", fontsize=10
    )
    panels = figure.subplots(len(ops), len(dtypes), squeeze=False)
    handles = {}
    for line, op in zip(panels, ops, strict=True):
        for panel, dtype in zip(line, dtypes, strict=True):
            chosen = [row for row in rows if (row.op, row.dtype) == (op, dtype)]
            handles.update(_draw_panel(panel, chosen, dtype))
            panel.set_title(f"{op}, {dtype}", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(file, format=file_format, dpi=110)


def _draw_panel(panel: Any, rows: Sequence[Row], dtype: str) -> dict[str, Any]:
    """Draw the rows into a panel; return what there is to explain in a legend, by name."""
    unit_roundoff = torch.finfo(getattr(torch, dtype)).eps / 2
    # An error may be 0, which has no place on a logarithmic axis.
    floor = unit_roundoff / 100
    panel.set_yscale("log")
    panel.set_xticks([])
    panel.tick_params(labelsize=7)

    def heights(rows: Sequence[Row], side: str) -> list[float]:
        return [
            max(getattr(getattr(row, side), row.ours.closer_norm(row.budget)), floor)
            for row in rows
        ]

    measured = [row for row in rows if math.isfinite(row.ratio)]
    measured.sort(key=lambda row: getattr(row.budget, row.ours.closer_norm(row.budget)))
    handles: dict[str, Any] = {}
    (handles["budget"],) = panel.step(
        range(len(measured)), heights(measured, "budget"), "tab:red", where="mid", lw=1
    )
    (handles["plain PyTorch"],) = panel.plot(
        range(len(measured)), heights(measured, "plain"), "_", color="0.6", ms=4
    )
    for index, backend in enumerate(dict.fromkeys(row.backend for row in rows)):
        own = [position for position, row in enumerate(measured) if row.backend == backend]
        (handles[backend],) = panel.plot(
            own,
            heights([measured[position] for position in own], "ours"),
            ".",
            color=f"C{_COLOURS[index % len(_COLOURS)]}",
            ms=4,
        )
    if lost := len(rows) - len(measured):
        (handles["failed without an error to show"],) = panel.plot(
            range(lost), [1.0] * lost, "x", color="black", ms=5
        )
    panel.set_ylim(bottom=floor / 2)
    return handles
