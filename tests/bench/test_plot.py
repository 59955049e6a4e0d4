"""Figures: that they are drawn, of whole results and of those without times."""

from __future__ import annotations

import io
from typing import Any

import pytest

from bench import plot
from bench.contest import Contest, Outcome
from bench.contestants import OURS

pytest.importorskip("matplotlib", reason="figures need it: pip install matplotlib")


def result(ours: list[float]) -> dict[str, Any]:
    failure = "" if ours else "error 2 exceeds 1"
    outcomes = {OURS: Outcome("c", 1e-6, ours, 0.0, failure)}
    if ours:
        outcomes["peer"] = Outcome("d", 2e-6, [4000.0])
        outcomes["absent"] = Outcome(failure="does not run")
    contest = Contest(outcomes, 1e-5).as_json()
    layer = {"op": "conv_act", "name": "conv_act a", "count": 1, "flops": 1e9, "bytes": 1e7}
    return {
        "machine": {"processor": "fast", "torch": "2", "commit": "", "gpu": "big"},
        "settings": {"batch": 1, "cores": [0]},
        "peaks": {"flops_per_second": 1e12, "bytes_per_second": 1e11},
        "layers": [{**layer, **contest}, {**layer, "flops": 0, **contest}],
        **contest,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were made."""
    figures: list[Any] = []
    make = plot._figure

    def noted(*arguments: Any) -> Any:
        figures.append(make(*arguments))
        return figures[-1]

    monkeypatch.setattr(plot, "_figure", noted)
    return figures


def texts(figure: Any) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[0].texts]


def png(draw: Any, *arguments: Any) -> None:
    file = io.BytesIO()
    draw(*arguments, file, "png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_waterfall_goes_down_from_the_slowest(drawn: list[Any]) -> None:
    png(plot.waterfall, result([1.0]))
    (panel,) = drawn[0].axes
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["peer", OURS]
    assert [bar.get_width() for bar in panel.patches] == [4000, 3999, 1, 0]
    assert {"1.00 x  2.0e-06", "4000.00 x  1.0e-06", "4000", "1"} < set(texts(drawn[0]))


def test_without_times_there_is_no_waterfall(drawn: list[Any]) -> None:
    png(plot.waterfall, result([]))
    assert "no times: the numerics failed" in texts(drawn[0])


def test_layers_stand_under_the_roof(drawn: list[Any]) -> None:
    png(plot.layers, result([2.0]))
    (panel,) = drawn[0].axes
    ours, peer, roof = (list(map(float, line.get_ydata())) for line in panel.lines[:3])
    assert (ours, peer) == ([500.0], [0.25])  # GFLOP/s, of the layer that has some
    assert max(roof) == 1000
    assert list(panel.lines[0].get_xdata()) == [100.0]


def test_layers_without_times_leave_the_roof(drawn: list[Any]) -> None:
    png(plot.layers, result([]))
    assert max(drawn[0].axes[0].lines[0].get_ydata()) == 1000


def test_bounds_of_launches_add_up(drawn: list[Any]) -> None:
    launches = [{"kernel": name, "bound_seconds": 1e-6} for name in "aab"]
    entries = [{"name": "x", "launches": launches}, {"name": "wrong", "launches": []}]
    png(plot.bounds, entries, "a GPU")
    assert [bar.get_x() for bar in drawn[0].axes[0].patches[:3]] == pytest.approx([0, 1, 2])
    assert texts(drawn[0]) == ["3", "0"]
