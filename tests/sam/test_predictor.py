"""The predictor, on a small model whose masks show brightness and which records its input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evsam_kernels.sam.predictor import EfficientViTSamPredictor
from evsam_kernels.sam.preprocess import SamTransform, postprocess_masks, resized_shape


class BrightnessEncoder(nn.Module):
    """Embeds an image as its channels, averaged down to 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        if images.dtype != self.gain.dtype:
            raise RuntimeError(f"expected {self.gain.dtype}, got {images.dtype}")
        channels = F.adaptive_avg_pool2d(images, 64) * self.gain
        return F.pad(channels, (0, 0, 0, 0, 0, 253))


class RecordingPromptEncoder(nn.Module):
    """One token per point and per box corner; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: dict[str, object] = {}

    def forward(self, points, boxes, masks):
        self.seen = {"points": points, "boxes": boxes, "masks": masks}
        given = [item for item in (points and points[0], boxes, masks) if item is not None]
        batch = len(given[0]) if given else 1
        tokens = [torch.zeros(batch, 0, 2)]
        if points is not None:
            tokens.append(points[0] * (points[1][..., None] + 2))
        if boxes is not None:
            tokens.append(boxes.reshape(-1, 2, 2))
        sparse = F.pad(torch.cat(tokens, dim=1), (0, 254)).to(self.gain.dtype)
        dense = torch.zeros(batch, 256, 64, 64, dtype=self.gain.dtype)
        if masks is not None:
            dense = dense + F.adaptive_avg_pool2d(masks, 64)
        return sparse, dense

    def get_dense_pe(self) -> torch.Tensor:
        return torch.zeros(1, 256, 64, 64)


class BrightnessDecoder(nn.Module):
    """Logits: brightness, a little of every prompt, and a step between the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(
        self,
        image_embeddings,
        image_pe,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
    ):
        assert len(image_embeddings) == 1
        prompt = sparse_prompt_embeddings.sum((1, 2)) * 1e-5
        maps = image_embeddings[:, :3].mean(1) + dense_prompt_embeddings[:, 0]
        maps = F.interpolate(maps[:, None], (256, 256), mode="nearest")
        steps = torch.tensor([0.0, 0.125, 0.25] if multimask_output else [0.0], dtype=maps.dtype)
        steps = steps + prompt[:, None].to(maps.dtype)
        return maps + steps[:, :, None, None], 0.5 + steps


class SmallSam(nn.Module):
    """What the predictor asks of EfficientViT-SAM, without `device` and `dtype`."""

    image_size = (1024, 512)
    image_format = "RGB"
    mask_threshold = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = BrightnessEncoder()
        self.prompt_encoder = RecordingPromptEncoder()
        self.mask_decoder = BrightnessDecoder()
        self.transform = SamTransform(512)

    def postprocess_masks(self, masks, input_size, original_size):
        assert masks.dtype == torch.float32
        return postprocess_masks(masks, input_size, original_size)


