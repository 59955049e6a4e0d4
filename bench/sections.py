"""Sections of the acceptance report: what each is made of, and those that every device has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from rich.table import Table

from bench import report
from bench.layers import Layer
from evsam_kernels import simt
from evsam_kernels.cli import validate
from evsam_kernels.cli.machine import machine
from evsam_kernels.numerics import plot, validation
from evsam_kernels.numerics.budget import call
from evsam_kernels.numerics.cases import map_operands
from evsam_kernels.ops import self_check
from evsam_kernels.ops.registry import formula, tensors_of

Draw = Callable[[BinaryIO, str], None]

_CASES_IN_THE_EXECUTOR = 6
"""Of each operation, spread over all that there are."""


@dataclass(frozen=True)
class Stand:
    """Where and how much is tried.

    Attributes:
        device: "cpu" or "cuda", where tensors are.
        gpu: the GPU that the executor stands in for; None where kernels run on the device itself.
        backends: those of ours that are tried.
        dtype: of pictures, weights and maps.
        models: variants whose encoders are timed.
        layers: those that operations are tried on.
        batches: pictures at a time.
        quick: whether as little as possible is done.
        cores: that contestants run on.
        rounds: turns of every contestant.
        peers: by name.
    """

    device: str
    gpu: simt.Gpu | None
    backends: tuple[str, ...]
    dtype: torch.dtype
    models: tuple[str, ...]
    layers: tuple[Layer, ...]
    batches: tuple[int, ...]
    quick: bool
    cores: tuple[int, ...] = ()
    rounds: int = 1
    peers: tuple[str, ...] = ()

    def running(self) -> AbstractContextManager[Any]:
        """In this, ours run where they are tried."""
        return nullcontext() if self.gpu is None else simt.emulate(self.gpu.arch)

    def tried_on(self, layer: Layer) -> list[str]:
        """The backends with a kernel for a layer."""
        with self.running():
            found = validation.available_backends(layer.op, self.device, self.dtype)
        return [name for name in self.backends if name in found]


@dataclass(frozen=True)
class Found:
    """What a section has found.

    Attributes:
        result: for its JSON file.
        tables: for the report.
        remarks: lines of the report, below the tables.
        problems: what is wrong, a line each; none where all is well.
        draw: writes its figure; None where there is none.
    """

    result: dict[str, Any]
    tables: Sequence[Table] = ()
    remarks: Sequence[str] = ()
    problems: Sequence[str] = ()
    draw: Draw | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: of its files.
        title: above it.
        find: does the work.
    """

    name: str
    title: str
    find: Callable[[], Found] = field(repr=False)


def numerics(stand: Stand) -> Section:
    """Every kernel, dtype and case against float64; `evsam validate` on the stand."""
    return Section("numerics", "Numerics of every kernel", lambda: _numerics(stand))


def _numerics(stand: Stand) -> Found:
    dtype = str(stand.dtype).removeprefix("torch.")
    with stand.running():
        steps = validation.plan(
            backends=stand.backends,
            dtypes=[dtype] if stand.quick else None,
            quick=stand.quick,
            device=stand.device,
        )
        if stand.gpu is not None:
            steps = list(_spread(steps))
        rows = [row for found in validation.validate(steps, stand.device) for row in found]
    failed = [row for row in rows if not row.passed]
    table = report.table(
        *("operation", "checks", "failed", "worst error / budget"), last="backend, dtype, case"
    )
    for summary in validation.summarise(rows):
        table.add_row(
            summary.op,
            *(str(summary.count), str(summary.failed), f"{summary.worst.ratio:.2f}"),
            f"{summary.backend}, {summary.dtype}, {summary.worst.case}, {summary.worst.quantity}",
        )
    return Found(
        validate.as_json(rows, machine(), torch.device(stand.device)),
        [table],
        [f"{len(rows)} comparisons, {len(failed)} failed."],
        [str(row).splitlines()[0] for row in failed],
        lambda file, file_format: plot.draw(rows, str(machine()), file, file_format),
    )


def _spread(steps: Sequence[validation.Step]) -> Iterator[validation.Step]:
    """A few steps of each operation."""
    by_op: dict[str, list[validation.Step]] = {}
    for step in steps:
        by_op.setdefault(step.case.op, []).append(step)
    for of_op in by_op.values():
        yield from of_op[:: max(1, len(of_op) // _CASES_IN_THE_EXECUTOR)]


def self_checks(stand: Stand) -> Section:
    """The check that a first call on a GPU makes, on every layer; and whether it sees an error."""
    return Section("self-check", "Self-check on the first call", lambda: _self_checks(stand))


def _self_checks(stand: Stand) -> Found:
    checks = [
        {
            "op": layer.op,
            "layer": layer.name,
            "backend": backend,
            **_self_check(stand, layer, backend),
        }
        for layer in stand.layers
        for backend in stand.tried_on(layer)
    ]
    table = report.table("operation", last="layer, backend: finding")
    for check in checks:
        words = check["finding"] or "nothing wrong"
        table.add_row(check["op"], f"{check['layer']}, {check['backend']}: {words}")
    return Found(
        {"checks": checks},
        [table],
        ["Every result was also spoiled in one value, which the check has to find."],
        [
            f"self-check, {check['op']} {check['layer']} on {check['backend']}: "
            + (check["finding"] or "a spoiled result was not found")
            for check in checks
            if check["finding"] or not check["spoiled_is_found"]
        ],
    )


def _self_check(stand: Stand, layer: Layer, backend: str) -> dict[str, Any]:
    operands = map_operands(lambda x: x.to(stand.device), layer.operands(stand.dtype))
    values = list(operands.values())

    def at(dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            return formula(layer.op)(**map_operands(lambda x: x.to(dtype), operands))

    with stand.running(), torch.no_grad():
        try:
            result = call(layer.op, operands, backend)
        except self_check.SelfCheckError as error:
            return {"finding": str(error), "spoiled_is_found": True}
    finding, found = (
        self_check.finding(layer.op, name, values, tensors_of(values), value, at)
        for name, value in ((backend, result), (f"{backend}, spoiled", _spoiled(result)))
    )
    return {"finding": finding, "spoiled_is_found": bool(found)}


def _spoiled(result: torch.Tensor) -> torch.Tensor:
    """The result with one value that is off by the largest of all."""
    spoiled = result.clone()
    spoiled[0, 0, 0, 0] += result.abs().max()
    return spoiled
