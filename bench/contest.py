"""One contest: every contestant computes the same task, is checked against float64 and is timed."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contestants import OURS, Task, is_ours
from bench.worker import Run, Worker, WorkerError
from evsam_kernels.numerics.budget import budget, measure, one_thread
from evsam_kernels.numerics.plain import evaluate, yardstick


@dataclass
class Outcome:
    """How one contestant did.

    Attributes:
        configuration: its fastest, which was taken; "" where it did not get ready.
        error: relative Frobenius error against float64; NaN where there is none.
        samples_ms: milliseconds of every run.
        preempted: share of the runs during which the system gave a core to something else.
        failure: why there are none; "" where there are.
    """

    configuration: str = ""
    error: float = math.nan
    samples_ms: list[float] = field(default_factory=list)
    preempted: float = 0.0
    failure: str = ""

    @property
    def median_ms(self) -> float:
        """NaN where there are no times."""
        return statistics.median(self.samples_ms) if self.samples_ms else math.nan

    def as_json(self) -> dict[str, Any]:
        """Everything, with None for NaN."""
        return {
            "configuration": self.configuration,
            "median_ms": _or_none(self.median_ms),
            "samples_ms": self.samples_ms,
            "preempted": self.preempted,
            "error": _or_none(self.error),
            "failure": self.failure,
        }


@dataclass
class Contest:
    """How all did.

    Attributes:
        outcomes: by contestant; those up to ours that failed where one did.
        allowed_error: what that of ours must not exceed.
    """

    outcomes: dict[str, Outcome]
    allowed_error: float

    @property
    def ours(self) -> Outcome:
        return self.outcomes[OURS]

    @property
    def best_peer(self) -> str | None:
        """The name of the fastest peer; None where none has times."""
        medians = {
            name: outcome.median_ms
            for name, outcome in self.outcomes.items()
            if not is_ours(name) and outcome.samples_ms
        }
        return min(medians, key=medians.__getitem__, default=None)

    @property
    def speedup(self) -> float:
        """The best peer's time over ours; NaN where either is missing."""
        if self.best_peer is None:
            return math.nan
        return self.outcomes[self.best_peer].median_ms / self.ours.median_ms

    def as_json(self) -> dict[str, Any]:
        """Everything, with None for NaN."""
        return {
            "allowed_error": self.allowed_error,
            "best_peer": self.best_peer,
            "speedup": _or_none(self.speedup),
            "contestants": {name: outcome.as_json() for name, outcome in self.outcomes.items()},
        }


def allowed_error(task: Task, oracle: Tensor) -> float:
    """Twice the error of plain PyTorch at the task's dtype, and a rounding."""
    _, errors, _ = yardstick(task.module, task.inputs, task.dtype, oracle, task.device)
    return budget(errors, task.dtype).frobenius


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def interleaved(
    turns: Mapping[str, Callable[[], list[Run]]], rounds: int, advance: Callable[[], None]
) -> dict[str, list[Run]]:
    """The runs of each, made in turn, A B C A B C, so that only one computes at a time."""
    runs: dict[str, list[Run]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            runs[name] += turn()
        advance()
    return runs


def hold(
    task: Task, workers: Mapping[str, Worker], *, rounds: int, advance: Callable[[], None]
) -> Contest:
    """Check all workers on a task, then time them.

    The oracle is plain PyTorch at float64. Where the error of one of ours exceeds twice that of
    plain PyTorch at the task's dtype, and a rounding, nobody is timed.

    Args:
        task: what to compute.
        workers: by contestant, `OURS` first.
        rounds: turns of each.
        advance: called once per worker and once per round.
    """
    with one_thread():
        oracle = evaluate(task.module, task.inputs, torch.float64, task.device)
    allowed = allowed_error(task, oracle)
    if task.device != "cpu":
        torch.cuda.empty_cache()  # The contestants need the room.

    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.pt"
        torch.save(task, file)
        for name, worker in workers.items():
            outcome = outcomes[name] = Outcome()
            try:
                outcome.configuration = worker.prepare(file)
                error = measure(worker.output(), oracle).frobenius
                if math.isfinite(error):
                    outcome.error = error
                else:
                    outcome.failure = "its output has inf or NaN"
            except WorkerError as problem:
                outcome.failure = str(problem)
            advance()
            if is_ours(name):
                if not outcome.failure and outcome.error > allowed:
                    outcome.failure = f"error {outcome.error:.2e} exceeds {allowed:.2e}"
                if outcome.failure:
                    return Contest(outcomes, allowed)

    def turn(name: str) -> list[Run]:
        """None of a contestant that has failed, in a turn of its own too."""
        if outcomes[name].failure:
            return []
        try:
            return workers[name].turn()
        except WorkerError as problem:
            outcomes[name].failure = str(problem)
            return []

    turns = {name: partial(turn, name) for name in workers if not outcomes[name].failure}
    for name, runs in interleaved(turns, rounds, advance).items():
        if not outcomes[name].failure:
            outcomes[name].samples_ms = [1000 * run.seconds for run in runs]
            outcomes[name].preempted = statistics.fmean(run.preempted for run in runs)
    return Contest(outcomes, allowed)
