"""`python -m bench acceptance`: its sections in the executor and on the CPU, and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import acceptance, command, emulated, layers, measured, peaks, sections
from bench.__main__ import main
from bench.acceptance import Account
from bench.layers import Layer
from bench.measured import PUBLISHED, PicturesToMasks
from bench.sections import Found, Section, Stand
from evsam_kernels import simt
from evsam_kernels.numerics import budget
from evsam_kernels.numerics.budget import Errors
from evsam_kernels.ops import self_check
from evsam_kernels.sam import zoo

pytest.importorskip("matplotlib", reason="the report has figures: pip install matplotlib")

NORM = Layer("layer_norm_2d", "8 4x6", {"channels": 8, "size": [4, 6]}, {"efficientvit-sam-l0": 2})
MBCONV = Layer(
    "mbconv", "8 4x6", {"channels": [8, 16, 8], "size": [4, 6]}, {"efficientvit-sam-l0": 1}
)


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny layers, and one case of each operation."""
    monkeypatch.setattr(layers, "load", lambda: [NORM, MBCONV])
    monkeypatch.setattr(sections, "_CASES_IN_THE_EXECUTOR", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def executor(backends: tuple[str, ...] = ("triton",), layer: Layer = NORM) -> Stand:
    gpu = simt.GPUS["a100-40gb"]
    return Stand("cpu", gpu, backends, torch.float16, (), (layer,), (1,), quick=True)


def test_in_the_executor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the whole model, whose decoder takes the executor half a minute."""
    pytest.importorskip("triton", reason="the executor runs Triton's kernels: pip install triton")
    all_sections = emulated.sections
    monkeypatch.setattr(emulated, "sections", lambda stand: all_sections(stand)[:2])
    folder = tmp_path / "new" / "folder"
    command_line = ["acceptance", "--executor", "simt", "--quick", "--output", str(folder)]
    assert main(command_line) == 0
    assert capsys.readouterr().out.strip() == f"-> {folder / 'report.md'}"
    numerics, checks, ops, encoder = (
        read(folder, name) for name in ("numerics", "self-check", "ops", "encoder")
    )
    for section in (numerics, checks, ops, encoder):
        assert section["problems"] == []
        assert section["seconds"] > 0
    assert numerics["passed"]
    assert {row["backend"] for row in numerics["rows"]} >= {"triton"}
    assert {check["backend"] for check in checks["checks"]} >= {"triton"}
    assert all(check["spoiled_is_found"] for check in checks["checks"])
    for entry in (*ops["entries"], *encoder["entries"]):
        assert 0 < entry["error"] <= entry["allowed_error"]
        launches = entry["launches"]
        assert entry["bound_seconds"] == pytest.approx(
            sum(each["bound_seconds"] for each in launches)
        )
    assert len(encoder["entries"][0]["launches"]) > 20
    text = (folder / "report.md").read_text()
    assert "Nothing is wrong." in text
    assert "Nothing was timed." in text
    assert "Not done yet" not in text
    for name in ("numerics", "ops", "encoder"):
        assert f"({name}.png)" in text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*"))


def test_on_a_device(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed on a GPU is timed on the CPU here."""
    monkeypatch.setattr(acceptance, "VARIANTS", {tiny_model: zoo.VARIANTS[tiny_model]})
    monkeypatch.setattr(command, "chosen_peers", lambda *_: ["eager"])
    monkeypatch.setitem(PUBLISHED["images_per_second"], tiny_model, 123)
    monkeypatch.setattr(peaks, "_VALUES", 2**16)
    monkeypatch.setattr(peaks, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(sections, "numerics", lambda stand: pytest.fail("not here"))
    monkeypatch.setattr(acceptance, "numerics", lambda stand: sections.self_checks(stand))
    assert main(["acceptance", "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    assert {layer["op"] for layer in read(tmp_path, "ops-1")["layers"]} == {
        "layer_norm_2d",
        "mbconv",
    }
    for name in ("encoder-tiny-1", "end-to-end-tiny-1"):
        result = read(tmp_path, name)
        assert list(result["contestants"]) == ["ours", "eager"]
        for outcome in result["contestants"].values():
            assert outcome["median_ms"] > 0
            assert outcome["error"] <= 2 * result["allowed_error"]
            assert "peak_bytes" in outcome
    text = (tmp_path / "report.md").read_text()
    assert "| contestant | images/s |" in text
    assert "| model | batch | ours | eager | published |" in text
    assert "Published: 123 images/s (NVIDIA A100, TensorRT, fp16, batch 16" in text
    assert "(end-to-end-tiny-1.png)" in text


def test_wrong_numbers_have_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(budget, "budget", lambda plain, dtype: Errors(1e-9, 1e-9))
    found = next(iter(emulated.sections(executor()))).find()
    (entry,) = found.result["entries"]
    assert (entry["bound_seconds"], entry["launches"]) == (None, [])
    assert found.problems == [f"layer_norm_2d 8 4x6, triton: {entry['failure']}"]


def test_a_kernel_that_is_wrong_is_found_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    self_check.forget()
    monkeypatch.setattr(
        sections, "call", lambda op, operands, backend: operands["x"].roll(1, dims=3)
    )
    found = sections.self_checks(executor()).find()
    assert "the triton kernel of layer_norm_2d" in found.problems[0]
    self_check.forget()


def test_a_self_check_that_sees_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(self_check, "finding", lambda *_: "")
    found = sections.self_checks(executor()).find()
    assert found.problems == [
        "self-check, layer_norm_2d 8 4x6 on triton: a spoiled result was not found"
    ]


def account(folder: Path) -> Account:
    return Account(folder, "python -m bench acceptance")


def test_a_section_that_breaks_costs_no_other(tmp_path: Path) -> None:
    def broken() -> Found:
        raise RuntimeError("the GPU\nis gone")

    kept = account(tmp_path)
    kept.add(Section("one", "First", broken))
    kept.add(Section("two", "Second", lambda: Found({"value": float("nan")}, remarks=["Fine."])))
    kept.write(["Third"])
    assert kept.problems == ["one: RuntimeError: the GPU is gone"]
    assert "in broken" in read(tmp_path, "one")["failure"]
    assert read(tmp_path, "two")["value"] is None
    text = (tmp_path / "report.md").read_text()
    assert "## Wrong\n\n- one: RuntimeError: the GPU is gone\n" in text
    assert "## Not done yet\n\n- Third\n" in text
    assert text.index("## First") < text.index("## Second") < text.index("Fine.")
    assert "Nothing is wrong." not in text


def test_an_interrupted_run_keeps_what_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Found:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        acceptance, "numerics", lambda _: Section("a", "A", lambda: Found({"x": 1}))
    )
    monkeypatch.setattr(acceptance, "self_checks", lambda _: Section("b", "B", interrupted))
    assert main(["acceptance", "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 130
    assert read(tmp_path, "a")["x"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "report.md"]
    text = (tmp_path / "report.md").read_text()
    assert "## A" in text
    assert "## Not done yet\n\n- B\n- Operations, batch 1\n" in text


def test_all_that_a_gpu_is_tried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Stand(
        "cuda",
        None,
        ("triton", "cuda"),
        torch.float16,
        tuple(zoo.VARIANTS),
        (NORM,),
        (1, 16),
        False,
    )
    names = [section.name for section in measured.sections(gpu)]
    assert names[:2] == ["ops-1", "ops-16"]
    assert len(names) == len(set(names)) == 2 + 5 * 2 * 2
    assert {"encoder-l0-16", "end-to-end-xl1-1"} < set(names)
    assert PUBLISHED["images_per_second"].keys() == zoo.VARIANTS.keys()


def test_the_smallest_layer_of_each_operation() -> None:
    larger = Layer("layer_norm_2d", "8 9x9", {"channels": 8, "size": [9, 9]}, {})
    assert list(acceptance.smallest([larger, NORM, MBCONV])) == [NORM, MBCONV]


def test_pictures_to_masks(tiny_model: str) -> None:
    model = zoo.create_efficientvit_sam_model(tiny_model, pretrained=False)
    pictures = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        masks = PicturesToMasks(model, prompts=2)(pictures)
        record = {
            "image": pictures[1],
            "point_coords": torch.tensor([[[1024 / 3] * 2], [[2048 / 3] * 2]]),
            "point_labels": torch.ones(2, 1, dtype=torch.int32),
        }
        expected = model([record], True)[0]
    assert masks.shape == (2, 6, 256, 256)
    torch.testing.assert_close(masks[1:], expected.flatten(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--executor", "simt"), "--executor simt: it would take days without --quick"),
        (
            ("--executor", "simt", "--quick", "--device", "cuda"),
            "--executor simt: it runs on the CPU; leave --device cuda out",
        ),
        (("--device", "cuda"), "--device cuda: PyTorch finds no GPU; --executor simt --quick"),
        (("--device", "cpu", "--quick"), "--output file: "),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["acceptance", "--output", "file", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench acceptance: error: {message}")
