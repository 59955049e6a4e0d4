"""A fused model under PyTorch's modes, and its copies."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support.models import small_model
from torch import nn

import evsam_kernels as ek


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_changes_nothing(fused, pictures, low):
    expected = fused(pictures)
    with torch.autocast("cpu", low):
        found = fused(pictures)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_inference_mode(encoder, pictures):
    """Fused and run there, run there alone, and run outside with what was fused there."""
    expected = ek.fuse(encoder)(pictures)
    outside = ek.fuse(encoder)
    with torch.inference_mode():
        inside = ek.fuse(encoder)
        for module in (inside, outside):
            found = module(pictures.clone())
            assert found.is_inference()
            assert torch.equal(found, expected)
    assert torch.equal(inside(pictures), expected)


def copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return ek.fuse(small_model())


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_a_copy_is_a_model_of_its_own(model, duplicate):
    """Of a fused model that has run, and so has kept its packed weights and an image."""
    picture = np.random.RandomState(0).randint(0, 256, (70, 90, 3)).astype(np.uint8)
    prompt = {"point_coords": [[40.0, 30.0]], "point_labels": [1], "return_logits": True}

    def predict(model: nn.Module) -> list[np.ndarray]:
        predictor = ek.EfficientViTSamPredictor(model)
        predictor.set_image(picture)
        return list(predictor.predict(**prompt))

    expected = predict(model)
    other = duplicate(model)
    for found, want in zip(predict(other), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    assert str(other.fusion_report) == str(model.fusion_report)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not np.array_equal(predict(other)[0], expected[0])
    for found, want in zip(predict(model), expected, strict=True):
        np.testing.assert_array_equal(found, want)
