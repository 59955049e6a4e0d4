"""Fixtures of the tests of whole models: a small encoder and pictures for it."""

from __future__ import annotations

import pytest
import torch
from support.models import small_encoder
from torch import Tensor, nn

import evsam_kernels as ek


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def encoder() -> nn.Module:
    return small_encoder()


@pytest.fixture
def fused(encoder) -> nn.Module:
    return ek.fuse(encoder)


@pytest.fixture
def pictures() -> Tensor:
    """Two of odd proportions, `[2, 3, 96, 128]`."""
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
