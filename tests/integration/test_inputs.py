"""What a fused encoder does with unusual pictures: see docs/behaviour.md."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from evsam_kernels.numerics.budget import budget, measure


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (16, 200)], ids=str)
def test_pictures_of_any_size(encoder, fused, size):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    found, want = fused(x), copy.deepcopy(encoder).double()(x.double())
    assert found.shape == (1, 256, 64, 64)
    assert measure(found, want).within(budget(measure(encoder(x), want), torch.float32))


def test_no_pictures(fused, pictures):
    found = fused(pictures[:0])
    assert found.shape == (0, 256, 64, 64)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_picture(fused, pictures, value):
    """And is seen there: attention and the neck carry it to every pixel."""
    expected = fused(pictures)
    pictures[0, 1, 40, 50] = value
    found = fused(pictures)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x: x.byte(), TypeError, "takes a floating tensor, got torch.uint8; convert it"),
        (lambda x: x[:, :1], ValueError, r"weight must have shape \(8, 1, 3, 3\), got \(8, 3,"),
        (lambda x: x[0], ValueError, r"x must have shape \[B, C, H, W\], got \(3, 96, 128\)"),
        (lambda x: x[..., :0], ValueError, "x must have at least one channel, row and column"),
        (lambda x: x.to("meta"), ValueError, "weight must be on meta, as the input is, got cpu"),
    ],
)
def test_unusable_pictures(fused, pictures, change, kind, message):
    with pytest.raises(kind, match=message):
        fused(change(pictures))
