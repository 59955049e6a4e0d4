"""The automatic mask generator, on a model that segments by colour, so that the answer is known."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evsam_kernels.ops import measure_masks
from evsam_kernels.sam import mask_generator
from evsam_kernels.sam.mask_generator import EfficientViTSamAutomaticMaskGenerator
from evsam_kernels.sam.masks import rle_to_mask
from evsam_kernels.sam.preprocess import SamTransform, postprocess_masks


class ColourEncoder(nn.Module):
    """Embeds an image as its own colours, averaged down to 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        colours = F.adaptive_avg_pool2d(images, 64) * self.gain
        return F.pad(colours, (0, 0, 0, 0, 0, 253))


class PointEncoder(nn.Module):
    """Passes coordinates through in the first two of the 256 numbers."""

    def forward(self, points, boxes, masks):
        coords, _ = points
        sparse = F.pad(coords.float(), (0, 254))
        return sparse, torch.zeros(len(coords), 256, 64, 64)

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1, 256, 64, 64)


class ColourDecoder(nn.Module):
    """Three masks of what has the colour under the point: crisp, blurred, and anything similar."""

    def forward(
        self,
        image_embeddings,
        image_pe,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
    ):
        assert multimask_output
        colours = image_embeddings[0, :3]
        x, y = (sparse_prompt_embeddings[:, 0, :2] / 4).long().clamp(0, 63).unbind(1)
        distance = (colours[None] - colours[:, y, x].T[:, :, None, None]).abs().amax(1)
        crisp, blurred, similar = (0.25 - distance) * 40, 0.25 - distance, (2 - distance) * 40
        logits = torch.stack([crisp, blurred, similar], dim=1)
        logits = F.interpolate(logits, (256, 256), mode="bilinear", align_corners=False)
        # Darker things score a little less, equal colours exactly the same.
        darkness = colours[:, y, x].mean(0) / 100
        scores = torch.tensor([0.95, 0.97, 0.9]) + darkness[:, None].round(decimals=3)
        return logits, scores


class ColourModel(nn.Module):
    """Has what a mask generator asks of EfficientViT-SAM, with a smaller frame, which is faster."""

    image_size = (256, 128)
    image_format = "RGB"
    mask_threshold = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = ColourEncoder()
        self.prompt_encoder = PointEncoder()
        self.mask_decoder = ColourDecoder()
        self.transform = SamTransform(128)

    def postprocess_masks(self, masks, input_size, original_size):
        return postprocess_masks(masks, input_size, original_size, frame_size=256)


KEYS = [
    "segmentation",
    "area",
    "bbox",
    "predicted_iou",
    "point_coords",
    "stability_score",
    "crop_box",
]


def scene() -> np.ndarray:
    """On grey: red with a blue inlay and a far speck, green with a hole, yellow, a black dot."""
    image = np.full((96, 128, 3), 200, np.uint8)
    image[10:50, 8:56] = (220, 30, 30)
    image[24:34, 20:36] = (30, 60, 220)
    image[20:80, 72:120] = (30, 160, 40)
    image[44:50, 90:98] = 200
    image[70:88, 12:40] = (240, 220, 20)
    image[84:90, 100:108] = (220, 30, 30)
    image[60:66, 52:58] = (20, 20, 20)
    return image


@pytest.fixture
def model() -> ColourModel:
    return ColourModel().eval()


def generate(model: nn.Module, image: np.ndarray | None = None, **settings) -> list[dict]:
    settings.setdefault("points_per_side", 8)
    generator = EfficientViTSamAutomaticMaskGenerator(model, **settings)
    return generator.generate(scene() if image is None else image)


def assert_same(got: list[dict], expected: list[dict]) -> None:
    assert len(got) == len(expected)
    for mask, want in zip(got, expected, strict=True):
        assert list(mask) == list(want)
        for key in mask:
            np.testing.assert_array_equal(mask[key], want[key], err_msg=key)


