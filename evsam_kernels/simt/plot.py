"""Draws lower bounds: what every term of them says, kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from evsam_kernels.simt.bounds import Bound


def draw(bounds: Sequence[tuple[str, Bound]], file: BinaryIO, file_format: str) -> None:
    """Write a figure with one panel per kernel: a bar per term, the binding one dark.

    Args:
        bounds: with the kernels' names, one or more.
        file: where the figure goes.
        file_format: "png", "pdf" or "svg".

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1 + 0.3 * max(1, len(bound.terms)) for _, bound in bounds]
    figure = Figure(figsize=(8, 0.6 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(bounds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (kernel, bound) in zip(panels, bounds, strict=True):
        terms = bound.terms[::-1]
        bars = panel.barh(
            [term.limit for term in terms],
            [1e6 * term.seconds for term in terms],
            color=["tab:blue" if term is bound.binding else "lightsteelblue" for term in terms],
        )
        panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        panel.margins(x=0.12)
        panel.set_title(f"{kernel} on {bound.gpu.name}", fontsize=10)
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("lower bound by each term alone, us; no launch takes less", fontsize=9)
    figure.savefig(file, format=file_format, dpi=110)
