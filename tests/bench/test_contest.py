"""A contest: the order of turns, what is measured, and that wrong numbers keep it from timing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.contest import Contest, Outcome, allowed_error, hold, interleaved
from bench.contestants import OURS, Task
from bench.worker import Run, WorkerError
from evsam_kernels.numerics.plain import evaluate


class Actor:
    """Stands in for a worker: computes in this process and takes the time it is told to.

    Args:
        name: noted in `played` at every turn.
        seconds: what a run takes.
        wrong_by: relative error of its output.
        failure: what preparing it fails with; "" where it does not.
    """

    def __init__(
        self,
        name: str,
        played: list[str],
        *,
        seconds: float = 1.0,
        wrong_by: float = 0.0,
        failure: str = "",
    ) -> None:
        self._name = name
        self._played = played
        self._seconds = seconds
        self._wrong_by = wrong_by
        self._failure = failure

    def prepare(self, task: Path) -> str:
        if self._failure:
            raise WorkerError(self._failure)
        self._task: Any = torch.load(task, weights_only=False)
        return f"as {self._name} likes it"

    def output(self) -> Tensor:
        right = evaluate(self._task.module, self._task.inputs, torch.float64)
        return right * (1 + self._wrong_by)

    def turn(self) -> list[Run]:
        self._played.append(self._name)
        return [Run(self._seconds, False), Run(self._seconds, True)]


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    return Task(nn.Conv2d(8, 8, 3).eval(), (torch.randn(1, 8, 9, 9),), torch.float32)


def held(task: Task, actors: dict[str, Any], rounds: int = 3) -> Contest:
    return hold(task, actors, rounds=rounds, advance=lambda: None)


def test_turns_are_interleaved() -> None:
    played: list[str] = []
    steps: list[None] = []

    def turn(name: str) -> list[Run]:
        played.append(name)
        return [Run(float(len(played)), False)]

    runs = interleaved(
        {name: lambda name=name: turn(name) for name in "abc"}, 3, lambda: steps.append(None)
    )
    assert "".join(played) == "abcabcabc"
    assert {name: [run.seconds for run in of] for name, of in runs.items()} == {
        "a": [1, 4, 7],
        "b": [2, 5, 8],
        "c": [3, 6, 9],
    }
    assert len(steps) == 3


def test_all_are_checked_and_timed_in_turn(task: Task) -> None:
    played: list[str] = []
    contest = held(
        task,
        {
            OURS: Actor("o", played, seconds=0.5),
            "slow": Actor("s", played, seconds=4, wrong_by=1e-3),
            "fast": Actor("f", played, seconds=2),
        },
    )
    assert "".join(played) == "osf" * 3
    assert contest.ours == Outcome("as o likes it", 0.0, [500.0] * 6, 0.5, "")
    assert contest.outcomes["slow"].error == pytest.approx(1e-3)
    assert contest.outcomes["slow"].median_ms == 4000
    assert contest.best_peer == "fast"
    assert contest.speedup == 4


def test_the_allowed_error_is_twice_that_of_pytorch_and_a_rounding(task: Task) -> None:
    allowed = held(task, {OURS: Actor("o", [])}).allowed_error
    oracle = evaluate(task.module, task.inputs, torch.float64)
    plain = evaluate(task.module, task.inputs, torch.float32)
    error = ((plain.double() - oracle).norm() / oracle.norm()).item()
    assert error > 0
    assert allowed == pytest.approx(2 * error + 2**-24)


def test_an_error_just_within_what_is_allowed_passes(task: Task) -> None:
    allowed = held(task, {OURS: Actor("o", [])}).allowed_error
    contest = held(task, {OURS: Actor("o", [], wrong_by=0.99 * allowed)})
    assert contest.ours.error == pytest.approx(0.99 * allowed, rel=1e-3)
    assert contest.ours.failure == ""
    assert contest.ours.samples_ms


def test_one_that_fails_in_a_turn_has_no_times(task: Task) -> None:
    class Fleeting(Actor):
        def turn(self) -> list[Run]:
            if "f" in self._played:
                raise WorkerError("out of memory")
            return super().turn()

    played: list[str] = []
    contest = held(task, {OURS: Actor("o", played), "fleeting": Fleeting("f", played)})
    assert played == ["o", "f", "o", "o"]
    outcome = contest.outcomes["fleeting"]
    assert (outcome.failure, outcome.samples_ms) == ("out of memory", [])
    assert contest.ours.samples_ms


def test_what_is_not_finite_has_no_times(task: Task) -> None:
    actors = {
        OURS: Actor("o", []),
        "overflows": Actor("p", [], wrong_by=math.inf),
        "is nothing": Actor("q", [], wrong_by=math.nan),
    }
    contest = held(task, actors)
    for name in ("overflows", "is nothing"):
        outcome = contest.outcomes[name]
        assert (outcome.failure, outcome.samples_ms) == ("its output has inf or NaN", [])
    assert contest.ours.samples_ms
    json.dumps(contest.as_json(), allow_nan=False)


@pytest.mark.parametrize("wrong_by", [math.nan, math.inf])
def test_nobody_is_timed_where_ours_is_not_finite(task: Task, wrong_by: float) -> None:
    played: list[str] = []
    actors = {OURS: Actor("o", played, wrong_by=wrong_by), "peer": Actor("p", played)}
    contest = held(task, actors)
    assert (played, contest.ours.failure) == ([], "its output has inf or NaN")


def test_nobody_is_timed_where_ours_is_wrong(task: Task) -> None:
    allowed = held(task, {OURS: Actor("o", [])}).allowed_error
    played: list[str] = []
    actors = {
        OURS: Actor("o", played, wrong_by=1.01 * allowed),
        "peer": Actor("p", played),
    }
    contest = held(task, actors)
    assert played == []
    assert list(contest.outcomes) == [OURS]
    assert contest.ours.failure == f"error {contest.ours.error:.2e} exceeds {allowed:.2e}"
    assert contest.ours.samples_ms == []
    assert math.isnan(contest.speedup)


def test_nobody_is_timed_where_one_of_ours_is_wrong(task: Task) -> None:
    played: list[str] = []
    actors = {
        OURS: Actor("o", played),
        f"{OURS}, cuda": Actor("c", played, wrong_by=0.5),
        "peer": Actor("p", played),
    }
    contest = held(task, actors)
    assert played == []
    assert contest.outcomes[f"{OURS}, cuda"].failure.startswith("error 5.00e-01 exceeds")


def test_ours_on_a_backend_is_no_peer(task: Task) -> None:
    actors = {OURS: Actor("o", [], seconds=2), f"{OURS}, cuda": Actor("c", [], seconds=1)}
    assert held(task, actors).best_peer is None


class Overflowing(nn.Module):
    """Gives what it is given, which float16 cannot hold on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2.0**16) * 2.0**-16


