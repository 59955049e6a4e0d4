"""Fixtures of the fusion tests: the stand-ins, and weights that leave nothing at its default."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value, and put the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(normal(parameter) / fan_in**0.5)
        for submodule in module.modules():
            if isinstance(submodule, nn.BatchNorm2d):
                submodule.running_mean.copy_(normal(submodule.running_mean))
                submodule.running_var.copy_(normal(submodule.running_var).exp())
    return module.eval()


@pytest.fixture
def randomised():
    return randomise