def two_tone_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image bright in its lower left, and where that is."""
    bright = np.zeros((height, width), bool)
    bright[height // 3 :, : width // 2] = True
    return np.where(bright[..., None], 250, 5).astype(np.uint8).repeat(3, axis=2), bright


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def model() -> SmallSam:
    return SmallSam().eval()


@pytest.fixture
def predictor(model) -> EfficientViTSamPredictor:
    return EfficientViTSamPredictor(model)


POINTS = np.array([[10, 20], [30.5, 4]])
LABELS = np.array([1, 0])
BOX = np.array([3, 5, 40, 25])


@pytest.mark.parametrize("size", [(120, 300), (300, 120), (64, 64), (1, 1), (1, 3000), (2500, 2)])
def test_masks_lie_where_the_image_says(predictor, size):
    image, bright = two_tone_image(*size)
    predictor.set_image(image)
    masks, scores, low_res = predictor.predict(multimask_output=False)
    assert masks.shape == (1, *size)
    assert (masks.dtype, scores.dtype, low_res.dtype) == (np.bool_, np.float32, np.float32)
    assert (scores.shape, low_res.shape) == ((1,), (1, 256, 256))
    if min(size) > 2:
        # The embedding has 64 cells along the longer side: an edge may be off by one cell.
        assert np.mean(masks[0] != bright) <= 1.5 * (1 / 64) * max(size) / min(size)


def test_state_after_set_image(predictor):
    assert not predictor.is_image_set
    assert predictor.features is predictor.original_size is predictor.input_size is None
    predictor.set_image(random_image(60, 90))
    assert predictor.is_image_set
    assert predictor.original_size == (60, 90)
    assert predictor.input_size == (683, 1024)
    assert predictor.features.shape == (1, 256, 64, 64)
    assert predictor.get_image_embedding() is predictor.features
    assert predictor.transform is predictor
    assert predictor.device == torch.device("cpu")
    predictor.reset_image()
    assert not predictor.is_image_set
    assert predictor.features is predictor.original_size is predictor.input_size is None


@pytest.mark.parametrize(
    "call",
    [
        lambda predictor: predictor.predict(),
        lambda predictor: predictor.predict_torch(),
        lambda predictor: predictor.get_image_embedding(),
        lambda predictor: predictor.apply_coords(POINTS),
        lambda predictor: predictor.apply_boxes_torch(torch.zeros(1, 4)),
    ],
)
def test_without_an_image_the_error_says_what_to_call(predictor, call):
    with pytest.raises(RuntimeError, match="no image is set; call set_image"):
        call(predictor)


@pytest.mark.parametrize(
    "fail",
    [
        lambda predictor: predictor.set_image(np.zeros((4, 5), np.uint8)),
        lambda predictor: predictor.set_image(random_image(4, 5), "HSV"),
        lambda predictor: predictor.set_image_batch([]),
        lambda predictor: predictor.set_image_batch([random_image(4, 5), None]),
        lambda predictor: predictor.set_image_batch(torch.zeros(1, 3, 4, 5)),
    ],
)
def test_a_failed_set_image_leaves_no_image(predictor, fail):
    predictor.set_image(random_image(6, 7))
    with pytest.raises((TypeError, ValueError)):
        fail(predictor)
    assert not predictor.is_image_set
    assert predictor.features is predictor.original_size is predictor.input_size is None


def test_a_failing_encoder_leaves_no_image(predictor, model, monkeypatch):
    predictor.set_image(random_image(6, 7))

    def fail(images):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.image_encoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predictor.set_image(random_image(8, 9))
    assert not predictor.is_image_set
    assert predictor.original_size is None


def test_image_formats(predictor, model):
    image = random_image(20, 30)
    predictor.set_image(image)
    expected = predictor.features
    predictor.set_image(image[..., ::-1], "BGR")
    assert torch.equal(predictor.features, expected)
    predictor.set_image(Image.fromarray(image))
    assert torch.equal(predictor.features, expected)
    model.image_format = "BGR"
    predictor.set_image(image, "BGR")
    assert torch.equal(predictor.features, expected)
    with pytest.raises(ValueError, match="image_format must be 'RGB' or 'BGR', got 'rgb'"):
        predictor.set_image(image, "rgb")


def test_coordinates_reach_the_model_in_the_frame(predictor, model):
    predictor.set_image(random_image(50, 100))  # 1024 / 100 in x, 512 / 50 in y
    mask = np.random.RandomState(0).standard_normal((1, 256, 256)).astype(np.float32)
    predictor.predict(POINTS, LABELS, BOX, mask)
    coords, labels = model.prompt_encoder.seen["points"]
    np.testing.assert_allclose(coords, (POINTS * 10.24)[None], rtol=1e-6)
    assert labels.tolist() == [[1, 0]]
    np.testing.assert_allclose(model.prompt_encoder.seen["boxes"], (BOX * 10.24)[None], rtol=1e-6)
    np.testing.assert_array_equal(model.prompt_encoder.seen["masks"], mask[None])
    assert coords.dtype == model.prompt_encoder.seen["boxes"].dtype == torch.float32


@pytest.mark.parametrize("with_points", [False, True])
@pytest.mark.parametrize("with_box", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("multimask_output", [False, True])
def test_every_mixture_of_prompts(
    predictor, model, with_points, with_box, with_mask, multimask_output
):
    predictor.set_image(random_image(30, 40))
    prompts = {
        "point_coords": POINTS if with_points else None,
        "point_labels": LABELS if with_points else None,
        "box": BOX if with_box else None,
        "mask_input": np.ones((1, 256, 256), np.float32) if with_mask else None,
    }
    masks, scores, low_res = predictor.predict(
        **prompts, multimask_output=multimask_output, return_logits=True
    )
    count = 3 if multimask_output else 1
    assert (masks.shape, masks.dtype) == ((count, 30, 40), np.float32)
    assert (scores.shape, low_res.shape) == ((count,), (count, 256, 256))
    seen = model.prompt_encoder.seen
    assert (seen["points"] is not None) == with_points
    assert (seen["boxes"] is not None) == with_box
    assert (seen["masks"] is not None) == with_mask
    booleans, _, _ = predictor.predict(**prompts, multimask_output=multimask_output)
    np.testing.assert_array_equal(booleans, masks > 0)


@pytest.mark.parametrize(
    "given",
    [
        {"point_coords": POINTS.tolist(), "point_labels": LABELS.tolist(), "box": BOX.tolist()},
        {"point_coords": POINTS.astype(np.float32), "point_labels": LABELS > 0, "box": BOX[None]},
        {
            "point_coords": torch.tensor(POINTS),
            "point_labels": torch.tensor(LABELS, dtype=torch.uint8),
            "box": torch.tensor(BOX),
        },
    ],
    ids=["lists", "other dtypes", "tensors"],
)
def test_predict_takes_what_is_like_an_array(predictor, given):
    predictor.set_image(random_image(30, 40))
    expected = predictor.predict(POINTS, LABELS, BOX)
    for got, want in zip(predictor.predict(**given), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_predict_is_predict_torch_on_scaled_prompts(predictor):
    predictor.set_image(random_image(30, 40))
    expected = predictor.predict(POINTS, LABELS, BOX, return_logits=True)
    batch = predictor.predict_torch(
        predictor.apply_coords_torch(torch.tensor(POINTS)).expand(2, -1, -1),
        torch.tensor(LABELS).expand(2, -1),
        predictor.apply_boxes_torch(torch.tensor(BOX)).expand(2, -1),
        return_logits=True,
    )
    for got, want in zip(batch, expected, strict=True):
        assert len(got) == 2
        for prompt in got:
            np.testing.assert_allclose(prompt, want, rtol=1e-5, atol=1e-6)


def test_predict_torch_batches_and_shares_one_mask(predictor, model):
    predictor.set_image(random_image(30, 40))
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 900, 900]])
    shared = torch.ones(1, 1, 256, 256)
    masks, scores, low_res = predictor.predict_torch(boxes=boxes, mask_input=shared)
    assert (masks.shape, masks.dtype) == ((2, 3, 30, 40), torch.bool)
    assert (scores.shape, low_res.shape) == ((2, 3), (2, 3, 256, 256))
    assert scores[0, 0] < scores[1, 0]
    predictor.predict_torch(boxes=boxes, mask_input=shared.expand(2, -1, -1, -1))
    assert model.prompt_encoder.seen["masks"].shape == (2, 1, 256, 256)


def test_low_res_logits_can_be_fed_back(predictor, model):
    predictor.set_image(random_image(30, 40))
    _, scores, low_res = predictor.predict(POINTS, LABELS)
    best = low_res[[scores.argmax()]]
    predictor.predict(POINTS, LABELS, mask_input=best)
    np.testing.assert_array_equal(model.prompt_encoder.seen["masks"][0], best)


def test_decode_prompts_and_upscale_masks_make_predict_torch(predictor):
    predictor.set_image(random_image(30, 40))
    boxes = torch.tensor([[0.0, 0, 100, 100]])
    masks, scores, low_res = predictor.predict_torch(boxes=boxes, return_logits=True)
    decoded, decoded_scores = predictor.decode_prompts(None, None, boxes)
    assert torch.equal(decoded, low_res)
    assert torch.equal(decoded_scores, scores)
    assert torch.equal(predictor.upscale_masks(decoded), masks)


def test_results_are_ordinary_tensors(predictor):
    predictor.set_image(random_image(30, 40))
    masks, scores, low_res = predictor.predict_torch(return_logits=True)
    weight = torch.ones((), requires_grad=True)
    loss = sum((weight * part).sum() for part in (masks, scores, low_res, predictor.features))
    loss.backward()
    assert weight.grad.isfinite()
    masks += 1
    assert not (masks.requires_grad or predictor.features.requires_grad)


def test_apply_coords_scales_and_copies(predictor):
    predictor.set_image(random_image(50, 100))
    points = POINTS.copy()
    np.testing.assert_allclose(predictor.apply_coords(points), POINTS * 10.24)
    np.testing.assert_array_equal(points, POINTS)
    assert predictor.apply_coords(np.array([[1, 2]])).dtype == np.float64
    # Another image: 1024 / 40 in x, and a height of int(25.6 * 15 + 0.5) = 384.
    np.testing.assert_allclose(predictor.apply_coords([[40, 15]], (15, 40)), [[1024, 384]])
    np.testing.assert_allclose(predictor.apply_boxes(BOX), (BOX * 10.24)[None])
    boxes = predictor.apply_boxes(np.stack([BOX, BOX]), im_size=(100, 50))
    np.testing.assert_allclose(boxes, np.stack([BOX, BOX]) * 10.24)


def test_apply_coords_torch_agrees_with_numpy(predictor):
    predictor.set_image(random_image(33, 71))
    for im_size in (None, (15, 40)):
        got = predictor.apply_coords_torch(torch.tensor(POINTS), im_size)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, predictor.apply_coords(POINTS, im_size), rtol=1e-6)
        boxes = predictor.apply_boxes_torch(torch.tensor(BOX)[None], im_size)
        np.testing.assert_allclose(boxes, predictor.apply_boxes(BOX, im_size), rtol=1e-6)


def test_batch_of_images_of_their_own_sizes(predictor):
    images = [random_image(30, 40), Image.fromarray(random_image(64, 20, 1)), random_image(5, 7, 2)]
    singles = []
    for image in images:
        predictor.set_image(image)
        singles.append(predictor.predict(POINTS, LABELS, BOX, return_logits=True))
    predictor.set_image_batch(images)
    assert predictor.original_size == [(30, 40), (64, 20), (5, 7)]
    assert predictor.input_size == [(768, 1024), (1024, 320), (731, 1024)]
    assert predictor.features.shape == (3, 256, 64, 64)
    for index, single in enumerate(singles):
        got = predictor.predict(POINTS, LABELS, BOX, return_logits=True, image_index=index)
        for part, want in zip(got, single, strict=True):
            assert part.shape == want.shape
            np.testing.assert_allclose(part, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"3 images.*pass im_size"):
        predictor.apply_coords(POINTS)
    scaled = predictor.apply_coords(POINTS, predictor.original_size[1])
    np.testing.assert_allclose(scaled, POINTS * 16)


def test_batch_of_bgr_images(predictor):
    images = [random_image(30, 40), random_image(10, 20, 1)]
    predictor.set_image_batch(images)
    expected = predictor.features
    predictor.set_image_batch([image[..., ::-1] for image in images], image_format="BGR")
    assert torch.equal(predictor.features, expected)


def test_batch_of_preprocessed_images(predictor, model):
    images = [random_image(512, 512, seed) for seed in (0, 1)]
    predictor.set_image_batch(torch.stack([model.transform(image) for image in images]))
    assert predictor.original_size == (512, 512)
    assert predictor.input_size == (1024, 1024)
    box = torch.tensor([[0.0, 0, 500, 500]])
    got = predictor.predict_torch(boxes=box, return_logits=True, image_index=1)
    predictor.set_image(images[1])
    for part, want in zip(got, predictor.predict_torch(boxes=box, return_logits=True), strict=True):
        torch.testing.assert_close(part, want)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 512, 512), ValueError, r"at least one image, got \[0, 3, 512, 512\]"),
        (torch.zeros(3, 512, 512), ValueError, r"\[B, 3, 512, 512\].*got \[3, 512, 512\]"),
        (torch.zeros(1, 3, 1024, 1024), ValueError, r"got \[1, 3, 1024, 1024\]"),
        (torch.zeros(1, 3, 512, 512, dtype=torch.uint8), TypeError, "torch.uint8.*list of uint8"),
        ([], ValueError, "empty list"),
        (
            [random_image(3, 3), np.zeros((3, 3), np.uint8)],
            ValueError,
            r"image\[1\] must have shape",
        ),
        (random_image(3, 3), TypeError, "ndarray; one image goes to set_image"),
    ],
)
def test_unusable_batches(predictor, images, error, message):
    with pytest.raises(error, match=message):
        predictor.set_image_batch(images)


@pytest.mark.parametrize(
    ("image_index", "error", "message"),
    [
        (None, ValueError, "2 images are set; pass image_index, 0 to 1"),
        (2, ValueError, "image_index must be from 0 to 1 .*got 2"),
        (-1, ValueError, "got -1"),
        (1.0, TypeError, "image_index must be an integer, got 1.0"),
        (True, TypeError, "got True"),
    ],
)
@pytest.mark.parametrize("method", ["predict", "predict_torch"])
def test_image_index_is_checked(predictor, method, image_index, error, message):
    predictor.set_image_batch([random_image(3, 3), random_image(4, 4)])
    with pytest.raises(error, match=message):
        getattr(predictor, method)(image_index=image_index)


def test_image_index_of_a_single_image(predictor):
    predictor.set_image(random_image(3, 3))
    predictor.predict_torch(image_index=np.int64(0))
    with pytest.raises(ValueError, match="from 0 to 0"):
        predictor.predict_torch(image_index=1)


NAN, INF = float("nan"), float("inf")
GOOD_POINTS = {"point_coords": POINTS, "point_labels": LABELS}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": POINTS}, "point_coords came without point_labels"),
        ({"point_labels": LABELS}, "point_labels came without point_coords"),
        (GOOD_POINTS | {"point_labels": [1]}, r"expected shape \[2\], got \[1\]"),
        (GOOD_POINTS | {"point_labels": 1}, r"point_labels must have shape \[any\], got \[\]"),
        (GOOD_POINTS | {"point_labels": [1, 2]}, r"point_labels must be .*got 2"),
        (GOOD_POINTS | {"point_labels": [1, 0.5]}, r"point_labels must be .*got 0\.5"),
        (GOOD_POINTS | {"point_labels": ["a", "b"]}, "point_labels must be an array of numbers"),
        ({"point_coords": [3, 4], "point_labels": [1]}, r"point_coords.*\[any, 2\], got \[2\]"),
        ({"point_coords": [[3, 4, 5]], "point_labels": [1]}, r"point_coords.*got \[1, 3\]"),
        ({"point_coords": [[3], [4, 5]], "point_labels": [1, 1]}, "point_coords must be an array"),
        ({"point_coords": [[3, NAN]], "point_labels": [1]}, "point_coords must be finite"),
        ({"box": [0, 0, 5]}, r"box must have shape \[4\], got \[3\]"),
        ({"box": np.zeros((2, 4))}, r"box must have shape \[4\], got \[2, 4\]"),
        ({"box": [0, 0, 5, INF]}, "box must be finite"),
        ({"mask_input": np.zeros((256, 256))}, r"mask_input.*\[1, 256, 256\], got \[256, 256\]"),
        ({"mask_input": np.zeros((1, 64, 64))}, r"mask_input.*got \[1, 64, 64\]"),
        ({"mask_input": np.full((1, 256, 256), NAN)}, "mask_input must be finite"),
    ],
)
def test_predict_refuses_bad_prompts(predictor, prompt, message):
    predictor.set_image(random_image(30, 40))
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def coords(batch: int, points: int = 2) -> dict[str, torch.Tensor]:
    return {
        "point_coords": torch.zeros(batch, points, 2),
        "point_labels": torch.ones(batch, points),
    }


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": torch.zeros(1, 2, 2)}, "point_coords came without point_labels"),
        ({"point_labels": torch.zeros(1, 2)}, "point_labels came without point_coords"),
        (coords(1) | {"point_labels": torch.ones(1, 3)}, r"expected shape \[1, 2\], got \[1, 3\]"),
        (coords(1) | {"point_labels": -2 * torch.ones(1, 2)}, r"point_labels must be .*got -2"),
        (
            coords(1) | {"point_labels": torch.full((1, 2), 255, dtype=torch.uint8)},
            "point_labels must be .*got 255",
        ),
        (coords(1) | {"point_coords": torch.zeros(2, 2)}, r"point_coords.*\[any, any, 2\]"),
        (coords(1) | {"point_coords": torch.full((1, 2, 2), INF)}, "point_coords must be finite"),
        ({"boxes": torch.zeros(4)}, r"boxes must have shape \[any, 4\], got \[4\]"),
        ({"boxes": torch.full((1, 4), NAN)}, "boxes must be finite"),
        ({"mask_input": torch.zeros(1, 256, 256)}, r"mask_input.*\[any, 1, 256, 256\]"),
        (coords(2) | {"boxes": torch.zeros(3, 4)}, "point_coords has 2, boxes has 3"),
        (
            {"boxes": torch.zeros(3, 4), "mask_input": torch.zeros(2, 1, 256, 256)},
            "boxes has 3, mask_input has 2",
        ),
        ({"boxes": torch.zeros(0, 4)}, "boxes has no prompts"),
        ({"mask_input": torch.zeros(0, 1, 256, 256)}, "mask_input has no prompts"),
    ],
)
def test_predict_torch_refuses_bad_prompts(predictor, prompt, message):
    predictor.set_image(random_image(30, 40))
    with pytest.raises(ValueError, match=message):
        predictor.predict_torch(**prompt)


def test_padding_points_and_no_points_are_fine(predictor, model):
    predictor.set_image(random_image(30, 40))
    predictor.predict(POINTS, [1, -1])
    assert model.prompt_encoder.seen["points"][1].tolist() == [[1, -1]]
    predictor.predict(np.zeros((0, 2)), np.zeros(0), box=BOX)
    assert model.prompt_encoder.seen["points"][0].shape == (1, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(model, dtype):
    model = model.to(dtype)
    predictor = EfficientViTSamPredictor(model)
    predictor.set_image(random_image(30, 40))
    mask = np.ones((1, 256, 256), np.float32)
    masks, scores, low_res = predictor.predict(POINTS, LABELS, BOX, mask, return_logits=True)
    assert model.image_encoder.seen.dtype == predictor.features.dtype == dtype
    assert model.prompt_encoder.seen["points"][0].dtype == torch.float32
    assert model.prompt_encoder.seen["boxes"].dtype == torch.float32
    assert model.prompt_encoder.seen["masks"].dtype == dtype
    assert masks.dtype == scores.dtype == low_res.dtype == np.float32
    upscaled = postprocess_masks(torch.from_numpy(low_res)[None], predictor.input_size, (30, 40))
    np.testing.assert_array_equal(masks, upscaled[0])


class MixedEncoder(BrightnessEncoder):
    """Takes float16 although its first parameter is float32, as a fused encoder may."""

    def __init__(self) -> None:
        super().__init__()
        del self.gain
        self.bias = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float16))


def test_what_the_model_says_of_itself_comes_before_its_parameters():
    class SelfDescribingSam(SmallSam):
        dtype = torch.float16
        device = torch.device("cpu", 0)

    model = SelfDescribingSam().eval()
    model.image_encoder = MixedEncoder()
    predictor = EfficientViTSamPredictor(model)
    predictor.set_image(random_image(30, 40))
    assert model.image_encoder.seen.dtype == torch.float16
    assert predictor.device is SelfDescribingSam.device


def test_an_encoder_without_parameters(model):
    encoder = model.image_encoder
    del encoder.gain
    encoder.register_buffer("gain", torch.ones((), dtype=torch.float64))
    predictor = EfficientViTSamPredictor(model)
    predictor.set_image(random_image(30, 40))
    assert encoder.seen.dtype == torch.float64


def test_a_saved_embedding_can_be_put_back(predictor):
    predictor.set_image(random_image(30, 40))
    expected = predictor.predict(POINTS, LABELS)
    saved = predictor.features.clone()
    predictor.set_image(random_image(50, 60, 1))
    predictor.features, predictor.original_size = saved, (30, 40)
    predictor.input_size = resized_shape(30, 40, 1024)
    for got, want in zip(predictor.predict(POINTS, LABELS), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_is_not_a_model_is_refused():
    with pytest.raises(TypeError, match=r"got Linear without image_encoder, .*postprocess_masks"):
        EfficientViTSamPredictor(nn.Linear(1, 1))


def test_training_batch_norm_is_warned_about(model):
    encoder = model.image_encoder
    encoder.norm = nn.BatchNorm2d(3)
    predictor = EfficientViTSamPredictor(model)
    with pytest.warns(UserWarning, match=r"training mode.*model\.eval\(\)") as caught:
        predictor.set_image(random_image(30, 40))
    assert caught[0].filename == __file__
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.set_image(random_image(30, 40))
