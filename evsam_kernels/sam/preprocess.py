"""Images and coordinates into EfficientViT-SAM's input frame, and mask logits back out of it."""

from __future__ import annotations

from numbers import Integral
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from evsam_kernels.ops.measure_masks.reference import Sizes, upscale_masks

ImageInput: TypeAlias = "np.ndarray | Image.Image"
Size: TypeAlias = "tuple[int, int]"
"""Height and width, in pixels."""

# Per-channel statistics of ImageNet, RGB, on the [0, 1] scale: what every SAM was trained with.
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)

_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


def as_image_array(image: ImageInput, name: str = "image") -> np.ndarray:
    """Check an image and return it as a uint8 array `[H, W, 3]`.

    Args:
        image: uint8 array `[H, W, 3]`, returned as it is, or a PIL image of an 8-bit mode, which
            is converted to RGB (alpha is dropped; EXIF orientation is not applied).
        name: what to call the image in an error.

    Raises:
        TypeError: neither an array nor a PIL image, or an array that is not uint8.
        ValueError: wrong number of dimensions or channels, no pixels, or a PIL image of more
            than 8 bits per channel.
    """
    if isinstance(image, Image.Image):
        if image.mode not in _EIGHT_BIT_MODES:
            raise ValueError(
                f"{name} is a PIL image of mode {image.mode!r}, which has no fixed 8-bit range; "
                "scale it to [0, 255] and convert it to 'RGB' first"
            )
        image = np.array(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"{name} must be a uint8 NumPy array [H, W, 3] or a PIL image, got "
            f"{type(image).__name__}; a preprocessed tensor goes to set_image_batch"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{name} must have shape [H, W, 3], got {list(image.shape)}; repeat a grayscale image "
            "over three channels with np.stack([gray] * 3, axis=-1), drop alpha with [..., :3], "
            "move channels last with np.moveaxis(image, 0, -1)"
        )
    if image.dtype != np.uint8:
        raise TypeError(
            f"{name} must be uint8 with values in [0, 255], got {image.dtype}; convert a float "
            "image in [0, 1] with (image * 255).round().astype(np.uint8)"
        )
    if image.size == 0:
        raise ValueError(f"{name} has no pixels: its shape is {list(image.shape)}")
    return image


def resized_shape(height: int, width: int, long_side: int) -> Size:
    """Size of an image after its longest side is scaled to `long_side`, rounded half up.

    A side that would round to nothing (an image over 1000 times as wide as high) is kept at one
    pixel, so that every image that has pixels can be segmented.
    """
    scale = long_side * 1.0 / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def coordinate_scale(original_size: Size, input_size: Size) -> tuple[float, float]:
    """Factors for (x, y) from pixels of an image of `original_size` to the `input_size` frame."""
    return input_size[1] / original_size[1], input_size[0] / original_size[0]


class SamTransform:
    """EfficientViT-SAM's preprocessing: resize, scale to [0, 1], normalise, pad.

    The longest side becomes `size` (PIL bilinear on the 8-bit image, as the published weights
    expect; `torch.nn.functional.interpolate` gives other numbers), and the right and bottom are
    padded with zeros after normalisation.

    Args:
        size: side of the square model input, in pixels; 512 for the L variants, 1024 for XL.
    """

    def __init__(self, size: int) -> None:
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size!r}")
        self.size: int = int(size)

    def __call__(self, image: ImageInput) -> torch.Tensor:
        """Turn one RGB image, uint8 `[H, W, 3]` or PIL, into float32 `[3, size, size]`."""
        pixels = as_image_array(image)
        height, width = resized_shape(pixels.shape[0], pixels.shape[1], self.size)
        if (height, width) != pixels.shape[:2]:
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized)
        unit = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(255)
        mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        std = torch.tensor(PIXEL_STD).view(3, 1, 1)
        padded = torch.zeros(3, self.size, self.size)
        padded[:, :height, :width] = unit.sub_(mean).div_(std)
        return padded

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"


def postprocess_masks(
    masks: torch.Tensor, input_size: Size, original_size: Size, frame_size: int = 1024
) -> torch.Tensor:
    """Upscale low-resolution mask logits to the original image.

    Bilinear to the square prompt frame, crop the padding away, bilinear to the image: both steps
    in float32 whatever the dtype of `masks`.

    Args:
        masks: logits `[B, M, h, w]`, any floating dtype.
        input_size: height and width of the resized image inside the frame.
        original_size: height and width of the image.
        frame_size: side of the prompt frame; 1024 for every EfficientViT-SAM.

    Returns:
        float32 logits `[B, M, *original_size]`.

    Raises:
        ValueError: `masks` is not 4-D, or a size is not positive or `input_size` exceeds the frame.
    """
    if masks.dim() != 4:
        raise ValueError(f"masks must have shape [B, M, h, w], got {list(masks.shape)}")
    if not all(1 <= side <= frame_size for side in input_size):
        raise ValueError(
            f"input_size must lie within the {frame_size} x {frame_size} prompt frame, "
            f"got {tuple(input_size)}"
        )
    if min(original_size) < 1:
        raise ValueError(f"original_size must be positive, got {tuple(original_size)}")
    original_size = int(original_size[0]), int(original_size[1])
    return upscale_masks(masks, Sizes((frame_size, frame_size), input_size, original_size))
