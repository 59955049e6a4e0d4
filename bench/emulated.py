"""Sections of the acceptance report where the executor runs the kernels: numbers, and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import evsam_kernels
from bench import plot, report
from bench.contest import allowed_error
from bench.contestants import Task
from bench.encoder import inputs
from bench.layers import Layer
from bench.measured import PicturesToMasks
from bench.sections import Found, Section, Stand
from evsam_kernels import simt
from evsam_kernels.numerics.budget import expect, judge, measure, one_thread
from evsam_kernels.numerics.plain import evaluate
from evsam_kernels.sam import zoo
from evsam_kernels.sam.synthetic import load_synthetic_weights

SMALL = zoo.Variant(
    image_size=64,
    widths=(8, 8, 8, 16, 32),
    depths=(1, 1, 1, 1, 1),
    blocks=("res", "fmb", "fmb", "mb", "att"),
    expand=(1, 2, 2, 2, 2),
    fewer_norm=(False, False, False, True, True),
    neck_depth=1,
    neck_expand=1,
)
"""Every kind of block that the variants have, small enough for the executor."""


def sections(stand: Stand) -> list[Section]:
    """Layers, an encoder and a whole model."""
    return [
        Section("ops", "Operations: numbers and bounds", lambda: _layers(stand)),
        Section(
            "encoder",
            "A small encoder: numbers and bounds",
            lambda: _model(stand, lambda model: model.image_encoder),
        ),
        Section(
            "end-to-end",
            "A small model from pictures to masks: numbers and bounds",
            # Two prompts, as kernels decode several of a picture alone.
            lambda: _model(stand, lambda model: PicturesToMasks(model, prompts=2)),
        ),
    ]


def _layers(stand: Stand) -> Found:
    found = [
        (f"{layer.op} {layer.name}, {backend}", *_layer(stand, layer, backend))
        for layer in stand.layers
        for backend in stand.tried_on(layer)
    ]
    return _found(stand, found)


def _layer(
    stand: Stand, layer: Layer, backend: str
) -> tuple[dict[str, Any], Sequence[simt.Launch]]:
    operands = layer.operands(stand.dtype)
    expected = expect(layer.op, operands)
    with simt.emulate(_gpu(stand).arch) as emulation, torch.no_grad():
        (row,) = judge(layer.op, layer.name, backend, operands, expected)
    numbers = {
        "error": row.ours.frobenius,
        "allowed_error": row.budget.frobenius,
        "failure": row.failure,
    }
    return numbers, emulation.launches


def _model(stand: Stand, part: Callable[[Any], torch.nn.Module]) -> Found:
    """A part of a small model, fused for Triton."""
    model = zoo.build(SMALL).eval()
    load_synthetic_weights(model)
    pictures = inputs([(1, 3, SMALL.image_size, SMALL.image_size)])
    task = Task(part(model).eval(), pictures, stand.dtype)
    with one_thread():
        oracle = evaluate(task.module, task.inputs, torch.float64)
    allowed = allowed_error(task, oracle)
    with simt.emulate(_gpu(stand).arch) as emulation, torch.inference_mode():
        fused = evsam_kernels.fuse(task.module, backend="triton", dtype=task.dtype)
        error = measure(fused(*task.channels_last_inputs()), oracle).frobenius
    failure = "" if error <= allowed else f"error {error:.2e} exceeds {allowed:.2e}"
    numbers = {"error": error, "allowed_error": allowed, "failure": failure}
    return _found(stand, [("all of it", numbers, emulation.launches)])


def _found(
    stand: Stand, computed: Sequence[tuple[str, dict[str, Any], Sequence[simt.Launch]]]
) -> Found:
    """Numbers first: what is wrong has no bound."""
    table = report.table(
        *("what", "error", "allowed", "launches", "at least us"), last="bound by, for most of that"
    )
    entries = []
    for name, numbers, launches in computed:
        entry: dict[str, Any] = {"name": name, **numbers, "launches": [], "bound_seconds": None}
        if not numbers["failure"]:
            bounds = [simt.bound(launch.report, _gpu(stand)) for launch in launches]
            entry["launches"] = [
                {"kernel": launch.report.kernel, "bound_seconds": bound.seconds}
                for launch, bound in zip(launches, bounds, strict=True)
            ]
            entry["bound_seconds"] = sum(bound.seconds for bound in bounds)
            longest = max(bounds, key=lambda bound: bound.seconds)
            entry["bound_by"] = longest.binding.limit if longest.binding else ""
        entries.append(entry)
        table.add_row(
            name,
            *(f"{numbers[key]:.2e}" for key in ("error", "allowed_error")),
            str(len(launches)),
            "" if numbers["failure"] else f"{1e6 * entry['bound_seconds']:.3g}",
            numbers["failure"] or entry["bound_by"],
        )
    failed = [entry for entry in entries if entry["failure"]]
    gpu = _gpu(stand)
    return Found(
        {"gpu": gpu.key, "dtype": str(stand.dtype), "entries": entries},
        [table],
        [f"Bounds are for an {gpu.name}, which cannot be faster. Nothing was timed."],
        [f"{entry['name']}: {entry['failure']}" for entry in failed],
        lambda file, file_format: plot.bounds(entries, gpu.name, file, file_format),
    )


def _gpu(stand: Stand) -> simt.Gpu:
    assert stand.gpu is not None  # As these sections are of the executor alone.
    return stand.gpu
