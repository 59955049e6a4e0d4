"""What the benchmarks are tested on: a variant whose encoder is tiny."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evsam_kernels.sam import zoo
from evsam_kernels.sam.synthetic import load_synthetic_weights

TINY = "efficientvit-sam-tiny"


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a variant with every kind of block; its neck's maps are 64x64 all the same.

    Stages 1 and 2 have equal blocks for maps of different sizes.
    """
    variant = zoo.Variant(
        image_size=64,
        widths=(8, 8, 8, 16, 32),
        depths=(1, 1, 1, 2, 2),
        blocks=("res", "fmb", "fmb", "mb", "att"),
        expand=(1, 2, 2, 2, 2),
        fewer_norm=(False, False, False, True, True),
        neck_depth=2,
        neck_expand=1,
    )
    monkeypatch.setitem(zoo.VARIANTS, TINY, variant)
    threads = torch.get_num_threads()
    yield TINY
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_encoder(tiny_model: str) -> Any:
    """The tiny variant's image encoder with synthetic weights; takes `[B, 3, 64, 64]`."""
    model = zoo.create_efficientvit_sam_model(tiny_model, pretrained=False)
    load_synthetic_weights(model)
    return model.image_encoder
