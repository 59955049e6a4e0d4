"""Interleaved timing, on a clock that only moves when a function says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from evsam_kernels.cli.timing import interleaved_medians


class Clock:
    """Stands still but for the functions it makes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def function(self, name: str, durations: Iterable[float]) -> Callable[[], None]:
        remaining = iter(durations)

        def run() -> None:
            self.calls.append(name)
            self.now += next(remaining)

        return run


def test_medians_leave_out_the_first_call() -> None:
    clock = Clock()
    functions = {
        "a": clock.function("a", [100, 1, 5, 2]),
        "b": clock.function("b", [200, 30, 10, 20]),
    }
    medians = interleaved_medians(functions, rounds=3, clock=lambda: clock.now)
    assert medians == {"a": 2, "b": 20}


def test_calls_are_interleaved() -> None:
    clock = Clock()
    functions = {name: clock.function(name, [1] * 4) for name in "ab"}
    interleaved_medians(functions, rounds=3, clock=lambda: clock.now)
    assert "".join(clock.calls) == "ab" * 4


def test_progress_advances_once_a_round() -> None:
    steps: list[None] = []
    interleaved_medians({"a": lambda: None}, rounds=3, advance=lambda: steps.append(None))
    assert len(steps) == 4


def test_the_default_clock_runs() -> None:
    assert interleaved_medians({"a": lambda: sum(range(1000))}, rounds=1)["a"] > 0


@pytest.mark.parametrize(
    ("functions", "rounds", "named"), [({}, 3, "functions"), ({"a": lambda: None}, 0, "rounds")]
)
def test_nothing_to_time_is_refused(
    functions: dict[str, Callable[[], None]], rounds: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        interleaved_medians(functions, rounds=rounds)
