"""What the documents promise: their examples run, their commands parse, what they name exists."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evsam_kernels
from evsam_kernels import cli
from evsam_kernels.ops.registry import OPERATIONS, has_kernel
from evsam_kernels.sam.synthetic import load_synthetic_weights

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples read: a checkpoint, a picture, and the authors' package."""
    model = evsam_kernels.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    load_synthetic_weights(model)
    torch.save(model.state_dict(), tmp_path / "efficientvit_sam_l0.pt")
    noise = np.random.RandomState(0).randint(0, 256, (200, 300, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.jpg")
    # Stands in for the authors' package; tests/fusion has models with their structure.
    package, zoo = types.ModuleType("efficientvit"), types.ModuleType("efficientvit.sam_model_zoo")
    zoo.create_efficientvit_sam_model = evsam_kernels.create_efficientvit_sam_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "efficientvit", package)
    monkeypatch.setitem(sys.modules, "efficientvit.sam_model_zoo", zoo)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run_from_top_to_bottom(workplace: Path) -> None:
    found = blocks(README, "python")
    assert len(found) == README.count("```python") >= 4
    names: dict[str, Any] = {}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"README.md, example {number}", "exec"), names)
    assert names["masks"].shape == (3, 200, 300)
    assert isinstance(names["records"], list)
    assert names["model"].image_encoder.fusion_report.swapped


def test_a_fresh_machine_needs_two_commands() -> None:
    section = README.split("## On a fresh machine\n")[1].split("\n## ")[0]
    assert [block.strip() for block in blocks(section, "sh")] == ["make demo", "make test"]


def test_make_has_the_two_entry_points() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "CHECKPOINT" in makefile


def test_the_table_of_kernels_is_the_registrys() -> None:
    rows = {
        cells[0].strip("`"): cells[2:]
        for cells in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in README.splitlines()
            if line.startswith("| `")
        )
    }
    assert list(rows) == list(OPERATIONS)
    for op, cells in rows.items():
        backends = ("reference", "cpu", "triton", "cuda")
        marked = [backend for backend, cell in zip(backends, cells, strict=True) if cell]
        assert marked == [name for name in backends if has_kernel(op, name)]


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_that_are_named_exist(document: str) -> None:
    quoted = re.findall(r"`((?:evsam_kernels|csrc|python|tests)/[^`<>]*)`", document)
    linked = re.findall(r"\]\(([^):]+)\)", document)
    assert quoted or linked
    for name in [*quoted, *linked]:
        assert (ROOT / name).exists(), name


def test_the_changelog_names_every_operation_and_subcommand() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog
    for op in OPERATIONS:
        assert f"`{op}`" in changelog
    for subcommand in cli._SUBCOMMANDS:
        assert f"`evsam {subcommand.__name__.rpartition('.')[2]}`" in changelog
