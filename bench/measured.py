"""Sections of the acceptance report that are timed: operations, encoders, whole models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import command, ops, plot, report
from bench.contestants import CONTESTANTS, Task
from bench.encoder import inputs, refused, synthetic
from bench.operation import PARTICIPANTS
from bench.sections import Found, Section, Stand
from evsam_kernels.sam.zoo import VARIANTS

PUBLISHED: dict[str, Any] = json.loads(
    Path(__file__).with_name("published.json").read_text(encoding="utf-8")
)
"""What the authors of the models report of them, and where."""


class PicturesToMasks(nn.Module):
    """A whole model, prompted with points on the diagonal of each picture, one a prompt."""

    def __init__(self, model: nn.Module, prompts: int = 1) -> None:
        super().__init__()
        self.model = model
        self.prompts = prompts

    def forward(self, pictures: Tensor) -> Tensor:
        """`[B, 3, S, S]`, normalised -> logits `[B, 3 * prompts, 256, 256]`."""
        model: Any = self.model
        steps = torch.arange(1, self.prompts + 1, device=pictures.device)
        points = (steps * model.image_size[0] / (self.prompts + 1)).view(-1, 1, 1).expand(-1, 1, 2)
        label = torch.ones(self.prompts, 1, dtype=torch.int32, device=pictures.device)
        records = [
            {"image": picture, "point_coords": points, "point_labels": label}
            for picture in pictures
        ]
        logits: Tensor = model(records, True)[0]
        return logits.flatten(1, 2)


def sections(stand: Stand) -> Iterator[Section]:
    """For every number of pictures: all layers, and every model's encoder and whole."""
    for batch in stand.batches:
        yield Section(
            f"ops-{batch}",
            f"Operations, batch {batch}",
            lambda batch=batch: _ops(stand, batch),  # type: ignore[misc]
        )
    for name in stand.models:
        short = name.rpartition("-")[2]
        for batch in stand.batches:
            yield Section(
                f"encoder-{short}-{batch}",
                f"Image encoder of {name}, batch {batch}",
                lambda name=name, batch=batch: _encoder(stand, name, batch),  # type: ignore[misc]
            )
            yield Section(
                f"end-to-end-{short}-{batch}",
                f"{name} from pictures to masks, batch {batch}",
                lambda name=name, batch=batch: _whole(stand, name, batch),  # type: ignore[misc]
            )


def _settings(stand: Stand, batch: int) -> dict[str, Any]:
    return {
        "dtype": str(stand.dtype).removeprefix("torch."),
        "device": stand.device,
        "batch": batch,
        "rounds": stand.rounds,
        "threads": len(stand.cores),
        "cores": list(stand.cores),
    }


def _ops(stand: Stand, batch: int) -> Found:
    names = [*command.ours(stand.device, PARTICIPANTS), *stand.peers]
    result = command.header(names, _settings(stand, batch), PARTICIPANTS)
    result |= ops.measured(
        stand.layers,
        names,
        stand.cores,
        dtype=stand.dtype,
        device=stand.device,
        batch=batch,
        rounds=stand.rounds,
    )
    return Found(
        result,
        [report.layers_table(result)],
        [],
        [
            f"{layer['name']}: {failure}"
            for layer in result["layers"]
            for failure in report.failures(layer)
        ],
        lambda file, file_format: plot.layers(result, file, file_format),
    )


def _encoder(stand: Stand, name: str, batch: int) -> Found:
    return _contest(stand, name, batch, synthetic(name).image_encoder)


def _whole(stand: Stand, name: str, batch: int) -> Found:
    found = _contest(stand, name, batch, PicturesToMasks(synthetic(name)))
    published = PUBLISHED["images_per_second"][name]
    remark = (
        f"Published: {published} images/s ({PUBLISHED['conditions']}; {PUBLISHED['source']}). "
        "Here pictures are on the device already."
    )
    return replace(
        found,
        result={**found.result, "published_images_per_second": published},
        remarks=[*found.remarks, remark],
    )


def _contest(stand: Stand, name: str, batch: int, module: nn.Module) -> Found:
    side = VARIANTS[name].image_size
    task = Task(module.eval(), inputs([(batch, 3, side, side)]), stand.dtype, stand.device)
    peers = (name for name in stand.peers if name in CONTESTANTS)
    names = [*command.ours(stand.device), *peers]
    refusals = refused(names, task)
    settings = {"model": name, **_settings(stand, batch)}
    result = command.header(names, settings, CONTESTANTS)
    with command.workers([each for each in names if each not in refusals], stand.cores) as workers:
        result |= command.held(task, workers, stand.rounds, f"{name}, batch {batch}")
    result["contestants"] |= {each: outcome.as_json() for each, outcome in refusals.items()}
    remarks = [report.verdict(result)]
    if stand.device == "cpu":
        remarks.append(
            "On the CPU the memory is that of the process, less what it had before its first run."
        )
    return Found(
        result,
        [report.images_table(result)],
        remarks,
        [f"{name}, batch {batch}: {failure}" for failure in report.failures(result)],
        lambda file, file_format: plot.waterfall(result, file, file_format),
    )
