"""Measures what a device can do at most: bytes it moves and operations of a product, per second."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.contestants import Task
from bench.worker import Worker

_VALUES = 2**25
"""float32, of each array of the triad: far more than caches hold."""
_SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices that are multiplied."""


class Triad(nn.Module):
    """a = b + 3 c on long arrays (J. D. McCalpin's STREAM), which only moves bytes."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values
        self.work = 3 * 4 * values

    def forward(self, x: Tensor) -> Tensor:
        """Anything -> the first values `[1, 1, 1, 4]`; `x` says where."""
        if not hasattr(self, "b"):
            self.b = torch.ones(self.values, device=x.device)
            self.c, self.a = 2 * self.b, torch.empty_like(self.b)
        torch.add(self.b, self.c, alpha=3, out=self.a)
        return self.a[:4].view(1, 1, 1, 4)


class Product(nn.Module):
    """A square matrix by itself, at the dtype of the input."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.work = 2 * side**3

    def forward(self, x: Tensor) -> Tensor:
        """Anything -> the first values `[1, 1, 1, 4]`; `x` says where and at what dtype."""
        if not hasattr(self, "matrix"):
            self.matrix = torch.full((self.side, self.side), 0.125, device=x.device, dtype=x.dtype)
        return (self.matrix @ self.matrix)[0, :4].view(1, 1, 1, 4)


def measure(worker: Worker, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The most that a few turns reach.

    Args:
        worker: of plain PyTorch.
        dtype: of the product.
        device: "cpu" or "cuda".

    Returns:
        "bytes_per_second" of a triad and "flops_per_second" of a matrix product.

    Raises:
        RuntimeError: something else was computed.
    """
    triad, product = Triad(_VALUES), Product(_SIDE[device])
    return {
        "bytes_per_second": triad.work / _least(worker, triad, torch.float32, device, 7.0),
        "flops_per_second": product.work
        / _least(worker, product, dtype, device, product.side / 64),
    }


def _least(
    worker: Worker, module: nn.Module, dtype: torch.dtype, device: str, value: float
) -> float:
    """Seconds of the fastest run of a module, which gives this value."""
    task = Task(module.eval(), (torch.zeros(1, 1, 1, 1),), dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.pt"
        torch.save(task, file)
        worker.prepare(file)
    if not (worker.output() == value).all():
        raise RuntimeError(f"{type(module).__name__} computes something else than {value}")
    return min(run.seconds for _ in range(3) for run in worker.turn())