# What segment_anything's own generator returns for this scene and this model:
# (bbox, area, predicted IoU, stability, point, crop box), in its order.
WHOLE = [0, 0, 128, 96]
FROM_SEGMENT_ANYTHING = [
    (
        {"points_per_side": 8},
        [
            ([0, 0, 127, 94], 6260, 0.965, 1.0, [8, 6], WHOLE),
            ([13, 71, 25, 15], 416, 0.958, 1.0, [24, 78], WHOLE),
            ([21, 25, 13, 7], 112, 0.948, 1.0, [24, 30], WHOLE),
            ([9, 11, 97, 77], 1560, 0.946, 1.0, [8, 18], WHOLE),
            ([73, 21, 45, 57], 2592, 0.944, 1.0, [72, 30], WHOLE),
            ([20, 24, 15, 9], 160, 0.898, 1.0, [24, 30], WHOLE),
        ],
    ),
    (
        {"points_per_side": 6, "crop_n_layers": 1, "stability_score_thresh": 0.9},
        [
            ([21, 25, 13, 7], 112, 0.948, 1.0, [100 / 3, 80 / 3], [0, 0, 80, 64]),
            ([20, 24, 15, 9], 160, 0.898, 1.0, [100 / 3, 80 / 3], [0, 0, 80, 64]),
            ([13, 71, 25, 15], 416, 0.958, 0.9976, [20, 80], [0, 32, 80, 64]),
            ([0, 0, 127, 94], 6260, 0.965, 1.0, [32 / 3, 8], WHOLE),
            ([9, 11, 97, 77], 1560, 0.946, 1.0, [32 / 3, 24], WHOLE),
            ([73, 21, 45, 57], 2592, 0.944, 1.0, [224 / 3, 24], WHOLE),
        ],
    ),
    (
        {"points_per_side": 8, "min_mask_region_area": 100},
        [
            ([13, 71, 25, 15], 416, 0.958, 1.0, [24, 78], WHOLE),
            ([21, 25, 13, 7], 112, 0.948, 1.0, [24, 30], WHOLE),
            ([20, 24, 15, 9], 160, 0.898, 1.0, [24, 30], WHOLE),
            ([0, 0, 127, 94], 6372, 0.965, 1.0, [8, 6], WHOLE),
            ([9, 11, 45, 37], 1536, 0.946, 1.0, [8, 18], WHOLE),
            ([73, 21, 45, 57], 2668, 0.944, 1.0, [72, 30], WHOLE),
        ],
    ),
]


@pytest.mark.parametrize(
    ("settings", "expected"), FROM_SEGMENT_ANYTHING, ids=["image", "crops", "small regions"]
)
def test_same_masks_as_segment_anything(model, settings, expected):
    if "min_mask_region_area" in settings:
        pytest.importorskip("scipy.ndimage", reason="scipy is optional")
    masks = generate(model, **settings)
    assert len(masks) == len(expected)
    for mask, (bbox, area, iou, stability, point, crop_box) in zip(masks, expected, strict=True):
        assert list(mask) == KEYS
        assert mask["bbox"] == bbox
        assert mask["area"] == area
        assert mask["predicted_iou"] == pytest.approx(iou, abs=1e-4)
        assert mask["stability_score"] == pytest.approx(stability, abs=1e-4)
        np.testing.assert_allclose(mask["point_coords"], [point])
        assert mask["crop_box"] == crop_box


def test_masks_describe_themselves(model):
    masks = generate(model)
    assert masks
    for mask in masks:
        segmentation = mask["segmentation"]
        assert (segmentation.dtype, segmentation.shape) == (np.bool_, (96, 128))
        assert mask["area"] == segmentation.sum()
        y, x = segmentation.nonzero()
        box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
        assert mask["bbox"] == box
        ((point_x, point_y),) = np.array(mask["point_coords"], dtype=int)
        # The mask's edge may be one pixel off.
        assert segmentation[point_y - 1 : point_y + 2, point_x - 1 : point_x + 2].any()


def test_output_modes_agree(model):
    coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is optional")
    binary = generate(model)
    uncompressed = generate(model, output_mode="uncompressed_rle")
    coco = generate(model, output_mode="coco_rle")
    json.dumps(uncompressed + coco)
    for mask, rle, compressed in zip(binary, uncompressed, coco, strict=True):
        np.testing.assert_array_equal(rle_to_mask(rle["segmentation"]), mask["segmentation"])
        assert coco_mask.area(compressed["segmentation"]) == mask["area"]
        assert compressed["segmentation"]["size"] == [96, 128]
        for key in KEYS[1:]:
            assert mask[key] == rle[key] == compressed[key]


@pytest.fixture
def measured(monkeypatch):
    """How many masks were upscaled, call by call."""
    counts: list[int] = []

    def counting(logits, *args, **settings):
        counts.append(len(logits))
        return measure_masks(logits, *args, **settings)

    monkeypatch.setattr(mask_generator, "measure_masks", counting)
    return counts


