"""Whole models with synthetic weights against figures of the authors' package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evsam_kernels as ek
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4  # Relative: what independent float32 implementations of the model agree within.
AREA_TOLERANCE = 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_equals_the_manifest(name):
    variant = name.removeprefix("efficientvit-sam-")
    manifest = json.loads((GOLDEN / f"manifest_{variant}.json").read_text())
    with torch.device("meta"):
        state = ek.create_efficientvit_sam_model(name, pretrained=False).state_dict()
    assert {
        key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for key, tensor in state.items()
    } == manifest


def golden_image(seed: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.RandomState(seed).randint(0, 256, (height // 40 + 2, width // 40 + 2, 3))
    image = Image.fromarray(coarse.astype(np.uint8))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def prompts(height: int, width: int) -> dict[str, dict[str, np.ndarray]]:
    points = np.array([(0.4 * width, 0.5 * height), (0.7 * width, 0.3 * height)])
    box = np.array((0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height))
    first = {"point_coords": points[:1], "point_labels": np.array([1])}
    return {
        "point1": first,
        "points2": {"point_coords": points, "point_labels": np.array([1, 0])},
        "box": {"box": box},
        "box_point": {"box": box, **first},
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    norm = np.linalg.norm(expected.astype(np.float64))
    assert np.isfinite(norm) and norm > 0, what
    assert np.linalg.norm(actual.astype(np.float64) - expected) / norm <= TOLERANCE, what


@pytest.fixture(scope="module", params=["l0", "l1", "xl0", "l0 fused"])
def predicted(request):
    """A predictor whose image is set, and the figures to compare with."""
    variant, _, fused = request.param.partition(" ")
    golden = np.load(GOLDEN / f"model_{variant}.npz")
    model = ek.create_efficientvit_sam_model(f"efficientvit-sam-{variant}", pretrained=False)
    load_synthetic_weights(model)
    predictor = ek.EfficientViTSamPredictor(ek.fuse(model) if fused else model)
    seed, height, width = (int(value) for value in golden["image_seed_h_w"])
    predictor.set_image(golden_image(seed, height, width))
    return predictor, golden, prompts(height, width)


def test_embedding(predicted):
    predictor, golden, _ = predicted
    embedding = predictor.features[0].numpy()
    assert embedding.shape == tuple(golden["embedding_shape"])
    assert_close(embedding[::8, ::4, ::4], golden["embedding_sample"], "embedding")
    norm = np.linalg.norm(embedding.astype(np.float64))
    assert abs(norm / golden["embedding_norm"] - 1) <= TOLERANCE


@pytest.mark.parametrize("multimask", [True, False], ids=["multi", "single"])
@pytest.mark.parametrize("prompt", ["point1", "points2", "box", "box_point"])
def test_prompts(predicted, prompt, multimask):
    predictor, golden, given = predicted
    logits, scores, low_res = predictor.predict(
        **given[prompt], multimask_output=multimask, return_logits=True
    )
    key = f"{prompt}_{'multi' if multimask else 'single'}"
    assert_close(scores, golden[f"{key}_iou"], "scores")
    assert_close(low_res[:, ::8, ::8], golden[f"{key}_low_sample"], "low-resolution logits")
    assert_close(logits[:, ::16, ::16], golden[f"{key}_mask_sample"], "full-size logits")
    areas = (logits > 0).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, golden[f"{key}_mask_area"], rtol=AREA_TOLERANCE)


def test_mask_prompt(predicted):
    predictor, golden, given = predicted
    _, _, low_res = predictor.predict(**given["point1"], multimask_output=False)
    _, scores, low_res = predictor.predict(
        **given["points2"], mask_input=low_res, multimask_output=False
    )
    assert_close(scores, golden["maskprompt_iou"], "scores")
    assert_close(low_res[:, ::8, ::8], golden["maskprompt_low_sample"], "low-resolution logits")
