"""Cuts an image encoder into its top-level blocks; equal ones are kept once and counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.plain import plain
from evsam_kernels.nn import OpSequential, SamNeck

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One block of an encoder, or several that differ in their weights alone.

    Attributes:
        name: path in the encoder, class, channels and input size of the first of them.
        module: the first of them.
        shapes: `[B, C, H, W]` of its inputs.
        count: how many there are.
    """

    name: str
    module: nn.Module
    shapes: tuple[Shape, ...]
    count: int


class NeckInputs(nn.Module):
    """The neck's 1x1 convolutions and their merge: maps -> `[B, head_width, 64, 64]`."""

    def __init__(self, neck: SamNeck) -> None:
        super().__init__()
        self.neck = SamNeck(neck.input_keys, [1] * len(neck.input_keys), 1, 0, 1, "fmb")
        self.neck.input_ops = neck.input_ops
        self.neck.output_ops = nn.ModuleList([OpSequential([])])
        self.eval()

    def forward(self, *maps: Tensor) -> Tensor:
        features = dict(zip(self.neck.input_keys, maps, strict=True))
        output: Tensor = self.neck(features)[self.neck.output_keys[0]]
        return output


def blocks(encoder: Any, shape: Shape) -> list[Block]:
    """The blocks of an `EfficientViTSamImageEncoder` for an input of `[B, 3, S, S]`, in order."""
    found: dict[tuple[str, tuple[Shape, ...]], list[tuple[str, nn.Module]]] = {}
    inputs = _input_shapes(encoder, shape)
    for path, module in _top_level(encoder):
        # The printed form of a module holds its configuration and none of its weights.
        found.setdefault((repr(module), inputs[path]), []).append((path, module))
    return [
        Block(_name(*same[0], shapes), same[0][1], shapes, len(same))
        for (_, shapes), same in found.items()
    ]


def _top_level(encoder: Any) -> Iterator[tuple[str, nn.Module]]:
    for index, stage in enumerate(encoder.backbone.stages):
        for position, module in enumerate(stage.op_list):
            yield f"stages.{index}.op_list.{position}", module
    yield "neck.input_ops", NeckInputs(encoder.neck)
    for position, module in enumerate(encoder.neck.middle.op_list):
        yield f"neck.middle.{position}", module
    yield "neck.output_ops", encoder.neck.output_ops[0]
    yield "norm", encoder.norm


def _input_shapes(encoder: nn.Module, shape: Shape) -> dict[str, tuple[Shape, ...]]:
    """The shapes of every top-level block's inputs, by path; nothing is computed."""
    hollow: Any = plain(encoder).to("meta")
    shapes: dict[str, tuple[Shape, ...]] = {}

    def record(path: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _, inputs: shapes.update({path: tuple(tuple(x.shape) for x in inputs)})
        )

    for path, module in _top_level(hollow):
        if not isinstance(module, NeckInputs):
            record(path, module)
    maps = [op.op_list[0] for op in hollow.neck.input_ops]
    for index, conv in enumerate(maps):
        record(f"neck.input_ops.{index}", conv)
    hollow(torch.empty(shape, device="meta"))
    shapes["neck.input_ops"] = tuple(
        shapes.pop(f"neck.input_ops.{index}")[0] for index in range(len(maps))
    )
    return shapes


def _name(path: str, module: nn.Module, shapes: tuple[Shape, ...]) -> str:
    """Such as "stages.3.op_list.1 MBConv 256->1024->256 32x32"."""
    inner = getattr(module, "main", module)
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    chain = _chain([conv for conv in convs if conv.groups == 1])
    stride = max((conv.stride[0] for conv in convs), default=1)
    sizes = "+".join(f"{shape[-2]}x{shape[-1]}" for shape in shapes)
    parts = [path, type(inner).__name__, chain, sizes]
    return " ".join([*filter(None, parts), *([f"stride {stride}"] if stride > 1 else [])])


def _chain(convs: Sequence[nn.Conv2d]) -> str:
    return "->".join(map(str, [c.in_channels for c in convs[:1]] + [c.out_channels for c in convs]))
