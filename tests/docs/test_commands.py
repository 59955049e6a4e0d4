"""Every command that the documents show works, on a small model in the place of L0."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import simt_kernels

import evsam_kernels
from bench.emulated import SMALL
from evsam_kernels import cli
from evsam_kernels.cli import demo, validate
from evsam_kernels.numerics import validation
from evsam_kernels.sam import zoo
from evsam_kernels.sam.synthetic import load_synthetic_weights

ROOT = Path(__file__).parents[2]
L0 = "efficientvit-sam-l0"
SAXPY = """
extern "C" __global__ void saxpy(const float* x, float* y, float a, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += a * x[i];
}
"""


def commands() -> Iterator[str]:
    """Those of `evsam`, each once; `make` and `pip` are what continuous integration runs."""
    found: dict[str, None] = {}
    for document in ("README.md", "CONTRIBUTING.md", "docs/simt.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if line.startswith("evsam "):
                    found[line.partition("  #")[0].strip()] = None
    return iter(found)


COMMANDS = list(commands())


@pytest.fixture
def workplace(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the command reads; L0 is small, and operations have one case each."""
    # The counts of attention to fewer tokens would say little of a warp.
    small = replace(SMALL, image_size=512 if "inspect" in command else SMALL.image_size)
    monkeypatch.setitem(zoo.VARIANTS, L0, small)
    model = evsam_kernels.create_efficientvit_sam_model(L0, pretrained=False)
    load_synthetic_weights(model)
    torch.save(model.state_dict(), tmp_path / "efficientvit_sam_l0.pt")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "picture.jpg", tmp_path / "folder" / "other.png"):
        noise = np.random.RandomState(0).randint(0, 256, (400, 500, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)
    (tmp_path / "saxpy.cu").write_text(SAXPY)
    for name in ("gemm.cu", "softmax.cu", "triton_kernels.py"):
        shutil.copy(simt_kernels.FOLDER / name, tmp_path)

    def few(*arguments: Any, **options: Any) -> list[validation.Step]:
        steps = validation.plan(*arguments, **options)
        return list({(step.case.op, step.dtype): step for step in steps}.values())

    monkeypatch.setattr(validate, "plan", few)
    monkeypatch.setattr(demo, "plan", few)
    monkeypatch.chdir(tmp_path)


def test_there_are_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} == {
        subcommand.__name__.rpartition(".")[2] for subcommand in cli._SUBCOMMANDS
    }


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_works(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "inspect" in command or "--executor" in command:
        pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    _, *arguments = shlex.split(command)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out
