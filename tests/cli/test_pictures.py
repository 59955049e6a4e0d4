"""Collecting and reading pictures: what is taken, what is refused and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evsam_kernels.cli.errors import PictureError
from evsam_kernels.cli.pictures import collect, read

PICTURE = np.random.RandomState(0).randint(0, 256, (6, 9, 3)).astype(np.uint8)


def test_a_folder_gives_its_picture_files_by_name(folder: Path) -> None:
    found = collect([folder])
    names = [path.name for path in found.pictures]
    assert names == ["empty.png", "good.png", "other.jpg", "text.png", "truncated.jpg"]
    assert found.refused == []


def test_a_folder_is_not_searched_deeper(folder: Path) -> None:
    inner = folder / "inner.png"
    inner.mkdir()
    Image.fromarray(PICTURE).save(inner / "deep.png")
    assert all(path.parent == folder for path in collect([folder]).pictures)
    assert inner not in collect([folder]).pictures


def test_files_come_in_the_order_given_whatever_their_name(folder: Path) -> None:
    paths = [folder / "notes.txt", folder / "good.png"]
    assert collect(paths).pictures == paths


def test_a_file_given_twice_is_taken_once(folder: Path) -> None:
    again = folder / ".." / folder.name / "good.png"
    found = collect([folder / "good.png", folder, again])
    assert [path.name for path in found.pictures].count("good.png") == 1


def test_missing_files_and_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    barren = tmp_path / "barren"
    barren.mkdir()
    (barren / "notes.txt").touch()
    found = collect([tmp_path / "absent.png", barren])
    assert found.pictures == []
    assert [path.name for path, _ in found.refused] == ["absent.png", "barren"]
    assert "no such file" in found.refused[0][1]
    assert "no picture files" in found.refused[1][1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.png", "not a picture"),
        ("empty.png", "empty"),
        ("truncated.jpg", "truncated"),
        ("absent.png", "No such file"),
    ],
)
def test_bad_files_are_refused_with_the_reason(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        read(folder / name)


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(PictureError, match="cannot be read"):
        read(path)


def test_a_picture_is_read_as_rgb(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURE).save(path)
    np.testing.assert_array_equal(read(path), PICTURE)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_other_8_bit_modes_are_converted(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    converted = Image.fromarray(PICTURE).convert(mode)
    converted.save(path)
    np.testing.assert_array_equal(read(path), np.asarray(converted.convert("RGB")))


def test_16_bit_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    with pytest.raises(PictureError, match="8-bit"):
        read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = (255, 0, 0)
    # How a camera stores the picture for each orientation: what undoes the turn it asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(read(path), upright)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(PICTURE).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PICTURE[..., 0].size // 3)
    with pytest.raises(PictureError, match="exceeds limit"):
        read(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PICTURE[..., 0].size - 1)
    np.testing.assert_array_equal(read(path), PICTURE)