def test_where_plain_pytorch_overflows_float32_is_the_measure() -> None:
    task = Task(Overflowing().eval(), (torch.rand(2, 4, 4, 4) + 1,), torch.float16)
    oracle = evaluate(task.module, task.inputs, torch.float64)
    assert evaluate(task.module, task.inputs, torch.float16).isinf().all()
    assert 2**-11 < allowed_error(task, oracle) < 2**-9


def test_nobody_is_timed_where_ours_fails(task: Task) -> None:
    played: list[str] = []
    contest = held(task, {OURS: Actor("o", played, failure="no kernel"), "p": Actor("p", played)})
    assert (contest.ours.failure, played) == ("no kernel", [])


def test_a_peer_that_fails_or_is_wrong_is_shown(task: Task) -> None:
    played: list[str] = []
    actors = {
        OURS: Actor("o", played),
        "broken": Actor("b", played, failure="out of memory"),
        "wrong": Actor("w", played, wrong_by=0.5),
    }
    contest = held(task, actors, rounds=1)
    assert played == ["o", "w"]
    assert contest.outcomes["broken"].failure == "out of memory"
    assert contest.outcomes["broken"].samples_ms == []
    assert contest.outcomes["wrong"].error == pytest.approx(0.5)


def test_without_a_peer_there_is_no_speedup(task: Task) -> None:
    contest = held(task, {OURS: Actor("o", [])})
    assert contest.best_peer is None
    assert math.isnan(contest.speedup)


def test_progress_advances_once_a_worker_and_once_a_round(task: Task) -> None:
    steps: list[None] = []
    actors: Any = {OURS: Actor("o", []), "p": Actor("p", []), "q": Actor("q", [], failure="no")}
    hold(task, actors, rounds=4, advance=lambda: steps.append(None))
    assert len(steps) == 3 + 4


def test_json_has_none_for_what_is_missing() -> None:
    assert Outcome(failure="no").as_json() == {
        "configuration": "",
        "median_ms": None,
        "samples_ms": [],
        "preempted": 0.0,
        "error": None,
        "failure": "no",
    }
    contest = Contest({OURS: Outcome("c", 0.25, [1.0, 3.0], 0.5)}, 0.5)
    assert contest.as_json() == {
        "allowed_error": 0.5,
        "best_peer": None,
        "speedup": None,
        "contestants": {
            OURS: {
                "configuration": "c",
                "median_ms": 2.0,
                "samples_ms": [1.0, 3.0],
                "preempted": 0.5,
                "error": 0.25,
                "failure": "",
            }
        },
    }
