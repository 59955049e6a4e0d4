"""`evsam demo` on a tiny model: what it shows, and that wrong numbers keep it from timing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evsam_kernels.cli import demo, main, models
from evsam_kernels.cli.pictures import PHOTOGRAPH, read
from evsam_kernels.numerics.budget import Row
from evsam_kernels.numerics.validation import Step, plan, validate

Demo = Callable[..., int]
CASE_NAMES = ("large", "tiny")


@pytest.fixture
def run_demo(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Runs the demo on the tiny model, with a few of the operations' checks."""
    monkeypatch.chdir(tmp_path)

    def few_steps(**arguments: Any) -> list[Step]:
        steps = plan(("layer_norm_2d", "upsample_add"), **arguments)
        return [step for step in steps if step.case.name in CASE_NAMES]

    monkeypatch.setattr(demo, "plan", few_steps)
    monkeypatch.setattr(demo, "_TIMED_ROUNDS", 1)
    monkeypatch.setattr(demo, "_POINTS_PER_SIDE", 2)
    return lambda *arguments: main(["demo", "--model", tiny_model, *map(str, arguments)])


def test_everything_is_shown_with_synthetic_weights(
    run_demo: Demo, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo() == 0
    out = capsys.readouterr().out
    assert tiny_model in out
    assert f"torch {torch.__version__}" in out
    assert out.count(models.SYNTHETIC_NOTICE) == 2
    assert "make demo CHECKPOINT=" in out
    assert "blocks swapped" in out and "multi_scale_attention on " in out
    for op in ("layer_norm_2d", "upsample_add"):
        assert re.search(rf"\n  {op} +reference( +[01]\.\d\d){{3}}   in \d of \d+ cases\n", out)
    assert "compared, 0 outside their budget" in out
    assert re.search(r"\n  float32 +fused \d\S+  unfused \d\S+  allowed \d\S+  passed\n", out)
    assert re.search(r"\n  bfloat16 +fused \d\S+  unfused \d\S+  allowed \d\S+  passed\n", out)
    assert re.search(r"\n  float16 +fused \d\S+  unfused not run .* finite  passed\n", out)
    assert re.search(
        r"unfused +\d+\.\d ms\n  fused +\d+\.\d ms\n  unfused / fused = \d+\.\d\d", out
    )
    assert "everything" not in out.split("Masks of coffee.jpg")[1]
    drawn = np.asarray(Image.open("demo_output/coffee_prompts.png"))
    original = read(PHOTOGRAPH)
    assert drawn.shape == original.shape
    assert (drawn != original).any()
    assert [path.name for path in Path("demo_output").iterdir()] == ["coffee_prompts.png"]


def test_a_checkpoint_adds_everything_and_takes_the_warning_away(
    run_demo: Demo, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("--checkpoint", tiny_checkpoint, "--output-dir", "shown/here") == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC" not in out
    assert "everything, 2 x 2 points: 600 x 400" in out
    names = sorted(path.name for path in Path("shown/here").iterdir())
    assert names == ["coffee_everything.png", "coffee_prompts.png"]


def test_the_ratio_is_that_of_the_medians_and_slower_is_said(
    run_demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    medians = {"unfused": 0.1, "fused": 0.2}
    monkeypatch.setattr(demo, "interleaved_medians", lambda functions, **options: medians)
    assert run_demo() == 0
    out = capsys.readouterr().out
    assert "unfused    100.0 ms" in out
    assert "fused      200.0 ms" in out
    assert "unfused / fused = 0.50: fused is SLOWER" in out


def test_no_times_when_an_operation_fails(
    run_demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_broken(steps: Any, device: str) -> Iterator[list[Row]]:
        *fine, last = validate(steps, device)
        yield from fine
        yield [*last[:-1], dataclasses.replace(last[-1], failure="it is broken")]

    monkeypatch.setattr(demo, "validate", one_broken)
    assert run_demo() == 1
    out = capsys.readouterr().out
    assert "it is broken" in out
    assert ", 1 outside their budget" in out
    assert_nothing_is_claimed(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_times_when_the_fused_encoder_is_wrong(
    run_demo: Demo,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = models.fused

    def wrong(module: Any, backend: str, at: torch.dtype | None = None) -> Any:
        fast = right(module, backend, at)
        if at == dtype:
            damage = float("inf") if dtype == torch.float16 else 1.5
            fast.norm.bias += damage
        return fast

    monkeypatch.setattr(models, "fused", wrong)
    assert run_demo() == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"  FAILED\n", out)) == 1
    assert_nothing_is_claimed(out)


def assert_nothing_is_claimed(out: str) -> None:
    assert "no times and no masks" in out
    assert " ms" not in out
    assert not list(Path("demo_output").iterdir())


def test_a_folder_that_cannot_be_made_is_refused(
    run_demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert run_demo("--output-dir", "file/out") == 2
    assert "--output-dir cannot be made" in capsys.readouterr().err


def test_a_missing_checkpoint_is_refused(
    run_demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo("--checkpoint", "absent.pt") == 2
    assert "absent.pt" in capsys.readouterr().err
