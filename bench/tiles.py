"""`python -m bench tiles`: the table of tiles, made from replays of every layer's candidates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evsam_kernels import simt
from evsam_kernels.cli import inspect_model
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import progress, write_atomically
from evsam_kernels.ops import tiling
from evsam_kernels.ops.tiling import Entry, Layer, Tile
from evsam_kernels.sam.zoo import VARIANTS
from evsam_kernels.simt import emulation
from evsam_kernels.simt.occupancy import max_shared

FILE = Path(tiling.__file__).with_suffix(".json")
ARCHITECTURES = (80, 86, 89, 120)
"""Whose tensor cores are those of the A100: tiles may be good there as well."""

_GPU = "a100-40gb"
_SAMPLE = 6
_WORTH = 0.97
"""Of the rule's estimate: replays do not tell closer ones apart."""

_LONGER = 1.25
"""Times the least bound, that a tile's may be: estimates are less sure than bounds."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "tiles",
        help="make the table of tiles that the Triton kernels take",
        description="Replay every layer of encoders with every tile on an A100, and write the "
        "tiles that are estimated to be faster than the rule's where they spill no registers. "
        "Takes minutes.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--models",
        default="efficientvit-sam-l0,efficientvit-sam-xl0",
        metavar="NAMES",
        help=f"a comma between them, of {', '.join(VARIANTS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=positive_integer, default=16, metavar="N", help="(default: %(default)s)"
    )


@dataclass(frozen=True)
class Trial:
    """What is known of a tile for a layer.

    Attributes:
        launch: of the kernel with it.
        bound, estimate: seconds.
    """

    launch: simt.Launch
    bound: float
    estimate: float

    def architectures(self) -> tuple[int, ...]:
        """Where it fits and spills no registers."""
        return tuple(arch for arch in ARCHITECTURES if fits(self.launch, arch))


def fits(launch: simt.Launch, arch: int) -> bool:
    """Whether a block has room on an architecture, and no thread spills registers there."""
    takes = simt.resources(launch.module, arch)[launch.report.kernel]
    return not takes.stack and takes.shared + launch.report.shared <= max_shared(arch)


@dataclass
class Replays:
    """Stands in for a timer: the estimate of what is launched, in the order of launches."""

    trials: list[Trial] = field(default_factory=list)

    def __call__(self, launch: Callable[[], object]) -> float:
        launch()
        current = emulation.current()
        assert current is not None
        launched = current.launches.pop()
        bound = simt.bound(launched.report, _GPU).seconds
        spills = not fits(launched, simt.GPUS[_GPU].arch)
        estimate = float("inf") if spills else simt.replay(launched, _GPU).seconds
        self.trials.append(Trial(launched, bound, estimate))
        return estimate


def entry(layer: Layer, trials: dict[Tile, Trial]) -> Entry | None:
    """The table's row for a layer, of which the rule's tile was tried first; None for none."""
    by_rule = next(iter(trials.values()))
    whole = {tile: trial for tile, trial in trials.items() if trial.estimate < float("inf")}
    least = min(trial.bound for trial in whole.values())
    good = {tile: trial for tile, trial in whole.items() if trial.bound <= _LONGER * least}
    tile, best = min(good.items(), key=lambda found: found[1].estimate)
    if best.estimate > _WORTH * by_rule.estimate:
        return None
    return Entry(
        layer.operation,
        layer.channels,
        layer.kernel,
        layer.stride,
        layer.pixels,
        best.architectures(),
        tile,
        round(1e6 * best.estimate, 1),
        round(1e6 * by_rule.estimate, 1) if by_rule in whole.values() else None,
    )


def make(models: Iterable[str], batch: int) -> list[Entry]:
    """The table's rows for the layers of models' encoders."""
    replays, on = Replays(), simt.GPUS[_GPU]
    groups = {
        alike[0].key: alike
        for model in models
        for alike in inspect_model.record(model, batch=batch, dtype=torch.float16, arch=on.arch)
    }
    with (
        tiling.measuring(replays) as measurements,
        progress("layers", len(groups)) as advance,
    ):
        for alike in groups.values():
            inspect_model.count(alike, gpu=on, sample=_SAMPLE)
            advance()
    trials = iter(replays.trials)
    found = (
        entry(layer, {tile: next(trials) for tile in seconds})
        for layer, seconds in measurements.seconds.items()
    )
    return sorted(row for row in found if row is not None)


def run(arguments: argparse.Namespace) -> int:
    """Make the table and write it.

    Raises:
        CommandError: an unknown model.
    """
    models = arguments.models.split(",")
    for name in models:
        if name not in VARIANTS:
            raise CommandError(f"--models: must be of {', '.join(VARIANTS)}, got {name!r}")
    rows = [json.dumps(row._asdict()) for row in make(models, arguments.batch)]
    made_with = f"python -m bench tiles --models {arguments.models} --batch {arguments.batch}"
    lines = ",\n".join(f"  {row}" for row in rows)
    text = f'{{\n "made_with": {json.dumps(made_with)},\n "tiles": [\n{lines}\n ]\n}}\n'
    write_atomically(FILE, lambda file: file.write(text.encode()))
    print(f"{FILE}: {len(rows)} tiles that are estimated to be faster than the rule's")
    return 0
