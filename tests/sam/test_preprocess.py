"""Image preprocessing, coordinate scaling and mask upscaling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evsam_kernels.sam.preprocess import (
    SamTransform,
    as_image_array,
    coordinate_scale,
    postprocess_masks,
    resized_shape,
)

MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "long_side", "expected"),
    [
        ((480, 640), 512, (384, 512)),
        ((640, 480), 1024, (1024, 768)),
        ((3, 16), 8, (2, 8)),  # 1.5 rounds up
        ((1, 1), 1024, (1024, 1024)),
        ((1, 5000), 512, (1, 512)),  # 0.1 is kept at one pixel
        ((5000, 1), 512, (512, 1)),
    ],
)
def test_resized_shape(size, long_side, expected):
    assert resized_shape(*size, long_side) == expected


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.sampled_from([512, 1024]))
def test_resized_shape_fills_the_frame_and_stays_in_it(height, width, long_side):
    resized = resized_shape(height, width, long_side)
    assert max(resized) == long_side
    assert min(resized) >= 1
    for side, original in zip(resized, (height, width), strict=True):
        assert abs(side - original * long_side / max(height, width)) <= 1


def test_coordinate_scale_is_x_then_y():
    assert coordinate_scale((100, 200), (300, 1000)) == (5.0, 3.0)


def test_image_array_is_returned_without_a_copy():
    image = random_image(4, 5)
    assert as_image_array(image) is image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_eight_bit_pil_images_become_rgb(mode):
    image = Image.fromarray(random_image(4, 5)).convert(mode)
    np.testing.assert_array_equal(as_image_array(image), np.array(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 5), np.uint8), ValueError, r"\[H, W, 3\], got \[4, 5\].*np\.stack"),
        (np.zeros((4, 5, 1), np.uint8), ValueError, "grayscale"),
        (np.zeros((4, 5, 4), np.uint8), ValueError, "alpha"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, "moveaxis"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"no pixels.*\[0, 5, 3\]"),
        (np.zeros((4, 5, 3), np.float32), TypeError, "uint8.*float32"),
        (torch.zeros(3, 4, 5), TypeError, "Tensor.*set_image_batch"),
        ("photo.jpg", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (Image.new("F", (5, 4)), ValueError, "mode 'F'"),
        (Image.new("I;16", (5, 4)), ValueError, "I;16"),
    ],
)
def test_unusable_images(image, error, message):
    with pytest.raises(error, match=message):
        as_image_array(image)


def test_the_error_uses_the_name_given():
    with pytest.raises(TypeError, match=r"^image\[3\] must be"):
        as_image_array(None, "image[3]")


@pytest.mark.parametrize("size", [(30, 40), (100, 64), (64, 64), (1, 1), (1, 1000), (900, 2)])
def test_transform_resizes_normalises_and_pads(size):
    image = random_image(*size)
    height, width = resized_shape(*size, 64)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    expected = np.zeros((64, 64, 3))
    expected[:height, :width] = (np.asarray(resized).astype(np.float64) - MEAN) / STD

    out = SamTransform(64)(image)

    assert out.dtype == torch.float32
    assert out.shape == (3, 64, 64)
    np.testing.assert_allclose(out.permute(1, 2, 0), expected, rtol=0, atol=1e-6)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = random_image(64, 48)
    out = SamTransform(64)(image)[:, :, :48].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal((out * STD + MEAN).round().astype(np.uint8), image)


def test_transform_takes_pil_views_and_read_only_arrays():
    image = random_image(30, 40)
    transform = SamTransform(32)
    expected = transform(image)
    assert torch.equal(transform(Image.fromarray(image)), expected)
    assert torch.equal(transform(image[..., ::-1].copy()[..., ::-1]), expected)
    image.setflags(write=False)
    assert torch.equal(transform(image), expected)


def test_transform_leaves_the_image_alone():
    image = random_image(32, 32)
    before = image.copy()
    SamTransform(32)(image)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("size", [0, -1, 1.5, "512"])
def test_transform_refuses_a_bad_size(size):
    with pytest.raises(ValueError, match=r"size must be a positive number.*got"):
        SamTransform(size)


def resized_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize of one map by definition: pixel centres at half integers, edges repeated."""

    def weights(out_length: int, in_length: int) -> np.ndarray:
        centres = np.clip(
            (np.arange(out_length) + 0.5) * in_length / out_length - 0.5, 0, in_length - 1
        )
        return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(in_length)))

    return weights(height, image.shape[0]) @ image @ weights(width, image.shape[1]).T


@pytest.mark.parametrize(
    ("input_size", "original_size"), [((32, 20), (11, 7)), ((9, 32), (50, 90))]
)
def test_postprocess_masks_is_two_bilinear_steps(input_size, original_size):
    masks = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = postprocess_masks(masks, input_size, original_size, frame_size=32)
    assert out.shape == (2, 3, *original_size)
    assert out.dtype == torch.float32
    for got, low_res in zip(out.flatten(0, 1), masks.double().flatten(0, 1), strict=True):
        frame = resized_bilinear(low_res.numpy(), 32, 32)[: input_size[0], : input_size[1]]
        np.testing.assert_allclose(got, resized_bilinear(frame, *original_size), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_postprocess_masks_computes_in_float32(dtype):
    masks = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = postprocess_masks(masks, (64, 48), (100, 75), frame_size=64)
    assert out.dtype == torch.float32
    assert torch.equal(out, postprocess_masks(masks.float(), (64, 48), (100, 75), frame_size=64))


@pytest.mark.parametrize(
    ("masks", "input_size", "original_size", "message"),
    [
        (torch.zeros(3, 8, 8), (64, 64), (9, 9), r"masks must have shape.*\[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8), (64, 65), (9, 9), r"input_size.*\(64, 65\)"),
        (torch.zeros(1, 3, 8, 8), (0, 64), (9, 9), r"input_size.*\(0, 64\)"),
        (torch.zeros(1, 3, 8, 8), (64, 64), (9, 0), r"original_size.*\(9, 0\)"),
    ],
)
def test_postprocess_masks_refuses_bad_sizes(masks, input_size, original_size, message):
    with pytest.raises(ValueError, match=message):
        postprocess_masks(masks, input_size, original_size, frame_size=64)
