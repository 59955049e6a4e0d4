"""Finds picture files and reads them, refusing each bad one with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from evsam_kernels.cli.errors import PictureError
from evsam_kernels.sam.preprocess import as_image_array

PHOTOGRAPH = Path(__file__).parent / "photograph" / "coffee.jpg"
"""The picture that comes with the package."""


@dataclass
class Collection:
    """What a list of files and folders comes to.

    Attributes:
        pictures: files to read, each once, in the order given; a folder's by name.
        refused: what was given and cannot be read, with the reason.
    """

    pictures: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)


def collect(paths: Sequence[Path]) -> Collection:
    """Files as they are given, and of a folder the files that are named like pictures."""
    found = Collection()
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files = _pictures_in(path)
            if not files:
                found.refused.append((path, "the folder holds no picture files"))
        elif path.exists():
            files = [path]
        else:
            files = []
            found.refused.append((path, "there is no such file or folder"))
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                found.pictures.append(file)
    return found


def _pictures_in(folder: Path) -> list[Path]:
    readable = Image.registered_extensions()
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and readable.get(path.suffix.lower()) in Image.OPEN
    )


def read(path: Path) -> np.ndarray:
    """Read a picture upright: uint8 RGB `[H, W, 3]`, turned as its EXIF orientation says.

    Raises:
        PictureError: the file is missing, empty, truncated, no picture, or has no 8-bit channels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of huge pictures that it reads all the same; it refuses the absurd ones.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_image_array(ImageOps.exif_transpose(image), "it")
    except UnidentifiedImageError:
        size = path.stat().st_size
        kind = f"not a picture in a format that can be read ({size} bytes)" if size else "empty"
        raise PictureError(f"the file is {kind}") from None
    except Exception as error:  # Every format's decoder has its own exceptions for a broken file.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise PictureError(f"cannot be read: {reason}") from error
