"""Fixtures of the command line's tests: a model small enough to build at once, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evsam_kernels.sam import zoo
from evsam_kernels.sam.synthetic import load_synthetic_weights

TINY = "efficientvit-sam-tiny"


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variant whose encoder is tiny; prompt encoder and decoder are the real ones."""
    variant = zoo.Variant(
        image_size=64,
        widths=(8, 8, 16, 16, 32),
        depths=(1, 1, 1, 1, 1),
        blocks=("res", "fmb", "fmb", "mb", "att"),
        expand=(1, 2, 2, 2, 2),
        fewer_norm=(False, False, False, True, True),
        neck_depth=1,
        neck_expand=1,
    )
    monkeypatch.setitem(zoo.VARIANTS, TINY, variant)
    return TINY


@pytest.fixture
def tiny_checkpoint(tiny_model: str, tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    model = zoo.create_efficientvit_sam_model(tiny_model, pretrained=False)
    load_synthetic_weights(model)
    path = tmp_path / "tiny.pt"
    torch.save(model.state_dict(), path)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random picture, uint8 `[height, width, 3]`."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two good pictures, and of files that are no or broken pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(noise(30, 40)).save(folder / "good.png")
    Image.fromarray(noise(50, 20)).save(folder / "other.jpg")
    Image.fromarray(noise(64, 64)).save(folder / "whole.jpg")
    content = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not named like a picture")
    (folder / ".hidden.png").write_text("another program's")
    return folder
