"""Cuts an image encoder into its top-level blocks; equal ones are kept once and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evsam_kernels.nn import OpSequential, SamNeck
from evsam_kernels.numerics.plain import plain

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
    """The neck as far as its merge: maps -> `[B, head_width, 64, 64]`."""

    def __init__(self, neck: SamNeck) -> None:
        super().__init__()
        # A neck of its own, so that fuse() recognises it.
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
    shapes = _input_shapes(encoder, shape)
    for path, module in _top_level(encoder):
        # The printed form of a module holds its configuration and none of its weights.
        found.setdefault((repr(module), shapes[path]), []).append((path, module))
    return [
        Block(_name(*same[0], key[1]), same[0][1], key[1], len(same)) for key, same in found.items()
    ]


def _top_level(encoder: Any) -> Iterator[tuple[str, nn.Module]]:
    for index, stage in enumerate(encoder.backbone.stages):
        for position, module in enumerate(stage.op_list):
            yield f"stages.{index}.op_list.{position}", module
    yield "neck.input_ops", NeckInputs(encoder.neck)
    for position, module in enumerate(encoder.neck.middle.op_list):
        yield f"neck.middle.op_list.{position}", module
    for position, module in enumerate(encoder.neck.output_ops[0].op_list):
        yield f"neck.output_ops.0.op_list.{position}", module
    yield "norm", encoder.norm


def _input_shapes(encoder: nn.Module, shape: Shape) -> dict[str, tuple[Shape, ...]]:
    """The shapes of every top-level block's inputs, by path; nothing is computed."""
    hollow: Any = plain(encoder).to("meta")
    seen: dict[nn.Module, tuple[Shape, ...]] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[module] = tuple(tuple(x.shape) for x in inputs if isinstance(x, Tensor))

    for module in hollow.modules():
        module.register_forward_pre_hook(look)
    hollow(torch.empty(shape, device="meta"))
    return {
        path: tuple(seen[op][0] for op in hollow.neck.input_ops)
        if isinstance(module, NeckInputs)
        else seen[module]
        for path, module in _top_level(hollow)
    }


def _name(path: str, module: nn.Module, shapes: tuple[Shape, ...]) -> str:
    """Such as "stages.3.op_list.1 MBConv 256->1024->256 32x32"."""
    block = getattr(module, "main", module)
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    # A depthwise or grouped convolution changes no number of channels.
    widths = [conv.out_channels for conv in convs if conv.groups == 1]
    if isinstance(module, NeckInputs):
        widths = widths[:1]  # They stand side by side.
    inputs = "+".join(str(shape[1]) for shape in shapes)
    parts = [
        path,
        type(block).__name__,
        "->".join([inputs, *map(str, widths)]),
        "+".join(f"{shape[2]}x{shape[3]}" for shape in shapes),
    ]
    stride = max((conv.stride[0] for conv in convs), default=1)
    return " ".join(parts + ([f"stride {stride}"] if stride > 1 else []))