@pytest.mark.parametrize("points_per_batch", [1, 5, 1000])
def test_batch_size_changes_nothing_but_memory(model, measured, points_per_batch):
    settings = {"crop_n_layers": 1, "pred_iou_thresh": 0.5}
    expected = generate(model, **settings)
    measured.clear()
    assert_same(generate(model, points_per_batch=points_per_batch, **settings), expected)
    assert max(measured) <= points_per_batch


def test_only_masks_of_good_predicted_iou_are_upscaled(model, measured):
    generate(model, pred_iou_thresh=0.5)
    assert sum(measured) == 3 * 64
    measured.clear()
    masks = generate(model, pred_iou_thresh=0.93)
    assert sum(measured) == 2 * 64  # the third mask of every point scores 0.92 at most
    assert min(mask["predicted_iou"] for mask in masks) > 0.93


def test_thresholds(model):
    everything = {"stability_score_thresh": 0.0, "pred_iou_thresh": 0.0, "box_nms_thresh": 1.0}
    masks = generate(model, **everything)
    assert len(masks) == 3 * 64

    scores = sorted({mask["predicted_iou"] for mask in masks})
    middle = scores[len(scores) // 2]
    above = generate(model, **everything | {"pred_iou_thresh": middle})
    assert_same(above, [mask for mask in masks if mask["predicted_iou"] > middle])

    stabilities = sorted({mask["stability_score"] for mask in masks})
    middle = stabilities[len(stabilities) // 2]
    stable = generate(model, **everything | {"stability_score_thresh": middle})
    assert_same(stable, [mask for mask in masks if mask["stability_score"] >= middle])


def test_a_larger_offset_asks_for_more_stability(model):
    def lowest(offset: float) -> float:
        found = generate(model, stability_score_thresh=0.1, stability_score_offset=offset)
        return min(mask["stability_score"] for mask in found)

    assert lowest(8.0) < lowest(1.0)


def test_nms_leaves_one_mask_per_thing(model):
    settings = {"stability_score_thresh": 0.9, "pred_iou_thresh": 0.92}
    duplicates = generate(model, box_nms_thresh=1.0, **settings)
    assert len(duplicates) > 40
    once = generate(model, box_nms_thresh=0.5, **settings)
    assert len(once) == len({tuple(mask["bbox"]) for mask in once}) < 10
    scores = [mask["predicted_iou"] for mask in once]
    assert scores == sorted(scores, reverse=True)


def test_crops_find_what_is_too_small_for_the_whole_image(model):
    image = np.full((256, 256, 3), 200, np.uint8)
    image[50:55, 50:55] = (220, 30, 30)  # a cell of the embedding covers 4 pixels
    # The speck's centre in the image, somewhere else in crops of 172, its centre in one of 97.
    grids = [np.array([[x, x]]) for x in (52.5 / 256, 0.9, 52.5 / 97)]

    def specks(n_layers: int) -> list[dict]:
        found = generate(
            model,
            image,
            points_per_side=None,
            point_grids=grids,
            crop_n_layers=n_layers,
        )
        return [mask for mask in found if mask["area"] < 1000]

    assert specks(0) == []
    *_, speck = specks(2)
    assert speck["crop_box"] == [0, 0, 97, 97]
    assert speck["bbox"] == [50, 50, 4, 4]
    np.testing.assert_array_equal(speck["segmentation"], image[..., 1] == 30)


def test_masks_cut_off_by_a_crop_are_dropped(model):
    masks = generate(model, crop_n_layers=1, crop_nms_thresh=1.0)
    assert {tuple(mask["crop_box"]) for mask in masks} > {tuple(WHOLE)}
    for mask in masks:
        x, y, width, height = mask["bbox"]
        crop_x, crop_y, crop_width, crop_height = mask["crop_box"]
        right, bottom = crop_x + crop_width, crop_y + crop_height
        assert crop_x == 0 or x > crop_x + 20
        assert crop_y == 0 or y > crop_y + 20
        assert right == 128 or x + width < right - 20
        assert bottom == 96 or y + height < bottom - 20


def test_duplicates_between_crops_are_dropped(model):
    settings = {"crop_n_layers": 1, "stability_score_thresh": 0.9}
    kept = generate(model, crop_nms_thresh=0.7, **settings)
    duplicates = generate(model, crop_nms_thresh=1.0, **settings)
    assert len(kept) < len(duplicates)
    areas = [mask["crop_box"][2] * mask["crop_box"][3] for mask in kept]
    assert areas == sorted(areas)  # masks of smaller crops are preferred, so they come first


def test_coarser_grids_in_crops(model, monkeypatch):
    asked = []
    decoder = model.mask_decoder.forward

    def counting(**arguments):
        asked.append(len(arguments["sparse_prompt_embeddings"]))
        return decoder(**arguments)

    monkeypatch.setattr(model.mask_decoder, "forward", counting)
    generate(model, crop_n_layers=1, crop_n_points_downscale_factor=4)
    assert asked == [64, 4, 4, 4, 4]


def test_own_point_grids(model):
    grid = np.array([[0.2, 0.85]])  # on the yellow patch
    masks = generate(model, points_per_side=None, point_grids=[grid])
    assert masks
    np.testing.assert_allclose(
        [mask["point_coords"] for mask in masks], [[[0.2 * 128, 0.85 * 96]]] * len(masks)
    )
    assert_same(generate(model, points_per_side=None, point_grids=[grid.tolist()]), masks)


def test_small_regions_are_cleaned(model):
    pytest.importorskip("scipy.ndimage", reason="scipy is optional")
    settings = {"pred_iou_thresh": 0.93, "stability_score_thresh": 0.9}

    def thing_at(masks: list[dict], y: int, x: int) -> np.ndarray:
        (mask,) = (m for m in masks if m["segmentation"][y, x] and m["area"] < 5000)
        return mask["segmentation"]

    raw = generate(model, **settings)
    clean = generate(model, min_mask_region_area=100, **settings)
    assert thing_at(raw, 40, 12)[87, 104]  # the red speck
    assert not thing_at(clean, 40, 12)[87, 104]
    assert not thing_at(raw, 40, 80)[47, 94]  # the hole in the green
    assert thing_at(clean, 40, 80)[47, 94]
    for mask in clean:
        assert mask["area"] == mask["segmentation"].sum()
        y, x = mask["segmentation"].nonzero()
        assert mask["bbox"] == [x.min(), y.min(), np.ptp(x), np.ptp(y)]


@pytest.mark.parametrize("output_mode", ["binary_mask", "uncompressed_rle", "coco_rle"])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
@pytest.mark.parametrize("min_mask_region_area", [0, 50])
def test_nothing_found_is_an_empty_list(model, output_mode, crop_n_layers, min_mask_region_area):
    if output_mode == "coco_rle":
        pytest.importorskip("pycocotools.mask", reason="pycocotools is optional")
    if min_mask_region_area:
        pytest.importorskip("scipy.ndimage", reason="scipy is optional")
    settings = {
        "points_per_side": 2,
        "output_mode": output_mode,
        "crop_n_layers": crop_n_layers,
        "min_mask_region_area": min_mask_region_area,
    }
    assert generate(model, pred_iou_thresh=1.0, **settings) == []
    assert generate(model, stability_score_offset=1e6, **settings) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (2000, 2), (3, 6)])
