"""Prompts as they are typed, and the check that they lie in the picture."""

from __future__ import annotations

import argparse

import pytest

from evsam_kernels.cli.errors import PictureError
from evsam_kernels.cli.prompts import Prompts, parse_box, parse_point


def test_points_and_boxes_are_parsed() -> None:
    assert parse_point("3,4.5") == (3.0, 4.5)
    assert parse_box(" 0,1 ,2.5,3") == (0.0, 1.0, 2.5, 3.0)


@pytest.mark.parametrize("text", ["", "3", "3,", "3,4,5", "a,b", "3;4", "nan,1", "1,inf"])
def test_what_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="X,Y, numbers of pixels") as error:
        parse_point(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "1,2,3,x"])
def test_what_is_no_box_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="X0,Y0,X1,Y1"):
        parse_box(text)


@pytest.mark.parametrize("text", ["5,1,5,3", "5,1,4,3", "1,3,2,3", "1,3,2,2"])
def test_an_empty_box_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="X0 < X1 and Y0 < Y1"):
        parse_box(text)


def test_background_points_follow_with_label_0() -> None:
    prompts = Prompts(((1, 2), (3, 4)), ((5, 6),))
    assert prompts.coords == [(1, 2), (3, 4), (5, 6)]
    assert prompts.labels == [1, 1, 0]


def test_prompts_are_false_only_without_any() -> None:
    assert not Prompts()
    assert Prompts(points=((0, 0),))
    assert Prompts(background_points=((0, 0),))
    assert Prompts(box=(0, 0, 1, 1))


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(points=((0, 0), (39.9, 29.9))),
        Prompts(background_points=((39, 29),)),
        Prompts(box=(0, 0, 40, 30)),
    ],
)
def test_prompts_up_to_the_edge_are_inside(prompts: Prompts) -> None:
    prompts.check_inside(width=40, height=30)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (Prompts(points=((1, 1), (40, 3))), "--point 40,3"),
        (Prompts(points=((3, 30),)), "--point 3,30"),
        (Prompts(points=((-0.5, 3),)), "--point -0.5,3"),
        (Prompts(points=((3, -1),)), "--point 3,-1"),
        (Prompts(background_points=((30, 35),)), "--background-point 30,35"),
        (Prompts(box=(-1, 0, 3, 3)), "--box -1,0,3,3"),
        (Prompts(box=(0, -1, 3, 3)), "--box 0,-1,3,3"),
        (Prompts(box=(0, 0, 41, 3)), "--box 0,0,41,3"),
        (Prompts(box=(0, 0, 3, 31)), "--box 0,0,3,31"),
    ],
)
def test_prompts_outside_are_refused_by_option(prompts: Prompts, named: str) -> None:
    with pytest.raises(PictureError) as error:
        prompts.check_inside(width=40, height=30)
    assert named in str(error.value)
    assert "40 x 30" in str(error.value)
