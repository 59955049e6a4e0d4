"""`evsam segment` from its arguments to the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

import evsam_kernels
from evsam_kernels.cli import main, results
from evsam_kernels.cli.overlay import mask_colour
from evsam_kernels.cli.pictures import read
from evsam_kernels.cli.prompts import Prompts
from evsam_kernels.sam import masks as sam_masks

HEIGHT, WIDTH = 30, 40


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(folder: Path) -> Path:
    return folder / "good.png"


@pytest.fixture
def options(tiny_model: str) -> list[str]:
    return ["--model", tiny_model, "--synthetic-weights"]


def segment(*arguments: object) -> int:
    return main(["segment", *map(str, arguments)])


def expected(
    model_name: str, picture: Path, multimask: bool, **prompts: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Masks and scores by the library, from the model that is not fused."""
    model = evsam_kernels.create_efficientvit_sam_model(model_name, pretrained=False)
    evsam_kernels.sam.synthetic.load_synthetic_weights(model)
    predictor = evsam_kernels.EfficientViTSamPredictor(model)
    predictor.set_image(read(picture))
    found, scores, _ = predictor.predict(multimask_output=multimask, **prompts)
    return found, scores


def test_a_picture_gets_an_overlay_and_a_line(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(picture, "--point", "20,15", "--output", "out/overlay.png", *options) == 0
    drawn = np.asarray(Image.open("out/overlay.png"))
    original = read(picture)
    assert drawn.shape == original.shape
    assert (drawn != original).any()
    captured = capsys.readouterr()
    assert captured.err == ""
    line = captured.out.splitlines()[-1]
    assert line.startswith(f"{picture}: 40 x 30, 1 mask, best score ")
    assert all(word in line for word in ("pixels", "encode", "decode", "ms -> out/overlay.png"))


def test_synthetic_weights_are_named_as_such(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    segment(picture, "--point", "20,15", *options)
    assert "SYNTHETIC WEIGHTS" in capsys.readouterr().out


def test_a_checkpoint_is_used(
    picture: Path, tiny_model: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [picture, "--point", "20,15", "--model", tiny_model]
    assert segment(*arguments, "--checkpoint", tiny_checkpoint) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC" not in out
    assert str(tiny_checkpoint) in out


@pytest.mark.parametrize(
    ("arguments", "multimask", "prompts"),
    [
        (["--point", "20,15"], True, {"point_coords": [[20, 15]], "point_labels": [1]}),
        (["--box", "3,4,35,25"], False, {"box": [3, 4, 35, 25]}),
        (
            ["--point", "20,15", "--background-point", "2,3"],
            False,
            {"point_coords": [[20, 15], [2, 3]], "point_labels": [1, 0]},
        ),
        (
            ["--point", "20,15", "--box", "3,4,35,25"],
            False,
            {"point_coords": [[20, 15]], "point_labels": [1], "box": [3, 4, 35, 25]},
        ),
    ],
)
def test_the_mask_is_the_best_the_model_gives(
    picture: Path,
    options: list[str],
    tiny_model: str,
    arguments: list[str],
    multimask: bool,
    prompts: dict[str, Any],
) -> None:
    assert segment(picture, *arguments, "--masks", "npz", "--output-dir", "out", *options) == 0
    found = np.load("out/good_masks.npz")
    masks, scores = expected(tiny_model, picture, multimask, **prompts)
    assert masks.any()
    np.testing.assert_allclose(found["scores"], [scores.max()], rtol=1e-4)
    assert found["masks"].shape == (1, HEIGHT, WIDTH)
    # The fused model rounds differently: a pixel at the threshold may change sides.
    assert (found["masks"][0] != masks[scores.argmax()]).mean() < 0.01


def test_multimask_keeps_three_masks_best_first(
    picture: Path, options: list[str], tiny_model: str
) -> None:
    prompt = ["--box", "3,4,35,25", "--multimask"]
    assert segment(picture, *prompt, "--masks", "npz", "--output-dir", "out", *options) == 0
    found = np.load("out/good_masks.npz")
    _, scores = expected(tiny_model, picture, True, box=[3, 4, 35, 25])
    np.testing.assert_allclose(found["scores"], sorted(scores, reverse=True), rtol=1e-4)
    assert found["masks"].shape == (3, HEIGHT, WIDTH)


def test_all_mask_formats_hold_the_same_masks(picture: Path, options: list[str]) -> None:
    formats = ["--masks", "png", "--masks", "npz", "--masks", "coco", "--masks", "png"]
    prompt = ["--point", "20,15", "--multimask"]
    assert segment(picture, *prompt, *formats, "--output-dir", "out", *options) == 0
    masks = np.load("out/good_masks.npz")["masks"]
    assert masks.any(axis=(1, 2)).all()
    pngs = [np.asarray(Image.open(f"out/good_mask_{index:03}.png")) for index in range(3)]
    np.testing.assert_array_equal(np.stack(pngs), masks * 255)
    document = json.loads(Path("out/good_masks.json").read_text())
    assert document["image"] == {"file_name": "good.png", "width": WIDTH, "height": HEIGHT}
    for index, (annotation, mask) in enumerate(zip(document["annotations"], masks, strict=True)):
        assert annotation["id"] == index
        decoded = pycocotools.mask.decode(annotation["segmentation"])
        np.testing.assert_array_equal(decoded, mask)
        assert annotation["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        x0, y0 = columns.min(), rows.min()
        assert annotation["bbox"] == [x0, y0, columns.max() - x0, rows.max() - y0]
    names = sorted(path.name for path in Path("out").iterdir())
    pngs_written = [f"good_mask_{index:03}.png" for index in range(3)]
    assert names == [*pngs_written, "good_masks.json", "good_masks.npz", "good_overlay.png"]


def test_everything_finds_masks_with_what_sa_1b_records(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lenient = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--points-per-side", "3"]
    arguments = ["--everything", *lenient, "--masks", "coco", "--masks", "npz"]
    assert segment(picture, *arguments, "--output-dir", "out", *options) == 0
    document = json.loads(Path("out/good_masks.json").read_text())
    scores = [annotation["predicted_iou"] for annotation in document["annotations"]]
    assert len(scores) >= 1
    assert scores == sorted(scores, reverse=True)
    for annotation in document["annotations"]:
        assert len(annotation["point_coords"][0]) == 2
        assert annotation["crop_box"] == [0, 0, WIDTH, HEIGHT]
        assert 0 <= annotation["stability_score"] <= 1
    assert len(np.load("out/good_masks.npz")["masks"]) == len(scores)
    assert "everything" in capsys.readouterr().out


def test_everything_without_masks_is_no_failure(picture: Path, options: list[str]) -> None:
    strict = ["--pred-iou-thresh", "1", "--points-per-side", "1"]
    arguments = ["--everything", *strict, "--masks", "npz", "--masks", "coco", "--masks", "png"]
    assert segment(picture, *arguments, "--output-dir", "out", *options) == 0
    assert np.load("out/good_masks.npz")["masks"].shape == (0, HEIGHT, WIDTH)
    assert json.loads(Path("out/good_masks.json").read_text())["annotations"] == []
    np.testing.assert_array_equal(np.asarray(Image.open("out/good_overlay.png")), read(picture))


class KnownMasks:
    """Stands for a predictor and for a generator that find two squares, the worse one first."""

    squares = np.zeros((2, 20, 30), bool)
    squares[0, 4:9, 10:16] = True
    squares[1, 12:18, 3:5] = True

    def set_image(self, image: np.ndarray) -> None: ...

    def reset_image(self) -> None: ...

    def predict(self, **prompts: object) -> tuple[np.ndarray, np.ndarray, None]:
        return self.squares, np.array([0.3, 0.6], np.float32), None

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        rles = sam_masks.masks_to_rle(torch.from_numpy(self.squares))
        other = {"bbox": [], "stability_score": 1, "point_coords": [], "crop_box": []}
        return [
            {"segmentation": rle, "area": sam_masks.rle_area(rle), "predicted_iou": score, **other}
            for rle, score in zip(rles, (0.3, 0.6), strict=True)
        ]


def test_masks_are_described_and_the_best_comes_first() -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    by_prompt = results.segment_prompted(
        KnownMasks(),  # type: ignore[arg-type]
        picture,
        Prompts(points=((3, 14),)),
        multimask=True,
    )
    everything = results.segment_everything(KnownMasks(), picture)  # type: ignore[arg-type]
    for result in (by_prompt, everything):
        assert result.size == (30, 20)
        assert [mask.score for mask in result.masks] == pytest.approx([0.6, 0.3])
        assert [mask.area for mask in result.masks] == [12, 30]
        for mask, square in zip(result.masks, KnownMasks.squares[::-1], strict=True):
            np.testing.assert_array_equal(mask.pixels(), square)
        assert "2 masks, best score 0.600 with 12 pixels (2.0 %)" in str(result)
    # SAM's convention: the outermost pixels' distance, not their count.
    assert [mask.details["bbox"] for mask in by_prompt.masks] == [[3, 12, 1, 5], [10, 4, 5, 4]]


def test_small_masks_are_drawn_over_large_ones(tmp_path: Path) -> None:
    def found(mask: np.ndarray, score: float) -> results.FoundMask:
        (rle,) = sam_masks.masks_to_rle(torch.from_numpy(mask)[None])
        return results.FoundMask(rle, int(mask.sum()), score, {})

    large, small = np.ones((20, 20), bool), np.zeros((20, 20), bool)
    small[5:15, 5:15] = True
    result = results.Result((20, 20), [found(small, 0.9), found(large, 0.8)], {})
    results.write_overlay(tmp_path / "o.png", np.zeros((20, 20, 3), np.uint8), result, None)
    drawn = np.asarray(Image.open(tmp_path / "o.png"))
    assert tuple(drawn[5, 10]) == mask_colour(1)


def test_a_folder_is_segmented_and_its_bad_files_are_named(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".." / "barren").mkdir()
    arguments = [folder, "absent.png", "barren", "--point", "5,5", "--output-dir", "out"]
    assert segment(*arguments, *options) == 1
    captured = capsys.readouterr()
    written = sorted(path.name for path in Path("out").iterdir())
    assert written == ["good_overlay.png", "other_overlay.png"]
    refusals = {
        "absent.png": "no such file",
        "barren": "no picture files",
        "empty.png": "the file is empty",
        "text.png": "not a picture",
        "truncated.jpg": "truncated",
    }
    lines = captured.err.splitlines()
    assert len(lines) == len(refusals) + 1
    for name, reason in refusals.items():
        (line,) = [line for line in lines if f"{name}:" in line]
        assert reason in line
    assert lines[-1] == "evsam segment: refused 5 of 7"
    assert "good.png: " in captured.out and "other.jpg: " in captured.out


def test_a_prompt_outside_one_picture_refuses_that_picture_alone(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [folder / "good.png", folder / "other.jpg"]
    assert segment(*pictures, "--point", "30,10", "--output-dir", "out", *options) == 1
    assert [path.name for path in Path("out").iterdir()] == ["good_overlay.png"]
    assert "other.jpg: --point 30,10 lies outside" in capsys.readouterr().err


def test_pictures_of_the_same_name_do_not_share_an_overlay(
    folder: Path, options: list[str]
) -> None:
    Image.open(folder / "good.png").save(folder / "good.bmp")
    Image.open(folder / "good.png").save(folder / "good_2.png")
    pictures = [folder / name for name in ("good.png", "good.bmp", "good_2.png")]
    assert segment(*pictures, "--point", "5,5", "--output-dir", "out", *options) == 0
    written = sorted(path.name for path in Path("out").iterdir())
    assert written == ["good_2_2_overlay.png", "good_2_overlay.png", "good_overlay.png"]


def test_overlays_go_to_a_folder_of_their_own_by_default(picture: Path, options: list[str]) -> None:
    assert segment(picture, "--point", "5,5", *options) == 0
    assert Path("evsam_output/good_overlay.png").is_file()


def test_an_input_is_never_overwritten(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = picture.read_bytes()
    assert segment(picture, "--point", "5,5", "--output", picture, *options) == 2
    assert "not overwritten" in capsys.readouterr().err
    trap = picture.with_name("good_overlay.png")
    trap.write_bytes(before)
    arguments = [picture, trap, "--point", "5,5", "--output-dir", picture.parent]
    assert segment(*arguments, *options) == 1
    assert "good_overlay.png is an input" in capsys.readouterr().err
    assert picture.read_bytes() == trap.read_bytes() == before


def test_a_file_that_cannot_be_written_is_named_and_the_others_are_written(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out/good_overlay.png").mkdir(parents=True)
    pictures = [folder / "good.png", folder / "other.jpg"]
    assert segment(*pictures, "--point", "5,5", "--output-dir", "out", *options) == 1
    assert "good_overlay.png cannot be written" in capsys.readouterr().err
    assert Path("out/other_overlay.png").is_file()
    assert not list(Path("out").glob(".*"))


def test_a_failure_while_drawing_leaves_no_file(
    picture: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        args[1].write(b"half")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert segment(picture, "--point", "5,5", "--output-dir", "out", *options) == 1
    assert list(Path("out").iterdir()) == []


def test_half_precision_gives_nearly_the_same_mask(picture: Path, options: list[str]) -> None:
    prompt = ["--point", "20,15", "--masks", "npz"]
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        out = ["--output-dir", dtype, "--dtype", dtype]
        assert segment(picture, *prompt, *out, *options) == 0
        found[dtype] = np.load(f"{dtype}/good_masks.npz")["scores"][0]
    assert found["bfloat16"] != found["float32"] != found["float16"]
    assert found["float16"] == pytest.approx(found["float32"], abs=0.01)
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.05)


def test_threads_and_backend_are_passed_on(
    picture: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = [picture, "--point", "5,5", "--threads", "1", "--backend", "reference"]
        assert segment(*arguments, *options) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert "blocks fused (reference)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--point X,Y, --box X0,Y0,X1,Y1 or --everything"),
        (["--everything", "--point", "1,2"], "--everything takes no --point"),
        (["--everything", "--multimask"], "--multimask goes with --point"),
        (["--everything", "--pred-iou-thresh", "2"], "pred_iou_thresh must be"),
        (["--point", "1,2", "--checkpoint", "x.pt"], "not both"),
        (["--point", "1,2", "--output", "x.jpg"], "--output must end in .png"),
        (["--point", "1,2", "--device", "abacus"], "--device abacus"),
        (["--point", "1,2", "--output-dir", "file/out"], "folder cannot be made"),
    ],
)
def test_unusable_arguments_are_explained(
    picture: Path,
    options: list[str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file").touch()
    assert segment(picture, *arguments, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("evsam segment: error: ")
    assert message in error
    assert not Path("evsam_output").exists() or not list(Path("evsam_output").iterdir())


def test_one_output_cannot_take_several_pictures(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(folder, "--point", "1,2", "--output", "x.png", *options) == 2
    assert "use --output-dir" in capsys.readouterr().err


def test_weights_must_be_given(
    picture: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(picture, "--point", "1,2", "--model", tiny_model) == 2
    error = capsys.readouterr().err
    assert "--checkpoint FILE" in error and "--synthetic-weights" in error


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_bad_checkpoint_is_refused_by_name(
    picture: Path, tiny_model: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("weights.pt").write_bytes(content)
    arguments = ["--point", "1,2", "--model", tiny_model, "--checkpoint", "weights.pt"]
    assert segment(picture, *arguments) == 2
    error = capsys.readouterr().err
    assert "--checkpoint" in error and "weights.pt" in error


def test_another_variants_checkpoint_is_refused(
    picture: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--point", "1,2", "--checkpoint", tiny_checkpoint]
    assert segment(picture, *arguments) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_missing_pycocotools_is_noticed_before_the_work(
    picture: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    assert segment(picture, "--point", "1,2", "--masks", "coco", *options) == 2
    assert "pip install pycocotools" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--point", "1"],
        ["--box", "1,2,1,4"],
        ["--threads", "0"],
        ["--points-per-side", "few"],
        ["--backend", "abacus"],
        ["--model", "vit-h"],
        ["--masks", "bmp"],
        ["--output", "x.png", "--output-dir", "y"],
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        segment("x.png", *arguments)
    assert exit_.value.code == 2
    assert arguments[-2] in capsys.readouterr().err
