"""The validation report: every operation, backend, dtype and case held against its error budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from evsam_kernels.backends import BACKENDS
from evsam_kernels.numerics.budget import WORTHLESS, Row, expect, judge
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.ops.registry import OPERATIONS, has_kernel

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Step:
    """One case at one dtype, for the backends named; they share its oracle."""

    case: Case
    dtype: str
    backends: tuple[str, ...]


def available_backends(
    op: str, device_type: str, dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """Names of the backends that can run `op` on such a device here, at `dtype` where given."""
    return tuple(
        name
        for name, backend in BACKENDS.items()
        if has_kernel(op, name, dtype)
        and backend.accepts(device_type)
        and backend.why_unavailable() is None
    )


def plan(
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    quick: bool = False,
    device: torch.device | str = "cpu",
) -> list[Step]:
    """What there is to compute; backends that cannot run an operation here are left out.

    Args:
        ops, backends, dtypes: names to restrict the validation to; None for all.
        quick: leave out the cases that are not quick.
        device: where the operations will run.
    """
    steps = []
    for op in OPERATIONS if ops is None else ops:
        chosen = {
            dtype: tuple(
                name
                for name in available_backends(op, torch.device(device).type, DTYPES[dtype])
                if backends is None or name in backends
            )
            for dtype in (DTYPES if dtypes is None else dtypes)
        }
        steps += [
            Step(case, dtype, names)
            for case in CASES[op]
            if case.quick or not quick
            for dtype, names in chosen.items()
            if names
        ]
    return steps


def validate(steps: Iterable[Step], device: torch.device | str = "cpu") -> Iterator[list[Row]]:
    """Compute the steps one by one and yield the rows of each.

    An error that an operation raises becomes a failed row. Without TF32, whatever PyTorch's
    settings are: its rounding would hide that of float32.
    """
    for step in steps:
        with tf32(False):
            rows = _rows(step, device)
        yield rows


def _rows(step: Step, device: torch.device | str) -> list[Row]:
    op, case = step.case.op, step.case.name
    operands = step.case.operands(DTYPES[step.dtype], device)
    expected = expect(op, operands, gradients=step.case.quick)
    rows: list[Row] = []
    for backend in step.backends:
        try:
            rows += judge(op, case, backend, operands, expected)
        except Exception as error:
            rows.append(
                Row(
                    op=op,
                    case=case,
                    backend=backend,
                    dtype=step.dtype,
                    quantity="output",
                    shape=tuple(expected["output"].oracle.shape),
                    ours=WORTHLESS,
                    plain=expected["output"].plain,
                    budget=expected["output"].budget,
                    yardstick=expected["output"].yardstick,
                    failure=f"{type(error).__name__}: {error}",
                )
            )
    return rows


@dataclass(frozen=True)
class Summary:
    """The rows of one operation on one backend at one dtype.

    Attributes:
        op, backend, dtype: which.
        count: number of rows.
        failed: number of those that fail.
        worst: a failed row if there is one, else the row closest to its budget.
    """

    op: str
    backend: str
    dtype: str
    count: int
    failed: int
    worst: Row


def badness(row: Row) -> tuple[bool, float]:
    """Sorts rows: failed ones last, and those close to their budget after those far from it."""
    return (not row.passed, math.inf if math.isnan(row.ratio) else row.ratio)


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per operation, backend and dtype, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.backend, row.dtype), []).append(row)
    return [
        Summary(
            *key, len(group), sum(not row.passed for row in group), worst=max(group, key=badness)
        )
        for key, group in groups.items()
    ]
