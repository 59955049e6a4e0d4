"""Draws masks and the prompts that led to them on a picture."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from evsam_kernels.cli.prompts import Prompts

_OPACITY = 0.45
_FIRST_HUE = 0.58
_GOLDEN_RATIO = 0.618034  # Steps of it round the circle of hues keep any number of them apart.
_FOREGROUND, _BACKGROUND, _BOX = (46, 184, 92), (220, 53, 69), (255, 221, 51)
_WHITE, _BLACK = (255, 255, 255), (20, 20, 20)
_SUPERSAMPLING = 8


def mask_colour(index: int) -> tuple[int, int, int]:
    """The colour of the mask at `index`, 8-bit RGB."""
    hue = (_FIRST_HUE + index * _GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(
    picture: np.ndarray, masks: Iterable[np.ndarray], prompts: Prompts | None = None
) -> Image.Image:
    """The picture with translucent, outlined masks and the prompts on top.

    Args:
        picture: uint8 RGB `[H, W, 3]`; left unchanged.
        masks: bool `[H, W]` each, later ones over earlier ones; may be a generator.
        prompts: points and box to mark.
    """
    canvas = picture.copy()
    line_width = max(1, round(max(canvas.shape[:2]) / 400))
    for index, mask in enumerate(masks):
        _tint(canvas, mask, mask_colour(index), line_width)
    image = Image.fromarray(canvas)
    if prompts is not None:
        _draw_prompts(image, prompts, line_width)
    return image


def _tint(
    canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], line_width: int
) -> None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # Only the mask's surroundings: a picture may have hundreds of small masks.
    window = (
        slice(max(0, rows[0] - line_width), rows[-1] + 1 + line_width),
        slice(max(0, columns[0] - line_width), columns[-1] + 1 + line_width),
    )
    inside, region = mask[window], canvas[window]
    tone = np.array(colour, np.float32)
    region[inside] = (region[inside] * (1 - _OPACITY) + tone * _OPACITY).round()
    # What lies beyond the picture counts as inside, so that no line runs along its edges.
    outside = torch.from_numpy(~inside)[None].float()
    near_outside = F.max_pool2d(outside, 2 * line_width + 1, stride=1, padding=line_width)[0]
    region[inside & (near_outside.numpy() > 0)] = colour


def _draw_prompts(image: Image.Image, prompts: Prompts, line_width: int) -> None:
    if prompts.box is not None:
        pen = ImageDraw.Draw(image)
        left, top = math.floor(prompts.box[0]), math.floor(prompts.box[1])
        right, bottom = math.ceil(prompts.box[2]) - 1, math.ceil(prompts.box[3]) - 1
        pen.rectangle((left, top, right, bottom), outline=_BLACK, width=line_width + 2)
        if right - left >= 2 and bottom - top >= 2:
            inner = (left + 1, top + 1, right - 1, bottom - 1)
            pen.rectangle(inner, outline=_BOX, width=line_width)
    radius = max(4, round(max(image.size) / 75))
    for (x, y), label in zip(prompts.coords, prompts.labels, strict=True):
        marker = _marker(radius, positive=label == 1)
        image.paste(marker, (round(x) - radius, round(y) - radius), marker)


def _marker(radius: int, *, positive: bool) -> Image.Image:
    """A disc with a plus or a minus, so that colour is not all that tells them apart."""
    side = 2 * radius + 1
    scale = _SUPERSAMPLING
    disc = Image.new("RGBA", (side * scale, side * scale))
    pen = ImageDraw.Draw(disc)
    centre, size = side * scale / 2, side * scale

    def circle(part: float, fill: tuple[int, int, int]) -> None:
        reach = part * size / 2
        pen.ellipse((centre - reach, centre - reach, centre + reach, centre + reach), fill=fill)

    circle(1.0, _BLACK)
    circle(0.9, _WHITE)
    circle(0.72, _FOREGROUND if positive else _BACKGROUND)
    arm, half = 0.22 * size, 0.055 * size
    pen.rectangle((centre - arm, centre - half, centre + arm, centre + half), fill=_WHITE)
    if positive:
        pen.rectangle((centre - half, centre - arm, centre + half, centre + arm), fill=_WHITE)
    return disc.resize((side, side), Image.Resampling.LANCZOS)
