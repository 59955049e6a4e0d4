"""The drawing of masks and prompts."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest

from evsam_kernels.cli.overlay import draw, mask_colour
from evsam_kernels.cli.prompts import Prompts

GREY = np.full((60, 80, 3), 100, np.uint8)


def square(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros(GREY.shape[:2], bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_without_masks_the_picture_stays_as_it_is() -> None:
    picture = GREY.copy()
    np.testing.assert_array_equal(draw(picture, [], Prompts()), GREY)
    np.testing.assert_array_equal(draw(picture, [square(0, 0, 0, 0)]), GREY)


def test_the_picture_given_is_not_changed() -> None:
    picture = GREY.copy()
    draw(picture, [square(10, 10, 30, 30)], Prompts(points=((20, 20),), box=(5, 5, 40, 40)))
    np.testing.assert_array_equal(picture, GREY)


def test_a_mask_is_tinted_inside_outlined_at_its_border_and_leaves_the_rest() -> None:
    mask = square(10, 20, 40, 60)
    drawn = np.asarray(draw(GREY, [mask]))
    np.testing.assert_array_equal(drawn[~mask], GREY[~mask])
    colour = np.array(mask_colour(0))
    inner = square(11, 21, 39, 59)
    assert (drawn[mask & ~inner] == colour).all()
    tinted = np.round(0.55 * 100 + 0.45 * colour)
    assert (np.abs(drawn[inner] - tinted) <= 1).all()


def test_no_outline_runs_along_the_picture_edge() -> None:
    drawn = np.asarray(draw(GREY, [square(0, 0, 60, 30)]))
    colour = np.array(mask_colour(0))
    assert (drawn[0, 10] != colour).any()
    assert (drawn[30, 0] != colour).any()
    assert (drawn[30, 29] == colour).all()


def test_outlines_are_wider_on_larger_pictures() -> None:
    picture = np.full((800, 1600, 3), 100, np.uint8)
    mask = np.zeros((800, 1600), bool)
    mask[100:700, 200:900] = True
    row = np.asarray(draw(picture, [mask]))[400]
    assert (row == mask_colour(0)).all(axis=1).sum() == 2 * 4


def test_later_masks_cover_earlier_ones() -> None:
    drawn = np.asarray(draw(GREY, iter([square(0, 0, 60, 80), square(20, 20, 40, 40)])))
    assert (drawn[20, 30] == mask_colour(1)).all()


def test_colours_are_bright_and_apart() -> None:
    colours = [mask_colour(index) for index in range(12)]
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in colours]
    assert all(max(colour) == 255 for colour in colours)
    distances = [abs(a - b) for a, b in itertools.combinations(hues, 2)]
    assert min(min(distance, 1 - distance) for distance in distances) > 0.03


def test_points_are_marked_where_they_are_green_on_the_object_and_red_off_it() -> None:
    prompts = Prompts(points=((20, 30),), background_points=((60, 30),))
    drawn = np.asarray(draw(GREY, [], prompts)).astype(int)
    changed = (drawn != 100).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (np.abs(rows - 30) <= 4).all()
    assert ((np.abs(columns - 20) <= 4) | (np.abs(columns - 60) <= 4)).all()
    on, off = drawn[26:35, 16:25].reshape(-1, 3), drawn[26:35, 56:65].reshape(-1, 3)
    assert (on[:, 1] - on[:, 0]).max() > 50 > (off[:, 1] - off[:, 0]).max()
    assert (off[:, 0] - off[:, 1]).max() > 50 > (on[:, 0] - on[:, 1]).max()


@pytest.mark.parametrize("point", [(0, 0), (79, 59), (79, 0)])
def test_points_at_the_edge_are_marked_as_far_as_they_are_visible(point: tuple[int, int]) -> None:
    drawn = np.asarray(draw(GREY, [], Prompts(points=(point,))))
    assert (drawn[point[1], point[0]] != 100).any()


def test_a_box_is_outlined_inside_its_corners() -> None:
    drawn = np.asarray(draw(GREY, [], Prompts(box=(10, 20, 50, 45))))
    rows, columns = np.nonzero((drawn != 100).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 44, 10, 49)
    assert (drawn[32, 30] == 100).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 80, 60), (3.4, 3.4, 3.6, 3.6), (0, 0, 1, 1), (79, 59, 80, 60)]
)
def test_any_box_in_the_picture_can_be_drawn(box: tuple[float, float, float, float]) -> None:
    draw(GREY, [], Prompts(box=box))
