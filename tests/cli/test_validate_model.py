"""`evsam validate --model`: a small model with its kernels for GPUs in the executor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small_model

import evsam_kernels as ek
from evsam_kernels import simt
from evsam_kernels.cli import main, models, validate_model

SMALL = "efficientvit-sam-l0"
IN_THE_EXECUTOR = ["validate", "--model", SMALL, "--executor", "simt", "--dtype", "float16"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in the place of L0."""
    monkeypatch.setattr(models, "load", lambda *_: small_model())


@pytest.mark.usefixtures("small")
def test_in_the_executor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    assert main([*IN_THE_EXECUTOR, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "launches checked in the executor" in out
    assert "SYNTHETIC WEIGHTS" in out
    rows = json.loads(report.read_text())["rows"]
    assert [row["quantity"] for row in rows] == ["embedding", "logits of a point's masks"]
    assert {row["dtype"] for row in rows} == {"float16"}
    assert all("triton" in row["backend"] for row in rows)
    assert all(0 < row["ours"]["frobenius"] < 0.01 for row in rows)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_the_machine_itself(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", backend] if backend != "auto" else []
    assert main(["validate", "--model", SMALL, "--dtype", "bfloat16", *arguments]) == 0
    out = capsys.readouterr().out
    assert "launches" not in out
    assert "IoU of a point's three masks with those of float64: 0.9" in out


@pytest.mark.usefixtures("small")
def test_wrong_numbers_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = models.fused

    def wrong(*arguments: Any) -> Any:
        fused = right(*arguments)
        fused.norm.bias += 0.1
        return fused

    monkeypatch.setattr(models, "fused", wrong)
    command = ["validate", "--model", SMALL, "--dtype", "bfloat16", "--backend", "reference"]
    assert main(command) == 1
    assert f"image encoder on reference, bfloat16, {SMALL}, embedding" in capsys.readouterr().out


def test_the_masks_are_those_of_the_predictor() -> None:
    model = small_model()
    picture = torch.randint(0, 256, (90, 128, 3), generator=torch.Generator().manual_seed(0))
    pixels = picture.to(torch.uint8).numpy()
    predictor = ek.EfficientViTSamPredictor(model)
    predictor.set_image(pixels)
    expected = predictor.predict(
        point_coords=torch.tensor([[50.0, 30.0]]).numpy(),
        point_labels=torch.ones(1).numpy(),
        multimask_output=True,
    )
    decoding = validate_model.MaskDecoding(model, (90, 128), (50, 30), torch.float32)
    assert predictor.features is not None
    logits = decoding.logits(predictor.features)
    torch.testing.assert_close(logits[0], torch.from_numpy(expected[2]))
    assert (decoding.masks(logits).numpy() == expected[0]).mean() > 0.9999


@pytest.mark.usefixtures("small")
def test_a_kernel_at_fault_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")

    class Fault(simt.FaultError):
        def __init__(self) -> None:
            Exception.__init__(self, "a race in conv_kernel")

    def at_fault(*_: Any) -> None:
        raise Fault

    monkeypatch.setattr(simt.Emulation, "launch", at_fault)
    assert main(IN_THE_EXECUTOR) == 2
    assert "float16: a race in conv_kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", SMALL, "--op", "mbconv"], "--op chooses among operations"),
        (["--model", SMALL, "--quick"], "--quick chooses among operations"),
        (
            ["--model", SMALL, "--backend", "cpu", "--backend", "reference"],
            "--backend: a model takes one, got cpu, reference",
        ),
        (["--checkpoint", "l0.pt"], "--checkpoint is for a whole model: name it with --model"),
        (["--model", SMALL, "--checkpoint", "none.pt"], "--checkpoint: "),
        (["--executor", "simt", "--device", "meta"], "--executor simt runs on the CPU"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_executor_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["validate", "--executor", "simt"]) == 2
    assert "--executor simt: emulate needs Triton: pip install triton" in capsys.readouterr().err


def test_operations_in_the_executor(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "report.json"
    command = ["validate", "--executor", "simt", "--op", "layer_norm_2d", "--quick"]
    assert main([*command, "--dtype", "float16", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {row["backend"] for row in rows} == {"triton"}
