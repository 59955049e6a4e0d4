"""`python -m bench choice`: which layers CUDA kernels are better at, by replays of each backend."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evsam_kernels import ops, simt
from evsam_kernels.cli import inspect_model
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.inspect_model import Call, LaunchRow
from evsam_kernels.cli.models import positive_integer
from evsam_kernels.cli.output import progress, write_atomically
from evsam_kernels.ops import choice
from evsam_kernels.ops.choice import Row
from evsam_kernels.ops.registry import layer_of, tensors_of
from evsam_kernels.sam.zoo import VARIANTS

FILE = Path(choice.__file__).with_suffix(".json")
BACKENDS = ("cuda", "triton")
HEADINGS = (
    *("layer", "", "ideal us", "bound us", "estimate us", "ideal / bound", "spilled B"),
    *("wavefronts / ideal", "sectors / ideal", "bytes / least"),
)

_GPU = "a100-40gb"
_SAMPLE = 6


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "choice",
        help="make the table of layers that CUDA kernels are better at",
        description="Count and replay every layer of encoders that CUDA and Triton both have "
        "kernels for, on each and unfused, for an A100; print what was found, and write which "
        "backend is estimated to be faster. Takes minutes.",
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
class Way:
    """One way of computing a layer, as counted.

    Attributes:
        launches: in order.
        copied: bytes that it moves in global memory besides, by concatenations.
        within: bytes that what lies between the first product and the last has to move at least,
            over what it reads and writes; None for `mbconv`.
    """

    launches: tuple[LaunchRow, ...]
    copied: int
    within: float | None

    @property
    def bound(self) -> float:
        """Seconds that it takes no less than."""
        return sum(launch.bound_seconds for launch in self.launches) + self._copying

    @property
    def estimate(self) -> float:
        """Seconds that it may take, uncalibrated."""
        return sum(launch.estimate_seconds for launch in self.launches) + self._copying

    @property
    def _copying(self) -> float:
        return self.copied / simt.GPUS[_GPU].rates["DRAM"].per_second

    @property
    def spilled(self) -> int:
        """Bytes that a thread spills."""
        return max(launch.spilled for launch in self.launches)

    @property
    def wavefronts(self) -> float:
        """Of shared memory, over those without bank conflicts."""
        ideal = sum(launch.ideal_wavefronts for launch in self.launches)
        return sum(launch.wavefronts for launch in self.launches) / ideal

    @property
    def sectors(self) -> float:
        """Of global memory that requests touch, over those that would hold their bytes."""
        ideal = sum(launch.ideal_sectors for launch in self.launches)
        return sum(launch.sectors for launch in self.launches) / ideal


@dataclass(frozen=True)
class Found:
    """A layer in every way.

    Attributes:
        call: of the operation.
        ways: by name, "unfused" last; the others are backends.
    """

    call: Call
    ways: dict[str, Way]

    @property
    def row(self) -> Row:
        """Of the table."""
        layer = layer_of(self.call.operation, self.call.arguments)
        assert layer is not None  # As these operations have a choice.
        estimates = {name: round(1e6 * way.estimate, 1) for name, way in self.ways.items()}
        backend = min(BACKENDS, key=estimates.__getitem__)
        return Row(
            self.call.operation,
            layer,
            backend,
            cuda_us=estimates["cuda"],
            triton_us=estimates["triton"],
            unfused_us=estimates["unfused"],
        )


def unfused_mbconv(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depth_weight: Tensor,
    depth_bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str | None,
) -> tuple[Tensor, int]:
    """One Triton kernel after the other: the result, and bytes that copies between them move."""
    y = _conv(x, expand_weight, expand_bias, activation=activation)
    groups = len(depth_weight)
    y = _conv(y, depth_weight, depth_bias, stride=stride, groups=groups, activation=activation)
    return _conv(y, point_weight, point_bias, residual=residual), 0


def unfused_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    depth_weights: Sequence[Tensor],
    depth_biases: Sequence[Tensor],
    group_weights: Sequence[Tensor],
    group_biases: Sequence[Tensor],
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, int]:
    """See `unfused_mbconv`."""
    qkv = _conv(x, qkv_weight, qkv_bias)
    channels = qkv.shape[1]
    maps = [qkv]
    for scale, (depth_weight, group_weight) in enumerate(
        zip(depth_weights, group_weights, strict=True)
    ):
        depth_bias = depth_biases[scale] if depth_biases else None
        group_bias = group_biases[scale] if group_biases else None
        y = _conv(qkv, depth_weight, depth_bias, groups=channels)
        maps.append(_conv(y, group_weight, group_bias, groups=channels // head_dim))
    together = torch.cat(maps, dim=1)
    attended = ops.relu_linear_attention(together, head_dim=head_dim, eps=eps, backend="triton")
    return _conv(attended, proj_weight, proj_bias, residual=residual), 2 * together.nbytes


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    return ops.conv_act(x, weight, bias, **settings, backend="triton")


UNFUSED: dict[str, Callable[..., tuple[Tensor, int]]] = {
    "mbconv": unfused_mbconv,
    "multi_scale_attention": unfused_attention,
}


def compulsory(call: Call) -> int:
    """Bytes of qkv, of the weights behind it and of what is projected: each moved once."""
    _, qkv_weight, _, *inside, proj_weight, _, _, _, _ = call.arguments
    pixels = call.output[0] * call.output[2] * call.output[3]
    values = pixels * (qkv_weight.shape[0] + proj_weight.shape[1])
    values += sum(tensor.numel() for tensor in tensors_of(inside))
    return int(values * proj_weight.itemsize)


def within(call: Call, launches: Sequence[LaunchRow], copied: int) -> float | None:
    """What `Way` calls by that name."""
    if call.operation != "multi_scale_attention":
        return None
    products = [i for i, launch in enumerate(launches) if launch.kernel == "conv_kernel"]
    between = launches[products[0] + 1 : products[-1]]
    return (sum(launch.moved for launch in between) + copied) / compulsory(call)


def find(call: Call) -> Found:
    """Count a layer in every way."""
    on = simt.GPUS[_GPU]
    ways = {}
    for backend in BACKENDS:
        launches = inspect_model.count([call], gpu=on, sample=_SAMPLE, backend=backend).launches
        ways[backend] = Way(launches, 0, within(call, launches, 0))
    copied = 0

    def compute() -> None:
        nonlocal copied
        _, copied = UNFUSED[call.operation](*call.arguments)

    launches = inspect_model.launches(compute, gpu=on, sample=_SAMPLE)
    ways["unfused"] = Way(launches, copied, within(call, launches, copied))
    return Found(call, ways)


def calls(models: Iterable[str], batch: int) -> list[Call]:
    """The layers of models' encoders, each once."""
    arch = simt.GPUS[_GPU].arch
    groups = {
        alike[0].key: alike[0]
        for model in models
        for alike in inspect_model.record(model, batch=batch, dtype=torch.float16, arch=arch)
    }
    return [call for call in groups.values() if call.operation in UNFUSED]


