"""docs/simt.md is true: its examples run and print what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import simt_kernels

PAGE = (Path(__file__).parents[2] / "docs" / "simt.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def without_ptx(text: str) -> str:
    """A report without lines and registers of the PTX, which every nvcc numbers its own way."""
    return re.sub(r"PTX line \d+: .*", "PTX", text)


def test_the_examples_run_and_print_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="comes with evsam-kernels[gpu]")
    monkeypatch.syspath_prepend(str(simt_kernels.FOLDER))
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    printed, compared = "", 0
    for language, block in BLOCKS:
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block, "docs/simt.md", "exec"), names)
            printed = without_ptx(output.getvalue())
        elif language == "text":
            # "..." on a line of its own stands for the rest.
            shown, dots, _ = without_ptx(block).partition("\n...\n")
            assert printed.startswith(shown) if dots else printed == shown
            compared += 1
    assert compared == 2
