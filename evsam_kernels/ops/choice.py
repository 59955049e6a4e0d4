"""Which of the two backends for GPUs suits a layer: read from the table in choice.json.

`python -m bench choice` makes the table, of every layer of some models, by replay estimates of both
backends: from counts, not from times. A layer that is not in it is taken for the nearest of those
with the same stencil and heads; where there is none, Triton's kernels take it, which take all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

_TABLE = Path(__file__).parent / "choice.json"


class Layer(NamedTuple):
    """What the choice of a backend depends on, as far as weights tell.

    Attributes:
        channels: of the input.
        inside: channels that the first 1x1 convolution makes of them.
        kernel, stride: of the depthwise convolution, the largest of several.
        head_dim: channels of a head of attention; 0 where there is none.
    """

    channels: int
    inside: int
    kernel: int
    stride: int
    head_dim: int

    @classmethod
    def of_mbconv(cls, expand_weight: Tensor, depth_weight: Tensor, stride: int) -> Layer:
        """The layer of a call of `mbconv`."""
        inside, channels = expand_weight.shape[:2]
        return cls(channels, inside, depth_weight.shape[-1], stride, 0)

    @classmethod
    def of_attention(
        cls, qkv_weight: Tensor, depth_weights: Sequence[Tensor], head_dim: int
    ) -> Layer:
        """The layer of a call of `multi_scale_attention`."""
        inside, channels = qkv_weight.shape[:2]
        kernel = max((weight.shape[-1] for weight in depth_weights), default=1)
        return cls(channels, inside, kernel, 1, head_dim)


def layer_of(op: str, operands: Mapping[str, Any]) -> Layer | None:
    """The layer of a call, by the names of its operands; None where there is nothing to choose."""
    if op == "mbconv":
        return Layer.of_mbconv(
            operands["expand_weight"], operands["depth_weight"], operands["stride"]
        )
    if op == "multi_scale_attention":
        return Layer.of_attention(
            operands["qkv_weight"], operands["depth_weights"], operands["head_dim"]
        )
    return None


class Row(NamedTuple):
    """A layer of the table.

    Attributes:
        op: name of the operation.
        layer: which.
        backend: that takes it, "cuda" or "triton".
        cuda_us, triton_us: what the replay estimates for each, in microseconds, uncalibrated.
        unfused_us: the same of one convolution after the other.
    """

    op: str
    layer: Layer
    backend: str
    cuda_us: float
    triton_us: float
    unfused_us: float


@functools.cache
def rows() -> tuple[Row, ...]:
    """The table."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(Row(**{**row, "layer": Layer(**row["layer"])}) for row in table["layers"])


def prefers_cuda(op: str, layer: Layer) -> bool:
    """Whether CUDA kernels are better at a layer than Triton's."""

    def distance(row: Row) -> int:
        return abs(row.layer.channels - layer.channels) + abs(row.layer.inside - layer.inside)

    alike = (row for row in rows() if row.op == op and row.layer[2:] == layer[2:])
    nearest = min(alike, key=distance, default=None)
    return nearest is not None and nearest.backend == "cuda"
