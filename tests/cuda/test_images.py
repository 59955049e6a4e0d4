"""The images that were built are of these sources, and the executor runs their very text."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from evsam_kernels import cuda
from evsam_kernels.backends import build_info

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not build_info.read().cuda_built, reason="the CUDA kernels were not built"
)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("evsam_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evsam_setup", module)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


def test_images_are_of_these_sources(setup: ModuleType) -> None:
    manifest = json.loads((cuda.IMAGES / "manifest.json").read_text())
    assert manifest["digest"] == setup.cuda_digest(), "build again: pip install --editable ."
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        archs = {image.arch for image in cuda.images(source.stem)}
        assert archs == {None, *manifest["architectures"]}


def test_the_executor_runs_what_is_shipped() -> None:
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        assert cuda._module(source.stem).ptx == (cuda.IMAGES / f"{source.stem}.ptx").read_text()
        assert source.name in cuda._module(source.stem).sources