def described(call: Call) -> str:
    """A layer in a few words, as the tables of the documentation name it."""
    height, width = call.arguments[0].shape[2:]
    if call.operation == "mbconv":
        expand_weight, stride = call.arguments[1], call.arguments[8]
        inside, channels = expand_weight.shape[:2]
        text = f"{channels} -> {inside} -> {call.output[1]}, {height}x{width}"
        return text if stride == 1 else f"{text}, stride {stride}"
    kernels = ", ".join(str(weight.shape[-1]) for weight in call.arguments[3])
    return f"attention, {call.output[1]} channels, {height}x{width}, kernel {kernels}"


def markdown(found: Sequence[Found]) -> str:
    """The table that is printed."""
    on = simt.GPUS[_GPU]
    rows = [HEADINGS, ("---",) * 2 + ("---:",) * (len(HEADINGS) - 2)]
    for layer in found:
        ideal = layer.call.ideal(on)
        for name, way in layer.ways.items():
            rows.append(
                (
                    described(layer.call) if name == "cuda" else "",
                    f"**{name}**" if name == layer.row.backend else name,
                    *(f"{1e6 * seconds:.1f}" for seconds in (ideal, way.bound, way.estimate)),
                    f"{ideal / way.bound:.2f}",
                    str(way.spilled),
                    *(f"{ratio:.3f}" for ratio in (way.wavefronts, way.sectors)),
                    "" if way.within is None else f"{way.within:.3f}",
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_json(found: Iterable[Found], made_with: str) -> str:
    """The file, with a line for each layer."""
    rows = [
        json.dumps({**row._asdict(), "layer": row.layer._asdict()})
        for row in sorted(layer.row for layer in found)
    ]
    lines = ",\n".join(f"  {row}" for row in rows)
    return f'{{\n "made_with": {json.dumps(made_with)},\n "layers": [\n{lines}\n ]\n}}\n'


def run(arguments: argparse.Namespace) -> int:
    """Make the table, print it and write it.

    Raises:
        CommandError: an unknown model, or two layers that "auto" cannot tell apart.
    """
    models = arguments.models.split(",")
    for name in models:
        if name not in VARIANTS:
            raise CommandError(f"--models: must be of {', '.join(VARIANTS)}, got {name!r}")
    found = []
    layers = calls(models, arguments.batch)
    with progress("layers", len(layers)) as advance:
        for call in layers:
            found.append(find(call))
            advance()
    print(markdown(found))
    made_with = f"python -m bench choice --models {arguments.models} --batch {arguments.batch}"
    text = as_json(found, made_with)
    write_atomically(FILE, lambda file: file.write(text.encode()))
    return 0
