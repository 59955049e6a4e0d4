"""Peaks: what is divided by the time, and that something else than the work is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peaks
from bench.worker import Run


class Timer:
    """Computes in this process and takes as long as it is told."""

    def __init__(self, wrong_by: float = 0.0) -> None:
        self._wrong_by = wrong_by

    def prepare(self, task: Path) -> str:
        self._task: Any = torch.load(task, weights_only=False)
        return ""

    def output(self) -> Tensor:
        output: Tensor = self._task.module(*self._task.channels_last_inputs())
        return output + self._wrong_by

    def turn(self) -> list[Run]:
        return [Run(0.5, False), Run(0.25, False)]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_VALUES", 2**10)
    monkeypatch.setattr(peaks, "_SIDE", {"cpu": 64})


def test_peaks_are_of_the_fastest_run() -> None:
    timer: Any = Timer()
    assert peaks.measure(timer, torch.bfloat16, "cpu") == {
        "bytes_per_second": 3 * 4 * 2**10 / 0.25,
        "flops_per_second": 2 * 64**3 / 0.25,
    }


def test_a_peak_of_something_else_is_refused() -> None:
    timer: Any = Timer(wrong_by=1.0)
    with pytest.raises(RuntimeError, match="Triad computes something else than 7"):
        peaks.measure(timer, torch.float32, "cpu")
