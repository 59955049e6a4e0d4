"""Points and boxes as they are typed: `X,Y` and `X0,Y0,X1,Y1`, in pixels of the picture."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from evsam_kernels.cli.errors import PictureError

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Prompts:
    """What says which object is meant.

    Attributes:
        points: on the object.
        background_points: not on the object.
        box: round the object, (x0, y0, x1, y1).
    """

    points: tuple[Point, ...] = ()
    background_points: tuple[Point, ...] = ()
    box: Box | None = None

    def __bool__(self) -> bool:
        return bool(self.points or self.background_points or self.box)

    @property
    def coords(self) -> list[Point]:
        """All points, those on the object first."""
        return [*self.points, *self.background_points]

    @property
    def labels(self) -> list[int]:
        """1 for each point on the object, 0 for the others, in the order of `coords`."""
        return [1] * len(self.points) + [0] * len(self.background_points)

    def check_inside(self, width: int, height: int) -> None:
        """Check that everything lies in a picture of that size.

        Raises:
            PictureError: something does not; the message names the option.
        """
        size = f"the picture, which is {width} x {height} pixels"
        for option, points in (
            ("--point", self.points),
            ("--background-point", self.background_points),
        ):
            for x, y in points:
                if not (0 <= x < width and 0 <= y < height):
                    raise PictureError(f"{option} {x:g},{y:g} lies outside {size}")
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if not (x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height):
                raise PictureError(f"--box {x0:g},{y0:g},{x1:g},{y1:g} reaches outside {size}")


def parse_point(text: str) -> Point:
    """Parse `X,Y`."""
    x, y = _numbers(text, "X,Y")
    return x, y


def parse_box(text: str) -> Box:
    """Parse `X0,Y0,X1,Y1`, left, top, right and bottom."""
    x0, y0, x1, y1 = _numbers(text, "X0,Y0,X1,Y1")
    if not (x0 < x1 and y0 < y1):
        raise argparse.ArgumentTypeError(
            f"must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1, got {text!r}"
        )
    return x0, y0, x1, y1


def _numbers(text: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count(",") + 1 or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"must be {form}, numbers of pixels, got {text!r}")
    return numbers
