"""A stand-in for the CUDA driver, and images of kernels for it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from evsam_kernels import cuda
from evsam_kernels.cuda import driver

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run([*command, str(HERE / "driver.cpp"), "-o", str(path)], check=True)
    return path


class Standin:
    """The driver, and what was asked of it."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def calls(self, function: str = "") -> list[str]:
        """What was called so far, or the arguments of each call of `function`."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        if not function:
            return [line.split(" ")[0] for line in lines]
        return [line.split(" ", 1)[1] for line in lines if line.split(" ")[0] == function]


@pytest.fixture
def standin(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """The library is the driver of this machine; a source called "tiny" has images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("tiny.ptx", "tiny.sm_80.cubin", "tiny.sm_86.cubin", "tiny.sm_90.cubin"):
        (folder / name).write_text(f"image {name}")
    monkeypatch.setattr(cuda, "IMAGES", folder)
    monkeypatch.setattr(driver, "LIBRARY", str(library))
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "log"))
    driver._loaded.cache_clear()
    yield Standin(tmp_path / "log")
    driver._loaded.cache_clear()