def test_images_of_any_shape(model, size):
    image = np.full((*size, 3), 200, np.uint8)
    masks = generate(model, image, points_per_side=2, crop_n_layers=1)
    assert any(mask["segmentation"].all() for mask in masks)
    assert all(mask["segmentation"].shape == size for mask in masks)


def test_pil_images(model):
    assert_same(generate(model, Image.fromarray(scene())), generate(model))


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((9, 9), np.uint8), ValueError),
        (np.zeros((9, 9, 3), np.float32), TypeError),
        (np.zeros((0, 9, 3), np.uint8), ValueError),
        ("photo.jpg", TypeError),
    ],
)
def test_unusable_images(model, image, error):
    with pytest.raises(error, match="image "):
        generate(model, image)


def test_no_image_stays_set(model, monkeypatch):
    generator = EfficientViTSamAutomaticMaskGenerator(model, points_per_side=2)
    generator.generate(scene())
    assert not generator.predictor.is_image_set

    def fail(**arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.mask_decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generator.generate(scene())
    assert not generator.predictor.is_image_set


def test_half_precision_scores_are_compared_in_float32(model, monkeypatch):
    expected = [mask["bbox"] for mask in generate(model)]
    decoder = model.mask_decoder.forward

    def half(**arguments):
        logits, scores = decoder(**arguments)
        return logits.bfloat16(), scores.bfloat16()

    monkeypatch.setattr(model.mask_decoder, "forward", half)
    masks = generate(model, pred_iou_thresh=0.8984)  # bfloat16 would round it to 0.8984375
    assert {mask["predicted_iou"] for mask in masks} >= {0.8984375}
    assert len(masks) == len(expected)


def test_progress_bar(model, capsys):
    pytest.importorskip("rich", reason="rich is optional")
    generator = EfficientViTSamAutomaticMaskGenerator(
        model, points_per_side=4, points_per_batch=5, crop_n_layers=1
    )
    quiet = generator.generate(scene())
    assert capsys.readouterr().out == ""
    shown = generator.generate(scene(), progress=True)
    assert "100%" in capsys.readouterr().out
    assert_same(shown, quiet)


@pytest.mark.parametrize(
    ("package", "module", "settings"),
    [
        ("scipy", "scipy.ndimage", {"min_mask_region_area": 1}),
        ("pycocotools", "pycocotools.mask", {"output_mode": "coco_rle"}),
    ],
)
def test_a_missing_package_is_named_at_once(model, monkeypatch, package, module, settings):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        EfficientViTSamAutomaticMaskGenerator(model, **settings)


def test_progress_without_rich(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    generator = EfficientViTSamAutomaticMaskGenerator(model, points_per_side=1)
    with pytest.raises(ImportError, match=r"progress=True needs rich: pip install rich"):
        generator.generate(scene(), progress=True)


HALF = np.array([[0.5, 0.5]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points_per_side": 0}, "points_per_side must be an integer of at least 1, got 0"),
        ({"points_per_side": 1.5}, "points_per_side must be an integer"),
        ({"points_per_side": None}, "exactly one of points_per_side and point_grids"),
        ({"point_grids": [HALF]}, "exactly one of points_per_side and point_grids"),
        ({"points_per_batch": 0}, "points_per_batch must be an integer of at least 1, got 0"),
        ({"pred_iou_thresh": 88}, "pred_iou_thresh must be a number from -inf to 1, got 88"),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh.*got nan"),
        ({"stability_score_thresh": 95}, "stability_score_thresh.*got 95"),
        ({"stability_score_offset": -1}, "stability_score_offset.*from 0 to inf, got -1"),
        ({"box_nms_thresh": 1.1}, "box_nms_thresh must be a number from 0 to 1, got 1.1"),
        ({"crop_nms_thresh": -0.1}, "crop_nms_thresh.*got -0.1"),
        ({"crop_nms_thresh": "0.7"}, "crop_nms_thresh.*got '0.7'"),
        ({"crop_n_layers": -1}, "crop_n_layers must be an integer of at least 0, got -1"),
        ({"crop_overlap_ratio": 2}, "crop_overlap_ratio.*got 2"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor.*got 0"),
        (
            {"points_per_side": 4, "crop_n_layers": 2, "crop_n_points_downscale_factor": 4},
            "leaves no points in crop layer 2",
        ),
        ({"min_mask_region_area": -5}, "min_mask_region_area.*got -5"),
        ({"output_mode": "rle"}, "output_mode must be one of .*'coco_rle'.*got 'rle'"),
        (
            {"points_per_side": None, "point_grids": [HALF], "crop_n_layers": 1},
            "point_grids must have a grid for the image and for each of crop_n_layers=1.*got 1",
        ),
        (
            {"points_per_side": None, "point_grids": [np.zeros((0, 2))]},
            r"point_grids\[0\] must have shape \[N, 2\].*got \[0, 2\]",
        ),
        (
            {"points_per_side": None, "point_grids": [HALF, HALF[0]]},
            r"point_grids\[1\].*got \[2\]",
        ),
        (
            {"points_per_side": None, "point_grids": [HALF * 100]},
            r"point_grids\[0\] must hold \(x, y\) from 0 to 1",
        ),
    ],
)
def test_unusable_settings(model, settings, message):
    with pytest.raises(ValueError, match=message):
        EfficientViTSamAutomaticMaskGenerator(model, **settings)


def test_what_is_not_a_model_is_refused():
    with pytest.raises(TypeError, match="got Linear without image_encoder"):
        EfficientViTSamAutomaticMaskGenerator(nn.Linear(1, 1))
