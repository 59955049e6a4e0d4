"""Which of the two backends for GPUs suits a layer: read from the table in choice.json.

The table has the layers that CUDA kernels are better at; Triton takes all others. It is made from
bounds and replay estimates of both, which docs/cuda.md lists, so from counts and not from times.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

_TABLE = Path(__file__).parent / "choice.json"


class Layer(NamedTuple):
    """What the choice of a backend depends on.

    Attributes:
        channels: of the input.
        stride: 1 where the operation has none.
    """

    channels: int
    stride: int = 1


class Rule(NamedTuple):
    """Layers of an operation that CUDA kernels are better at.

    Attributes:
        least_channels, most_channels: of the input.
        strides: that it holds for.
    """

    least_channels: int
    most_channels: int
    strides: list[int]

    def holds(self, layer: Layer) -> bool:
        """Whether the layer is one of them."""
        fits = self.least_channels <= layer.channels <= self.most_channels
        return fits and layer.stride in self.strides


@functools.cache
def rules(op: str) -> tuple[Rule, ...]:
    """What the table says of an operation."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(Rule(**rule) for rule in table["cuda"].get(op, ()))


def prefers_cuda(op: str, layer: Layer) -> bool:
    """Whether CUDA kernels are better at a layer than Triton's."""
    return any(rule.holds(layer) for rule in rules(op))
